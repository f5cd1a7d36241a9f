"""The built site in a real browser: what a reader sees, hears and waits for.

Needs `_build/html` and a Chromium. Each page is opened once in each colour scheme; the tests then
look at what that visit collected. Without a browser or a build they are skipped; under CI that is a
failure.
"""

import functools
import gzip
import hashlib
import http.server
import os
import re
import shutil
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"
AXE = ROOT / "tests" / "vendor" / "axe-core" / "axe.min.js"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SCHEMES = ("light", "dark")
FILES = sorted(p for p in HTML.rglob("*.html") if "_static" not in p.relative_to(HTML).parts)
# index.html only sends the reader on to the preface.
PAGES = [str(p.relative_to(HTML)) for p in FILES if p != HTML / "index.html"] or ["no page"]
CHAPTERS = [page for page in PAGES if page.startswith("chapters/")] or ["no page"]
MEGABYTE = 1_000_000
PATIENCE = 120_000  # milliseconds: a machine may be busy with other things

every_page = pytest.mark.parametrize("page", PAGES)
every_chapter = pytest.mark.parametrize("page", CHAPTERS)
both_schemes = pytest.mark.parametrize("scheme", SCHEMES)


@dataclass
class Visit:
    """What one visit to one page in one colour scheme brought to light."""

    complaints: list[str] = field(default_factory=list)  # console, page errors, failed requests
    strangers: list[str] = field(default_factory=list)  # requests to another host
    requests: set[str] = field(default_factory=set)  # paths of the files that the page asked for
    violations: list[str] = field(default_factory=list)  # serious and critical ones, by axe
    formulas: int = 0
    drawn: int = 0
    formula_errors: list[str] = field(default_factory=list)
    width: int = 0  # of the document in a window of 375 pixels
    too_wide: list[str] = field(default_factory=list)


LOOK = """async () => {
  await window.MathJax?.startup?.promise;
  const all = (selector) => [...document.querySelectorAll(selector)];
  return {
    formulas: all(".math").length,
    drawn: all("mjx-container").length,
    // A macro that MathJax does not know becomes red text, not an error.
    formula_errors: all('mjx-merror, mjx-mtext[style*="red"]').map((e) => e.textContent),
  };
}"""
RUN_AXE = """async () => {
  // The theme fades its colours in; half-way through they are not what a reader sees.
  document.getAnimations().forEach((animation) => animation.finish());
  const found = await axe.run(document, { resultTypes: ["violations"] });
  return found.violations
    .filter((v) => ["serious", "critical"].includes(v.impact))
    .flatMap((v) => v.nodes.map((n) => `${v.id}: ${n.target} ${n.html.slice(0, 120)}`));
}"""
MEASURE = """() => ({
  width: document.documentElement.scrollWidth,
  too_wide: [...document.querySelectorAll("main *")]
    .filter((e) => e.getBoundingClientRect().right > 376 && !e.closest("pre, mjx-container"))
    .slice(0, 4)
    .map((e) => `${e.tagName}.${e.className} ${e.textContent.trim().slice(0, 40)}`),
})"""


class Site:
    """The pages on a server of this machine, and one browser."""

    def __init__(self, base: str, browser) -> None:
        self.base, self.browser, self.visits = base, browser, {}

    def open(self, page: str, scheme: str = "light", **options):
        """Return a fresh window, with an empty cache, that shows the page."""
        options = {"color_scheme": scheme, "viewport": {"width": 1280, "height": 900}} | options
        window = self.browser.new_context(**options).new_page()
        window.set_default_timeout(PATIENCE)
        window.goto(page if "://" in page else self.base + page, wait_until="load")
        return window

    def visit(self, page: str, scheme: str) -> Visit:
        """Return what a visit shows; the first call makes it."""
        if (page, scheme) not in self.visits:
            self.visits[page, scheme] = self._visit(page, scheme)
        return self.visits[page, scheme]

    def _visit(self, page: str, scheme: str) -> Visit:
        visit = Visit()
        context = self.browser.new_context(
            color_scheme=scheme, viewport={"width": 1280, "height": 900}
        )
        window = context.new_page()
        window.set_default_timeout(PATIENCE)
        note = visit.complaints.append

        def heard(message) -> None:
            if message.type in ("error", "warning"):
                note(f"console: {message.text}")

        def asked(request) -> None:
            if request.url.startswith(self.base):
                visit.requests.add(unquote(urlsplit(request.url).path).lstrip("/"))
            elif not request.url.startswith(("data:", "blob:")):
                visit.strangers.append(request.url)

        window.on("console", heard)
        window.on("pageerror", lambda error: note(f"error: {error}"))
        window.on("request", asked)
        window.on("requestfailed", lambda request: note(f"failed: {request.url}"))
        window.on("response", lambda r: r.status >= 400 and note(f"{r.status}: {r.url}"))
        window.goto(self.base + page, wait_until="load")
        vars(visit).update(window.evaluate(LOOK))
        window.evaluate(AXE.read_text(encoding="utf-8"))
        visit.violations = window.evaluate(RUN_AXE)
        window.set_viewport_size({"width": 375, "height": 800})
        vars(visit).update(window.evaluate(MEASURE))
        context.close()
        return visit


