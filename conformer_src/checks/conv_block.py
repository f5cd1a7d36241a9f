"""Checks of the exercises of chapter 2, the convolution block."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from conformer_src.checks import (
    agrees,
    exercise,
    golden,
    require,
    require_parameters,
    require_shape,
)
from conformer_src.conv_block import ConvBlock, count_macs, count_parameters


@exercise
def check_prediction(answer: Callable[[], tuple]) -> str:
    """Check shapes, parameters and MACs of the block in which Conformer-S goes from 28 to 14."""
    predicted = answer()
    require(
        isinstance(predicted, tuple | list) and len(predicted) == 4,
        "return four things: shape of the maps, shape of the tap, parameters, MACs",
    )
    maps, tap, parameters, macs = predicted
    for value, name in ((maps, "maps"), (tap, "tap")):
        require(
            isinstance(value, tuple | list) and len(value) == 3,
            f"the shape of the {name} is a tuple of three numbers, (C, H, W)",
        )
    maps, tap, size = tuple(maps), tuple(tap), (14, 14)
    require(maps[1:] != (28, 28), f"maps {maps}: the block has stride 2 and halves 28")
    require(tap[1:] != (28, 28), f"tap {tap}: it comes after the 3x3, which holds the stride")
    require(tap[0] != 128, f"tap {tap}: the inside is a quarter of what goes out, not of what came")
    require(tap[0] != 1024, f"tap {tap}: it is taken inside, where the block is narrow")
    require(maps == (1024, *size), f"maps {maps}; expected (1024, 14, 14)")
    require(tap == (256, *size), f"tap {tap}; expected (256, 14, 14)")

    wide, out, inner = 512, 1024, 256
    first, second, third = wide * inner, 9 * inner**2, inner * out
    norms, shortcut = 4 * inner + 2 * out, wide * out + 2 * out
    right = count_parameters(ConvBlock(wide, out, 2, True))
    mistakes = {
        right - shortcut: "the projected shortcut is missing",
        right - 2 * out: "the BatchNorm of the shortcut, or that of conv3, is missing",
        right - norms - 2 * out: "the scales and shifts of the BatchNorms are missing",
        right - norms: "only the shortcut's BatchNorm is counted",
        right - 8 * inner**2: "the middle convolution is 3x3: nine weights for each pair",
        right + 2 * inner + 2 * out: "the convolutions have no bias",
        right + norms + 2 * out: "a BatchNorm learns a scale and a shift; its averages are buffers",
    }
    require(parameters not in mistakes, f"parameters: {mistakes.get(parameters)}")
    require(parameters == right, f"{parameters} parameters; expected {right:,}")

    large, small, project = 28 * 28, 14 * 14, wide * out
    right = count_macs(ConvBlock(wide, out, 2, True), torch.empty(1, wide, 28, 28))
    mistakes = {
        small * (first + second + third + project): "conv1 still works on the map of 28",
        large * (first + second) + small * (third + project): "the stride is already in the 3x3",
        large * (first + second + third + project): "after the 3x3 the map is 14 wide",
        large * first + small * (second + third): "the projected shortcut is missing",
        2 * right: "these are operations; a multiplication and its addition count as one here",
    }
    require(macs not in mistakes, f"multiply-accumulates: {mistakes.get(macs)}")
    require(macs == right, f"{macs} multiply-accumulates; expected {right:,}")
    return "shapes, parameters and multiply-accumulates agree with the block and the counters"


_FAULTS = {
    "late": "the extra map is added after the 3x3, which can no longer spread it",
    "early": "the extra map is added before the ReLU of the 1x1, which cuts its negative part",
    "missing": "the extra map is not used",
    "linear 1": "there is no ReLU between bn1 and the 3x3",
    "tap 1x1": "the tap is taken after the 1x1: it has not looked at any neighbour yet",
    "tap bare": "the tap is taken before the ReLU",
    "raw": "the shortcut is not projected: residual_conv and residual_bn are left out",
    "no norm": "the projected shortcut has no BatchNorm: residual_bn is left out",
    "no shortcut": "the shortcut is not added",
    "bare": "there is no ReLU after the addition",
    "inside": "the last ReLU comes before the addition: only the sum is cut",
    "twice": "there is a ReLU before the addition too: the change must be free to be negative",
}
_CHOICES = (
    (None, "late", "early", "missing"),
    (None, "linear 1"),
    (None, "tap 1x1", "tap bare"),
    (None, "raw", "no norm", "no shortcut"),
    (None, "bare", "inside", "twice"),
)


def _forward(block: ConvBlock, maps: Tensor, extra: Tensor, faults: set[str]) -> tuple:
    """A ConvBlock's forward with some of the faults above; with none of them it is right."""
    inner = block.bn1(block.conv1(maps))
    if "early" in faults:
        inner = inner + extra
    first = inner = inner if "linear 1" in faults else inner.relu()
    if not faults & {"late", "early", "missing"}:
        first = inner = inner + extra
    bare = block.bn2(block.conv2(inner))
    tap = bare.relu()
    if "late" in faults:
        tap = tap + extra
    change = block.bn3(block.conv3(tap))
    shortcut = block.residual_conv(maps)
    if "no norm" not in faults:
        shortcut = block.residual_bn(shortcut)
    if "raw" in faults:
        shortcut = maps
    if "no shortcut" in faults:
        shortcut = torch.zeros_like(change)
    if faults & {"inside", "twice"}:
        change = change.relu()
    result = change + shortcut
    if not faults & {"bare", "inside"}:
        result = result.relu()
    if "tap 1x1" in faults:
        tap = first
    return result, bare if "tap bare" in faults else tap


