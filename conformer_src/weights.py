"""Weights from elsewhere and back: names, files, and predictions.

One network, three ways to name its tensors:

- `"ours"`: `blocks.1.down.ln.weight`
- `"official"`, the authors': `conv_trans_2.squeeze_block.ln.weight`
- `"mmpretrain"`, OpenMMLab's: `backbone.conv_trans_2.squeeze_block.ln.weight`
"""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights

import conformer_src
from conformer_src.conformer import VARIANTS, Conformer, ConformerConfig, DualLogits
from conformer_src.conformer import create_model as _create_model
from conformer_src.coupled_block import Features
from conformer_src.data import _load_rgb, _to_rgb, photo_transform
from conformer_src.files import WeightsError, digest, fetch, read_file, written_whole

OFFICIAL_STARTS = {
    "entry.stem.": "",
    "entry.token_embed.cls_token": "cls_token",
    "entry.token_embed.proj.": "trans_patch_conv.",
    "blocks.0.conv_block.": "conv_1.",
    "blocks.0.trans_block.": "trans_1.",
    "trans_head.norm.": "trans_norm.",
    "trans_head.fc.": "trans_cls_head.",
    "conv_head.fc.": "conv_cls_head.",
}
OFFICIAL_PARTS = {"conv_block": "cnn_block", "down": "squeeze_block", "up": "expand_block"}


def official_name(name: str) -> str:
    """Return the name that the authors' checkpoints give to a tensor of a `Conformer`."""
    for ours, theirs in OFFICIAL_STARTS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    if match := re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(.+)", name):
        number, part, rest = match.groups()
        return f"conv_trans_{int(number) + 1}.{OFFICIAL_PARTS.get(part, part)}.{rest}"
    return name  # what the authors' network does not have keeps its name


def mmpretrain_name(name: str) -> str:
    """Return the name that OpenMMLab's checkpoints give to a tensor of a `Conformer`."""
    name = official_name(name)
    name = re.sub(r"(trans_\w+(?:\.trans_block)?)\.norm([12])\.", r"\1.ln\2.", name)
    name = name.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")
    return ("head." if "_cls_head." in name else "backbone.") + name


NAMINGS = {"ours": str, "official": official_name, "mmpretrain": mmpretrain_name}


def find_naming(names: Iterable[str]) -> str:
    """Return who named the tensors of a state dict: "ours", "official" or "mmpretrain"."""
    names = list(names)
    if any(name.startswith(("backbone.", "head.")) for name in names):
        return "mmpretrain"
    return "ours" if any(name.startswith(("entry.", "blocks.")) for name in names) else "official"


def find_state_dict(content: Any, ema: bool = False) -> dict[str, Tensor]:
    """Return the state dict in what a file held, without the prefix of data-parallel training.

    The authors keep it under "model" (its moving average under "model_ema"), OpenMMLab under
    "state_dict" ("ema_state_dict"); a bare one is taken as it is.

    Raises:
        WeightsError: There is no state dict, or with `ema` no moving average.
    """
    keys = ("model_ema", "ema_state_dict") if ema else ("state_dict", "model")
    found = [content[key] for key in keys if isinstance(content, Mapping) and key in content]
    if ema and not found:
        raise WeightsError("there is no moving average in the file; load it with ema=False.")
    state = found[0] if found else content
    _require_state_dict(state)
    return {re.sub(r"^(module\.)+", "", name): tensor for name, tensor in state.items()}


def _require_state_dict(state: Any) -> None:
    """Raise a `WeightsError` unless this is a mapping of names to tensors."""
    named = isinstance(state, Mapping) and bool(state)
    if not named or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise WeightsError(
            "there is no state dict here, that is tensors by name; save one with "
            "torch.save(model.state_dict(), path) or with save_weights."
        )


