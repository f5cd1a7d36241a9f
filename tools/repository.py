"""Set the repository's address everywhere; the setting is `repository.url` in `_config.yml`.

python tools/repository.py https://github.com/NAME/conformer-step-by-step
python tools/repository.py              print the setting
python tools/repository.py --check      exit 1 and name the places that disagree with it
"""

import argparse
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = re.compile(r"https://github\.com/([\w-]+)/([\w-][\w.-]*)")
FILES = [
    *("_config.yml", "pyproject.toml", "environment.yml", "CITATION.cff", "*.md"),
    *("book/**/*.md", "book/*.bib", "chapters/*.ipynb", ".github/**/*.yml"),
]
# Where an address is the repository's whatever it looks like: (file, what stands before it).
KEYS = [
    ("_config.yml", r"^repository:\n(?:[ #].*\n)*?  url: "),
    ("pyproject.toml", r'^Repository = "'),
    ("CITATION.cff", r"^repository-code: "),
    (".ipynb", r"git\+"),
]
_BOOTSTRAP = """\
# Only on a machine without the package, such as a fresh Colab session.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("conformer_src") is None:
    url = "git+{url}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", url], check=True)"""


def bootstrap(url: str) -> str:
    """Return the first code cell of each chapter."""
    return _BOOTSTRAP.format(url=url)


def address(root: Path = ROOT) -> str:
    """Return the setting."""
    return yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]


def patterns(root: Path, path: Path) -> Iterator[tuple[re.Pattern, Callable[[str], str]]]:
    """Yield what finds an address in a file, in its last group, and what it should be for a URL."""
    for ending, before in KEYS:
        if path.name.endswith(ending):
            yield re.compile(rf"({before})([^\s\"\\]+)", re.MULTILINE), lambda url: url
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "name"
    ]
    known = {project, ADDRESS.fullmatch(address(root))[2]}
    name = "|".join(sorted(map(re.escape, known), key=len, reverse=True))
    end = r"(?![\w-])"
    # In prose: clone commands, links to issues, Colab's links, and the published book.
    yield (
        re.compile(
            rf"(github\.com[/:]|colab\.research\.google\.com/github/)([\w-]+/(?:{name})){end}"
        ),
        lambda url: "/".join(ADDRESS.fullmatch(url).groups()),
    )
    yield (
        re.compile(rf"(https://)([\w-]+\.github\.io/(?:{name})){end}"),
        lambda url: "{}.github.io/{}".format(*ADDRESS.fullmatch(url).groups()),
    )


def paths(root: Path) -> list[Path]:
    """Return the files that may name the repository."""
    return sorted({path for pattern in FILES for path in root.glob(pattern) if path.is_file()})


def disagreements(root: Path = ROOT) -> list[str]:
    """Return a line for each place whose address is not the setting's."""
    url, found = address(root), {}
    for path in paths(root):
        text = path.read_text(encoding="utf-8")
        for pattern, expected in patterns(root, path):
            for match in pattern.finditer(text):
                if match[2] != expected(url):
                    line = text.count("\n", 0, match.start(2)) + 1
                    place = f"{path.relative_to(root).as_posix()}, line {line}"
                    found.setdefault(place, f"{place}: {match[2]}")
    return list(found.values())


def change(url: str, root: Path = ROOT) -> list[Path]:
    """Write the address everywhere; return the files that changed."""
    texts = {}
    for path in paths(root):
        old = new = path.read_text(encoding="utf-8")
        for pattern, expected in patterns(root, path):
            value = expected(url)
            new = pattern.sub(lambda match, value=value: match[1] + value, new)
        if new != old:
            texts[path] = new
    for path, text in texts.items():
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    return list(texts)


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", nargs="?", help="the new address")
    parser.add_argument("--check", action="store_true", help="only compare")
    options = parser.parse_args(arguments)
    if options.url and options.check:
        parser.error("give an address or --check, not both")
    if options.url:
        url = options.url.rstrip("/").removesuffix(".git")
        if not ADDRESS.fullmatch(url):
            parser.error(
                f"{options.url!r} is not https://github.com/ACCOUNT/NAME; "
                "the Colab buttons and the workflows need GitHub"
            )
        for path in change(url, root):
            print(f"wrote {path.relative_to(root).as_posix()}")
        return 0
    print(address(root))
    wrong = disagreements(root) if options.check else []
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
