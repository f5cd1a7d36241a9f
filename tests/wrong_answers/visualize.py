"""Wrong answers to the exercises of chapter 11, each with words that its verdict must contain."""

_ALL = '{"class activation", "class attention", "relevance"}'


def _changes(
    conv='{"class activation"}',
    trans='{"relevance"}',
    up='{"class activation"}',
    down=_ALL,
    mlp='{"class activation", "relevance"}',
):
    parts = {
        "conv_head.fc": conv,
        "trans_head.fc": trans,
        "blocks.2.up": up,
        "blocks.2.down": down,
        "blocks.2.trans_block.mlp": mlp,
    }
    entries = ", ".join(f'"{part}": {names}' for part, names in parts.items())
    return f"def my_changes():\n    return {{{entries}}}\n"


_ATTENTION = """
def my_class_attention(attentions, grid):
    total = torch.eye(attentions[0].shape[-1])
    for weights in {blocks}:
        mixing = {heads}{identity}
        {rows}
        total = {product}
    return {result}
"""


def _attention(
    blocks="attentions",
    heads="weights.mean(1)",
    identity=" + torch.eye(weights.shape[-1])",
    rows="mixing = mixing / mixing.sum(-1, keepdim=True)",
    product="mixing @ total",
    result="total[:, 0, 1:].reshape(-1, *grid)",
):
    return _ATTENTION.format(
        blocks=blocks, heads=heads, identity=identity, rows=rows, product=product, result=result
    )


_CONTRAST = """
def my_contrast(model, images, one, other):
    with torch.no_grad():
        maps = model.forward_features(images).maps
        head = model.conv_head.fc
        best = model(images).sum().argmax(1)
        weights = {weights}
        shares = torch.einsum("{einsum}", weights, maps){scale}
    return {result}
"""


def _contrast(
    weights="head.weight[one] - head.weight[other]",
    einsum="c,bchw->bhw",
    scale=" / maps[0, 0].numel()",
    result="shares",
):
    return _CONTRAST.format(weights=weights, einsum=einsum, scale=scale, result=result)


WRONG = {
    "check_changes": [
        (_changes(conv=_ALL), "conv_head.fc: class attention stays: rollout reads attention"),
        (_changes(conv="set()"), "conv_head.fc: class activation changes"),
        (
            _changes(trans='{"relevance", "class attention"}'),
            "trans_head.fc: class attention stays",
        ),
        (_changes(trans="set()"), "trans_head.fc: relevance changes: the gradient starts"),
        (_changes(up=_ALL), "blocks.2.up: class attention stays: after the last Up"),
        (_changes(up='{"class activation", "relevance"}'), "blocks.2.up: relevance stays"),
        (_changes(down='{"class attention", "relevance"}'), "blocks.2.down: class activation"),
        (_changes(down='{"class activation", "relevance"}'), "blocks.2.down: class attention"),
        (_changes(mlp=_ALL), "blocks.2.trans_block.mlp: class attention stays"),
        (_changes(mlp='{"relevance"}'), "blocks.2.trans_block.mlp: class activation changes"),
        (_changes(mlp='["relevance"]'), "a list; return a set"),
        (_changes(mlp='{"rollout"}'), "rollout is not one of the three maps"),
        ("def my_changes():\n    return {'conv_head.fc': set()}\n", "trans_head.fc is missing"),
        ("def my_changes():\n    return set()\n", "return a dict of sets"),
    ],
    "check_class_attention": [
        (_attention(identity="", rows=""), "the identity is missing"),
        (_attention(identity=""), "the identity is missing"),
        (_attention(product="total @ mixing"), "multiplied in the wrong order"),
        (
            _attention(product="total @ mixing", identity=""),
            "the identity is missing: the residual sum keeps half of each token; multiplied in",
        ),
        (_attention(rows=""), "the rows do not sum to 1"),
        (_attention(blocks="attentions[-1:]"), "only the last block is in it"),
        (_attention(heads="weights.amax(1)"), "average the heads"),
        (_attention(result="total"), "this is the whole rollout"),
        (_attention(result="total[:, 0]"), "the class token is still in the row"),
        (_attention(result="total[:, 0, 1:]"), "the patches lie in a row"),
        (_attention(result="total[:, 0, :-1].reshape(-1, *grid)"), "the last patch is dropped"),
        (_attention(result="total[:, 1:, 0].reshape(-1, *grid)"), "the column of the class token"),
        (_attention(result="total[:, 1:, 1:].mean(1).reshape(-1, *grid)"), "the patches took"),
        (
            _attention(result="total[:, 0, 1:].reshape(-1, grid[1], grid[0]).mT"),
            "column by column",
        ),
        (_attention(result="total[:, 0, 1:].reshape(-1, grid[1], grid[0])"), "are swapped"),
        (
            _attention(result="(total[:, 0, 1:] / total[:, 0, 1:].amax()).reshape(-1, *grid)"),
            "the patches are rescaled",
        ),
        (
            _attention(
                result="(total[:, 0, 1:] / total[:, 0, 1:].sum(1, True)).reshape(-1, *grid)"
            ),
            "the patches are rescaled",
        ),
    ],
    "check_contrast": [
        (_contrast(weights="head.weight[other] - head.weight[one]"), "the sign is wrong"),
        (_contrast(weights="head.weight[one]"), "subtract the second"),
        (_contrast(weights="head.weight[other]"), "class activation of the second class"),
        (_contrast(weights="head.weight[one] + head.weight[other]"), "the two classes are added"),
        (
            _contrast(weights="head.weight[best] - head.weight[other]", einsum="bc,bchw->bhw"),
            "the predicted class is in it",
        ),
        (
            _contrast(weights="head.weight[best]", einsum="bc,bchw->bhw"),
            "this explains the predicted class",
        ),
        (_contrast(scale=""), "divide by the places"),
        (_contrast(result="shares.relu()"), "what speaks against is cut off"),
        (_contrast(einsum="c,bchw->bchw"), "the channels are still there"),
        (_contrast(result="shares.sum((1, 2))"), "keep the places apart"),
        (
            _contrast(result="shares + (head.bias[one] - head.bias[other]) / shares[0].numel()"),
            "the bias is spread over the places",
        ),
        (_contrast(result="shares + head.bias[one] - head.bias[other]"), "leave it out"),
    ],
}
