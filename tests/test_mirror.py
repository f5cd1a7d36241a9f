"""The mirror, on small trees: what is caught, in which words, and what the copies change."""

import re
from pathlib import Path

import mirror
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = '"""First steps."""\n\nimport math\n\n'
SIZE = "SIZE = 3  # as in the book"
AREA = '''\
# Used everywhere.
def area(radius):
    """Return the area."""
    return math.pi * radius**2  # not radius * 2'''
BOX = '''\
@final
class Box:
    """A box."""

    side = 1
    # nothing else'''
PRIVATE = "def _helper():\n    return 1"


def code(source: str, **extra) -> dict:
    return nbformat.v4.new_code_cell(source, **extra)


def save(path: Path, *cells: dict | str) -> None:
    cells = [nbformat.v4.new_markdown_cell("# Title"), *cells]
    cells = [code(cell) if isinstance(cell, str) else cell for cell in cells]
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=cells)) + "\n")


def marked(*texts: str, module: str = "first") -> str:
    return "\n".join([f"# conformer_src/{module}.py", "\n\n\n".join(texts)])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A package of two modules with a chapter each, and of the modules that need none."""
    package = tmp_path / "conformer_src"
    (package / "checks").mkdir(parents=True)
    (tmp_path / "chapters").mkdir()
    (package / "__init__.py").write_text("from conformer_src.first import area\n\nNAME = 1\n")
    (package / "cli.py").write_text("import conformer_src\n\n\ndef main():\n    pass\n")
    (package / "checks/first.py").write_text("from conformer_src import area\n\nCHECKS = 1\n")
    texts = [SIZE, AREA, BOX, PRIVATE]
    (package / "first.py").write_text(IMPORTS + "\n\n\n".join(texts) + "\n")
    (package / "second.py").write_text(
        "from conformer_src.first import area\n\n\ndef double(value):\n    return 2 * value\n"
    )
    save(tmp_path / "chapters/01_first.ipynb", marked(SIZE, AREA), "area(SIZE)", marked(BOX))
    save(
        tmp_path / "chapters/02_second.ipynb",
        marked("def double(value):\n    return 2 * value", module="second"),
    )
    return tmp_path


def problems(root: Path) -> str:
    return "\n".join(map(str, mirror.check(root)))


def edit(root: Path, old: str, new: str, path: str = "conformer_src/first.py") -> None:
    text = (root / path).read_text()
    assert old in text
    (root / path).write_text(text.replace(old, new))


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_book_itself(capsys):
    assert mirror.main(["check"]) == 0, capsys.readouterr().err


def test_equal_trees_pass(root, capsys):
    assert mirror.main(["check"], root) == 0
    assert "agree" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "cell", "line", "name"),
    [
        ("Return the area.", "Return an area.", 2, 7, "area"),
        ("not radius * 2", "not 2 * radius", 2, 8, "area"),
        ("# Used everywhere.", "# Used here.", 2, 5, "area"),
        ("as in the book", "as in a book", 2, 2, "SIZE"),
        ("    # nothing else", "    # nothing", 4, 7, "Box"),
        ("@final", "@sealed", 4, 2, "Box"),
        ("    side = 1", "    side = 1 ", 4, 6, "Box"),
        ('"""A box."""\n\n', '"""A box."""\n', 4, 5, "Box"),
    ],
    ids=["docstring", "comment", "comment above", "constant", "last", "decorator", "blank", "line"],
)
def test_difference_names_cell_and_line_and_shows_the_diff(root, old, new, cell, line, name):
    edit(root, old, new)
    (problem,) = mirror.check(root)
    assert problem.where == f"chapters/01_first.ipynb, cell {cell}, line {line}"
    source = (root / "conformer_src/first.py").read_text().split("\n")
    file_line = int(re.search(r"line (\d+)$", problem.sentence)[1])
    cells = nbformat.read(root / "chapters/01_first.ipynb", 4).cells
    lines = cells[cell - 1].source.split("\n")
    assert problem.sentence.startswith(f"{name} differs from conformer_src/first.py, line ")
    assert source[file_line - 1] != lines[line - 1]
    assert "--- conformer_src/first.py\n+++ chapters/01_first.ipynb, cell" in problem.diff
    shown = problem.diff.split("\n")
    assert f"-{source[file_line - 1]}" in shown or f"+{lines[line - 1]}" in shown


def test_definition_missing_in_the_file(root):
    edit(root, AREA, "")
    assert "01_first.ipynb, cell 2, line 5: area is not in conformer_src/first.py" in problems(root)


def test_orphan(root):
    edit(root, PRIVATE, "WIDE, HIGH = 1, 2")
    assert "conformer_src/first.py, line 22: WIDE, HIGH stands in no marked cell" in problems(root)


def test_orphan_that_begins_with_an_underscore_is_none(root):
    assert "_helper" in (root / "conformer_src/first.py").read_text()
    assert problems(root) == ""


@pytest.mark.parametrize("name", ["third", "parts/third"])
def test_module_without_chapter(root, name):
    path = root / f"conformer_src/{name}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text("def three():\n    pass\n")
    assert f"conformer_src/{name}.py, line 1: this module has no chapter" in problems(root)


def test_definition_in_two_cells(root):
    save(root / "chapters/01_first.ipynb", marked(SIZE, AREA), marked(BOX), "1", marked(AREA))
    assert problems(root).startswith(
        "chapters/01_first.ipynb, cell 5, line 2: area stands in cell 2 already"
    )


def test_definition_twice_in_the_file(root):
    edit(root, PRIVATE, SIZE)
    assert "first.py, line 22: SIZE is defined twice in this file" in problems(root)


def test_marker_of_a_module_that_does_not_exist(root):
    save(root / "chapters/02_second.ipynb", marked("A = 1", module="secnod"))
    assert "02_second.ipynb, cell 2, line 1: there is no conformer_src/secnod.py" in problems(root)


def test_marker_of_another_chapter(root):
    edit(root, "area(SIZE)", "# conformer_src/second.py\\nA = 1", "chapters/01_first.ipynb")
    expected = "cell 3, line 1: this chapter mirrors conformer_src/first.py, not another module"
    assert expected in problems(root)


def test_chapter_without_its_module(root):
    (root / "conformer_src/second.py").unlink()
    assert "02_second.ipynb, cell 2, line 1: there is no conformer_src/second.py" in problems(root)


@pytest.mark.parametrize(
    ("line", "source"),
    [
        (1, "#conformer_src/first.py\nA = 1"),
        (1, "# conformer_src/first.py \nA = 1"),
        (1, " # conformer_src/first.py\nA = 1"),
        (1, "# conformer_src/first\nA = 1"),
        (1, "# conformer_src.first\nA = 1"),
        (1, "# Conformer_src/first.py:\nA = 1"),
        (2, "\n# conformer_src/first.py\nA = 1"),
        (3, "A = 1\n\n# conformer_src/first.py\nB = 1"),
    ],
)
def test_marker_that_is_almost_right(root, line, source):
    save(root / "chapters/01_first.ipynb", marked(SIZE, AREA), marked(BOX), source)
    (problem,) = mirror.check(root)
    assert problem.where == f"chapters/01_first.ipynb, cell 4, line {line}"
    assert "looks like a marker; write `# conformer_src/first.py`" in problem.sentence


def test_comment_that_mentions_a_file_is_no_marker(root):
    source = "# conformer_src/first.py has more of these\nA = 1"
    save(root / "chapters/01_first.ipynb", marked(SIZE, AREA), marked(BOX), source)
    assert problems(root) == ""


@pytest.mark.parametrize("stray", ["import math", "box = Box()", "# a comment\n\n", "Pair = tuple"])
def test_marked_cell_holds_nothing_but_definitions(root, stray):
    save(root / "chapters/01_first.ipynb", marked(stray, SIZE, AREA), marked(BOX))
    (problem,) = mirror.check(root)
    assert problem.where == "chapters/01_first.ipynb, cell 2, line 2"
    assert f"`{stray.strip()}` belongs to no class, function" in problem.sentence


def test_syntax_error_in_a_cell(root):
    save(root / "chapters/01_first.ipynb", marked(SIZE, "def area(:"), marked(BOX))
    assert "chapters/01_first.ipynb, cell 2, line 5: syntax error: " in problems(root)


def test_syntax_error_in_an_unmarked_cell_but_not_magic(root):
    cells = marked(SIZE, AREA), marked(BOX), "%timeit 1", "!ls", "1 +"
    save(root / "chapters/01_first.ipynb", *cells)
    (problem,) = mirror.check(root)
    assert problem.where == "chapters/01_first.ipynb, cell 6, line 1"


def test_syntax_error_in_a_file(root):
    edit(root, "def area(radius):", "def area(radius:")
    (problem,) = mirror.check(root)
    assert problem.where == "conformer_src/first.py, line 9"
    assert problem.sentence.startswith("syntax error: ")


def test_file_that_is_no_text(root):
    (root / "conformer_src/first.py").write_bytes(b"A = '\xff\xfe'\n")
    assert "conformer_src/first.py: not Python text" in problems(root)


@pytest.mark.parametrize(
    "text", ["{'cells': []}", '{"cells": [}\n<<<<<<< HEAD', "[]", '{"cells": 3}', ""]
)
def test_notebook_that_is_none(root, text):
    (root / "chapters/01_first.ipynb").write_text(text)
    assert "chapters/01_first.ipynb: not a notebook in JSON (" in problems(root)


def test_notebook_with_another_name(root):
    (root / "chapters/02_second.ipynb").rename(root / "chapters/second.ipynb")
    assert "chapters/second.ipynb: a chapter's file is called NN_name.ipynb" in problems(root)


def test_two_chapters_with_one_number(root):
    save(root / "chapters/01_other.ipynb", "A = 1")
    assert "chapters/01_other.ipynb: another chapter has this number" in problems(root)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "from conformer_src.second import double",
            "chapter 01 imports conformer_src.second of ch",
        ),
        (
            "from conformer_src import second",
            "chapter 01 imports conformer_src.second of chapter 02",
        ),
        ("from . import second", "chapter 01 imports conformer_src.second of chapter 02"),
        ("from .second import double", "chapter 01 imports conformer_src.second of chapter 02"),
        (
            "import conformer_src.second as s",
            "chapter 01 imports conformer_src.second of chapter 02",
        ),
        ("def _f():\n    import conformer_src.second", "chapter 01 imports conformer_src.second"),
        (
            "from conformer_src.checks import first",
            "the package does not import conformer_src.checks",
        ),
        ("from conformer_src import cli", "the package does not import conformer_src.cli"),
        ("import conformer_src", "conformer_src is no module of a chapter; import from the module"),
        ("from conformer_src import area", "conformer_src.area is no module of a chapter"),
    ],
)
def test_import_that_points_upwards(root, line, words):
    edit(root, "import math\n", f"import math\n{line}\n")
    (problem,) = mirror.check(root)
    number = 4 + line.count("\n")
    assert problem.where == f"conformer_src/first.py, line {number}"
    assert problem.sentence.startswith(words)


def test_public_face_imports_modules_but_not_checks(root):
    edit(root, "NAME = 1", "from conformer_src import checks", "conformer_src/__init__.py")
    assert problems(root).startswith("conformer_src/__init__.py, line 3: the package does not")


def test_check_of_one_chapter(root, capsys):
    edit(root, "2 * value", "3 * value", "conformer_src/second.py")
    (root / "conformer_src/third.py").write_text("")
    assert mirror.main(["check", "--chapter", "01"], root) == 0
    assert mirror.main(["check", "--chapter", "2"], root) == 1
    shown = capsys.readouterr().err
    assert "-    return 3 * value\n+    return 2 * value" in shown
    assert "third" not in shown


@pytest.mark.parametrize("words", [[], ["sync"], ["check", "--chapter", "07"]])
def test_usage(root, words, capsys):
    with pytest.raises(SystemExit) as stop:
        mirror.main(words, root)
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_to_notebooks_changes_the_cell_and_nothing_else(root):
    output = nbformat.v4.new_output("stream", text="3\n")
    cells = code(marked(SIZE, AREA), metadata={"tags": ["keep"]}), marked(BOX)
    save(root / "chapters/01_first.ipynb", *cells, code("SIZE", outputs=[output]))
    before = contents(root)
    edit(root, "Return the area.", "Return the area of a circle.")
    edit(root, "    # nothing else", "    # nothing else\n    # at all")
    assert mirror.main(["to-notebooks"], root) == 0
    after = contents(root)
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed == {"first.py", "01_first.ipynb"}
    old = before[root / "chapters/01_first.ipynb"].decode().splitlines()
    new = after[root / "chapters/01_first.ipynb"].decode().splitlines()
    assert [line.strip() for line in new if line not in old] == [
        '"    \\"\\"\\"Return the area of a circle.\\"\\"\\"\\n",',
        '"    # nothing else\\n",',
        '"    # at all"',
    ]
    assert nbformat.reads("\n".join(new), 4).cells[3].outputs == [output]


def test_to_package_changes_the_definition_and_appends_what_is_new(root):
    new = AREA.replace("the area", "the area of a circle")
    added = "def volume(side):\n    return side**3"
    save(root / "chapters/01_first.ipynb", marked(SIZE, new), marked(BOX, added))
    assert mirror.main(["to-package"], root) == 0
    texts = [SIZE, new, BOX, PRIVATE, added]
    expected = IMPORTS + "\n\n\n".join(texts) + "\n"
    assert (root / "conformer_src/first.py").read_text() == expected


def test_to_package_makes_a_new_module(root):
    save(root / "chapters/03_third.ipynb", marked("A = 1", "B = 2", module="third"))
    assert mirror.main(["to-package"], root) == 0
    assert (root / "conformer_src/third.py").read_text() == "A = 1\n\n\nB = 2\n"


@pytest.mark.parametrize("command", ["to-notebooks", "to-package"])
def test_copying_equal_trees_writes_nothing(root, command):
    before = contents(root)
    assert mirror.main([command], root) == 0
    assert contents(root) == before


@pytest.mark.parametrize("command", ["to-notebooks", "to-package"])
@pytest.mark.parametrize(
    "broken", ["conformer_src/second.py", "chapters/02_second.ipynb", "conformer_src/cli.py"]
)
def test_copying_writes_nothing_if_a_file_cannot_be_read(root, command, broken, capsys):
    edit(root, "Return the area.", "Return an area.")
    (root / broken).write_text("def (\n")
    before = contents(root)
    assert mirror.main([command], root) == 1
    assert contents(root) == before
    shown = capsys.readouterr().err
    assert broken in shown
    assert "nothing was written" in shown


def test_to_notebooks_refuses_a_definition_that_the_file_lacks(root, capsys):
    edit(root, "Return the area.", "Return an area.")
    edit(root, BOX, "")
    before = contents(root)
    assert mirror.main(["to-notebooks"], root) == 1
    assert contents(root) == before
    assert "Box is not in conformer_src/first.py" in capsys.readouterr().err


def test_to_package_refuses_a_definition_in_two_cells(root, capsys):
    cells = marked(SIZE, AREA), marked(BOX), marked(AREA.replace("the area", "an area"))
    save(root / "chapters/01_first.ipynb", *cells)
    before = contents(root)
    assert mirror.main(["to-package"], root) == 1
    assert contents(root) == before
    assert "area stands in cell 2 already" in capsys.readouterr().err


def test_copying_tells_what_it_cannot_repair(root, capsys):
    edit(root, PRIVATE, "def helper():\n    return 1")
    assert mirror.main(["to-notebooks"], root) == 1
    assert "helper stands in no marked cell" in capsys.readouterr().err


def test_failed_write_leaves_every_file_as_it_was(root, monkeypatch):
    edit(root, "Return the area.", "Return an area.")
    edit(root, "2 * value", "3 * value", "conformer_src/second.py")
    before = contents(root)
    real, calls = Path.write_text, []

    def full_disk(path, *args, **kwargs):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("no space left on device")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space left"):
        mirror.main(["to-notebooks"], root)
    assert contents(root) == before
