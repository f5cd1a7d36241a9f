"""The notebook tools, on a chapter built here: a good one passes, each fault is caught."""

import base64
import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import nbformat
import notebook_rules
import notebooks
import number_rule
import pytest
import repository
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from nbval.plugin import get_sanitize_patterns

ROOT = Path(__file__).resolve().parents[1]
URL = "https://github.com/someone/book"
DEVICE = 'device = torch.device("cuda" if torch.cuda.is_available() else "cpu")'
SET_UP = f"from conformer_src.checks import fcu as checks\n\ntorch.manual_seed(0)\n{DEVICE}"
TITLE = """# Two branches talk

You build the unit that couples them.

- *You need*: chapter 3
- *You will be able to*: build it, test it, break it
- *Minutes*: read 10 · run 1 · practise 20
- *Hardware*: 2 cores
- *Builds*: `conformer_src.fcu`"""
AFTER = """<details><summary>Hint</summary>

Look at the shapes.

</details>

<details><summary>Solution</summary>

```python
# The tokens first
def my_answer():
    return 1
```

</details>"""


def _chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


PNG = base64.b64encode(
    b"\x89PNG\r\n\x1a\n"
    + _chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    + _chunk(b"IDAT", zlib.compress(b"\x00\x80"))
    + _chunk(b"IEND", b"")
).decode()
WORDS = {"image": {"alt": "a grey dot"}, "figure": {"caption": "See the dot", "name": "fig-dot"}}


def stream(text: str, name: str = "stdout") -> NotebookNode:
    return new_output("stream", name=name, text=text)


def figure(kind: str = "image/png") -> NotebookNode:
    return new_output("display_data", data={kind: PNG, "text/plain": "<Figure>"})


def exercise(number: int) -> list[NotebookNode]:
    task = f"### Exercise {number}: count\n\n●●○○○ · 10 minutes · predict\n\nHow many?"
    stub = "def my_answer() -> int:\n    raise NotImplementedError"
    check = f"checks.check_{number}(my_answer)"
    return [
        new_markdown_cell(task),
        new_code_cell(stub),
        new_code_cell(check, outputs=[stream("… not attempted yet\n")]),
        new_markdown_cell(AFTER),
    ]


