"""What each part is worth: variants of one training, repeated over seeds, compared in pairs.

A study says what its runs share and what each variant changes. A run is stored as soon as it ends,
under a key made of all that decides it, so a study that was stopped goes on where it was::

    rows = run_all(fashion_study(), seeds=range(5), folder="runs")
    for comparison in compare(rows, "fashion", "sum"):
        print(comparison)

The letters are those of the book: B batch, C, H and W an image.
"""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from conformer_src.data import FashionSubset, LocalGlobal, fashion_transform, local_global
from conformer_src.files import WeightsError, _words, written_whole
from conformer_src.predict import _evaluating
from conformer_src.recipes import Recipe, load_recipe
from conformer_src.training import (
    Scores,
    build_trainer,
    evaluate,
    fit,
    share_batches,
    steps_per_epoch,
)
from conformer_src.weights import create_model, save_weights

HEADS = ("conv", "trans", "sum")


class TensorImages(Dataset):
    """Images in memory, (n, C, H, W), ready for the network; training mirrors half of them."""

    def __init__(self, images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
        self.images, self.labels, self.classes = images, labels, tuple(classes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def load_batches(self, recipe: Recipe, start: int, accelerator: Accelerator) -> Iterator:
        """Yield the batches from step `start` on, cut out of memory: no worker, no transform."""
        parts = share_batches(len(self), recipe, start, accelerator)
        for keys in zip(*[parts] * recipe.accumulate, strict=True):
            yield [self._batch(*torch.tensor(part).unbind(1), recipe.flip) for part in keys]

    def _batch(self, index: Tensor, seeds: Tensor, flip: bool) -> tuple:
        images, mirrored = self.images[index], seeds % 2 == 1
        if flip:
            images[mirrored] = images[mirrored].flip(-1)
        return images, self.labels[index], [f"image {number}" for number in index.tolist()]


DRAWN_LABELS = ("corners", "additive", "coupled")


def drawn_labels(drawn: LocalGlobal, name: str) -> Tensor:
    """Return the labels (n,) of drawn images: of their corners alone, additive or coupled.

    The corners have the numbers 0, 2, 4, 6, as in the additive label of images whose bars differ.
    """
    if name == "corners":
        return 2 * drawn.rotation
    return drawn.additive_label() if name == "additive" else drawn.coupled_label()


class DrawnImages(Dataset):
    """Images of `local_global`, drawn when they are needed: no batch comes a second time."""

    classes = tuple(str(number) for number in range(8))

    def __init__(self, label: str, count: int) -> None:
        self.label, self.count = label, count

    def __len__(self) -> int:
        return self.count

    def load_batches(self, recipe: Recipe, start: int, accelerator: Accelerator) -> Iterator:
        """Yield batches from step `start` on; the first sample's seed decides about all of one."""
        parts = share_batches(len(self), recipe, start, accelerator)
        for keys in zip(*[parts] * recipe.accumulate, strict=True):
            drawn = [local_global(len(part), seed=part[0][1]) for part in keys]
            yield [(d.images, drawn_labels(d, self.label), ["a drawn image"]) for d in drawn]


DATASETS = ("fashion", *DRAWN_LABELS)
TEST_SEED = 10**6  # of the drawn images that score; training has other ones, of 31 bits by chance


def open_images(name: str, test: int = 2000) -> tuple[Dataset, TensorImages]:
    """Return training and test images: the shipped ones, or drawn ones with one of their labels.

    An epoch of drawn images has 6,400. `test` is how many images score; the shipped are 2,000.

    Raises:
        ValueError: `name` is none of `DATASETS`.
    """
    if name not in DATASETS:
        raise ValueError(f"there is no data set {name!r}; choose one of {', '.join(DATASETS)}.")
    if name == "fashion":
        ready = fashion_transform(train=False)
        sets = [FashionSubset(train=train) for train in (True, False)]
        return tuple(TensorImages(ready(s.images), s.labels, s.classes) for s in sets)
    drawn = local_global(test, seed=TEST_SEED)
    scored = TensorImages(drawn.images, drawn_labels(drawn, name), DrawnImages.classes)
    return DrawnImages(name, 6400), scored


def _require_variant(variant: str, variants: dict[str, dict]) -> None:
    if variant not in variants:
        names = ", ".join(variants)
        raise ValueError(f"the study has no variant {variant!r}; choose one of {names}.")


@dataclass(frozen=True)
class Study:
    """Trainings that differ in one thing each."""

    recipe: Recipe  # what all have in common
    phases: dict[str, int]  # data sets and epochs; a network learns one after the other
    variants: dict[str, dict]  # name -> fields of the recipe that change; the first is the base

    def plan(self, variant: str, seed: int) -> Recipe:
        """Return the recipe of a run; options of the model are added to those in common."""
        _require_variant(variant, self.variants)
        changes = dict(self.variants[variant])
        options = self.recipe.model_options | changes.pop("model_options", {})
        return replace(self.recipe, model_options=options, seed=seed, **changes)

    def key(self, variant: str, seed: int) -> str:
        """Return a name for a run, the same for the same training, whatever the variant is called.

        Fields at their default stay out, so that a recipe's new field makes no stored run stale.
        """
        plan, plain = asdict(self.plan(variant, seed)), asdict(Recipe())
        changed = {name: value for name, value in plan.items() if value != plain[name]}
        text = json.dumps([list(self.phases.items()), changed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def fashion_study(epochs: int = 3) -> Study:
    """Return the switches of the model and of its training, on the shipped images."""
    model = {
        "base": {},
        **{f"down: {how}": {"fcu_down": how} for how in ("max", "conv", "nearest", "bilinear")},
        "down: bicubic": {"fcu_down": "bicubic"},
        "up: bilinear": {"fcu_up": "bilinear"},
        "only CNN to transformer": {"coupling": "down"},
        "only transformer to CNN": {"coupling": "up"},
        "no coupling": {"coupling": "none"},
        "positions": {"pos_embed": 4},
        "1 med block": {"num_med_block": 1},
        "2 med blocks": {"num_med_block": 2},
        "wider CNN": {"channel_ratio": 0.625},  # about as many parameters as with 2 med blocks
        "CNN alone": {"branches": "conv", "channel_ratio": 1.0},
        "ViT alone": {"branches": "trans", "depth": 9, "pos_embed": 4},
    }
    variants = {name: {"model_options": options} for name, options in model.items()}
    variants |= {"only CNN's loss": {"trans_weight": 0.0}}
    variants |= {"only transformer's loss": {"conv_weight": 0.0}}
    return Study(load_recipe("fashion", workers=0, validation=0.0), {"fashion": epochs}, variants)


def drawn_study(epochs: int = 2) -> Study:
    """Return the switches of the coupling, on drawn images: corners, then both cues, then coupled.

    With three blocks the CNN sees less than the distance between the two bars. The corners come
    first: in trials, a coupled network that saw both cues at once learned the bars alone.
    """
    model = {
        "base": {},
        "no coupling": {"coupling": "none"},
        "CNN alone": {"branches": "conv", "channel_ratio": 0.9375},
        "ViT alone": {"branches": "trans", "embed_dim": 76, "pos_embed": 8},
        "only CNN to transformer": {"coupling": "down"},
        "only transformer to CNN": {"coupling": "up"},
    }
    shared = {"model_options": {"depth": 3}, "image_size": 64, "flip": False, "batch_size": 32}
    recipe = load_recipe("fashion", **shared, workers=0, validation=0.0, label_smoothing=0.0)
    variants = {name: {"model_options": options} for name, options in model.items()}
    return Study(recipe, dict.fromkeys(DRAWN_LABELS, epochs), variants)


@torch.no_grad()
def cue_accuracy(model: nn.Module, count: int = 2000) -> dict[str, list[float]]:
    """Return for each head the percentages right about rotation and about agreement.

    The answers of a network that learnt the additive label are taken apart: a class names both
    cues. By chance 25 and 50 per cent are right.
    """
    drawn = local_global(count, seed=TEST_SEED)
    with _evaluating(model) as like:
        logits = [model(part.to(like.device)) for part in drawn.images.split(256)]
    found = {}
    for head in HEADS:
        parts = [part.sum() if head == "sum" else getattr(part, head) for part in logits]
        if None not in parts:
            answers = torch.cat(parts).argmax(1).cpu()
            right = answers // 2 == drawn.rotation, answers % 2 == drawn.agreement
            found[head] = [100 * each.float().mean().item() for each in right]
    return found


def learn(study: Study, variant: str, seed: int) -> Iterator[tuple[str, nn.Module, Scores]]:
    """Train one variant with one seed; after each phase yield its name, the network, its scores."""
    plan = study.plan(variant, seed)
    torch.manual_seed(seed)
    classes = open_images(next(iter(study.phases)), test=1)[1].classes
    options = {"num_classes": len(classes), "in_chans": plan.in_chans} | plan.model_options
    model = create_model(plan.model, **options)
    for name, epochs in study.phases.items():
        images, test = open_images(name)
        recipe = replace(plan, epochs=epochs)
        steps = steps_per_epoch(len(images), recipe)
        trainer = build_trainer(recipe, model, steps)
        words = f"{variant}, seed {seed}, {name}"
        for _ in tqdm(fit(trainer, images), words, steps * epochs, leave=False, disable=None):
            pass
        model = trainer.network
        yield name, model, evaluate(model, test)


def _stored_row(path: Path) -> dict | None:
    """Return the row of a run that has ended; else make its folder, before hours of training."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return json.loads(path.read_text()) if path.exists() else None
    except OSError as error:
        words = f"{path.parent} cannot be used as a folder ({_words(error)}); choose another."
    except ValueError:
        words = f"{path} is damaged; delete it, and the run is trained again."
    raise WeightsError(words)


def run(study: Study, variant: str, seed: int, folder: str | Path) -> dict:
    """Return the row of a run: the stored one, or that of a training whose end stores it.

    `folder` gets KEY.json and, for each phase, the weights: KEY-PHASE.safetensors.

    Raises:
        WeightsError: Nothing can be written there, or the stored row is damaged.
    """
    key = study.key(variant, seed)
    path = Path(folder) / f"{key}.json"
    if stored := _stored_row(path):
        return stored | {"variant": variant}  # it may have a new name
    row, start = {"variant": variant, "seed": seed, "scores": {}}, time.process_time()
    for name, model, scores in learn(study, variant, seed):
        save_weights(model, path.with_name(f"{key}-{name}.safetensors"))
        row["scores"][name] = scores._asdict()
        if name == "additive":
            row["cues"] = cue_accuracy(model)
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    row["cpu s"] = round(time.process_time() - start, 1)
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(row))
    return row


def run_all(study: Study, seeds: Iterable[int], folder: str | Path) -> list[dict]:
    """Return the rows of all variants with all seeds; stored runs are not repeated.

    The seeds are the outer loop: whenever you stop, the variants have been treated alike.
    """
    pairs = [(variant, seed) for seed in seeds for variant in study.variants]
    bar = tqdm(pairs, "runs", disable=None)
    return [run(study, variant, seed, folder) for variant, seed in bar]


# Student's t for 95 %, two-sided, for 1, 2, ... degrees of freedom.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def margin(values: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of a mean; infinity for a single value."""
    count = len(values)
    if count < 2:
        return math.inf
    t = STUDENT_T[count - 2] if count - 2 < len(STUDENT_T) else STUDENT_T[-1]
    return t * statistics.stdev(values) / math.sqrt(count)


class Comparison(NamedTuple):
    """A variant beside the base, in per cent and in points of it."""

    variant: str
    runs: int
    mean: float
    spread: float  # standard deviation over seeds; nan for a single one
    difference: float  # mean of the differences to the base with the same seed; 0 for the base
    margin: float  # half the width of the 95 % interval of that mean; nan for the base

    @property
    def verdict(self) -> str:
        """Say "noise" where the interval of the difference has 0 in it, "too few" without one."""
        if math.isnan(self.margin):
            return "base"
        if math.isinf(self.margin):
            return "too few"
        if abs(self.difference) > self.margin:
            return "better" if self.difference > 0 else "worse"
        return "noise"


def compare(rows: list[dict], data: str, head: str, base: str = "base") -> list[Comparison]:
    """Compare each variant with the base, seed by seed; variants without this head are left out.

    Pairs share the order of the images and, where both have the same parts in the same order, the
    start; then their differences may spread less than the accuracies themselves.
    """
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        accuracy = row["scores"][data][head]
        if accuracy is not None:
            found.setdefault(row["variant"], {})[row["seed"]] = accuracy
    if base not in found:
        raise ValueError(f"no run of {base!r} has a {head} on {data}; choose another base or head.")
    return [_against(found[base], variant, own) for variant, own in found.items()]


def _against(base: dict[int, float], variant: str, own: dict[int, float]) -> Comparison:
    shared = [own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())]
    values = list(own.values())
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    gap = (statistics.mean(shared), margin(shared)) if shared else (math.nan, math.inf)
    if own is base:
        gap = (0.0, math.nan)
    return Comparison(variant, len(values), statistics.mean(values), spread, *gap)


def plot_comparison(comparisons: Sequence[Comparison]) -> None:
    """Draw each variant's mean difference to the base with its 95 % interval, noise in grey.

    The base is the line at 0. Variants with fewer than two pairs have no interval and stay out.
    """
    import matplotlib.pyplot as plt  # here, so that importing the package stays quick

    shown = [one for one in comparisons if one.verdict != "base" and math.isfinite(one.margin)]
    colours = {"better": "#2f7d4f", "worse": "#b45309", "noise": "#8f8f8f"}
    _, axis = plt.subplots(figsize=(7, 0.7 + 0.26 * len(shown)), layout="constrained")
    axis.axvline(0, color="#1a1a1a", linewidth=1)
    for place, one in enumerate(shown):
        style = {"color": colours[one.verdict], "fmt": "o", "markersize": 5, "capsize": 3}
        axis.errorbar(one.difference, place, xerr=one.margin, **style)
    axis.set(yticks=range(len(shown)), yticklabels=[one.variant for one in shown])
    axis.set(ylim=(len(shown) - 0.5, -0.5), xlabel="points above the base")
