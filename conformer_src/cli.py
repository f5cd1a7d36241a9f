"""The command `conformer`: list and describe models, predict, convert weights."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import conformer_src as cs
from conformer_src.conformer import VARIANTS
from conformer_src.files import written_whole


def list_command(arguments: argparse.Namespace) -> list[dict]:
    """Return a row for each variant."""
    names = cs.list_models(arguments.pattern)
    if not names:
        raise ValueError(f"no model matches {arguments.pattern!r}; `conformer list` shows all.")
    return [{"model": name, **cs.model_card(name)._asdict()} for name in names]


def info_command(arguments: argparse.Namespace) -> dict:
    """Return all that is known about a variant."""
    card = cs.model_card(arguments.model)
    config = asdict(VARIANTS[arguments.model])
    return {"model": arguments.model, **card._asdict(), "config": config}


def predict_command(arguments: argparse.Namespace) -> list[dict]:
    """Return what a model sees in each image."""
    if not arguments.weights:
        model = cs.create_model(arguments.model, pretrained=True)
    elif arguments.model:
        model = cs.load_weights(cs.create_model(arguments.model), arguments.weights)
    else:
        model = cs.load_model(arguments.weights)
    return [found._asdict() for found in cs.predict(model, arguments.images, arguments.topk)]


def convert_command(arguments: argparse.Namespace) -> dict:
    """Write weights under other names; return what was written."""
    model = cs.load_model(arguments.source, arguments.ema)
    if arguments.to == "ours":
        cs.save_weights(model, arguments.target)
    else:
        entry = {"official": "model", "mmpretrain": "state_dict"}[arguments.to]
        with written_whole(Path(arguments.target)) as temporary:
            torch.save({entry: cs.export_weights(model, arguments.to)}, temporary)
    return {"written": arguments.target, "names": arguments.to, "tensors": len(model.state_dict())}


def show(result: list[dict] | dict) -> str:
    """Return a result as text for a person: a line each, or for lists a table."""
    if isinstance(result, dict):
        width = max(map(len, result))
        return "\n".join(f"{key:{width}}  {_cell(value)}" for key, value in result.items())
    rows = [list(result[0]), *([_cell(value) for value in row.values()] for row in result)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1 else f"{value:g}"
    if isinstance(value, tuple | list):
        return ", ".join(map(_cell, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="conformer", description="The vision Conformer: models, weights, predictions."
    )
    top.add_argument("--version", action="version", version=cs.__version__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON, for programs")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, parents=[common])
        added.set_defaults(run=run)
        return added

    listing = command("list", list_command, "list the models")
    listing.add_argument("pattern", nargs="?", default="*", help="names that match, '*patch16'")
    info = command("info", info_command, "describe one model")
    info.add_argument("model", metavar="MODEL")
    naming = command("predict", predict_command, "name what is in images")
    naming.add_argument("images", nargs="+", metavar="IMAGE", help="files or folders")
    naming.add_argument("--model", help="a name of `conformer list`; needed without --weights")
    naming.add_argument("--weights", help="file or address; without it, OpenMMLab's published ones")
    naming.add_argument("--topk", type=int, default=5, help="classes for each image (5)")
    converting = command("convert", convert_command, "write weights under other names")
    converting.add_argument("source", metavar="SRC", help="a .pth or .safetensors file")
    converting.add_argument("target", metavar="DST")
    converting.add_argument("--to", choices=("ours", "official", "mmpretrain"), required=True)
    converting.add_argument("--ema", action="store_true", help="take the moving average")
    return top


def main(words: list[str] | None = None) -> int:
    """Run a command; return 0, or 1 after an error in one sentence."""
    arguments = parser().parse_args(words)
    try:
        result = arguments.run(arguments)
    except (ValueError, OSError) as error:
        if arguments.debug:
            raise
        print(f"conformer: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=1) if arguments.json else show(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
