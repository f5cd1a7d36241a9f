"""Checks of the exercises of chapter 8, training."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from conformer_src.checks import agrees, exercise, require, require_shape
from conformer_src.conformer import Conformer, DualLogits, create_model
from conformer_src.training import TwoHeadLoss, freeze, parameter_groups


def _losses(logits: DualLogits, target: Tensor) -> list[Tensor]:
    return [-(target * own.log_softmax(1)).sum(1).mean() for own in logits]


def _loss_mistakes(logits: DualLogits, shares: Tensor, smoothing: float) -> dict[str, Tensor]:
    """Return what wrong losses give, under what is wrong with them."""
    count = shares.shape[1]
    target = (1 - smoothing) * shares + smoothing / count
    conv, trans = _losses(logits, target)
    others = (1 - smoothing) * shares + smoothing * (1 - shares) / (count - 1)
    halves = DualLogits(*(own.softmax(1) for own in logits))
    joint, added = (DualLogits(*[logits.sum() / by] * 2) for by in (2, 1))
    hard = nn.functional.one_hot(shares.argmax(1), count).to(shares)
    hard = (1 - smoothing) * hard + smoothing / count
    mean = (conv + trans) / 2
    return {
        "that is the sum of both losses; take their mean": conv + trans,
        "that is the CNN head's loss alone; take both": conv,
        "that is the transformer head's loss alone; take both": trans,
        "the smoothing is left out": sum(_losses(logits, shares)) / 2,
        "the smoothed share goes to all classes alike, the right one too: divide by the number of "
        "classes": sum(_losses(logits, others)) / 2,
        "a softmax too many: log_softmax takes logits, not probabilities": sum(
            _losses(halves, target)
        )
        / 2,
        "the logits are averaged; average the losses, so that each head must be right by itself": (
            _losses(joint, target)[0]
        ),
        "the logits are added; average the losses, so that each head must be right by itself": (
            _losses(added, target)[0]
        ),
        "the labels are shares: use all of a row, not its largest class": sum(_losses(logits, hard))
        / 2,
        "the images of a batch are summed; take their mean": mean * len(shares),
        "the sign is wrong: a loss falls as the right class gains": -mean,
        "the classes are averaged; sum over them": mean / count,
        "softmax runs over the classes, dimension 1, not over the images": sum(
            -(target * own.log_softmax(0)).sum(1).mean() for own in logits
        )
        / 2,
    }


@exercise
def check_loss(answer: Callable[[DualLogits, Tensor, float], Tensor]) -> str:
    """Check the mean of two cross-entropies with shares as labels and smoothing."""
    logits = DualLogits(*torch.randn(2, 5, 4, dtype=torch.float64))
    shares = torch.rand(5, 4, dtype=torch.float64).softmax(1)
    for smoothing in (0.0, 0.1):
        given = answer(logits, shares, smoothing)
        require_shape(given, (), "the loss")
        right = TwoHeadLoss(label_smoothing=smoothing)(logits, shares)
        if not agrees(given, right):
            mistakes = _loss_mistakes(logits, shares, smoothing)
            found = [words for words, value in mistakes.items() if agrees(given, value)]
            require(False, found[0] if found else f"the loss is {given:.4f}; expected {right:.4f}")
    for alone in (logits._replace(trans=None), logits._replace(conv=None)):
        right = TwoHeadLoss()(alone, shares)
        try:
            given = answer(alone, shares, 0.0)
        except (AttributeError, TypeError):
            require(False, "a head may be None: a model can have one branch only")
        require_shape(given, (), "the loss of one head")
        require(
            not agrees(given, right / 2),
            "with one head there is one loss: divide by the heads that there are, not by 2",
        )
        require(agrees(given, right), "with one head, its loss alone is the mean")
    grown = DualLogits(*(own.detach().requires_grad_() for own in logits))
    loss = answer(grown, shares, 0.1)
    require(loss.requires_grad, "no gradient flows: do not detach, and call no item()")
    large = DualLogits(*(1e4 * own for own in logits))
    require(
        bool(answer(large, shares, 0.0).isfinite()),
        "large logits give no number: use log_softmax, not the logarithm of softmax",
    )
    return "the mean of two cross-entropies, each head by itself"


@cache
def _network() -> Conformer:
    torch.manual_seed(0)
    return create_model("conformer_micro", in_chans=1)


def _kind(name: str, parameter: Tensor) -> str:
    """Say what a parameter is, in the words of the exercise."""
    if name.endswith("cls_token"):
        return "the class token"
    if name.endswith("pos_embed"):
        return "the positional embedding"
    if name.endswith("bias"):
        return "a bias"
    return "the scale of a norm" if parameter.ndim < 2 else "a matrix or kernel"


def _fault(name: str, parameter: Tensor, own: float | None, right: float | None) -> str | None:
    """Say what is wrong with a parameter's decay, None where it is in no group; or None."""
    kind = _kind(name, parameter)
    if own == right:
        return None
    if own is None:
        return f"{kind} is in no group"
    if right is None:
        return "a frozen parameter is in a group: leave out what has requires_grad False"
    if right == 0:
        return f"{kind} must not decay"
    return f"{kind} must decay" if own == 0 else f"the weight decay is {own}, not {right}"


