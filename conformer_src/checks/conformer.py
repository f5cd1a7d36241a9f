"""Checks of the exercises of chapter 6, conformer."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from conformer_src.checks import agrees, exercise, require, require_shape
from conformer_src.conformer import (
    VARIANTS,
    ConformerConfig,
    DualLogits,
    build_block,
    fcu_strides,
    stage_widths,
)

_Plan = list[tuple[int, int, int, int]]


def _plan(config: ConformerConfig) -> _Plan:
    """Read width, both strides and the FCU stride off the blocks that the package builds."""
    blocks = []
    with torch.device("meta"):
        for number in range(2, config.depth + 1):
            block = build_block(config, number)
            strides = block.conv_block.conv2.stride[0], block.fusion_block.conv2.stride[0]
            width = block.fusion_block.conv3.out_channels
            blocks.append((width, *strides, block.down.stride))
    return blocks


def _width_fault(config: ConformerConfig, widths: tuple[int, ...]) -> str:
    right = stage_widths(config)
    base = stage_widths(replace(config, channel_ratio=1))
    if set(widths) <= set(base) and base != right:
        return f"the widths do not grow with channel_ratio {config.channel_ratio}"
    if set(widths) <= {width // 4 for width in right}:
        return "the widths are those of the tap, a quarter of what the block hands on"
    return f"the widths are {sorted(set(widths))}; expected {list(right)}, one a stage"


def _named(numbers: list[int]) -> str:
    word = "block" if len(numbers) == 1 else "blocks"
    return f"{word} {' and '.join(map(str, numbers))}"


def _stride_fault(first: tuple[int, ...], second: tuple[int, ...], plan: _Plan) -> str:
    last = len(plan) + 1
    numbers = range(2, last + 1)
    begins = [number for number, row in zip(numbers, plan, strict=True) if row[1] == 2]
    firsts, seconds = (
        [number for number, stride in zip(numbers, strides, strict=True) if stride != 1]
        for strides in (first, second)
    )
    moved = [number for number in begins if number in seconds and number not in firsts]
    spare = [number for number in seconds if number != last and number not in moved]
    faults = []
    if moved:
        faults.append(
            f"{_named(moved)} must shrink in the first bottleneck, not in the second, so that the "
            "tap lies on the smaller map"
        )
    elif firsts != begins:
        faults.append(f"the first bottleneck must shrink in {_named(begins)} and nowhere else")
    if last not in seconds:
        faults.append(f"block {last} does not halve the maps in its second bottleneck")
    if spare:
        faults.append(f"{_named(spare)} must not shrink in the second bottleneck")
    return "; ".join(faults) or "a bottleneck that shrinks must have stride 2"


def _fcu_fault(config: ConformerConfig, strides: tuple[int, ...]) -> str:
    right = fcu_strides(config)
    if set(strides) == {right[0]}:
        return f"the FCU stride stays {right[0]}: it must halve when the maps do"
    if set(strides) <= {4 * stride for stride in right}:
        return "the FCU strides count pixels: the stem has divided by 4 already"
    return f"the FCU strides are {sorted(set(strides), reverse=True)}; expected {list(right)}"


@exercise
def check_plan(answer: Callable[[ConformerConfig], list[tuple[int, int, int, int]]]) -> str:
    """Check the list of coupled blocks, and name each of the faults that are left."""
    base = VARIANTS["conformer_base_patch16"]  # the tap of S is as wide as the stages of Ti
    narrow = replace(base, depth=6, channel_ratio=0.5, patch_size=64)  # (stage + 1) must fail
    for config in (base, narrow, replace(base, depth=3)):
        given, right = answer(config), _plan(config)
        rows = isinstance(given, list | tuple) and all(
            isinstance(row, list | tuple) and len(row) == 4 for row in given
        )
        require(rows, "return a list with four numbers for each block")
        require(
            len(given) == len(right),
            f"{len(given)} blocks at depth {config.depth}; expected {len(right)}, the coupled ones",
        )
        widths, first, second, fcu = zip(*given, strict=True)
        right_widths, right_first, right_second, right_fcu = zip(*right, strict=True)
        faults = []
        if widths != right_widths:
            faults.append(_width_fault(config, widths))
        if (first, second) != (right_first, right_second):
            faults.append(_stride_fault(first, second, right))
        if fcu != right_fcu:
            faults.append(_fcu_fault(config, fcu))
        where = f"at depth {config.depth}, patch {config.patch_size}: "
        require(not faults, where + "; ".join(faults))
        kinds = all(type(value) is int for row in given for value in row)
        require(kinds, "channels and strides must be whole numbers: int(...) the width")
    return "the plan is that of the package, also for narrow and shallow networks"


@exercise
def check_probabilities(answer: Callable[[DualLogits], Tensor]) -> str:
    """Check the probabilities that two opinions imply."""
    conv, trans = 2 * torch.randn(2, 5, 7)
    result = answer(DualLogits(conv, trans))
    require_shape(result, (5, 7))
    each = conv.softmax(-1) + trans.softmax(-1)
    product = conv.softmax(-1) * trans.softmax(-1)
    total = conv + trans
    mistakes = [
        (each, "the softmax comes before the sum: the rows sum to 2, and no head can veto"),
        (each / 2, "the softmax comes before the mean: probabilities are averaged, not logits"),
        (
            (total / 2).softmax(-1),
            "you averaged the logits: the ranking stays, but the probabilities become too even",
        ),
        (product, "the product ranks well, but its rows do not sum to 1: divide by their sums"),
        (conv.softmax(-1), "only the CNN's head is asked"),
        (trans.softmax(-1), "only the transformer's head is asked"),
        (total.softmax(0), "the softmax runs over the batch: the columns sum to 1, not the rows"),
        (total, "these are logits: the rows do not sum to 1 yet"),
        (total.log_softmax(-1), "these are logarithms of probabilities"),
        (total.sigmoid(), "a sigmoid treats each class alone: the rows do not sum to 1"),
    ]
    for wrong, mistake in mistakes:
        require(not agrees(result, wrong), mistake)
    require(agrees(result, total.softmax(-1)), "the shape is right, the numbers differ")
    return "the logits are added first, and each row sums to 1"


def _saved(side: int, patches: int, first_tap: int = 64) -> list[int]:
    """Return the multiply-accumulates that one block of each stage saves."""
    maps = [side // 4 // 2**stage for stage in range(3)]
    return [(n**2 - patches) * first_tap * 2**k * 384 for k, n in enumerate(maps)]


def _sum(saved: list[int], blocks: tuple[int, ...] = (3, 4, 4)) -> int:
    return sum(count * each for count, each in zip(blocks, saved, strict=True))


@exercise
def check_prediction(answer: Callable[[], tuple[int, int, int]]) -> str:
    """Check side, tokens and saved multiply-accumulates of Conformer-S, patch 32."""
    predicted = answer()
    require(
        isinstance(predicted, tuple | list) and len(predicted) == 3,
        "return three numbers: side, tokens, multiply-accumulates saved",
    )
    side, tokens, macs = predicted
    sides = {
        256: "256 fits, but a smaller one does too: the stem rounds up",
        224: "224 fits, but the crops shall have at least 250 pixels",
        250: "250 gives 63 positions, and 63 is no multiple of 8",
        252: "252 gives 63 positions, and 63 is no multiple of 8",
    }
    require(side not in sides, f"side: {sides.get(side)}")
    require(side == 253, f"a side of {side} pixels; expected the first that gives 64 positions")

    require(tokens != 64, "64 tokens are the 8 x 8 patches: the class token is missing")
    require(tokens not in (49, 50), "those are the tokens of 224 pixels")
    require(tokens not in (256, 257), "those are the tokens of patch 16: here a patch is 32 wide")
    require(tokens == 65, f"{tokens} tokens; expected 1 + 8 x 8")

    right = _saved(256, 64)
    mistakes = {
        2 * _sum(right): "these are operations; a multiplication and its addition count as one",
        _sum(right, (4, 4, 4)): "block 1 is counted too, but it is not coupled",
        _sum(right, (3, 4, 3)): "block 12 saves too: its tap lies before the last halving",
        _sum(right, (1, 1, 1)): "one block of each stage is counted, not all of them",
        _sum(_saved(256, 65)): "the class token is not pooled: subtract the 64 patches alone",
        _sum(_saved(256, 0)): "that is the cost of projecting every position: the patches remain",
        _sum(_saved(256, 64, 256)): "the tap is a quarter as wide as the stage: 64, 128, 256",
        _sum(_saved(256, 64, 16)): "those are the taps of Ti: here they are 4 times as wide",
        _sum(_saved(256, 256)): "that takes the 256 patches of patch 16",
    }
    require(macs not in mistakes, f"saved: {mistakes.get(macs)}")
    require(macs == _sum(right), f"{macs:,} saved; use the equation, stage by stage")
    return "side, tokens and savings are those of the rule and of the equation"
