"""What README and book say about speed, memory and training is what was measured last."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = runpy.run_path(str(ROOT / "benchmarks/against_mmpretrain.py"))
TRAINING = runpy.run_path(str(ROOT / "benchmarks/training.py"))


def test_readme_shows_the_stored_measurements():
    result = json.loads(BENCHMARK["RESULT"].read_text())
    readme = (ROOT / "README.md").read_text()
    assert BENCHMARK["table"](result) in readme
    assert result["rounds"] >= 5
    for version in result["versions"].values():
        assert version in readme


def test_readme_and_guide_show_the_stored_training_runs():
    rows = json.loads(TRAINING["RESULT"].read_text())["rows"]
    parts = ["subset", "full", "compare", "heads", "longer", "varied"]
    table = TRAINING["table"](rows, TRAINING["load_recipe"]("fashion"), parts, [0, 1, 2])
    assert len(table.splitlines()) > 5
    for page in ("README.md", "book/train_your_images.md"):
        assert table in (ROOT / page).read_text()


def test_ratio_of_times_is_the_median_of_the_rounds():
    seconds = {"peer": [2.0, 9.0, 4.0, 3.0, 2.5], "ours": [1.0, 3.0, 4.0, 2.0, 2.5]}
    row = BENCHMARK["timed"]("tiny", "a race", 8, seconds, bar=1.2)
    assert row.ratio == pytest.approx(1.5)
    assert (row.peer, row.ours) == (3.0, 2.5)
    assert BENCHMARK["Row"]("tiny", "memory", 8, "MB", 30.0, 20.0).ratio == pytest.approx(1.5)
