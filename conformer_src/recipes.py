"""Recipes: everything that decides how a training run goes, in one small checked file.

A recipe is a TOML file with a line for each field that differs from the default::

    recipe = load_recipe("fashion", epochs=20)
    write_recipe(recipe, "mine.toml")
"""

import math
import operator
import tomllib
from dataclasses import Field, asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import tomli_w

from conformer_src.conformer import (
    STEM_STRIDES,
    VARIANTS,
    ConformerConfig,
    _require,
    _require_fields,
    _require_variant,
    size_fits,
)
from conformer_src.files import _words, written_whole
from conformer_src.weights import PRETRAINED

_KINDS = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "a table",
}
_BOUNDS = {
    "above": (operator.gt, "above"),
    "at_least": (operator.ge, "of at least"),
    "below": (operator.lt, "below"),
    "at_most": (operator.le, "at most"),
}


def _about(default: Any, group: str, about: str, **rules: Any) -> Any:
    """Return a field: its place and explanation on the command line, and what values must obey.

    The rules are `choices` or any of `_BOUNDS`.
    """
    return field(default=default, metadata={"group": group, "about": about, **rules})


def _is_kind(value: object, kind: type) -> bool:
    if kind is float:  # a whole number is one as well, but neither nan nor inf
        return _is_kind(value, int) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _check_value(option: Field, value: object) -> None:
    """Raise a `ValueError` unless a value has its field's type and keeps its rules."""
    rules = option.metadata
    if "choices" in rules:
        fits, words = value in rules["choices"], f"one of {', '.join(rules['choices'])}"
    else:
        bounds = [(*_BOUNDS[name], rules[name]) for name in _BOUNDS if name in rules]
        limits = " and ".join(f"{says} {limit}" for _, says, limit in bounds)
        fits = _is_kind(value, option.type) and all(holds(value, lim) for holds, _, lim in bounds)
        words = f"{_KINDS[option.type]} {limits}".strip()
    _require(fits, f"{option.name} must be {words}, not {value!r}.")


class _Checked:
    """Base of the recipe: refuses values that cannot work as soon as they are given."""

    def __post_init__(self) -> None:
        for option in fields(self):
            _check_value(option, getattr(self, option.name))
        self._check_model()
        self._check_together()

    def _check_model(self) -> None:
        _require_variant(self.model)
        for name in ("num_classes", "in_chans"):
            rule = f"model_options must not name {name}, which comes from the data."
            _require(name not in self.model_options, rule)
        _require_fields(self.model_options)
        config = replace(VARIANTS[self.model], in_chans=self.in_chans, **self.model_options)
        patch, stride = config.patch_size, STEM_STRIDES[config.stem]
        _require(
            config.pad or size_fits(self.image_size, patch, stride),
            f"image_size must suit {self.model}, not be {self.image_size}; choose a multiple of "
            f"{patch}, or pad = true in model_options.",
        )
        self._check_heads(config)
        if self.weights == "published":
            published = ", ".join(PRETRAINED)
            rule = f"weights are published for {published} only, not for {self.model}."
            _require(self.model in PRETRAINED, rule)
            rule = f"in_chans must be 3 with published weights, not {self.in_chans}."
            _require(self.in_chans == 3, rule)

    def _check_heads(self, config: ConformerConfig) -> None:
        heads = ("conv", "trans") if config.branches == "both" else (config.branches,)
        names = [f"{head}_weight" for head in heads]
        _require(
            any(getattr(self, name) for name in names),
            f"{' or '.join(names)} must be above 0, because otherwise no head is taught.",
        )

    def _check_together(self) -> None:
        _require(
            self.batch_size % self.accumulate == 0,
            f"batch_size must be a multiple of accumulate, but {self.batch_size} is no multiple of "
            f"{self.accumulate}.",
        )
        _require(
            self.warmup_epochs < self.epochs,
            f"warmup_epochs must be below epochs, which is {self.epochs}, not "
            f"{self.warmup_epochs!r}.",
        )
        for name in ("warmup_lr", "min_lr"):
            value = getattr(self, name)
            rule = f"{name} must be at most lr, which is {self.lr!r}, not {value!r}."
            _require(value <= self.lr, rule)


