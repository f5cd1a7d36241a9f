"""Checkpoints of a run: written whole or not at all, the last few kept, nothing in them executed.

A checkpoint holds all that a run changes. There is no state of a random number generator in it,
because every random number is a function of the recipe's seed and of the step (chapter 8).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from conformer_src.files import WeightsError, read_file, written_whole
from conformer_src.training import Trainer

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # also if it is shared out
_NAME = "checkpoint-{:08}.pt"


def whole(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU of a tensor, also of one that is shared out among processes."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().to("cpu", copy=True)


def collect(trainer: Trainer) -> dict[str, Any]:
    """Return all that a run changes; each process must call this, the first gets it all."""
    model, optimizer = get_state_dict(trainer.network, trainer.optimizer.optimizer, options=_WHOLE)
    average = trainer.average and {n: whole(t) for n, t in trainer.average.state.items()}
    scaler = trainer.accelerator.scaler
    return {
        "step": trainer.step,
        "model": model,
        "model_ema": average,
        "optimizer": optimizer,
        "scheduler": trainer.scheduler.state_dict(),
        "scaler": scaler and scaler.state_dict(),
    }


def restore(trainer: Trainer, saved: Mapping[str, Any]) -> None:
    """Bring a trainer to where `collect` found another one, whatever the number of processes."""
    model, optimizer = trainer.network, trainer.optimizer.optimizer
    if trainer.average:
        with trainer.average.applied(model):  # the model knows how tensors are shared out
            set_model_state_dict(model, saved["model_ema"], options=_WHOLE)
            for name, tensor in model.state_dict().items():
                trainer.average.state[name].copy_(tensor)
    set_model_state_dict(model, saved["model"], options=_WHOLE)
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=_WHOLE)
    trainer.scheduler.load_state_dict(saved["scheduler"])
    if trainer.accelerator.scaler and saved["scaler"]:
        trainer.accelerator.scaler.load_state_dict(saved["scaler"])
    trainer.step = saved["step"]


def save_checkpoint(content: Mapping[str, Any], folder: Path, keep: int) -> Path:
    """Write a checkpoint into a folder, then delete all but the last `keep`.

    Raises:
        WeightsError: It cannot be written; those that are there stay.
    """
    path = folder / _NAME.format(content["step"])
    with written_whole(path) as temporary:
        torch.save(dict(content), temporary)
    for old in find_checkpoints(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def find_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first."""
    return sorted(folder.glob("checkpoint-*.pt"), reverse=True)


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Return what the newest checkpoint holds; a damaged one is passed over with a warning.

    Raises:
        WeightsError: There is none that can be read.
    """
    complaints = []
    for path in find_checkpoints(folder):
        try:
            return read_file(path)[0]
        except WeightsError as error:
            complaints.append(str(error))
            warn(f"{error} An older checkpoint is tried.", stacklevel=2)
    raise WeightsError(
        f"{folder} holds no checkpoint to go on from{': ' if complaints else ''}"
        f"{' '.join(complaints)}; start the run again in another folder."
    )
