"""Score the networks of chapter 10 on test images of other sizes and angles.

    python benchmarks/robustness.py                    all that is not stored yet
    python benchmarks/robustness.py --seeds 0 1        a part; --variants narrows it further
    python benchmarks/robustness.py --table            score nothing, print what is there

The weights come from the runs of benchmarks/ablation.py; a run that is not there is trained. All
networks were trained at 32 pixels, upright, half of them mirrored. A row is stored as soon as it is
complete, and not repeated while its weights are those of the same recipe.
"""

import argparse
import json
import os
import statistics
import sys
import warnings
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ablation import FOLDER, VERSIONS
from benchmarks.against_mmpretrain import processor
from conformer_src.ablation import HEADS, TensorImages, fashion_study, margin, open_images, run
from conformer_src.conformer import Conformer
from conformer_src.data import FASHION_MEAN, FASHION_STD
from conformer_src.robustness import (
    accuracy_curve,
    black_level,
    over_seeds,
    reframe,
    refresh_norms,
    resize,
    rotate,
)
from conformer_src.training import Scores
from conformer_src.weights import load_model

RESULT = Path(__file__).parent / "results" / "robustness.json"
NAMES = {  # variant of the study -> what chapter 12 calls it
    "base": "Conformer",
    "CNN alone": "CNN",
    "ViT alone": "ViT",
    "no coupling": "no coupling",
    "positions": "positions",
}
TRAINED = 32  # pixels
CHANCE = 10  # per cent, of ten classes
BLACK = black_level(FASHION_MEAN, FASHION_STD)
SIZES, ANGLES = (16, 24, 32, 40, 48, 64), (0, 15, 30, 45, 60, 90, 120, 180)


def resize_and_back(images: Tensor, size: int) -> Tensor:
    """Lose what fewer pixels cannot hold, and nothing else."""
    return resize(resize(images, size), TRAINED)


def resize_in_frame(images: Tensor, size: int) -> Tensor:
    """Shrink or grow the garment; the frame stays."""
    return reframe(resize(images, size), TRAINED, BLACK)


def rotate_and_back(images: Tensor, angle: float) -> Tensor:
    """Lose what interpolation and corners cost, and nothing else."""
    turned = rotate(images, angle, BLACK)
    return rotate(turned, -angle, BLACK)


# What is changed, its values, and the value that changes nothing.
CHANGES = {
    "size": (resize, SIZES, TRAINED),
    "angle": (partial(rotate, fill=BLACK), ANGLES, 0),
}
# The parts of these changes, each alone; for the first three networks, on every second image.
PARTS = {
    "size, and back": (resize_and_back, SIZES[:3]),
    "garment": (resize_in_frame, SIZES[:3]),
    "frame": (partial(reframe, fill=BLACK), (32, 48, 64)),
    "angle, and back": (rotate_and_back, ANGLES[:4]),
}
REFRESHED = "size, fresh norms"  # statistics of unlabelled training images of the same size
MIDDLE = "frame, middle"  # the CNN's head averages only the places where the garment is


def refreshed_curve(model: Conformer, test: TensorImages, train: Tensor) -> dict[int, Scores]:
    """Score each size with the norms' statistics of that size."""
    curve = {}
    for size in SIZES:
        fresh = refresh_norms(model, resize(train, size))
        curve |= accuracy_curve(fresh, test.images, test.labels, resize, [size])
    return curve


