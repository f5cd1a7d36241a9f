"""Weights from elsewhere and back: names, places, files.

One network, three ways to name its tensors:

- `"ours"`: `blocks.1.down.ln.weight`
- `"official"`, the authors': `conv_trans_2.squeeze_block.ln.weight`
- `"mmpretrain"`, OpenMMLab's: `backbone.conv_trans_2.squeeze_block.ln.weight`
"""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from conformer_src.conformer import VARIANTS, Conformer, ConformerConfig, _misnamed, _own_classes
from conformer_src.conformer import create_model as _create_model
from conformer_src.files import (
    WeightsError,
    _words,
    digest,
    fetch,
    provenance,
    read_file,
    written_whole,
)
from conformer_src.inputs import InputConfig, misfit_of_input, own_input

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
    if any(name.startswith("backbone.") for name in names):
        return "mmpretrain"
    # Other names of ours are no proof: what the authors do not have keeps them in each naming.
    return "ours" if any(name.startswith("entry.stem.") for name in names) else "official"


def find_state_dict(content: Any, ema: bool = False) -> dict[str, Tensor]:
    """Return the state dict in what a file held, without the prefixes that wrappers add.

    The authors keep it under "model", its moving average under "model_ema"; OpenMMLab under
    "state_dict", which is the average if there is an "ema_state_dict". A bare one is taken as is.

    Raises:
        WeightsError: There is no state dict, or with `ema` no moving average.
    """
    found = content if isinstance(content, Mapping) else {}
    places = ("state_dict", "model")
    if ema:
        places = ("state_dict",) if "ema_state_dict" in found else ("model_ema",)
        if found.get(*places) is None:
            raise WeightsError("there is no moving average here; load the weights with ema=False.")
    state = next((found[place] for place in places if place in found), content)
    _require_state_dict(state)
    return _renamed(state, lambda name: re.sub(r"^((module|_orig_mod)\.)+", "", name))


def _require_state_dict(state: Any) -> None:
    """Raise a `WeightsError` unless this is a mapping of names to tensors with values."""
    named = isinstance(state, Mapping) and bool(state)
    if not named or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise WeightsError(
            "there is no state dict here, that is tensors by name; save one with "
            "torch.save(model.state_dict(), path) or with save_weights."
        )
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise WeightsError(
                f"{name} is sparse, quantized or without values; save it as an ordinary tensor."
            )


