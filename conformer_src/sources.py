"""The images that a recipe names: opened, split, and made ready for the network."""

import warnings
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from conformer_src.data import (
    FASHION_MEAN,
    FASHION_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    FashionSubset,
    fashion_mnist,
    image_folder,
)
from conformer_src.inputs import InputConfig, input_steps, input_transform, usual_crop
from conformer_src.recipes import Recipe

_FASHION = {"fashion-subset": FashionSubset, "fashion": fashion_mnist}
_SHARDS = "shards.json"  # what `scaling.write_shards` leaves beside the shards


class Data(NamedTuple):
    """The images of a run; an item is (image (C, H, W), label)."""

    train: Dataset
    val: Dataset  # to choose by, never trained on if it can be helped
    test: Dataset | None  # to report by; None if there is none
    classes: tuple[str, ...]


def open_data(recipe: Recipe) -> Data:
    """Open the images of a recipe; what is held out depends on its seed alone.

    `recipe.data` is "fashion-subset", "fashion", or a folder: with `train/CLASS/*` and, as far as
    there are, `val/CLASS/*` and `test/CLASS/*`; or with `CLASS/*` alone. Each of `train/`, `val/`
    and `test/` may be a folder of shards instead.

    Raises:
        FileNotFoundError: There is no such folder, or it has another structure.
        ValueError: The images do not suit the recipe, a class has no counterpart in `train/`, there
            is one class only, or a file cannot be read; shards in `train/` without `val/`.
    """
    if recipe.data in _FASHION:
        train, test = (_open_fashion(recipe, train) for train in (True, False))
        return Data(*_hold_out(train, recipe), test, tuple(train.classes))
    root = _require_folder(recipe)
    parts = _parts(root)
    if parts and "train" not in parts:
        raise FileNotFoundError(
            f"{root} has {_listed(list(parts))}, but no train; add it, or give a folder with "
            "nothing but a sub-folder for each class."
        )
    train = _open_part(parts.get("train", root), recipe)
    classes = tuple(train.classes)
    if len(classes) == 1:
        raise ValueError(
            f"{root} has one class, {classes[0]}: with a single answer there is nothing to learn; "
            "add a sub-folder with images of what it is not."
        )
    val, test = (
        _open_part(parts[part], recipe, classes) if part in parts else None
        for part in ("val", "test")
    )
    if isinstance(train, ImageFolder):
        _warn_of_imbalance(train)
    elif recipe.repeats > 1:
        raise ValueError(
            f"repeats must be 1 with shards, not {recipe.repeats}: they are read in a row, so no "
            "image can come several times in a batch."
        )
    elif val is None:
        raise ValueError(
            f"{parts.get('train', root)} holds shards, of which no images can be held out; put "
            f"them into {root / 'train'}, and others for validation into {root / 'val'}."
        )
    if val is None:
        return Data(*_hold_out(train, recipe), test, classes)
    return Data(_augmented(train, recipe), val, test, classes)


def evaluation_images(
    recipe: Recipe, classes: Sequence[str] | None = None, ready: InputConfig | None = None
) -> Dataset:
    """Return the images of a recipe to score a model by, labelled in the order of its classes.

    These are the test images of Fashion-MNIST, or of a folder those in `test/`, else in `val/`,
    else all `CLASS/*`. What a run held out of its training images is `open_data(recipe).val`.

    Args:
        recipe: names the images, their size and channels.
        classes: the names of the model's classes; by default the sub-folders, sorted.
        ready: how the model wants its images; by default as the recipe does.

    Raises:
        FileNotFoundError: There is no such folder, or it has another structure.
        ValueError: A sub-folder is no class of the model, or the folder holds `train/` only.
    """
    if recipe.data in _FASHION:
        images = _open_fashion(recipe, train=False, ready=ready)
        if classes is not None and tuple(classes) != tuple(images.classes):
            raise ValueError(
                f"the model knows other classes than {recipe.data}: {_listed(classes)}; give the "
                "folder of its own images."
            )
        return images
    root = _require_folder(recipe)
    parts = _parts(root)
    if list(parts) == ["train"]:
        raise ValueError(
            f"{root} holds train/ only; give a folder with test/ or val/, or one with a sub-folder "
            f"for each class, such as {parts['train']}."
        )
    return _open_part(parts.get("test", parts.get("val", root)), recipe, classes, ready)


