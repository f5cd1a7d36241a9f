"""Training with two heads: the loss, the optimizer, the data order, the loop, the scores.

A run is a `Trainer` and a number of steps::

    trainer = build_trainer(recipe, model, steps_per_epoch(len(images), recipe))
    for loss in fit(trainer, images):
        ...  # after each step: log, evaluate, save, stop

All randomness is a function of the recipe's seed and of the step, so a run that was stopped goes on
as if it had not been.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from conformer_src.conformer import DualLogits
from conformer_src.predict import _evaluating
from conformer_src.recipes import Recipe


class TwoHeadLoss(nn.Module):
    """The cross-entropies of both heads, made one: their mean (authors) or sum (OpenMMLab).

    Args:
        reduction: "mean" or "sum" over the heads that the model has.
        conv_weight, trans_weight: factors of the two losses; 0 leaves a head untaught.
        label_smoothing: share of each label that is given to all classes alike.
    """

    def __init__(
        self, reduction="mean", conv_weight=1.0, trans_weight=1.0, label_smoothing=0.0
    ) -> None:
        super().__init__()
        self.reduction, self.label_smoothing = reduction, label_smoothing
        self.weights = conv_weight, trans_weight

    def forward(self, logits: DualLogits, target: Tensor) -> Tensor:
        """Map logits, each (B, classes), and labels (B,) or (B, classes) to one number."""
        losses = [
            weight * F.cross_entropy(own, target, label_smoothing=self.label_smoothing)
            for weight, own in zip(self.weights, logits, strict=True)
            if own is not None
        ]
        return sum(losses) / (len(losses) if self.reduction == "mean" else 1)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return AdamW's two groups of what is trained: weights decay, and the rest does not.

    The rest are the parameters of one dimension (biases, scales), the class token and positions.
    """
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            table = name.endswith(("cls_token", "pos_embed"))
            (spared if parameter.ndim < 2 or table else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]


def warmup_cosine(optimizer: Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    """Return the schedule: the rate rises on a line, then falls on half a cosine, step by step.

    `steps` are the optimizer steps of an epoch.
    """
    total = max(1, steps * recipe.epochs)
    rise = min(round(steps * recipe.warmup_epochs), total - 1)
    fall = CosineAnnealingLR(optimizer, total - rise, recipe.min_lr)
    if not rise:
        return fall
    climb = LinearLR(optimizer, max(recipe.warmup_lr / recipe.lr, 1e-8), total_iters=rise)
    return SequentialLR(optimizer, [climb, fall], [rise])


def make_mix(recipe: Recipe, num_classes: int) -> Callable | None:
    """Return what mixes the images of a batch and their labels, or None.

    It maps images (B, C, H, W) and labels (B,) to mixed images and shares (B, classes). With both
    mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), each batch gets one of them by chance.
    """
    kinds = [(v2.MixUp, recipe.mixup), (v2.CutMix, recipe.cutmix)]
    mixes = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
    return v2.RandomChoice(mixes) if mixes else None


class WeightAverage:
    """A moving average (EMA) of a model's state; step t keeps min(decay, (1 + t) / (10 + t))."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the model as it is after `step` steps."""
        rate = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            own = self.state[name]
            own.lerp_(tensor, rate) if own.is_floating_point() else own.copy_(tensor)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Put the average into the model for a while, to evaluate or to save it."""
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.state)
        try:
            yield model
        finally:
            model.load_state_dict(own)


FREEZABLE = {
    "none": (),
    "conv": ("stem.", "conv_block.", "fusion_block.", "med_block."),
    "trans": ("token_embed.", "trans_block."),
    "backbone": ("entry.", "blocks."),
}


def freeze(model: nn.Module, part: str) -> None:
    """Leave a part untrained: the "conv" branch and stem, the "trans" branch, or the "backbone"."""
    for name, parameter in model.named_parameters():
        if any(start in f".{name}" for start in FREEZABLE[part]):
            parameter.requires_grad_(False)


def set_training(model: nn.Module, freeze_norm: bool) -> None:
    """Put a model into training mode, but not the BatchNorms whose statistics must stand."""
    model.train()
    for part in model.modules():
        norm = isinstance(part, nn.BatchNorm2d | nn.SyncBatchNorm)
        if norm and (freeze_norm or not part.weight.requires_grad):
            part.eval()


class SeededSamples(Dataset):
    """Items drawn with a seed of their own, so that it does not matter which process draws them.

    A key (index, seed) gives (image, label, name).
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int, str]:
        index, seed = key
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - transforms of others may use it
        image, label = self.dataset[index]
        return image, label, sample_name(self.dataset, index)