def good() -> NotebookNode:
    """Return a chapter that keeps to every rule, clean."""
    markdown, code = new_markdown_cell, new_code_cell
    cells = [
        markdown(TITLE),
        markdown("## Set-up"),
        code(repository.bootstrap(URL), metadata={"tags": ["hide-cell"]}),
        code(SET_UP),
        markdown("## Why\n\nSee [chapter 3](03_attention.ipynb) and ![a map](../book/map.svg)."),
        markdown("## Shapes\n\n| maps | (B, C, H, W) |\n|---|---|\n| Ti | 64 |"),
        markdown("## By hand\n\n$a_[b](c)$ is no link, and neither is `[b](c)`."),
        code("print(28)", outputs=[stream("28\n")]),
        markdown("## Build: down\n\n$$ y = x $$ (eq-down)"),
        code("# conformer_src/fcu.py\ndef down():\n    return 1"),
        markdown("## Build: up"),
        code("down()", outputs=[new_output("execute_result", data={"text/plain": "1"})]),
        markdown("## Assemble and compare"),
        code("down() == 1", outputs=[new_output("execute_result", data={"text/plain": "True"})]),
        markdown("## Look\n\n### What to see"),
        code("plt.show()", outputs=[figure()], metadata={"mystnb": WORDS}),
        markdown("## Try it"),
        markdown("## What the sources say"),
        markdown("## Key points, and three questions"),
        markdown("## Exercises"),
        *[cell for number in (1, 2, 3) for cell in exercise(number)],
        markdown("## Next, and sources"),
    ]
    for index, cell in enumerate(cells):
        cell.id = f"cell-{index}"
        if cell.cell_type == "code":
            cell.execution_count = 1  # the cleaner numbers them
    notebook = new_notebook(cells=cells)
    notebooks.clean(notebook)
    return notebook


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The place of the chapter, with what it links to."""
    (tmp_path / "_config.yml").write_text(f"repository:\n  url: {URL}\n")
    (tmp_path / "book").mkdir()
    (tmp_path / "book/map.svg").write_text("<svg/>")
    (tmp_path / "chapters").mkdir()
    (tmp_path / "chapters/03_attention.ipynb").write_text("{}")
    return tmp_path / "chapters/04_fcu.ipynb"


def save(notebook: NotebookNode, path: Path) -> None:
    path.write_text(notebooks.text_of(notebook))


def findings(notebook: NotebookNode, path: Path) -> list[notebook_rules.Finding]:
    save(notebook, path)
    return notebook_rules.findings(notebook_rules.open_page(path, path.parents[1]))


def find(notebook: NotebookNode, start: str) -> NotebookNode:
    """Return the cell that begins so."""
    return next(cell for cell in notebook.cells if cell.source.startswith(start))


def number_of(notebook: NotebookNode, start: str) -> int:
    return notebook.cells.index(find(notebook, start)) + 1


def test_good_chapter_passes(path, capsys):
    save(good(), path)
    assert notebooks.main(["check", str(path)], path.parents[1]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["chapter", "aim", "04_fcu"]
    assert table[2].split()[1:3] == ["33", "13"]


def metadata(key: str, value: object) -> Callable[[NotebookNode], None]:
    return lambda notebook: notebook.metadata.update({key: value})


def source(start: str, new: str) -> Callable[[NotebookNode], None]:
    def change(notebook: NotebookNode) -> None:
        find(notebook, start).source = new

    return change


def replaced(start: str, old: str, new: str) -> Callable[[NotebookNode], None]:
    def change(notebook: NotebookNode) -> None:
        cell = find(notebook, start)
        assert old in cell.source
        cell.source = cell.source.replace(old, new)

    return change


def outputs(*new: NotebookNode) -> Callable[[NotebookNode], None]:
    def change(notebook: NotebookNode) -> None:
        find(notebook, "print(28)").outputs = list(new)

    return change


def setting(start: str, **values: object) -> Callable[[NotebookNode], None]:
    def change(notebook: NotebookNode) -> None:
        for key, value in values.items():
            find(notebook, start)[key] = value

    return change


def deleted(start: str) -> Callable[[NotebookNode], None]:
    def change(notebook: NotebookNode) -> None:
        notebook.cells.remove(find(notebook, start))
        notebooks.clean(notebook)

    return change


def words(alt: str = "a dot", caption: str = "a dot") -> NotebookNode:
    return nbformat.from_dict({"mystnb": {"image": {"alt": alt}, "figure": {"caption": caption}}})


def prose(text: str) -> Callable[[NotebookNode], None]:
    return source("## Try it", f"## Try it\n\n{text}")


WHY = "## Why\n\n"
LONG = "\n".join(["a = 1"] * 26)
TOO_MANY = "word " * 3300
# (how the good chapter is spoilt, the cell that the message names, words of the message)
FAULTS = {
    "metadata": (metadata("language_info", {"name": "python"}), None, "not clean; run"),
    "not clean source": (source("down()", "down()  "), None, "not clean"),
    "never run": (setting("down()", execution_count=None, outputs=[]), "down()", "was never run"),
    "gap": (setting("down()", execution_count=9), "down()", "execution count 9; expected 5"),
    "empty cell": (source("down() ==", " "), " ", "an empty code cell"),
    "large output": (outputs(stream("x" * 101_000)), "print(28)", "101 KB of output; at most 100"),
    "large notebook": (prose("x" * 301_000), None, "KB; at most 300"),
    "remote image": (prose("![a](https://a.org/b.png)"), "## Try", "on another host"),
    "remote image in HTML": (prose('<img alt="a" src="//a.org/b.png">'), "## Try", "another host"),
    "remote image in an output": (
        outputs(new_output("display_data", data={"text/html": "<img src='http://a.org/b'>"})),
        "print(28)",
        "http://a.org/b is on another host",
    ),
    "no alt text": (prose("![](../book/map.svg)"), "## Try", "map.svg has no alt text"),
    "no alt in HTML": (prose('<img src="../book/map.svg">'), "## Try", "has no alt text"),
    "empty alt in HTML": (prose('a <img alt=" " src="../book/map.svg">'), "## Try", "no alt text"),
    "plot without alt": (
        setting("plt.show()", metadata=words(alt=" ")),
        "plt.show()",
        "a figure without alt text",
    ),
    "plot without caption": (
        setting("plt.show()", metadata=words(caption="")),
        "plt.show()",
        "a figure without caption",
    ),
    "plot without metadata": (outputs(figure()), "print(28)", "a figure without alt text"),
    "SVG output": (setting("plt", outputs=[figure("image/svg+xml")]), "plt", "an SVG in the out"),
    "long cell": (source("down() ==", LONG), "a = 1", "26 lines; at most 25"),
    "home": (outputs(stream("saved /home/me/a.pt\n")), "print(28)", "one machine: /home/me"),
    "root": (outputs(stream("'/root/a'\n")), "print(28)", "path of one machine: /root/a"),
    "scratch": (outputs(stream("(/tmp/x1)\n")), "print(28)", "path of one machine: /tmp/x1"),
    "Windows": (outputs(stream("C:\\Users\\me\n")), "print(28)", "path of one machine: C:\\Users"),
    "packages": (outputs(stream("lib/site-packages/a\n")), "print(28)", "site-packages"),
    "path in HTML": (
        outputs(new_output("display_data", data={"text/html": "<b>/tmp/x</b>"})),
        "print(28)",
        "path of one machine",
    ),
    "address": (outputs(stream("<f at 0x7f3c12a0d430>\n")), "print(28)", "a memory address"),
    "error": (
        outputs(new_output("error", ename="ValueError", evalue="no", traceback=["no"])),
        "print(28)",
        "ends with ValueError",
    ),
    "warning": (outputs(stream("UserWarning: slow\n", "stderr")), "print(28)", "a warning or log"),
    "semicolon": (source("plt.show()", "plt.plot(a);"), "plt.plot", "line 1 ends with `;`"),
    "semicolon and comment": (source("plt.show()", "plt.plot(a);  # b"), "plt", "ends with `;`"),
    "bootstrap": (replaced("# Only", '"-q"', '"-qq"'), "# Only", "is not the bootstrap"),
    "bootstrap address": (replaced("# Only", "someone", "other"), "# Only", "is not the bootstrap"),
    "bootstrap tag": (
        setting("# Only", metadata=nbformat.from_dict({})),
        "# Only",
        "tag hide-cell",
    ),
    "seed": (replaced("from", "torch.manual_seed(0)\n", ""), None, "lacks `torch.manual_seed(0)`"),
    "device": (replaced("from", DEVICE, "a = 1"), None, "the set-up lacks `device = "),
    "no title": (replaced("# Two", "# Two", "Two"), "Two", "one title (`#`), in the first cell"),
    "second title": (prose("# Again"), "## Try", "one title"),
    "numbered title": (replaced("# Two", "# Two", "# 4. Two"), "# 4", "the title has a number"),
    "card": (replaced("# Two", "Hardware", "Machine"), "# Two", "lacks *Hardware*"),
    "part missing": (source("## By hand", "By hand"), None, "the part `## By hand` is missing"),
    "unknown part": (prose("## More"), "## Try", "`## More` is no part of a chapter"),
    "order": (source("## By hand", "## Look: early"), None, "the part `## By hand` is missing"),
    "part twice": (
        source("## Try it", "## Look:"),
        "## Look:",
        "the part Look comes a second time",
    ),
    "existing link": (prose("[a](../book/none.md)"), "## Try", "../book/none.md leads nowhere"),
    "absolute link": (prose("[a](/book/map.svg)"), "## Try", "/book/map.svg leads nowhere"),
    "image file": (prose("![a](b.png#x)"), "## Try", "b.png#x leads nowhere"),
    "link in HTML": (prose('<a href="none.md">a</a>'), "## Try", "none.md leads nowhere"),
    "words": (prose(TOO_MANY), None, "words; at most 3,200"),
    "exercise card": (replaced("### Ex", "●●○○○", "●●○○"), "### Ex", "exercise 1 has no card line"),
    "kind": (replaced("### Ex", "predict", "ponder"), "### Ex", "exercise 1 has no card line"),
    "exercise number": (
        replaced("### Ex", "cise 1", "cise 4"),
        "### Ex",
        "exercise 4 should have number 1",
    ),
    "stub": (replaced("def my", "raise NotImplementedError", "pass"), "### Ex", "a stub that does"),
    "stub name": (replaced("def my", "my_answer", "answer"), "### Ex", "defines no `my_...`"),
    "check": (replaced("checks.check_1", "(my_answer)", "(1); 2"), "### Ex", "check cell of one"),
    "no check": (deleted("checks.check_1"), "### Ex", "exercise 1 needs the cells task, stub"),
    "hint": (replaced("<details>", "Hint", "Help"), "### Ex", "has no `<details><summary>Hint"),
    "solution": (replaced("<details>", "Solution", "S"), "### Ex", "no `<details><summary>Sol"),
    "blank lines": (
        replaced("<details>", "Hint</summary>\n\n", "Hint</summary>\n"),
        "### Ex",
        "without a blank line",
    ),
    "fence": (replaced("<details>", "```python", "```"), "### Ex", "a fenced `python` block"),
    "other name": (replaced("<details>", "my_answer", "my_other"), "### Ex", "define my_answer"),
    "import": (replaced("from", "import fcu", "import mlp"), None, "`from conformer_src.checks im"),
}


@pytest.mark.parametrize(("spoil", "start", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_fault_is_caught(path, spoil, start, message):
    notebook = good()
    spoil(notebook)
    expected = 0 if start is None else number_of(notebook, start)
    save(notebook, path)
    page = notebook_rules.open_page(path, path.parents[1])
    found = {rule.__name__: list(rule(page)) for rule in notebook_rules.RULES}
    if "not clean" not in message:
        del found["is_clean"]  # what spoils a rule may also be something to clean
    (findings,) = filter(None, found.values())
    assert [number for number, text in findings if message in text] == [expected]


def test_parts_out_of_order(path):
    notebook = good()
    cells = notebook.cells
    first, second = (cells.index(find(notebook, start)) for start in ("## Try", "## What"))
    cells[first], cells[second] = cells[second], cells[first]
    expected = "`## Try it` comes after What the sources say; the order is in CONTRIBUTING"
    assert findings(notebook, path) == [(second + 1, expected)]


@pytest.mark.parametrize(("count", "caught"), [(-4, True), (-3, False), (27, False), (28, True)])
def test_number_of_cells(path, count, caught):
    notebook = good()
    if count > 0:
        notebook.cells[8:8] = [new_markdown_cell("More", id=f"m{n}") for n in range(count)]
    else:
        for start in ("down()", "down() ==", "print(28)", "plt.show()")[:-count]:
            notebook.cells.remove(find(notebook, start))
    total = len(notebook.cells)
    sentences = [sentence for _, sentence in findings(notebook, path)]
    assert (f"{total} cells; 30 to 60 are allowed" in sentences) is caught


@pytest.mark.parametrize("numbers", [(1, 2), (1, 2, 3, 4, 5, 6)])
def test_number_of_exercises(path, numbers):
    notebook = good()
    start, end = (number_of(notebook, s) for s in ("## Exercises", "## Next"))
    notebook.cells[start : end - 1] = [cell for n in numbers for cell in exercise(n)]
    assert (0, f"{len(numbers)} exercises; three to five are expected") in findings(notebook, path)


@pytest.mark.parametrize(
    "text",
    [
        "[here](#try-it), [mail](mailto:a@b.org), [web](https://a.org/none.png)",
        "![dots](data:image/png;base64,AAAA)",
        "A path in prose: /tmp/x, and `;` at the end;",
    ],
)
def test_what_is_allowed_in_prose(path, text):
    notebook = good()
    prose(text)(notebook)
    assert findings(notebook, path) == []


@pytest.mark.parametrize("text", ["https://a.org/home/x\n", "book/tmp/x\n", "1/2 at 0.5\n"])
def test_what_is_allowed_in_outputs(path, text):
    notebook = good()
    outputs(stream(text))(notebook)
    assert findings(notebook, path) == []


def test_check_names_chapter_and_cell(path, capsys):
    notebook = good()
    outputs(stream("/tmp/x\n"))(notebook)
    save(notebook, path)
    assert notebooks.main(["check", str(path)], path.parents[1]) == 1
    message = "04_fcu.ipynb, cell 8: the output holds a path of one machine: /tmp/x"
    assert capsys.readouterr().err.splitlines() == [message, "1 to repair"]


# Cleaning


def test_clean_drops_the_machine_and_keeps_the_work():
    notebook = good()
    before = notebooks.text_of(notebook)
    notebook.metadata.language_info = {"name": "python", "version": "3.11.7"}
    notebook.metadata.kernelspec = {"name": "venv", "display_name": "mine", "language": "python"}
    notebook.metadata.jupytext = {"formats": "ipynb"}
    notebook.metadata.widgets = {}
    for cell in notebook.cells:
        cell.source += "\n\n"
        cell.metadata.update({"lines_to_next_cell": 2, "collapsed": True, "scrolled": False})
        cell.metadata.update({"execution": {"iopub.status.busy": "2026"}, "editor": "x"})
        if cell.cell_type == "code":
            cell.execution_count += 20
    find(notebook, "def my_answer").source += "   \t"
    notebooks.clean(notebook)
    assert notebooks.text_of(notebook) == before


def test_clean_keeps_line_breaks_of_prose():
    notebook = good()
    prose("One line  \nand the next")(notebook)
    notebooks.clean(notebook)
    assert "One line  \nand" in find(notebook, "## Try it").source


def test_clean_is_idempotent_and_leaves_the_numbers_of_the_results_equal():
    notebook = good()
    outputs(stream("a\r"), stream("b\n"), new_output("execute_result", data={}), stream("c\n"))(
        notebook
    )
    notebooks.clean(notebook)
    once = notebooks.text_of(notebook)
    notebooks.clean(notebook)
    assert notebooks.text_of(notebook) == once
    cell = find(notebook, "print(28)")
    assert cell.outputs[1].execution_count == cell.execution_count == 3


BAR = "\r 40%|████      | 4/10 [00:01<00:02,  2.1it/s]"


@pytest.mark.parametrize(
    ("streams", "expected"),
    [
        ([("stderr", BAR), ("stderr", BAR.replace("40", "100"))], []),
        ([("stderr", f"{BAR}\n"), ("stderr", "\n")], []),
        ([("stderr", f"{BAR}\nUserWarning: slow\n")], [("stderr", "UserWarning: slow\n")]),
        ([("stdout", "a"), ("stdout", "b\n")], [("stdout", "ab\n")]),
        ([("stdout", "one\rtwo\n")], [("stdout", "two\n")]),
        ([("stdout", "one\r\ntwo\n")], [("stdout", "one\ntwo\n")]),
        ([("stdout", "100 %\n")], [("stdout", "100 %\n")]),
        (
            [("stdout", "a\n"), ("stderr", "w\n"), ("stdout", "b\n")],
            [("stdout", "a\n"), ("stderr", "w\n"), ("stdout", "b\n")],
        ),
    ],
)
def test_clean_streams(streams, expected):
    cleaned = notebooks.clean_outputs([stream(text, name) for name, text in streams])
    assert [(output.name, output.text) for output in cleaned] == expected


def test_clean_drops_widgets_and_keeps_figures():
    widget = new_output("display_data", data={notebooks.WIDGET: {}, "text/plain": "bar"})
    assert notebooks.clean_outputs([widget, figure()]) == [figure()]


def test_clean_does_not_number_what_was_never_run():
    notebook = good()
    setting("down()", execution_count=None, outputs=[])(notebook)
    notebooks.clean(notebook)
    assert find(notebook, "down()").execution_count is None
    assert find(notebook, "down() ==").execution_count == 6


def test_clean_command_writes_only_what_was_not_clean(path, capsys):
    notebook = good()
    save(notebook, path)
    assert notebooks.main(["clean", str(path)]) == 0
    assert capsys.readouterr().out == ""
    notebook.metadata.language_info = {"name": "python"}
    path.write_text(json.dumps(notebook))
    assert notebooks.main(["clean", str(path)]) == 0
    assert capsys.readouterr().out == f"cleaned {path}\n"
    assert path.read_text() == notebooks.text_of(good())


@pytest.mark.parametrize("text", ["{", "[]", '{"cells": 3}', ""])
@pytest.mark.parametrize("command", ["run", "clean", "check", "numbers"])
def test_file_that_is_no_notebook(path, text, command):
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"04_fcu\.ipynb is not a notebook in JSON"):
        notebooks.main([command, str(path)], path.parents[1])
    assert path.read_text() == text


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(SystemExit, match=r"there is no .*none.ipynb"):
        notebooks.main(["run", str(tmp_path / "none.ipynb")])


# Running


def test_second_run_changes_no_byte(path, capsys):
    pyplot = "import matplotlib.pyplot as plt\n\nplt.plot([1, 2])\nplt.show()"
    cells = [
        new_code_cell("import os\nimport sys\nprint('a')\nprint('b')"),
        new_code_cell(f"print({BAR!r}, file=sys.stderr)\nos.environ['OMP_NUM_THREADS']"),
        new_code_cell(pyplot, metadata={"mystnb": WORDS, "collapsed": True}),
        new_code_cell("1 / 0", metadata={"tags": ["nbval-skip"]}, outputs=[stream("stored\n")]),
        new_markdown_cell("## End"),
        new_code_cell("import importlib.util\n\nimportlib.util.find_spec('conformer_src').name"),
        new_code_cell("os.path.basename(os.getcwd())"),
    ]
    save(new_notebook(cells=cells), path)
    assert notebooks.main(["run", str(path)]) == 0
    once = path.read_bytes()
    assert "04_fcu.ipynb: " in capsys.readouterr().out
    assert notebooks.main(["run", str(path)]) == 0
    assert path.read_bytes() == once
    first, second, plot, skipped, _, found, last = nbformat.reads(once.decode(), 4).cells
    assert [output.text for output in first.outputs] == ["a\nb\n"]
    assert [output.data["text/plain"] for output in second.outputs] == ["'1'"]
    assert "image/png" in plot.outputs[0].data
    assert plot.metadata == {"mystnb": WORDS}
    assert skipped.outputs == [stream("stored\n")]
    assert found.outputs[0].data["text/plain"] == "'conformer_src'"
    assert last.outputs[0].data["text/plain"] == "'chapters'"
    assert last.execution_count == 6


def test_cell_that_fails_is_named_and_nothing_is_written(path, capsys):
    source = "def f():\n    return 1 / 0\n\n\nf()"
    save(new_notebook(cells=[new_markdown_cell("# A"), new_code_cell(source)]), path)
    before = path.read_bytes()
    assert notebooks.main(["run", str(path)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"{path}, cell 2: ZeroDivisionError: division by zero\n")
    assert "return 1 / 0" in shown
    assert "\x1b" not in shown
    assert shown.endswith("nothing was written\n")
    assert path.read_bytes() == before


def test_cell_that_takes_too_long_is_named(path):
    save(new_notebook(cells=[new_code_cell("1"), new_code_cell("while True: pass")]), path)
    with pytest.raises(notebooks.RunError, match="cell 2 took more than 1 s"):
        notebooks.run(path, timeout=1)


def test_kernel_that_dies_is_named(path):
    save(new_notebook(cells=[new_code_cell("import os\nos._exit(1)")]), path)
    with pytest.raises(notebooks.RunError, match="cell 1: the kernel died"):
        notebooks.run(path)


# Numbers

SHOWN = """28 layers, 23,522 parameters, accuracy 0.8341
step   loss   top-1 %
  70  -1.532   66.0
