"""Measure this package's Conformer against OpenMMLab's, on equal weights and images.

    make bench                                          everything; about half an hour
    .venv-peers/bin/python benchmarks/against_mmpretrain.py --models tiny --skip-compiled

Both networks live in one process and take turns, so that whatever else the machine does hits both.
Before anything is timed, their outputs are compared. The result is a table of ratios, peer over
ours: above 1, ours is better. Measure on an idle machine.
"""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conformer_src import create_model, optimize_for_inference
from conformer_src.cost import kept_bytes
from conformer_src.weights import mmpretrain_name

PEERS = {
    "tiny": "conformer-tiny-p16_3rdparty_in1k",
    "small": "conformer-small-p16_3rdparty_in1k",
    "base": "conformer-base-p16_3rdparty_in1k",
}
RESULT = Path(__file__).parent / "results" / "against_mmpretrain.json"


@dataclass
class Row:
    """One comparison: medians, and the ratio peer over ours with the bar that it has to reach."""

    model: str
    what: str
    batch: int
    unit: str
    peer: float
    ours: float
    bar: float | None = None
    ratio: float | None = None  # of times: the median of the rounds' own ratios
    spread: float | None = None  # of these ratios: half the range of the middle half

    def __post_init__(self) -> None:
        """Compare directly what does not vary."""
        if self.ratio is None:
            self.ratio = self.peer / self.ours


def ours(name: str) -> nn.Module:
    """Return our network; its fresh weights depend on the seed alone."""
    torch.manual_seed(0)
    return create_model(f"conformer_{name}_patch16")


def peer(name: str, own: nn.Module | None = None) -> nn.Module:
    """Return OpenMMLab's network without stochastic depth, with our weights if they are given."""
    import logging

    logging.disable(logging.INFO)
    from mmpretrain import get_model

    model = get_model(PEERS[name], backbone={"drop_path_rate": 0.0})
    if own is not None:
        model.load_state_dict({mmpretrain_name(k): v for k, v in own.state_dict().items()})
    return model