def to_own_names(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict under the names of the model, whoever named it.

    What the model does not have keeps the name that it came with.
    """
    rename = NAMINGS[find_naming(state)]
    own = {rename(name): name for name in model.state_dict()}
    return {own.get(name, name): tensor for name, tensor in state.items()}


HEADS = tuple(
    f"{head}.fc.{kind}" for head in ("conv_head", "trans_head") for kind in ("weight", "bias")
)


def fit_heads(state: dict[str, Tensor], model: nn.Module) -> list[str]:
    """Put the model's own heads in the place of heads for another number of classes.

    The state dict is changed in place. Returns the names of the tensors that were replaced.
    """
    own, replaced = model.state_dict(), []
    for name in HEADS:
        if name not in own:
            if state.pop(name, None) is not None:
                replaced.append(name)
        elif name in state and len(state[name]) != len(own[name]):
            state[name] = own[name]
            replaced.append(name)
    return replaced


def find_variant(state: Mapping[str, Tensor]) -> str | None:
    """Return the name of the variant that a state dict fits, whatever its classes; or None."""
    for name, config in VARIANTS.items():
        with torch.device("meta"):
            model = Conformer(config)
        renamed = to_own_names(state, model)
        fit_heads(renamed, model)
        if _first_misfit(renamed, model) is None:
            return name
    return None


def _first_misfit(state: Mapping[str, Tensor], model: nn.Module) -> str | None:
    """Say which tensor does not fit first, in words; None if all do."""
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in state:
            return f"{name} is missing"
        if state[name].shape != tensor.shape:
            shapes = f"{tuple(state[name].shape)}, the model {tuple(tensor.shape)}"
            return f"{name} has shape {shapes}"
        if state[name].is_floating_point() != tensor.is_floating_point():
            return f"{name} holds {state[name].dtype}, the model {tensor.dtype}"
    spare = next((name for name in state if name not in own), None)
    return None if spare is None else f"{spare} has no place in the model"


def _require_fit(state: Mapping[str, Tensor], model: nn.Module, theirs: Mapping) -> None:
    """Raise a `WeightsError` for what does not fit, or is not a number."""
    misfit = _first_misfit(state, model)
    if misfit:
        variant = find_variant(theirs)
        advice = f"the weights fit {variant}" if variant else "they fit no variant of this package"
        raise WeightsError(f"the weights are not this model's: {misfit}; {advice}.")
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise WeightsError(f"{name} holds values that are not finite; fetch the weights again.")


def _contents(source: Mapping | str | Path) -> Any:
    """Return what a dict, a path or an address holds."""
    if isinstance(source, Mapping):
        return source
    if isinstance(source, str) and re.match(r"https?://", source):
        source = fetch(source)
    return read_file(Path(source))[0]


def load_weights(model: nn.Module, source: Mapping | str | Path, ema: bool = False) -> nn.Module:
    """Copy weights into a model, whoever saved and named them, and return the model.

    Heads for another number of classes are left out, with a warning; the model keeps its own.

    Args:
        model: a `Conformer`.
        source: a state dict, or the path or address of a file: the authors' (.pth, bare or from
            training), OpenMMLab's, or this package's (.safetensors). An address is fetched once.
        ema: take the moving average of the weights that a training run kept beside them.

    Raises:
        WeightsError: The file or the weights cannot be used; the model is as it was.
    """
    theirs = find_state_dict(_contents(source), ema)
    state = to_own_names(theirs, model)
    replaced = fit_heads(state, model)
    _require_fit(state, model, theirs)
    model.load_state_dict(state)
    if replaced:
        warnings.warn(f"not loaded, other classes: {', '.join(replaced)}", stacklevel=2)
    return model


def export_weights(model: nn.Module, naming: str = "official") -> dict[str, Tensor]:
    """Return the state dict under the names "ours", "official" or "mmpretrain"."""
    if naming not in NAMINGS:
        raise ValueError(f"naming must be one of {', '.join(NAMINGS)}, not {naming!r}.")
    return {NAMINGS[naming](name): tensor for name, tensor in model.state_dict().items()}


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write a model's weights as safetensors, with its config and a checksum in the header.

    Raises:
        WeightsError: The file cannot be written; nothing is left behind.
    """
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    notes = {
        "config": json.dumps(asdict(model.config)),
        "package": f"conformer_src {conformer_src.__version__}, torch {torch.__version__}",
        "sha256": digest(state),
    }
    with written_whole(Path(path)) as temporary:
        save_file(state, temporary, notes)


