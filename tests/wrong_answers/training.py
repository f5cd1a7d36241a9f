"""Wrong answers to the exercises of chapter 8, each with words that its verdict must contain."""

_LOSS = """
def my_loss(logits, shares, smoothing):
    target = {target}
    losses = [{loss} for own in logits if own is not None]
    return {result}
"""


def _loss(
    target="(1 - smoothing) * shares + smoothing / shares.shape[1]",
    loss="-(target * own.log_softmax(1)).sum(1).mean()",
    result="sum(losses) / len(losses)",
):
    return _LOSS.format(target=target, loss=loss, result=result)


_JOINT = """
def my_loss(logits, shares, smoothing):
    own = {own}
    target = (1 - smoothing) * shares + smoothing / shares.shape[1]
    return -(target * own.log_softmax(1)).sum(1).mean()
"""

_OTHERS = "(1 - smoothing) * shares + smoothing * (1 - shares) / (shares.shape[1] - 1)"
_HARD = (
    "(1 - smoothing) * torch.eye(shares.shape[1]).to(shares)[shares.argmax(1)]"
    " + smoothing / shares.shape[1]"
)

_GROUPS = """
def my_groups(model, weight_decay):
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        if {wanted}:
            ({spare}).append(parameter)
    return {result}
"""
_SPARE = "spared if parameter.ndim < 2 or name.endswith(('cls_token', 'pos_embed')) else decayed"
_PAIR = (
    "[{'params': decayed, 'weight_decay': weight_decay}, {'params': spared, 'weight_decay': 0.0}]"
)


def _groups(wanted="parameter.requires_grad", spare=_SPARE, result=_PAIR):
    return _GROUPS.format(wanted=wanted, spare=spare, result=result)


_TIDY = """
def my_groups(model, weight_decay):
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": biases, "weight_decay": 0.0},
    ]
"""

_RIGHT = {
    "trans_head.fc.weight": "shrunk",
    "trans_head.fc.bias": "same",
    "trans_head.norm.weight": "same",
    "blocks.5.trans_block.mlp.fc2.weight": "taught",
    "entry.token_embed.cls_token": "taught",
    "conv_head.fc.weight": "taught",
}


def _fates(**changes):
    short = {name.split(".", 1)[1].replace(".", "_"): name for name in _RIGHT}
    short["conv_fc"] = "conv_head.fc.weight"
    short["fc_weight"] = "trans_head.fc.weight"
    answer = _RIGHT | {short[name]: word for name, word in changes.items()}
    return f"def my_fates():\n    return {answer!r}\n"


WRONG = {
    "check_loss": [
        (_loss(result="sum(losses)"), "that is the sum of both losses"),
        (_loss(result="losses[0]"), "CNN head's loss alone"),
        (_loss(result="losses[-1]"), "transformer head's loss alone"),
        (_loss(target="shares"), "the smoothing is left out"),
        (_loss(target=_OTHERS), "to all classes alike"),
        (_loss(loss="-(target * own.softmax(1).log_softmax(1)).sum(1).mean()"), "a softmax too"),
        (_loss(target=_HARD), "the labels are shares"),
        (_loss(loss="-(target * own.log_softmax(1)).sum()"), "images of a batch are summed"),
        (_loss(loss="(target * own.log_softmax(1)).sum(1).mean()"), "the sign is wrong"),
        (_loss(loss="-(target * own.log_softmax(1)).mean()"), "the classes are averaged"),
        (_loss(loss="-(target * own.log_softmax(0)).sum(1).mean()"), "not over the images"),
        (_loss(loss="-(target * own.log_softmax(1)).sum(1)"), "the loss has shape (5,)"),
        (_loss(loss="-(target * own.softmax(1).log()).sum(1).mean()"), "use log_softmax, not"),
        (_loss(result="sum(losses) / 2"), "divide by the heads that there are"),
        (_loss(result="(sum(losses) / len(losses)).detach()"), "no gradient flows"),
        (_loss(result="(sum(losses) / len(losses)).item()"), "the loss is a float"),
        (_JOINT.format(own="(logits.conv + logits.trans) / 2"), "the logits are averaged"),
        (_JOINT.format(own="logits.sum()"), "the logits are added"),
        (
            _loss().replace(" for own in logits if own is not None", " for own in logits"),
            "a head may be None",
        ),
    ],
    "check_groups": [
        (_TIDY, "the class token is in no group (entry.token_embed.cls_token)"),
        (_TIDY, "the scale of a norm must not decay"),
        (_TIDY, "the positional embedding is in no group"),
        (
            _groups(spare="spared if name.endswith('bias') else decayed"),
            "the class token must not decay",
        ),
        (_groups(spare="spared if parameter.ndim < 2 else decayed"), "class token must not decay"),
        (
            _groups(spare="spared if name.endswith(('bias', 'token', 'embed')) else decayed"),
            "the scale of a norm must not decay",
        ),
        (
            _groups(spare="spared if parameter.ndim < 2 or name.endswith('token') else decayed"),
            "the positional embedding must not decay",
        ),
        (_groups(wanted="True"), "a frozen parameter is in a group"),
        (_groups(spare="spared"), "a matrix or kernel must decay"),
        (_groups(result="decayed, spared"), "return a list of groups"),
        (_groups(result="2 * " + _PAIR), "stands in two groups"),
        (
            _groups(result=_PAIR.replace("weight_decay}", "0.1}")),
            "the weight decay is 0.1, not 0.05",
        ),
    ],
    "check_fates": [
        (_fates(fc_weight="same"), "its gradient is 0 and not None"),
        (_fates(fc_weight="taught"), "a loss times 0"),
        (_fates(fc_bias="shrunk"), "biases are in the group that does not decay"),
        (_fates(norm_weight="shrunk"), "scales are in the group"),
        (_fates(**{"5_trans_block_mlp_fc2_weight": "same"}), "go up to the maps"),
        (_fates(token_embed_cls_token="same"), "patches attend to it"),
        (_fates(conv_fc="shrunk"), "follow its gradient"),
        (_fates(conv_fc="frozen"), 'choose "taught", "shrunk" or "same"'),
        ("def my_fates():\n    return {}\n", "is missing"),
        ("def my_fates():\n    return 'taught'\n", "return a dict"),
    ],
}