def obstacle() -> str:
    """Say what keeps the tests from running, if anything does."""
    if not (HTML / "index.html").is_file():
        return "the book is not built: run make book"
    if not CHROMIUM:
        return "no Chromium: install chromium (apt) or Google Chrome to test the site"
    return ""


@pytest.fixture(scope="session")
def built():
    """Stop here without a build or a browser."""
    if reason := obstacle():
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


@pytest.fixture(scope="session")
def site(built):
    """Serve the pages and start the browser, once for all tests."""
    from playwright.sync_api import sync_playwright

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(HTML))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield Site(f"http://127.0.0.1:{server.server_port}/", browser)
        browser.close()
    server.shutdown()
    server.server_close()


@functools.cache
def soup(path: Path) -> BeautifulSoup:
    """Return the parsed page."""
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@every_page
@both_schemes
def test_page_loads_without_complaint(site, page, scheme):
    assert site.visit(page, scheme).complaints == []


@every_page
@both_schemes
def test_page_asks_no_other_host(site, page, scheme):
    visit = site.visit(page, scheme)
    assert page in visit.requests  # the recording works
    assert visit.strangers == []


@every_page
def test_mathematics_is_drawn(site, page):
    visit = site.visit(page, "light")
    assert visit.formula_errors == []
    assert visit.drawn >= visit.formulas
    if page in CHAPTERS:
        assert visit.formulas > 0


@every_page
def test_nothing_is_wider_than_a_phone(site, page):
    visit = site.visit(page, "light")
    assert visit.width <= 375, visit.too_wide


@every_page
@both_schemes
def test_no_serious_accessibility_violation(site, page, scheme):
    assert site.visit(page, scheme).violations == []


@every_page
def test_every_image_has_a_text_alternative(built, page):
    images = soup(HTML / page).find_all("img")
    assert images  # the logo at least
    assert [image["src"] for image in images if not image.get("alt", "").strip()] == []


@pytest.mark.parametrize("page", [*PAGES, "index.html"])
def test_every_internal_link_resolves(built, page):
    source = HTML / page
    links = [
        element[key]
        for key in ("href", "src")
        for element in soup(source).find_all(attrs={key: True})
    ]
    redirect = re.search(r'url=([^"]+)"', source.read_text(encoding="utf-8"))  # index.html
    links += [redirect[1]] if redirect and page == "index.html" else []
    assert links
    broken = []
    for link in links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (source.parent / unquote(parts.path)).resolve() if parts.path else source
        if not target.is_file():
            broken.append(link)
        elif parts.fragment and target.suffix == ".html":
            anchor = unquote(parts.fragment)
            if not soup(target).find(attrs={"id": anchor}):
                broken.append(link)
    assert broken == []


def transferred(visit: Visit, without: tuple[str, ...] = ()) -> int:
    """Count the bytes of what a page asked for, text compressed as GitHub Pages does."""
    total = 0
    for name in visit.requests:
        if name.startswith(without):
            continue
        content = (HTML / name).read_bytes()
        packed = name.endswith((".html", ".css", ".js", ".svg", ".json"))
        total += len(gzip.compress(content, 6)) if packed else len(content)
    return total


@every_chapter
def test_chapter_transfers_at_most_one_megabyte(site, page, capsys):
    visit = site.visit(page, "light")
    # The first page of a visit brings along what all pages share: theme, fonts, MathJax.
    shared = tuple(f"_static/{name}" for name in ("mathjax", "scripts", "styles", "vendor"))
    first, later = transferred(visit), transferred(visit, without=shared)
    with capsys.disabled():
        print(f"\n{page}: {first / 1000:.0f} kB as first page, {later / 1000:.0f} kB later")
    assert later < first <= MEGABYTE


@every_chapter
def test_equations_and_code_of_the_package(built, page):
    """Equations are numbered; a mirrored cell has a caption with a link instead of its marker."""
    text = soup(HTML / page)
    assert text.select("span.eqno")
    captions = text.select(".mirror-caption a[href*='api/']")
    notebook = nbformat.read((ROOT / page).with_suffix(".ipynb"), as_version=4)
    marked = [c for c in notebook.cells if c.source.startswith("# conformer_src/")]
    assert len(captions) == len(marked) > 0


