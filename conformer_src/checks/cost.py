"""Checks of the exercises of chapter 13, cost."""

from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from conformer_src.checks import exercise, require


def _whole(value: object) -> bool:
    return isinstance(value, int) and type(value) is not bool


def _named(value: object, mistakes: dict[str, object]) -> str | None:
    """Return the first mistake that gives this value."""
    return next((words for words, wrong in mistakes.items() if value == wrong), None)


class _Unrun(nn.Conv2d):
    """A convolution to be counted, not run."""

    def forward(self, *_):
        require(False, "count without running the convolution: its sizes say all")


@exercise
def check_layer(answer: Callable[[nn.Conv2d, int, int], tuple[int, int]]) -> str:
    """Check the parameters and the multiply-accumulates of a convolution."""
    layers = [
        _Unrun(16, 16, 3, padding=1, bias=False),
        _Unrun(64, 384, 4, stride=4),
        _Unrun(8, 24, 3, stride=2, padding=1, groups=4),
        _Unrun(8, 16, (1, 3), padding=(0, 1)),
    ]
    for conv in layers:
        for height, width in ((16, 16), (12, 20)):
            given = answer(conv, height, width)
            pair = isinstance(given, tuple | list) and len(given) == 2
            require(pair and all(map(_whole, given)), "return two whole numbers: parameters, MACs")
            where = f" ({conv}, maps of {height} x {width})"
            _require_parameters(conv, given[0], where)
            _require_macs(conv, height, width, given[1], where)
    return "parameters and MACs of each layer, with strides, groups and biases"


def _require_parameters(conv: nn.Conv2d, given: int, where: str) -> None:
    right, bias = sum(part.numel() for part in conv.parameters()), conv.out_channels
    weights = conv.weight.numel()
    mistakes = {
        "the bias has parameters too, one for each channel that comes out": weights,
        "this convolution has no bias: it stands in front of a BatchNorm": weights + bias,
        "with groups, a channel reads only in_channels / groups channels": (
            weights * conv.groups + (right - weights)
        ),
    }
    if given != right:
        words = _named(given, mistakes) or f"{given:,}; expected {right:,}"
        require(False, f"parameters: {words}{where}")


def _require_macs(conv: nn.Conv2d, height: int, width: int, given: int, where: str) -> None:
    right = nn.Conv2d.forward(conv, torch.empty(1, conv.in_channels, height, width)).numel()
    right *= conv.weight[0].numel()
    kernel = conv.weight[0].numel()
    positions = right // kernel // conv.out_channels
    mistakes = {
        "these are operations: a multiplication and its addition count as one": 2 * right,
        "adding the bias is no multiplication: leave it out": (
            right + conv.out_channels * positions
        ),
        "with groups, a channel reads only in_channels / groups channels": right * conv.groups,
        "that counts every position of the map that comes in; the stride leaves fewer": (
            kernel * conv.out_channels * height * width
        ),
        "that is one position; a kernel works at each position that comes out": right // positions,
        "that takes the height for both sides": right // positions * (positions * height // width),
        "that takes the width for both sides": right // positions * (positions * width // height),
    }
    if given != right:
        words = _named(given, mistakes) or f"{given:,}; expected {right:,}"
        require(False, f"MACs: {words}{where}")


def _crossing(patch_size: int, tokens: float, class_token: int = 1) -> int:
    """Return the first side whose patches, with the class token, are more than so many tokens."""
    grid = 1
    while grid**2 + class_token <= tokens:
        grid += 1
    return grid * patch_size


