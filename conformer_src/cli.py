"""The command `conformer`: list and describe models, predict, convert and export, train."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import conformer_src as cs
from conformer_src.commands import add_evaluate, add_shards, add_train
from conformer_src.conformer import VARIANTS, ConformerConfig
from conformer_src.export import ENDINGS
from conformer_src.files import read_file, written_whole
from conformer_src.predict import Prediction, list_images, predict
from conformer_src.weights import (
    _OPENMMLAB,
    PRETRAINED,
    find_config,
    find_state_dict,
    to_own_names,
)

_ENTRIES = {"official": "model", "mmpretrain": "state_dict"}  # where each keeps its weights


def list_command(arguments: argparse.Namespace) -> list[dict]:
    """Return a row for each variant."""
    names = cs.list_models(arguments.pattern)
    if not names:
        raise ValueError(f"no model matches {arguments.pattern!r}; `conformer list` shows all.")
    return [_described(name) for name in names]


def _described(name: str) -> dict:
    card = cs.model_card(name)._asdict()
    published = _OPENMMLAB + PRETRAINED[name] if name in PRETRAINED else None
    return {"model": name, **card, "pretrained": published}


def list_text(rows: list[dict]) -> Iterable[str]:
    """Yield the lines of a table."""
    yield _TABLE.format("model", "image", "parameters", "multiply-adds", "top-1", "weights")
    for row in rows:
        size, adds = f"{row['parameters'] / 1e6:.1f} M", f"{row['macs'] / 1e9:.2f} G"
        top1 = "-" if row["top1"] is None else row["top1"]
        weights = "published" if row["pretrained"] else "-"
        yield _TABLE.format(row["model"], row["image_size"], size, adds, top1, weights)


_TABLE = "{:24} {:>5}  {:>10}  {:>13}  {:>5}  {}"


def info_command(arguments: argparse.Namespace) -> dict:
    """Return all that is known about a variant."""
    described = _described(arguments.model)  # first, because it names a wrong model
    return {**described, "config": asdict(VARIANTS[arguments.model])}


def info_text(known: dict) -> Iterable[str]:
    """Yield the lines of a description."""
    top1 = "not published"
    if known["top1"] is not None:
        top1 = f"{known['top1']} % on ImageNet-1k, according to {known['source']}"
    rows = {
        "image": f"{known['image_size']} x {known['image_size']}",
        "parameters": f"{known['parameters']:,}",
        "multiply-adds": f"{known['macs']:,} for one image",
        "top-1": top1,
        "weights": known["pretrained"] or "not published",
    }
    yield known["model"]
    yield from (f"  {key:15} {value}" for key, value in rows.items())
    yield "config"
    yield from (f"  {key:15} {value}" for key, value in known["config"].items())


def predict_command(arguments: argparse.Namespace) -> list[dict]:
    """Return what a model sees in each image; those that cannot be used are complained about."""
    if not (arguments.model or arguments.weights):
        arguments.misused("give --model, for published weights, or --weights, for a file of yours.")
    classes = arguments.classes and _lines(arguments.classes)
    images = [image for _, image in list_images(arguments.images)]  # before weights are fetched
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = predict(
        _load(arguments.model, arguments.weights).to(device),
        images,
        arguments.topk,
        classes,
        on_unreadable=arguments.complain,
    )
    return [_as_objects(prediction) for prediction in found]


def _load(name: str | None, weights: str | None) -> cs.Conformer:
    """Return the model of a name or of a file; if both are given, the file must fit the name."""
    if not weights:
        return cs.create_model(name, pretrained=True)
    if name:
        cs.model_card(name)  # names a wrong model before a file is fetched
    model = cs.load_model(weights)
    if name:
        with torch.device("meta"):
            named = cs.create_model(name, num_classes=model.config.num_classes)
        if _shapes(named) != _shapes(model):
            raise ValueError(f"{weights} holds another model than {name}; leave out --model.")
    return model


def _shapes(model: cs.Conformer) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _lines(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8; give one class name a line.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from None
    return [line.strip() for line in lines if line.strip()]


def _as_objects(prediction: Prediction) -> dict:
    """Return a prediction as JSON shows it."""
    ranked = zip(prediction.indices, prediction.labels, prediction.probabilities, strict=True)
    heads = {"conv": prediction.conv, "trans": prediction.trans}
    return {
        "image": prediction.image,
        "classes": [
            dict(zip(("index", "label", "probability"), one, strict=True)) for one in ranked
        ],
        **{head: own and {"label": own[0], "probability": own[1]} for head, own in heads.items()},
    }


def predict_text(found: list[dict]) -> Iterable[str]:
    """Yield a few lines for each image: the classes by the sum, then each head's own first."""
    for image in found:
        yield image["image"]
        heads = {"CNN alone": image["conv"], "transformer alone": image["trans"]}
        rows = [("both heads", one) for one in image["classes"][:1]]
        rows += [("", one) for one in image["classes"][1:]]
        rows += [(head, own) for head, own in heads.items() if own]
        for title, one in rows:
            yield f"  {title:17}  {one['probability']:6.1%}  {one['label']}"