@every_chapter
def test_copy_button_leaves_out_the_marker(site, page):
    window = site.open(page, permissions=["clipboard-read", "clipboard-write"])
    cell = window.locator(".cell_input:has(.mirror-caption)").first
    cell.locator(".highlight").hover()
    cell.locator("button.copybtn").click()
    window.wait_for_function("navigator.clipboard.readText().then((text) => text.length > 0)")
    copied = window.evaluate("navigator.clipboard.readText()")
    window.context.close()
    notebook = nbformat.read((ROOT / page).with_suffix(".ipynb"), as_version=4)
    source = next(c.source for c in notebook.cells if c.source.startswith("# conformer_src/"))
    assert copied.strip() == source.split("\n", 1)[1].strip()


@every_chapter
def test_chapter_works_from_a_folder(site, page):
    """A zip of the site needs no server."""
    window = site.open((HTML / page).as_uri())
    found = window.evaluate(LOOK)
    broken = window.evaluate(
        "[...document.images].filter((i) => i.complete && !i.naturalWidth).map((i) => i.src)"
    )
    window.context.close()
    assert found["drawn"] >= found["formulas"] > 0
    assert found["formula_errors"] == []
    assert broken == []


def test_search_finds_the_bottleneck(site):
    window = site.open("search.html?q=bottleneck")
    window.wait_for_selector("#search-results li a")
    targets = window.eval_on_selector_all("#search-results li a", "all => all.map((a) => a.href)")
    window.context.close()
    assert any("chapters/" in target for target in targets)


def test_theme_switch_works(site):
    window = site.open("book/intro.html")
    colour = "getComputedStyle(document.body).backgroundColor"
    light = window.evaluate(colour)
    seen = set()
    for _ in range(3):  # the switch goes round: light, dark, as the system
        window.locator(".theme-switch-button:visible").first.click()
        seen.add(window.evaluate(f"[document.documentElement.dataset.theme, {colour}].join()"))
    window.context.close()
    assert f"light,{light}" in seen
    assert any(state.startswith("dark,") and light not in state for state in seen)


def test_repository_buttons_follow_the_setting(built):
    """Changing the one setting in _config.yml changes every button."""
    config = (ROOT / "_config.yml").read_text(encoding="utf-8")
    url = re.search(r"^  url: (\S+)$", config, re.MULTILINE)[1]
    branch = re.search(r"^  branch: (\S+)$", config, re.MULTILINE)[1]
    for page in CHAPTERS:
        links = {element["href"] for element in soup(HTML / page).find_all("a", href=True)}
        path = url.removeprefix("https://github.com/")
        notebook = page.replace(".html", ".ipynb")
        assert f"https://colab.research.google.com/github/{path}/blob/{branch}/{notebook}" in links
        assert url in links
        assert any(link.endswith(".ipynb") and "_sources" in link for link in links)


def test_data_page_states_the_right_checksums():
    """No browser needed: the page against the files and the module."""
    page = (ROOT / "book" / "data.md").read_text(encoding="utf-8")
    module = (ROOT / "conformer_src" / "data.py").read_text(encoding="utf-8")
    stated = set(re.findall(r"`([0-9a-f]{64})`", page))
    assets = sorted((ROOT / "conformer_src" / "assets").glob("*.[pj]*g"))  # not the licence
    files = {hashlib.sha256(path.read_bytes()).hexdigest() for path in assets}
    assert stated == files | set(re.findall(r'"([0-9a-f]{64})"', module))


@pytest.mark.parametrize("table", ["README.md", "book/intro.md"])
def test_table_states_the_minutes_of_each_chapter(table):
    """Both tables of chapters repeat the chapters' cards."""
    minutes = re.compile(r"read (\d+) · run (\d+) · practise (\d+)")
    lines = (ROOT / table).read_text(encoding="utf-8").splitlines()
    notebooks = sorted((ROOT / "chapters").glob("*.ipynb"))
    assert notebooks
    for path in notebooks:
        card = minutes.search(nbformat.read(path, as_version=4).cells[0].source)
        assert card, f"{path.name}: no minutes in the card"
        (row,) = [line for line in lines if line[0:1] == "|" and f"chapters/{path.name}" in line]
        expected = " · ".join(card.groups())
        assert expected in row, f"{path.name} says {expected}, {table} says {row}"


def test_model_maps_are_what_the_tool_draws():
    sys.path.insert(0, str(ROOT / "tools"))
    import model_map

    folder = ROOT / "book" / "_static" / "map"
    assert {path.stem for path in folder.iterdir()} == set(model_map.LIT)
    for chapter in model_map.LIT:
        assert (folder / f"{chapter}.svg").read_text(encoding="utf-8") == model_map.draw(chapter)
