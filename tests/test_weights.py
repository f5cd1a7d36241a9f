"""The names of weights: ours, the authors', OpenMMLab's; and loading by any of them."""

import json

import pytest
import torch
from goldens import FOLDER

from conformer_src.checks import golden
from conformer_src.conformer import VARIANTS, Conformer, ConformerConfig
from conformer_src.weights import load_weights, mmpretrain_name, official_name

MANIFESTS = {
    "tiny_p16": "conformer_tiny_patch16",
    "small_p16": "conformer_small_patch16",
    "small_p32": "conformer_small_patch32",
    "base_p16": "conformer_base_patch16",
}
TOY = ConformerConfig(num_classes=10, channel_ratio=0.25, embed_dim=48, depth=6, num_heads=3)
NAMINGS = pytest.mark.parametrize("naming", [str, official_name, mmpretrain_name])


def manifest(name):
    return json.loads((FOLDER / f"manifests/{name}.json").read_text())


def own_shapes(variant):
    with torch.device("meta"):
        model = Conformer(VARIANTS[variant])
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def filled(config=TOY):
    return golden.fill_(Conformer(config), official_name)


def clones(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("name", "variant"), MANIFESTS.items())
def test_names_and_shapes_are_those_of_the_authors(name, variant):
    ours = {official_name(key): shape for key, shape in own_shapes(variant).items()}
    assert len(ours) == 718
    assert ours == manifest(name)


@pytest.mark.parametrize("variant", MANIFESTS.values())
def test_names_are_those_of_openmmlab(variant):
    ours = {official_name(key): mmpretrain_name(key) for key in own_shapes(variant)}
    assert ours == manifest("mmpretrain_names")


@pytest.mark.parametrize(
    ("ours", "authors", "openmmlab"),
    [
        ("entry.stem.conv1.weight", "conv1.weight", "backbone.conv1.weight"),
        ("entry.token_embed.cls_token", "cls_token", "backbone.cls_token"),
        ("trans_head.norm.bias", "trans_norm.bias", "backbone.trans_norm.bias"),
        ("trans_head.fc.bias", "trans_cls_head.bias", "head.trans_cls_head.bias"),
        ("blocks.0.trans_block.norm1.bias", "trans_1.norm1.bias", "backbone.trans_1.ln1.bias"),
        (
            "blocks.1.med_block.0.bn3.bias",
            "conv_trans_2.med_block.0.bn3.bias",
            "backbone.conv_trans_2.med_block.0.bn3.bias",
        ),
        (
            "blocks.11.trans_block.mlp.fc2.weight",
            "conv_trans_12.trans_block.mlp.fc2.weight",
            "backbone.conv_trans_12.trans_block.ffn.layers.1.weight",
        ),
        (
            "blocks.9.down.ln.weight",
            "conv_trans_10.squeeze_block.ln.weight",
            "backbone.conv_trans_10.squeeze_block.ln.weight",
        ),
    ],
)
def test_each_naming_by_example(ours, authors, openmmlab):
    assert (official_name(ours), mmpretrain_name(ours)) == (authors, openmmlab)


@NAMINGS
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": False, "num_med_block": 1},
        {"pos_embed": 4, "fcu_down": "conv"},
        {"branches": "trans"},
        {"branches": "conv"},
    ],
    ids=str,
)
def test_weights_load_bit_by_bit_from_each_naming(naming, changes):
    config = ConformerConfig(**{**vars(TOY), **changes})
    source = clones(filled(config))
    model = Conformer(config)
    assert not torch.equal(model.entry.stem.conv1.weight, source["entry.stem.conv1.weight"])
    named = {naming(name): tensor for name, tensor in reversed(source.items())}
    assert len(named) == len(source)  # no two tensors share a name
    assert load_weights(model, named) is model
    torch.testing.assert_close(model.state_dict(), source, rtol=0, atol=0)


def test_loaded_weights_are_copies():
    source = clones(filled())
    model = load_weights(Conformer(TOY), source)
    source["conv_head.fc.bias"].zero_()
    assert model.conv_head.fc.bias.any()


def test_weights_of_another_precision_take_the_models():
    source = {name: tensor.double() for name, tensor in clones(filled()).items()}
    model = load_weights(Conformer(TOY), source)
    torch.testing.assert_close(model.state_dict(), clones(filled()), rtol=0, atol=0)
    assert model.conv_head.fc.bias.dtype == torch.float32


def missing(source):
    del source["trans_1.attn.qkv.weight"], source["conv_1.bn1.running_mean"]


def left_over(source):
    source |= {"pos_embed": torch.zeros(1), "pos_drop": torch.zeros(1)}


def of_another_shape(source):
    source["conv_cls_head.weight"] = torch.zeros(5, 64)


def renamed(source):
    source["cls_tokens"] = source.pop("cls_token")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (missing, r"^2 of 364 tensors are missing, conv_1\.bn1\.running_mean first; build"),
        (left_over, "^2 tensors have no place in the model, pos_embed first; build"),
        (
            of_another_shape,
            r"^conv_cls_head\.weight has shape \(5, 64\), .* needs \(10, 64\);",
        ),
        (renamed, "^1 of 364 tensors are missing, cls_token first; build"),
        (dict.clear, r"^364 of 364 tensors are missing, conv1\.weight first; build"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_the_model_stays(spoil, words):
    model = Conformer(TOY)
    before = clones(model)
    source = {official_name(name): tensor for name, tensor in clones(filled()).items()}
    spoil(source)
    with pytest.raises(ValueError, match=words) as error:
        load_weights(model, source)
    assert "\n" not in str(error.value)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_weights_of_another_config_are_refused():
    with pytest.raises(ValueError, match=r"^entry\.token_embed\.cls_token has shape \(1, 1, 48\)"):
        load_weights(Conformer(ConformerConfig(**{**vars(TOY), "embed_dim": 96})), clones(filled()))
