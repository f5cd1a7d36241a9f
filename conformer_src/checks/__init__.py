"""Exercise checks, one module a chapter.

A check takes what the reader wrote and prints one line: "not attempted yet", the mistake by its name, or
that it is right. It looks in this order: is it implemented, types and shapes, number of parameters,
known mistakes, values.

    from conformer_src.checks import conv_block as checks

    checks.check_tap(my_tap)
"""

import functools
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Mistake(Exception):
    """What is wrong with an answer, in one sentence for the reader."""


def exercise(check: Callable[..., str]) -> Callable[..., None]:
    """Turn a function that raises `Mistake` or returns words of praise into a check that prints one line."""

    @functools.wraps(check)
    def report(*answer: Any, **named: Any) -> None:
        try:
            # An answer may draw random numbers; the chapter's own stream must not move.
            with torch.random.fork_rng():
                torch.manual_seed(0)
                verdict = f"✓ {check(*answer, **named)}"
        except NotImplementedError:
            verdict = "… not attempted yet"
        except Mistake as mistake:
            verdict = f"✗ {mistake}"
        except Exception as error:  # the answer's own error: say it without a traceback of ours
            line = traceback.extract_tb(error.__traceback__)[-1].lineno
            verdict = f"✗ your code stopped with {type(error).__name__}: {error} (line {line} of its cell)"
        print(verdict)

    return report


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
    return value.shape == expected.shape and torch.allclose(
        value.detach().float(), expected.detach().float(), rtol=tolerance, atol=tolerance
    )
