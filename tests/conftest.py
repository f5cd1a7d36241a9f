"""What holds for all tests."""

import os
import sys
from pathlib import Path

# Before torch is imported: several processes share the cores, and threads that wait for each other
# make small tensors a hundred times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The tools are scripts that import each other, not a package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start each test at the same point of the random stream, in whatever order they run."""
    torch.manual_seed(0)


@pytest.fixture
def run(capsys):
    """Return a function that runs a command and gives its status, stdout and stderr."""
    from conformer_src import cli  # few tests need it

    def run(*words):
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run
