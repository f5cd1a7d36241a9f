"""What chapter 7 prints of others' results is what the records say."""

import ast
import json
from pathlib import Path

import pytest
from goldens import FOLDER, GOLDENS

ROOT = Path(__file__).resolve().parents[1]
CELLS = json.loads((ROOT / "chapters/07_weights.ipynb").read_text(encoding="utf-8"))["cells"]
SOURCES = ["".join(cell["source"]) for cell in CELLS]


def cell(start: str) -> str:
    (source,) = [text for text in SOURCES if text.startswith(start)]
    return source


def test_probes_are_the_authors():
    text = ast.parse(cell('AUTHORS = """')).body[0].value.value
    shown = [[float(number) for number in row.split()] for row in text.strip().splitlines()]
    digests = GOLDENS["tiny_p16_224"]["digests"]
    keys = [("conv_1", "trans_1.patches", "trans_1.cls")]
    for number in range(2, 13):
        keys.append(tuple(f"conv_trans_{number}.{part}" for part in ("conv", "patches", "cls")))
    assert shown == [[digests[key]["probe"] for key in row] for row in keys]


@pytest.mark.parametrize("variant", ["tiny_p16", "small_p32"])
def test_list_of_names_is_that_of_the_authors(variant: str):
    namespace = {}
    exec(cell("def authors_names("), namespace)
    recorded = json.loads((FOLDER / f"manifests/{variant}.json").read_text())
    names = namespace["authors_names"](12)
    assert len(names) == len(set(names)) == 718
    assert set(names) == set(recorded)
