"""Measure what the recipe `fashion` reaches, against its bars, a CNN and a ViT.

    python benchmarks/training.py                               everything; about three hours
    python benchmarks/training.py --part subset --seeds 0 1 2   one part

Each run is stored as soon as it ends, and a run that is stored is not repeated: stop when you like
and go on later. All numbers of epochs are fixed beforehand. The accuracies are those of the test
images, which decided nothing: the values of the recipe were chosen on training images held out.
"""

import argparse
import gc
import json
import os
import resource
import statistics
import sys
import time
import warnings
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.against_mmpretrain import processor
from conformer_src import create_model
from conformer_src.recipes import Recipe, load_recipe
from conformer_src.records import plot_history
from conformer_src.sources import open_data
from conformer_src.training import (
    build_trainer,
    evaluate,
    fit,
    load_batches,
    set_training,
    steps_per_epoch,
    train_step,
)

RESULT = Path(__file__).parent / "results" / "training.json"
VERSIONS = ("torch", "torchvision", "accelerate")

# The same blocks, one branch alone, as many parameters. The ViT gets positions, which it needs
# because no convolution tells it where a patch was.
MODELS = {
    "Conformer": {},
    "CNN": {"branches": "conv", "channel_ratio": 1.0},
    "ViT": {"branches": "trans", "depth": 9, "pos_embed": 4},
}
LONGER = {"epochs": 15}
VARIED = {"epochs": 15, "crop_scale": 0.6, "mixup": 0.2}
HEADS = {"both": (1.0, 1.0), "conv only": (1.0, 0.0), "trans only": (0.0, 1.0)}
BARS = {"subset": (85.0, 120), "full": (91.0, 480)}  # accuracy of the sum, seconds
SHOWN = ("conv", "trans", "sum")
LOADING_BAR = 0.10  # of the time of a step

Run = tuple[str, str, dict]  # part, what is trained, changes of the recipe


def planned(part: str) -> list[Run]:
    """Return the runs of a part, for one seed."""
    if part == "subset":
        return [(part, "Conformer", {})]
    if part == "full":
        return [(part, "Conformer", {"data": "fashion"})]
    if part == "heads":
        names = ("conv_weight", "trans_weight")
        return [(part, what, dict(zip(names, pair, strict=True))) for what, pair in HEADS.items()]
    change = {"compare": {}, "longer": LONGER, "varied": VARIED}[part]
    return [(part, what, {"model_options": options, **change}) for what, options in MODELS.items()]


