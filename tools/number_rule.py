"""No number on faith: what a chapter's prose claims is printed by one of its cells, or cited.

The rule holds for decimals, powers of ten, percentages, numbers with a scale word ("1.28 million")
and counts: "1,000", or five digits. It reads paragraphs, lists, tables, headings, mathematics,
captions and alternative texts. Such a number stands if

- the stored output of a code cell shows it, rounded as in the prose. What the cell's own strings
  put there does not count, an integer shows no decimal, and a percentage needs a per cent sign, its
  own or a heading's, or is printed as a share between 0 and 1;
- or it is an input: exactly this number stands in the chapter's code, outside dicts and strings;
- or it is an integer of the ledger, the part "Shapes";
- or its sentence names the source: a link to the web, author and year, a DOI, an arXiv number,
  "#12" for an issue, "(section 3.2)", or a link to a chapter, a page or a JSON file of the project
  in which this number stands. For a table, its row, the column's heading, the last sentence above
  and the first below count as the sentence.

The project's tests hold what is in those files. Other integers are no fault; `numbers` lists those
that the chapter shows nowhere.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import notebooks
from markdown_it.token import Token
from nbformat import NotebookNode

if TYPE_CHECKING:
    from notebook_rules import Finding, Page

# A sign counts where nothing stands before it: "81-84" is a range.
NUMBER = re.compile(
    r"(?<![\w.,])-?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?P<places>\.\d+)?"
    r"(?:[eE](?P<power>[+-]?\d+))?(?!\d|[.,]\d)"
)
POWER_OF_TEN = re.compile(
    r"(?:(\d+(?:\.\d+)?)\s?(?:×|\\times|\\cdot)\s?)?(?<![\w.])10(?:\^\{?(-?\d+)\}?|([⁰¹²³⁴-⁹⁻]+))"
)
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
SCALES = {"%": 0.01, "percent": 0.01, "k": 1e3, "M": 1e6, "G": 1e9}
SCALES |= {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
UNIT = re.compile(r"\s*(%|(?:percent|thousand|million|billion|trillion)\b|[kMG](?![A-Za-z]))")
LIST = re.compile(r"\s*(?:,|-|,?\s(?:to|and|or)\s)\s*")  # in "81, 83 and 84 %" each has the unit
# The number after such a word is a name.
NAMED = re.compile(r"\b(?:section|table|figure|equation|chapter|appendix|version)s?\s$", re.I)
SOURCE = re.compile(
    r"\bet al\.,? \(?(?:19|20)\d\d|\b[A-Z][\w'’-]+ \((?:19|20)\d\d|"  # Peng et al., 2021
    r"\([^()]*\b[A-Z][\w'’-]+,? (?:19|20)\d\d[^()]*\)|"  # (He and Sun, 2015)
    r"\([^()]*\b(?:[Ss]ection|[Tt]able|[Ff]igure|[Aa]ppendix)s? [A-Z]?\d[^()]*\)|"
    r"\bdoi:|\barXiv[: ]\d{4}\.\d{4,5}|(?<!\w)#\d+"
)
SENTENCE_END = re.compile(r"(?<!\bal)(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)[.!?;][)\"”]*\s+")
LINK = re.compile("\x01([^\x01]*)\x01")  # how a link stands in a passage
CODE = "\x00"  # stands for code that a sentence quotes


@dataclass(frozen=True)
class Number:
    """A number as it is written."""

    words: str
    value: float  # its unit not yet applied
    places: int  # digits after the point; 1e-6 has six
    is_decimal: bool
    unit: str | None

    @property
    def scale(self) -> float:
        """What the unit multiplies with."""
        return SCALES[self.unit] if self.unit else 1

    @property
    def is_integer(self) -> bool:
        """Whether it has neither a point nor a power nor a unit."""
        return not self.is_decimal and not self.unit

    @property
    def is_claim(self) -> bool:
        """Whether the rule holds it to account."""
        return not self.is_integer or "," in self.words or abs(self.value) >= 10_000

    @property
    def is_ordinary(self) -> bool:
        """Whether it is a small integer or a year."""
        return not self.is_claim and (abs(self.value) <= 12 or 1900 <= self.value <= 2100)


@dataclass(frozen=True)
class Passage:
    """A sentence or a cell of a table: its words, where they stand, where a source may stand."""

    text: str
    context: str
    line: int = 0  # of its first word; 0 where words have no lines
    place: str = ""


@dataclass
class Evidence:
    """The numbers of a chapter's cells, or of a file, by what they can show."""

    decimals: list[float] = field(default_factory=list)
    integers: list[float] = field(default_factory=list)
    percentages: list[float] = field(default_factory=list)  # as shares
    inputs: list[int | float] = field(default_factory=list)  # literals, without their signs

    def add(self, found: list[Number], in_percent: bool = False) -> None:
        """Add numbers; with `in_percent` each may be a percentage, as a heading says."""
        for number in found:
            value = number.value * number.scale
            (self.integers if number.is_integer else self.decimals).append(value)
            if number.scale < 1 or in_percent:
                self.percentages.append(number.value / 100)

    def show(self, number: Number) -> bool:
        """Tell whether the number is among these, to the digits that it has."""
        value = number.value * number.scale
        for literal in self.inputs:
            is_exact = number.is_decimal or number.scale < 1
            is_alike = number.scale > 1 or is_exact == isinstance(literal, float)
            if is_alike and abs(abs(value) - literal) <= 1e-9 * literal:
                return True
        half = 0.5000001 * 10.0**-number.places * number.scale
        if number.scale < 1:
            shown = self.percentages + [one for one in self.decimals if abs(one) <= 1]
        elif number.is_decimal and number.scale == 1:
            shown = self.decimals
        else:
            shown = self.decimals + self.integers
            if number.scale > 1:  # a column of millions prints the 5.2 alone
                shown = shown + [one * number.scale for one in self.decimals]
        # "It falls by 1.5" may stand for a printed -1.5, but not "-1.5" for 1.5.
        return any(abs(value - (one if value < 0 else abs(one))) <= half for one in shown)


