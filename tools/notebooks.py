"""Run the chapters and keep them in order.

    python tools/notebooks.py run       execute in place, then clean; print the seconds
    python tools/notebooks.py clean     strip what depends on the machine or the moment
    python tools/notebooks.py check     the linter: exit 1 and say what is against the house rules
    python tools/notebooks.py numbers   list numbers in the prose that no cell and no source shows

Name notebooks after the command, or none for all chapters. A second run changes no byte.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
# What stays of a cell's metadata. Naming what goes (nbstripout) would miss the next editor's keys.
KEPT = ("mystnb", "tags")
BAR = re.compile(r"\d%\|[^|]*\|")  # part of a line, as tqdm draws it
WIDGET = "application/vnd.jupyter.widget-view+json"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class RunError(Exception):
    """A notebook that did not run to its end: where, and why."""


def read(path: Path) -> NotebookNode:
    """Read a notebook or stop with a sentence."""
    try:
        notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
        nbformat.validate(notebook)
    except FileNotFoundError:
        raise SystemExit(f"there is no {path}") from None
    except Exception as error:  # whatever the text is, it is not a notebook; nbformat has many
        reason = " ".join(str(error).split())[:120]
        raise SystemExit(f"{path} is not a notebook in JSON ({reason})") from None
    return notebook


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook in one go: a reader never meets half of it."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text_of(notebook), encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def text_of(notebook: NotebookNode) -> str:
    """Return the file's text."""
    return nbformat.writes(notebook) + "\n"


def clean(notebook: NotebookNode) -> None:
    """Keep sources, ids, tags, figures' words and outputs; drop the machine and the moment."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    notebook.nbformat_minor = 5  # the first with cell ids
    count = 0
    for cell in notebook.cells:
        kept = {key: cell.metadata[key] for key in KEPT if cell.metadata.get(key)}
        cell.metadata = nbformat.from_dict(kept)
        cell.setdefault("id", nbformat.v4.new_markdown_cell().id)
        cell.source = cell.source.strip("\n").rstrip()
        if cell.cell_type != "code":
            continue  # two blanks at a line's end are a line break there
        cell.source = re.sub(r"[ \t]+$", "", cell.source, flags=re.MULTILINE)
        count += 1
        cell.outputs = clean_outputs(cell.outputs)
        # A cell that was never run keeps its missing number: the linter must see it.
        if cell.outputs or cell.execution_count is not None:
            cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count


def clean_outputs(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Join neighbouring streams, play carriage returns, drop progress bars and empty streams."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.output_type != "stream":
            if WIDGET not in output.get("data", {}):
                kept.append(output)
        elif kept and kept[-1].output_type == "stream" and kept[-1].name == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            lines = output.text.replace("\r\n", "\n").split("\n")
            shown = (line.rpartition("\r")[2] for line in lines)
            output.text = "\n".join(line for line in shown if not BAR.search(line))
    return [o for o in kept if o.output_type != "stream" or o.text.strip()]


def run(path: Path, timeout: int = 600) -> float:
    """Execute a notebook in place and clean it; return the seconds.

    Raises:
        RunError: A cell failed; the file stays as it was.
    """
    notebook = read(path)
    # The kernel inherits these. More threads than cores slow each other down a hundredfold.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    current = 0

    def remember(cell: NotebookNode, cell_index: int) -> None:
        nonlocal current
        current = cell_index + 1

    client = NotebookClient(
        notebook,
        timeout=timeout,
        startup_timeout=180,
        record_timing=False,
        coalesce_streams=True,
        kernel_name=KERNEL["name"],
        skip_cells_with_tag="nbval-skip",  # their stored result was made elsewhere
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=remember,
        extra_arguments=["--log-level=40"],  # the kernel's own warnings concern nobody here
    )
    start = time.perf_counter()
    try:
        client.execute()
    except CellExecutionError as error:
        trace = ANSI.sub("", error.traceback).rstrip()
        raise RunError(
            f"{path}, cell {current}: {error.ename}: {error.evalue}\n{trace}\nnothing was written"
        ) from None
    except CellTimeoutError:
        raise RunError(
            f"{path}, cell {current} took more than {timeout} s; nothing was written"
        ) from None
    except DeadKernelError:
        raise RunError(
            f"{path}, cell {current}: the kernel died (out of memory?); nothing was written"
        ) from None
    seconds = time.perf_counter() - start
    clean(notebook)
    write(notebook, path)
    return seconds


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Run one command; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "clean", "check", "numbers"])
    parser.add_argument("notebook", nargs="*", type=Path, help="default: all chapters")
    options = parser.parse_args(arguments)
    paths = options.notebook or sorted((root / "chapters").glob("*.ipynb"))
    if options.command in ("check", "numbers"):
        import notebook_rules  # it reads notebooks with this module

        report = notebook_rules.check if options.command == "check" else notebook_rules.numbers
        return report(paths, root)
    failed = False
    for path in paths:
        if options.command == "run":
            try:
                print(f"{path}: {run(path):.1f} s", flush=True)
            except RunError as error:
                failed = True
                print(error, file=sys.stderr)
        else:
            notebook, before = read(path), path.read_text(encoding="utf-8")
            clean(notebook)
            if text_of(notebook) != before:
                write(notebook, path)
                print(f"cleaned {path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