def convert_command(arguments: argparse.Namespace) -> dict:
    """Write weights under other names; return what was written, and what was not."""
    source, target = Path(arguments.source), Path(arguments.target)
    endings = (".safetensors",) if arguments.to == "ours" else (".pth", ".pt")
    _require_target(target, endings, f"with --to {arguments.to}, ", arguments)
    model = cs.load_model(source, arguments.ema)  # refuses whatever is wrong with the file
    content, notes = read_file(source)
    state = find_state_dict(content, arguments.ema)
    # The tensors as they lie in the file: the model's own would be of single precision.
    copies = {name: tensor.clone() for name, tensor in to_own_names(state, model).items()}
    model.load_state_dict(copies, assign=True)
    left_out = _left_out(content, state)
    if arguments.to == "ours":
        cs.save_weights(model, target)
    else:
        left_out += ["config"] if notes and _guess(model) != model.config else []
        left_out += [name for name in ("classes", "input") if getattr(model, name) is not None]
        with written_whole(target) as temporary:
            torch.save({_ENTRIES[arguments.to]: cs.export_weights(model, arguments.to)}, temporary)
    return {
        "written": str(target),
        "names": arguments.to,
        "tensors": len(model.state_dict()),
        "left_out": left_out,
    }


def _require_target(
    target: Path, endings: Sequence[str], when: str, arguments: argparse.Namespace
) -> None:
    """Refuse a name that promises another format, and a file that would be lost."""
    if target.suffix not in endings:
        arguments.misused(f"{when}DST ends with {' or '.join(endings)}.")
    if target.exists() and not arguments.force:
        raise FileExistsError(f"{target} exists; choose another name, or replace it with --force.")


def _guess(model: cs.Conformer) -> ConformerConfig | None:
    """Return the config that can be told from the weights alone, if it can."""
    try:
        return find_config(cs.export_weights(model), {})
    except ValueError:
        return None