def input_config(recipe: Recipe) -> InputConfig:
    """Return how images are made ready to be scored; it travels with the weights of a run.

    From 128 pixels on the usual 7/8 in the middle is kept. Smaller images have no margin to spare:
    the shorter side becomes `image_size`, so that an image of that size keeps each pixel.
    Fashion-MNIST gets two pixels of zeros on each side instead.
    """
    size = recipe.image_size
    if recipe.data in _FASHION:
        return InputConfig(size, *_colours(recipe), crop=1.0, pad=2)
    return InputConfig(size, *_colours(recipe), crop=usual_crop(size))


def image_transform(recipe: Recipe, train: bool) -> v2.Compose:
    """Return what makes an image of a recipe ready: any image in, float (C, size, size) out.

    Without random crops, training sees the same part of an image as evaluation.
    """
    ready = input_config(recipe)
    if not train:
        return input_transform(ready)
    channels, square, numbers = input_steps(ready)
    if recipe.crop_scale < 1:
        bicubic, scale = v2.InterpolationMode.BICUBIC, (recipe.crop_scale, 1)
        crop = v2.RandomResizedCrop(recipe.image_size, scale, interpolation=bicubic)
        square = [*square, crop] if ready.pad else [crop]
    erase = [v2.RandomErasing(recipe.erasing, value="random")] if recipe.erasing else []
    return v2.Compose([*channels, *square, *_augmentation(recipe), *numbers, *erase])


def _augmentation(recipe: Recipe) -> list[v2.Transform]:
    """Return what varies images of bytes, beside the crop."""
    chosen, strength = [], recipe.color_jitter
    if recipe.flip:
        chosen.append(v2.RandomHorizontalFlip())
    if recipe.rand_augment:  # what is moved in from outside has the colour of the mean
        fill = [0 if recipe.data in _FASHION else 255 * mean for mean in _colours(recipe)[0]]
        bilinear = v2.InterpolationMode.BILINEAR  # torchvision turns tensors no finer
        chosen.append(v2.RandAugment(2, recipe.rand_augment, interpolation=bilinear, fill=fill))
    if strength:
        chosen.append(v2.ColorJitter(strength, strength, strength))
    return chosen