@torch.no_grad()
def middle_curve(model: Conformer, test: TensorImages) -> dict[int, Scores]:
    """Score the CNN's head on the middle of the maps, in the frame of training and in a double one.

    The middle is as many places as the maps have without a frame.
    """
    curve, side = {}, TRAINED // 16  # of the last maps, 16 times smaller than the images
    for size in (TRAINED, 2 * TRAINED):
        right, cut = [], (size // 16 - side) // 2
        for images, labels in zip(test.images.split(250), test.labels.split(250), strict=True):
            maps = model.forward_features(reframe(images, size, BLACK)).maps
            middle = maps[..., cut : cut + side, cut : cut + side]
            right.append(model.conv_head(middle).argmax(1) == labels)
        share = 100 * torch.cat(right).double().mean().item()
        curve[size] = Scores(len(test), float("nan"), share, None, share)
    return curve


def measured(model: Conformer, parts: bool) -> dict[str, dict[str, dict]]:
    """Return the accuracies of all curves in per cent: change -> value -> head."""
    model = model.eval().to(memory_format=torch.channels_last)
    train, test = open_images("fashion")
    few = TensorImages(test.images[::2], test.labels[::2], test.classes)
    curves = {
        name: accuracy_curve(model, test.images, test.labels, change, values)
        for name, (change, values, _) in CHANGES.items()
    }
    if parts:
        curves |= {
            name: accuracy_curve(model, few.images, few.labels, change, values)
            for name, (change, values) in PARTS.items()
        }
        curves[REFRESHED] = refreshed_curve(model, few, train.images[::20])
        if model.config.branches != "trans":
            curves[MIDDLE] = middle_curve(model, few)
    return {
        name: {
            str(value): {head: getattr(scores, head) for head in HEADS}
            for value, scores in curve.items()
        }
        for name, curve in curves.items()
    }


def curve_of(row: dict, name: str) -> dict[int, Scores]:
    """Return a stored curve in the form that conformer_src.robustness works with."""
    empty = {"images": 0, "loss": float("nan")}
    return {int(value): Scores(**empty, **heads) for value, heads in row["curves"][name].items()}


def seeds_of(rows: list[dict], variant: str) -> dict[int, dict]:
    """Return the rows of a variant by seed."""
    own = [row for row in rows if row["variant"] == variant]
    return {row["seed"]: row for row in sorted(own, key=lambda row: row["seed"])}


def accuracy_table(rows: list[dict], name: str, head: str = "sum") -> str:
    """Return mean and standard deviation over the seeds in Markdown, in per cent."""
    lines = []
    for variant, words in NAMES.items():
        own = [row for row in seeds_of(rows, variant).values() if name in row["curves"]]
        curves = [curve_of(row, name) for row in own]
        if curves and getattr(next(iter(curves[0].values())), head) is not None:
            right = [[getattr(curve[value], head) for curve in curves] for value in curves[0]]
            cells = [
                f"{statistics.mean(each):.1f} ± {statistics.stdev(each):.1f}"
                if len(each) > 1
                else f"{each[0]:.1f}"
                for each in right
            ]
            lines.append(f"| {words} | {len(curves)} | {' | '.join(cells)} |")
    values = next(curve_of(row, name) for row in rows if name in row["curves"])
    title = f"| {name} | seeds | {' | '.join(map(str, values))} |"
    return "\n".join([title, f"|{'---|' * (len(values) + 2)}", *lines])


def above_chance(row: dict, name: str, trained: int) -> dict[int, float]:
    """Return the percentage kept of what the sum had above chance, at each value of a curve."""
    right = {value: scores.sum - CHANCE for value, scores in curve_of(row, name).items()}
    return {value: 100 * each / right[trained] for value, each in right.items()}


def kept(rows: list[dict], name: str, trained: int) -> dict[str, str]:
    """Return by how many points the Conformer keeps more above chance than each other network.

    The margins are the 95 % intervals over seeds; a star marks where 0 lies outside.
    """
    base, lines = seeds_of(rows, "base"), {"values": " ".join(rows[0]["curves"][name])}
    for variant, words in list(NAMES.items())[1:]:
        other = seeds_of(rows, variant)
        pairs = [
            [above_chance(row, name, trained) for row in (base[seed], other[seed])]
            for seed in sorted(base.keys() & other.keys())
        ]
        cells = []
        for value in pairs[0][0] if pairs else ():
            gaps = [own[value] - others[value] for own, others in pairs]
            mean, half = statistics.mean(gaps), margin(gaps)
            cells.append(f"{mean:+.1f}±{half:.1f}{'*' if abs(mean) > half else ''}")
        if cells:
            lines[words] = " ".join(cells)
    return lines


def difference_table(rows: list[dict], name: str, trained: int) -> str:
    """Return what `kept` says in Markdown."""
    lines = [
        f"| {words} | {' | '.join(cells.split())} |"
        for words, cells in kept(rows, name, trained).items()
    ]
    rule = f"|{'---|' * (lines[0].count('|') - 1)}"
    return "\n".join([lines[0].replace("values", f"kept, {name}, against"), rule, *lines[1:]])


def compact(rows: list[dict], name: str) -> dict[str, str]:
    """Return a curve of all networks as chapter 12 draws it: mean±deviation at each value."""
    lines = {"values": " ".join(rows[0]["curves"][name])}
    for variant, words in NAMES.items():
        if own := seeds_of(rows, variant):
            spreads = over_seeds([curve_of(row, name) for row in own.values()]).values()
            lines[words] = " ".join(f"{one.mean:.1f}±{one.deviation:.1f}" for one in spreads)
    return lines


def tables(rows: list[dict]) -> str:
    """Return all tables of the stored rows."""
    names = [
        name for name in (*CHANGES, *PARTS, REFRESHED) if any(name in r["curves"] for r in rows)
    ]
    parts = [accuracy_table(rows, name) for name in names]
    parts += [accuracy_table(rows, MIDDLE, "conv")] if PARTS.keys() & set(names) else []
    parts += [difference_table(rows, name, CHANGES[name][2]) for name in ("size", "angle")]
    return "\n\n".join(parts)


def stored(path: Path) -> list[dict]:
    """Return the rows that are there already."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def store(path: Path, rows: list[dict]) -> None:
    """Write all rows, in one step."""
    order = {variant: place for place, variant in enumerate(NAMES)}
    result = {
        "command": "python benchmarks/robustness.py",
        "processor": f"{processor()}, {os.cpu_count()} cores; one torch thread",
        "machine": "shared with other work; nothing here is a time",
        "versions": {name: version(name) for name in VERSIONS},
        "images": "the 2,000 test images of the shipped subset; every second one for the parts",
        "rows": sorted(rows, key=lambda row: (order[row["variant"]], row["seed"])),
    }
    path.parent.mkdir(exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    scratch.replace(path)


def main() -> int:
    """Score what is not stored yet and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the runs (runs/ablation)")
    parser.add_argument("--json", type=Path, default=RESULT, help=f"the rows ({RESULT.name})")
    parser.add_argument("--only-trained", action="store_true", help="train no run that is missing")
    parser.add_argument("--table", action="store_true", help="score nothing, print what is there")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    study, folder = fashion_study(), arguments.folder
    pairs = [(v, seed) for seed in arguments.seeds for v in arguments.variants]
    for variant, seed in [] if arguments.table else pairs:
        rows, key = stored(arguments.json), study.key(variant, seed)
        if any((row["variant"], row["seed"], row["key"]) == (variant, seed, key) for row in rows):
            continue
        if arguments.only_trained and not (folder / f"{key}.json").exists():
            continue
        run(study, variant, seed, folder)
        model = load_model(folder / f"{key}-fashion.safetensors")
        row = {"variant": variant, "seed": seed, "key": key, "date": date.today().isoformat()}
        row["curves"] = measured(model, parts=variant in ("base", "CNN alone", "ViT alone"))
        rows = stored(arguments.json)  # another process may have added to it
        rows = [r for r in rows if (r["variant"], r["seed"]) != (variant, seed)]
        store(arguments.json, [*rows, row])
        print(f"{NAMES[variant]}, seed {seed}: stored", flush=True)
    if rows := stored(arguments.json):
        print(tables(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
