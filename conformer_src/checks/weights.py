"""Checks of the exercises of chapter 7, weights."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache

import torch
from torch import Tensor

from conformer_src.checks import exercise, require
from conformer_src.conformer import VARIANTS, Conformer
from conformer_src.weights import mmpretrain_name, official_name


@cache
def _names() -> dict[str, str]:
    """Return OpenMMLab's name for each of the authors' 718."""
    with torch.device("meta"):
        own = Conformer(VARIANTS["conformer_tiny_patch16"]).state_dict()
    return {official_name(name): mmpretrain_name(name) for name in own}


def _fault(theirs: str, given: object, right: str) -> str:
    """Say which rule a wrong name breaks."""
    if not isinstance(given, str):
        return f"return a name, a str, not a {type(given).__name__}"
    if given == right.partition(".")[2]:
        return f"{right.partition('.')[0]}. is missing in front"
    start, _, rest = given.partition(".")
    expected, _, right_rest = right.partition(".")
    if start != expected and rest == right_rest:
        return f"the names of {'the heads' if expected == 'head' else 'all but the heads'} " + (
            f"start with {expected}., not {start}."
        )
    if rest == theirs and ".norm" in theirs and theirs != right_rest:
        return "norm1 and norm2 of a transformer block are ln1 and ln2"
    if ".mlp." in theirs:
        layer = "fc1 is ffn.layers.0.0" if ".fc1." in theirs else "fc2 is ffn.layers.1"
        kept = " (the word mlp goes)" if ".mlp." in given else ""
        return f"mlp.{layer}{kept}"
    if theirs.startswith("trans_norm"):
        return "trans_norm keeps its name: only norm1 and norm2 of the blocks change"
    return f"{theirs} became {given}, but must be {right}"


@exercise
def check_name(answer: Callable[[str], str]) -> str:
    """Check a map from the authors' names to OpenMMLab's, and name each rule that is broken."""
    right = _names()
    faults = {
        _fault(theirs, given, expected): theirs
        for theirs, expected in reversed(right.items())
        if (given := answer(theirs)) != expected
    }
    wrong = [f"{fault} ({theirs})" for fault, theirs in reversed(faults.items())]
    more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    require(not wrong, f"{'; '.join(wrong[:4])}{more}")
    return f"all {len(right)} names are OpenMMLab's"


def _state(names: Iterable[str]) -> dict[str, Tensor]:
    shapes = {"a.weight": (6, 4, 1, 1), "a.bias": (6,), "bn.num_batches_tracked": ()}
    return {name: torch.zeros(shapes.get(name, (3,))) for name in names}


def _sorted(value: object) -> tuple[list[str], ...]:
    """Return the three lists sorted, or refuse what is no three collections of names."""
    three = isinstance(value, list | tuple) and len(value) == 3
    collections = three and all(isinstance(part, list | tuple | set) for part in value)
    names = collections and all(isinstance(name, str) for part in value for name in part)
    require(bool(names), "return three lists of names: missing, spare, of another shape")
    return tuple(sorted(part) for part in value)


@exercise
def check_differences(
    answer: Callable[
        [Mapping[str, Tensor], Mapping[str, Tensor]], tuple[list[str], list[str], list[str]]
    ],
) -> str:
    """Check the comparison of a model's tensors with a file's."""
    own = _state(["a.weight", "a.bias", "bn.num_batches_tracked", "norm1.weight", "norm2.weight"])
    require(
        _sorted(answer(own, dict(own))) == ([], [], []),
        "a state dict differs from itself, by your account",
    )
    theirs = _state(["a.weight", "a.bias", "bn.num_batches_tracked", "ln1.weight", "norm2.weight"])
    missing, spare, misshaped = _sorted(answer(own, theirs))
    require(
        (missing, spare) != (["ln1.weight"], ["norm1.weight"]),
        "missing and spare are exchanged: missing is what the model has and the file has not",
    )
    require(missing == ["norm1.weight"], f"missing is {missing}; expected ['norm1.weight']")
    require(spare == ["ln1.weight"], f"spare is {spare}; expected ['ln1.weight']")
    require(misshaped == [], f"{misshaped} are called misshaped, but no shape differs")
    theirs = {**own, "norm1.weight": torch.zeros(4)}
    misshaped = _sorted(answer(own, theirs))[2]
    require(misshaped == ["norm1.weight"], "(3,) and (4,) are not told apart: compare the shapes")
    turned = {**own, "a.weight": torch.zeros(4, 6, 1, 1), "bn.num_batches_tracked": torch.zeros(1)}
    misshaped = _sorted(answer(own, turned))[2]
    require(
        misshaped == ["a.weight", "bn.num_batches_tracked"],
        "as many numbers are not the same shape: (6, 4, 1, 1) is not (4, 6, 1, 1), () is not (1,)",
    )
    prefixed = {f"module.{name}": tensor for name, tensor in own.items()}
    require(
        _sorted(answer(own, prefixed)) == ([], [], []),
        "module. in front of the file's names is no difference: strip it",
    )
    inside = _state(["module.weight", "a.module.bias"])
    require(
        _sorted(answer(inside, {f"module.{name}": tensor for name, tensor in inside.items()}))
        == ([], [], []),
        "strip one module. at the front, and leave those that belong to a name",
    )
    return "missing, spare and misshaped tensors are all found"


_PATCH = "trans_patch_conv.weight"
_WRONG_NAMES = {
    "trans_patch_conv.bias": "a bias has one number for each output channel, whatever the kernel",
    "cls_token": "the class token is as wide as any token, and belongs to no patch",
    "squeeze_block": "the convolutions of the coupling are 1 x 1: stride changes, weights do not",
    "pos_embed": "this network has no positional embedding",
}


def _shapes(name: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        state = Conformer(VARIANTS[name]).state_dict()
    return {official_name(key): tensor.shape for key, tensor in state.items()}


@exercise
def check_prediction(answer: Callable[[], tuple[set[str], int]]) -> str:
    """Check which tensors change with the patch size, and how many parameters are added."""
    given = answer()
    pair = isinstance(given, list | tuple) and len(given) == 2
    require(pair, "return a set of names and a number")
    names, more = given
    named = isinstance(names, set | list | tuple) and all(isinstance(name, str) for name in names)
    require(named, "return the names as a set of strings")
    require(type(more) is int, f"the parameters are {more!r}; return a whole number")
    before, after = (_shapes(f"conformer_small_patch{patch}") for patch in (16, 32))
    right = {name for name in before if before[name] != after[name]}
    for name in sorted(set(names) - right):
        fault = next((why for part, why in _WRONG_NAMES.items() if part in name), None)
        known = "its shape does not change" if name in before else "the authors have no such name"
        require(False, f"{name} is wrong: {fault or known}")
    require(set(names) == right, "a tensor is missing: which layer is as large as a patch?")
    expected = after[_PATCH].numel() - before[_PATCH].numel()
    wide, side = before[_PATCH][0], 32**2 - 16**2
    mistakes = {
        -expected: "the larger patch needs more parameters, not fewer",
        after[_PATCH].numel(): "that is the whole tensor at patch 32; subtract the one at 16",
        wide * 64 * side: "the kernel counts positions of the stem's maps, P / 4, not pixels",
        wide * 3 * side: "the patch embedding reads the stem's 64 channels, not the image's 3",
        wide * 3 * (8**2 - 4**2): "the patch embedding reads the stem's 64 channels, not 3",
        wide * 64 * (8 - 4): "the kernel has P / 4 positions in each of two directions",
    }
    require(more not in mistakes, f"{more:,}: {mistakes.get(more)}")
    require(more == expected, f"{more:,} is wrong: multiply out channels, in channels and kernel")
    return "one tensor changes, by as many parameters as the two cards differ"
