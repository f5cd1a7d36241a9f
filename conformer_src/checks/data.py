"""Checks of the exercises of chapter 01."""

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from conformer_src.checks import Mistake, agrees, exercise, require, require_shape
from conformer_src.data import LocalGlobal, photograph


def _field(layers: list[tuple[int, int]]) -> int:
    field, step = 1, 1
    for kernel_size, stride in layers:
        field += (kernel_size - 1) * step
        step *= stride
    return field


@exercise
def check_receptive_field(answer) -> str:
    """Check a function from [(kernel size, stride), ...] to the theoretical receptive field."""
    require(
        isinstance(answer([(3, 1)]), int), "the field is a whole number of pixels: return an int"
    )
    require(answer([]) == 1, "without layers an output is one pixel: the field starts at 1")
    require(
        answer([(1, 1), (1, 1)]) == 1, "a 1 x 1 kernel adds nothing: a layer adds (k - 1) steps"
    )
    require(
        answer([(3, 1)] * 3) == 7,
        f"three 3 x 3 layers see 1 + 3 * 2 = 7 pixels, yours say {answer([(3, 1)] * 3)}",
    )
    two = [(3, 2), (3, 1)]
    require(
        answer([(3, 2)]) == 3, "a layer's own stride does not widen its own window, only later ones"
    )
    require(
        answer(two[::-1]) == 5, "a stride widens the steps of later layers, not of earlier ones"
    )
    require(
        answer(two) != 5, "you left out the strides: after a stride of 2 a step is 2 pixels wide"
    )
    for layers in (two, [(7, 2), (3, 2)], [(3, 2), (3, 2), (3, 2), (5, 1)], [(1, 2), (3, 1)]):
        require(
            answer(layers) == _field(layers),
            f"{layers} sees {_field(layers)} pixels, yours say {answer(layers)}: "
            "multiply the strides of all earlier layers",
        )
    return f"right: one output of the stem sees {answer([(7, 2), (3, 2)])} pixels"


def _cosines(patches: Tensor, centre: bool = True) -> Tensor:
    patches = F.normalize(patches - patches.mean(0) * centre, dim=1)
    return patches @ patches.T


@exercise
def check_similarity(answer) -> str:
    """Check a function from (image (C, H, W), side) to the cosines (N, N) of its patches."""
    image, side = photograph("cat", 48)[:, :, :32], 16  # 3 rows and 2 columns of patches
    value = answer(image, side)
    require_shape(value, (6, 6), "for a 48 x 32 image and side 16 the result")
    # All patches in reading order, by torch's own sliding window.
    patches = F.unfold(image[None], side, stride=side)[0].T
    expected = _cosines(patches)
    if agrees(value, expected, 1e-4):
        return "right: the same values whatever the order inside a patch, one row for each patch"
    columns_first = patches.view(3, 2, -1).transpose(0, 1).flatten(0, 1)
    require(
        not agrees(value, _cosines(columns_first), 1e-4),
        "you numbered the patches column by column",
    )
    require(
        not agrees(value, _cosines(patches, centre=False), 1e-4),
        "you did not take off the mean patch",
    )
    centred = patches - patches.mean(0)
    require(
        not agrees(value, centred @ centred.T, 1e-3),
        "you did not divide by the lengths of the patches",
    )
    own_mean = patches - patches.mean(1, keepdim=True)
    require(
        not agrees(value, _cosines(own_mean, centre=False), 1e-4),
        "you took off each patch's own mean; take off the mean over all patches",
    )
    require(
        not agrees(value.diagonal(), torch.ones(6), 1e-4),
        "each patch is like itself, but the rest is wrong: were pixels of several patches mixed, "
        "or did you take off something else than the mean patch, with its value for each pixel?",
    )
    raise Mistake(
        "a patch must have cosine 1 with itself, but the diagonal is not 1: take off the mean "
        "patch first, then divide each patch by its length"
    )


@exercise
def check_label(answer) -> str:
    """Check a labelling of (rotation, agreement) that no sum of two opinions solves."""
    rotation, agreement = torch.arange(8) // 2, torch.arange(8) % 2
    labels = answer(rotation.clone(), agreement.clone())  # an answer may work in place
    require_shape(labels, (8,), "for 8 images the result")
    require(labels.dtype == torch.int64, f"labels are {labels.dtype}; class numbers are int64")
    require(int(labels.min()) >= 0, f"label {int(labels.min())} is negative; classes count from 0")
    drawn = LocalGlobal(torch.empty(0), rotation, agreement)
    require(
        not torch.equal(labels, drawn.coupled_label()),
        "that is the label of the chapter; invent another",
    )
    table = labels.view(4, 2)  # a row for each rotation, a column for each agreement
    require(
        bool((table != table[:1]).any()),
        "the label does not depend on the rotation: one cue is enough",
    )
    require(
        bool((table[:, 0] != table[:, 1]).any()),
        "the label does not depend on the agreement: one cue is enough",
    )
    for first, second in combinations(range(4), 2):
        (a, b), (c, d) = table[first].tolist(), table[second].tolist()
        if a != b and (a, b) == (d, c):
            return (
                f"right: when the bars agree, rotations {first} and {second} swap classes {a}, {b}"
            )
    raise Mistake(
        "no two rotations swap their two classes when the agreement changes: the chapter's proof "
        "does not apply, and a sum of opinions may solve this label"
    )
