"""Prediction: images of any kind in, their classes or their features out.

A folder in, a `Prediction` for each image out::

    for found in predict(model, "holiday/"):
        print(found.image, found.labels[0], found.probabilities[0])
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models import ResNet50_Weights
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from conformer_src.conformer import Conformer, ConformerConfig, DualLogits, _own_classes
from conformer_src.coupled_block import Features
from conformer_src.data import _to_rgb
from conformer_src.inputs import InputConfig, input_transform, own_input, usual_crop

# What counts as an image in a folder. The last four are named if this Pillow cannot read them.
IMAGE_ENDINGS = (*IMG_EXTENSIONS, ".gif", ".jfif", ".avif", ".heic")


def list_images(images: Any) -> list[tuple[str, Any]]:
    """Return (name, image) for each image in what `predict` is given, before any file is read.

    A folder stands for the images in it and in its sub-folders, sorted by path, without what is
    hidden. The name is the path, or for what has none the place: "image 0".

    Raises:
        ValueError: There are no images in a folder.
    """
    return [
        (os.fsdecode(image) if _is_path(image) else f"image {place}", image)
        for place, image in enumerate(_each(images))
    ]


def _is_path(image: Any) -> bool:
    return isinstance(image, str | os.PathLike)


def _each(images: Any) -> Iterator[Any]:
    """Yield what stands for one image each."""
    stacked = isinstance(images, np.ndarray | Tensor) and images.ndim == 4
    if stacked or isinstance(images, list | tuple | Iterator):
        for image in images:
            yield from _each(image)
    elif _is_path(images) and os.path.isdir(images):
        yield from _in_folder(Path(os.fsdecode(images)))
    else:
        yield images


def _in_folder(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS]
    visible = [
        path
        for path in found
        if not path.is_dir()  # but links to nowhere: they will be named
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not visible:
        raise ValueError(f"there are no images in {folder}; expected {', '.join(IMAGE_ENDINGS)}.")
    return sorted(visible)


def open_image(image: Any, channels: int = 3) -> Image.Image | Tensor:
    """Read an image, turn it upright as its camera noted, and give it the model's channels.

    16 bits become 8, the first picture of an animation is taken, and transparency is ignored, as
    torchvision's own reader of folders does.

    Args:
        image: a path, a PIL image of any mode, an array (H, W) or (H, W, C), or a tensor (H, W) or
            (C, H, W). Whole numbers are 0 to 255 (uint16: 0 to 65,535), floats 0 to 1.
        channels: 3 for colour, 1 for grey; other numbers leave tensors as they are.

    Returns:
        A PIL image for a file or a PIL image, else a tensor (C, H, W) on the CPU, uint8 or float32.

    Raises:
        ValueError: It is no image.
    """
    if _is_path(image):
        with Image.open(image) as opened:
            return open_image(opened, channels)
    if not isinstance(image, Image.Image):
        return _open_tensor(image, channels)
    if image.mode == "F":  # Pillow would cut fractions off
        return _open_tensor(np.asarray(image), channels)
    return _to_rgb(image).convert("L" if channels == 1 else "RGB")


def _open_tensor(image: Any, channels: int) -> Tensor:
    given = getattr(image, "shape", ())
    if isinstance(image, np.ndarray):  # torch takes neither reversed rows nor foreign byte orders
        native = np.ascontiguousarray(image, dtype=image.dtype.newbyteorder("="))
        image = torch.tensor(native)
        image = image.movedim(-1, 0) if image.ndim == 3 else image
    if not isinstance(image, Tensor):
        kind = type(image).__name__
        raise ValueError(f"{kind} is no image; give a path, a PIL image, an array or a tensor.")
    pixels = image.detach().cpu()
    pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3, 4, channels) or not pixels.numel():
        raise ValueError(
            f"its shape is {tuple(given)}; give an array (H, W) or (H, W, C), or a tensor "
            "(H, W) or (C, H, W), with C 1, 3 or 4."
        )
    return _with_channels(_as_bytes_or_floats(pixels), channels)


def _as_bytes_or_floats(pixels: Tensor) -> Tensor:
    """Return uint8 or float32, because torchvision scales other types by other numbers."""
    if pixels.is_floating_point():
        return pixels.float()
    if pixels.dtype == torch.bool:
        return pixels.byte() * 255
    if pixels.dtype == torch.uint16:
        return (pixels.int() // 257).byte()
    if pixels.is_complex() or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError("its values are not 0 to 255; scale them, or give floats from 0 to 1.")
    return pixels.byte()


def _with_channels(pixels: Tensor, channels: int) -> Tensor:
    if channels == 1:
        return pixels if len(pixels) == 1 else _grey(pixels[:3])
    return pixels[:3].expand(3, -1, -1) if channels == 3 else pixels


def _grey(pixels: Tensor) -> Tensor:
    """Return the brightness (1, H, W) of colours as Pillow does; torchvision's rounds down."""
    brightness = torch.tensordot(torch.tensor([[0.299, 0.587, 0.114]]), pixels.float(), dims=1)
    return brightness if pixels.is_floating_point() else brightness.round().byte()