def race(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each side: the sides take turns, and the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats + 1):
        gc.collect()
        for name, run in list(sides.items())[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def timed(model: str, what: str, batch: int, seconds: dict, bar: float | None = None) -> Row:
    """Sum up a race between "peer" and "ours".

    Both sides of a round ran one after the other, so what slowed the machine hit both.
    """
    rounds = [p / o for p, o in zip(seconds["peer"], seconds["ours"], strict=True)]
    low, ratio, high = statistics.quantiles(rounds, n=4)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    times = medians["peer"], medians["ours"]
    return Row(model, what, batch, "s", *times, bar, ratio, (high - low) / 2)


def images(batch: int, channels_last: bool = False) -> Tensor:
    """Return the same random images for all."""
    torch.manual_seed(1)
    drawn = torch.randn(batch, 3, 224, 224)
    return drawn.to(memory_format=torch.channels_last) if channels_last else drawn


def forward(model: nn.Module, batch: Tensor, bfloat16: bool = False) -> Callable[[], tuple]:
    """Return a function that runs a model once, without gradients."""

    def run() -> tuple:
        context = torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext()
        with torch.no_grad(), context:
            return model(batch)

    return run


def training_step(model: nn.Module, batch: Tensor, checkpointing: bool = False) -> Callable:
    """Return a function that takes one step: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.05)
    labels = torch.arange(len(batch))

    def run() -> None:
        if checkpointing:
            model.checkpointing = True
        loss = sum(F.cross_entropy(logits, labels) for logits in model(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if checkpointing:
            model.checkpointing = False

    return run


def peak_memory(side: str, name: str, batch: int, threads: int) -> int:
    """Return by how many bytes two training steps raise the peak of this process's memory."""
    torch.set_num_threads(threads)
    model = peer(name) if side == "peer" else ours(name)
    batch_of_images = images(batch, channels_last=side != "peer")
    if side != "peer":
        model = model.to(memory_format=torch.channels_last)
    step = training_step(model.train(), batch_of_images, checkpointing=side == "checkpointed")
    before = high_water()
    step()
    step()
    return high_water() - before


def high_water() -> int:
    """Return the peak of this process's resident memory so far, in bytes; Linux tells."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def in_fresh_process(function: Callable, *arguments: object) -> int:
    """Return what a function returns when nothing has run before it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def deviation(theirs: tuple, own: tuple) -> float:
    """Return the largest difference between two pairs of logits, over their root mean square."""
    pairs = list(zip(theirs, own, strict=True))
    return max(float((t - o).abs().max() / t.square().mean().sqrt()) for t, o in pairs)


def inference_rows(name: str, batch: int, repeats: int, compiled: bool) -> list[Row]:
    """Compare the forward pass in each mode, and at the best of each."""
    own = ours(name).eval()
    other = peer(name, own).eval()
    plain, last = images(batch), images(batch, channels_last=True)
    off = deviation(forward(other, plain)(), forward(own, plain)())
    if off > 1e-5:
        raise SystemExit(f"{name}: the outputs differ by {off:.1e}; nothing was timed.")
    print(f"{name}, batch {batch}: outputs agree to {off:.0e}", flush=True)

    def row(what: str, sides: tuple, bar: float | None) -> Row:
        seconds = race(dict(zip(("peer", "ours"), sides, strict=True)), repeats)
        return show(timed(name, what, batch, seconds, bar))

    bar = 1.1 if batch == 8 else None
    rows = [row("inference, fp32", (forward(other, plain), forward(own, plain)), None)]
    own, other_last = own.to(memory_format=torch.channels_last), forward(other, plain)
    rows.append(row("inference, fp32, ours channels_last", (other_last, forward(own, last)), bar))
    sides = forward(other, plain, True), forward(own, last, True)
    rows.append(row("inference, bfloat16, ours channels_last", sides, bar))
    folded = optimize_for_inference(own, compile=False)
    sides = forward(other, plain), forward(folded, last)
    rows.append(row("inference, fp32, ours folded", sides, None))
    if compiled:
        best = torch.compile(folded)
        sides = forward(other, plain), forward(best, last)
        rows.append(row("inference, fp32, ours at its best", sides, 1.25 if batch == 8 else None))
        sides = forward(torch.compile(other), plain), forward(torch.compile(own), last)
        rows.append(row("inference, fp32, both compiled", sides, None))
        torch.compiler.reset()
    return rows


def training_rows(name: str, batch: int, repeats: int, compiled: bool) -> list[Row]:
    """Compare the training step."""
    own = ours(name).train().to(memory_format=torch.channels_last)
    other = peer(name, own).train()
    plain, last = images(batch), images(batch, channels_last=True)
    sides = {
        "peer": training_step(other, plain),
        "ours": training_step(own, last),
        "checkpointed": training_step(own, last, checkpointing=True),
    }
    seconds = race(sides, repeats)
    rows = [show(timed(name, "training step, fp32", batch, seconds, 1.2))]
    slow = {"peer": seconds["ours"], "ours": seconds["checkpointed"]}
    what = "training step, ours plain over ours checkpointed"
    rows.append(show(timed(name, what, batch, slow, 1 / 1.4)))
    if compiled:
        both = torch.compile(other), torch.compile(own)
        sides = {"peer": training_step(both[0], plain), "ours": training_step(both[1], last)}
        seconds = race(sides, repeats)
        rows.append(show(timed(name, "training step, fp32, both compiled", batch, seconds, 1.1)))
        torch.compiler.reset()
    return rows


def memory_rows(name: str, batch: int, threads: int) -> list[Row]:
    """Compare what the backward pass needs, and the peak of a training step."""
    own, other = ours(name).train().to(memory_format=torch.channels_last), peer(name).train()
    last, megabyte = images(batch, channels_last=True), 1e6
    theirs = kept_bytes(other, images(batch)).total() / megabyte
    bar = {"tiny": 1.15, "small": 1.08}.get(name)
    what = "held for the backward pass"
    rows = [Row(name, what, batch, "MB", theirs, kept_bytes(own, last).total() / megabyte, bar)]
    own.checkpointing = True
    kept = kept_bytes(own, last).total() / megabyte
    rows.append(Row(name, f"{what}, ours checkpointed", batch, "MB", theirs, kept, 2.5))
    del own, other
    gc.collect()
    peaks = {
        side: in_fresh_process(peak_memory, side, name, batch, threads) / megabyte
        for side in ("peer", "ours", "checkpointed")
    }
    what = "peak of a training step"
    rows.append(Row(name, what, batch, "MB", peaks["peer"], peaks["ours"]))
    what = f"{what}, ours checkpointed"
    rows.append(Row(name, what, batch, "MB", peaks["peer"], peaks["checkpointed"]))
    return [show(row) for row in rows]


def construction_row(repeats: int) -> Row:
    """Compare building the largest variant."""
    seconds = race({"peer": lambda: peer("base"), "ours": lambda: ours("base")}, repeats)
    return show(timed("base", "construction", 0, seconds, 1.0))


def show(row: Row) -> Row:
    """Print a row as soon as it is there."""
    spread = f" ± {row.spread:.2f}" if row.spread is not None else ""
    bar = f"  (bar {row.bar:.2f}{'' if row.ratio >= row.bar else ', MISSED'})" if row.bar else ""
    print(
        f"  {row.model:5} batch {row.batch}  {row.what:50} {row.peer:8.3f} {row.ours:8.3f} "
        f"{row.unit:2}  {row.ratio:.2f}{spread}{bar}",
        flush=True,
    )
    return row


def processor() -> str:
    """Return the name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(result: dict) -> str:
    """Return the rows that have a bar as the README's table, in Markdown."""
    lines = ["| what, batch 8 | tiny | small | bar |", "|---|---|---|---|"]
    cells: dict[str, dict[str, str]] = {}
    for row in result["rows"]:
        if row["bar"] is not None:
            spread = f" ± {row['spread']:.2f}" if row["spread"] else ""
            entry = cells.setdefault(row["what"], {"bar": set()})
            missed = "" if row["ratio"] >= row["bar"] else " (missed)"
            entry[row["model"]] = f"{row['ratio']:.2f}{spread}{missed}"
            entry["bar"].add(f"{row['bar']:.2f}")
    for what, entry in cells.items():
        bars = " / ".join(sorted(entry["bar"], reverse=True))
        if "base" in entry:
            lines.append(f"| {what} of base | {entry['base']} | | {bars} |")
        else:
            lines.append(f"| {what} | {entry['tiny']} | {entry['small']} | {bars} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print and store; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=("tiny", "small"), default=["tiny", "small"])
    parser.add_argument("--repeats", type=int, default=11, help="rounds of each race (11)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (2)")
    parser.add_argument("--skip-compiled", action="store_true", help="leave out torch.compile")
    parser.add_argument(
        "--json", type=Path, help=f"where to write the rows; the book's: {RESULT.name}"
    )
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error("--repeats must be at least 2, or there is no spread")
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    load, compiled = os.getloadavg()[0], not arguments.skip_compiled
    rows = [construction_row(arguments.repeats)]
    for name in arguments.models:
        rows += memory_rows(name, 8, arguments.threads)
        rows += training_rows(name, 8, arguments.repeats, compiled)
        for batch in (1, 8):
            rows += inference_rows(name, batch, arguments.repeats, compiled)
    result = {
        "command": "make bench",
        "date": date.today().isoformat(),
        "processor": f"{processor()}, {arguments.threads} threads",
        "load before": round(load, 2),
        "versions": {name: version(name) for name in ("torch", "torchvision", "mmpretrain")},
        "rounds": arguments.repeats,
        "rows": [asdict(row) for row in rows],
    }
    if arguments.json:
        arguments.json.parent.mkdir(exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{table(result)}\n")
    missed = [row for row in rows if row.bar and row.ratio < row.bar]
    print(f"{len(missed)} of {sum(bool(row.bar) for row in rows)} bars missed")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
