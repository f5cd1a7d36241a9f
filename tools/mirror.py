"""Keep the definitions in the chapters and in the package identical.

A code cell whose first line is `# conformer_src/NAME.py` mirrors that file: each class, function
and UPPER_CASE constant of the cell stands in the file character for character, comments and
docstring included. Each public definition of the module stands in exactly one such cell.

    python tools/mirror.py check            say what differs, with a diff, and exit 1
    python tools/mirror.py to-notebooks     the package is right: rewrite the cells
    python tools/mirror.py to-package       the chapters are right: rewrite the files

The copying commands write nothing at all if a file cannot be read, and leave outputs, metadata and
everything outside the definitions alone.
"""

import argparse
import ast
import difflib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "conformer_src"
MARKER = re.compile(r"# conformer_src/([\w/]+)\.py")
# A comment that is nothing but a path into the package was meant as a marker.
ALMOST = re.compile(r"\s*#+\s*conformer_src[./\\][\w./\\]+[\s:]*", re.IGNORECASE)
CHAPTER = re.compile(r"(\d\d)_(\w+)")
MAGIC = re.compile(r"^\s*[%!?]", re.MULTILINE)
# Modules without a chapter.
FREE = {
    "__init__",
    "checkpoints",
    "cli",
    "commands",
    "export",
    "files",
    "hub",
    "inputs",
    "predict",
    "recipes",
    "records",
    "runs",
    "sources",
    "trained",
}  # `checks` is a folder of them


@dataclass
class Definition:
    """A top-level class, function or constant; lines count from 0, `stop` is the line after."""

    name: str
    start: int
    stop: int
    text: str

    @property
    def public(self) -> bool:
        """Whether some name of it has no leading underscore."""
        return any(not name.startswith("_") for name in self.name.split(", "))


@dataclass
class Cell:
    """A marked cell; `number` counts all cells of the notebook from 1."""

    number: int
    source: str
    definitions: list[Definition]


@dataclass
class Chapter:
    """A notebook and its marked cells."""

    path: Path
    number: str
    name: str
    notebook: nbformat.NotebookNode
    cells: list[Cell] = field(default_factory=list)


@dataclass
class Module:
    """A file of the package; `name` is its path below it, without the ending."""

    path: Path
    name: str
    source: str
    tree: ast.Module
    definitions: list[Definition]


@dataclass
class Problem:
    """Something to repair: its kind, the chapter it concerns, where it is, a sentence, a diff."""

    kind: str
    chapter: str | None
    where: str
    sentence: str
    diff: str = ""

    def __str__(self) -> str:
        """Return what the user reads."""
        return "\n".join(filter(None, [f"{self.where}: {self.sentence}", self.diff]))


