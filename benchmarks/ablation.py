"""Run the studies of chapter 10: variants x seeds, on shipped and on drawn images.

    python benchmarks/ablation.py                              everything; some hours
    python benchmarks/ablation.py --study drawn --seeds 0 1    a part; --variants narrows it further
    python benchmarks/ablation.py --table                      train nothing, print what is there
    python benchmarks/ablation.py --again drawn "ViT alone" 0  train a stored run again and compare
    python benchmarks/ablation.py --ship                       renew the weights in the package

Each run is stored in the folder as soon as it ends, with its weights, and is not repeated: stop
when you like and go on later. Several processes may share a folder if each has seeds of its own.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import warnings
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.against_mmpretrain import processor
from benchmarks.training import spread
from conformer_src.ablation import (
    HEADS,
    Study,
    compare,
    drawn_study,
    fashion_study,
    run,
    run_all,
)
from conformer_src.data import FASHION_CLASSES, FASHION_MEAN, FASHION_STD
from conformer_src.inputs import InputConfig
from conformer_src.weights import load_model, save_weights

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results" / "ablation.json"
FOLDER = ROOT / "runs" / "ablation"
VERSIONS = ("torch", "torchvision", "accelerate")
STUDIES = {"fashion": fashion_study, "drawn": drawn_study}
# Name in the package -> study, variant, phase after which the weights are taken; seed 0.
SHIPPED = {
    "fashion-conformer": ("fashion", "base", "fashion"),
    "fashion-cnn": ("fashion", "CNN alone", "fashion"),
    "fashion-vit": ("fashion", "ViT alone", "fashion"),
    "drawn-conformer": ("drawn", "base", "additive"),
    "drawn-cnn": ("drawn", "CNN alone", "additive"),
    "drawn-vit": ("drawn", "ViT alone", "additive"),
}


def stored(path: Path) -> dict[str, list[dict]]:
    """Return the stored rows of each study."""
    return json.loads(path.read_text())["rows"] if path.exists() else {}


def in_folder(study: Study, folder: Path) -> list[dict]:
    """Return the rows of all runs that have ended, each with its date."""
    rows = []
    for seed in range(100):
        for variant in study.variants:
            path = folder / f"{study.key(variant, seed)}.json"
            if path.exists():
                day = date.fromtimestamp(path.stat().st_mtime).isoformat()
                rows.append({**run(study, variant, seed, folder), "date": day})
    return rows


def store(path: Path, folder: Path) -> dict[str, list[dict]]:
    """Put the runs of the folder into the stored result, in one step; return all rows."""
    rows = {}
    for name, build in STUDIES.items():
        both = [*stored(path).get(name, []), *in_folder(build(), folder)]
        rows[name] = list({(row["variant"], row["seed"]): row for row in both}.values())
    result = {
        "command": "python benchmarks/ablation.py",
        "processor": f"{processor()}, {os.cpu_count()} cores; one torch thread a process",
        "machine": "shared with other work; times are seconds of a processor",
        "versions": {name: version(name) for name in VERSIONS},
        "studies": {
            name: {"phases": build().phases, "recipe": asdict(build().recipe)}
            for name, build in STUDIES.items()
        },
        "rows": rows,
    }
    path.parent.mkdir(exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    scratch.replace(path)
    return rows


def table(rows: list[dict], data: str) -> str:
    """Return the accuracies in per cent and the paired differences to the base, in Markdown."""
    lines = [
        "| variant | parameters | runs | CNN's head | transformer's head | sum "
        "| sum, against base | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in compare(rows, data, "sum"):
        own = [row for row in rows if row["variant"] == one.variant]
        scores = [[row["scores"][data][head] for row in own] for head in HEADS]
        shown = math.isfinite(one.margin)  # not for the base, not for a single pair
        gap = f"{one.difference:+.2f} ± {one.margin:.2f}" if shown else ""
        cells = [one.variant, f"{own[0]['parameters']:,}", str(one.runs)]
        cells += [*map(spread, scores), gap, one.verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cue_table(rows: list[dict]) -> str:
    """Return what each head knows of the two cues after the additive label, run by run."""
    lines = [
        "| variant | seed | CNN's head: corner, bars | transformer's: corner, bars "
        "| sum: corner, bars |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["variant"], row["seed"])):
        pairs = [row["cues"].get(head) for head in HEADS]
        cells = [f"{pair[0]:.0f}, {pair[1]:.0f}" if pair else "" for pair in pairs]
        lines.append(f"| {row['variant']} | {row['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ship(folder: Path) -> None:
    """Write the networks that come with the package, in 16 bits."""
    target = ROOT / "conformer_src" / "assets" / "weights"
    target.mkdir(exist_ok=True)
    for name, (kind, variant, phase) in SHIPPED.items():
        study = STUDIES[kind]()
        run(study, variant, 0, folder)
        model = load_model(folder / f"{study.key(variant, 0)}-{phase}.safetensors").half()
        if kind == "fashion":
            model.classes = FASHION_CLASSES
            model.input = InputConfig(32, FASHION_MEAN, FASHION_STD, crop=1.0, pad=2)
        save_weights(model, target / f"{name}.safetensors")
        print(f"{target.relative_to(ROOT) / name}.safetensors")


def again(study: Study, before: list[dict], variant: str, seed: int) -> int:
    """Train a stored run a second time; 1 if it ends outside the spread of its variant."""
    with tempfile.TemporaryDirectory() as fresh:
        now = run(study, variant, seed, fresh)["scores"]
    outside = False
    for data, scores in now.items():
        own = {r["seed"]: r["scores"][data]["sum"] for r in before if r["variant"] == variant}
        allowed = statistics.stdev(own.values())
        outside |= abs(scores["sum"] - own[seed]) > allowed
        words = f"{scores['sum']:.2f} now, {own[seed]:.2f} stored, spread {allowed:.2f}"
        print(f"{variant}, seed {seed}, {data}: {words}")
    return int(outside)


def main() -> int:
    """Run what is not stored yet and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--variants", nargs="+", help="names of variants (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the runs (runs/ablation)")
    parser.add_argument("--json", type=Path, default=RESULT, help=f"the rows ({RESULT.name})")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is there")
    parser.add_argument("--again", nargs=3, metavar=("STUDY", "VARIANT", "SEED"))
    parser.add_argument("--ship", action="store_true", help="write the weights of the package")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments.ship:
        ship(arguments.folder)
        return 0
    if arguments.again:
        name, variant, seed = arguments.again
        return again(STUDIES[name](), stored(arguments.json)[name], variant, int(seed))
    if not arguments.table:
        try:
            for name in arguments.study:
                study = STUDIES[name]()
                kept = {v: c for v, c in study.variants.items() if v in (arguments.variants or [v])}
                run_all(replace(study, variants=kept), arguments.seeds, arguments.folder)
        finally:  # also what ended before a Ctrl-C
            store(arguments.json, arguments.folder)
    rows = stored(arguments.json)
    for name in arguments.study:
        for data in STUDIES[name]().phases:
            print(f"\n{data}\n\n{table(rows[name], data)}")
    if "drawn" in arguments.study:
        print(f"\n{cue_table(rows['drawn'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