def normal(text: str) -> str:
    """Return the text with one way to write a minus, a percentage and a power of ten."""
    text = re.sub("[−–]", "-", text).replace("{,}", ",").replace("\\%", "%")
    text = re.sub(r",(?=\d)(?!\d{3}(?!\d))", ", ", text)  # "0.5,0.7", but not "1,000"
    text = re.sub(r"[\u00a0\u2009\u202f]|\\[,;:]", " ", text)
    text = re.sub(r"\bper cent\b|\bpercentage points?\b", "percent", text)
    return POWER_OF_TEN.sub(lambda m: f"{m[1] or 1}e{m[2] or m[3].translate(SUPERSCRIPTS)}", text)


def numbers_in(text: str) -> list[Number]:
    """Return the numbers of a text, without those that belong to a name."""
    return [number for _, number in _placed_numbers(normal(text))]


def _placed_numbers(text: str) -> Iterator[tuple[int, Number]]:
    following = None
    found = []
    for match in reversed(list(NUMBER.finditer(text))):
        unit = UNIT.match(text, match.end())
        name = unit and unit[1]
        places = len(match["places"] or ".") - 1 - int(match["power"] or 0)
        if following and not unit:  # in "81, 83 and 84 %" the unit belongs to each
            start, next_number = following
            # So it is in "5.2 or 5.3 G", but "3 or 5 million" may mean three.
            alike = next_number.places == places and (places or next_number.scale < 1)
            if alike and LIST.fullmatch(text, match.end(), start):
                name = next_number.unit
        value = float(match[0].replace(",", ""))
        is_decimal = bool(match["places"] or match["power"])
        words = f"{match[0]} {name or ''}".strip()
        following = match.start(), Number(words, value, places, is_decimal, name)
        before, after = text[: match.start()], text[match.end() : match.end() + 1]
        in_word = re.search(r"[A-Za-z][-/]$", before) or (not unit and re.match("[A-Za-z_]", after))
        if not NAMED.search(before) and (is_decimal or not in_word):
            found.append(following)  # not "section 3.2", "7x7", "ViT-16", "ViT-B/16"
    yield from reversed(found)


