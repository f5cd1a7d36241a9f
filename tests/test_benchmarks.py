"""What the README says about speed and memory is what was measured last."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = runpy.run_path(str(ROOT / "benchmarks/against_mmpretrain.py"))


def test_readme_shows_the_stored_measurements():
    result = json.loads(BENCHMARK["RESULT"].read_text())
    readme = (ROOT / "README.md").read_text()
    assert BENCHMARK["table"](result) in readme
    assert result["rounds"] >= 5
    for version in result["versions"].values():
        assert version in readme


def test_ratio_of_times_is_the_median_of_the_rounds():
    seconds = {"peer": [2.0, 9.0, 4.0, 3.0, 2.5], "ours": [1.0, 3.0, 4.0, 2.0, 2.5]}
    row = BENCHMARK["timed"]("tiny", "a race", 8, seconds, bar=1.2)
    assert row.ratio == pytest.approx(1.5)
    assert (row.peer, row.ours) == (3.0, 2.5)
    assert BENCHMARK["Row"]("tiny", "memory", 8, "MB", 30.0, 20.0).ratio == pytest.approx(1.5)
