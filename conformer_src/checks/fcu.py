"""Checks of the exercises of chapter 4, the Feature Coupling Unit."""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from conformer_src.checks import agrees, exercise, require, require_parameters, require_shape
from conformer_src.conv_block import count_parameters
from conformer_src.fcu import FCUDown, FCUUp


@exercise
def check_prediction(answer: Callable[[], list[tuple[int, ...]]]) -> str:
    """Check shapes and parameters of the coupling in Conformer-S, patch 32, at 224 pixels."""
    stages = answer()
    require(
        isinstance(stages, list | tuple)
        and len(stages) == 3
        and all(isinstance(stage, list | tuple) and len(stage) == 5 for stage in stages),
        "return three stages, each (channels, side, stride, tokens, parameters)",
    )
    width, rows = 384, 7
    for label, q, side, stage in zip(
        ("2-4", "5-8", "9-11"), (64, 128, 256), (56, 28, 14), stages, strict=True
    ):
        channels, own_side, stride, tokens, parameters = stage
        place = f"blocks {label}"
        require(
            channels != 4 * q,
            f"{place}: {4 * q} is the width of the stage; the tap is inside the bottleneck",
        )
        require(channels == q, f"{place}: {channels} channels; expected a quarter of {4 * q}")
        require(
            own_side == side,
            f"{place}: a side of {own_side}; expected {side}: the patch does not change the maps",
        )
        require(
            2 * stride != side // rows,
            f"{place}: stride {stride} belongs to patch 16; a patch is twice as wide here",
        )
        require(
            stride == side // rows,
            f"{place}: stride {stride}; {rows} squares of that side do not make {side}",
        )
        require(tokens != rows**2, f"{place}: {tokens} tokens: the class token is missing")
        require(tokens != 197, f"{place}: 197 tokens belong to patch 16")
        require(tokens == 1 + rows**2, f"{place}: {tokens} tokens; expected 1 + (224 / 32)^2")
        down, up = FCUDown(q, width, stride), FCUUp(width, q, stride)
        expected = count_parameters(down) + count_parameters(up)
        mistakes = {
            2 * q * width: "the projections' weights only: biases and norms are missing",
            2 * q * width + width + q: "the scales and shifts of both norms are missing",
            2 * q * width + 2 * (width + q): "the biases of both projections are missing",
            count_parameters(down): "this is the way down only",
            count_parameters(up): "this is the way up only",
        }
        require(parameters not in mistakes, f"{place}: {mistakes.get(parameters)}")
        require(
            parameters == expected,
            f"{place}: {parameters} parameters; expected (q E + 3 E) + (q E + 3 q)",
        )
    return "channels, sides, strides, tokens and parameters are right in all three stages"