def _renamed(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Return a state dict under other names; raise a `WeightsError` if two become one."""
    found = {}
    for name, tensor in state.items():
        new = rename(name)
        if new in found:
            raise WeightsError(f"two tensors here are {new}, one is called {name}; keep the other.")
        found[new] = tensor
    return found


def to_own_names(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict under the names of the model, whoever named it.

    What the model does not have keeps the name that it came with.

    Raises:
        WeightsError: Two tensors would get one name.
    """
    rename = NAMINGS[find_naming(state)]
    own = {rename(name): name for name in (*model.state_dict(), *HEADS)}
    return _renamed(state, lambda name: own.get(name, name))


HEADS = ("conv_head.fc.weight", "conv_head.fc.bias", "trans_head.fc.weight", "trans_head.fc.bias")


def count_classes(state: Mapping[str, Tensor]) -> int | None:
    """Return the classes of the heads, under our names: 0 without heads, None if they disagree."""
    counts = {state[name].shape[:1] for name in HEADS if name in state} or {(0,)}
    return counts.pop()[0] if len(counts) == 1 and () not in counts else None


def fit_heads(state: dict[str, Tensor], model: nn.Module) -> tuple[int, int] | None:
    """Exchange heads for another number of classes for the model's own, in place.

    Returns both numbers, the weights' and the model's; None if nothing was exchanged, because they
    are equal, or because the heads of the weights disagree.
    """
    own = model.state_dict()
    theirs, ours = count_classes(state), count_classes(own)
    if theirs is None or theirs == ours:
        return None
    for name in HEADS:
        state.pop(name, None)
        if name in own:
            state[name] = own[name]
    return theirs, ours


def find_variant(state: Mapping[str, Tensor]) -> str | None:
    """Return the name of the variant that a state dict fits, whatever its classes; or None."""
    for name, config in VARIANTS.items():
        model = _empty(config)
        renamed = to_own_names(state, model)
        fit_heads(renamed, model)
        if _first_misfit(renamed, model) is None:
            return name
    return None


@lru_cache(maxsize=16)
def _empty(config: ConformerConfig) -> Conformer:
    """Return a model with shapes and without values, to compare with."""
    try:
        with torch.device("meta"):
            return Conformer(config)
    except (RuntimeError, OverflowError, TypeError) as error:  # too large for torch to count
        raise WeightsError(f"no model can be built from {config} ({_words(error)}).") from None


def _first_misfit(
    state: Mapping[str, Tensor], model: nn.Module, rename: Callable[[str], str] = str
) -> str | None:
    """Say which tensor does not fit first, in words; None if all do."""
    own = model.state_dict()
    if missing := [name for name in own if name not in state]:
        return f"{rename(missing[0])} is missing{_and_more(missing)}"
    for name, tensor in own.items():
        theirs = state[name]
        if theirs.shape != tensor.shape:
            shapes = f"{tuple(theirs.shape)}, but the model needs {tuple(tensor.shape)}"
            return f"{rename(name)} has shape {shapes}"
        if theirs.is_complex() or theirs.dtype == torch.bool:
            return f"{rename(name)} holds {theirs.dtype}, but the model needs {tensor.dtype}"
    if spare := [name for name in state if name not in own]:
        first = rename(spare[0]) if spare[0] in HEADS else spare[0]  # others kept their names
        return f"{first} has no place in the model{_and_more(spare)}"
    return None


def _and_more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _require_fit(state: dict[str, Tensor], model: nn.Module, theirs: Mapping[str, Tensor]) -> None:
    """Raise a `WeightsError` for what does not fit, or is not a number; else take their types.

    `state` has the model's names, and gets its types; `theirs` are the same weights as they came.
    """
    rename = NAMINGS[find_naming(theirs)]
    misfit = _first_misfit(state, model, rename)
    if misfit:
        variant = find_variant(theirs)
        advice = f"the weights fit {variant}" if variant else "the weights fit no variant"
        raise WeightsError(
            f"{misfit}; {advice}: build the model with the config that they were made for."
        )
    for name, own in model.state_dict().items():
        given = state[name]
        state[name] = given.to(own.dtype)
        # An infinite count would become some number.
        finite = given.dtype == own.dtype or given.double().isfinite().all()
        if not (finite and state[name].isfinite().all()):
            raise WeightsError(
                f"{rename(name)} holds values that are not finite in {own.dtype}; fetch the "
                "weights again, or go back to an earlier step of the training."
            )


def _contents(source: Mapping | str | Path) -> tuple[Any, dict[str, str]]:
    """Return what a dict, a path or an address holds, and the notes of a safetensors file."""
    if isinstance(source, Mapping):
        return source, {}
    return read_file(fetch(source) if re.match(r"https?://", str(source)) else source)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside a compiled or data-parallel one; refuse one without values."""
    while (inner := getattr(model, "_orig_mod", getattr(model, "module", None))) is not None:
        model = inner
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "the model is on the device meta and has no values; build it on another device."
        )
    return model


def load_weights(model: nn.Module, source: Mapping | str | Path, ema: bool = False) -> nn.Module:
    """Copy weights into a model, whoever saved and named them, and return the model.

    Heads for another number of classes are left out, with a warning; the model keeps its own.
    A model without an input, or without names for the same classes, takes those of the file.

    Args:
        model: a `Conformer`.
        source: a state dict, or the path or address of a file: the authors' (.pth, bare or from
            training), OpenMMLab's, or this package's (.safetensors). An address is fetched once.
        ema: take the moving average of the weights that a training run kept beside them.

    Raises:
        WeightsError: The file or the weights cannot be used; the model is as it was.
    """
    inner, (content, notes) = _unwrapped(model), _contents(source)
    theirs = find_state_dict(content, ema)
    state = to_own_names(theirs, inner)
    exchanged = fit_heads(state, inner)
    _require_fit(state, inner, theirs)
    _settle(inner, notes, exchanged)
    inner.load_state_dict(state)
    return model


def _settle(
    model: nn.Module, notes: Mapping[str, str], exchanged: tuple[int, int] | None = None
) -> None:
    """Give a model what it lacks of a header's notes; warn if it keeps its heads or names.

    An input of its own stays without a word: to train on at another size is usual.
    """
    theirs = _classes_from(notes, exchanged[0] if exchanged else model.config.num_classes)
    own, ready = _own_classes(model), _input_from(notes, model.config.in_chans)
    if own_input(model) is None:
        model.input = ready
    if exchanged:
        words = "the weights are for {} classes and the model for {}, so it keeps its own heads"
        warnings.warn(words.format(*exchanged), stacklevel=3)
    elif own is None:
        model.classes = theirs
    elif theirs not in (None, own):
        pairs = zip(theirs, own, strict=True)
        their, our = next(pair for pair in pairs if pair[0] != pair[1])
        words = f"the weights call {their!r} what the model calls {our!r}, and it keeps its names"
        warnings.warn(f"{words}; set its classes to None first to take theirs", stacklevel=3)


def _classes_from(notes: Mapping[str, str], count: int) -> tuple[str, ...] | None:
    """Return the names of so many classes in a header; None if there are none."""
    if "classes" not in notes:
        return None
    try:
        names = json.loads(notes["classes"])
    except (ValueError, RecursionError) as error:
        wrong = f"no JSON ({_words(error)})"
    else:
        wrong = _misnamed(names, count)
    if wrong:
        raise WeightsError(f'"classes" in the header holds {wrong}; save the weights again.')
    return tuple(names)


def _input_from(notes: Mapping[str, str], in_chans: int) -> InputConfig | None:
    """Return how a header says that images are made ready; None if it does not."""
    if "input" not in notes:
        return None
    try:
        found = json.loads(notes["input"])
        found = InputConfig(**found) if isinstance(found, dict) else found
        wrong = misfit_of_input(found, in_chans)
    except (TypeError, ValueError, RecursionError) as error:
        wrong = f"no InputConfig ({_words(error)})"
    if wrong:
        raise WeightsError(f'"input" in the header holds {wrong}; save the weights again.')
    return found


def export_weights(model: nn.Module, naming: str = "official") -> dict[str, Tensor]:
    """Return the state dict under the names "ours", "official" or "mmpretrain".

    The tensors are the model's own, not copies.
    """
    if naming not in NAMINGS:
        raise ValueError(f"naming must be one of {', '.join(NAMINGS)}, not {naming!r}.")
    return _renamed(_unwrapped(model).state_dict(), NAMINGS[naming])


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write a model's weights as safetensors; its header has config, classes, input and checksum.

    Raises:
        WeightsError: The file cannot be written, or could not be loaded again; nothing is left.
    """
    model = _unwrapped(model)
    state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    _require_savable(state, model.config)
    notes = {"config": json.dumps(asdict(model.config))} | _notes_of(model)
    notes |= {"sha256": digest(state, *notes.values()), "package": provenance()}
    with written_whole(path) as temporary:
        save_file(state, temporary, notes)


