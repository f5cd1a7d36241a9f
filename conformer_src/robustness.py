"""Scale and rotation: change the test images, and see how much of the accuracy is left.

A curve for a model, over sizes or angles::

    sizes = accuracy_curve(model, images, labels, resize, [16, 24, 32, 48, 64])
    retention(sizes, 32)  # accuracy relative to the size of training

The images are those that the model takes: after its transform. So what is filled in at the corners
must be the background *after* normalisation, see `black_level`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from conformer_src.conformer import STEM_STRIDES, Conformer, _misfit, size_fits
from conformer_src.data import check_batch
from conformer_src.predict import _evaluating
from conformer_src.training import Scores, count_right

_STYLES = {  # colour and marker
    "Conformer": ("#2f7d4f", "o"),
    "CNN": ("#1f5f99", "s"),
    "ViT": ("#b45309", "^"),
    "no coupling": ("#5f5f5f", "x"),
    "positions": ("#7b3294", "D"),
}


def black_level(mean: Sequence[float], std: Sequence[float]) -> list[float]:
    """Return the value of a black pixel in each channel after normalisation: (0 - mean) / std.

    A 0 would be the mean grey of the data set.
    """
    return [-m / s for m, s in zip(mean, std, strict=True)]


def resize(images: Tensor, size: int) -> Tensor:
    """Give images (B, C, H, W) more or fewer pixels: the shorter side becomes `size`.

    Bilinear; to shrink, the kernel is widened (antialias), so that no pixel is passed over.

    Raises:
        ValueError: `size` is not a whole number of at least 1.
    """
    _require_side(size)
    return TF.resize(images, [size], InterpolationMode.BILINEAR, antialias=True)


def reframe(images: Tensor, size: int, fill: Sequence[float]) -> Tensor:
    """Give images (B, C, H, W) a frame of size x size around their middle; no object grows.

    A larger frame is filled with `fill`, a value for each channel; a smaller one cuts off.

    Raises:
        ValueError: `size` is not a whole number of at least 1.
    """
    _require_side(size)
    down, right = (size - side for side in images.shape[-2:])
    frame = [right // 2, down // 2, right - right // 2, down - down // 2]
    return TF.pad(images, frame, fill=list(fill))


def rotate(images: Tensor, angle: float, fill: Sequence[float]) -> Tensor:
    """Turn images (B, C, H, W) around their middle by degrees, counter-clockwise.

    Bilinear; the corners that come in are filled with `fill`, a value for each channel, and those
    that go out are lost. Quarters of a turn only move the pixels of square images.
    """
    level = images.new_tensor(fill).view(-1, 1, 1)  # becomes the 0 that torchvision fills in:
    return TF.rotate(images - level, angle, InterpolationMode.BILINEAR) + level  # no seam


def _require_side(size: int) -> None:
    if type(size) is not int or size < 1:
        raise ValueError(f"size must be a whole number of pixels, at least 1, not {size!r}.")


Change = Callable[[Tensor, Any], Tensor]  # images (B, C, H, W) and a value -> changed images
Curve = dict[float, Scores]  # the scores for each value of a change


def accuracy_curve(
    model: Conformer,
    images: Tensor,
    labels: Tensor,
    change: Change,
    values: Sequence[float],
    batch_size: int = 250,
) -> Curve:
    """Score a model on `change(images, value)` for each value; images (n, C, H, W), labels (n,).

    Raises:
        ValueError: There is nothing to score, or a value gives sizes that the model cannot take.
    """
    _require_scorable(model, images, labels, change, values)
    curve, pairs = {}, list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    with _evaluating(model) as like, torch.no_grad():
        for value in tqdm(values, "values", leave=False, disable=None):
            rows = [count_right(model(change(own, value).to(like)), names) for own, names in pairs]
            count, loss, *right = torch.tensor(rows, dtype=torch.float64).sum(0).tolist()
            shares = [None if r != r else 100 * r / count for r in right]  # nan: no such head
            curve[value] = Scores(int(count), loss / count, *shares)
    return curve


def _require_scorable(
    model: Conformer, images: Tensor, labels: Tensor, change: Change, values: Sequence[float]
) -> None:
    """Raise what would come late in a curve, before anything is computed."""
    config = model.config
    check_batch(images, labels, config.in_chans, config.num_classes)
    if not len(images) or not len(values):
        raise ValueError(
            f"{len(images)} images and {len(values)} values make no curve; give at least one each."
        )
    patch, stride = config.patch_size, STEM_STRIDES[config.stem]
    for value in values:
        sides = change(images[:1], value).shape[-2:]
        if not (config.pad or all(size_fits(side, patch, stride) for side in sides)):
            raise ValueError(
                f"the value {value!r} cannot be scored: {_misfit(sides, patch, stride)}"
            )


def retention(curve: Curve, trained: float, head: str = "sum") -> dict[float, float]:
    """Return the percentage of its accuracy at the value of training that is left at each value.

    Args:
        curve: the scores for each value.
        trained: the value at which nothing is changed: the size of training, or 0 degrees.
        head: "conv", "trans" or "sum".

    Raises:
        ValueError: The curve lacks this value or head, or nothing was right there.
    """
    right = _accuracies(curve, head)
    if not right.get(trained):
        raise ValueError(f"at {trained!r} the curve has no accuracy to compare with; score it too.")
    return {value: 100 * accuracy / right[trained] for value, accuracy in right.items()}


def _accuracies(curve: Curve, head: str) -> dict[float, float]:
    """Return the percentage that a head has right at each value."""
    if head not in ("conv", "trans", "sum"):
        raise ValueError(f"head must be conv, trans or sum, not {head!r}.")
    found = {value: getattr(scores, head) for value, scores in curve.items()}
    if None in found.values():
        raise ValueError(f"this model has no {head} head, so that the curve is empty; take sum.")
    return found


class Spread(NamedTuple):
    """What several seeds have in common: the mean of their accuracies and how far they differ."""

    seeds: int
    mean: float  # percent
    deviation: float  # standard deviation, in points; nan for one seed


def over_seeds(curves: Sequence[Curve], head: str = "sum") -> dict[float, Spread]:
    """Return mean and spread at each value over the curves of equal models with other seeds.

    Raises:
        ValueError: There is no curve, or the curves have other values or lack the head.
    """
    if not curves or any(curve.keys() != curves[0].keys() for curve in curves):
        raise ValueError("the spread needs at least one curve, and the same values in each curve.")
    right = [_accuracies(curve, head) for curve in curves]
    return {
        value: Spread(
            len(right),
            mean(own[value] for own in right),
            stdev(own[value] for own in right) if len(right) > 1 else float("nan"),
        )
        for value in curves[0]
    }


def plot_curves(spreads: Mapping[str, Mapping[float, Spread]], label: str, axis=None) -> None:
    """Draw the mean of each model over the values; a band shows one standard deviation.

    Args:
        spreads: for each name of a model, what `over_seeds` returned.
        label: what the values are, for example "pixels".
        axis: matplotlib axes; by default new ones.
    """
    import matplotlib.pyplot as plt  # here, so that importing the package stays quick

    axis = axis or plt.subplots(figsize=(5, 3), layout="constrained")[1]
    for name, rows in spreads.items():
        colour, marker = _STYLES.get(name, (None, "."))
        values, means = list(rows), [row.mean for row in rows.values()]
        (drawn,) = axis.plot(values, means, marker=marker, color=colour, markersize=4, label=name)
        low, high = ([r.mean + way * r.deviation for r in rows.values()] for way in (-1, 1))
        axis.fill_between(values, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
    axis.set(xlabel=label, ylabel="right, percent", ylim=(0, 100))
    axis.legend(fontsize=8)


def refresh_norms(model: Conformer, images: Tensor, batch_size: int = 250) -> Conformer:
    """Return a copy in eval mode whose BatchNorms hold the mean and variance of these images.

    Images (n, C, H, W). No label and no gradient is used, and all parameters stay.

    Raises:
        ValueError: There are fewer than two images.
    """
    if len(images) < 2:
        raise ValueError(f"statistics need at least two images, not {len(images)}; give more.")
    fresh = copy.deepcopy(model).eval()  # stochastic depth and dropout stay off
    norms = [part for part in fresh.modules() if isinstance(part, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None  # the plain average over all batches
    like = next(fresh.parameters())
    with torch.no_grad():
        for batch in images.tensor_split(-(-len(images) // batch_size)):
            fresh(batch.to(like))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return fresh.eval()
