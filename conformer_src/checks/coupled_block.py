"""Checks of the exercises of chapter 5, coupled_block."""

import copy
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from conformer_src.attention import TransformerBlock
from conformer_src.checks import (
    Mistake,
    agrees,
    exercise,
    require,
    require_parameters,
    require_shape,
)
from conformer_src.conv_block import ConvBlock, count_parameters
from conformer_src.coupled_block import ConvTransBlock, Features
from conformer_src.fcu import FCUDown, FCUUp, NoCoupling

_PARTS = {
    "conv_block.conv1",
    "conv_block.conv3",
    "down",
    "trans_block",
    "up",
    "fusion_block",
}
# Why a part of the last block has a gradient, or none, when the class token is read.
_HEARD = {
    "conv_block.conv1": "it leads to the tap, and so to the tokens",
    "down": "its rows are the keys and values that the class token attends to",
    "trans_block": "the class token is what it returns",
}
_UNHEARD = {
    "conv_block.conv3": "it comes after the tap, so it only shapes the maps",
    "up": "it only speaks to the maps",
    "fusion_block": "it only shapes the maps",
}


@exercise
def check_silent(answer: Callable[[], tuple[set[str], set[str], set[str]]]) -> str:
    """Check which parts have a gradient of None in three situations."""
    silent = answer()
    require(
        isinstance(silent, tuple | list) and len(silent) == 3,
        "return three sets of names, one for each question",
    )
    for number, names in enumerate(silent, 1):
        kind = type(names).__name__
        require(
            isinstance(names, set | frozenset),
            f"answer {number} is a {kind}; return a set, and set() for an empty one",
        )
        strange = sorted(map(str, names - _PARTS))
        require(not strange, f"answer {number} names {', '.join(strange)}: not one of the six")
    last, before, on_maps = silent
    for name, reason in _HEARD.items():
        require(name not in last, f"answer 1: {name} of the last block learns: {reason}")
    for name, reason in _UNHEARD.items():
        require(name in last, f"answer 1: {name} of the last block is missing: {reason}")
    require(
        not before,
        f"answer 2: {', '.join(sorted(before))} learns: the maps of the block before the last "
        "lead to the tap of the last",
    )
    require(
        not on_maps,
        f"answer 3: {', '.join(sorted(on_maps))} learns: what the tokens know goes up into the "
        "maps of the same block",
    )
    return "three parts of the last block, under the class token, and nobody else"


class _Parts(ConvTransBlock):
    """A coupled block that does not run by itself."""

    def forward(self, maps: Tensor, tokens: Tensor) -> Features:
        raise Mistake("you called the block itself: write its six steps with its parts")