def _rows(unit: FCUDown, maps: Tensor, fault: str = "") -> Tensor:
    """Return the rows of the patches, (B, N - 1, E), with one of the faults or with none."""
    stride, norm = unit.stride, unit.ln
    small = (maps.shape[-2] // stride, maps.shape[-1] // stride)
    if fault in ("max", "max first", "nearest", "bilinear"):
        first = maps if fault == "max first" else unit.conv_project(maps)
        if fault.startswith("max"):
            first = F.max_pool2d(first, stride)
        else:
            first = F.interpolate(first, size=small, mode=fault)
        patches = unit.conv_project(first) if fault == "max first" else first
    elif fault == "norm early":
        wide = unit.conv_project(maps)
        rows = norm(wide.flatten(2).mT).mT.reshape(wide.shape)
        return F.gelu(F.avg_pool2d(rows, stride).flatten(2).mT)
    else:
        patches = unit.conv_project(F.avg_pool2d(maps, stride))
    if fault == "reshaped":
        patches = patches.reshape(len(patches), -1, patches.shape[1])
    else:
        layout = "b (h g) e" if fault == "columns" else "b (g h) e"
        patches = rearrange(patches, f"b e g h -> {layout}")
    if fault == "gelu first":
        return norm(F.gelu(patches))
    if fault == "no norm":
        return F.gelu(patches)
    patches = norm(patches)
    if fault == "no gelu":
        return patches
    if fault == "relu":
        return patches.relu()
    return F.gelu(patches, approximate="tanh" if fault == "tanh" else "none")


_DOWN_FAULTS = {
    "no gelu": "the GELU after the norm is missing: the paper's figure leaves it out, too",
    "relu": "a ReLU stands where the GELU belongs: the transformer branch receives",
    "gelu first": "the GELU comes before the norm: normalise first",
    "tanh": "this GELU is the tanh approximation; use the exact one",
    "no norm": "the LayerNorm is there but not used",
    "norm early": "the LayerNorm comes before the pooling: average first, the two do not commute",
    "columns": "the patches lie column by column: H and W are swapped",
    "reshaped": "channels and positions are mixed up: a reshape does not swap axes, .mT does",
    "max": "each square is summarised by its maximum, not by its average",
    "max first": "each square is summarised by its maximum, not by its average",
    "nearest": "nearest reads one position of each square: average all of them",
    "bilinear": "bilinear reads the four positions in the middle of each square: average all",
}


def _require_layers(unit: nn.Module) -> None:
    """Name what is wrong with the two layers of an `FCUDown`, before its numbers are looked at."""
    require(
        not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in unit.modules()),
        "a BatchNorm goes down: tokens are normalised one by one, with a LayerNorm over E",
    )
    for name in ("conv_project", "ln"):
        require(
            isinstance(getattr(unit, name, None), nn.Module),
            f"there is no layer named {name}: the checkpoints need this name",
        )
    chans, width = 6, 10
    require(
        getattr(unit.conv_project, "bias", True) is not None,
        "the projection needs a bias: no BatchNorm follows that would take it away",
    )
    hint = "a 1x1 convolution with bias, and a LayerNorm with a scale and a shift for each of E"
    require_parameters(unit, chans * width + 3 * width, hint)
    eps = getattr(unit.ln, "eps", 1e-6)
    require(eps == 1e-6, f"the norm has eps {eps:g}; the authors' is 1e-6")


@exercise
def check_down(answer: Callable[[int, int, int], nn.Module]) -> str:
    """Check a class that couples a map down to the tokens, in any order that is the same."""
    reference = FCUDown(6, 10, 4)
    for parameter in reference.parameters():
        nn.init.normal_(parameter)
    mine = answer(6, 10, 4)
    require(isinstance(mine, nn.Module), f"a {type(mine).__name__} was built, no nn.Module")
    maps, tokens = torch.rand(2, 6, 8, 12), torch.randn(2, 7, 10)
    given = maps.clone(), tokens.clone()
    # A stub's forward says that it is one, before its layers are blamed.
    result = mine(*given)
    _require_layers(mine)
    require(isinstance(result, Tensor), f"forward returns a {type(result).__name__}, no tensor")
    require(
        tuple(result.shape) != (2, 6, 10),
        "the row of the class token is missing: a copy of it comes first",
    )
    require_shape(result, (2, 7, 10))
    mine.load_state_dict(reference.state_dict())
    result = mine(*given)
    require(
        torch.equal(given[0], maps) and torch.equal(given[1], tokens),
        "maps or tokens were changed: return a new tensor",
    )
    _require_class_token(result, tokens)
    for fault, words in _DOWN_FAULTS.items():
        require(not agrees(result[:, 1:], _rows(reference, maps, fault)), words)
    require(
        agrees(result, reference(maps, tokens)),
        "the shape is right, the numbers differ: project, average, LayerNorm, GELU",
    )
    return "your unit is the one of the chapter, whatever the order of pooling and projection"