def sample_name(dataset: Dataset, index: int) -> str:
    """Return the path of an image, or its number in a data set without paths."""
    while hasattr(dataset, "indices"):  # a Subset
        dataset, index = dataset.dataset, dataset.indices[index]
    samples = getattr(dataset, "samples", None)
    return str(samples[index][0]) if samples else f"image {index}"


def steps_per_epoch(images: int, recipe: Recipe) -> int:
    """Return the optimizer steps of an epoch: whole batches; a smaller set makes one batch."""
    return max(1, images // recipe.batch_size)


def epoch_batches(images: int, recipe: Recipe, epoch: int) -> list[list[tuple[int, int]]]:
    """Return the keys (index, seed) of each batch of an epoch, in a new order each time.

    Batches are full: what is left over waits for another epoch, and a set of fewer images than a
    batch is repeated, each time with other seeds. With `recipe.repeats`, so many draws of an image
    are in a batch, not side by side, because mixup pairs neighbours.
    """
    draw = torch.Generator().manual_seed(100_003 * recipe.seed + epoch)
    size, steps = recipe.batch_size, steps_per_epoch(images, recipe)
    rounds = math.ceil(steps * size / images)
    order = torch.cat([torch.randperm(images, generator=draw) for _ in range(rounds)])
    drawn = order.split(math.ceil(size / recipe.repeats))[:steps]
    seeds = torch.randint(2**31, (steps, size), generator=draw).tolist()
    batches = [part.repeat(recipe.repeats)[:size].tolist() for part in drawn]
    return [list(zip(*keys, strict=True)) for keys in zip(batches, seeds, strict=True)]


def _part_size(recipe: Recipe, processes: int) -> int:
    """Return how many images a process computes at a time.

    Raises:
        ValueError: The images of a batch cannot be dealt out evenly.
    """
    parts = processes * recipe.accumulate
    if recipe.batch_size % parts:
        raise ValueError(
            f"batch_size {recipe.batch_size} must be a multiple of {parts}, the number of "
            f"processes ({processes}) times accumulate ({recipe.accumulate}): all parts are equal."
        )
    return recipe.batch_size // parts


def share_batches(images: int, recipe: Recipe, start: int, accelerator: Accelerator) -> Iterator:
    """Yield the keys of this process's parts of all batches from step `start` to the run's end."""
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    first, skipped = divmod(start, steps_per_epoch(images, recipe))
    size = _part_size(recipe, accelerator.num_processes)
    for epoch in range(first, recipe.epochs):
        for batch in epoch_batches(images, recipe, epoch)[skipped:]:
            own = batch[share]
            yield from (own[begin : begin + size] for begin in range(0, len(own), size))
        skipped = 0


Batch = tuple[Tensor, Tensor, Sequence[str]]  # images (B, C, H, W), labels (B,), names


def load_batches(
    dataset: Dataset, recipe: Recipe, start: int, accelerator: Accelerator
) -> Iterator[Sequence[Batch]]:
    """Yield this process's share of each batch from step `start` on, in `accumulate` parts."""
    loader = DataLoader(
        SeededSamples(dataset),
        batch_sampler=share_batches(len(dataset), recipe, start, accelerator),
        num_workers=recipe.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    yield from zip(*[iter(loader)] * recipe.accumulate, strict=True)


PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # what Accelerate calls them


def _accelerator(recipe: Recipe) -> Accelerator:
    """Return what knows devices and processes, in the recipe's precision.

    Raises:
        ValueError: The device cannot compute in this precision.
    """
    precision = PRECISIONS[recipe.precision]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # another run in this process had another precision
    cpu = not torch.accelerator.is_available()  # unless told, it would not connect CPU processes
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
    if precision == "fp16" and accelerator.device.type == "cpu":  # Accelerate would use fp32
        raise ValueError("fp16 needs a GPU; choose --precision bf16 or fp32.")
    return accelerator


@dataclass
class Trainer:
    """A run between two steps: all that it uses, and all that it changes."""

    recipe: Recipe
    accelerator: Accelerator
    model: nn.Module  # as the accelerator wraps it
    optimizer: Optimizer
    scheduler: LRScheduler
    loss: TwoHeadLoss
    mix: Callable | None  # see `make_mix`
    average: WeightAverage | None  # of the model inside
    step: int = 0  # optimizer steps that were taken

    @property
    def network(self) -> nn.Module:
        """The model without what accelerator and compiler wrapped around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


def build_trainer(
    recipe: Recipe, model: nn.Module, steps: int, accelerator: Accelerator | None = None
) -> Trainer:
    """Prepare to train a model by a recipe; `steps` are those of an epoch."""
    accelerator = accelerator or _accelerator(recipe)
    freeze(model, recipe.freeze)
    _part_size(recipe, accelerator.num_processes)  # raises what would come too late
    rows = isinstance(model, FSDPModule) or not recipe.channels_last  # FSDP stores rows
    layout = torch.contiguous_format if rows else torch.channels_last
    model = model.to(accelerator.device, memory_format=layout)
    model.checkpointing = recipe.checkpointing
    average = WeightAverage(model, recipe.ema) if recipe.ema else None
    groups = parameter_groups(model, recipe.weight_decay)
    optimizer = AdamW(groups, lr=recipe.lr)
    scheduler = warmup_cosine(optimizer, recipe, steps)  # the prepared optimizer would skip steps
    if recipe.compile:
        model.compile()
    wrapped = model if isinstance(model, FSDPModule) else accelerator.prepare_model(model)
    optimizer = accelerator.prepare_optimizer(optimizer)
    loss = TwoHeadLoss(
        recipe.reduction, recipe.conv_weight, recipe.trans_weight, recipe.label_smoothing
    )
    mix = make_mix(recipe, model.config.num_classes)
    return Trainer(recipe, accelerator, wrapped, optimizer, scheduler, loss, mix, average)


class NonFiniteError(ValueError):
    """The loss or a gradient is no number: parameters are as before, running statistics are not."""


def backward(trainer: Trainer, part: Batch, share: float) -> Tensor:
    """Add the gradient of a part of a batch; return its loss times its share of the batch."""
    device = trainer.accelerator.device
    layout = torch.channels_last if trainer.recipe.channels_last else torch.preserve_format
    images = part[0].to(device, non_blocking=True, memory_format=layout)
    target = part[1].to(device, non_blocking=True)
    if trainer.mix:
        images, target = trainer.mix(images, target)
    with trainer.accelerator.autocast():
        loss = trainer.loss(trainer.model(images), target) * share
    trainer.accelerator.backward(loss)
    return loss.detach()


def train_step(trainer: Trainer, parts: Sequence[Batch]) -> float:
    """Take one optimizer step on a batch, given in parts; return the loss over all processes.

    Raises:
        NonFiniteError: The loss or the gradient is no number; no step was taken.
    """
    recipe, accelerator, model = trainer.recipe, trainer.accelerator, trainer.model
    seed = (recipe.seed * 1_000_003 + trainer.step) * accelerator.num_processes
    torch.manual_seed(seed + accelerator.process_index)
    loss = torch.zeros((), device=accelerator.device)
    for number, part in enumerate(parts, 1):  # gradients travel once, with the last part
        with nullcontext() if number == len(parts) else accelerator.no_sync(model):
            loss += backward(trainer, part, 1 / len(parts))
    largest = recipe.clip_grad or math.inf
    norm = accelerator.clip_grad_norm_(model.parameters(), largest)
    total = accelerator.reduce(loss, "mean").item()
    _require_finite(trainer, total, norm, loss, parts)
    trainer.optimizer.step()
    trainer.scheduler.step()
    trainer.optimizer.zero_grad()
    trainer.step += 1
    if trainer.average:
        trainer.average.update(trainer.network, trainer.step)
    return total


def _require_finite(
    trainer: Trainer, total: float, norm: Tensor, loss: Tensor, parts: Sequence[Batch]
) -> None:
    """Raise a `NonFiniteError` unless the loss and the gradient's norm are numbers.

    In fp16 the scaler expects infinite gradients now and then and leaves out the step itself.
    """
    scaled = trainer.accelerator.scaler is not None
    if math.isfinite(total) and (scaled or math.isfinite(norm)):
        return
    what = "gradient" if math.isfinite(total) else "loss"
    guilty = [] if math.isfinite(loss) else [name for *_, names in parts for name in names]
    names = gather_object(guilty) or gather_object([name for *_, names in parts for name in names])
    shown = [*names[:3], f"{len(names) - 3} more"][: len(names)]
    rate = trainer.scheduler.get_last_lr()[0]
    trainer.optimizer.zero_grad()
    raise NonFiniteError(
        f"the {what} is not finite in step {trainer.step + 1}, at learning rate {rate:.3g}, for "
        f"the batch with {', '.join(shown)}; try a third of the learning rate, --clip-grad 1, or "
        "--precision bf16 or fp32, and look at these images."
    )


def fit(trainer: Trainer, dataset: Dataset) -> Iterator[float]:
    """Train from where the trainer stands to the end of the last epoch; yield each step's loss.

    Between two steps the caller may evaluate, save or stop. A streaming set has its `load_batches`.
    """
    recipe = trainer.recipe
    load = getattr(dataset, "load_batches", partial(load_batches, dataset))
    set_training(trainer.model, recipe.freeze_norm)
    for parts in load(recipe, trainer.step, trainer.accelerator):
        yield train_step(trainer, parts)


class Scores(NamedTuple):
    """How a model does on a set of images: its mean loss, and the percentage that is right."""

    images: int
    loss: float  # mean cross-entropy over the heads, without label smoothing
    conv: float | None  # by the CNN's head alone; None if the model has none
    trans: float | None  # by the transformer's head alone
    sum: float  # by the sum of both: what the paper reports


def count_right(logits: DualLogits, labels: Tensor) -> list[float]:
    """Return what a batch adds to the scores: images, loss, right by conv, by trans and by sum."""
    exact = DualLogits(*(None if own is None else own.cpu().double() for own in logits))
    loss = TwoHeadLoss()(exact, labels).item() * len(labels)
    right = [
        math.nan if own is None else (own.argmax(1) == labels).sum().item()
        for own in (*exact, exact.sum())
    ]
    return [len(labels), loss, *right]


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Dataset, accelerator=None, batch_size: int = 256, workers: int = 0
) -> Scores:
    """Score a model that is not wrapped, in eval mode; its training mode is restored.

    Each batch is computed by one process, always from the same images, and what the batches say is
    added up in their order: so the number of processes does not change the scores.
    """
    accelerator = accelerator or Accelerator()
    share_buffers(model)
    load = getattr(dataset, "evaluation_batches", partial(evaluation_batches, dataset))
    loader, numbers = load(accelerator, batch_size, workers)
    rows = {}
    with _evaluating(model) as like, accelerator.autocast():
        bar = tqdm(loader, "evaluating", leave=False, disable=None if numbers[0] == 0 else True)
        for number, (images, labels, _) in zip(numbers, bar, strict=True):
            rows[number] = count_right(model(images.to(like.device)), labels)
    rows = dict(gather_object(list(rows.items())))
    total = torch.tensor([rows[n] for n in sorted(rows)], dtype=torch.float64).sum(0)
    count, loss, *right = total.tolist()
    return Scores(int(count), loss / count, *(None if r != r else 100 * r / count for r in right))


def evaluation_batches(
    dataset: Dataset, accelerator: Accelerator, size: int, workers: int
) -> tuple[DataLoader, list[int]]:
    """Return the batches that this process computes, and their numbers.

    Each process gets equally many, because those that share parameters work in step: the first
    batches come twice if the last round is not full.
    """
    count, images = math.ceil(len(dataset) / size), len(dataset)
    rounds = range(0, count, accelerator.num_processes)
    numbers = [(begin + accelerator.process_index) % count for begin in rounds]
    keys = [[(i, 0) for i in range(n * size, min((n + 1) * size, images))] for n in numbers]
    loader = DataLoader(SeededSamples(dataset), batch_sampler=keys, num_workers=workers)
    return loader, numbers


def share_buffers(model: nn.Module) -> None:
    """Give all processes the statistics of the first: BatchNorm has seen other images in each."""
    for buffer in model.buffers():
        broadcast(buffer)
