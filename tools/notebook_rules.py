"""The house rules of CONTRIBUTING.md for a chapter's notebook, one function a rule.

A rule takes a `Page` and yields (cell, sentence) for what is against it. Cells count from 1, all of
them; 0 is the notebook as a whole.
"""

import copy
import json
import re
import statistics
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import exercises
import notebooks
import number_rule
import repository
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from nbformat import NotebookNode

Finding = tuple[int, str]

KB = 1000
CELL_LINES, OUTPUT_BYTES, NOTEBOOK_BYTES = 25, 100 * KB, 300 * KB
CELLS, WORDS = range(30, 61), 3200  # what fails; CONTRIBUTING.md has the aims
CARD = ("You need", "You will be able to", "Minutes", "Hardware", "Builds")
PARTS = (
    *("Set-up", "Why", "Shapes", "By hand", "Build", "Assemble and compare", "Look", "Try it"),
    *("What the sources say", "Key points", "Exercises", "Next, and sources"),
)
# Folders of one machine. A URL's path does not count: something stands before its slash.
MACHINE = re.compile(
    r"(?<![\w.:/])/(?:home|root|tmp|Users|content|private|mnt)/[\w.-]*|\b[A-Z]:\\\w*|"
    r"site-packages"
)
MEMORY = re.compile(r"\bat 0x[0-9a-f]+")

_markdown = MarkdownIt("commonmark").enable("table").use(dollarmath_plugin)


class _Tags(HTMLParser):
    """Collects the images and links of a piece of HTML as (tag, attributes)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        """Keep what points somewhere."""
        if tag in ("a", "img"):
            self.found.append((tag, dict(attrs)))


def html_tags(text: str) -> list[tuple[str, dict[str, str | None]]]:
    """Return the images and links in HTML."""
    parser = _Tags()
    parser.feed(text)
    return parser.found


@dataclass
class Page:
    """A chapter's notebook with what several rules read from it."""

    path: Path
    root: Path
    text: str
    notebook: NotebookNode

    @cached_property
    def code(self) -> list[tuple[int, NotebookNode]]:
        """The code cells with their numbers."""
        return [(n, c) for n, c in enumerate(self.notebook.cells, 1) if c.cell_type == "code"]

    @cached_property
    def prose(self) -> list[tuple[int, list[Token]]]:
        """The Markdown cells, parsed."""
        cells = enumerate(self.notebook.cells, 1)
        return [(n, _markdown.parse(c.source)) for n, c in cells if c.cell_type == "markdown"]

    @cached_property
    def headings(self) -> list[tuple[int, int, str]]:
        """(cell, level, title) of each heading."""
        found = []
        for number, tokens in self.prose:
            for token, inline in pairwise(tokens):
                if token.type == "heading_open":
                    found.append((number, int(token.tag[1]), inline.content))
        return found

    def images(self) -> Iterator[tuple[int, str, str]]:
        """Yield (cell, source, alternative text) of each image in the prose."""
        for number, tag, attributes in self._pointers():
            if tag == "img":
                yield number, attributes.get("src") or "", attributes.get("alt") or ""

    def targets(self) -> Iterator[tuple[int, str]]:
        """Yield (cell, address) of each link and image in the prose."""
        for number, _, attributes in self._pointers():
            yield number, attributes.get("src") or attributes.get("href") or ""

    def _pointers(self) -> Iterator[tuple[int, str, dict]]:
        for number, tokens in self.prose:
            inner = [child for token in tokens for child in token.children or []]
            for token in [*tokens, *inner]:
                if token.type == "image":
                    yield number, "img", {"src": token.attrs["src"], "alt": token.content}
                elif token.type == "link_open":
                    yield number, "a", token.attrs
                elif token.type in ("html_block", "html_inline"):
                    for tag, attributes in html_tags(token.content):
                        yield number, tag, attributes

    def words(self) -> int:
        """Count the words of the prose, without code, mathematics and addresses."""
        return sum(
            len(re.findall(r"\w[\w'’-]*", child.content))
            for _, tokens in self.prose
            for token in tokens
            for child in token.children or []
            if child.type == "text"
        )