# By the stem, for a model that has no input of its own; both with ImageNet's mean and deviation.
USUAL_INPUTS = {"standard": InputConfig(), "small": InputConfig(32, crop=usual_crop(32))}


def default_transform(model: nn.Module) -> Callable[[Image.Image | Tensor], Tensor]:
    """Return what makes an image ready: as `model.input` says, or else as is usual for the stem.

    That is the centre at 224 pixels as for the published weights, and for the small stem all of an
    image at 32.

    Raises:
        ValueError: The model has no input and does not take 3 channels, so that nobody knows how
            its images were normalised, or its input does not fit; the transform itself raises it
            for values or sides that make no sense.
    """
    config, ready = _config(model), own_input(model)
    if ready is None and config.in_chans != 3:
        raise ValueError(
            f"a model of {config.in_chans} channels has no usual transform; set model.input, or "
            "give the one of its training, for example transform=fashion_transform(train=False)."
        )
    prepare = input_transform(ready or USUAL_INPUTS[config.stem])
    return lambda image: prepare(_require_usual(image))


def _require_usual(image: Image.Image | Tensor) -> Image.Image | Tensor:
    """Raise a `ValueError` for floats that are no brightness, and for strips of pixels."""
    height, width = TF.get_size(image)
    if max(height, width) > 100 * min(height, width):
        raise ValueError(
            f"it is {width} x {height} pixels, one side more than 100 times the other; cut out "
            "the part that counts."
        )
    if isinstance(image, Tensor) and image.is_floating_point():
        low, high = image.min().item(), image.max().item()
        if not -0.1 <= low <= high <= 1.1:  # resizing may overshoot a little
            raise ValueError(
                f"its floats go from {low:.4g} to {high:.4g} instead of 0 to 1; scale them, or if "
                "they are normalised and of the model's size, give transform=torch.nn.Identity()."
            )
    return image


def _prepare(name: str, image: Any, channels: int, transform: Callable) -> Tensor:
    """Open and transform an image; errors name it."""
    try:
        return transform(open_image(image, channels))
    except FileNotFoundError:
        raise ValueError(f"there is no file or folder {name}.") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is no image of a kind that Pillow can read.") from None
    except Exception as error:  # Pillow reports broken files in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} cannot be used as an image: {reason}") from error


def batches(
    images: Any,
    transform: Callable,
    size: int = 32,
    channels: int = 3,
    on_unreadable: Callable[[str], Any] | None = None,
) -> Iterator[tuple[list[str], Tensor]]:
    """Yield the names and the transformed tensors (B, C, H, W) of images, `size` at a time.

    Raises:
        ValueError: An image cannot be used and `on_unreadable` is None. To raise it before the
            first batch, all images are read once more if there are several batches.
    """
    _require_count("batch_size", size)
    listed = list_images(images)
    prepare = partial(_prepare, channels=channels, transform=transform)
    bar = partial(tqdm, listed, unit=" images", leave=False, disable=len(listed) <= size or None)
    if on_unreadable is None and len(listed) > size:
        for name, image in bar(desc="reading"):
            prepare(name, image)
    ready = _ready(bar(), prepare, on_unreadable)
    while chunk := list(islice(ready, size)):
        names, tensors = zip(*chunk, strict=True)
        _require_one_shape(names, tensors)
        yield list(names), torch.stack(tensors)


def _ready(
    listed: Iterator[tuple[str, Any]],
    prepare: Callable[[str, Any], Tensor],
    on_unreadable: Callable[[str], Any] | None,
) -> Iterator[tuple[str, Tensor]]:
    for name, image in listed:
        try:
            tensor = prepare(name, image)
        except ValueError as error:
            if on_unreadable is None:
                raise
            on_unreadable(str(error))
        else:
            yield name, tensor


def _require_one_shape(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.shape != tensors[0].shape:
            raise ValueError(
                f"{name} became {tuple(tensor.shape)}, but {names[0]} {tuple(tensors[0].shape)}; "
                "let the transform end in one size, or give batch_size=1."
            )


def _require_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}.")


def class_names(count: int, classes: Sequence[str] | None = None) -> Sequence[str]:
    """Return the names of classes: those given, ImageNet's for 1,000, else "class 0" and so on.

    Raises:
        ValueError: Another number of names was given.
    """
    if classes is None:
        imagenet = ResNet50_Weights.DEFAULT.meta["categories"]
        return imagenet if count == len(imagenet) else [f"class {n}" for n in range(count)]
    if len(classes) != count:
        raise ValueError(f"{len(classes)} names were given for {count} classes; give one for each.")
    return classes


