"""What the network costs: counted, measured, and lowered without changing what it computes.

The letters are those of the book: B batch, N tokens, E embedding width, s stride. A *part* is a
module that does one thing, such as `blocks.3.conv_block` or `conv_head`. Whatever is measured here
gets its mode and its running statistics back.
"""

import copy
import gc
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conformer_src.attention import Attention, require_tokens, scaled_dot_product, split_heads
from conformer_src.conformer import Conformer, ConvHead, TransHead, _statistics_stand
from conformer_src.conv_block import _require_maps
from conformer_src.fcu import FCUDown, FCUUp, _require_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Names of a convolution and of the BatchNorm that follows it, within one module.
_FOLDS = (
    ("conv1", "bn1"),
    ("conv2", "bn2"),
    ("conv3", "bn3"),
    ("residual_conv", "residual_bn"),
    ("conv_project", "bn"),
)


def part_of(name: str) -> str:
    """Return the part that a module belongs to: `blocks.3.up.bn` belongs to `blocks.3.up`."""
    steps = name.split(".")
    return ".".join(steps[: {"blocks": 3, "entry": 2}.get(steps[0], 1)])


def block_of(name: str) -> str:
    """Return where a module stands: "entry", the number of its block from 1, or "heads"."""
    first, *rest = name.split(".")
    if first == "blocks":
        return str(int(rest[0]) + 1)
    return first if first == "entry" else "heads"


_BRANCHES = {"entry": "CNN", "stem": "CNN", "token_embed": "transformer"}


def branch_of(name: str) -> str:
    """Return "CNN" (stem and its head included), "transformer" (likewise), or "FCU"."""
    kind = part_of(name).split(".")[-1]
    if kind in _BRANCHES:
        return _BRANCHES[kind]
    if kind.startswith("trans"):
        return "transformer"
    return "CNN" if kind in ("conv_block", "med_block", "fusion_block", "conv_head") else "FCU"


# What each way of counting adds up, and how often: as in the paper, as the library fvcore, as on
# OpenMMLab's page, convolutions and linear maps alone; the last is what this package computes.
_LAYERS = {"conv": 1, "order": 1, "linear": 1, "head": 1}
_PAPER = _LAYERS | {"attention": 1}
_OPENMMLAB = {"conv": 1, "order": 1, "linear": 1, "bias": 1, "relu": 1, "pool": 1, "mean": 1}
WAYS = {
    "paper": _PAPER,
    "fvcore": _PAPER | {"batchnorm": 2, "layernorm": 5, "upsample": 1, "mean": 1},
    "openmmlab": _OPENMMLAB | {"batchnorm": 2, "layernorm": 2},
    "layers": _LAYERS,
    "ours": {"conv": 1, "linear": 1, "head": 1, "attention": 1},
}


class Cost(NamedTuple):
    """What a module learns and does itself; what its children do is theirs."""

    name: str
    parameters: int
    counts: Counter  # of each kind of operation: see `kinds_of`; and "bytes" read and written

    def macs(self, way: str = "paper") -> int:
        """Return the multiply-accumulates in one of the `WAYS` of counting."""
        if way not in WAYS:
            raise ValueError(f"there is no way of counting {way!r}; choose {', '.join(WAYS)}.")
        return sum(times * self.counts[kind] for kind, times in WAYS[way].items())


