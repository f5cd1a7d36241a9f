"""Checks of the exercises of chapter 3, attention."""

import itertools
import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from conformer_src.attention import TransformerBlock, scaled_dot_product, split_heads
from conformer_src.checks import agrees, exercise, require, require_shape
from conformer_src.conv_block import count_parameters

_FAULTS = {
    "split": "qkv is cut as [heads][3][d]: queries, keys and values of the heads are mixed up",
    "axis": "the softmax runs over the queries: the columns of the weights sum to 1, not the rows",
    "scale": "the scores are not divided by sqrt(d)",
    "root": "the scores are divided by d, not by sqrt(d)",
    "width": "the scores are divided by sqrt(E): use the width d = E / h of one head",
    "merge": "the heads are put back interleaved, as (d h): each head's d numbers belong together",
}


def _attend(qkv: Tensor, num_heads: int, faults: set[str]) -> Tensor:
    """Attention with some of the faults above; with none of them it is right."""
    cut = "b n (h three d)" if "split" in faults else "b n (three h d)"
    queries, keys, values = rearrange(qkv, f"{cut} -> three b h n d", three=3, h=num_heads)
    width = queries.shape[-1]
    scale = {"scale": 1.0, "root": width, "width": math.sqrt(width * num_heads)}
    divisor = next((scale[name] for name in scale if name in faults), math.sqrt(width))
    scores = queries @ keys.mT / divisor
    weights = scores.softmax(dim=-2 if "axis" in faults else -1)
    back = "b n (d h)" if "merge" in faults else "b n (h d)"
    return rearrange(weights @ values, f"b h n d -> {back}")


@exercise
def check_attention(answer: Callable[[Tensor, int], Tensor]) -> str:
    """Check multi-head attention on the output of a qkv projection; name the faults left."""
    qkv = 2 * torch.randn(2, 5, 3 * 24)
    result = answer(qkv, 3)
    require_shape(result, (2, 5, 24))
    choices = itertools.product(
        (None, "split"), (None, "axis"), (None, "scale", "root", "width"), (None, "merge")
    )
    for choice in sorted(choices, key=lambda names: sum(map(bool, names))):
        faults = set(choice) - {None}
        if agrees(result, _attend(qkv, 3, faults)):
            require(not faults, "; ".join(_FAULTS[name] for name in _FAULTS if name in faults))
            break
    queries, keys, values = split_heads(qkv, 3)
    expected = rearrange(scaled_dot_product(queries, keys, values)[0], "b h n d -> b n (h d)")
    require(agrees(result, expected), "the shape is right, the numbers differ: print the weights")
    return "all faults are repaired: your attention is the one of the chapter"


@exercise
def check_drop_path(answer: Callable[[Tensor, float, bool], Tensor]) -> str:
    """Check stochastic depth written as a function of the branch."""
    ones = torch.ones(400, 3, 5)
    require_shape(answer(ones.clone(), 0.25, True), ones.shape)
    given = ones.clone()
    answer(given, 0.25, True)
    require(torch.equal(given, ones), "the branch itself was changed: return a new tensor")
    require(
        agrees(answer(ones, 0.25, False), ones),
        "something is dropped or scaled in evaluation: there the branch passes unchanged",
    )
    require(
        agrees(answer(ones, 0.0, True), ones), "rate 0 must leave the branch as it is in training"
    )
    whole = answer(ones, 1.0, True)
    require(bool(whole.isfinite().all()), "rate 1 divides by zero: there nothing survives")
    require(bool((whole == 0).all()), "at rate 1 every branch must be dropped")

    result = answer(ones, 0.25, True)
    samples, tokens = (result == 0).flatten(1), (result == 0).all(2)
    if not bool((samples.all(1) == samples.any(1)).all()):
        per_token = bool((tokens == (result == 0).any(2)).all())
        unit = "each token has its own draw" if per_token else "each number has its own draw"
        require(False, f"{unit}: draw once for each sample")
    dropped = samples.all(1).float().mean().item()
    if dropped in (0, 1):
        other = [bool((answer(ones, 0.25, True) == 0).any()) for _ in range(30)]
        require(any(other), "nothing is ever dropped: at rate 0.25 one sample in four loses it")
        require(False, "the batch has one draw: each sample needs its own")
    require(dropped < 0.5, "a branch survives with probability rate: it must be 1 - rate")
    require(abs(dropped - 0.25) < 0.1, f"{dropped:.0%} of the branches are dropped at rate 0.25")
    survivors = result[~samples.all(1)]
    require(
        not agrees(survivors, torch.ones_like(survivors)),
        "the survivors are not scaled: the expected value shrinks to 1 - rate times the branch",
    )
    require(
        agrees(survivors, torch.full_like(survivors, 1 / 0.75)),
        "the survivors must be divided by 1 - rate",
    )
    return "each sample draws once, and the expected value is the branch itself"


@exercise
def check_prediction(answer: Callable[[], tuple[int, int, int]]) -> str:
    """Check tokens, parameters and multiply-accumulates of one block of Conformer-S, patch 32."""
    predicted = answer()
    require(
        isinstance(predicted, tuple | list) and len(predicted) == 3,
        "return three numbers: tokens, parameters, multiply-accumulates",
    )
    tokens, parameters, macs = predicted
    width, hidden = 384, 4 * 384
    right = 50
    require(tokens != 49, "49 tokens are the 7 x 7 patches: the class token is missing")
    require(tokens != 197, "197 tokens belong to patch 16: here a patch is 32 pixels wide")
    require(tokens == right, f"{tokens} tokens; expected 1 + (224 / 32)^2")

    matrices = 12 * width**2
    linear_biases = 3 * width + width + hidden + width
    expected = count_parameters(TransformerBlock(width, 6))
    mistakes = {
        matrices: "the weight matrices only: biases and the two norms are missing",
        matrices + linear_biases: "the two norms are missing: a scale and a shift for each width",
        expected - linear_biases: "the biases of the four linear maps are missing",
        expected - 3 * width: "the bias of the qkv projection is missing",
        expected - 2 * width: "one of the two norms is missing",
    }
    require(parameters not in mistakes, f"parameters: {mistakes.get(parameters)}")
    require(parameters == expected, f"{parameters:,} parameters; expected 12 E^2 + 13 E")

    products = right**2 * width  # of one of the two, queries with keys or weights with values
    expected = right * matrices + 2 * products
    mistakes = {
        right * matrices: "the attention products are missing",
        right * matrices + products: "one of the two attention products is missing",
        2 * expected: "these are operations; a multiplication and its addition count as one here",
        right * matrices + 2 * 6 * products: "the heads share E: their number must not multiply",
        49 * matrices + 2 * 49**2 * width: "the class token costs as much as any other token",
    }
    require(macs not in mistakes, f"multiply-accumulates: {mistakes.get(macs)}")
    require(macs == expected, f"{macs:,} multiply-accumulates; expected 12 N E^2 + 2 N^2 E")
    return "tokens, parameters and multiply-accumulates agree with the counters"