def _left_out(content: Mapping, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Return what else a training run kept in the file: its optimizer, for example."""
    first = next(iter(state.values()))
    entries = {key: value for key, value in content.items() if isinstance(value, Mapping)}
    taken = [key for key in entries if any(one is first for one in entries[key].values())]
    kept = [key for key in content if key not in taken and content[key] is not None]
    return sorted(map(str, kept)) if taken else []


def convert_text(done: dict) -> Iterable[str]:
    """Yield a line for what was written, and one for what was left out."""
    yield f"wrote {done['written']}: {done['tensors']} tensors, named as in {done['names']!r}"
    if done["left_out"]:
        yield f"left out: {', '.join(done['left_out'])}"


def export_command(arguments: argparse.Namespace) -> dict:
    """Write a network as a program; return what it takes, and how far it is from the network."""
    target = Path(arguments.target)
    _require_target(target, ENDINGS, "", arguments)
    done = cs.export_model(cs.load_model(arguments.source), target, arguments.size)
    notes = {name: json.loads(note) for name, note in done.notes.items()}
    return {"written": str(target), "shape": done.shape, **notes, "deviation": done.deviation}


def export_text(done: dict) -> Iterable[str]:
    """Yield a line for what was written, and one for the comparison."""
    channels, height, width = done["shape"]
    yield f"wrote {done['written']}: takes images (batch, {channels}, {height}, {width})"
    if done["deviation"] is None:
        yield "not compared with the network; for that: python -m pip install onnxruntime"
    else:
        size = f"{done['deviation']:.0e} of the logits' root mean square"
        yield f"run and compared: differs from the network by at most {size}"


_EXAMPLES = """\
examples:
  conformer list '*patch16'
  conformer info conformer_tiny_patch16
  conformer predict cat.jpg holiday/ --model conformer_tiny_patch16
  conformer predict cat.jpg --weights mine.safetensors --classes names.txt
  conformer predict cat.jpg --weights mine.safetensors --topk 1 --json
  conformer convert published.pth mine.safetensors --to ours
  conformer export mine.safetensors mine.onnx
  conformer train fashion
  conformer evaluate runs/fashion

exit codes:
  0    all went well
  1    something could not be done; one sentence for each on stderr says what
  2    the command was used wrongly
  130  stopped with Ctrl-C; 143: with SIGTERM
"""


def _at_least_one(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number of at least 1")
    return int(word)


def _common() -> argparse.ArgumentParser:
    """Return the options that are understood before and after a command."""
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--json", action="store_true", help="print JSON, for programs")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return common


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="conformer",
        description="The vision Conformer: models, weights, predictions, training.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[_common()],
    )
    top.add_argument("--version", action="version", version=f"conformer {cs.__version__}")
    top.set_defaults(json=False, debug=False)
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (_add_list, _add_info, _add_predict, _add_convert, _add_export):
        add(commands)
    for add in (add_train, add_evaluate, add_shards):
        add(partial(_add, commands))
    return top


def _add(commands, name: str, run: Callable, text: Callable, about: str, more: str = ""):
    added = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}. {more}".strip(),
        parents=[_common()],
    )
    added.set_defaults(run=run, text=text, misused=added.error)
    return added


def _add_list(commands) -> None:
    added = _add(commands, "list", list_command, list_text, "list the models")
    added.add_argument(
        "pattern", nargs="?", default="*", metavar="PATTERN", help="which, for example '*patch16'"
    )


def _add_info(commands) -> None:
    added = _add(commands, "info", info_command, info_text, "describe a model")
    added.add_argument("model", metavar="MODEL", help="a name that `conformer list` shows")


def _add_predict(commands) -> None:
    more = "An image that cannot be used is named on stderr, the others are predicted."
    about = "say what is in images"
    added = _add(commands, "predict", predict_command, predict_text, about, more)
    added.add_argument("images", nargs="+", metavar="IMAGE", help="a file, or a folder of images")
    added.add_argument(
        "--model", metavar="MODEL", help="a name of `conformer list`; fetches published weights"
    )
    added.add_argument("--weights", metavar="FILE", help="use this file, or this https address")
    added.add_argument(
        "--topk", type=_at_least_one, default=5, metavar="N", help="classes for each image (5)"
    )
    added.add_argument("--classes", metavar="FILE", help="other names of the classes, one a line")


def _add_convert(commands) -> None:
    more = "Writes the weights alone; what else a training run stored is listed, not written."
    about = "write weights under other names"
    added = _add(commands, "convert", convert_command, convert_text, about, more)
    added.add_argument("source", metavar="SRC", help="any .pth or .safetensors file of weights")
    added.add_argument("target", metavar="DST", help=".safetensors for ours, else .pth")
    added.add_argument(
        "--to",
        choices=("ours", "official", "mmpretrain"),
        required=True,
        help="the names of this package, of the authors, or of OpenMMLab",
    )
    added.add_argument("--ema", action="store_true", help="take the moving average in SRC")
    added.add_argument("--force", action="store_true", help="replace DST if it exists")


def _add_export(commands) -> None:
    more = (
        "The file takes normalised images, in batches of any size, and returns the sum of both "
        "heads; it holds the names of the classes, too. It is run and compared with the network."
    )
    about = "write a network as a file that runs without this package"
    added = _add(commands, "export", export_command, export_text, about, more)
    added.add_argument("source", metavar="SRC", help="a file of weights, or its https address")
    added.add_argument("target", metavar="DST", help=".onnx, or .pt2 for torch.export.load")
    added.add_argument(
        "--size", type=_at_least_one, metavar="N", help="side of the images, in pixels"
    )
    added.add_argument("--force", action="store_true", help="replace DST if it exists")


_RANK = int(os.environ.get("RANK", 0))  # set by torchrun and `accelerate launch`


def _tell(sentence: object) -> None:
    """Write a sentence on stderr, above a progress bar if there is one."""
    process = f" (process {_RANK})" if "RANK" in os.environ else ""
    tqdm.write(f"conformer{process}: {sentence}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    """Return what went wrong as one line; the kind of error too, if nobody foresaw it."""
    words = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError) and words:
        return words
    return f"{type(error).__name__}: {words} (--debug shows where)"


def _show(result: list | dict, arguments: argparse.Namespace) -> None:
    """Print a result; characters that the terminal does not have are written as numbers."""
    if arguments.json:
        text = json.dumps(result, indent=1, allow_nan=False)
    else:
        text = "\n".join(arguments.text(result))
    if text:
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def _run(arguments: argparse.Namespace) -> int:
    complaints = []
    arguments.complain = lambda sentence: (complaints.append(sentence), _tell(sentence))
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _tell(f"note: {message}")
        result = arguments.run(arguments)
        if _RANK == 0:
            _show(result, arguments)
    return 1 if complaints else 0


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        words: what follows `conformer`; by default the words that the program was started with.

    Returns:
        0, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM, or 141 if who reads the output
        stopped reading.

    Raises:
        SystemExit: 0 after --help and --version, 2 after wrong usage.
    """
    arguments = build_parser().parse_args(words)
    try:
        status = _run(arguments)
    except BrokenPipeError:  # `conformer list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing left to flush
        return 141
    except KeyboardInterrupt:
        _tell("stopped.")
        return 130
    except Exception as error:
        if arguments.debug:
            raise
        _tell(_one_line(error))
        if not hasattr(error, "exit_code"):
            return 1  # other processes may be gone: do not wait for them
        status = error.exit_code
    _leave_others()
    return status


def _leave_others() -> None:
    """Part from the other processes of a run: without it, gloo's threads may abort the exit."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