def _require_pair(result: Any, shapes: tuple, when: str = "") -> None:
    """Require a pair (maps, tap) of these shapes."""
    require(
        isinstance(result, tuple | list) and len(result) == 2,
        "return two tensors: the maps, and the tap",
    )
    given = [tuple(tensor.shape) for tensor in result if isinstance(tensor, Tensor)]
    require(
        given != [*reversed(shapes)], "the two are swapped: return the maps first, then the tap"
    )
    require_shape(result[0], shapes[0], f"maps{when}: the first result")
    require_shape(result[1], shapes[1], f"tap{when}: the second result")


@exercise
def check_forward(answer: Callable[[ConvBlock, Tensor, Tensor | None], tuple]) -> str:
    """Check a forward pass written from the layers of a ConvBlock; name the faults."""
    block = golden.fill_(ConvBlock(16, 16, 1, project_shortcut=True)).eval()
    maps, extra = torch.randn(2, 16, 6, 6), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        result = answer(block, maps.clone(), extra.clone())
        _require_pair(result, ((2, 16, 6, 6), (2, 4, 6, 6)))
        if not all(map(agrees, result, block(maps, extra))):
            combinations = itertools.product(*_CHOICES)
            for choice in sorted(combinations, key=lambda names: sum(map(bool, names))):
                faults = set(choice) - {None}
                if all(map(agrees, result, _forward(block, maps, extra, faults))):
                    found = [words for name, words in _FAULTS.items() if name in faults]
                    require(False, "; ".join(found))
            tap_is_right = agrees(result[1], block(maps, extra).tap)
            which = (
                "the tap is right, the maps are not" if tap_is_right else "look at the tap first"
            )
            require(False, f"the shapes are right, the numbers differ: {which}")
        given = maps.clone()
        result = answer(block, given, None)
        _require_pair(result, ((2, 16, 6, 6), (2, 4, 6, 6)), " without extra")
        require(
            all(map(agrees, result, block(maps))), "without an extra map the numbers are not right"
        )
        require(torch.equal(given, maps), "the maps that came in were changed: make new tensors")
        block = golden.fill_(ConvBlock(8, 16, 2, project_shortcut=True)).eval()
        maps, extra = torch.randn(2, 8, 7, 7), torch.randn(2, 4, 7, 7)
        result = answer(block, maps, extra)
        _require_pair(result, ((2, 16, 4, 4), (2, 4, 4, 4)), " with stride 2")
        require(
            all(map(agrees, result, block(maps, extra))), "with stride 2 the numbers are not right"
        )
    return "both outputs are right, with and without an extra map, with and without stride"