def _block(kind: type[ConvTransBlock] = ConvTransBlock) -> ConvTransBlock:
    """Return a coupled block of toy width with a med block, in which every part is heard."""
    block = kind(
        ConvBlock(32, 32),
        FCUDown(8, 24, 2),
        TransformerBlock(24, 3),
        FCUUp(24, 8, 2),
        ConvBlock(32, 32),
        num_med_block=1,
    )
    for part in block.modules():
        if isinstance(part, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.normal_(part.bias, std=0.5)
    return block.eval()


def _right(block: ConvTransBlock, maps: Tensor, tokens: Tensor) -> Features:
    return ConvTransBlock.forward(block, maps, tokens)


def _wrong_tokens(block: ConvTransBlock, maps: Tensor, tokens: Tensor) -> Iterator[tuple]:
    """Yield the tokens of each mistake below the tap, with its name."""
    wide, tap = block.conv_block(maps)
    update = block.down(tap, tokens)
    once = torch.cat([torch.zeros_like(update[:, :1]), update[:, 1:]], dim=1)
    yield (
        block.trans_block(tokens) + update,
        "the update is added behind the transformer block: it works on the sum",
    )
    yield block.trans_block(update), "the update replaces the tokens: add it to them"
    yield block.trans_block(tokens), "the tokens never hear the tap: add what down returns"
    yield tokens + update, "the transformer block is left out"
    yield (
        block.trans_block(tokens + once),
        "the class token enters once: down hands a copy along, and the sum doubles it",
    )
    med = block.med_block[0]
    yield (
        block.trans_block(tokens + block.down(ConvBlock.forward(med, wide).tap, tokens)),
        "down hears the med block: its tap comes from the first bottleneck",
    )
    first = block.conv_block(block.med_block(maps)).tap
    yield (
        block.trans_block(tokens + block.down(first, tokens)),
        "the med block stands before the first bottleneck, and so before the tap: it comes after",
    )
    second = block.fusion_block(block.med_block(wide)).tap
    yield (
        block.trans_block(tokens + block.down(second, tokens)),
        "down hears the second bottleneck: its tap comes from the first",
    )


def _wrong_maps(block: ConvTransBlock, maps: Tensor, tokens: Tensor) -> Iterator[tuple]:
    """Yield the maps of each mistake above, with its name."""
    wide, tap = block.conv_block(maps)
    summed = tokens + block.down(tap, tokens)
    extra = block.up(block.trans_block(summed), tap)
    refined = block.med_block(wide)

    def second(inner: Tensor, words: Tensor | None) -> Tensor:
        return block.fusion_block(inner, words).maps

    yield (
        second(refined, block.up(tokens, tap)),
        "up reads the old tokens: it gets what the transformer block returns",
    )
    yield (
        second(refined, block.up(summed, tap)),
        "up reads the sum: it gets what the transformer block returns",
    )
    yield (
        second(refined, None),
        "the second bottleneck never hears the tokens: hand it what up returns",
    )
    yield second(wide, extra), "the med block is left out: it stands between the two bottlenecks"
    yield (
        block.med_block(second(wide, extra)),
        "the med block stands behind the second bottleneck: it comes before",
    )
    yield refined, "the second bottleneck is left out"
    yield second(maps, extra), "the second bottleneck starts from the maps that came in"


@exercise
def check_forward(answer: Callable[[ConvTransBlock, Tensor, Tensor], Features]) -> str:
    """Check the forward pass of a coupled block, written with its parts."""
    block, maps, tokens = _block(_Parts), torch.rand(2, 32, 6, 4), torch.randn(2, 7, 24)
    with torch.no_grad():
        result = answer(block, maps.clone(), tokens.clone())
        require(
            isinstance(result, tuple) and len(result) == 2,
            f"the result is a {type(result).__name__}; return Features(maps, tokens)",
        )
        new_maps, new_tokens = result
        require(
            not isinstance(new_maps, tuple),
            "the maps are all that fusion_block returns: take .maps, nobody hears its tap",
        )
        turned = isinstance(new_maps, Tensor) and new_maps.shape == tokens.shape
        require(not turned, "the tokens come first: return Features(maps, tokens)")
        require_shape(new_maps, maps.shape, "maps")
        lost = isinstance(new_tokens, Tensor) and new_tokens.shape == tokens[:, 1:].shape
        require(not lost, "the class token is dropped: it stays with the tokens")
        require_shape(new_tokens, tokens.shape, "tokens")
        expected = _right(block, maps, tokens)
        for wrong, mistake in _wrong_tokens(block, maps, tokens):
            require(not agrees(new_tokens, wrong), mistake)
        require(
            agrees(new_tokens, expected.tokens),
            "the tokens have the right shape and other numbers: compare steps 2 to 4 with the text",
        )
        for wrong, mistake in _wrong_maps(block, maps, tokens):
            require(not agrees(new_maps, wrong), mistake)
        require(
            agrees(new_maps, expected.maps),
            "the tokens are right, the maps are not: compare steps 5 and 6 with the text",
        )
    return "six steps in the right order: your block is the one of the chapter"


_FAULTS = {
    "narrow": "the tap is taken before the 3x3: it leaves after its BatchNorm and ReLU",
    "raw": "the tap is taken before the ReLU of the 3x3",
    "wide": "the tap is taken after the last 1x1, at full width: it leaves before, at a quarter",
    "behind": "the extra map is added behind the 3x3 of the second bottleneck: it comes before",
    "inside": "the extra map is added before the ReLU of the first 1x1: it comes behind",
    "skip": "the second shortcut starts at the maps that came in: it starts between the two",
    "deaf": "the extra map is not used",
}


def _run(first: ConvBlock, second: ConvBlock, maps: Tensor, reply: Callable, faults: set) -> Tensor:
    """Run two bottlenecks with some of the faults above; with none of them it is right."""
    narrow = first.bn1(first.conv1(maps)).relu()
    raw = first.bn2(first.conv2(narrow))
    wide = (first.bn3(first.conv3(raw.relu())) + maps).relu()
    taps = {"narrow": narrow, "raw": raw, "wide": wide}
    extra = reply(next((taps[name] for name in taps if name in faults), raw.relu()))
    inner = second.bn1(second.conv1(wide))
    if "inside" in faults:
        inner = (inner + extra).relu()
    elif "behind" in faults or "deaf" in faults:
        inner = inner.relu()
    else:
        inner = inner.relu() + extra
    inner = second.bn2(second.conv2(inner)).relu()
    if "behind" in faults:
        inner = inner + extra
    return (second.bn3(second.conv3(inner)) + (maps if "skip" in faults else wide)).relu()


def _reply(tap: Tensor) -> Tensor:
    """Stand for down, transformer block and up; it hears the first 8 channels of any tap."""
    require(
        isinstance(tap, Tensor) and tap.ndim == 4 and tap.shape[1] >= 8,
        "reply is given something else than a map: hand it the tap of the first bottleneck",
    )
    return (tap[:, :8].flip(-1) + 0.3).relu()


@exercise
def check_maps(answer: Callable[[ConvBlock, ConvBlock, Tensor, Callable], Tensor]) -> str:
    """Check the two bottlenecks of a coupled block, written out; name the faults left."""
    block, maps = _block(), torch.rand(2, 32, 6, 4)
    bottlenecks = block.conv_block, block.fusion_block
    with torch.no_grad():
        result = answer(*bottlenecks, maps.clone(), _reply)
        require_shape(result, maps.shape)
        choices = itertools.product(
            (None, "narrow", "raw", "wide"), (None, "behind", "inside", "deaf"), (None, "skip")
        )
        for choice in sorted(choices, key=lambda names: sum(map(bool, names))):
            faults = set(choice) - {None}
            if agrees(result, _run(*bottlenecks, maps, _reply, faults)):
                require(not faults, "; ".join(_FAULTS[name] for name in _FAULTS if name in faults))
                return "all faults are repaired: both doors are where they belong"
    raise Mistake("the shape is right, the numbers differ: go along the drawing once more")


_COUPLINGS = {"both": (), "down": ("up",), "up": ("down",), "none": ("down", "up")}


@exercise
def check_ablation(answer: Callable[[ConvTransBlock, str], ConvTransBlock]) -> str:
    """Check copies of a coupled block with one direction of coupling, or both, left out."""
    block, maps, tokens = _block(), torch.rand(2, 32, 6, 4), torch.randn(2, 7, 24)
    parts, numbers = dict(block.named_children()), copy.deepcopy(block.state_dict())
    for coupling, silenced in _COUPLINGS.items():
        result = answer(block, coupling)
        require(
            isinstance(result, ConvTransBlock),
            f"for {coupling!r} the result is a {type(result).__name__}; return a ConvTransBlock",
        )
        same = all(getattr(block, name) is part for name, part in parts.items())
        require(
            same and all(torch.equal(block.state_dict()[name], numbers[name]) for name in numbers),
            "the block that was given has changed: work on copy.deepcopy(block)",
        )
        ours = {id(parameter) for parameter in block.parameters()}
        require(
            not ours & {id(parameter) for parameter in result.parameters()},
            "the copy shares parameters with the original: use copy.deepcopy",
        )
        expected = copy.deepcopy(block)
        for name in silenced:
            setattr(expected, name, NoCoupling())
        with torch.no_grad():
            found, right = result.eval()(maps, tokens), expected(maps, tokens)
        if silenced and len(silenced) == 1:
            other = copy.deepcopy(block)
            setattr(other, coupling, NoCoupling())
            with torch.no_grad():
                turned = other(maps, tokens)
            require(
                not (agrees(found.maps, turned.maps) and agrees(found.tokens, turned.tokens)),
                f"the directions are swapped: {coupling!r} keeps {coupling} and silences the other",
            )
        hint = f"for {coupling!r} replace {' and '.join(silenced) or 'nothing'} by NoCoupling()"
        require_parameters(result, count_parameters(expected), hint)
        require(
            agrees(found.tokens, right.tokens) and agrees(found.maps, right.maps),
            f"for {coupling!r} the numbers differ: {hint}, and change nothing else",
        )
    return "four blocks, each speaks and hears as asked, and the original is whole"
