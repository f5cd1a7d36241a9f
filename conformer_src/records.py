"""What a run writes down for people: where it ran, its metrics, its learning curves."""

import csv
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import accelerate
import torch
import torchvision
from matplotlib.figure import Figure

from conformer_src.files import written_whole

METRICS, CURVES = "metrics.csv", "curves.png"


def environment() -> dict[str, Any]:
    """Return what a run depends on beside its recipe."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": {
            "python": platform.python_version(),
            "conformer_src": _own_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "accelerate": accelerate.__version__,
        },
        "git": _git_state(),
        "system": platform.platform(),
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
    }


def _own_version() -> str:
    from conformer_src import __version__

    return __version__


def _git_state() -> dict[str, Any] | None:
    """Return the commit of this package and whether files differ from it; None without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit, changes = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True, timeout=10)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "changed": bool(changes.stdout)}


HEADER = "epoch  train loss  val loss   conv  trans   both   ema   images/s"


def line(row: Mapping[str, Any]) -> str:
    """Return the row of an epoch as a line under `HEADER`."""
    shares = [row["val_conv"], row["val_trans"], row["val_sum"], row.get("ema_sum")]
    shown = "  ".join("    -" if one is None else f"{one:5.1f}" for one in shares)
    losses = f"{row['train_loss']:10.3f}  {row['val_loss']:8.3f}"
    return f"{row['epoch']:5}  {losses}  {shown}  {row['images_per_second']:8.1f}"


def write_history(history: list[dict], folder: Path) -> None:
    """Write the rows of all epochs as CSV."""
    with (
        written_whole(folder / METRICS) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as stream,
    ):
        writer = csv.DictWriter(stream, history[0].keys())
        writer.writeheader()
        writer.writerows(history)


def write_curves(history: list[dict], folder: Path) -> None:
    """Draw the learning curves into a file."""
    with written_whole(folder / CURVES) as temporary:
        plot_history(history).savefig(temporary, format="png", dpi=120)


def plot_history(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the learning curves: the losses, and how many validation images are right."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    losses, shares = figure.subplots(1, 2)
    epochs = [int(row["epoch"]) for row in history]
    curves = [
        (losses, "train_loss", "training", "#5f5f5f"),
        (losses, "val_loss", "validation", "#1a1a1a"),
        (shares, "val_conv", "CNN head", "#1f5f99"),
        (shares, "val_trans", "transformer head", "#b45309"),
        (shares, "val_sum", "sum of both", "#2f7d4f"),
        (shares, "ema_sum", "sum, averaged weights", "#1a1a1a"),
    ]
    for axes, name, label, colour in curves:
        if history[0].get(name) not in (None, ""):
            axes.plot(
                epochs, [float(row[name]) for row in history], ".-", label=label, color=colour
            )
    for axes, title in ((losses, "loss"), (shares, "right, percent")):
        axes.set(xlabel="epoch", ylabel=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    return figure


def write_tensorboard(row: Mapping[str, Any], folder: Path) -> None:
    """Add the row of an epoch to the log that `tensorboard --logdir` shows.

    Raises:
        ValueError: The package tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "the log needs a package: python -m pip install tensorboard; or give --tensorboard "
            "false."
        ) from None
    with SummaryWriter(folder / "tensorboard", purge_step=row["step"]) as writer:
        for name, value in row.items():
            if value is not None and name not in ("epoch", "step"):
                writer.add_scalar(name, value, row["step"])
