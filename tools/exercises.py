"""Read the exercises of a chapter: a task, a stub, a check, and hints with a solution.

The linter says what is wrong with their form; tests/test_checks.py runs them.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from nbformat import NotebookNode

HEADING = re.compile(r"^### Exercise (\d+)", re.MULTILINE)
CARD = re.compile(
    r"^(?=[●○]{5} )●+○* · \d+ minutes · (predict|implement|repair|ablate|explain)$", re.MULTILINE
)
IMPORT = re.compile(r"^from conformer_src\.checks import (\w+) as checks$", re.MULTILINE)
CHECK = re.compile(r"(?:from conformer_src\.checks import \w+ as checks\n+)?checks\.(\w+)\((.+)\)")
DETAILS = re.compile(
    r"<details>\s*<summary>\s*(.*?)\s*</summary>(\n*)(.*?)(\n*)</details>", re.DOTALL
)
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)  # a # in code is no heading
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass
class Exercise:
    """One exercise; `index` is its first cell's, from 0, and `cells` run to the next heading."""

    number: int
    index: int
    cells: list[NotebookNode]

    @property
    def stub(self) -> str:
        """The code that the reader is to fill in."""
        return self.cells[1].source

    @property
    def check(self) -> str:
        """The name of the function that checks the answer."""
        return CHECK.fullmatch(self.cells[2].source)[1]

    @property
    def call(self) -> str:
        """The cell that calls it."""
        return self.cells[2].source

    @property
    def solution(self) -> str:
        """The last Python block of the folded solution."""
        texts = [
            text for title, _, text, _ in DETAILS.findall(self._after()) if title == "Solution"
        ]
        return PYTHON.findall(texts[-1])[-1]

    def _after(self) -> str:
        return "\n\n".join(cell.source for cell in self.cells[3:])

    def faults(self) -> Iterator[str]:
        """Say what is missing or out of place, in the order of the cells."""
        if not CARD.search(self.cells[0].source):
            yield "has no card line such as `●●○○○ · 10 minutes · implement`"
        kinds = [cell.cell_type for cell in self.cells]
        if kinds[:4] != ["markdown", "code", "code", "markdown"] or "code" in kinds[4:]:
            expected = "task, stub, check, hints (markdown, code, code, markdown)"
            yield f"needs the cells {expected}; it has {', '.join(kinds)}"
            return
        names = defined(self.stub)
        if "raise NotImplementedError" not in self.stub:
            yield "has a stub that does not `raise NotImplementedError`"
        if not any(name.lower().startswith("my") for name in names):
            yield "has a stub that defines no `my_...` or `My...`"
        if not CHECK.fullmatch(self.call):
            yield "needs a check cell of one line, `checks.check_name(my_name)`"
        yield from self._faults_of_details(names)

    def _faults_of_details(self, names: set[str]) -> Iterator[str]:
        found = DETAILS.findall(self._after())
        titles = [title for title, *_ in found]
        if not any(title.startswith("Hint") for title in titles):
            yield "has no `<details><summary>Hint</summary>`"
        if any(len(before) < 2 or len(after) < 2 for _, before, _, after in found):
            yield "has details without a blank line after `</summary>` and before `</details>`"
        if "Solution" not in titles:
            yield "has no `<details><summary>Solution</summary>`"
            return
        blocks = PYTHON.findall(found[titles.index("Solution")][2])
        if not blocks:
            yield "has a solution without a fenced `python` block"
        elif not names & defined(blocks[-1]):
            yield f"has a solution that does not define {', '.join(sorted(names))} again"


def defined(source: str) -> set[str]:
    """Return the names of the functions and classes at the top level; none if it is no Python."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return set()
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def exercises(notebook: NotebookNode) -> list[Exercise]:
    """Return the exercises in their order."""
    found: list[Exercise] = []
    inside = False
    for index, cell in enumerate(notebook.cells):
        prose = FENCED.sub("", cell.source) if cell.cell_type == "markdown" else ""
        if heading := HEADING.search(prose):
            found.append(Exercise(int(heading[1]), index, []))
            inside = True
        elif re.search(r"^##? ", prose, re.MULTILINE):
            inside = False
        if inside:
            found[-1].cells.append(cell)
    return found