@dataclass(frozen=True)
class Recipe(_Checked):
    """The fields of a recipe; `conformer train --help` explains each.

    Raises:
        ValueError: A value has another type, is out of range, or contradicts another field.
    """

    model: str = _about("conformer_micro", "model", "a name of `conformer list`")
    model_options: dict = field(
        default_factory=dict,
        metadata={"group": "model", "about": "fields of the model's config to replace"},
    )
    weights: str = _about("", "model", "start from a file, an address, or `published`")
    freeze: str = _about(
        "none", "model", "what is not trained", choices=("none", "conv", "trans", "backbone")
    )
    freeze_norm: bool = _about(False, "model", "keep the statistics of all BatchNorms")

    data: str = _about("fashion-subset", "data", "fashion-subset, fashion, or a folder")
    in_chans: int = _about(1, "data", "channels of an image: 1 grey, 3 RGB", at_least=1)
    image_size: int = _about(32, "data", "side of the square images, in pixels", at_least=1)
    validation: float = _about(
        0.1, "data", "share of the training images held out", at_least=0, below=1
    )
    corrupt: str = _about("refuse", "data", "unreadable images", choices=("refuse", "skip"))

    crop_scale: float = _about(
        1.0, "augmentation", "least share of the area in a random crop; 1: none", above=0, at_most=1
    )
    flip: bool = _about(True, "augmentation", "mirror half of the images")
    rand_augment: int = _about(
        0, "augmentation", "magnitude of RandAugment; 0: none", at_least=0, at_most=30
    )
    color_jitter: float = _about(0.0, "augmentation", "strength of colour jitter", at_least=0)
    erasing: float = _about(
        0.0, "augmentation", "probability of erasing a rectangle", at_least=0, at_most=1
    )
    mixup: float = _about(0.0, "augmentation", "alpha of mixup; 0: none", at_least=0)
    cutmix: float = _about(0.0, "augmentation", "alpha of CutMix; 0: none", at_least=0)
    repeats: int = _about(
        1, "augmentation", "draws of an image in a batch (repeated augmentation)", at_least=1
    )

    reduction: str = _about(
        "mean", "loss", "how the losses of both heads become one", choices=("mean", "sum")
    )
    conv_weight: float = _about(1.0, "loss", "weight of the CNN head's loss", at_least=0)
    trans_weight: float = _about(1.0, "loss", "weight of the transformer head's loss", at_least=0)
    label_smoothing: float = _about(
        0.1, "loss", "share of the label given to all classes", at_least=0, below=1
    )

    epochs: int = _about(5, "optimizer", "passes over the training images", at_least=1)
    batch_size: int = _about(
        64, "optimizer", "images of a step, in all processes together", at_least=1
    )
    lr: float = _about(1e-3, "optimizer", "highest learning rate", above=0)
    warmup_epochs: float = _about(0.5, "optimizer", "epochs in which the rate rises", at_least=0)
    warmup_lr: float = _about(1e-6, "optimizer", "learning rate of the first step", at_least=0)
    min_lr: float = _about(1e-5, "optimizer", "learning rate of the last step", at_least=0)
    weight_decay: float = _about(
        0.05, "optimizer", "of AdamW; not for biases and scales", at_least=0
    )
    clip_grad: float = _about(0.0, "optimizer", "largest norm of the gradient; 0: any", at_least=0)
    ema: float = _about(
        0.0, "optimizer", "decay of the moving average of the weights; 0: none", at_least=0, below=1
    )

    precision: str = _about("fp32", "machine", "number format", choices=("fp32", "bf16", "fp16"))
    accumulate: int = _about(
        1, "machine", "parts of a batch that are computed one by one", at_least=1
    )
    workers: int = _about(
        1, "machine", "processes that read images, for each that trains", at_least=0
    )
    channels_last: bool = _about(True, "machine", "store maps with the channels last")
    compile: bool = _about(False, "machine", "compile the model; the first step takes minutes")
    checkpointing: bool = _about(False, "machine", "compute features twice to save memory")
    sync_norm: bool = _about(False, "machine", "BatchNorm over all processes")
    fsdp: bool = _about(False, "machine", "share parameters out among processes (FSDP)")

    seed: int = _about(0, "run", "decides all random numbers", at_least=0, below=2**31)
    save_steps: int = _about(
        0, "run", "steps between checkpoints; 0: after each epoch only", at_least=0
    )
    keep: int = _about(2, "run", "checkpoints that are kept", at_least=1)
    tensorboard: bool = _about(False, "run", "write a log for TensorBoard as well")


_SHIPPED = files("conformer_src") / "assets" / "recipes"


def list_recipes() -> list[str]:
    """Return the names of the recipes that come with the package, sorted."""
    names = (Path(entry.name) for entry in _SHIPPED.iterdir())
    return sorted(name.stem for name in names if name.suffix == ".toml")


def load_recipe(source: str | Path, **changes: object) -> Recipe:
    """Read a recipe by its name or from a .toml file; changes replace fields by name.

    Raises:
        FileNotFoundError: There is no such recipe or file.
        ValueError: It is no TOML, it or the changes name a field that does not exist, or a value
            cannot work.
    """
    shipped = str(source) in list_recipes()
    content = _read_toml(_SHIPPED / f"{source}.toml" if shipped else Path(source))
    try:
        _require_known(content)
        recipe = Recipe(**content)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    _require_known(changes)
    return replace(recipe, **changes)


def _read_toml(path: Any) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        names = list_recipes()
        close = ", ".join(get_close_matches(path.stem, names, 1) or names)
        raise FileNotFoundError(
            f"there is no recipe {path}; choose {close}, or give the path of a .toml file."
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({_words(error)}); give a .toml file.") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8; save it as such.") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(
            f"{path} is no TOML: {_words(error)}; a line looks like `lr = 0.001`."
        ) from None


def _require_known(names: Any) -> None:
    """Raise a `ValueError` for a name that is no field of a recipe."""
    known = [option.name for option in fields(Recipe)]
    for name in names:
        if name not in known:
            close = get_close_matches(name.replace("-", "_"), known, 1)
            way = f"choose {close[0]}" if close else "`conformer train --help` lists all"
            raise ValueError(f"a recipe has no field {name!r}; {way}.")


def write_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write all fields of a recipe to a TOML file that `load_recipe` reads back the same.

    Raises:
        WeightsError: The file cannot be written.
    """
    values = asdict(recipe)
    table = {"model_options": values.pop("model_options")}  # what follows a table belongs to it
    flat = [option for option in fields(Recipe) if option.name in values]
    parts = [
        f"# {group}\n" + tomli_w.dumps({option.name: values[option.name] for option in options})
        for group, options in groupby(flat, lambda option: option.metadata["group"])
    ]
    with written_whole(path) as temporary:
        temporary.write_text("\n".join([*parts, tomli_w.dumps(table)]), encoding="utf-8")
