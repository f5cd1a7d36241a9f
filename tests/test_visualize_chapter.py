"""What chapter 11 claims with functions of its own: the answer key, the lift, the questions."""

import ast
import json
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conformer_src.checks import visualize as checks
from conformer_src.conformer import Conformer, create_model
from conformer_src.data import _draw_bar, _stamp_corners, local_global
from conformer_src.visualize import class_activation, class_attention, relevance

ROOT = Path(__file__).resolve().parents[1]


@cache
def chapter() -> dict:
    """Return the chapter's own functions by name."""
    cells = json.loads((ROOT / "chapters/11_visualize.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names = {"layers", "lift", "asking", "forget", "likeness"}
    space = {
        "_draw_bar": _draw_bar,
        "_stamp_corners": _stamp_corners,
        "Conformer": Conformer,
        "F": F,
        "Tensor": Tensor,
        "deepcopy": deepcopy,
        "device": torch.device("cpu"),
        "torch": torch,
    }
    for source in sources:
        if any(f"def {name}(" in source for name in names):
            for node in ast.parse(source).body:
                if isinstance(node, ast.FunctionDef) and node.name in names:
                    exec(ast.unparse(node), space)
    assert names <= set(space)
    return space


@pytest.mark.parametrize(("seed", "size"), [(0, 64), (11, 64), (3, 48)])
def test_layers_are_those_of_the_drawn_images(seed: int, size: int):
    ground, corners, bars = chapter()["layers"](20, seed, size)
    assert torch.allclose(ground + corners + bars, local_global(20, seed, size).images[:, 0])
    assert ((bars != 0).sum((1, 2)) == 400).all()
    assert ((corners != 0).sum((1, 2)) > 24).all()


def test_lift_is_one_by_chance_and_the_inverse_of_the_area_at_best():
    cue = torch.zeros(2, 8, 8, dtype=torch.bool)
    cue[:, :2, :4] = True  # an eighth
    negative = torch.where(cue, 1.0, -5.0)  # no heat
    heats = [torch.ones(2, 4, 4), cue.float(), (~cue).float(), negative, torch.zeros(2, 4, 4)]
    for heat, expected in zip(heats, (1, 8, 0, 8, 0), strict=True):
        assert chapter()["lift"](heat, cue).tolist() == pytest.approx([expected] * 2)


def toy() -> Conformer:
    """Return a Conformer of depth 3 with opinions in both heads."""
    torch.manual_seed(0)
    model = create_model("conformer_micro", depth=3, in_chans=1, num_classes=4, embed_dim=32)
    for head in (model.conv_head, model.trans_head):
        nn.init.normal_(head.fc.weight)
        nn.init.normal_(head.fc.bias)
    return model.eval()


@torch.no_grad()
def test_a_question_is_a_difference_of_logits():
    model, images = toy(), torch.randn(2, 1, 32, 32)
    mix = torch.tensor([[1.0, -1, 0, 0], [0.5, 0.5, -0.5, -0.5]])
    asked = chapter()["asking"](model, mix)
    for own, theirs in zip(asked(images), model(images), strict=True):
        torch.testing.assert_close(own, theirs @ mix.T)


def test_forgetting_changes_the_named_parts_only():
    model = toy()
    broken = chapter()["forget"](model, ("conv_head.", "blocks.2."), seed=1)
    for name, value in broken.named_parameters():
        if value.numel() > value.shape[-1]:  # a weight, which is drawn at random
            same = torch.equal(value, model.get_parameter(name))
            assert same != name.startswith(("conv_head.", "blocks.2.")), name


def test_likeness_of_a_map_with_itself_and_its_opposite():
    maps = torch.rand(3, 4, 4)
    assert chapter()["likeness"](maps, 2 * maps + 1) == pytest.approx(1)
    assert chapter()["likeness"](maps, -maps) == pytest.approx(-1)


@pytest.mark.parametrize("part", checks._CHANGES)
def test_exercise_1_is_what_happens(part: str):
    model, images, target = toy(), torch.randn(2, 1, 32, 32), torch.tensor([1, 2])
    other = deepcopy(model)
    torch.manual_seed(1)
    for parameter in other.get_submodule(part).parameters():
        nn.init.normal_(parameter)
    maps = {
        "class activation": lambda model: class_activation(model, images, target),
        "class attention": lambda model: class_attention(model, images),
        "relevance": lambda model: relevance(model, images, target),
    }
    changed = {name for name, of in maps.items() if not torch.allclose(of(model), of(other))}
    assert changed == checks._CHANGES[part][0]
    assert set(checks._CHANGES[part][1]) == set(maps)