eps 3.2e-07, 5.226 G, 14.5%
"""


def listed(notebook: NotebookNode, path: Path) -> list[str]:
    """Return the lines of `numbers`."""
    page = notebook_rules.Page(path, path.parents[1], "", notebook)
    lines = list(number_rule.listing(page))
    faults = [line for is_fault, line in lines if is_fault]
    assert len(list(number_rule.has_founded_numbers(page))) == len(faults)
    assert [line for _, line in lines if "(an integer, no fault)" not in line] == faults
    return [line for _, line in lines]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        # as it is written
        ("An accuracy of 83 %, of 83.4 %, of 0.834.", []),
        ("An accuracy of 87 %.", ["87 %"]),
        ("An accuracy of 87%.", ["87 %"]),
        ("An accuracy of 87 percent.", ["87 percent"]),
        ("An accuracy of 87 per cent.", ["87 percent"]),
        ("It gains 3 percentage points.", ["3 percent"]),
        ("An accuracy of 0.87.", ["0.87"]),
        ("An accuracy of .87.", [".87"]),
        ("An accuracy of 83.5 %, **0.835**!", ["83.5 %", "0.835"]),
        ("It falls by 1.53, to -1.532 or −1.5.", []),
        ("It falls to -0.834.", ["-0.834"]),
        ("It falls by −1.6.", ["-1.6"]),
        ("It stays below 1e-6, 1e-06 and 10⁻⁶.", ["1e-6", "1e-06", "1e-6"]),
        ("It stays at 3.2e-7 and 3e-7 and 3.2 × 10⁻⁷.", []),
        ("It is 0.84-0.85 or 0.83–0.84.", ["0.84", "0.85", "0.84"]),
        (
            "It is 86 to 87 %, 86–87 %, or 85, 83 and 84 %.",
            ["86 %", "87 %", "86 %", "87 %", "85 %", "84 %"],
        ),
        ("In $(0.87,0.834)$ and 0.834,0.88.", ["0.87", "0.88"]),
        ("It is 2.5x, 2.5× as fast, or 9.9s.", ["2.5", "2.5", "9.9"]),
        ("`0.87`, `87 %` and `-0.87` are numbers in disguise.", ["0.87", "87 %", "-0.87"]),
        ("`lr=0.87` is code, and so is `x[0.87]`.", []),
        # counts and scales
        ("It has 23,522 parameters, 23.5 thousand, 23.5k.", []),
        (
            "It has 23,523 parameters, 23.6 thousand, 65504 or 1.28 million.",
            ["23,523", "23.6 thousand", "65504", "1.28 million"],
        ),
        ("It takes 5.2 G, 5.23 G, 5.2 billion.", []),
        ("It takes 5.2 or 5.3 G, not 5.2 and 5 G.", ["5.3 G", "5.2"]),
        ("A rate of 0.87 and 14.5 %.", ["0.87"]),
        # what shows what
        ("The column says 66 %, a line 14.5 %.", []),
        ("28 layers are no 28.0.", ["28.0"]),
        # inputs
        ("A rate of 4e-3 or 0.004, 15 %, 0.25 and 1.5.", []),
        ("A rate of 0.00401, in 100 %.", ["0.00401", "100 %"]),
        ("A dict of results has 91.5, a comment 92.5, a string 93.5.", ["91.5", "92.5", "93.5"]),
        ("What a string has typed: 94.5 %. What it computes beside: 95.5 %.", ["94.5 %"]),
        # where it stands
        ("### Reaching 87 %", ["87 %"]),
        ("- a list: 0.87\n- 0.834", ["0.87"]),
        ("> quoted 0.87", ["0.87"]),
        ("$0.87$ and $x = 83{,}500$ and $10^{-6}$.", ["0.87", "83,500", "1e-6"]),
        ("$$ a = 87\\% $$ (eq-a)", ["87 %"]),
        ("![87 % of them](../book/map.svg)", ["87 %"]),
        ("<details><summary>87 %</summary>\n\nIt is 88 %.\n\n</details>", ["87 %", "88 %"]),
        ('<img alt="87 %" src="../book/map.svg">', ["87 %"]),
        ("```python\n0.87\n```", []),
        ("| a | b |\n|---|---|\n| 0.834 | 0.87 |", ["0.87"]),
        # what is no claim
        ("Section 3.2, table 3.1, version 2.6, torch 2.15.0, v1.15.", []),
        ("12 heads, ViT-16, ViT-B/16, 7x7, in 2021.", []),
    ],
)
def test_numbers_that_nothing_shows(path, text, numbers):
    notebook = good()
    outputs(stream(SHOWN))(notebook)
    taken = "fit(lr=4e-3, drop=0.15)\nrates = [-0.25]\nassert down() < 1.5"
    typed = '{"ours": 91.5}  # 92.5\nlabel = "93.5"'
    show = 'print(f"paper 94.5 %, ours {down():.1f} %")'
    source("down() ==", f"{taken}\n{typed}\n{show}")(notebook)
    setting("fit", outputs=[stream("paper 94.5 %, ours 95.5 %\n")])(notebook)
    prose(text)(notebook)
    cell = number_of(notebook, "## Try")
    lines = listed(notebook, path)
    assert [re.sub(r", line \d+", "", line).split(": ")[:2] for line in lines] == [
        [f"04_fcu.ipynb, cell {cell}", number] for number in numbers
    ]


@pytest.mark.parametrize(
    ("text", "is_cited"),
    [
        ("As [Peng](https://a.org) say, 81.3 %.", True),
        ("As Peng et al. (2021) say, 81.3 %.", True),
        ("It reaches 81.3 % (Peng et al., 2021).", True),
        ("It reaches 81.3 % (He and Sun, 2015).", True),
        ("It reaches 81.3 % (their section 4.2).", True),
        ("It reaches 81.3 %, says arXiv:2105.03889.", True),
        ("It reaches 81.3 %, says issue #12.", True),
        ("It reaches 81.3 %. So say [they](https://a.org).", False),
        ("They [say](https://a.org) so; here it is 81.3 %.", False),
        ("In March 2021 it reached 81.3 %.", False),
        ("It reached 81.3 % (in the year after 2020).", False),
        ("It reaches 81.3 %, as table 2 shows.", False),
        ("[Above](#set-up) it is 81.3 %.", False),
        ("[The map](../book/map.svg) says 81.3 %.", False),
        ("[Chapter 5](05_other.ipynb) prints 81.3 %.", True),
        ("[Chapter 5](05_other.ipynb) prints 81.4 %.", False),
        ("[Measured](../book/stored.json): 82.5 %.", True),
        ("[Measured](../book/stored.json): 81.3 %.", False),
        ("| a |\n|---|\n| 81.3 % |", False),
        ("| a | b |\n|---|---|\n| [Peng](https://a.org) | 81.3 % |", True),
        ("| a | [Peng](https://a.org) |\n|---|---|\n| b | 81.3 % |", True),
        ("| [Peng](https://a.org) | a |\n|---|---|\n| b | 81.3 % |", False),
        ("| [Peng](https://a.org) | a |\n|---|---|\n| 1 | b |\n| 81.3 % | c |", True),
        ("As [Peng](https://a.org):\n\n| a |\n|---|\n| 81.3 % |", True),
        ("| a |\n|---|\n| 81.3 % |\n\n*From [Peng](https://a.org).*", True),
        ("As [Peng](https://a.org). More:\n\n| a |\n|---|\n| 81.3 % |", False),
        ("As [Peng](https://a.org).\n\nMore.\n\n| a |\n|---|\n| 81.3 % |", False),
    ],
)
def test_sources_of_numbers(path, text, is_cited):
    other = good()
    outputs(stream("81.3 %"))(other)
    save(other, path.with_name("05_other.ipynb"))
    (path.parents[1] / "book/stored.json").write_text('{"rows": [{"sum": 82.5}]}')
    notebook = good()
    prose(text)(notebook)
    assert bool(listed(notebook, path)) is not is_cited


def test_numbers_are_found_by_line_and_in_the_words_of_figures(path):
    notebook = good()
    prose("One line.\nThe second line\nhas 0.87. The same has 0.88\n\n| a |\n|---|\n| 0.89 |")(
        notebook
    )
    setting("plt.show()", metadata=words("It rises to 87 %", "A fall.\nTo 0.5"))(notebook)
    plot, text = number_of(notebook, "plt.show()"), number_of(notebook, "## Try")
    assert listed(notebook, path) == [
        f"04_fcu.ipynb, cell {plot}, alt text: 87 %: It rises to 87 %",
        f"04_fcu.ipynb, cell {plot}, caption: 0.5: To 0.5",
        f"04_fcu.ipynb, cell {text}, line 5: 0.87: The second line has 0.87.",
        f"04_fcu.ipynb, cell {text}, line 5: 0.88: The same has 0.88",
        f"04_fcu.ipynb, cell {text}, line 9: 0.89: 0.89",
    ]
    expected = "line 5: no cell prints 0.87, no source is named: The second line has 0.87."
    assert (text, expected) in findings(notebook, path)


def test_numbers_command_lists_and_fails(path, capsys):
    notebook = good()
    prose("It has 29 layers.")(notebook)
    save(notebook, path)
    where = f"04_fcu.ipynb, cell {number_of(notebook, '## Try')}, line 3"
    assert notebooks.main(["numbers", str(path)], path.parents[1]) == 0
    expected = f"{where}: 29 (an integer, no fault): It has 29 layers.\n"
    assert capsys.readouterr().out == expected
    prose("It gains 2.9 %.")(notebook)
    save(notebook, path)
    assert notebooks.main(["numbers", str(path)], path.parents[1]) == 1
    assert capsys.readouterr().out == f"{where}: 2.9 %: It gains 2.9 %.\n"
    assert notebooks.main(["check", str(path)], path.parents[1]) == 1
    assert f"{where.replace(', line', ': line')}: no cell prints 2.9 %" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It has 29 layers.", "29"),
        ("It has 28 layers, like 1,000 others.", None),
        ("●○○○○ · 15 minutes · predict", None),
        ("`29` is a number in disguise.", "29"),
    ],
)
def test_integers_are_listed_and_are_no_fault(path, text, number):
    notebook = good()
    outputs(stream("28 of 1000\n"))(notebook)
    prose(text)(notebook)
    lines = listed(notebook, path)
    where = f"04_fcu.ipynb, cell {number_of(notebook, '## Try')}, line 3"
    expected = f"{where}: {number} (an integer, no fault): "
    assert [line[: len(expected)] for line in lines] == ([expected] if number else [])


@pytest.mark.parametrize(
    ("printed", "is_shown"),
    [
        ("step 70: 14.5 %", False),
        ("step 70: 14.5%\nstep 80: 15 percent", False),
        ("70", False),
        ("70.2", False),
        ("0.7", True),
        ("0.698", True),
        ("0.69", False),
        ("70.0%", True),
        ("70 per cent", True),
        ("accuracy in percent\n70.2", True),
        ("top-1 %\n70", True),
        ("<IPython.core.display.HTML object>", False),
    ],
)
def test_what_shows_a_percentage(path, printed, is_shown):
    notebook = good()
    page = new_output("display_data", data={"text/html": "<p>70 %</p>", "text/plain": printed})
    outputs(page)(notebook)
    prose("It reaches 70 %.")(notebook)
    assert bool(listed(notebook, path)) is not is_shown


def test_ledger_gives_integers_and_nothing_else(path):
    notebook = good()
    replaced("## Shapes", "| Ti | 64 |", "| Ti | 64 |\n| parameters | 23,522 |\n| share | 0.87 |")(
        notebook
    )
    replaced("## By hand", "neither is", "64 of 23,522 is no")(notebook)
    cell = number_of(notebook, "## Shapes")
    assert listed(notebook, path) == [f"04_fcu.ipynb, cell {cell}, line 7: 0.87: 0.87"]


# The sanitising file of nbval


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<function f at 0x7f3c12a0d430>", "<function f at 0xADDRESS>"),
        ("200x100, 0x10", "200x100, 0x10"),
        ("a\n 40%|████      | 4/10 [00:01<00:02,  2.1it/s]\nb", "a\nb"),
        ("50% | of 4/10", "50% | of 4/10"),
        ("tensor([1.], device='cuda:0')", "tensor([1.])"),
        ("tensor([1.],\n       device='cuda:1', grad_fn=<A>)", "tensor([1.], grad_fn=<A>)"),
        ("device(type='cuda', index=0)", "device(type='cpu')"),
        ("device(type='cuda')", "device(type='cpu')"),
        ("cuda:0\n", "cpu\n"),
        ("cuda is there: True, cuda_version", "cuda is there: True, cuda_version"),
    ],
)
def test_nbval_sanitizes(text, expected):
    config = (ROOT / "tests/nbval.cfg").read_text()
    patterns = get_sanitize_patterns(config)
    assert len(patterns) == config.count("regex:") == 5
    for pattern, replacement in patterns:
        text = re.sub(pattern, replacement, text)
    assert text == expected
