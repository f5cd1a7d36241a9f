"""Checks of the exercises of chapter 12, robustness."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from conformer_src.checks import agrees, exercise, require, require_shape
from conformer_src.robustness import Curve, reframe
from conformer_src.training import Scores

_MEASURES = ("brightness", "edges", "attention")
_RIGHT = {"resized": (36 / 144, 12 / 144, 1 / 2), "reframed": (4 / 144, 4 / 144, 12 / 152)}
_SLIPS = {  # wrong values that have a name
    ("resized", "brightness"): {36 / 64: "12 x 12 are 144 pixels"},
    ("resized", "edges"): {
        1 / 4: "edges do not grow with the area: the square has 6 rows with two edges each",
        1 / 8: "that is for twice the size; the square has 6 rows now",
        6 / 144: "each row has two edges: into the square and out of it",
        24 / 144: "only left neighbours count: the upper and lower sides give no edge",
    },
    ("resized", "attention"): {
        1 / 4: "scores are not shares: a bright pixel counts three times as much as a dark one",
        1 / 6: "that is for the doubled frame; resized, each token stands there nine times",
    },
    ("reframed", "brightness"): {1 / 4: "the frame has 144 pixels now", 1 / 16: "that is 8 x 8"},
    ("reframed", "edges"): {1 / 4: "the frame has 144 pixels now", 1 / 16: "that is 8 x 8"},
    ("reframed", "attention"): {
        1 / 2: "the new dark tokens take attention too",
        1 / 6: "that is 8 x 8; count the dark pixels of 12 x 12",
        4 / 144: "scores are not shares: a bright pixel counts three times as much as a dark one",
        12 / 140: "the bright pixels are part of the whole, below the fraction bar too",
        12 / 156: "four of the 144 pixels are bright, so 140 are dark",
    },
}


@exercise
def check_prediction(answer: Callable[[], dict[str, tuple[float, float, float]]]) -> str:
    """Check what three measures say of an image three times as large."""
    given = answer()
    formed = isinstance(given, dict) and given.keys() == _RIGHT.keys()
    require(formed, 'return a dict with the keys "resized" and "reframed"')
    for way, right in _RIGHT.items():
        row = given[way]
        numbers = isinstance(row, tuple | list) and all(isinstance(v, int | float) for v in row)
        require(numbers and len(row) == 3, f"{way}: give three numbers: {', '.join(_MEASURES)}")
        for name, own, value in zip(_MEASURES, row, right, strict=True):
            if not math.isclose(own, value, rel_tol=1e-3):
                slips = _SLIPS[way, name].items()
                why = [words for slip, words in slips if math.isclose(own, slip, rel_tol=1e-3)]
                hint = why[0] if why else "count again, in the drawing"
                require(False, f"{way}, {name} is not {own:.4g}: {hint}")
    return "resizing thins out the edges, a larger frame thins out everything"


def _frame_mistakes(images: Tensor, size: int, fill: list[float]) -> dict[str, Tensor]:
    """Return what wrong frames give, under what is wrong with them."""
    down, right = (size - side for side in images.shape[-2:])
    level = images.new_tensor(fill).view(1, -1, 1, 1)
    upper = [right - right // 2, right // 2, down - down // 2, down // 2]
    first = images.new_full(images.shape, fill[0]) if fill else images
    return {
        "the frame is filled with 0, the mean grey: use fill": reframe(
            images, size, [0.0] * len(fill)
        ),
        "all channels have the fill of the first one": F.pad(
            images - first, [right // 2, right - right // 2, down // 2, down - down // 2]
        )
        + fill[0],
        "the images are in the upper left corner, not in the middle": F.pad(
            images - level, [0, right, 0, down]
        )
        + level,
        "of an odd rest, the larger half goes to the right and to the bottom": F.pad(
            images - level, upper
        )
        + level,
        "the images were enlarged; a frame leaves them as they are": F.interpolate(
            images, (size, size), mode="bilinear"
        ),
        "the images were enlarged by repeating pixels; a frame leaves them as they are": (
            F.interpolate(images, (size, size))
        ),
        "the frame repeats the border of the image: use fill": F.pad(
            images,
            [right // 2, right - right // 2, down // 2, down - down // 2],
            mode="replicate",
        ),
    }


@exercise
def check_frame(answer: Callable[[Tensor, int, list[float]], Tensor]) -> str:
    """Check images in the middle of a larger frame."""
    fill = [-0.8, 0.3, 2.0]
    for shape, size in (((2, 3, 4, 4), 8), ((2, 3, 5, 6), 8), ((1, 3, 4, 4), 4)):
        images = torch.randn(shape)
        before = images.clone()
        given = answer(images, size, fill)
        require_shape(given, (*shape[:2], size, size), "the framed images")
        require(
            torch.equal(images, before), "you wrote into the images themselves; return new ones"
        )
        right = reframe(images, size, fill)
        if not agrees(given, right):
            mistakes = _frame_mistakes(images, size, fill)
            found = [words for words, value in mistakes.items() if agrees(given, value)]
            require(
                False, found[0] if found else "the images or the fill are not where they belong"
            )
    return "the garment stays as it is, and the background goes on around it"


def _curve(*right: float) -> Curve:
    sizes = (16, 24, 32)
    return {s: Scores(100, 1.0, 1.0, 2.0, r) for s, r in zip(sizes, right, strict=True)}


@exercise
def check_retention(answer: Callable[[Curve, float, float], dict[float, float]]) -> str:
    """Check what is kept above chance."""
    for curve, trained, chance in (
        (_curve(20.0, 55.0, 80.0), 32, 10.0),
        (_curve(7.0, 80.0, 60.0), 24, 12.5),
    ):
        given = answer(curve, trained, chance)
        formed = isinstance(given, dict) and given.keys() == curve.keys()
        require(formed, "return a dict with a number for each value of the curve")
        right = {value: scores.sum for value, scores in curve.items()}
        whole = right[trained]
        mistakes = {
            "chance is left out": lambda a, w=whole: 100 * a / w,
            "subtract chance below the fraction bar too": (
                lambda a, w=whole, c=chance: 100 * (a - c) / w
            ),
            "subtract chance above the fraction bar too": (
                lambda a, w=whole, c=chance: 100 * a / (w - c)
            ),
            "give percent: 100 where nothing is lost": (
                lambda a, w=whole, c=chance: (a - c) / (w - c)
            ),
            "worse than guessing is below 0: do not cut it off": (
                lambda a, w=whole, c=chance: max(0.0, 100 * (a - c) / (w - c))
            ),
            "subtract chance from the accuracies, not from what is kept": (
                lambda a, w=whole, c=chance: 100 * a / w - c
            ),
            "compare with the accuracy at the value of training, not with 100": (
                lambda a, c=chance: 100 * (a - c) / (100 - c)
            ),
        }
        expected = {v: 100 * (a - chance) / (whole - chance) for v, a in right.items()}
        if not _same(given, expected):
            cases = {w: {v: kept(a) for v, a in right.items()} for w, kept in mistakes.items()}
            found = [words for words, values in cases.items() if _same(given, values)]
            require(False, found[0] if found else f"expected {expected}")
    return "0 is guessing, 100 is as in training, and below 0 is worse than guessing"


def _same(given: dict[float, float], expected: dict[float, float]) -> bool:
    return all(math.isclose(given[v], expected[v], rel_tol=1e-4, abs_tol=1e-4) for v in expected)


def _position_mistakes(positions: Tensor, side: int) -> dict[str, Tensor]:
    """Return what wrong grids give, under what is wrong with them."""
    border = (side - positions.shape[-1]) // 2
    modes = ("bicubic", "bilinear", "nearest")
    stretched = {
        f"the old grid is stretched ({mode}); its values must stay": F.interpolate(
            positions, (side, side), mode=mode
        )
        for mode in modes
    }
    return stretched | {
        "the border is 0: repeat the nearest old position": F.pad(positions, (border,) * 4),
        "the border mirrors the grid: repeat the nearest old position": F.pad(
            positions, (border,) * 4, mode="reflect"
        ),
        "the border wraps around: repeat the nearest old position": F.pad(
            positions, (border,) * 4, mode="circular"
        ),
        "the old grid is in the upper left corner, not in the middle": F.pad(
            positions, (0, 2 * border) * 2, mode="replicate"
        ),
    }


@exercise
def check_positions(answer: Callable[[Tensor, int], Tensor]) -> str:
    """Check a larger grid of positions around the old one."""
    positions = torch.randn(1, 5, 4, 4)
    for side in (6, 8, 4):
        given = answer(positions, side)
        require_shape(given, (1, 5, side, side), "the grid")
        border = (side - 4) // 2
        if not agrees(given, F.pad(positions, (border,) * 4, mode="replicate")):
            mistakes = _position_mistakes(positions, side) if border else {}
            found = [words for words, value in mistakes.items() if agrees(given, value)]
            require(False, found[0] if found else "the middle must be the old grid, value by value")
    return "the garment keeps its own positions, in a frame of any size"