@exercise
def check_crossing(answer: Callable[[int, int, int, float], int]) -> str:
    """Check the image side from which the attention products outweigh the linear maps."""
    cases = [
        (576, 9, 16, 4.0),
        (384, 6, 32, 4.0),
        (48, 3, 16, 4.0),
        (384, 6, 16, 2.0),
        (65, 5, 16, 3.0),
    ]
    for embed_dim, heads, patch, ratio in cases:
        given = answer(embed_dim, heads, patch, ratio)
        right = _crossing(patch, (2 + ratio) * embed_dim)
        where = f" (embed_dim {embed_dim}, {heads} heads, patch {patch}, mlp_ratio {ratio:g})"
        mistakes = {
            "at that side the two cost the same; look for more": (
                _crossing(patch, (2 + ratio) * embed_dim - 1)
            ),
            "that is the side of the grid in patches; a patch is patch_size pixels wide": (
                right // patch
            ),
            "the class token looks too: N is 1 + patches": (
                _crossing(patch, (2 + ratio) * embed_dim, 0)
            ),
            "the heads share the width, h times E / h: their number does not matter": (
                _crossing(patch, (2 + ratio) * embed_dim / heads)
            ),
            "all heads work, not one: h times N x N x E / h": (
                _crossing(patch, (2 + ratio) * embed_dim * heads)
            ),
            "attention has two products: queries with keys, and weights with values": (
                _crossing(patch, 2 * (2 + ratio) * embed_dim)
            ),
            "the MLP is a linear map too": _crossing(patch, 2 * embed_dim),
            "attention has four linear maps of E x E: three for qkv, and one behind it": (
                _crossing(patch, (1.5 + ratio) * embed_dim)
            ),
            "the MLP has two layers, there and back": _crossing(patch, (2 + ratio / 2) * embed_dim),
            "the hidden width is mlp_ratio x E, not always 4 x E": _crossing(patch, 6 * embed_dim),
        }
        if given != right:
            words = _named(given, mistakes) or f"{given}; expected {right}"
            require(False, f"{words}{where}")
    return "the side from which tokens cost more to compare than to transform"


class _Staged(nn.Module):
    """A model whose time is known: it moves a clock of its own."""

    def __init__(self, rounds: Sequence[float]) -> None:
        super().__init__()
        self.rounds, self.now = rounds, 0.0
        self.taken: list[float] = []  # seconds of each call
        self.modes: list[tuple[bool, bool]] = []

    def clock(self) -> float:
        """Return the time in seconds."""
        return self.now

    def forward(self, images: Tensor) -> Tensor:
        """Take as long as the plan says; return the images."""
        self.modes.append((self.training, torch.is_grad_enabled()))
        self.taken.append(self.rounds[min(len(self.taken), len(self.rounds) - 1)])
        self.now += self.taken[-1]
        return images


@exercise
def check_stopwatch(answer: Callable[[nn.Module, Tensor, int, Callable[[], float]], float]) -> str:
    """Check a function that measures the seconds of a forward pass, and name what it does wrong."""
    rounds = [9.0, 1.0, 1.25, 8.0, 1.5, 1.125]  # the first call warms up, one is disturbed
    model = _Staged(rounds).train()
    given = answer(model, torch.zeros(2, 3, 4, 4), 5, model.clock)
    number = isinstance(given, int | float) or (isinstance(given, Tensor) and given.numel() == 1)
    require(number, f"return one number of seconds, not a {type(given).__name__}")
    taken = model.taken
    require(len(taken) >= 5, f"the model is called {len(taken)} times, but 5 rounds are asked for")
    trained, recorded = (any(mode[n] for mode in model.modes) for n in (0, 1))
    faults = []
    if trained:
        faults.append("the model is in training mode: call .eval() first")
    if recorded:
        faults.append("gradients are recorded: wrap the calls in torch.inference_mode()")
    if len(taken) == 5 or given in (median(taken), sum(taken), sum(taken) / len(taken)):
        faults.append("the first call warms up and must not count: call once before you measure")
    if given in (sum(taken) / len(taken), sum(taken[-5:]) / 5):
        faults.append("one disturbed round moves a mean: take the median")
    if given in (sum(taken), sum(taken[-5:])):
        faults.append("that is the time of all rounds; a median of single rounds is expected")
    if given == min(taken):
        faults.append("the fastest round is luck: take the median")
    require(not faults, "; ".join(faults))
    right = median(taken[-5:])
    require(given == right, f"{given:g} s; the median of the rounds is {right:g} s")
    require(model.training, "leave the model in the mode in which it came, here in training mode")
    model = _Staged(rounds).eval()
    answer(model, torch.zeros(2, 3, 4, 4), 5, model.clock)
    require(not model.training, "leave the model in the mode in which it came, here in evaluation")
    return "warmed up, without gradients, in evaluation mode, and robust"
