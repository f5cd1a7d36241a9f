"""Measure what chapter 13 states: what each rewrite gains, and how cost grows.

    python benchmarks/cost.py                                 everything; about ten minutes
    python benchmarks/cost.py --part exact --models micro     one row again
    python benchmarks/cost.py --table                         measure nothing, print what is stored

All forms of a row take turns in one process, so that ratios hold on a busy machine as well. Seconds
are those that the processor spent on this process, on one thread; those of the roofline are the
shortest of many passes. A part that is measured again replaces its row.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.against_mmpretrain import processor
from conformer_src.conformer import CARDS, VARIANTS, Conformer, create_model
from conformer_src.cost import (
    WAYS,
    Timing,
    branch_of,
    count_costs,
    exact_forms,
    gains,
    kept_bytes,
    machine_limits,
    measure_growth,
    optimize_for_inference,
    part_of,
    quantize_linears,
    race,
    roofline,
    run,
    sum_costs,
)

RESULT = Path(__file__).parent / "results" / "cost.json"
NAMES = {"tiny": "conformer_tiny_patch16", "micro": "conformer_micro"}
SIZES = {"tiny": (4, 224), "micro": (64, 32)}  # images in a batch, side
PASSES = 20  # of a part's time the shortest counts
GROWTH = {  # what grows -> its values, and the model and images for one of them
    "image side": (
        (128, 192, 256, 320),
        lambda side: (model_of("tiny"), images_of(1, side)),
    ),
    "batch": ((1, 2, 4, 8), lambda batch: (model_of("tiny"), images_of(batch, 128))),
    "depth": ((6, 9, 12, 15), lambda depth: (model_of("tiny", depth=depth), images_of(1, 224))),
    "patch": ((16, 32), lambda patch: (model_of("tiny", patch_size=patch), images_of(1, 224))),
}


def model_of(name: str, **changes: object) -> Conformer:
    """Return a network for evaluation, whose fresh weights depend on the seed alone."""
    torch.manual_seed(0)
    return create_model(NAMES[name], **changes).eval()


def images_of(batch: int, side: int) -> Tensor:
    """Return the same random images for all."""
    torch.manual_seed(1)
    return torch.randn(batch, 3, side, side)


def deviation(found: tuple, expected: tuple) -> float:
    """Return the largest difference between two pairs of logits, over their root mean square."""
    pairs = list(zip(found, expected, strict=True))
    return max(float((f - e).abs().max() / e.square().mean().sqrt()) for f, e in pairs)


def raced(forms: dict[str, Callable], rounds: int) -> dict:
    """Return how each form did against the first, and how far its logits are from the first's."""
    expected = next(iter(forms.values()))()
    off = {name: float(f"{deviation(form(), expected):.1e}") for name, form in forms.items()}
    return {
        name: {
            "ms": round(1000 * gain.seconds, 2),
            "ratio": round(gain.ratio, 3),
            "spread": round(gain.spread, 3),
            "deviation": off[name],
        }
        for name, gain in gains(race(forms, rounds, time.process_time)).items()
    }


def exact(name: str, rounds: int) -> dict:
    """Race the forms that compute the same."""
    images = images_of(*SIZES[name])
    forms = exact_forms(model_of(name))
    return raced({what: partial(run, form, images) for what, form in forms.items()}, rounds)


def inexact(name: str, rounds: int) -> dict:
    """Race what changes numbers, memory format or code against the network as it is."""
    model, images = model_of(name), images_of(*SIZES[name])
    last = model_of(name).to(memory_format=torch.channels_last)
    small = quantize_linears(model)
    forms: dict[str, tuple[nn.Module, bool]] = {
        "eager, float32": (model, False),
        "channels last": (last, False),
        "bfloat16": (model, True),
        "bfloat16, channels last": (last, True),
        "int8 linear maps": (small, False),
    }
    return raced(
        {what: partial(run, form, images, low) for what, (form, low) in forms.items()}, rounds
    )


def compiled(name: str, rounds: int) -> dict:
    """Race compiled forms against the network as it is; compiling is not counted."""
    model, images = model_of(name), images_of(*SIZES[name])
    forms = {
        "eager, float32": model,
        "compiled": torch.compile(model),
        "optimize_for_inference": optimize_for_inference(model),
    }
    try:
        return raced({what: partial(run, form, images) for what, form in forms.items()}, rounds)
    finally:
        torch.compiler.reset()