def _colours(recipe: Recipe) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and deviation of each channel, for values from 0 to 1."""
    if recipe.data in _FASHION:
        return FASHION_MEAN, FASHION_STD
    if recipe.in_chans == 1:
        return (sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,)
    return IMAGENET_MEAN, IMAGENET_STD


def _open_fashion(recipe: Recipe, train: bool, ready: InputConfig | None = None) -> Dataset:
    if (recipe.in_chans, recipe.image_size) != (1, 32):
        raise ValueError(
            f"{recipe.data} is grey and padded to 32 pixels, so in_chans must be 1 and image_size "
            f"32, not {recipe.in_chans} and {recipe.image_size}."
        )
    return _FASHION[recipe.data](train, transform=input_transform(ready or input_config(recipe)))


def _require_folder(recipe: Recipe) -> Path:
    """Return the folder of a recipe, if it is there and its images can have these channels."""
    if not recipe.data:
        raise ValueError(
            "the recipe names no images; give --data FOLDER, with a sub-folder for each class."
        )
    if recipe.in_chans not in (1, 3):
        raise ValueError(
            f"in_chans must be 1 (grey) or 3 (RGB) for image files, not {recipe.in_chans}; other "
            "channels need a data set of your own, given to `training.fit`."
        )
    root = Path(recipe.data).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"there is no folder {root}; put it back, or name the images with --data: a folder, "
            f"{' or '.join(_FASHION)}."
        )
    return root


def _parts(root: Path) -> dict[str, Path]:
    """Return the folders of the splits, or nothing if the sub-folders are the classes."""
    folders = _visible_folders(root)
    parts = {name: folders[name] for name in ("train", "val", "test") if name in folders}
    parts = {name: folder for name, folder in parts.items() if _is_part(folder)}
    if "train" in folders and "train" not in parts:
        return {}  # it holds images: a class of this name
    if parts and (others := sorted(folders.keys() - parts)):
        warnings.warn(
            f"{root}: {_listed(others)} beside {_listed(list(parts))} is not used; only train, val "
            "and test are, with a sub-folder for each class.",
            stacklevel=3,
        )
    return parts


def _is_part(folder: Path) -> bool:
    return (folder / _SHARDS).is_file() or bool(_visible_folders(folder))


def _visible_folders(root: Path) -> dict[str, Path]:
    paths = [path for path in root.iterdir() if path.is_dir()]
    return {path.name: path for path in paths if not path.name.startswith(".")}


def _open_part(
    folder: Path,
    recipe: Recipe,
    classes: Sequence[str] | None = None,
    ready: InputConfig | None = None,
) -> Dataset:
    """Open a folder of images or of shards for evaluation, labelled in the order of `classes`."""
    transform = input_transform(ready or input_config(recipe))
    if (folder / _SHARDS).is_file():
        from conformer_src.scaling import open_shards

        images = open_shards(folder, transform)
        if classes is not None and tuple(images.classes) != tuple(classes):
            raise ValueError(
                f"the shards in {folder} have other classes, or in another order: "
                f"{_listed(images.classes)}; they must be {_listed(classes)}."
            )
        return images
    images = image_folder(folder, transform, recipe.corrupt)
    return images if classes is None else _relabelled(images, classes)


def _relabelled(images: ImageFolder, classes: Sequence[str]) -> ImageFolder:
    """Label images in the order of `classes`, which may be more than the sub-folders."""
    numbers = {name: number for number, name in enumerate(classes)}
    if unknown := [name for name in images.classes if name not in numbers]:
        raise ValueError(
            f"{images.root} has sub-folders that are no classes: {_listed(unknown)}; the classes "
            f"are {_listed(classes)}."
        )
    images.keep([(path, numbers[images.classes[label]]) for path, label in images.samples])
    images.classes, images.class_to_idx = list(classes), numbers
    return images


def _labels(images: Dataset) -> torch.Tensor:
    return torch.as_tensor(images.labels if hasattr(images, "labels") else images.targets)


def _warn_of_imbalance(images: ImageFolder) -> None:
    """Warn if one class has ten times the images of another: accuracy then says little."""
    counts = _labels(images).bincount()
    most, least = (images.classes[place] for place in (counts.argmax(), counts.argmin()))
    if counts.max() >= 10 * counts.min():
        share = 100 * counts.max().item() / len(images)
        warnings.warn(
            f"{images.root} has {counts.max()} images of {most} and {counts.min()} of {least}: "
            f"compare each accuracy with the {share:.0f} % of always answering {most}.",
            stacklevel=3,
        )


def _augmented(images: Dataset, recipe: Recipe) -> Dataset:
    """Return the same images with the transform of training."""
    varied = copy(images)
    varied.transform = image_transform(recipe, train=True)
    return varied


def _hold_out(images: Dataset, recipe: Recipe) -> tuple[Dataset, Dataset]:
    """Return the images to train on and those held out; all twice if none can be spared."""
    kept, held = split_by_class(_labels(images), recipe.validation, recipe.seed)
    if not held:
        why = "validation is 0" if not recipe.validation else "no class has two images"
        warnings.warn(
            f"no images are held out, because {why}: the validation is on the training images, so "
            "it says nothing about new ones.",
            stacklevel=3,
        )
        return _augmented(images, recipe), images
    return Subset(_augmented(images, recipe), kept), Subset(images, held)


def split_by_class(labels: torch.Tensor, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return which of n images are kept and which are held out: of each class the same share.

    At least one image of a class is held out and at least one is kept, if the class has two; a
    single image is kept.

    Args:
        labels: int64 (n,).
        share: from 0, which holds out nothing, to below 1.
        seed: decides which.
    """
    draw, held = torch.Generator().manual_seed(seed), []
    for label in labels.unique().tolist():
        places = (labels == label).nonzero().flatten()
        count = max(1, round(share * len(places))) if share else 0
        order = torch.randperm(len(places), generator=draw)
        held += places[order[: min(count, len(places) - 1)]].tolist()
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[held] = False
    return kept.nonzero().flatten().tolist(), sorted(held)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