def kinds_of(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> dict[str, int]:
    """Return the operations in one call of a module, by kind; those of its children are theirs."""
    match module:
        case nn.Conv2d():
            biases = output.numel() * (module.bias is not None)
            return {"conv": output.numel() * module.weight[0].numel(), "bias": biases}
        case nn.Module(in_features=int()):  # linear maps, of 8 bits or more
            return {"head" if "head" in name else "linear": output.numel() * module.in_features}
        case Attention():  # two products: N numbers for each entry of (B, N, E)
            return {"attention": 2 * output.numel() * output.shape[1]}
        case nn.BatchNorm2d() | nn.SyncBatchNorm():  # the shortcut's has no ReLU of its own
            relus = output.numel() * (not name.endswith("residual_bn"))
            return {"batchnorm": output.numel(), "relu": relus}
        case nn.LayerNorm():
            return {"layernorm": output.numel()}
        case TransHead():  # the authors normalise all tokens, not only the first
            return {"layernorm": inputs[0][:, 1:].numel()}
        case ConvHead() | nn.MaxPool2d():
            return {"mean" if isinstance(module, ConvHead) else "pool": inputs[0].numel()}
        case FCUUp():
            return {"upsample": output.numel()}
    return _order(module, inputs[0], output) if isinstance(module, FCUDown) else {}


def _order(down: FCUDown, maps: Tensor, output: Tensor) -> dict[str, int]:
    """Return what the authors' order costs more: they project every position, and pool then."""
    if not isinstance(down.sample, nn.AvgPool2d | nn.Identity):
        return {}  # ours alone: there is no authors' order
    width, chans = down.conv_project.weight.shape[:2]
    positions, patches = maps[:, 0].numel(), output[:, 1:, 0].numel()
    more = 0 if isinstance(down, _ProjectThenPool) else (positions - patches) * width
    return {"order": more * chans, "bias": more, "pool": positions * width}


@contextmanager
def _watched(model: nn.Module, enter: Callable, leave: Callable) -> Iterator[None]:
    """Call `enter(name, module, inputs)` before each module runs, and `leave` after it."""
    if hasattr(model, "_orig_mod"):
        raise ValueError("a compiled model runs as one piece; give the model as it was before.")
    handles = []
    for name, part in model.named_modules():
        handles.append(part.register_forward_pre_hook(partial(_told, enter, name)))
        handles.append(part.register_forward_hook(partial(_told, leave, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _told(watcher: Callable, *news: object) -> None:
    """Pass on what a hook says; what it returned itself would take the place of the output."""
    watcher(*news)


@contextmanager
def _in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put a model into training or evaluation mode for a while; nothing of it changes for good."""
    modes = [(part, part.training) for part in model.modules()]
    try:
        with _statistics_stand(model), torch.random.fork_rng(), torch.set_grad_enabled(training):
            model.train(training)
            yield
    finally:
        for part, mode in modes:
            part.training = mode


class _Traffic(TorchDispatchMode):
    """Reports the bytes that each operation reads and writes; views touch nothing."""

    def __init__(self, report: Callable[[int], None]) -> None:
        super().__init__()
        self.report = report

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if not func.is_view and "unsafe_view" not in func.name():
            tensors = [each for each in tree_leaves((args, kwargs, output)) if _is_tensor(each)]
            self.report(sum(tensor.nbytes for tensor in tensors))
        return output


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def count_costs(model: Conformer, images: Tensor) -> list[Cost]:
    """Return what each module costs for these images (B, in_chans, H, W), in the order of names.

    Nothing is computed and the model stays as it is: shapes alone run through it.
    """
    counts = {name: Counter() for name, _ in model.named_modules()}
    running = []

    def leave(name, module, inputs, output):
        counts[running.pop()].update(kinds_of(name, module, inputs, output))
        if type(module) is Attention:  # fused: the weights (B, h, N, N) are never stored
            counts[name]["bytes"] = 4 * output.nbytes

    named = [*model.named_parameters(), *model.named_buffers()]
    shapes = {name: tensor.detach().to("meta") for name, tensor in named}
    watched = _watched(model, lambda name, *_: running.append(name), leave)
    traffic = _Traffic(lambda count: counts[running[-1]].update(bytes=count))
    with _in_mode(model, False), watched, torch.device("meta"):
        inputs = images.to("meta")
        with traffic:
            functional_call(model, shapes, (inputs,))
    learned = {n: sum(p.numel() for p in m.parameters(False)) for n, m in model.named_modules()}
    return [Cost(n, learned[n], counts[n]) for n in counts if learned[n] or counts[n].total()]


def sum_costs(costs: Iterable[Cost], by: Callable[[str], object]) -> dict[object, Counter]:
    """Add up "parameters", "bytes" and each of the `WAYS`, by `part_of`, `branch_of`, etc."""
    sums: dict[object, Counter] = {}
    for cost in costs:
        found = {way: cost.macs(way) for way in WAYS}
        found |= {"parameters": cost.parameters, "bytes": cost.counts["bytes"]}
        sums.setdefault(by(cost.name), Counter()).update(found)
    return sums


def race(
    forms: Mapping[str, Callable], rounds: int = 5, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Return the seconds of each form in each round.

    The forms take turns, forwards and backwards, so that whatever else the machine does hits all
    of them; the first round does not count. The clock `time.process_time` leaves others' work out.
    """
    _require_rounds(rounds, 2)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    gc.collect()
    for number in range(rounds + 1):
        for name, run in list(forms.items())[:: 1 if number % 2 else -1]:
            start = _now(clock)
            run()
            if number:
                seconds[name].append(_now(clock) - start)
    return seconds


def _require_rounds(rounds: int, least: int) -> None:
    """Raise a `ValueError` for too few rounds."""
    if rounds < least:
        raise ValueError(f"{rounds} rounds are too few to tell; choose at least {least}.")


def _now(clock: Callable[[], float] = time.perf_counter) -> float:
    """Read the clock once the accelerator, if there is one, has finished."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return clock()


class Gain(NamedTuple):
    """How a form did in a race against the first."""

    seconds: float  # the median
    ratio: float  # first over this, the median of the rounds' own ratios: above 1 is faster
    spread: float  # of these ratios: half the range of their middle half


def gains(seconds: Mapping[str, list[float]]) -> dict[str, Gain]:
    """Sum up a race; both times of a ratio come from one round."""
    first, found = next(iter(seconds.values())), {}
    for name, times in seconds.items():
        low, ratio, high = statistics.quantiles(
            [before / after for before, after in zip(first, times, strict=True)], method="inclusive"
        )
        found[name] = Gain(statistics.median(times), ratio, (high - low) / 2)
    return found


def fit_exponent(sizes: Iterable[float], costs: Iterable[float]) -> float:
    """Return k of the power law cost = c size^k that fits best: a slope between logarithms."""
    pairs = list(zip(sizes, costs, strict=True))
    if len({size for size, _ in pairs}) < 2 or min(min(pair) for pair in pairs) <= 0:
        raise ValueError("an exponent needs two different sizes, and sizes and costs above 0.")
    logs = [[math.log(value) for value in values] for values in zip(*pairs, strict=True)]
    return statistics.linear_regression(*logs).slope


class Growth(NamedTuple):
    """How the cost of a forward pass grows with a size."""

    sizes: list[float]
    macs: list[int]
    seconds: list[float]  # the shortest of the rounds
    predicted: float  # exponent of the multiply-accumulates
    measured: float  # exponent of the seconds


def measure_growth(
    cases: Mapping[float, tuple[Conformer, Tensor]],
    rounds: int = 3,
    clock: Callable = time.perf_counter,
) -> Growth:
    """Race one model and its images (B, in_chans, H, W) for each size."""
    counted = [count_costs(*case) for case in cases.values()]
    macs = [sum(cost.macs("ours") for cost in costs) for costs in counted]
    forms = {size: partial(run, *case) for size, case in cases.items()}
    seconds = [min(times) for times in race(forms, rounds, clock).values()]
    exponents = fit_exponent(cases, macs), fit_exponent(cases, seconds)
    return Growth(list(cases), macs, seconds, *exponents)


def run(model: nn.Module, images: Tensor, bfloat16: bool = False) -> tuple:
    """Run a model once on images (B, in_chans, H, W) as it is, without gradients."""
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, bfloat16):
        return model(images)


class Timing(NamedTuple):
    """What a part took in one forward pass; what the parts within it took is theirs."""

    part: str
    seconds: float
    bytes: int  # that it asked for and did not give back


def time_parts(
    model: Conformer, images: Tensor, rounds: int = 3, training: bool = False
) -> list[Timing]:
    """Return time and memory of each part for images (B, in_chans, H, W), by `torch.profiler`.

    Each part has the shortest time of several forward passes. With `training`, they are passes that
    a backward pass could follow, so that most bytes are those that autograd keeps.
    """
    _require_rounds(rounds, 1)
    with _in_mode(model, training), _ranges(model):
        passes = [_profiled(model, images) for _ in range(rounds + 1)][1:]  # the first warms up
    same_part = zip(*passes, strict=True)
    return [min(timings, key=lambda timing: timing.seconds) for timings in same_part]


@contextmanager
def _ranges(model: nn.Module) -> Iterator[None]:
    """Let the profiler see where each part begins and ends."""
    running = []

    def enter(name, *_):
        if name == part_of(name) != "":
            running.append(record_function(f"part {name}"))
            running[-1].__enter__()

    def leave(name, *_):
        if name == part_of(name) != "":
            running.pop().__exit__(None, None, None)

    with _watched(model, enter, leave):
        yield


def _profiled(model: Conformer, images: Tensor) -> list[Timing]:
    """Return what each part of one forward pass took, read from the profiler's ranges."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler reports on itself
    on_cpu = images.device.type == "cpu"
    activities = [ProfilerActivity.CPU] if on_cpu else None  # None: all that there are
    with profile(activities=activities, profile_memory=True) as profiler:
        output = model(images)
        _now()
    del output
    found = {}
    for event in profiler.events():
        if event.name.startswith("part ") and event.device_type.name == "CPU":
            took = event.cpu_time_total if on_cpu else event.device_time_total
            asked = event.cpu_memory_usage if on_cpu else event.device_memory_usage
            found[event.name.removeprefix("part ")] = took / 1e6, asked
    own = {name: list(values) for name, values in found.items()}
    for name, values in found.items():
        around = next((outer for outer in _around(name) if outer in own), None)
        if around is not None:
            own[around] = [a - b for a, b in zip(own[around], values, strict=True)]
    return [Timing(name, *values) for name, values in own.items()]


def _around(name: str) -> Iterator[str]:
    """Give the names of the modules that a module is in, from the innermost."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def kept_bytes(model: Conformer, images: Tensor) -> Counter:
    """Return the bytes that each part keeps for the backward pass of a training step.

    What several parts keep is counted for the first; parameters are not counted. With
    checkpointing, what enters the blocks belongs to no part: its name is "".
    """
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept, running, alive = Counter(), [], []  # alive: else a freed address could come back

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            kept[part_of(running[-1])] += storage.nbytes()
            alive.append(tensor)
        return tensor

    watched = _watched(model, lambda name, *_: running.append(name), lambda *_: running.pop())
    with _in_mode(model, True), watched, saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    return kept


class Limits(NamedTuple):
    """What a device can do in a second, as far as one large operation shows it."""

    macs: float  # multiply-accumulates: a product of two square matrices
    bytes: float  # read and written: a copy


def machine_limits(
    device: torch.device | str = "cpu", side: int = 2048, clock: Callable = time.perf_counter
) -> Limits:
    """Measure how fast a device multiplies matrices of this side, and copies 16 of them."""
    matrix = torch.randn(side, side, device=device)
    source, target = (matrix.repeat(16, 1, 1) for _ in range(2))
    forms = {"product": lambda: matrix @ matrix, "copy": lambda: target.copy_(source)}
    product, copying = (min(seconds) for seconds in race(forms, clock=clock).values())
    return Limits(side**3 / product, 2 * source.nbytes / copying)


class Roof(NamedTuple):
    """How far a part is from the machine's limit (Williams, Waterman and Patterson 2009)."""

    part: str
    intensity: float  # multiply-accumulates for each byte read or written
    reached: float  # multiply-accumulates in a second
    roof: float  # what would be possible: by arithmetic, or by memory if that is less


def roofline(costs: Iterable[Cost], timings: Iterable[Timing], limits: Limits) -> list[Roof]:
    """Compare the parts that multiply with what the machine could do.

    The bytes are those that the operations read and write one by one. A cache may spare some of
    them, so that a part can come out above its roof.
    """
    sums, roofs = sum_costs(costs, part_of), []
    for part, seconds, _ in timings:
        macs = sums[part]["ours"] if part in sums else 0
        if macs and seconds > 0:
            intensity = macs / sums[part]["bytes"]
            roof = min(limits.macs, intensity * limits.bytes)
            roofs.append(Roof(part, intensity, macs / seconds, roof))
    return roofs


_COLOURS = {"CNN": "#1f5f99", "transformer": "#b45309", "FCU": "#2f7d4f"}


def plot_roofline(roofs: Iterable[Roof], limits: Limits, axes: "Axes | None" = None) -> "Axes":
    """Draw each part under the machine's roof, both axes logarithmic."""
    import matplotlib.pyplot as plt  # here, so that importing the package stays quick

    axes, roofs = axes or plt.subplots(figsize=(7, 4), layout="constrained")[1], list(roofs)
    for branch, colour in _COLOURS.items():
        own = [roof for roof in roofs if branch_of(roof.part) == branch]
        heights = [roof.reached / 1e9 for roof in own]
        axes.scatter([roof.intensity for roof in own], heights, color=colour, label=branch, s=18)
    ridge = limits.macs / limits.bytes  # from here on arithmetic is the limit
    left, right = (edge(ridge, *(roof.intensity for roof in roofs)) for edge in (min, max))
    corners = [left / 2, ridge, right * 2]
    roof = [min(limits.macs, intensity * limits.bytes) / 1e9 for intensity in corners]
    axes.plot(corners, roof, color="#1a1a1a", label="the machine")
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="MACs for each byte", ylabel="billion MACs in a second")
    axes.legend()
    return axes


def plot_blocks(values: Mapping[str, float], label: str, axes: "Axes | None" = None) -> "Axes":
    """Draw the values of parts or modules, by name, as stacked bars: blocks and branches."""
    import matplotlib.pyplot as plt  # here, so that importing the package stays quick

    axes = axes or plt.subplots(figsize=(7, 3), layout="constrained")[1]
    sums = Counter()
    for name, value in values.items():
        sums[block_of(name), branch_of(name)] += value
    blocks = sorted({block_of(name) for name in values}, key=_place)
    below = [0.0] * len(blocks)
    for branch, colour in _COLOURS.items():
        heights = [sums[block, branch] for block in blocks]
        axes.bar(blocks, heights, bottom=below, color=colour, label=branch)
        below = [sum(pair) for pair in zip(below, heights, strict=True)]
    axes.set(xlabel="block", ylabel=label)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    return axes


def _place(block: str) -> float:
    """Return what sorts blocks as they run."""
    return {"entry": -1, "heads": math.inf}.get(block) or float(block)


class _ProjectThenPool(FCUDown):
    """The authors' order: project each position of the maps, and pool then (chapter 4)."""

    def forward(self, maps: Tensor, tokens: Tensor) -> Tensor:
        """Turn maps (B, C, H, W) into an update (B, N, E) of the tokens, as `FCUDown` does."""
        _require_maps(maps, self.conv_project.in_channels)
        require_tokens(tokens, self.conv_project.out_channels)
        _require_grid(maps, tokens, self.stride)
        if not isinstance(self.sample, nn.AvgPool2d):
            return super().forward(maps, tokens)  # other ways of shrinking come first
        patches = self.sample(self.conv_project(maps))  # (B, E, H / s, W / s)
        patches = F.gelu(self.ln(rearrange(patches, "b e g h -> b (g h) e")))
        return torch.cat([tokens[:, :1], patches], dim=1)


class _WrittenAttention(Attention):
    """Attention that stores its weights (B, h, N, N) on the way; for evaluation, no dropout."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Let each token look at all: (B, N, E) -> (B, N, E)."""
        require_tokens(tokens, self.proj.in_features)
        mixed, _ = scaled_dot_product(*split_heads(self.qkv(tokens), self.num_heads))
        return self.proj_drop(self.proj(rearrange(mixed, "b h n d -> b n (h d)")))


_WRITTEN = {FCUDown: _ProjectThenPool, Attention: _WrittenAttention}


def _as_written(model: nn.Module, forms: Mapping[type, type] = _WRITTEN) -> nn.Module:
    """Return a copy for evaluation that computes the same in the forms of the paper.

    Args:
        model: A Conformer, or a part of one.
        forms: Class of a part -> class that takes its place, with the same parameters.
    """
    written = copy.deepcopy(model).eval().requires_grad_(False)
    for part in written.modules():
        part.__class__ = forms.get(type(part), type(part))
    return written.to(memory_format=torch.contiguous_format)


def exact_forms(model: nn.Module) -> dict[str, nn.Module]:
    """Return copies for evaluation that compute the same: as written, and what makes them cheaper.

    Each rewrite stands alone; the last form has all four.
    """
    return {
        "as written": _as_written(model),
        "pooled first": _as_written(model, {Attention: _WrittenAttention}),
        "fused attention": _as_written(model, {FCUDown: _ProjectThenPool}),
        "folded norms": fold_norms(_as_written(model)),
        "channels last": _as_written(model).to(memory_format=torch.channels_last),
        "all four": optimize_for_inference(model, compile=False),
    }


def fold_norms(module: nn.Module) -> nn.Module:
    """Multiply each BatchNorm into the convolution before it, in place, and return the module.

    What it computes stays the same, to rounding.

    Raises:
        ValueError: A BatchNorm is in training mode; nothing was folded.
    """
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    if any(norm.training for norm in norms):
        raise ValueError(
            "a module in training mode cannot be folded, because its BatchNorms still measure each "
            "batch; call .eval() first."
        )
    for part in module.modules():
        for conv, norm in _FOLDS:
            if isinstance(getattr(part, norm, None), nn.BatchNorm2d):
                setattr(part, conv, fuse_conv_bn_eval(getattr(part, conv), getattr(part, norm)))
                setattr(part, norm, nn.Identity().eval())
    return module


def optimize_for_inference(model: nn.Module, compile: bool = True) -> nn.Module:
    """Return a copy that computes the same faster, and can no longer be trained.

    Its BatchNorms are folded and its memory format is channels_last. With `compile`, the first call
    for each shape of images takes about a minute and needs a C++ compiler.
    """
    fast = fold_norms(copy.deepcopy(model).eval()).requires_grad_(False)
    fast = fast.to(memory_format=torch.channels_last)
    return torch.compile(fast) if compile else fast


class Int8Linear(nn.Module):
    """A linear map with weights of 8 bits; its inputs are rounded to 8 bits while it runs.

    Each row of the weights and each token is divided by a step of its own, so that its largest
    value becomes 127. The products are exact whole numbers; only the two roundings lose something.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, steps = to_int8(linear.weight.detach())  # (out, in), (out, 1)
        self.register_buffer("weight", weight)
        self.register_buffer("steps", steps[:, 0])
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        rounded, steps = to_int8(tokens.flatten(0, -2))
        products = torch._int_mm(rounded, self.weight.t())  # int32
        output = products * steps * self.steps  # the steps of tokens, then of rows
        output = output if self.bias is None else output + self.bias
        return output.unflatten(0, tokens.shape[:-1]).to(tokens.dtype)


def to_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of (R, C) to whole numbers from -127 to 127; return them and steps (R, 1)."""
    steps = values.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (values / steps).round().to(torch.int8), steps


def quantize_linears(model: nn.Module) -> nn.Module:
    """Return a copy for evaluation whose transformer blocks multiply numbers of 8 bits.

    It computes *nearly* the same. Convolutions and heads keep their numbers.
    """
    small = copy.deepcopy(model).eval().requires_grad_(False)
    for name, linear in list(small.named_modules()):
        if isinstance(linear, nn.Linear) and "head" not in name:
            small.set_submodule(name, Int8Linear(linear))
    return small