def growth(name: str, rounds: int) -> dict:
    """Return how the time of a forward pass grows, beside what counting predicts."""
    found = {}
    for what, (sizes, case) in GROWTH.items():
        cases = {size: case(size) for size in sizes}
        grown = measure_growth(cases, rounds, time.process_time)
        found[what] = {
            "sizes": grown.sizes,
            "macs": grown.macs,
            "ms": [round(1000 * seconds, 2) for seconds in grown.seconds],
            "predicted": round(grown.predicted, 3),
            "measured": round(grown.measured, 3),
        }
    return found


def roof(name: str, rounds: int) -> dict:
    """Return how far the parts of one kind are from the machine's limits, for one image."""
    model, images = model_of(name), images_of(1, SIZES[name][1])
    limits = machine_limits(side=1024, clock=time.process_time)
    costs, timings = count_costs(model, images), processor_times(model, images)
    sums, seconds, macs, best = sum_costs(costs, part_of), Counter(), Counter(), Counter()
    for part, took, _ in timings:
        seconds[kind_of(part)] += took
    for part, _, _, height in roofline(costs, timings, limits):
        macs[kind_of(part)] += sums[part]["ours"]
        best[kind_of(part)] += sums[part]["ours"] / height  # seconds at the roof
    found = {
        kind: {
            "ms": round(1000 * seconds[kind], 3),
            "million macs": round(macs[kind] / 1e6, 2),
            "share of the time": round(seconds[kind] / seconds.total(), 3),
            "share of the roof": round(best[kind] / seconds[kind], 3),
        }
        for kind in macs
    }
    machine = {"billion macs": round(limits.macs / 1e9, 2), "GB": round(limits.bytes / 1e9, 2)}
    return {"machine, in a second": machine, "kinds": found}


def processor_times(model: Conformer, images: Tensor) -> list[Timing]:
    """Time each part in seconds of the processor, the shortest of many passes.

    A part of Ti takes longer than the system lets one process run at a time, so that on a busy
    machine every pass by the clock has others' time in it.
    """
    parts = [each for each in model.named_modules() if part_of(each[0]) == each[0] != ""]
    parts = [(name, part) for name, part in parts if kind_of(name) not in ("sums", "entry")]
    seconds, started = {name: float("inf") for name, _ in parts}, {}

    def enter(name: str, *_: object) -> None:
        started[name] = time.process_time()

    def leave(name: str, *_: object) -> None:
        seconds[name] = min(seconds[name], time.process_time() - started[name])

    hooks = [part.register_forward_pre_hook(partial(enter, name)) for name, part in parts]
    hooks += [part.register_forward_hook(partial(leave, name)) for name, part in parts]
    for _ in range(PASSES):
        run(model, images)
    for hook in hooks:
        hook.remove()
    return [Timing(name, took, 0) for name, took in seconds.items() if took < float("inf")]


def kind_of(part: str) -> str:
    """Return what a part is, in whatever block."""
    return part.split(".")[-1] if part.split(".")[-1][0].isalpha() else "sums"


def memory(name: str, rounds: int) -> dict:
    """Return the megabytes that each branch keeps for the backward pass; nothing is timed."""
    found = Counter()
    for part, count in kept_bytes(model_of(name), images_of(*SIZES[name])).items():
        found[branch_of(part)] += count
    return {branch: round(count / 1e6, 2) for branch, count in found.items()}


def counts(name: str, rounds: int) -> dict:
    """Return the multiply-accumulates of all variants, counted in each way; nothing is timed."""
    found = {}
    for variant in VARIANTS:
        with torch.device("meta"):
            side = CARDS[variant].image_size
            costs = count_costs(create_model(variant), torch.empty(1, 3, side, side))
        found[variant] = {way: sum(cost.macs(way) for cost in costs) for way in WAYS}
    return found


# What is measured, and for which models.
PARTS: dict[str, tuple[Callable[[str, int], dict], tuple[str, ...]]] = {
    "counts": (counts, ("tiny",)),
    "memory": (memory, ("tiny", "micro")),
    "exact": (exact, ("micro", "tiny")),
    "inexact": (inexact, ("micro", "tiny")),
    "roof": (roof, ("micro", "tiny")),
    "growth": (growth, ("tiny",)),
    "compiled": (compiled, ("micro", "tiny")),
}