def seconds() -> dict[str, float]:
    """Return the clock, and what the processors have worked for this process and its workers."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own, workers = (usage.ru_utime + usage.ru_stime for usage in used)
    return {"wall": time.perf_counter(), "cpu": own, "cpu of workers": workers}


def passed(start: dict[str, float]) -> dict[str, float]:
    """Return the seconds since a call of `seconds`."""
    return {f"{name} s": round(now - start[name], 1) for name, now in seconds().items()}


def measured(recipe: Recipe) -> dict:
    """Train by a recipe, from the images to the test; return the scores and what it cost."""
    load, start = os.getloadavg()[0], seconds()
    data = open_data(recipe)
    torch.manual_seed(recipe.seed)
    model = create_model(recipe.model, in_chans=recipe.in_chans, **recipe.model_options)
    steps = steps_per_epoch(len(data.train), recipe)
    trainer, losses, epochs = build_trainer(recipe, model, steps), [], []
    for loss in fit(trainer, data.train):
        losses.append(loss)
        if trainer.step % steps == 0:
            val = evaluate(trainer.network, data.val)
            epochs.append({"loss": statistics.mean(losses[-steps:]), "val": val._asdict()})
            print(f"    epoch {len(epochs)}: {epochs[-1]['loss']:.3f}, {val.sum:.1f} %", flush=True)
    gc.collect()  # the workers have ended, so that their seconds count
    training = passed(start)
    test = evaluate(trainer.network, data.test)
    return {
        "images": len(data.train),
        "steps": trainer.step,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "test": test._asdict(),
        "epochs": epochs,
        "until the end of training": training,
        "until the scores": passed(start),
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
    }


def waiting(recipe: Recipe, steps: int = 110) -> dict:
    """Return the share of the time that training waits for images, after the first ten steps."""
    load, accelerator = os.getloadavg()[0], Accelerator()
    data = open_data(recipe)
    model = create_model(recipe.model, in_chans=recipe.in_chans, **recipe.model_options)
    trainer = build_trainer(recipe, model, steps, accelerator)
    set_training(trainer.model, recipe.freeze_norm)
    batches = load_batches(data.train, replace(recipe, epochs=10), 0, accelerator)
    waited, worked, before = [], [], time.perf_counter()
    for parts in islice(batches, steps):
        loaded = time.perf_counter()
        train_step(trainer, parts)
        waited.append(loaded - before)
        worked.append((before := time.perf_counter()) - loaded)
    share = sum(waited[10:]) / (sum(waited[10:]) + sum(worked[10:]))
    return {
        "steps": steps,
        "first batch s": round(waited[0], 3),
        "ms of a step": round(1000 * statistics.mean(worked[10:]), 2),
        "share": round(share, 4),
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
    }


def loading_runs() -> list[Run]:
    """Return the recipes whose loading is measured: two data sets, without and with a worker."""
    return [
        ("loading", f"{data}, {workers} workers", {"data": data, "workers": workers})
        for data in ("fashion-subset", "fashion")
        for workers in (0, 1)
    ]


def find(rows: list[dict], recipe: Recipe, kind: str) -> dict | None:
    """Return the row of a run that was made by the same recipe, in whatever part.

    Only what both know is compared, so that a new field of recipes makes no row stale.
    """
    now = asdict(recipe)
    for row in rows:
        then = row["recipe"]
        if row["kind"] == kind and all(then[name] == now[name] for name in then.keys() & now):
            return row
    return None


def show(part: str, what: str, row: dict) -> None:
    """Print a row in one line."""
    if row["kind"] == "loading":
        print(f"  {part:8} {what:24} waits {100 * row['share']:.1f} % of the time", flush=True)
        return
    test, took = row["test"], row["until the scores"]
    heads = ", ".join(f"{name} {test[name]:.2f}" for name in SHOWN if test[name] is not None)
    cost = f"{took['wall s']:.0f} s, {took['cpu s']:.0f} of a processor"
    seed = row["recipe"]["seed"]
    print(f"  {part:8} {what:12} seed {seed}: {heads}; {cost}; load {row['load']}", flush=True)


def spread(values: list[float | None], digits: int = 1) -> str:
    """Return mean and standard deviation as text."""
    if None in values or not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def verdict(part: str, rows: list[dict]) -> str:
    """Return the bar of a part, and whether the mean accuracy and the slowest run keep it."""
    if part not in BARS:
        return ""
    accuracy, limit = BARS[part]
    mean = statistics.mean(row["test"]["sum"] for row in rows)
    slowest = max(row["until the scores"]["wall s"] for row in rows)
    missed = ["accuracy"] * (mean < accuracy) + ["time"] * (slowest > limit)
    words = f"{accuracy:.0f} % in {limit} s"
    return f"{words}: missed ({' and '.join(missed)})" if missed else f"{words}: kept"


def table(rows: list[dict], base: Recipe, parts: list[str], seeds: list[int]) -> str:
    """Return the stored rows as a table in Markdown, in per cent of the test images."""
    lines = [
        "| part | what | parameters | runs | CNN's head | transformer's head | sum | seconds "
        "| of a processor | bar |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for part in parts:
        for _, what, change in planned(part):
            recipes = [replace(base, seed=seed, **change) for seed in seeds]
            found = [row for recipe in recipes if (row := find(rows, recipe, "training"))]
            if found:
                heads = [spread([r["test"][head] for r in found]) for head in SHOWN]
                took = [
                    [r["until the scores"][name] for r in found] for name in ("wall s", "cpu s")
                ]
                cells = [part, what, f"{found[0]['parameters']:,}", str(len(found)), *heads]
                cells += [*(spread(each, 0) for each in took), verdict(part, found)]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def loading_table(rows: list[dict], base: Recipe) -> str:
    """Return the shares of the time that is spent waiting for images."""
    lines = ["| images | ms of a step | waiting | bar |", "|---|---|---|---|"]
    for _, what, change in loading_runs():
        recipe = replace(base, **change)
        if row := find(rows, recipe, "loading"):
            kept = "kept" if row["share"] <= LOADING_BAR else "missed"
            bar = f"{LOADING_BAR:.0%}: {kept}" if recipe.workers == base.workers else ""
            step = f"{row['ms of a step']:.0f}"
            lines.append(f"| {what} | {step} | {100 * row['share']:.1f} % | {bar} |")
    return "\n".join(lines)


def stored(path: Path) -> list[dict]:
    """Return the rows that are there already."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def store(path: Path, rows: list[dict]) -> None:
    """Write all rows, in one step."""
    result = {
        "command": "python benchmarks/training.py",
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "machine": "shared with other work; `load` is the load average before and after a run",
        "versions": {name: version(name) for name in VERSIONS},
        "rows": rows,
    }
    path.parent.mkdir(exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    scratch.replace(path)


def draw(row: dict, path: Path) -> None:
    """Draw the learning curves of a run."""
    history = [
        {
            "epoch": number,
            "train_loss": epoch["loss"],
            **{f"val_{name}": value for name, value in epoch["val"].items()},
        }
        for number, epoch in enumerate(row["epochs"], 1)
    ]
    plot_history(history).savefig(path, dpi=110)


PARTS = ("loading", "subset", "full", "compare", "heads", "longer", "varied")


def main() -> int:
    """Measure what is not stored yet, print all that was asked for; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    parser.add_argument("--json", type=Path, default=RESULT, help=f"the rows ({RESULT.name})")
    parser.add_argument("--table", action="store_true", help="measure nothing, print what is there")
    parser.add_argument("--curves", type=Path, help="draw the last run that is shown as PNG")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    rows = stored(arguments.json)
    base = load_recipe("fashion")
    runs = [
        (part, what, replace(base, seed=seed, **change))
        for part in arguments.part
        for seed in (arguments.seeds if part != "loading" else [base.seed])
        for part, what, change in (planned(part) if part != "loading" else loading_runs())
    ]
    for part, what, recipe in runs:
        kind = "loading" if part == "loading" else "training"
        row = find(rows, recipe, kind)
        if row is None and not arguments.table:
            row = (waiting if kind == "loading" else measured)(recipe)
            row |= {"kind": kind, "date": date.today().isoformat(), "recipe": asdict(recipe)}
            rows = [*stored(arguments.json), {**row, "threads": arguments.threads}]
            store(arguments.json, rows)
        if row is not None:
            show(part, what, row)
            if arguments.curves and kind == "training":
                draw(row, arguments.curves)
    parts = [part for part in arguments.part if part != "loading"]
    tables = [table(rows, base, parts, arguments.seeds)]
    if "loading" in arguments.part:
        tables.append(loading_table(rows, base))
    text = "\n\n".join(tables)
    print(f"\n{text}")
    return int("missed" in text)


if __name__ == "__main__":
    sys.exit(main())