def evidence(notebook: NotebookNode) -> Evidence:
    """Collect what the code cells print, and the numbers that they are given."""
    shown = Evidence()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            literals, strings = _constants(cell.source)
            shown.inputs += literals
            typed = Counter(number.words for text in strings for number in numbers_in(text))
            computed, output = [], _printed(cell)
            found = numbers_in(output)
            for number in found:
                if typed[number.words]:
                    typed[number.words] -= 1
                else:
                    computed.append(number)
            attached = sum(number.scale < 1 for number in found)
            signs = len(re.findall(r"%|percent", normal(output)))
            shown.add(computed, in_percent=signs > attached)
    return shown


def _printed(cell: NotebookNode) -> str:
    """Return the text that a cell prints; HTML is full of sizes that nobody reads."""
    return "\n".join(
        output.text if output.output_type == "stream" else output.data.get("text/plain", "")
        for output in cell.outputs
        if output.output_type != "error"
    )


def _constants(source: str) -> tuple[list[int | float], list[str]]:
    """Return the numbers of code, not those in dicts, and its strings, not its docstrings."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:
        return [], []
    # Typed results are often kept in a dict.
    no_input = {id(inner) for n in nodes if isinstance(n, ast.Dict) for inner in ast.walk(n)}
    docstrings = {id(n.value) for n in nodes if isinstance(n, ast.Expr)}
    constants = [n for n in nodes if isinstance(n, ast.Constant)]
    numbers = [
        n.value for n in constants if type(n.value) in (int, float) and id(n) not in no_input
    ]
    strings = [n.value for n in constants if type(n.value) is str and id(n) not in docstrings]
    return numbers, strings


@cache
def _evidence_of_file(path: Path) -> Evidence:
    if path.suffix == ".ipynb":
        return evidence(notebooks.read(path))
    shown = Evidence()
    shown.add(numbers_in(path.read_text(encoding="utf-8")), in_percent=True)
    return shown


def is_cited(number: Number, context: str, folder: Path) -> bool:
    """Tell whether a source is named: one outside, or a file of the project with this number."""
    if SOURCE.search(LINK.sub("", context)):
        return True
    for address in LINK.findall(context):
        parts = urlsplit(address)
        if parts.scheme in ("http", "https"):
            return True
        target = folder / unquote(parts.path)
        if parts.scheme or not target.is_file():
            continue
        if target.suffix in (".ipynb", ".json", ".md") and _evidence_of_file(target).show(number):
            return True
    return False


class _Words(HTMLParser):
    """The words of a piece of HTML, alternative texts included."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def handle_data(self, data: str) -> None:
        """Keep the text."""
        self.text += data

    def handle_starttag(self, tag: str, attrs: list) -> None:
        """Keep what an image says, and where a link leads."""
        attributes = dict(attrs)
        self.text += attributes.get("alt") or ""
        self.text += f"\x01{attributes['href']}\x01" if attributes.get("href") else ""


def _html_words(html: str) -> str:
    parser = _Words()
    parser.feed(html)
    parser.close()
    return parser.text


def _words(token: Token) -> str:
    """Return the words of a token; links are marked, code is left out, but not a mere number."""
    if token.type in ("html_block", "html_inline"):
        return _html_words(token.content)
    if token.type in ("softbreak", "hardbreak"):
        return "\n"
    if token.type == "link_open":
        return f"\x01{token.attrs['href']}\x01"
    if token.type == "code_inline":
        bare = re.fullmatch(rf"{NUMBER.pattern}(?:{UNIT.pattern})?", normal(token.content))
        return token.content if bare else CODE
    if token.type == "inline":
        return "".join(map(_words, token.children))
    return token.content if token.type in ("text", "image") or "math" in token.type else ""


def _sentences(text: str, line: int = 0, place: str = "") -> Iterator[Passage]:
    start = 0
    for end in [*(match.end() for match in SENTENCE_END.finditer(text)), len(text)]:
        sentence = text[start:end]
        yield Passage(sentence, sentence, line + text[:start].count("\n"), place)
        start = end


