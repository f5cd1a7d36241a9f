"""Measure what the book costs its reader: installation, building, running, a page, an import.

    python benchmarks/reader_costs.py [--json FILE]

Works on a fresh clone of the committed state in a temporary folder. The first figure depends on the
network and its caches; all depend on what else the machine is doing, so measure on an idle one.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True}
NBVAL = "import sys; sys.path.insert(0, 'tools'); import run_tests; print(*run_tests.NBVAL)"


def seconds(command: list[str], **options) -> float:
    """Return how long a command takes."""
    start = time.perf_counter()
    subprocess.run(command, **(QUIET | options))
    return time.perf_counter() - start


def book_times(folder: Path) -> dict[str, float]:
    """Build the book in a fresh clone: with nothing, with the tools, with nothing changed."""
    clone = folder / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = os.environ | {"PIP_NO_CACHE_DIR": "1", "UV_NO_CACHE": "1"}
    figures = {
        "make book, nothing installed": seconds(["make", "book"], cwd=clone, env=environment)
    }
    subprocess.run(["make", "clean"], cwd=clone, **QUIET)
    figures["make book, tools installed"] = seconds(["make", "book"], cwd=clone)
    figures["make book, nothing changed"] = seconds(["make", "book"], cwd=clone)
    return figures


def nbval_time() -> float:
    """Return how long nbval takes for all chapters."""
    arguments = subprocess.check_output([sys.executable, "-c", NBVAL], cwd=ROOT, text=True).split()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", *arguments, "chapters"]
    return seconds(command, cwd=ROOT, env=environment)


def import_time(repeats: int = 5) -> float:
    """Return the best of several times of importing the package after torch and torchvision."""
    code = (
        "import time, torch, torchvision; start = time.perf_counter(); import conformer_src; "
        "print(time.perf_counter() - start)"
    )
    run = [sys.executable, "-c", code]
    return min(float(subprocess.check_output(run, cwd=ROOT)) for _ in range(repeats))


def main() -> None:
    """Measure, print, and store if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = book_times(Path(folder))
    figures["nbval of all chapters"] = nbval_time()
    figures["import conformer_src, beyond torch and torchvision"] = import_time()
    machine = {
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "load averages": [round(load, 1) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": version("torch"),
    }
    for name, value in figures.items():
        print(f"{value:8.2f} s  {name}")
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps({"seconds": figures, "machine": machine}, indent=2))


if __name__ == "__main__":
    main()