def _require_class_token(result: Tensor, tokens: Tensor) -> None:
    """Name what stands in the first row instead of the class token."""
    own, patches = result[:, 0], result[:, 1:]
    mean, whole = patches.mean(1), result.mean(1)
    require(not agrees(result[:, -1], tokens[:, 0]), "the class token comes last: it is row 0")
    mixed = [mean, (tokens[:, 0] + mean) / 2, tokens[:, 0] + mean, tokens.mean(1), whole]
    mixed.append((tokens[:, 0] + patches.sum(1)) / result.shape[1])
    require(
        not any(agrees(own, mixture) for mixture in mixed),
        "the class token is averaged in with the patches: copy it as it is",
    )
    require(
        not agrees(own, torch.zeros_like(own)),
        "the row of the class token is zero: the authors copy it, so that the sum doubles it",
    )
    require(
        not agrees(own, 2 * tokens[:, 0]),
        "the tokens are added already, or doubled: return what is to be added",
    )
    require(
        agrees(own, tokens[:, 0]),
        "row 0 is not the class token: copy it, and let neither norm nor GELU touch it",
    )


_UP_FAULTS = {
    "last": "the last token is left out, not the first: the class token is row 0",
    "mixed": "the class token is averaged in with the patches: leave it out",
    "columns": "the patches are laid out column by column: H and W are swapped",
    "reshaped": "channels and positions are mixed up: a reshape does not swap axes",
    "no relu": "the ReLU is missing: the paper's figure leaves it out, too",
    "relu first": "the ReLU comes before the norm: normalise first",
    "gelu": "a GELU stands where the ReLU belongs: the CNN branch receives",
    "no norm": "the BatchNorm is not used",
    "bilinear": "the map is up-sampled bilinearly: a token fills its square with one value",
    "bicubic": "the map is up-sampled by mode bicubic: a token fills its square with one value",
}


def _up(tokens: Tensor, maps: Tensor, unit: FCUUp, faults: set[str]) -> Tensor:
    """Couple up with some of the faults above; with none of them it is right."""
    patches = tokens[:, :-1] if "last" in faults else tokens[:, 1:]
    if "mixed" in faults:
        patches = (patches + tokens[:, :1]) / 2
    rows = maps.shape[-2] // unit.stride
    if "reshaped" in faults:
        patches = patches.reshape(len(patches), patches.shape[-1], rows, -1)
    else:
        layout = "b (h g) e" if "columns" in faults else "b (g h) e"
        patches = rearrange(patches, f"{layout} -> b e g h", g=rows)
    patches = unit.conv_project(patches)
    if "relu first" in faults:
        patches = patches.relu()
    if "no norm" not in faults:
        patches = unit.bn(patches)
    if "gelu" in faults:
        patches = F.gelu(patches)
    elif not faults & {"no relu", "relu first"}:
        patches = patches.relu()
    mode = next((name for name in ("bilinear", "bicubic") if name in faults), "nearest")
    return F.interpolate(patches, scale_factor=unit.stride, mode=mode)


@exercise
def check_up(answer: Callable[..., Tensor]) -> str:
    """Check a function that couples tokens up to a map; name the faults left."""
    unit = FCUUp(10, 6, 2)
    for tensor in (*unit.parameters(), unit.bn.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(unit.bn.running_var, 0.5, 2)
    unit.eval()
    tokens, maps = torch.randn(2, 7, 10), torch.rand(2, 6, 4, 6)
    result = answer(tokens, maps, unit.conv_project, unit.bn, 2)
    require(isinstance(result, Tensor), f"a {type(result).__name__} is returned, no tensor")
    require(
        tuple(result.shape) != (2, 6, 2, 3), "the map has one position for each token: spread it"
    )
    require(tuple(result.shape) != (2, 6, 6, 4), "H and W are swapped")
    require_shape(result, (2, 6, 4, 6))
    choices = itertools.product(
        (None, "last", "mixed"),
        (None, "columns", "reshaped"),
        (None, "no relu", "relu first", "gelu"),
        (None, "no norm"),
        (None, "bilinear", "bicubic"),
    )
    for choice in sorted(choices, key=lambda names: sum(map(bool, names))):
        faults = set(choice) - {None}
        if agrees(result, _up(tokens, maps, unit, faults)):
            left = [words for name, words in _UP_FAULTS.items() if name in faults]
            require(not left, "; ".join(left))
            break
    require(
        agrees(result, unit(tokens, maps)),
        "the shape is right, the numbers differ: follow one token from its row to its square",
    )
    return "all faults are repaired: your way up is the one of the chapter"