def output_text(cell: NotebookNode) -> str:
    """Return everything readable that a cell put out."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            parts.append(output.text)
        elif output.output_type == "error":
            parts += output.traceback
        else:
            data = output.data.items()
            parts += [v for k, v in data if isinstance(v, str) and not k.startswith("image/")]
    return "\n".join(parts)


def is_clean(page: Page) -> Iterator[Finding]:
    """The file is what the cleaner would write."""
    cleaned = copy.deepcopy(page.notebook)
    notebooks.clean(cleaned)
    if notebooks.text_of(cleaned) != page.text:
        yield 0, "not clean; run `python tools/notebooks.py clean` on it"


def was_run(page: Page) -> Iterator[Finding]:
    """Each cell was run, in order: nbval compares nothing in the others."""
    for position, (number, cell) in enumerate(page.code, 1):
        if not cell.source.strip():
            yield number, "an empty code cell; delete it"
        elif cell.execution_count is None:
            yield number, "was never run; `python tools/notebooks.py run` stores its output"
        elif cell.execution_count != position:
            yield number, f"has execution count {cell.execution_count}; expected {position}"


def is_small(page: Page) -> Iterator[Finding]:
    """Outputs and notebook stay small."""
    for number, cell in page.code:
        size = len(json.dumps(cell.outputs, ensure_ascii=False).encode())
        if size > OUTPUT_BYTES:
            yield number, f"{size / KB:.0f} KB of output; at most {OUTPUT_BYTES // KB}"
    size = len(page.text.encode())
    if size > NOTEBOOK_BYTES:
        yield 0, f"{size / KB:.0f} KB; at most {NOTEBOOK_BYTES // KB}"


def has_local_images(page: Page) -> Iterator[Finding]:
    """No image comes from another host: the book is self-contained."""
    found = [(number, source) for number, source, _ in page.images()]
    for number, cell in page.code:
        html = [o.data.get("text/html", "") for o in cell.outputs if "data" in o]
        for tag, attributes in html_tags("".join(html)):
            if tag == "img":
                found.append((number, attributes.get("src") or ""))
    for number, source in found:
        if re.match(r"(\w+:)?//", source):
            yield number, f"the image {source} is on another host; keep it in book/_static"


def has_alternative_texts(page: Page) -> Iterator[Finding]:
    """Each image says what it shows, to those who cannot see it."""
    for number, source, alt in page.images():
        if not alt.strip():
            yield number, f"the image {source[:60]} has no alt text"
    for number, cell in page.code:
        kinds = {kind for o in cell.outputs for kind in o.get("data", {}) if "image/" in kind}
        if "image/svg+xml" in kinds:
            yield number, "an SVG in the output; nbval compares its text, so store figures as PNG"
        words = cell.metadata.get("mystnb", {})
        if kinds and not words.get("image", {}).get("alt", "").strip():
            yield number, "a figure without alt text: metadata mystnb.image.alt"
        if kinds and not words.get("figure", {}).get("caption", "").strip():
            yield number, "a figure without caption: metadata mystnb.figure.caption"


def has_short_cells(page: Page) -> Iterator[Finding]:
    """A code cell fits on a screen."""
    for number, cell in page.code:
        if (lines := cell.source.count("\n") + 1) > CELL_LINES:
            yield number, f"{lines} lines; at most {CELL_LINES}"


def has_portable_outputs(page: Page) -> Iterator[Finding]:
    """Outputs hold nothing of one machine or one moment, no error and no warning."""
    for number, cell in page.code:
        text = output_text(cell)
        if match := MACHINE.search(text):
            yield number, f"the output holds a path of one machine: {match[0]}"
        if match := MEMORY.search(text):
            yield number, f"the output holds a memory address: {match[0]}"
        for output in cell.outputs:
            if output.output_type == "error":
                sentence = f"ends with {output.ename}; catch it and print its message"
                yield number, sentence
            elif output.output_type == "stream" and output.name == "stderr":
                line = output.text.strip().splitlines()[-1]
                yield number, f"a warning or log in the output: {line[:80]}"


def has_no_semicolons(page: Page) -> Iterator[Finding]:
    """A `;` at a line's end hides output in Jupyter, not in nbval."""
    for number, cell in page.code:
        try:
            tokens = list(tokenize.generate_tokens(StringIO(cell.source).readline))
        except (tokenize.TokenError, SyntaxError):
            continue  # the mirror says so
        for token, following in pairwise(tokens):
            if token.string == ";" and following.type in (tokenize.NEWLINE, tokenize.COMMENT):
                sentence = f"line {token.start[0]} ends with `;`; end a plot with plt.show()"
                yield number, sentence


def has_set_up(page: Page) -> Iterator[Finding]:
    """The first code cells install the package where it is missing, seed, and pick the device."""
    expected = repository.bootstrap(repository.address(page.root))
    if not page.code or page.code[0][1].source != expected:
        number = page.code[0][0] if page.code else 0
        yield number, "the first code cell is not the bootstrap of CONTRIBUTING.md"
    elif "hide-cell" not in page.code[0][1].metadata.get("tags", []):
        yield page.code[0][0], "the bootstrap needs the tag hide-cell"
    code = "\n".join(cell.source for _, cell in page.code)
    device = 'device = torch.device("cuda" if torch.cuda.is_available() else "cpu")'
    for line in ("torch.manual_seed(0)", device):
        if not re.search(rf"^{re.escape(line)}$", code, re.MULTILINE):
            yield 0, f"the set-up lacks `{line}`"


