"""Each exercise of each chapter: the stub, the printed solution, and wrong answers.

Then the machinery below the checks: `conformer_src/checks/__init__.py`.
"""

import ast
import contextlib
import io
import runpy
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import exercises
import mirror
import notebooks
import pytest
import torch
from exercises import Exercise
from nbformat import NotebookNode
from torch import nn

from conformer_src import checks

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9][0-9]_*.ipynb"))
NAMES = [path.stem.partition("_")[2] for path in CHAPTERS]


@lru_cache
def notebook(name: str) -> NotebookNode:
    """Read the chapter of a module."""
    return notebooks.read(CHAPTERS[NAMES.index(name)])


@lru_cache
def wrong_answers(name: str) -> dict[str, list[tuple[str, str]]]:
    """Read the wrong answers to a chapter's exercises."""
    path = ROOT / "tests" / "wrong_answers" / f"{name}.py"
    return runpy.run_path(str(path))["WRONG"] if path.exists() else {}


def is_setting(node: ast.stmt) -> bool:
    """Whether a statement of the set-up only names something or seeds."""
    return isinstance(node, ast.Assign | ast.AnnAssign) or (
        isinstance(node, ast.Expr) and ast.unparse(node).startswith("torch.manual_seed(")
    )


@lru_cache
def prepared(name: str) -> dict:
    """Run what a reader of the exercises has in memory: imports, set-up, mirrored definitions."""
    namespace = {"__name__": "__main__"}
    setting_up = True
    for number, cell in enumerate(notebook(name).cells, 1):
        if cell.cell_type == "markdown":
            setting_up = setting_up and "\n## Why" not in f"\n{cell.source}"
            continue
        if mirror.MAGIC.search(cell.source):
            continue
        marked = mirror.MARKER.fullmatch(cell.source.split("\n")[0])
        nodes = [
            node
            for node in ast.parse(cell.source).body
            if marked
            or isinstance(node, ast.Import | ast.ImportFrom)
            or (setting_up and is_setting(node))
            or any(constant.isupper() for constant in mirror.names(node))
        ]
        module = ast.Module(nodes, type_ignores=[])
        exec(compile(module, f"<{name}, cell {number}>", "exec"), namespace)
    return namespace


def verdict(name: str, exercise: Exercise, answer: str) -> str:
    """Run an answer in the place of the stub, then the check cell; return what it printed."""
    namespace = dict(prepared(name))
    exec(compile(answer, "<answer>", "exec"), namespace)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(exercise.call, namespace)
    return printed.getvalue()


def one_line(text: str) -> bool:
    return text.endswith("\n") and text.count("\n") == 1


EXERCISES = [(name, exercise) for name in NAMES for exercise in exercises.exercises(notebook(name))]
WHOLE = [
    pytest.param(name, exercise, id=f"{name}-{exercise.check}")
    for name, exercise in EXERCISES
    if not list(exercise.faults())
]
WRONG = [
    pytest.param(*case.values, answer, words, id=f"{case.id}-{number}")
    for case in WHOLE
    for number, (answer, words) in enumerate(
        wrong_answers(case.values[0]).get(case.values[1].check, []), 1
    )
]


def test_there_are_exercises():
    assert len(EXERCISES) >= 3 * len(CHAPTERS) > 0


@pytest.mark.parametrize(
    ("name", "exercise"), [pytest.param(n, e, id=f"{n}-{e.number}") for n, e in EXERCISES]
)
def test_exercise_is_complete(name: str, exercise: Exercise):
    assert list(exercise.faults()) == []


@pytest.mark.parametrize("name", NAMES)
def test_each_check_belongs_to_one_exercise_and_has_two_wrong_answers(name: str):
    module = import_module(f"conformer_src.checks.{name}")
    public = sorted(
        key
        for key, value in vars(module).items()
        if key.startswith("check_") and value.__module__ == module.__name__
    )
    used = sorted(case.values[1].check for case in WHOLE if case.values[0] == name)
    assert used == public
    assert sorted(wrong_answers(name)) == public
    assert min(len(wrong) for wrong in wrong_answers(name).values()) >= 2


@pytest.mark.parametrize(("name", "exercise"), WHOLE)
def test_stub_is_not_attempted(name: str, exercise: Exercise):
    assert verdict(name, exercise, exercise.stub) == "… not attempted yet\n"


@pytest.mark.parametrize(("name", "exercise"), WHOLE)
def test_solution_passes(name: str, exercise: Exercise):
    text = verdict(name, exercise, exercise.solution)
    assert text.startswith("✓ ")
    assert text != "✓ None\n"
    assert one_line(text)


@pytest.mark.parametrize(("name", "exercise", "answer", "words"), WRONG)
def test_wrong_answer_is_named(name: str, exercise: Exercise, answer: str, words: str):
    text = verdict(name, exercise, answer)
    assert text.startswith("✗ ")
    assert words in text
    assert one_line(text)


