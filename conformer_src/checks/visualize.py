"""Checks of the exercises of chapter 11, visualize."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from conformer_src.checks import agrees, exercise, require, require_shape
from conformer_src.conformer import Conformer, ConformerConfig

_MAPS = ("class activation", "class attention", "relevance")
# A part that gets other weights: the maps that change with it, and why each does or does not.
_CHANGES = {
    "conv_head.fc": (
        {"class activation"},
        {
            "class activation": "its weights are the ones that weigh the channels",
            "class attention": "rollout reads attention, and no head",
            "relevance": "it is the gradient of the other head's logit",
        },
    ),
    "trans_head.fc": (
        {"relevance"},
        {
            "class activation": "it splits the logit of the other head",
            "class attention": "rollout reads attention, and no head",
            "relevance": "the gradient starts at this head",
        },
    ),
    "blocks.2.up": (
        {"class activation"},
        {
            "class activation": "what it returns is added to the maps of the last block",
            "class attention": "after the last Up no attention follows",
            "relevance": "after the last Up no way leads to the class token",
        },
    ),
    "blocks.2.down": (
        set(_MAPS),
        {
            "class activation": "other tokens go up again in the same block",
            "class attention": "the tokens look at each other after Down has changed them",
            "relevance": "the attention of the last block changes, and so does its gradient",
        },
    ),
    "blocks.2.trans_block.mlp": (
        {"class activation", "relevance"},
        {
            "class activation": "Up carries what the MLP returns into the maps",
            "class attention": "the MLP comes behind the last attention, and rollout knows no MLP",
            "relevance": "the gradient of the logit runs back through it",
        },
    ),
}


@exercise
def check_changes(answer: Callable[[], dict[str, set[str]]]) -> str:
    """Check which maps change when one part of the last block, or a head, gets other weights."""
    changes = answer()
    kind = type(changes).__name__
    require(isinstance(changes, dict), f"the result is a {kind}; return a dict of sets")
    for part in _CHANGES:
        require(part in changes, f"{part} is missing")
    for part, names in changes.items():
        require(part in _CHANGES, f"{part!r} is not one of the five parts")
        kind = type(names).__name__
        require(
            isinstance(names, set | frozenset),
            f"{part}: a {kind}; return a set of names, and set() for an empty one",
        )
        strange = sorted(map(str, names - set(_MAPS)))
        require(not strange, f"{part}: {', '.join(strange)} is not one of the three maps")
    for part, (moved, reasons) in _CHANGES.items():
        for name, reason in reasons.items():
            word = "changes" if name in moved else "stays"
            require((name in changes[part]) == (name in moved), f"{part}: {name} {word}: {reason}")
    return "right for all five parts: each map sees some of the network, and none sees all"


def _rollouts(attentions: Sequence[Tensor]) -> dict[frozenset[str], Tensor]:
    """Return the rollout (B, N, N) with each set of faults; the empty set is right."""
    found = {}
    names = ("identity", "sum", "order", "last")
    for chosen in itertools.chain.from_iterable(
        itertools.combinations(names, count) for count in range(3)
    ):
        total = torch.eye(attentions[0].shape[-1])
        for weights in attentions[-1:] if "last" in chosen else attentions:
            mixing = weights.mean(1)
            if "identity" not in chosen:
                mixing = mixing + torch.eye(mixing.shape[-1])
            if "sum" not in chosen:
                mixing = mixing / mixing.sum(-1, keepdim=True)
            total = total @ mixing if "order" in chosen else mixing @ total
        found[frozenset(chosen)] = total
    return found


_ROLLOUT_FAULTS = {
    "identity": "the identity is missing: the residual sum keeps half of each token",
    "sum": "the rows do not sum to 1: divide each by its sum after you add the identity",
    "order": "multiplied in the wrong order: each later block stands on the left",
    "last": "only the last block is in it: multiply through all of them",
}


@exercise
def check_class_attention(answer: Callable[[list[Tensor], tuple[int, int]], Tensor]) -> str:
    """Check the rollout of the class token, laid out as a grid; name the faults."""
    attentions = [2 * torch.randn(2, 3, 13, 13) for _ in range(3)]
    attentions = [scores.softmax(-1) for scores in attentions]
    result = answer([weights.clone() for weights in attentions], (3, 4))
    shape = tuple(getattr(result, "shape", ()))
    require(
        shape != (2, 13, 13), "this is the whole rollout: take the row of the class token, token 0"
    )
    require(
        shape != (2, 13),
        "the class token is still in the row: leave out its first entry, then lay out the patches",
    )
    require(shape != (2, 4, 3), "rows and columns are swapped: the grid is (rows, columns)")
    require(shape != (2, 12), "the patches lie in a row: lay them out as the grid, rows first")
    require_shape(result, (2, 3, 4))
    for faults, total in _rollouts(attentions).items():
        for row, slip in (
            (total[:, 0, 1:], None),
            (total[:, 0, :-1], "the last patch is dropped: the class token is the first"),
            (total[:, 1:, 0], "this is the column of the class token, what it gave: take its row"),
            (total[:, 1:, 1:].mean(1), "this is what the patches took: take the class token's row"),
        ):
            for heat, turned in (
                (row.reshape(2, 3, 4), None),
                (
                    row.reshape(2, 4, 3).mT,
                    "the patches are laid out column by column: they come row by row",
                ),
            ):
                words = [_ROLLOUT_FAULTS[name] for name in _ROLLOUT_FAULTS if name in faults]
                words += [word for word in (slip, turned) if word]
                require(not (words and agrees(result, heat)), "; ".join(words))
    right = _rollouts(attentions)[frozenset()][:, 0, 1:].reshape(2, 3, 4)
    loudest = [weights.amax(1) for weights in attentions]
    loud = _rollouts([weights[:, None] for weights in loudest])[frozenset()]
    require(
        not agrees(result, loud[:, 0, 1:].reshape(2, 3, 4)),
        "you took the loudest head: average the heads",
    )
    scaled = result / result.sum((1, 2), keepdim=True)
    if agrees(scaled, right / right.sum((1, 2), keepdim=True)):
        require(agrees(result, right), "the patches are rescaled: leave them as they are")
    require(agrees(result, right), "the right shape, and other numbers: do the steps by hand")
    return "averaged, completed, multiplied, cut out: this is the map of the paper's Figure 4"


def _toy() -> Conformer:
    """Return a small Conformer with maps of 3 x 2 places and heads with an opinion."""
    config = ConformerConfig(
        in_chans=1,
        num_classes=5,
        channel_ratio=0.5,
        depth=3,
        embed_dim=24,
        num_heads=3,
        stem="small",
    )
    model = Conformer(config).eval()
    for head in (model.conv_head, model.trans_head):
        nn.init.normal_(head.fc.weight, std=0.5)
        nn.init.normal_(head.fc.bias)
    return model


@exercise
def check_contrast(answer: Callable[[Conformer, Tensor, int, int], Tensor]) -> str:
    """Check the shares of the difference of two logits; name the faults."""
    model, images = _toy(), torch.randn(2, 1, 48, 32)
    one, other = 3, 1
    with torch.no_grad():
        maps = model.forward_features(images).maps
        result = answer(model, images.clone(), one, other)
        count = maps[0, 0].numel()
        each = torch.einsum("kc,bchw->bkhw", model.conv_head.fc.weight, maps) / count
        bias = model.conv_head.fc.bias
        best = model(images).sum().argmax(1)
    shape = tuple(getattr(result, "shape", ()))
    require(shape != tuple(maps.shape), "the channels are still there: weigh them and add them up")
    require(shape != (2,), "this is one number for an image: keep the places apart")
    require_shape(result, (2, *maps.shape[-2:]))
    right = each[:, one] - each[:, other]
    chosen = each[torch.arange(2), best]
    opinions = each.softmax(1)
    for wrong, mistake in (
        (-right, "the sign is wrong: heat speaks for the first class and against the second"),
        (count * right, "the shares are too large: the head averages, so divide by the places"),
        (right.relu(), "what speaks against is cut off: keep negative shares, or the sum is wrong"),
        (each[:, one] + each[:, other], "the two classes are added: ask for their difference"),
        (each[:, one], "this is class activation of the first class: subtract the second"),
        (each[:, other], "this is class activation of the second class: subtract it"),
        (chosen - each[:, other], "the predicted class is in it: take the classes that are given"),
        (chosen, "this explains the predicted class: take the classes that are given"),
        (
            right + (bias[one] - bias[other]) / count,
            "the bias is spread over the places: it comes from none of them, leave it out",
        ),
        (right + bias[one] - bias[other], "the bias is added at each place: leave it out"),
        (opinions[:, one] - opinions[:, other], "there is a softmax in it: logits are linear"),
    ):
        require(not agrees(result, wrong), mistake)
    require(agrees(result, right), "the right shape, and other numbers: begin with the weights")
    return "your shares sum to the difference of the two logits, up to the biases"
