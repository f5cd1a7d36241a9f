"""Wrong answers to the exercises of chapter 3, each with words that its verdict must contain."""

_ATTENTION = """
def my_attention(qkv, num_heads):
    queries, keys, values = rearrange(qkv, "b n ({cut} d) -> three b h n d", three=3, h=num_heads)
    weights = (queries @ keys.mT{scale}).softmax(dim={axis})
    return rearrange(weights @ values, "b h n d -> b n ({merge})")
"""


def _attention(cut="three h", scale=" / queries.shape[-1] ** 0.5", axis=-1, merge="h d"):
    return _ATTENTION.format(cut=cut, scale=scale, axis=axis, merge=merge)


_DROP = """
def my_drop_path(branch, rate, training):
    {body}
"""


def _drop(body):
    return _DROP.format(body=body.strip().replace("\n", "\n    "))


_GUARD = "if not training or rate == 0:\n    return branch\nif rate == 1:\n    return branch * 0\n"


def _predict(numbers):
    return f"def my_prediction():\n    return {numbers}\n"


WRONG = {
    "check_attention": [
        (_attention(cut="h three"), "[heads][3][d]"),
        (_attention(axis=-2), "softmax runs over the queries"),
        (_attention(scale=""), "not divided by sqrt(d)"),
        (_attention(scale=" / queries.shape[-1]"), "divided by d, not by sqrt(d)"),
        (_attention(scale=" / qkv.shape[-1] ** 0.5 * 3 ** 0.5"), "divided by sqrt(E)"),
        (_attention(merge="d h"), "interleaved"),
        (_attention(axis=-2, scale=""), "the columns of the weights sum to 1"),
        (_attention(axis=-2, scale=""), "not divided by sqrt(d)"),
        ("def my_attention(qkv, num_heads):\n    return qkv", "expected (2, 5, 24)"),
        ("def my_attention(qkv, num_heads):\n    return qkv.chunk(3, -1)[2]", "numbers differ"),
        ("def my_attention(qkv, num_heads):\n    return qkv @ qkv", "stopped with RuntimeError"),
    ],
    "check_drop_path": [
        (_drop("return branch * (torch.rand(len(branch), 1, 1) >= rate) / (1 - rate)"), "evalu"),
        (
            _drop("if not training:\n    return branch\nreturn branch * (1 - rate)"),
            "nothing is ever dropped",
        ),
        (_drop(_GUARD + "return branch * (torch.rand(len(branch), 1, 1) >= rate)"), "not scaled"),
        (
            _drop(_GUARD + "return branch * (torch.rand(len(branch), 1, 1) < rate) / rate"),
            "survives with probability rate",
        ),
        (
            _drop(_GUARD + "return branch * (torch.rand(*branch.shape[:2], 1) >= rate) / (1-rate)"),
            "each token has its own draw",
        ),
        (
            _drop(_GUARD + "return branch * (torch.rand(branch.shape) >= rate) / (1 - rate)"),
            "each number has its own draw",
        ),
        (
            _drop(_GUARD + "return branch * (torch.rand(1, 1, 1) >= rate) / (1 - rate)"),
            "the batch has one draw",
        ),
        (
            _drop(
                "if not training:\n    return branch\n"
                "return branch * (torch.rand(len(branch), 1, 1) >= rate) / (1 - rate)"
            ),
            "divides by zero",
        ),
        (
            _drop(
                _GUARD
                + "branch *= (torch.rand(len(branch), 1, 1) >= rate) / (1 - rate)\nreturn branch"
            ),
            "was changed",
        ),
    ],
    "check_prediction": [
        (_predict((49, 1774464, 88544256)), "class token is missing"),
        (_predict((197, 1774464, 378391296)), "patch 16"),
        (_predict((50, 1769472, 90393600)), "biases and the two norms"),
        (_predict((50, 1772928, 90393600)), "the two norms are missing"),
        (_predict((50, 1773312, 90393600)), "bias of the qkv"),
        (_predict((50, 1774464, 88473600)), "attention products are missing"),
        (_predict((50, 1774464, 180787200)), "count as one"),
        (_predict((50, 1774464, 89433600)), "one of the two attention products"),
        (_predict(50), "return three numbers"),
    ],
}