@exercise
def check_block(answer: Callable[[int, int, int], nn.Module]) -> str:
    """Check a repaired bottleneck class: names, parameters, stride, eps, values."""
    block = answer(8, 16, 2)
    require(isinstance(block, nn.Module), "MyConvBlock must be an nn.Module")
    reference = golden.fill_(ConvBlock(8, 16, 2, project_shortcut=True))
    wanted, given = reference.state_dict(), block.state_dict()
    biases = [name for name in ("conv1", "conv2", "conv3") if f"{name}.bias" in given]
    biases += ["residual_conv"] if "residual_conv.bias" in given else []
    require(
        not biases,
        f"{', '.join(biases)}: a bias before a BatchNorm is subtracted again; use bias=False",
    )
    require("residual_bn.weight" in given, "the projected shortcut has no BatchNorm (residual_bn)")
    missing = sorted({name.split(".")[0] for name in wanted if name not in given})
    require(not missing, f"these layers are missing: {', '.join(missing)}")
    require(
        block.conv1.out_channels == 4,
        f"conv1 has {block.conv1.out_channels} channels; inside, 16 are quartered to 4",
    )
    require_parameters(block, count_parameters(reference), "compare the widths of the layers")
    strides = {name: getattr(block, name).stride[0] for name in ("conv1", "conv2", "conv3")}
    wrong = next((name for name in ("conv1", "conv3") if strides[name] != 1), None)
    require(
        wrong is None,
        f"the stride sits in {wrong}, a 1x1 that then skips three of four places; "
        "put it in the 3x3 (conv2)",
    )
    require(strides["conv2"] == 2, "nothing in the main path has the stride: it belongs in conv2")
    require(
        block.residual_conv.stride[0] == 2, "the shortcut must have the stride too, or sizes differ"
    )
    require(block.conv2.padding[0] == 1, "conv2 needs padding 1, or the map loses its border")
    for name, layer in block.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            require(
                layer.eps == 1e-6, f"{name} has eps {layer.eps:g}; the authors' blocks use 1e-6"
            )
    block.load_state_dict(wanted)
    maps = torch.randn(2, 8, 7, 7)
    with torch.no_grad():
        result = block.eval()(maps)
        _require_pair(result, ((2, 16, 4, 4), (2, 4, 4, 4)))
        expected = reference.eval()(maps)
        require(
            not agrees(result[1], reference.bn2(reference.conv2(_first(reference, maps)))),
            _FAULTS["tap bare"],
        )
        require(agrees(result[1], expected.tap), "the tap is not right: it follows bn2 and a ReLU")
        require(agrees(result[0], expected.maps), "the tap is right, the maps are not")
    return "every fault is repaired: with equal weights your block returns the chapter's numbers"


def _first(block: ConvBlock, maps: Tensor) -> Tensor:
    return block.bn1(block.conv1(maps)).relu()


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d, fault: str | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of the folded convolution, with one of the faults that are named below."""
    eps = 0.0 if fault == "eps" else norm.eps
    scale = 1 / (norm.running_var + eps) ** (1.0 if fault == "root" else 0.5)
    if fault != "gamma":
        scale = scale * norm.weight
    bias = torch.zeros_like(norm.bias) if conv.bias is None else conv.bias
    if fault == "conv bias":
        bias = torch.zeros_like(bias)
    if fault != "mean":
        bias = bias - norm.running_mean
    bias = bias * (1 if fault == "unscaled" else scale)
    bias = bias if fault == "beta" else bias + norm.bias
    place = (1, -1, 1, 1) if fault == "axis" else (-1, 1, 1, 1)
    return conv.weight * scale.view(place), bias


_FOLD = {
    "mean": "the running mean is not subtracted in the bias",
    "eps": "eps is missing under the root: here a channel's variance is so small that it matters",
    "root": "divided by the variance: the standard deviation, its root, is needed",
    "gamma": "the norm's weight (gamma) is missing",
    "beta": "the norm's bias (beta) is missing",
    "unscaled": "the running mean must be divided by the deviation too",
    "axis": "the scale is applied to the input channels: it belongs to axis 0 of the weight",
    "conv bias": "the bias that the convolution already has is lost",
}


def _state(*modules: nn.Module) -> list[Tensor]:
    """All tensors of some modules."""
    return [tensor for module in modules for tensor in module.state_dict().values()]


@exercise
def check_fold(answer: Callable[[nn.Conv2d, nn.BatchNorm2d], nn.Conv2d]) -> str:
    """Check a BatchNorm folded into the convolution before it; name what was forgotten."""
    for has_bias in (False, True):
        conv = golden.fill_(nn.Conv2d(6, 6, 3, stride=2, padding=1, bias=has_bias))
        norm = golden.fill_(nn.BatchNorm2d(6, eps=1e-3)).eval()
        with torch.no_grad():
            norm.running_var[0], norm.running_mean[:] = 1e-3, torch.linspace(-1, 1, 6)
        before = copy.deepcopy(_state(conv, norm))
        with torch.no_grad():
            folded = answer(conv, norm)
            after = _state(conv, norm)
            same = all(map(torch.equal, before, after))
            require(same, "the given layers were changed: build a new convolution")
            require(isinstance(folded, nn.Conv2d), "return one nn.Conv2d")
            require(folded.bias is not None, "the new convolution needs bias=True: shifts go there")
            require(
                (folded.stride, folded.padding) == (conv.stride, conv.padding),
                "stride or padding of the convolution was lost",
            )
            require_shape(folded.weight, tuple(conv.weight.shape), "the weight")
            for fault, words in _FOLD.items():
                weight, bias = _fold(conv, norm, fault)
                wrong = agrees(folded.weight, weight) and agrees(folded.bias, bias)
                right = agrees(folded.bias, _fold(conv, norm, None)[1]) and agrees(
                    folded.weight, _fold(conv, norm, None)[0]
                )
                require(right or not wrong, words)
            maps = torch.randn(2, 6, 7, 7)
            require(agrees(folded(maps), norm(conv(maps))), "the numbers differ from norm(conv)")
    return "one convolution does the work of two layers, to rounding"
