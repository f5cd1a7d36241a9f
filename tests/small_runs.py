"""A small run to be stopped in many ways, in processes that start at once."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from conformer_src.recipes import Recipe

TINY = {"depth": 3, "embed_dim": 24, "num_heads": 3, "channel_ratio": 0.25, "drop_path_rate": 0.1}

# A server that has imported everything: a process of it starts in milliseconds.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["conformer_src.runs", "conformer_src.cli"])


def draw_images(folder: Path, count: int = 12, classes: tuple[str, ...] = ("a", "b", "c")) -> Path:
    """Draw `count` pictures of noise for each class."""
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
            pixels[:, :, label % 3] //= 4
            Image.fromarray(pixels.numpy()).save(folder / name / f"{number:02}.png")
    return folder


def small_recipe(data: Path, **changes: Any) -> Recipe:
    """Return a recipe of 12 steps with everything that has a state."""
    fields = {
        "data": str(data),
        "in_chans": 3,
        "image_size": 32,
        "model_options": TINY,
        "validation": 0.25,
        "epochs": 3,
        "batch_size": 6,
        "ema": 0.9,
        "mixup": 0.2,
        "workers": 0,
        "save_steps": 1,
        "lr": 1e-3,
    }
    return Recipe(**fields | changes)


def _call(function: Callable, arguments: tuple, log: str) -> None:
    sys.stdout = sys.stderr = stream = open(log, "a", buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)
    code = 1
    try:
        code = function(*arguments) or 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    stream.flush()
    os._exit(code if isinstance(code, int) else 0)


def start(function: Callable, *arguments: Any, log: Path) -> Any:
    """Start a function in a process of its own; what it prints is added to a file."""
    process = context.Process(target=_call, args=(function, arguments, str(log)))
    process.start()
    return process
