"""A training run in a folder: it shows what it does, can be stopped, and goes on at any step.

runs/fashion/
  recipe.toml             every field, as the run uses it
  environment.json        versions, machine, git state, command: one entry for each start
  metrics.csv             one row an epoch
  curves.png              the same as a picture
  checkpoint-00000700.pt  all that is needed to go on; the last few are kept
  best.safetensors        the weights of the epoch with the best validation
  last.safetensors        the weights after the last epoch
  result.json             the scores on the test images
"""

import json
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from conformer_src.checkpoints import (
    collect,
    find_checkpoints,
    load_checkpoint,
    restore,
    save_checkpoint,
    whole,
)
from conformer_src.conformer import Conformer
from conformer_src.files import WeightsError, _words, written_whole
from conformer_src.recipes import Recipe, load_recipe, write_recipe
from conformer_src.records import (
    HEADER,
    environment,
    line,
    write_curves,
    write_history,
    write_tensorboard,
)
from conformer_src.scaling import shard_parameters, synchronize_norms
from conformer_src.sources import Data, evaluation_images, input_config, open_data
from conformer_src.training import (
    NonFiniteError,
    Scores,
    Trainer,
    _accelerator,
    build_trainer,
    evaluate,
    fit,
    load_batches,
    steps_per_epoch,
)
from conformer_src.weights import create_model, load_model, load_weights, save_weights

RECIPE, RESULT = "recipe.toml", "result.json"
BEST, LAST, ENVIRONMENT = "best.safetensors", "last.safetensors", "environment.json"
# Fields that may differ when a run goes on: they change how it is computed, or nothing at all.
CHANGEABLE = (
    *("data", "corrupt", "clip_grad", "precision", "accumulate", "workers", "channels_last"),
    *("compile", "checkpointing", "sync_norm", "fsdp", "save_steps", "keep", "tensorboard"),
)


class RunError(ValueError):
    """Why a run stopped, and how to go on."""