@exercise
def check_groups(answer: Callable[[nn.Module, float], list[dict]]) -> str:
    """Check what decays, what is spared, and that frozen parameters are left out."""
    for part in ("none", "conv"):
        model = create_model("conformer_micro", in_chans=1, pos_embed=4)
        freeze(model, part)
        groups = answer(model, 0.05)
        formed = isinstance(groups, list | tuple) and all(
            isinstance(group, dict) and {"params", "weight_decay"} <= group.keys()
            for group in groups
        )
        require(formed, 'return a list of groups, {"params": [...], "weight_decay": ...}')
        given = [(p, group["weight_decay"]) for group in groups for p in group["params"]]
        decay = {id(parameter): value for parameter, value in given}
        require(len(decay) == len(given), "a parameter stands in two groups")
        right = {
            id(parameter): group["weight_decay"]
            for group in parameter_groups(model, 0.05)
            for parameter in group["params"]
        }
        faults = {}
        for name, parameter in reversed(list(model.named_parameters())):
            fault = _fault(name, parameter, decay.get(id(parameter)), right.get(id(parameter)))
            faults |= {fault: name} if fault else {}
        wrong = [f"{fault} ({name})" for fault, name in reversed(faults.items())]
        require(not wrong, "; ".join(wrong))
    return "matrices and kernels decay, all else is spared, and what is frozen is left out"


_NAMES = (
    "trans_head.fc.weight",
    "trans_head.fc.bias",
    "trans_head.norm.weight",
    "blocks.5.trans_block.mlp.fc2.weight",
    "entry.token_embed.cls_token",
    "conv_head.fc.weight",
)
_WHY = {
    ("trans_head.fc.weight", "same"): "its gradient is 0 and not None, so AdamW decays it",
    ("trans_head.fc.weight", "taught"): "a loss times 0 gives a gradient of 0",
    ("trans_head.fc.bias", "shrunk"): "biases are in the group that does not decay",
    ("trans_head.norm.weight", "shrunk"): "scales are in the group that does not decay",
    ("blocks.5.trans_block.mlp.fc2.weight", "shrunk"): "the last block's patches go up to the maps",
    ("blocks.5.trans_block.mlp.fc2.weight", "same"): "the last block's patches go up to the maps",
    (
        "entry.token_embed.cls_token",
        "shrunk",
    ): "patches attend to it, and the class token is spared",
    ("entry.token_embed.cls_token", "same"): "patches attend to it and carry on what they read",
}


@cache
def _fates() -> dict[str, str]:
    """Take the step, and say what became of each parameter."""
    model = _network().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = AdamW(parameter_groups(model, 0.05), lr=1e-3)
    images, labels = torch.randn(8, 1, 32, 32), torch.arange(8)
    TwoHeadLoss(trans_weight=0.0)(model(images), labels).backward()
    optimizer.step()
    fates = {}
    for name, parameter in model.named_parameters():
        if torch.equal(parameter, before[name]):
            fates[name] = "same"
        else:
            shrunk = torch.equal(parameter, before[name] * (1 - 1e-3 * 0.05))
            fates[name] = "shrunk" if shrunk else "taught"
    return fates


@exercise
def check_fates(answer: Callable[[], dict[str, str]]) -> str:
    """Check what one step does to six parameters when the transformer's head is not taught."""
    given = answer()
    require(isinstance(given, dict), "return a dict from the six names to a word")
    missing = [name for name in _NAMES if name not in given]
    require(not missing, f"{', '.join(missing)} is missing")
    right = _fates()
    for name in _NAMES:
        word = given[name]
        known = word in ("taught", "shrunk", "same")
        require(known, f'{name} is {word!r}; choose "taught", "shrunk" or "same"')
        why = _WHY.get((name, word), "follow its gradient, and ask which group it is in")
        require(word == right[name], f'{name} is not "{word}": {why}')
    return "one head is silent, and yet its whole branch is taught"
