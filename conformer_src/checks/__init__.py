"""Exercise checks, one module a chapter.

A check takes what the reader wrote and prints one line: "not attempted yet", the mistake by its
name, or that it is right. It looks in this order: is it implemented, types and shapes, number of
parameters, known mistakes, values.

    from conformer_src.checks import conv_block as checks

    checks.check_tap(my_tap)
"""

import functools
import os
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Code that no reader wrote: Python, this package, and what is installed beside torch.
_LIBRARIES = (
    "<frozen",
    sysconfig.get_path("stdlib") + os.sep,
    str(Path(__file__).parents[1]) + os.sep,
    str(Path(torch.__file__).parents[1]) + os.sep,
)


class Mistake(Exception):
    """What is wrong with an answer, in one sentence for the reader."""


def exercise(check: Callable[..., str]) -> Callable[..., None]:
    """Turn a function that raises `Mistake` or returns praise into a check that prints one line."""

    @functools.wraps(check)
    def report(*answer: Any, **named: Any) -> None:
        try:
            # An answer may draw random numbers; the chapter's own stream must not move.
            with torch.random.fork_rng():
                torch.manual_seed(0)
                verdict = f"✓ {check(*answer, **named)}"
        except Mistake as mistake:
            verdict = f"✗ {mistake}"
        except Exception as error:  # the answer's own error: say it without a traceback of ours
            # torch raises NotImplementedError too, but with words; the stub's has none.
            untouched = isinstance(error, NotImplementedError) and not error.args
            verdict = "… not attempted yet" if untouched else f"✗ {_describe(error)}"
        print(verdict)

    return report


def _describe(error: Exception) -> str:
    """Say in one line what stopped the answer, and the line of it that was running."""
    words = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    words = words if len(words) <= 200 else f"{words[:200]}…"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    if lines:
        return f"your code stopped with {words} (line {lines[-1]} of its cell)"
    return f"your answer does not fit what is asked: {words}"


def require(condition: bool, mistake: str) -> None:
    """Raise `Mistake` with these words unless the condition holds."""
    if not condition:
        raise Mistake(mistake)


def require_shape(value: Any, shape: tuple[int, ...], name: str = "the result") -> None:
    """Require a tensor of this shape."""
    require(
        isinstance(value, Tensor), f"{name} is a {type(value).__name__}; a torch.Tensor is expected"
    )
    require(
        tuple(value.shape) == tuple(shape),
        f"{name} has shape {tuple(value.shape)}; expected {tuple(shape)}",
    )


def require_parameters(module: nn.Module, count: int, hint: str) -> None:
    """Require a number of learnable parameters; `hint` says what usually explains a difference."""
    actual = sum(p.numel() for p in module.parameters())
    require(actual == count, f"{actual:,} parameters; expected {count:,}: {hint}")


def agrees(value: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two tensors have one shape and agree to rounding."""
    ours, theirs = (tensor.detach().cpu().float() for tensor in (value, expected))
    return ours.shape == theirs.shape and torch.allclose(
        ours, theirs, rtol=tolerance, atol=tolerance
    )