def names(node: ast.stmt) -> list[str]:
    """Return what a statement defines: one name, the constants of an assignment, or nothing."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return []
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    found = [name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    ids = [name.id for name in found if isinstance(name.ctx, ast.Store)]
    return ids if ids and all(name.isupper() for name in ids) else []


def definitions(source: str, tree: ast.Module) -> list[Definition]:
    """Return the definitions with the comments right above them and at their end."""
    lines = source.split("\n")
    found = []
    for node in tree.body:
        if not (name := ", ".join(names(node))):
            continue
        decorators = getattr(node, "decorator_list", [])
        start = min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1
        while start and lines[start - 1].startswith("#") and not MARKER.match(lines[start - 1]):
            start -= 1
        stop = node.end_lineno
        for index in range(stop, len(lines)):  # the parser drops comments that end a body
            line = lines[index]
            if line.strip() and not (line[0].isspace() and line.lstrip().startswith("#")):
                break
            stop = index + 1 if line.strip() else stop
        found.append(Definition(name, start, stop, "\n".join(lines[start:stop])))
    return found


@dataclass
class Project:
    """The chapters and modules below a folder, and what stood in the way of reading them."""

    root: Path
    chapters: list[Chapter] = field(default_factory=list)
    modules: dict[str, Module] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Read everything."""
        for path in sorted((self.root / PACKAGE).rglob("*.py")):
            name = path.relative_to(self.root / PACKAGE).with_suffix("").as_posix()
            self._read_module(path, name)
        for path in sorted((self.root / "chapters").glob("*.ipynb")):
            self._read_chapter(path)

    def say(self, path: Path) -> str:
        """Return the path as the user writes it."""
        return path.relative_to(self.root).as_posix()

    def chapter_of(self, module: str) -> Chapter | None:
        """Return the chapter that builds the module."""
        return next((chapter for chapter in self.chapters if chapter.name == module), None)

    def _unreadable(self, chapter: str | None, where: str, sentence: str) -> None:
        self.problems.append(Problem("unreadable", chapter, where, sentence))

    def _read_module(self, path: Path, name: str) -> None:
        notebooks = list((self.root / "chapters").glob(f"[0-9][0-9]_{name}.ipynb"))
        number = notebooks[0].name[:2] if notebooks else None
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except SyntaxError as error:
            where = f"{self.say(path)}, line {error.lineno}"
            return self._unreadable(number, where, f"syntax error: {error.msg}")
        except ValueError as error:
            return self._unreadable(number, self.say(path), f"not Python text: {error}")
        self.modules[name] = Module(path, name, source, tree, definitions(source, tree))
        return None

    def _read_chapter(self, path: Path) -> None:
        if not (match := CHAPTER.fullmatch(path.stem)):
            sentence = "a chapter's file is called NN_name.ipynb, like its module name.py"
            return self._unreadable(None, self.say(path), sentence)
        try:
            notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
            nbformat.validate(notebook)
        except Exception as error:  # whatever the text is, it is not a notebook; nbformat has many
            reason = " ".join(str(error).split())[:120]
            sentence = f"not a notebook in JSON ({reason}); restore it, or resolve the merge"
            return self._unreadable(match[1], self.say(path), sentence)
        chapter = Chapter(path, match[1], match[2], notebook)
        self.chapters.append(chapter)
        for number, cell in enumerate(notebook.cells, 1):
            if cell.cell_type == "code":
                self._read_cell(chapter, number, cell.source)
        return None

    def _read_cell(self, chapter: Chapter, number: int, source: str) -> None:
        where = f"{self.say(chapter.path)}, cell {number}"
        lines = source.split("\n")
        marked = MARKER.fullmatch(lines[0])
        for index, line in enumerate(lines, 1):
            if ALMOST.fullmatch(line) and not (marked and index == 1):
                sentence = (
                    f"{line!r} looks like a marker; write `# {PACKAGE}/{chapter.name}.py` as the "
                    "cell's first line, with nothing before or after it"
                )
                self.problems.append(
                    Problem("marker", chapter.number, f"{where}, line {index}", sentence)
                )
        if not marked and MAGIC.search(source):
            return  # IPython's own syntax
        try:
            tree = ast.parse(source)
        except SyntaxError as error:
            where = f"{where}, line {error.lineno}"
            self._unreadable(chapter.number, where, f"syntax error: {error.msg}")
            return
        if marked and marked[1] == chapter.name:
            chapter.cells.append(Cell(number, source, definitions(source, tree)))
        elif marked:
            if marked[1] in self.modules or (self.root / PACKAGE / f"{marked[1]}.py").exists():
                sentence = f"this chapter mirrors {PACKAGE}/{chapter.name}.py, not another module"
            else:
                sentence = f"there is no {PACKAGE}/{marked[1]}.py"
            self.problems.append(Problem("marker", chapter.number, f"{where}, line 1", sentence))


def cell_problems(project: Project, chapter: Chapter) -> Iterator[Problem]:
    """Compare the marked cells of a chapter with its module."""
    module = project.modules.get(chapter.name)
    path = f"{PACKAGE}/{chapter.name}.py"
    in_file = {d.name: d for d in module.definitions} if module else {}
    seen: dict[str, int] = {}
    for cell in chapter.cells:
        where = f"{project.say(chapter.path)}, cell {cell.number}"
        if not module and not (project.root / path).exists():
            yield Problem("missing", chapter.number, f"{where}, line 1", f"there is no {path}")
        covered = {0}
        for new in cell.definitions:
            covered |= set(range(new.start, new.stop))
            here = f"{where}, line {new.start + 1}"
            if new.name in seen:
                sentence = f"{new.name} stands in cell {seen[new.name]} already; keep one of them"
                yield Problem("twice", chapter.number, here, sentence)
            seen.setdefault(new.name, cell.number)
            if module and new.name not in in_file:
                yield Problem("missing", chapter.number, here, f"{new.name} is not in {path}")
            elif module and in_file[new.name].text != new.text:
                yield difference(project, chapter, cell, new, in_file[new.name])
        for index, line in enumerate(cell.source.split("\n")):
            if line.strip() and index not in covered and not ALMOST.fullmatch(line):
                sentence = (
                    f"`{line.strip()}` belongs to no class, function or UPPER_CASE constant; "
                    "a marked cell holds nothing else, so move it to a cell of its own"
                )
                yield Problem("stray", chapter.number, f"{where}, line {index + 1}", sentence)


