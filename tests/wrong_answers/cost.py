"""Wrong answers to the exercises of chapter 13, each with words that its verdict must contain."""

_LAYER = """
def my_layer(conv, height, width):
    (kernel, _), (stride, _), (padding, _) = conv.kernel_size, conv.stride, conv.padding
    rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
    weights = conv.out_channels * conv.in_channels // conv.groups * kernel**2
    bias = conv.out_channels if conv.bias is not None else 0
    {change}
    return {result}
"""


def _layer(change="pass", result="(weights + bias, weights * rows * columns)"):
    return _LAYER.format(change=change, result=result)


_CROSSING = """
def my_crossing(embed_dim, num_heads, patch_size, mlp_ratio):
    grid = 1
    while {cheap}:
        grid += 1
    return {result}
"""
_TOKENS = "(grid**2 + 1)"


def _crossing(cheap, result="grid * patch_size"):
    return _CROSSING.format(cheap=cheap, result=result)


_STOPWATCH = """
def my_stopwatch(model, images, rounds, clock):
    was, seconds = model.training, []
    {mode}
    with torch.{guard}():
        {warm}
        for _ in range(rounds):
            start = clock()
            model(images)
            seconds.append(clock() - start)
    {after}
    return {result}
"""
_MEDIAN = "sorted(seconds)[len(seconds) // 2]"


def _stopwatch(
    mode="model.eval()",
    guard="inference_mode",
    warm="model(images)",
    after="model.train(was)",
    result=_MEDIAN,
):
    return _STOPWATCH.format(mode=mode, guard=guard, warm=warm, after=after, result=result)


_FAULTY = """
def my_stopwatch(model, images, rounds, clock):
    start = clock()
    for _ in range(rounds):
        model(images)
    return (clock() - start) / rounds
"""

WRONG = {
    "check_layer": [
        (_layer(result="weights"), "return two whole numbers"),
        (_layer(result="(weights * 1.0, weights * rows * columns)"), "return two whole numbers"),
        (_layer("bias = 0"), "parameters: the bias has parameters too"),
        (_layer("bias = conv.out_channels"), "this convolution has no bias"),
        (
            _layer(result="(weights * conv.groups + bias, weights * rows * columns)"),
            "parameters: with groups",
        ),
        (
            _layer(result="(weights + bias, conv.groups * weights * rows * columns)"),
            "MACs: with groups",
        ),
        (_layer(result="(weights + bias, 2 * weights * rows * columns)"), "these are operations"),
        (_layer(result="(weights + bias, (weights + bias) * rows * columns)"), "adding the bias"),
        (_layer(result="(weights + bias, weights * height * width)"), "the stride leaves fewer"),
        (_layer(result="(weights + bias, weights)"), "that is one position"),
        (_layer("columns = rows"), "takes the height for both sides"),
        (_layer("rows = columns"), "takes the width for both sides"),
        (_layer("weights += 1"), "parameters: 2,305; expected 2,304"),
        (_layer("rows += 1"), "MACs: 626,688; expected 589,824"),
        (_layer("conv(torch.zeros(1, conv.in_channels, height, width))"), "without running"),
    ],
    "check_crossing": [
        (_crossing("grid**2 <= (2 + mlp_ratio) * embed_dim"), "the class token looks too"),
        (
            _crossing(f"num_heads * {_TOKENS} <= (2 + mlp_ratio) * embed_dim"),
            "their number does not matter",
        ),
        (
            _crossing(f"{_TOKENS} <= (2 + mlp_ratio) * embed_dim * num_heads"),
            "all heads work, not one",
        ),
        (_crossing(f"{_TOKENS} <= 2 * (2 + mlp_ratio) * embed_dim"), "two products"),
        (_crossing(f"{_TOKENS} <= 2 * embed_dim"), "the MLP is a linear map too"),
        (_crossing(f"{_TOKENS} <= (1.5 + mlp_ratio) * embed_dim"), "four linear maps"),
        (_crossing(f"{_TOKENS} <= (2 + mlp_ratio / 2) * embed_dim"), "two layers, there and back"),
        (_crossing(f"{_TOKENS} <= 6 * embed_dim"), "not always 4 x E"),
        (_crossing(f"{_TOKENS} <= (2 + mlp_ratio) * embed_dim", "grid"), "pixels wide"),
        (_crossing(f"{_TOKENS} <= embed_dim"), "expected 944"),
        (_crossing(f"{_TOKENS} < (2 + mlp_ratio) * embed_dim"), "cost the same"),
    ],
    "check_stopwatch": [
        (_FAULTY, "training mode"),
        (_FAULTY, "gradients are recorded"),
        (_FAULTY, "the first call warms up"),
        (_FAULTY, "a mean"),
        (_stopwatch(mode="pass"), "training mode: call .eval()"),
        (_stopwatch(guard="enable_grad"), "gradients are recorded"),
        (_stopwatch(warm="pass"), "the first call warms up"),
        (_stopwatch(result="sum(seconds) / len(seconds)"), "take the median"),
        (_stopwatch(result="sum(seconds)"), "the time of all rounds"),
        (_stopwatch(result="min(seconds)"), "is luck"),
        (_stopwatch(result="max(seconds)"), "the median of the rounds is"),
        (_stopwatch(result="seconds"), "return one number of seconds"),
        (_stopwatch(after="pass"), "in which it came"),
        (_stopwatch(after="model.train()"), "in evaluation"),
        ("def my_stopwatch(*_):\n    return 1.0\n", "called 0 times"),
    ],
}