def has_parts(page: Page) -> Iterator[Finding]:
    """Title, card, and the parts of a chapter in their order."""
    titles = [(number, title) for number, level, title in page.headings if level == 1]
    if len(titles) != 1 or titles[0][0] != 1:
        yield titles[1][0] if len(titles) > 1 else 1, "one title (`#`), in the first cell"
    elif re.match(r"(chapter )?\d", titles[0][1], re.IGNORECASE):
        yield 1, "the title has a number; the book numbers the chapters"
    parts = [(number, title) for number, level, title in page.headings if level == 2]
    first = parts[0][0] if parts else len(page.notebook.cells)
    head = "\n".join(cell.source for cell in page.notebook.cells[: max(1, first - 1)])
    for entry in CARD:
        if entry not in head:
            yield 1, f"the card at the top lacks *{entry}*"
    order = []
    for number, title in parts:
        name = next((p for p in PARTS if re.match(rf"{re.escape(p)}(?!\w)", title)), None)
        if name is None:
            yield number, f"`## {title}` is no part of a chapter; use ### below one"
        elif name != "Build" or order[-1:] != ["Build"]:
            if name in order:
                yield number, f"`## {title}`: the part {name} comes a second time"
            elif order and PARTS.index(name) < PARTS.index(order[-1]):
                yield number, f"`## {title}` comes after {order[-1]}; the order is in CONTRIBUTING"
            order.append(name)
    for name in PARTS:
        if name not in order:
            yield 0, f"the part `## {name}` is missing"


def has_exercises(page: Page) -> Iterator[Finding]:
    """Three to five exercises, each complete, with the import that their checks need."""
    found = exercises.exercises(page.notebook)
    if not 3 <= len(found) <= 5:
        yield 0, f"{len(found)} exercises; three to five are expected"
    for position, exercise in enumerate(found, 1):
        number = exercise.index + 1
        if exercise.number != position:
            yield number, f"exercise {exercise.number} should have number {position}"
        for fault in exercise.faults():
            yield number, f"exercise {exercise.number} {fault}"
    name = page.path.stem.partition("_")[2]
    code = "\n".join(cell.source for _, cell in page.code)
    if found and exercises.IMPORT.findall(code) != [name]:
        yield 0, f"`from conformer_src.checks import {name} as checks` is expected once"


def has_existing_targets(page: Page) -> Iterator[Finding]:
    """Local links and images lead somewhere."""
    for number, address in page.targets():
        parts = urlsplit(address)
        if parts.scheme or parts.netloc or not parts.path:
            continue
        target = page.path.parent / unquote(parts.path)
        if parts.path.startswith("/") or not target.exists():
            yield number, f"{address} leads nowhere; addresses are relative to the notebook"


def keeps_to_budget(page: Page) -> Iterator[Finding]:
    """Cells and words stay near what a reader can take in."""
    if len(page.notebook.cells) not in CELLS:
        yield 0, f"{len(page.notebook.cells)} cells; {CELLS[0]} to {CELLS[-1]} are allowed"
    if (words := page.words()) > WORDS:
        yield 0, f"{words:,} words; at most {WORDS:,}"


RULES: tuple[Callable[[Page], Iterator[Finding]], ...] = (
    *(is_clean, was_run, is_small, has_local_images, has_alternative_texts, has_short_cells),
    *(has_portable_outputs, has_no_semicolons, has_set_up, has_parts, has_exercises),
    *(has_existing_targets, keeps_to_budget, number_rule.has_founded_numbers),
)


def open_page(path: Path, root: Path) -> Page:
    """Read a notebook for the rules."""
    notebook = notebooks.read(path)
    return Page(path.resolve(), root, path.read_text(encoding="utf-8"), notebook)


def findings(page: Page) -> list[Finding]:
    """Apply all rules."""
    return sorted((finding for rule in RULES for finding in rule(page)), key=lambda f: f[0])


def budget(pages: list[Page]) -> str:
    """Return a table of what the chapters cost their reader."""
    aims = ("aim", "35-50", "18-25", "<= 8", "1,500-2,500", "2-4", "< 300")
    rows = [("chapter", "cells", "code", "median lines", "words", "plots", "KB"), aims]
    for page in pages:
        lines = [cell.source.count("\n") + 1 for _, cell in page.code] or [0]
        outputs = (o.get("data", {}) for _, cell in page.code for o in cell.outputs)
        plots = sum("image/png" in data for data in outputs)
        counts = (len(page.notebook.cells), len(page.code), statistics.median(lines))
        numbers = (*counts, page.words(), plots, len(page.text.encode()) / KB)
        rows.append((page.path.stem, *(f"{number:,.0f}" for number in numbers)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def check(paths: list[Path], root: Path) -> int:
    """Print what is against the rules, and the table; return the exit status."""
    pages = [open_page(path, root) for path in paths]
    total = 0
    for page in pages:
        for number, sentence in findings(page):
            total += 1
            where = f"{page.path.name}, cell {number}" if number else page.path.name
            print(f"{where}: {sentence}", file=sys.stderr)
    print(budget(pages))
    if total:
        print(f"{total} to repair", file=sys.stderr)
    return int(total > 0)


def numbers(paths: list[Path], root: Path) -> int:
    """List the numbers that nothing shows; exit 1 if one is against the rule."""
    lines = [line for path in paths for line in number_rule.listing(open_page(path, root))]
    for _, line in lines:
        print(line)
    return int(any(fault for fault, _ in lines))