ODD = {
    "nothing": "None",
    "number": "3",
    "words": "'words'",
    "empty function": "lambda *a, **k: None",
    "identity": "__import__('torch').nn.Identity()",
    "class": "type('Odd', (), {})",
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize(("name", "exercise"), WHOLE)
def test_no_answer_makes_a_check_raise(name: str, exercise: Exercise, odd: str):
    names = sorted(exercises.defined(exercise.stub))
    text = verdict(name, exercise, "\n".join(f"{answer} = {odd}" for answer in names))
    assert text.startswith("✗ ")
    assert one_line(text)


# The machinery


def say(capsys, check, *answer) -> str:
    checks.exercise(check)(*answer)
    return capsys.readouterr().out


def answer(source: str):
    """Define a function as a notebook cell would, not in a file."""
    namespace = {"torch": torch, "nn": nn}
    exec(compile(source, "<cell>", "exec"), namespace)
    return namespace["my"]


def call(mine) -> str:
    mine()
    return "it works"


def test_success_mistake_and_stub_print_one_line_each(capsys):
    def wrong(mine):
        checks.require(False, "the scale is missing")

    assert say(capsys, call, lambda: None) == "✓ it works\n"
    assert say(capsys, wrong, None) == "✗ the scale is missing\n"
    assert say(capsys, call, answer("def my():\n    raise NotImplementedError")) == (
        "… not attempted yet\n"
    )


def test_error_names_its_kind_and_the_readers_line(capsys):
    mine = answer("def my():\n    zero = 0\n    return 1 / zero")
    expected = "✗ your code stopped with ZeroDivisionError: division by zero (line 3 of its cell)\n"
    assert say(capsys, call, mine) == expected


def test_line_is_the_readers_also_when_a_library_raised(capsys):
    mine = answer("def my():\n    layer = nn.Linear(3, 2)\n    return layer(torch.ones(1, 4))")
    text = say(capsys, call, mine)
    assert text.startswith("✗ your code stopped with RuntimeError: ")
    assert text.endswith("(line 3 of its cell)\n")


def test_missing_forward_is_an_error_not_an_untouched_stub(capsys):
    text = say(capsys, lambda mine: mine()(torch.ones(1)), answer("class my(nn.Module):\n    pass"))
    assert text.startswith("✗ ")
    assert 'missing the required "forward"' in text


def test_answer_that_does_not_fit_is_not_blamed_on_a_line(capsys):
    text = say(capsys, checks.agrees, 3, torch.ones(1))
    assert text.startswith("✗ your answer does not fit what is asked: AttributeError: ")
    assert "line" not in text


def test_long_message_of_several_lines_becomes_one_short_line(capsys):
    text = say(capsys, call, answer("def my():\n    raise ValueError('a line\\n' * 100)"))
    assert one_line(text)
    assert len(text) < 300


def test_random_stream_does_not_move(capsys):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    say(capsys, call, lambda: torch.rand(100))
    assert torch.equal(torch.rand(3), expected)


def test_answers_draw_the_same_numbers_each_time(capsys):
    drawn = []
    for _ in range(2):
        say(capsys, call, lambda: drawn.append(torch.rand(3)))
    assert torch.equal(*drawn)


def test_check_keeps_its_name_and_documentation():
    def check_scale(mine):
        """Check the scale."""

    wrapped = checks.exercise(check_scale)
    assert (wrapped.__name__, wrapped.__doc__) == ("check_scale", "Check the scale.")


def test_require_shape_tells_type_and_shape():
    checks.require_shape(torch.ones(2, 3), (2, 3))
    with pytest.raises(checks.Mistake, match="is a list; a torch"):
        checks.require_shape([1], (1,))
    with pytest.raises(checks.Mistake, match=r"weights has shape \(2, 3\); expected \(3, 2\)"):
        checks.require_shape(torch.ones(2, 3), (3, 2), "weights")


def test_require_parameters_tells_both_counts_and_the_hint():
    checks.require_parameters(nn.Linear(3, 2), 8, "unused")
    with pytest.raises(checks.Mistake, match="8 parameters; expected 6: the bias"):
        checks.require_parameters(nn.Linear(3, 2), 6, "the bias")


@pytest.mark.parametrize(
    ("value", "equal"),
    [
        (torch.tensor([1.0, 2.0]), True),
        (torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True), True),
        (torch.tensor([1.0, 2.000001]), True),
        (torch.tensor([1.0, 2.001]), False),
        (torch.tensor([1.0, float("nan")]), False),
        (torch.tensor([[1.0, 2.0]]), False),
    ],
)
def test_agrees_to_rounding(value, equal):
    assert checks.agrees(value, torch.tensor([1.0, 2.0])) is equal