def find_config(state: Mapping[str, Tensor], notes: Mapping[str, str]) -> ConformerConfig:
    """Return the config that weights were made for: from the header, or by their shapes.

    Raises:
        WeightsError: There is no header, and the shapes are those of no variant.
    """
    if "config" in notes:
        return ConformerConfig(**json.loads(notes["config"]))
    variant = find_variant(state)
    if variant is None:
        raise WeightsError("the weights fit no variant; build their model, then use load_weights.")
    heads = [tensor for name, tensor in state.items() if name.endswith("conv_cls_head.bias")]
    return replace(VARIANTS[variant], num_classes=sum(len(bias) for bias in heads))


def load_model(path: str | Path, ema: bool = False) -> Conformer:
    """Build the model that a file of weights belongs to, with these weights.

    Raises:
        WeightsError: The file cannot be used, or its model is not known.
    """
    content, notes = read_file(Path(path))
    state = find_state_dict(content, ema)
    return load_weights(Conformer(find_config(state, notes)), state)


_OPENMMLAB = "https://download.openmmlab.com/mmclassification/v0/conformer/conformer-"
PRETRAINED = {
    "conformer_tiny_patch16": "tiny-p16_3rdparty_8xb128_in1k_20211206-f6860372.pth",
    "conformer_small_patch16": "small-p16_3rdparty_8xb128_in1k_20211206-3065dcf5.pth",
    "conformer_small_patch32": "small-p32_8xb128_in1k_20211206-947a0816.pth",
    "conformer_base_patch16": "base-p16_3rdparty_8xb128_in1k_20211206-bfdf8637.pth",
}


def create_model(name: str, pretrained: bool = False, **changes: object) -> Conformer:
    """Build a variant, with fresh weights or with those that OpenMMLab publishes.

    Raises:
        ValueError: There is no such variant or field, or a value cannot work.
        WeightsError: There are no published weights, or they cannot be fetched or do not fit.
    """
    model = _create_model(name, **changes)
    if not pretrained:
        return model
    if name not in PRETRAINED:
        raise WeightsError(f"nobody published weights of {name}; choose {', '.join(PRETRAINED)}.")
    return load_weights(model, _OPENMMLAB + PRETRAINED[name])


class Prediction(NamedTuple):
    """What a model says about one image, with probabilities from 0 to 1."""

    image: str  # the path, or the place in what was given
    labels: tuple[str, ...]  # the classes that the sum of both heads ranks first
    probabilities: tuple[float, ...]  # of these, by the softmax of the sum
    conv: tuple[str, float]  # the first choice of the CNN's head alone
    trans: tuple[str, float]  # the first choice of the transformer's head alone


_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")


def open_images(images: Any) -> Iterator[tuple[str, Image.Image | Tensor]]:
    """Yield (name, upright image) for a path, folder, PIL image, array, tensor, or list of these.

    Arrays are (H, W) or (H, W, C) with 0 to 255; tensors (C, H, W) or (B, C, H, W), uint8 with 0 to
    255 or floats from 0 to 1.

    Raises:
        ValueError: An image cannot be read; the message names it.
    """
    if isinstance(images, str | Path) and Path(images).is_dir():
        found = sorted(p for p in Path(images).rglob("*") if p.suffix.lower() in _ENDINGS)
        _require_any(found, images)
        images = found
    if isinstance(images, list | tuple) or (isinstance(images, Tensor) and images.ndim == 4):
        for place, image in enumerate(images):
            for name, opened in open_images(image):
                yield (name or f"image {place}"), opened
    elif isinstance(images, str | Path):
        yield str(images), _load_rgb(str(images))
    else:
        yield "", _to_image(images)


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