class Prediction(NamedTuple):
    """What a model says about one image, with probabilities from 0 to 1."""

    image: str  # the path, or the place in what was given: "image 0"
    labels: tuple[str, ...]  # the classes that the sum of both heads ranks first
    probabilities: tuple[float, ...]  # of these, by the softmax of the sum
    conv: tuple[str, float] | None  # the first choice of the CNN's head alone
    trans: tuple[str, float] | None  # the first choice of the transformer's head alone
    indices: tuple[int, ...]  # the numbers of these classes


def rank(logits: DualLogits, names: Sequence[str], topk: int) -> list[tuple]:
    """Return, for each image, the fields of its `Prediction` after the name."""
    values, order = logits.sum().float().softmax(1).topk(min(topk, len(names)))
    heads = [None if own is None else own.float().softmax(1).max(1) for own in logits]
    ranked = []
    for row, indices in enumerate(order.tolist()):
        own = [h and (names[h.indices[row]], h.values[row].item()) for h in heads]
        labels = tuple(names[index] for index in indices)
        ranked.append((labels, tuple(values[row].tolist()), *own, tuple(indices)))
    return ranked


@torch.no_grad()
def predict(
    model: Conformer,
    images: Any,
    topk: int = 5,
    classes: Sequence[str] | None = None,
    transform: Callable | None = None,
    batch_size: int = 32,
    on_unreadable: Callable[[str], Any] | None = None,
) -> list[Prediction]:
    """Name what is in images by the sum of both heads (Conformer paper, section 3.1).

    Without `on_unreadable`, an image that cannot be used raises an error before anything is
    computed, so there is one prediction for each image, in the same order.

    Args:
        model: on any device, compiled or not; its training mode is restored afterwards.
        images: a path, a folder, a PIL image, an array, a tensor, or a list or generator of these;
            see `list_images` and `open_image`.
        topk: how many classes to return for each image, at most all that there are.
        classes: their names; by default `model.classes`, or else see `class_names`.
        transform: image -> tensor (C, H, W); by default `default_transform(model)`. It is given
            what `open_image` returns.
        batch_size: images at a time.
        on_unreadable: called with a sentence for each image that cannot be used, which is then left
            out: `warnings.warn`, `print` or the `append` of a list.

    Raises:
        ValueError: An image cannot be used (the message names it), the model has no classes, or
            topk or batch_size is below 1.
    """
    config = _config(model)
    _require_count("topk", topk)
    if not config.num_classes:
        raise ValueError("a model of num_classes=0 predicts nothing; use extract_features.")
    classes = _own_classes(model) if classes is None else classes
    names, found = class_names(config.num_classes, classes), []
    transform = transform or default_transform(model)
    with _evaluating(model) as like:
        for places, batch in batches(images, transform, batch_size, config.in_chans, on_unreadable):
            rows = rank(model(batch.to(like)), names, topk)
            found += [Prediction(place, *row) for place, row in zip(places, rows, strict=True)]
    return found


@torch.no_grad()
def extract_features(
    model: Conformer,
    images: Any,
    block: int | None = None,
    transform: Callable | None = None,
    batch_size: int = 32,
) -> Features:
    """Return maps (n, C, H, W) and tokens (n, N, E) of n images after a block, on the CPU.

    Only this block's features are kept, and the blocks after it are not run. Of a model with
    `branches="conv"` the tokens are (n, 0, 0); with `branches="trans"` the maps are the stem's.

    Args:
        model: on any device, compiled or not; its training mode is restored afterwards.
        images: what `predict` takes; the rows are in the order of `list_images(images)`.
        block: 1 to depth; by default the last.
        transform: image -> tensor (C, H, W); by default `default_transform(model)`.
        batch_size: images at a time.

    Raises:
        ValueError: An image cannot be used (the message names it), there is none, or there is no
            such block.
    """
    config, found = _config(model), []
    blocks = model.blocks[: _require_block(block, config.depth)]
    transform = transform or default_transform(model)
    with _evaluating(model) as like:
        for _, batch in batches(images, transform, batch_size, config.in_chans):
            features = model.entry(batch.to(like))
            for part in blocks:
                features = part(*features)
            found.append([part.cpu() for part in features])
    if not found:
        raise ValueError("no images were given; give at least one.")
    return Features(*map(torch.cat, zip(*found, strict=True)))


def _require_block(block: int | None, depth: int) -> int:
    if block is None:
        return depth
    if type(block) is not int or not 1 <= block <= depth:
        raise ValueError(f"block must be a whole number from 1 to {depth}, not {block!r}.")
    return block


def _config(model: nn.Module) -> ConformerConfig:
    config = getattr(model, "config", None)
    if not isinstance(config, ConformerConfig):
        kind = type(model).__name__
        raise TypeError(f"{kind} has no ConformerConfig; give a Conformer, unwrap it if necessary.")
    return config


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[Tensor]:
    """Put a model into eval mode for a while; gives a tensor of its device and type.

    Each part gets its own mode back: some train while others, frozen, do not.
    """
    modes = [(part, part.training) for part in model.modules()]
    try:
        yield next(model.eval().parameters())
    finally:
        for part, training in modes:
            part.training = training
