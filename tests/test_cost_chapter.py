"""What chapter 13 prints of stored measurements and of others' results is what the records say."""

import ast
import json
import re
from pathlib import Path

import pytest

from conformer_src.attention import TransformerBlock
from conformer_src.conformer import CARDS
from conformer_src.conv_block import count_parameters

ROOT = Path(__file__).resolve().parents[1]
CELLS = json.loads((ROOT / "chapters/13_cost.ipynb").read_text(encoding="utf-8"))["cells"]
SOURCES = ["".join(cell["source"]) for cell in CELLS]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
RESULTS = ROOT / "benchmarks/results"
STORED = json.loads((RESULTS / "cost.json").read_text(encoding="utf-8"))


def constant(name):
    """Return what a cell of the chapter assigns to a name."""
    nodes = [node for text in CODE for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    (value,) = [node.value for node in nodes if ast.unparse(node.targets[0]) == name]
    return ast.literal_eval(value)


def found(part, model):
    (row,) = [r for r in STORED["rows"] if (r["part"], r["model"]) == (part, model)]
    return row["found"]


def rounded(row, *names):
    return tuple(round(row[name], 2) for name in names)


@pytest.mark.parametrize("part", ["exact", "inexact", "compiled"])
def test_races_are_those_that_were_stored(part):
    micro, tiny = found(part, "micro"), found(part, "tiny")
    assert constant("RACES")[part] == {
        name: rounded(micro[name], "ratio", "spread") + rounded(tiny[name], "ratio", "spread")
        for name in list(micro)[1:]
    }


def test_growth_is_that_which_was_stored():
    stored = found("growth", "tiny")
    assert constant("GROWTH") == {
        what: (row["sizes"][0], row["sizes"][-1], *rounded(row, "predicted", "measured"))
        for what, row in stored.items()
    }


def test_roofs_are_those_that_were_stored():
    stored = found("roof", "tiny")
    machine = stored["machine, in a second"]
    assert constant("LIMITS") == (machine["billion macs"], machine["GB"])
    assert constant("ROOFS") == {
        kind: (row["ms"], row["share of the time"], row["share of the roof"])
        for kind, row in stored["kinds"].items()
    }


def test_comparison_with_mmpretrain_is_that_of_the_benchmark():
    rows = json.loads((RESULTS / "against_mmpretrain.json").read_text(encoding="utf-8"))["rows"]
    for what, shown in constant("PEER").items():
        ratios = {
            row["model"]: round(row["ratio"], 2)
            for row in rows
            if row["what"] == what and row["batch"] == 8
        }
        assert shown == (ratios["tiny"], ratios["small"])


def test_published_counts_are_those_of_the_cards_and_of_chapter_6():
    chapter = (ROOT / "chapters/06_conformer.ipynb").read_text(encoding="utf-8")
    for name, (million, giga, page, library) in constant("PUBLISHED").items():
        assert million == round(CARDS[name].parameters / 1e6, 2)
        assert giga in (None, round(CARDS[name].macs / 1e9, 1))
        assert f"{page:_}" in chapter
        assert f"{library:.3f}" in chapter


@pytest.mark.parametrize(("embed_dim", "heads"), [(384, 6), (48, 3)])
def test_ledger_counts_a_transformer_block(embed_dim, heads):
    (ledger,) = [text for text in SOURCES if "\n## Shapes" in text]
    parameters = count_parameters(TransformerBlock(embed_dim, heads))
    assert parameters == (4 + 2 * 4) * embed_dim**2 + (9 + 4) * embed_dim
    assert re.search(rf"\| {parameters:,}\b", ledger)