def difference(
    project: Project, chapter: Chapter, cell: Cell, new: Definition, old: Definition
) -> Problem:
    """Describe how a definition in a cell differs from the file's."""
    notebook, path = project.say(chapter.path), f"{PACKAGE}/{chapter.name}.py"
    theirs, ours = old.text.split("\n"), new.text.split("\n")
    pairs = enumerate(zip(theirs, ours, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
    sentence = f"{new.name} differs from {path}, line {old.start + first + 1}"
    where = f"{notebook}, cell {cell.number}, line {new.start + first + 1}"
    to = f"{notebook}, cell {cell.number}"
    diff = "\n".join(difflib.unified_diff(theirs, ours, path, to, lineterm=""))
    return Problem("differs", chapter.number, where, sentence, diff)


def orphans(project: Project) -> Iterator[Problem]:
    """Find public definitions that no chapter shows, and names that stand twice in a file."""
    for module in project.modules.values():
        last = module.name.rpartition("/")[2]
        if module.name.startswith("checks/") or last in FREE or last.startswith("_"):
            continue
        path = project.say(module.path)
        if list((project.root / "chapters").glob(f"[0-9][0-9]_{module.name}.ipynb")):
            chapter = project.chapter_of(module.name)
            if not chapter:
                continue  # it is there but unreadable, which has been said
        else:
            sentence = f"this module has no chapter (chapters/NN_{module.name}.ipynb)"
            yield Problem("orphan", None, f"{path}, line 1", sentence)
            continue
        shown = {d.name for cell in chapter.cells for d in cell.definitions}
        seen: set[str] = set()
        for definition in module.definitions:
            where = f"{path}, line {definition.start + 1}"
            if definition.name in seen:
                sentence = f"{definition.name} is defined twice in this file"
                yield Problem("twice", chapter.number, where, sentence)
            elif definition.public and definition.name not in shown:
                sentence = (
                    f"{definition.name} stands in no marked cell of {project.say(chapter.path)}; "
                    "show it there, or begin its name with an underscore"
                )
                yield Problem("orphan", chapter.number, where, sentence)
            seen.add(definition.name)


def imported(module: Module) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted path below the package) of each import of the package; "" is itself."""
    package = [PACKAGE, *module.name.split("/")[:-1]]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            deeper = base == [PACKAGE]  # `from conformer_src import data` names a module
            paths = [".".join([*base, a.name] if deeper else base) for a in node.names]
        else:
            continue
        for path in dict.fromkeys(paths):
            if path.split(".")[0] == PACKAGE:
                yield node.lineno, path.partition(".")[2]


def import_problems(project: Project, module: Module) -> Iterator[Problem]:
    """Find imports that point upwards: to later chapters, `checks`, `cli`, the public face."""
    if module.name.startswith("checks/"):
        return
    own = project.chapter_of(module.name)
    for line, path in imported(module):
        name = path.split(".")[0]
        other = project.chapter_of(name)
        if name in ("checks", "cli"):
            sentence = f"the package does not import {PACKAGE}.{name}; only the reverse"
        elif module.name in FREE:
            continue
        elif own and other and other.number > own.number:
            sentence = (
                f"chapter {own.number} imports {PACKAGE}.{name} of chapter {other.number}; "
                "a module imports modules of earlier chapters"
            )
        elif not (project.root / PACKAGE / f"{name}.py").exists() or name == "__init__":
            what = f"{PACKAGE}.{name}" if name else PACKAGE
            sentence = f"{what} is no module of a chapter; import from the module that defines it"
        else:
            continue
        number = own.number if own else None
        where = f"{project.say(module.path)}, line {line}"
        yield Problem("import", number, where, sentence)


def check(root: Path = ROOT) -> list[Problem]:
    """Return all that is wrong with the mirror below `root`."""
    project = Project(root)
    problems = list(project.problems)
    by_number: dict[str, Chapter] = {}
    for chapter in project.chapters:
        problems += cell_problems(project, chapter)
        if chapter.name in {c.name for c in by_number.values()} or chapter.number in by_number:
            sentence = "another chapter has this number or this name"
            problems.append(Problem("marker", chapter.number, project.say(chapter.path), sentence))
        by_number.setdefault(chapter.number, chapter)
    problems += orphans(project)
    for module in project.modules.values():
        problems += import_problems(project, module)
    return problems


def replace(source: str, old: list[Definition], new: dict[str, str]) -> str:
    """Put the texts in `new` in the places of the definitions of the same names."""
    lines = source.split("\n")
    for definition in sorted(old, key=lambda d: d.start, reverse=True):
        if definition.name in new:
            lines[definition.start : definition.stop] = new[definition.name].split("\n")
    return "\n".join(lines)


def to_notebooks(project: Project) -> dict[Path, str]:
    """Return the new texts of the notebooks whose cells differ from the package."""
    texts = {}
    for chapter in project.chapters:
        if chapter.name not in project.modules:
            continue
        new = {d.name: d.text for d in project.modules[chapter.name].definitions}
        changed = False
        for cell in chapter.cells:
            source = replace(cell.source, cell.definitions, new)
            changed |= source != cell.source
            chapter.notebook.cells[cell.number - 1].source = source
        if changed:
            texts[chapter.path] = nbformat.writes(chapter.notebook) + "\n"
    return texts


def to_package(project: Project) -> dict[Path, str]:
    """Return the new texts of the files that differ; what is new in a chapter goes to the end."""
    texts = {}
    for chapter in project.chapters:
        new = {d.name: d.text for cell in chapter.cells for d in cell.definitions}
        module = project.modules.get(chapter.name)
        source, old = (module.source, module.definitions) if module else ("", [])
        known = {d.name for d in old}
        added = [text for name, text in new.items() if name not in known]
        text = replace(source, old, new)
        if added:
            text = "\n\n\n".join(filter(None, [text.rstrip("\n"), *added])) + "\n"
        if text != source:
            texts[project.root / PACKAGE / f"{chapter.name}.py"] = text
    return texts


def write(texts: dict[Path, str]) -> None:
    """Write all files, or none: first under temporary names, then renamed."""
    temporary = {path: path.with_name(f".{path.name}.new") for path in texts}
    try:
        for path, text in texts.items():
            temporary[path].write_text(text, encoding="utf-8", newline="\n")
        for path, new in temporary.items():
            os.replace(new, path)
    finally:
        for new in temporary.values():
            new.unlink(missing_ok=True)


def copy(command: str, root: Path = ROOT) -> list[Problem]:
    """Copy in one direction; return what forbade it, in which case nothing was written."""
    # Without these it would not be clear what to write, or where.
    stops = {"to-notebooks": {"unreadable", "missing"}, "to-package": {"unreadable", "twice"}}
    problems = [problem for problem in check(root) if problem.kind in stops[command]]
    if not problems:
        project = Project(root)
        texts = to_notebooks(project) if command == "to-notebooks" else to_package(project)
        write(texts)
        for path in texts:
            print(f"wrote {project.say(path)}")
    return problems


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Run one command; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    only = commands.add_parser("check", help="compare; exit 1 if something is to be repaired")
    only.add_argument("--chapter", metavar="NN", help="only this chapter, for example 02")
    commands.add_parser("to-notebooks", help="carry the package's text into the marked cells")
    commands.add_parser("to-package", help="carry the cells' text into the package")
    options = parser.parse_args(arguments)
    if options.command != "check" and (forbidding := copy(options.command, root)):
        print(*forbidding, "nothing was written: repair this first", sep="\n", file=sys.stderr)
        return 1
    problems = check(root)
    if number := getattr(options, "chapter", None):
        if not list((root / "chapters").glob(f"{number.zfill(2)}_*.ipynb")):
            parser.error(f"there is no chapter {number}")
        problems = [problem for problem in problems if problem.chapter == number.zfill(2)]
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(f"{len(problems)} to repair", file=sys.stderr)
    else:
        print("chapters and package agree")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