def _table(tokens: list[Token], around: str) -> Iterator[Passage]:
    rows: list[list[Token]] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            rows[-1].append(token)
    heading = [_words(token) for token in rows[0]]
    for row in rows:
        words = [_words(token) for token in row]
        for column, token in enumerate(row):
            context = " | ".join([*words, heading[column], around])
            yield Passage(words[column], context, token.map[0] + 1)


def passages(tokens: list[Token]) -> Iterator[Passage]:
    """Yield the sentences of a Markdown cell and the cells of its tables."""
    at = 0
    previous = ""
    while at < len(tokens):
        token = tokens[at]
        if token.type == "table_open":
            end = next(n for n in range(at, len(tokens)) if tokens[n].type == "table_close")
            following = next((t for t in tokens[end + 1 : end + 3] if t.type == "inline"), None)
            above = list(_sentences(previous))[-1].text
            below = next(_sentences(_words(following))).text if following else ""
            around = f"{above} | {below}"
            yield from _table(tokens[at:end], around)
            at = end
        elif token.type in ("inline", "html_block") or "math" in token.type:
            previous = _words(token)
            yield from _sentences(previous, token.map[0] + 1)
        at += 1


def _parts(page: "Page") -> Iterator[tuple[str, int, list[Token]]]:
    """Yield (title of the part, cell, tokens); a cell may hold the end of one and another."""
    title = ""
    for cell, tokens in page.prose:
        start = 0
        for at, token in enumerate(tokens):
            if token.type == "heading_open" and token.tag == "h2":
                yield title, cell, tokens[start:at]
                title, start = tokens[at + 1].content, at
        yield title, cell, tokens[start:]


def _words_of_figures(page: "Page") -> Iterator[tuple[int, Passage]]:
    for cell, node in page.code:
        words = node.metadata.get("mystnb", {})
        alt, caption = words.get("image", {}).get("alt"), words.get("figure", {}).get("caption")
        for text, place in ((alt, "alt text"), (caption, "caption")):
            for passage in _sentences(text or "", place=place):
                yield cell, passage


def unfounded(page: "Page") -> Iterator[tuple[int, str, Number, str]]:
    """Yield (cell, place in the cell, number, sentence) for what nothing shows, claim or not."""
    shown = evidence(page.notebook)
    prose = list(_words_of_figures(page))
    for title, cell, tokens in _parts(page):
        found = list(passages(tokens))
        if title.startswith("Shapes"):  # its integers are held by the tests of the module
            inside = [number for passage in found for number in numbers_in(passage.text)]
            shown.add([number for number in inside if number.is_integer])
        prose += [(cell, passage) for passage in found]
    for cell, passage in sorted(prose, key=lambda pair: pair[0]):
        text = normal(LINK.sub("", passage.text))
        for start, number in _placed_numbers(text):
            if number.is_ordinary or shown.show(number):
                continue
            if is_cited(number, passage.context, page.path.parent):
                continue
            if not number.is_claim and " · " in text:  # minutes on a card
                continue
            line = passage.line + text[:start].count("\n")
            place = passage.place or f"line {line}"
            yield cell, place, number, " ".join(text.replace(CODE, "…").split())


def has_founded_numbers(page: "Page") -> "Iterator[Finding]":
    """Each decimal, percentage and count is printed by a cell, or cited."""
    for cell, place, number, sentence in unfounded(page):
        if number.is_claim:
            yield cell, f"{place}: no cell prints {number.words}, no source is named: {sentence}"


def listing(page: "Page") -> Iterator[tuple[bool, str]]:
    """Yield (whether it is against the rule, line) for each number that nothing shows."""
    for cell, place, number, sentence in unfounded(page):
        mark = "" if number.is_claim else " (an integer, no fault)"
        where = f"{page.path.name}, cell {cell}, {place}"
        yield number.is_claim, f"{where}: {number.words}{mark}: {sentence}"
