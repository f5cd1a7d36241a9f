"""Run every check of the project, one part after the other, and sum up.

    python tools/run_tests.py [--chapter 02] [PART ...]

Each part runs to its end whatever became of the others. The summary says what passed, what was
skipped and why, and how long each part took. The exit status is 1 if a part failed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
BIN = Path(PYTHON).parent
# Two cores shared by threads of several processes slow each other down a hundredfold.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
NBVAL = [
    *("--nbval", "--nbval-current-env", "--nbval-sanitize-with", "tests/nbval.cfg"),
    *("--nbval-cell-timeout", "300", "--nbval-kernel-startup-timeout", "180"),
    *("-n", "2", "--dist", "loadfile"),
]


@dataclass
class Part:
    """One kind of check: its commands and, once it has run, its outcome."""

    name: str
    commands: list[list[str]]
    seconds: float = 0.0
    failed: bool = False
    counts: Counter = field(default_factory=Counter)
    skips: Counter = field(default_factory=Counter)

    def run(self) -> None:
        """Run the commands, all of them even if one fails."""
        print(f"\n== {self.name}", flush=True)
        start = time.perf_counter()
        # What chapters and killed tests leave behind goes with the part.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            environment = ENVIRONMENT | {"TMPDIR": folder}
            for number, command in enumerate(self.commands):
                report = Path(folder) / f"{number}.xml"
                if "pytest" in command:
                    command = [*command, f"--junitxml={report}"]
                status = subprocess.run(command, cwd=ROOT, env=environment).returncode
                self.failed |= status != 0
                self._count(report, status)
        self.seconds = time.perf_counter() - start

    def _count(self, report: Path, status: int) -> None:
        if not report.is_file():  # not pytest: the command is one check
            self.counts["failed" if status else "passed"] += 1
            return
        for case in ET.parse(report).iter("testcase"):
            outcomes = {child.tag for child in case}
            if (
                skipped := case.find("skipped")
            ) is not None:  # an element without children is false
                self.counts["skipped"] += 1
                self.skips[skipped.get("message", "no reason given")] += 1
            else:
                self.counts["failed" if outcomes & {"failure", "error"} else "passed"] += 1


def pytest(*arguments: str) -> list[str]:
    """Return the command that runs pytest on these arguments."""
    return [PYTHON, "-m", "pytest", "-q", *arguments]


def parts(chapter: str | None) -> list[Part]:
    """List the parts: all of them, or those that concern one chapter."""
    tool = [PYTHON, "tools/notebooks.py", "check"]
    mirror = [PYTHON, "tools/mirror.py", "check"]
    if chapter:
        (notebook,) = [str(path.relative_to(ROOT)) for path in find(chapter)]
        name = Path(notebook).stem.partition("_")[2]
        sources = [notebook, f"conformer_src/{name}.py", f"tests/test_{name}.py"]
        return [
            Part("lint", [[str(BIN / "ruff"), "check", *sources], [*tool, notebook]]),
            Part("mirror", [[*mirror, "--chapter", chapter]]),
            Part("unit tests", [pytest(f"tests/test_{name}.py")]),
            Part("exercise checks", [pytest("tests/test_checks.py", "-k", name)]),
            Part("nbval", [pytest(*NBVAL, notebook)]),
        ]
    special = ["tests/test_checks.py", "tests/test_site.py", "tests/peers"]
    return [
        Part(
            "lint",
            [
                [str(BIN / "ruff"), "check", "--quiet", "."],
                [str(BIN / "ruff"), "format", "--check", "--quiet", "."],
                [str(BIN / "codespell")],
                tool,
                [PYTHON, "tools/repository.py", "--check"],
            ],
        ),
        Part("mirror", [mirror]),
        Part(
            "unit tests",
            [pytest("-n", "2", "tests", *(f"--ignore={path}" for path in special))],
        ),
        Part("exercise checks", [pytest("tests/test_checks.py")]),
        Part("nbval", [pytest(*NBVAL, "chapters")]),
        Part("book build", [[PYTHON, "tools/build_book.py"]]),
        Part("site tests", [pytest("tests/test_site.py", "-rs")]),
    ]


def find(chapter: str) -> list[Path]:
    """Return the one notebook of this number, or stop with the numbers there are."""
    notebooks = sorted((ROOT / "chapters").glob("*.ipynb"))
    found = [path for path in notebooks if path.stem.split("_")[0] == chapter.zfill(2)]
    if len(found) != 1:
        numbers = ", ".join(path.stem.split("_")[0] for path in notebooks)
        sys.exit(f"there is no chapter {chapter}; there are {numbers}")
    return found


def summary(done: list[Part], left_out: list[str]) -> None:
    """Print a line a part, the reasons for skips, what was not asked for, and the total."""
    print(f"\n== summary\n{'':9}{'part':<18}{'passed':>7}{'failed':>7}{'skipped':>8}{'seconds':>9}")
    total: Counter = Counter()
    for part in done:
        total += part.counts
        counts = part.counts
        numbers = f"{counts['passed']:>7}{counts['failed']:>7}{counts['skipped']:>8}"
        mark = "FAILED" if part.failed else "ok"
        print(f"{mark:<9}{part.name:<18}{numbers}{part.seconds:9.1f}")
        for reason, count in part.skips.items():
            print(f"{'':9}skipped {count}: {reason}")
    if left_out:
        print(f"not asked for: {', '.join(left_out)}")
    seconds = sum(part.seconds for part in done)
    print(f"in all {seconds / 60:.1f} minutes")
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")


def main() -> int:
    """Run the parts and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chapter", help="only what concerns this chapter, for example 02")
    parser.add_argument("parts", nargs="*", help="only these parts, for example: lint nbval")
    arguments = parser.parse_args()
    chosen = parts(arguments.chapter)
    if unknown := set(arguments.parts) - {part.name for part in chosen}:
        parser.error(f"no part {unknown.pop()!r}; there are {', '.join(p.name for p in chosen)}")
    chosen = [part for part in chosen if not arguments.parts or part.name in arguments.parts]
    for part in chosen:
        part.run()
    ran = {part.name for part in chosen}
    summary(chosen, [part.name for part in parts(None) if part.name not in ran])
    return int(any(part.failed for part in chosen))


if __name__ == "__main__":
    sys.exit(main())