def stored(path: Path) -> list[dict]:
    """Return the rows that are there already."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def store(path: Path, row: dict) -> None:
    """Write a row in the place of the one before, with all others, in one step."""
    others = [old for old in stored(path) if any(old[key] != row[key] for key in ("part", "model"))]
    order = list(PARTS)
    rows = sorted([*others, row], key=lambda each: (order.index(each["part"]), each["model"]))
    result = {
        "command": "python benchmarks/cost.py",
        "processor": f"{processor()}, {os.cpu_count()} cores; one thread",
        "machine": "shared with other work; `load` is the load average before and after a row",
        "seed": 0,
        "versions": {name: version(name) for name in ("torch", "torchvision")},
        "rows": rows,
    }
    path.parent.mkdir(exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    scratch.replace(path)


def find(rows: list[dict], part: str, model: str) -> dict | None:
    """Return what was stored for a part and a model."""
    return next((r["found"] for r in rows if (r["part"], r["model"]) == (part, model)), None)


def race_table(rows: list[dict], part: str) -> str:
    """Return how the forms of a part did, as a table in Markdown: how many times as fast."""
    found = {model: found for model in SIZES if (found := find(rows, part, model))}
    heads = [f"{model}, {SIZES[model][0]} images of {SIZES[model][1]}" for model in found]
    lines = [f"| form | {' | '.join(heads)} |", "|---" * (1 + len(found)) + "|"]
    for form in list(next(iter(found.values()), {}))[1:]:
        cells = [
            f"{each[form]['ratio']:.2f} ± {each[form]['spread']:.2f}" for each in found.values()
        ]
        lines.append(f"| {form} | {' | '.join(cells)} |")
    return "\n".join(lines)


def growth_table(rows: list[dict]) -> str:
    """Return the exponents, as a table in Markdown."""
    lines = ["| what grows | from | to | predicted | measured |", "|---|---|---|---|---|"]
    for what, row in (find(rows, "growth", "tiny") or {}).items():
        ends = f"{row['sizes'][0]} | {row['sizes'][-1]}"
        lines.append(f"| {what} | {ends} | {row['predicted']:.2f} | {row['measured']:.2f} |")
    return "\n".join(lines)


def roof_table(rows: list[dict], model: str) -> str:
    """Return how far each kind of part is from the machine's limit, as a table in Markdown."""
    lines = ["| part | million MACs | ms | of the time | of the roof |", "|---|---|---|---|---|"]
    for kind, row in (find(rows, "roof", model) or {"kinds": {}})["kinds"].items():
        shares = [f"{100 * row[f'share of the {what}']:.0f} %" for what in ("time", "roof")]
        numbers = [f"{row['million macs']:.1f}", f"{row['ms']:.2f}"]
        lines.append(f"| {' | '.join([kind, *numbers, *shares])} |")
    return "\n".join(lines)


def count_table(rows: list[dict]) -> str:
    """Return the ways of counting, in G, as a table in Markdown."""
    lines = [f"| variant | {' | '.join(WAYS)} |", "|---" * (1 + len(WAYS)) + "|"]
    for variant, row in (find(rows, "counts", "tiny") or {}).items():
        lines.append(f"| {variant} | {' | '.join(f'{row[way] / 1e9:.3f}' for way in WAYS)} |")
    return "\n".join(lines)


def tables(rows: list[dict]) -> dict[str, str]:
    """Return all tables by name."""
    races = {part: race_table(rows, part) for part in ("exact", "inexact", "compiled")}
    roofs = {f"roof, {model}": roof_table(rows, model) for model in SIZES}
    return {"counts": count_table(rows), **races, "growth": growth_table(rows), **roofs}


def main(arguments: Iterable[str] | None = None) -> None:
    """Measure what is asked for, store each row as soon as it is there, print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each race (7)")
    parser.add_argument("--json", type=Path, default=RESULT, help=f"the rows ({RESULT.name})")
    parser.add_argument("--table", action="store_true", help="measure nothing, print what is there")
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for part in () if chosen.table else chosen.part:
        measure, models = PARTS[part]
        for model in (each for each in models if each in chosen.models):
            load = os.getloadavg()[0]
            row = {"part": part, "model": model, "found": measure(model, chosen.rounds)}
            row |= {"date": date.today().isoformat(), "rounds": chosen.rounds}
            row["load"] = [round(load, 1), round(os.getloadavg()[0], 1)]
            store(chosen.json, row)
            print(f"{part}, {model}: stored", flush=True)
    for name, text in tables(stored(chosen.json)).items():
        print(f"\n{name}\n\n{text}")


if __name__ == "__main__":
    main()