def rank(logits: DualLogits, names: Sequence[str], topk: int) -> list[tuple]:
    """Return, for each image, the fields of its `Prediction` after the name."""
    values, order = logits.sum().softmax(1).topk(min(topk, len(names)))
    heads = [None if own is None else own.softmax(1).max(1) for own in logits]
    ranked = []
    for row in range(len(order)):
        labels = tuple(names[place] for place in order[row])
        own = [h and (names[h.indices[row]], float(h.values[row])) for h in heads]
        ranked.append((labels, tuple(values[row].tolist()), *own))
    return ranked


def batches(images: Any, transform: Callable, size: int) -> Iterator[tuple[list[str], Tensor]]:
    """Yield the names and the transformed tensors (B, C, H, W) of images, `size` at a time."""
    stream = open_images(images)
    while chunk := list(islice(stream, size)):
        names, opened = zip(*chunk, strict=True)
        yield list(names), torch.stack([transform(image) for image in opened])


@torch.no_grad()
def predict(
    model: Conformer,
    images: Any,
    topk: int = 5,
    classes: Sequence[str] | None = None,
    transform: Callable | None = None,
    batch_size: int = 32,
) -> list[Prediction]:
    """Name what is in images by the sum of both heads (Conformer paper, section 3.1).

    Args:
        model: its training mode is restored afterwards.
        images: whatever `open_images` takes.
        topk: how many classes to return for each image.
        classes: their names; see `class_names`.
        transform: image -> tensor (C, H, W); by default the recipe's evaluation at 224 pixels.
        batch_size: images at a time.
    """
    names, found = class_names(model.config.num_classes, classes), []
    with _evaluating(model) as device:
        for places, batch in batches(images, transform or photo_transform(train=False), batch_size):
            rows = rank(model(batch.to(device)), names, topk)
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

    Args:
        model: its training mode is restored afterwards.
        images: whatever `open_images` takes.
        block: 1 to depth; by default the last.
        transform: image -> tensor (C, H, W); by default the recipe's evaluation at 224 pixels.
        batch_size: images at a time.
    """
    place = _block_index(model, block)
    with _evaluating(model) as device:
        chunks = batches(images, transform or photo_transform(train=False), batch_size)
        found = [model.forward_blocks(batch.to(device))[place] for _, batch in chunks]
    return Features(*(torch.cat(parts).cpu() for parts in zip(*found, strict=True)))


def _block_index(model: Conformer, block: int | None) -> int:
    depth = len(model.blocks)
    if block is None:
        return depth - 1
    if not 1 <= block <= depth:
        raise ValueError(f"the model has blocks 1 to {depth}, not {block}.")
    return block - 1


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Put a model into eval mode for a while; gives its device."""
    training = model.training
    try:
        yield next(model.eval().parameters()).device
    finally:
        model.train(training)


def _require_any(found: list, folder: Any) -> None:
    if not found:
        raise ValueError(f"there are no images in {folder}; expected {', '.join(_ENDINGS)}.")


def _to_image(image: Any) -> Image.Image | Tensor:
    """Return an array, tensor or PIL image as what a transform takes."""
    if isinstance(image, Image.Image):
        return _to_rgb(image)
    if isinstance(image, np.ndarray) and image.ndim in (2, 3):
        image = torch.from_numpy(np.atleast_3d(image)).permute(2, 0, 1)
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] not in (1, 3, 4):
        what = getattr(image, "shape", type(image).__name__)
        raise ValueError(
            f"{what} is no image; give a path, a PIL image, an array (H, W) or (H, W, C), or a "
            "tensor (C, H, W) of 1, 3 or 4 channels."
        )
    return image[:3]
