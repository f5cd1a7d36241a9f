"""How an image is made ready for a network: what travels with its weights, as `model.input`.

Say it once, and it is saved, loaded and used by `predict`::

    model.input = InputConfig(64, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop=1.0)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torchvision.transforms import v2

from conformer_src.data import IMAGENET_MEAN, IMAGENET_STD

_LARGEST = 10_000  # pixels; a wrong number must not fill the memory


@dataclass(frozen=True)
class InputConfig:
    """How an image becomes the square that a network was trained on; always bicubic.

    The defaults are those of the published weights: the shorter side becomes 256, and the 224 in
    the middle are cut out.

    Raises:
        ValueError: A value cannot work.
    """

    image_size: int = 224  # side of the square, in pixels, with its padding
    mean: Sequence[float] = IMAGENET_MEAN  # of each channel, for values from 0 to 1
    std: Sequence[float] = IMAGENET_STD  # deviation of each channel
    crop: float = 0.875  # share of the shorter side that the square keeps
    pad: int = 0  # pixels of zeros that are added on each side, inside of image_size

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            given = getattr(self, name)
            low, high = (-1e6, 1e6) if name == "mean" else (1e-6, 1e6)
            fits = isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 0
            if not fits or not all(_is_within(value, low, high) for value in given):
                rule = f"a number from {low:,g} to {high:,g} for each channel"
                raise ValueError(f"{name} must hold {rule}, not {_short(given)}.")
            object.__setattr__(self, name, tuple(map(float, given)))  # the class is frozen
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean and std must be equally long, but mean has {len(self.mean)} channels and "
                f"std {len(self.std)}."
            )
        self._check_frame()

    def _check_frame(self) -> None:
        for name, least in (("image_size", 1), ("pad", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                rule = f"a whole number of at least {least}"
                raise ValueError(f"{name} must be {rule}, not {_short(value)}.")
        if not _is_within(self.crop, 1e-6, 1):
            raise ValueError(
                f"crop must be a number above 0 and at most 1, not {_short(self.crop)}."
            )
        if 2 * self.pad >= self.image_size:
            raise ValueError(
                f"pad must leave room for the image, but twice {_short(self.pad)} pixels fill the "
                f"{_short(self.image_size)} of image_size."
            )
        if self.image_size > _LARGEST * self.crop:
            raise ValueError(
                f"image_size / crop must be at most {_LARGEST:,} pixels, not "
                f"{_short(self.image_size)} / {self.crop!r}."
            )


def _is_within(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and low <= value <= high


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def usual_crop(image_size: int) -> float:
    """Return the usual share to keep: 7/8, and all of an image that has no margin to spare."""
    return 0.875 if image_size >= 128 else 1.0


def input_steps(config: InputConfig) -> tuple[list, list, list]:
    """Return the parts of `input_transform`: to channels, to the square, to numbers."""
    channels = {1: [v2.Grayscale()], 3: [v2.RGB()]}.get(len(config.mean), [])
    inner = config.image_size - 2 * config.pad
    resize = v2.Resize(int(inner / config.crop), interpolation=v2.InterpolationMode.BICUBIC)
    square = [resize, v2.CenterCrop(inner)] + ([v2.Pad(config.pad)] if config.pad else [])
    numbers = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(config.mean, config.std)]
    return [*channels, v2.ToImage()], square, numbers


def input_transform(config: InputConfig) -> v2.Compose:
    """Return the transform of evaluation and prediction: an image in, float (C, size, size) out."""
    return v2.Compose([step for part in input_steps(config) for step in part])


def misfit_of_input(found: object, in_chans: int) -> str | None:
    """Say in words why this cannot be the input of a model of so many channels; None if it can."""
    if not isinstance(found, InputConfig):
        return f"{type(found).__name__}, not an InputConfig"
    if len(found.mean) != in_chans:
        return f"mean and std for {len(found.mean)} channels, but the model takes {in_chans}"
    return None


def own_input(model: nn.Module) -> InputConfig | None:
    """Return how a model wants its images; raise a `ValueError` for what cannot be meant."""
    found = getattr(model, "input", None)
    if found is None:
        return None
    if wrong := misfit_of_input(found, model.config.in_chans):
        raise ValueError(f"model.input holds {wrong}; set an InputConfig that fits, or None.")
    return found
