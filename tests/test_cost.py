"""Forms of the network that compute the same and cost less."""

import copy

import pytest
import torch
from torch import nn

from conformer_src.checks import golden
from conformer_src.conformer import Conformer, ConformerConfig
from conformer_src.conv_block import ConvBlock
from conformer_src.cost import fold_norms, optimize_for_inference
from conformer_src.fcu import FCUUp
from conformer_src.weights import official_name

TOY = {"num_classes": 10, "channel_ratio": 0.25, "embed_dim": 48, "depth": 6, "num_heads": 3}
CHOICES = [
    {},
    {"stem": "small", "patch_size": 8},
    {"num_med_block": 1, "fcu_down": "conv"},
    {"branches": "conv"},
    {"branches": "trans"},
    {"coupling": "down"},
]


def toy(**changes):
    """A small network whose BatchNorms are far from the identity, in evaluation mode."""
    return golden.fill_(Conformer(ConformerConfig(**TOY | changes)), official_name).eval()


def images_of(batch=2):
    return golden.image(batch, 3, 64, 96)


def norms(module):
    return [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]


@pytest.mark.parametrize("changes", CHOICES, ids=str)
def test_folding_leaves_no_batchnorm_and_the_same_numbers(changes):
    model, images = toy(**changes).double(), images_of().double()
    assert norms(model)
    expected = [part for part in model(images) if part is not None]
    folded = fold_norms(model)
    assert folded is model
    assert norms(folded) == []
    found = [part for part in folded(images) if part is not None]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_single_parts_fold_too():
    block = golden.fill_(ConvBlock(8, 16, 2, project_shortcut=True).double()).eval()
    up = golden.fill_(FCUUp(12, 4, 2).double()).eval()
    maps, tokens = torch.randn(2, 8, 6, 6).double(), torch.randn(2, 10, 12).double()
    before = block(maps), up(tokens, maps)
    after = fold_norms(block)(maps), fold_norms(up)(tokens, maps)
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-12)
    assert norms(block) == norms(up) == []


def test_folding_twice_changes_nothing():
    model, images = fold_norms(toy()), images_of()
    torch.testing.assert_close(fold_norms(copy.deepcopy(model))(images), model(images))


def test_folding_in_training_mode_is_refused_and_leaves_the_model_alone():
    model = toy()
    model.blocks[3].up.train()
    before = len(norms(model))
    with pytest.raises(ValueError, match=r"^.* training mode .* \.eval\(\)") as error:
        fold_norms(model)
    assert "\n" not in str(error.value)
    assert len(norms(model)) == before


@pytest.mark.parametrize("changes", CHOICES, ids=str)
@torch.no_grad()
def test_the_fast_form_computes_the_same(changes):
    model, images = toy(**changes), images_of()
    fast = optimize_for_inference(model, compile=False)
    for found, expected in zip(fast(images), model(images), strict=True):
        if expected is None:
            assert found is None
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_fast_form_is_in_evaluation_mode_and_learns_nothing():
    fast = optimize_for_inference(toy().train(), compile=False)
    assert norms(fast) == []
    assert not any(part.training for part in fast.modules())
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    kernels = [part.weight for part in fast.modules() if isinstance(part, nn.Conv2d)]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


def test_the_original_stays_and_can_be_trained_on():
    model, images = toy().train(), images_of()
    before = copy.deepcopy(model.state_dict())
    optimize_for_inference(model, compile=False)(images)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training
    assert all(part.training for part in norms(model))
    model(images).sum().square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_the_compiled_form_computes_the_same():
    model, images = toy(depth=3), images_of()
    fast, expected = optimize_for_inference(model), model(images)
    for part in zip(fast(images), expected, strict=True):
        torch.testing.assert_close(*part, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()
