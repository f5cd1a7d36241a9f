"""What chapter 6 prints of others' results is what the records say."""

import ast
import json
import re
from pathlib import Path

from goldens import GOLDENS

from conformer_src.conformer import CARDS

ROOT = Path(__file__).resolve().parents[1]
CELLS = json.loads((ROOT / "chapters/06_conformer.ipynb").read_text(encoding="utf-8"))["cells"]
SOURCES = ["".join(cell["source"]) for cell in CELLS]


def test_expected_digests_are_the_authors():
    (source,) = [text for text in SOURCES if text.startswith("expected = {")]
    shown = ast.literal_eval(source.partition("\n}")[0].removeprefix("expected = ") + "\n}")
    assert list(shown) == ["conv_logits", "trans_logits"]
    for name, digest in shown.items():
        recorded = GOLDENS["reduced"]["digests"][name]
        assert digest.pop("head") == recorded["head"][:3]
        assert digest == {key: value for key, value in recorded.items() if key != "head"}


def test_table_of_costs_has_the_macs_of_the_cards():
    (table,) = re.findall(r"^\| \(a\) .*\|$", "\n".join(SOURCES), re.MULTILINE)
    shown = [float(cell.strip().removesuffix(" G")) for cell in table.split("|")[2:-1]]
    names = ("tiny_patch16", "small_patch16", "small_patch32", "base_patch16")
    assert shown == [round(CARDS[f"conformer_{name}"].macs / 1e9, 3) for name in names]