class Stopped(RunError):
    """A run was asked to stop by Ctrl-C or SIGTERM; it was saved before."""

    def __init__(self, number: int, folder: Path) -> None:
        super().__init__(f"stopped and saved; go on with: conformer train --resume {folder}")
        self.exit_code = 128 + number


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Return what knows the devices and processes; `accelerate launch` and torchrun start them.

    Raises:
        ValueError: The device cannot compute in this precision, or Accelerate is configured for
            FSDP.
    """
    accelerator = _accelerator(recipe)
    if accelerator.distributed_type not in SUPPORTED:
        raise RunError(
            f"Accelerate is configured for {accelerator.distributed_type.value}; leave that out of "
            "its settings, and share parameters out with --fsdp, which works on CPUs as well."
        )
    return accelerator


SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")


def build_model(recipe: Recipe, classes: tuple[str, ...]) -> Conformer:
    """Build the model of a recipe, with fresh weights or those that it names."""
    if recipe.freeze_norm and not recipe.weights:
        raise RunError(
            "freeze_norm keeps statistics that nobody has learnt yet; give --weights, or "
            "--no-freeze-norm."
        )
    torch.manual_seed(recipe.seed)
    published = recipe.weights == "published"
    model = create_model(
        recipe.model,
        published,
        in_chans=recipe.in_chans,
        num_classes=len(classes),
        **recipe.model_options,
    )
    model.classes, model.input = tuple(classes), input_config(recipe)
    if recipe.weights and not published:
        load_weights(model, recipe.weights)
    return model


@contextmanager
def stop_requests() -> Iterator[SimpleNamespace]:
    """Note Ctrl-C and SIGTERM instead of breaking off; a second Ctrl-C breaks off.

    Launchers pass signals on to processes that got them already, so what comes within a second is
    the same one.
    """
    asked, before = SimpleNamespace(number=0, since=0.0), {}

    def note(number: int, frame: object) -> None:
        if not asked.number:
            asked.number, asked.since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - asked.since > 1:
            raise KeyboardInterrupt

    with suppress(ValueError):  # signals reach the main thread only
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Watched:
    """A data set that notes how long the training waits for it, and tells when it fails."""

    def __init__(self, dataset: Any, on_failure: Callable[[], Any]) -> None:
        self.dataset, self.on_failure, self.seconds = dataset, on_failure, 0.0

    def load_batches(self, *arguments: Any) -> Iterator[Any]:
        load = getattr(self.dataset, "load_batches", partial(load_batches, self.dataset))
        batches = load(*arguments)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches, None)
            except Exception:
                self.on_failure()
                raise
            self.seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch


@dataclass
class Progress:
    """What a run has seen so far."""

    history: list[dict] = field(default_factory=list)  # a row for each epoch
    losses: list[float] = field(default_factory=list)  # of the steps of this epoch
    best: float = -1.0  # percent of the validation images


@dataclass
class _Run:
    folder: Path
    trainer: Trainer
    data: Data
    progress: Progress
    say: Callable[[str], Any]

    def __post_init__(self) -> None:
        self.steps = steps_per_epoch(len(self.data.train), self.trainer.recipe)
        self.main = self.trainer.accelerator.is_main_process
        self.images = _Watched(self.data.train, self.save_alone)
        self.since = time.perf_counter(), self.trainer.step
        self.told = False  # the header of the table

    def train(self) -> None:
        """Take all steps that are left."""
        trainer, recipe = self.trainer, self.trainer.recipe
        shown = tqdm(
            total=self.steps,
            initial=trainer.step % self.steps,
            leave=False,
            unit=" steps",
            disable=None if self.main else True,
        )
        with stop_requests() as asked, shown as bar, self._explained():
            bar.set_description(f"epoch {trainer.step // self.steps + 1}/{recipe.epochs}")
            for loss in fit(trainer, self.images):
                self.progress.losses.append(loss)
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                ended = trainer.step % self.steps == 0
                if ended:
                    self.end_epoch()
                    bar.reset()
                    bar.set_description(f"epoch {trainer.step // self.steps + 1}/{recipe.epochs}")
                number = self._agreed(asked.number)
                if ended or number or (recipe.save_steps and trainer.step % recipe.save_steps == 0):
                    self.save()
                if number:
                    self.draw()
                    raise Stopped(number, self.folder)

    def draw(self) -> None:
        """Draw the learning curves, if an epoch has ended."""
        if self.main and self.progress.history:
            write_curves(self.progress.history, self.folder)

    def _agreed(self, number: int) -> int:
        """Return the signal after which all processes stop, at the same step."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return number
        told = torch.tensor(number, device=accelerator.device)
        return int(accelerator.gather(told).max())

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say in one sentence what went wrong, and how the run goes on."""
        try:
            yield
        except RunError:
            raise
        except (NonFiniteError, WeightsError) as error:
            raise RunError(f"{self._sentence(error)} {self._way_on()}") from None
        except (OSError, RuntimeError, ValueError) as error:
            raise RunError(f"{self._sentence(error)} {self._way_on()}") from error

    def save_alone(self) -> None:
        """Save between two steps; several processes could not agree on it after a failure."""
        if self.trainer.accelerator.num_processes == 1:
            self.save()

    def _sentence(self, error: BaseException) -> str:
        accelerator = self.trainer.accelerator
        if isinstance(error, torch.OutOfMemoryError):
            return "the device has too little memory; give --accumulate 2 or --checkpointing."
        if found := re.search(r"DataLoader worker[^.:)]*\)[^.:)]*", str(error)):  # raised anywhere
            return (
                f"a process that reads images died ({found[0]}); look at the memory that is left."
            )
        words = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        reason = words[-1].partition("Error: ")[2] or words[0]  # reading processes add a traceback
        reason = reason.rstrip(".")
        if accelerator.num_processes > 1 and isinstance(error, RuntimeError):
            return (
                f"process {accelerator.process_index} stopped, because another one died or cannot "
                f"be reached ({reason}); its own message says why."
            )
        return f"{reason}."

    def _way_on(self) -> str:
        saved = find_checkpoints(self.folder)
        if not saved:
            return f"Nothing was saved yet: conformer train --resume {self.folder} begins anew."
        step = int(saved[0].stem.rpartition("-")[2])
        return f"The run is saved up to step {step}: conformer train --resume {self.folder}"

    def end_epoch(self) -> None:
        """Score the model, keep it if it is the best so far, and write down the row."""
        trainer, progress = self.trainer, self.progress
        seconds, steps = time.perf_counter() - self.since[0], trainer.step - self.since[1]
        row = {
            "epoch": trainer.step // self.steps,
            "step": trainer.step,
            "lr": trainer.scheduler.get_last_lr()[0],
            "train_loss": sum(progress.losses) / len(progress.losses),
            **_named("val", self._score(self.data.val)),
        }
        score = row["val_sum"]
        if trainer.average:
            with trainer.average.applied(trainer.network):
                row |= _named("ema", self._score(self.data.val))
            score = row["ema_sum"]
        row["images_per_second"] = steps * trainer.recipe.batch_size / seconds
        row["waiting"] = self.images.seconds / seconds
        if score > progress.best:
            progress.best = score
            self.write_weights(BEST)
        progress.history.append(row)
        progress.losses = []
        if self.main:
            self._report(row)
        self.images.seconds, self.since = 0.0, (time.perf_counter(), trainer.step)

    def _score(self, images: Any) -> Scores:
        trainer = self.trainer
        workers = trainer.recipe.workers
        return evaluate(trainer.network, images, trainer.accelerator, workers=workers)

    def _report(self, row: Mapping[str, Any]) -> None:
        write_history(self.progress.history, self.folder)
        if not self.told:
            self.say(HEADER)
            self.told = True
        self.say(line(row))
        if self.trainer.recipe.tensorboard:
            write_tensorboard(row, self.folder)

    def write_weights(self, name: str) -> None:
        """Write the weights, or their moving average, and all that travels with them."""
        network, average = self.trainer.network, self.trainer.average
        state = average.state if average else network.state_dict()
        state = {name: whole(tensor) for name, tensor in state.items()}
        if self.main:
            with torch.device("meta"):
                model = Conformer(network.config)
            model.load_state_dict(state, assign=True)
            model.classes, model.input = self.data.classes, input_config(self.trainer.recipe)
            save_weights(model, self.folder / name)

    def save(self) -> None:
        """Write a checkpoint."""
        recipe, content = self.trainer.recipe, collect(self.trainer)
        content |= {
            "recipe": asdict(recipe),
            "progress": asdict(self.progress),
            "images": len(self.data.train),
            "classes": list(self.data.classes),
        }
        if self.main:
            save_checkpoint(content, self.folder, recipe.keep)

    def finish(self) -> dict[str, Any]:
        """Write the last weights; score the best on the test images, which nothing chose."""
        self.write_weights(LAST)
        self.draw()
        accelerator = self.trainer.accelerator
        accelerator.wait_for_everyone()
        result = {"folder": str(self.folder), **self.progress.history[-1]}
        if self.data.test is not None:
            best = load_model(self.folder / BEST).to(accelerator.device)
            scores = evaluate(best, self.data.test, accelerator)
            result |= _named("test", scores)
        if self.main:
            with written_whole(self.folder / RESULT) as temporary:
                temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result


def _named(prefix: str, scores: Scores) -> dict[str, Any]:
    fields = scores._asdict()
    return {f"{prefix}_{name}": fields[name] for name in ("loss", "conv", "trans", "sum")}


def start_run(recipe: Recipe, folder: str | Path, say: Callable[[str], Any] = print) -> dict:
    """Train by a recipe in a new folder; return the last row and the scores on the test images.

    Raises:
        RunError: There is a run in the folder, or this one cannot go on; the sentence says how.
        Stopped: Ctrl-C or SIGTERM; the run was saved.
        ValueError: The data or the weights cannot be used.
    """
    folder = Path(folder)
    if (folder / RECIPE).exists():
        raise RunError(
            f"{folder} holds a run; go on with --resume {folder}, or choose another folder "
            "with --out."
        )
    return _run(recipe, folder, say)


def resume_run(folder: str | Path, say: Callable[[str], Any] = print, **changes: object) -> dict:
    """Go on with a run where its newest checkpoint stands; on one CPU to the same bits.

    `changes` are fields of the recipe that may differ: see `CHANGEABLE`.

    Raises:
        RunError: There is no run in the folder, or a field must not be changed.
        Stopped, ValueError: As `start_run` does.
    """
    folder = Path(folder)
    if not (folder / RECIPE).is_file():
        raise RunError(
            f"there is no run in {folder}: it has no {RECIPE}; start one without --resume."
        )
    for name in changes:
        if name not in CHANGEABLE:
            raise RunError(
                f"{name} cannot change while a run goes on; start another one, if you like from "
                f"its weights: --weights {folder / BEST}"
            )
    recipe = load_recipe(folder / RECIPE, **changes)
    saved = load_checkpoint(folder) if find_checkpoints(folder) else None
    return _run(recipe, folder, say, saved)


def _run(
    recipe: Recipe, folder: Path, say: Callable[[str], Any], saved: dict | None = None
) -> dict[str, Any]:
    accelerator = make_accelerator(recipe)
    with accelerator.main_process_first():  # only one fetches what must be fetched
        data = open_data(recipe)
        model = build_model(recipe, data.classes)
    if saved:
        _require_same_data(saved, data, recipe)
    if recipe.sync_norm:
        model = synchronize_norms(model.to(accelerator.device))
    if recipe.fsdp:
        model = shard_parameters(model.to(accelerator.device))
    steps = steps_per_epoch(len(data.train), recipe)
    trainer, progress = build_trainer(recipe, model, steps, accelerator), Progress()
    if saved:
        restore(trainer, saved)
        progress = Progress(**saved["progress"])
    if accelerator.is_main_process:
        _open_folder(folder, recipe)
    accelerator.wait_for_everyone()
    run = _Run(folder, trainer, data, progress, say)
    run.train()
    return run.finish()


def _require_same_data(saved: Mapping[str, Any], data: Data, recipe: Recipe) -> None:
    """Refuse data that would make another run of this one."""
    before, now = saved["images"], len(data.train)
    if saved["classes"] != list(data.classes):
        raise RunError("the run began with other classes; put its data back, or start another run.")
    if steps_per_epoch(before, recipe) != steps_per_epoch(now, recipe):
        raise RunError(
            f"the run began with {before:,} training images and there are {now:,} now, which gives "
            "another number of steps; put its data back, or start another run from its weights."
        )


def _open_folder(folder: Path, recipe: Recipe) -> None:
    """Make the folder and write down what the run is, and where it is started."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"{folder} cannot be made ({_words(error)}); choose another.") from None
    path = folder / ENVIRONMENT
    starts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps([*starts, environment()], indent=1), encoding="utf-8")
    write_recipe(recipe, folder / RECIPE)


