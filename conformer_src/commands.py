"""The commands `conformer train`, `evaluate` and `shards`."""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from conformer_src.recipes import Recipe, list_recipes, load_recipe

# What trains takes seconds to import (Accelerate), so each command imports it when it runs.


def add_recipe_options(parser: argparse.ArgumentParser, names: Iterable[str] | None = None) -> None:
    """Add an option for each field of a recipe, or for those that are named."""
    groups = {}
    for one in fields(Recipe):
        if names is not None and one.name not in names:
            continue
        title = one.metadata["group"]
        group = groups.setdefault(title, parser.add_argument_group(f"recipe: {title}"))
        options: dict[str, Any] = {"help": one.metadata["about"], "default": argparse.SUPPRESS}
        if one.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif one.type is dict:
            options |= {"nargs": "+", "metavar": "FIELD=VALUE", "type": _assignment}
        elif "choices" in one.metadata:
            options["choices"] = one.metadata["choices"]
        else:
            options |= {"type": one.type, "metavar": _METAVARS[one.type]}
        group.add_argument(f"--{one.name.replace('_', '-')}", **options)


_METAVARS = {str: "WORD", int: "N", float: "NUMBER"}


def _assignment(words: str) -> tuple[str, Any]:
    name, equals, value = words.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{words!r} is not FIELD=VALUE, for example depth=3")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of the recipe that were given."""
    names = [one.name for one in fields(Recipe)]
    given = {name: value for name, value in vars(arguments).items() if name in names}
    if "model_options" in given:
        given["model_options"] = dict(given["model_options"])
    return given


def _say(line: str) -> None:
    """Write a line above the progress bar; stdout is for results."""
    tqdm.write(line, file=sys.stderr)


def train_command(arguments: argparse.Namespace) -> dict:
    """Train, or go on training; return the last row and the scores on the test images."""
    from conformer_src.runs import resume_run, start_run

    changes = _changes(arguments)
    if bool(arguments.recipe) == bool(arguments.resume):
        arguments.misused("give a recipe, or --resume with the folder of a run.")
    if arguments.resume:
        if arguments.out:
            arguments.misused("--resume goes on in its own folder; leave out --out.")
        return resume_run(arguments.resume, _say, **changes)
    recipe = load_recipe(arguments.recipe, **changes)
    folder = arguments.out or Path("runs") / Path(arguments.recipe).stem
    return start_run(recipe, folder, _say)


def scores_text(found: dict) -> Iterable[str]:
    """Yield a line for what was scored, and one for each opinion."""
    for prefix, what in (("val", "validation"), ("ema", "validation, averaged weights")):
        if f"{prefix}_sum" in found:
            yield from _scores_lines(found, prefix, f"{what}, last epoch")
    if "test_sum" in found:
        yield from _scores_lines(found, "test", "test, best epoch")
    yield f"written: {found['folder']}"


def _scores_lines(found: dict, prefix: str, title: str) -> Iterable[str]:
    yield title
    for name, words in (("conv", "CNN alone"), ("trans", "transformer alone"), ("sum", "both")):
        share = found[f"{prefix}_{name}"]
        if share is not None:
            yield f"  {words:17}  {share:6.2f} %"


def evaluate_command(arguments: argparse.Namespace) -> dict:
    """Score weights on images of known classes."""
    from conformer_src.runs import evaluate_file

    changes = _changes(arguments)
    return evaluate_file(arguments.weights_file, arguments.recipe, **changes)


def evaluate_text(found: dict) -> Iterable[str]:
    """Yield the scores, a line for each opinion."""
    yield f"{found['images']} images of {found['data']}, mean loss {found['loss']:.4f}"
    yield from list(_scores_lines({f"x_{k}": v for k, v in found.items()}, "x", ""))[1:]


def shards_command(arguments: argparse.Namespace) -> dict:
    """Write the images of a folder into shards."""
    from conformer_src.scaling import write_shards

    return write_shards(arguments.source, arguments.target, arguments.size, arguments.seed)


def shards_text(done: dict) -> Iterable[str]:
    """Yield what was written."""
    yield f"wrote {done['shards']} shards with {done['total']} images: {done['folder']}"


_TRAIN = """\
recipes that come along:
  {}
or give the path of a .toml file of yours.
Each option below replaces a field of the recipe.

  conformer train fashion
  conformer train finetune --data holiday/ --epochs 20 --out runs/holiday
  conformer train --resume runs/holiday
  accelerate launch --num_processes 8 -m conformer_src.cli train imagenet-authors --data imagenet/

Ctrl-C and SIGTERM stop the run after the step and save it; --resume goes on, to the same bits on
one CPU.
"""


def add_train(add) -> None:
    """Add `conformer train`; `add(name, run, text, about, more)` adds a command."""
    added = add("train", train_command, scores_text, "train a model by a recipe")
    added.usage = "conformer train [-h] (RECIPE [--out DIR] | --resume DIR) [--FIELD VALUE ...]"
    added.formatter_class = argparse.RawDescriptionHelpFormatter
    added.description += "\n\n" + _TRAIN.format(", ".join(list_recipes()))
    added.add_argument("recipe", nargs="?", metavar="RECIPE", help="a name, or a .toml file")
    added.add_argument("--out", metavar="DIR", help="folder of the run (runs/RECIPE)")
    added.add_argument("--resume", metavar="DIR", help="go on with the run in this folder")
    add_recipe_options(added)


def add_evaluate(add) -> None:
    """Add `conformer evaluate`."""
    more = "What is not given comes from the recipe that the run left beside its weights."
    about = "score weights on images of known classes"
    added = add("evaluate", evaluate_command, evaluate_text, about, more)
    added.add_argument("weights_file", metavar="WEIGHTS", help="a file, or the folder of a run")
    added.add_argument("--recipe", metavar="RECIPE", help="a name, or a .toml file")
    add_recipe_options(added, ("data", "image_size", "precision", "workers", "channels_last"))


def add_shards(add) -> None:
    """Add `conformer shards`."""
    about = "write a folder of images into shards that are read one after the other"
    added = add("shards", shards_command, shards_text, about)
    added.add_argument("source", metavar="IMAGES", help="one sub-folder a class")
    added.add_argument("target", metavar="DIR", help="for the .tar files and their list")
    added.add_argument("--size", type=int, default=1000, help="images of a shard (1000)")
    added.add_argument("--seed", type=int, default=0, help="decides the order (0)")
