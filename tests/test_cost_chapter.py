"""What chapter 13 shows of stored measurements and of others' results is what the records say."""

import ast
import json
import re
import runpy
from pathlib import Path

import pytest

from conformer_src.attention import TransformerBlock
from conformer_src.conformer import CARDS
from conformer_src.conv_block import count_parameters

ROOT = Path(__file__).resolve().parents[1]
CELLS = json.loads((ROOT / "chapters/13_cost.ipynb").read_text(encoding="utf-8"))["cells"]
CODE, PROSE = (
    ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == kind]
    for kind in ("code", "markdown")
)
COST = runpy.run_path(str(ROOT / "benchmarks/cost.py"))
PEER = runpy.run_path(str(ROOT / "benchmarks/against_mmpretrain.py"))
ROWS = json.loads(COST["RESULT"].read_text(encoding="utf-8"))["rows"]


def constant(name):
    """Return what a cell of the chapter assigns to a name."""
    nodes = [node for text in CODE for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    (value,) = [node.value for node in nodes if ast.unparse(node.targets[0]) == name]
    return ast.literal_eval(value)


@pytest.mark.parametrize("name", ["exact", "inexact", "growth", "roof, tiny", "roof, micro"])
def test_tables_are_those_of_the_stored_measurements(name):
    table = COST["tables"](ROWS)[name]
    assert len(table.splitlines()) > 4
    assert table in "\n".join(PROSE)


def test_compiled_forms_stand_below_those_of_fewer_bits():
    rows = COST["tables"](ROWS)
    last = rows["inexact"].splitlines()[-1]
    added = rows["compiled"].splitlines()[2:]
    assert len(added) == 2
    assert "\n".join([last, *added]) in "\n".join(PROSE)


def test_roofline_is_drawn_from_the_stored_measurement():
    stored = COST["find"](ROWS, "roof", "tiny")
    machine = stored["machine, in a second"]
    assert constant("LIMITS") == (machine["billion macs"], machine["GB"])
    assert constant("MILLISECONDS") == {kind: row["ms"] for kind, row in stored["kinds"].items()}


def test_comparison_with_mmpretrain_is_that_of_the_benchmark():
    stored = json.loads(PEER["RESULT"].read_text(encoding="utf-8"))
    assert PEER["table"](stored) in "\n".join(PROSE)


def test_published_counts_are_those_of_the_cards_and_of_chapter_6():
    chapter = (ROOT / "chapters/06_conformer.ipynb").read_text(encoding="utf-8")
    for name, (million, giga, page, library) in constant("PUBLISHED").items():
        assert million == round(CARDS[name].parameters / 1e6, 2)
        assert giga in (None, round(CARDS[name].macs / 1e9, 1))
        assert f"{page:_}" in chapter
        assert f"{library:.3f}" in chapter


@pytest.mark.parametrize(("embed_dim", "heads"), [(384, 6), (48, 3)])
def test_ledger_counts_a_transformer_block(embed_dim, heads):
    (ledger,) = [text for text in PROSE if "\n## Shapes" in text]
    parameters = count_parameters(TransformerBlock(embed_dim, heads))
    assert parameters == (4 + 2 * 4) * embed_dim**2 + (9 + 4) * embed_dim
    assert re.search(rf"\| {parameters:,}\b", ledger)