def evaluate_file(
    weights: str | Path, recipe: str | Path | None = None, **changes: object
) -> dict[str, Any]:
    """Score a file of weights, or the best of a run's folder, on images of known classes.

    Without `data=...` these are the images that the run reports by: its test images, or those that
    it held out if there are none. With it, all images of that folder, or those in its `test/`, made
    ready as those that the model was trained on.

    Args:
        weights: a file, or the folder of a run.
        recipe: says which images; by default the one beside the weights.
        changes: replace fields of the recipe: data, image_size, precision, workers.

    Raises:
        ValueError: There is no recipe, or the weights or the images cannot be used.
    """
    path = Path(weights)
    path = path / BEST if path.is_dir() else path
    beside = path.parent / RECIPE
    if recipe is None and not beside.is_file():
        raise RunError(f"there is no {RECIPE} beside {path}; give --recipe, a name or a file.")
    model = load_model(path)
    recipe = load_recipe(recipe or beside, in_chans=model.config.in_chans, **changes)
    accelerator = make_accelerator(recipe)
    images = _images_to_score(recipe, model, "data" in changes)
    scores = evaluate(model.to(accelerator.device), images, accelerator, workers=recipe.workers)
    return {"weights": str(path), "data": recipe.data, **scores._asdict()}


def _images_to_score(recipe: Recipe, model: Conformer, others: bool) -> Any:
    """Return the images to score a model by; refuse those of other classes."""
    if others:
        ready = model.input and replace(model.input, image_size=recipe.image_size)
        images = evaluation_images(recipe, model.classes, ready)
        classes = images.classes
    else:
        data = open_data(recipe)
        images, classes = data.val if data.test is None else data.test, data.classes
    fits = len(classes) == model.config.num_classes
    if not fits or (model.classes is not None and tuple(classes) != tuple(model.classes)):
        raise RunError(
            f"the weights know other classes than {recipe.data}, which has {len(classes)}; give "
            "the folder of their own images with --data."
        )
    return images