def _notes_of(model: nn.Module) -> dict[str, str]:
    """Return what a header says of classes and input; nothing of what the model does not know."""
    try:
        classes, ready = _own_classes(model), own_input(model)
    except ValueError as error:
        raise WeightsError(str(error)) from None
    notes = {} if classes is None else {"classes": json.dumps(classes)}
    return notes if ready is None else notes | {"input": json.dumps(asdict(ready))}


def _require_savable(state: Mapping[str, Tensor], config: ConformerConfig) -> None:
    """Raise a `WeightsError` for weights that `load_model` would refuse."""
    if misfit := _first_misfit(state, _empty(config)):
        raise WeightsError(f"{misfit}, by the model's config; save it before you change its parts.")
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise WeightsError(f"{name} holds values that are not finite; nothing was written.")


def find_config(state: Mapping[str, Tensor], notes: Mapping[str, str]) -> ConformerConfig:
    """Return the config that weights were made for: from the header, or by their shapes.

    Raises:
        WeightsError: There is no header, and the shapes are those of no variant.
    """
    if "config" in notes:
        return _config_from(notes["config"], len(state))
    variant = find_variant(state)
    if variant is None:
        raise WeightsError("the weights fit no variant; build their model, then use load_weights.")
    config = VARIANTS[variant]
    return replace(config, num_classes=count_classes(to_own_names(state, _empty(config))))


def _config_from(text: str, tensors: int) -> ConformerConfig:
    """Read a config, and refuse one of more blocks than there are tensors before it is built."""
    try:
        config = ConformerConfig(**json.loads(text))
    except (TypeError, ValueError, RecursionError) as error:
        raise WeightsError(f"this is no config of a Conformer ({error}): {text[:80]}") from None
    if config.depth * (1 + config.num_med_block) > tensors:
        raise WeightsError(f"the config has more blocks than the weights: {text[:80]}")
    return config


def load_model(path: str | Path, ema: bool = False) -> Conformer:
    """Build the model that a file of weights belongs to, with these weights.

    Args:
        path: of a file, or its address. Without this package's header, the shapes tell the variant.
        ema: take the moving average of the weights that a training run kept beside them.

    Raises:
        WeightsError: The file cannot be used, or its model is not known.
    """
    content, notes = _contents(path)
    theirs = find_state_dict(content, ema)
    model = deepcopy(_empty(find_config(theirs, notes)))  # so the weights are in memory only once
    state = to_own_names(theirs, model)
    _require_fit(state, model, theirs)
    _settle(model, notes)
    model.load_state_dict(_unshared(state), assign=True)
    return model


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of which each has its memory to itself; copies only what has not."""
    found, used = {}, set()
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        alone = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in used
        used.add(storage.data_ptr())
        tensor = tensor.detach() if alone else tensor.detach().clone()
        found[name] = tensor.contiguous()
    return found


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
