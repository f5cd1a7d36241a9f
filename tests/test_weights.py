"""The names of weights: ours, the authors', OpenMMLab's; files in any of them, there and back."""

import argparse
import copy
import hashlib
import json
import os
import pickle
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from goldens import FOLDER
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import conformer_src
from conformer_src import weights
from conformer_src.checks import golden
from conformer_src.conformer import VARIANTS, Conformer, ConformerConfig
from conformer_src.cost import fold_norms, optimize_for_inference
from conformer_src.files import WeightsError, digest, read_file
from conformer_src.inputs import InputConfig
from conformer_src.weights import (
    HEADS,
    export_weights,
    find_naming,
    find_state_dict,
    load_model,
    load_weights,
    mmpretrain_name,
    official_name,
    save_weights,
)

MANIFESTS = {
    "tiny_p16": "conformer_tiny_patch16",
    "small_p16": "conformer_small_patch16",
    "small_p32": "conformer_small_patch32",
    "base_p16": "conformer_base_patch16",
}
TOY = ConformerConfig(num_classes=10, channel_ratio=0.25, embed_dim=48, depth=6, num_heads=3)
NAMINGS = pytest.mark.parametrize("naming", [str, official_name, mmpretrain_name])


def changed(**changes):
    return replace(TOY, **changes)


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


def same(model, state):
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


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
    config = changed(**changes)
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


def official(model):
    return {official_name(name): tensor for name, tensor in clones(model).items()}


def missing(source):
    del source["trans_1.attn.qkv.weight"], source["conv_1.bn1.running_mean"]


def left_over(source):
    source |= {"pos_embed": torch.zeros(1), "pos_drop": torch.zeros(1)}


def of_another_shape(source):
    source["conv_cls_head.weight"] = torch.zeros(5, 64)


def without_one_bias(source):
    source["conv_cls_head.weight"] = torch.zeros(5, 64)
    del source["trans_cls_head.bias"]


def without_a_side(source):
    source["trans_cls_head.bias"] = torch.zeros(())


def renamed(source):
    source["cls_tokens"] = source.pop("cls_token")


def complex_numbers(source):
    source["cls_token"] = source["cls_token"].to(torch.complex64)


def yes_or_no(source):
    source["bn1.num_batches_tracked"] = torch.tensor(True)


def not_a_number(source):
    source["trans_norm.bias"][3] = float("nan")


def infinite(source):
    source["conv_trans_3.expand_block.bn.running_var"][0] = float("inf")


def too_large(source):
    source["cls_token"] = source["cls_token"].double()
    source["cls_token"][0, 0, 0] = 1e300


def endless_count(source):
    source["bn1.num_batches_tracked"] = torch.tensor(float("inf"))


def sparse(source):
    source["trans_norm.bias"] = source["trans_norm.bias"].to_sparse()


def quantized(source):
    source["trans_norm.bias"] = torch.quantize_per_tensor(torch.ones(48), 0.1, 0, torch.qint8)


def without_values(source):
    source["trans_norm.bias"] = torch.empty(48, device="meta")


def twice(source):
    source["module.cls_token"] = source["cls_token"]


def twice_by_two_names(source):
    source["conv_head.fc.bias"] = source["conv_cls_head.bias"]


def no_tensor(source):
    source["epoch"] = 3


def no_name(source):
    source[3] = source["cls_token"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            missing,
            r"^conv_1\.bn1\.running_mean is missing, and 1 more; the weights fit no variant: ",
        ),
        (
            left_over,
            "^pos_embed has no place in the model, and 1 more; the weights fit no variant: ",
        ),
        (
            of_another_shape,
            r"^conv_cls_head\.weight has shape \(5, 64\), but the model needs \(10, 64\); the w",
        ),
        (without_one_bias, r"^trans_cls_head\.bias is missing; the weights fit no variant: build"),
        (without_a_side, r"^trans_cls_head\.bias has shape \(\), but the model needs \(10,\); the"),
        (renamed, "^cls_token is missing; the weights fit no variant: build the model with"),
        (
            complex_numbers,
            r"^cls_token holds torch\.complex64, but the model needs torch\.float32;",
        ),
        (yes_or_no, r"^bn1\.num_batches_tracked holds torch\.bool, but the model needs"),
        (not_a_number, r"^trans_norm\.bias holds values that are not finite in torch\.float32;"),
        (infinite, r"^conv_trans_3\.expand_block\.bn\.running_var holds values that are not"),
        (too_large, r"^cls_token holds values that are not finite in torch\.float32;"),
        (endless_count, r"^bn1\.num_batches_tracked holds values that are not finite in torch\."),
        (sparse, r"^trans_norm\.bias is sparse, quantized or without values; save it as an ord"),
        (quantized, r"^trans_norm\.bias is sparse, quantized or without values;"),
        (without_values, r"^trans_norm\.bias is sparse, quantized or without values;"),
        (twice, "^two tensors here are cls_token, one is called module.cls_token; keep the other"),
        (twice_by_two_names, "^two tensors here are conv_head.fc.bias, one is called conv_"),
        (no_tensor, "^there is no state dict here, that is tensors by name; save one with torch"),
        (no_name, "^there is no state dict here"),
        (dict.clear, "^there is no state dict here"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_the_model_stays(spoil, words):
    model = Conformer(TOY)
    before = clones(model)
    source = official(filled())
    spoil(source)
    with pytest.raises(WeightsError, match=words) as error:
        load_weights(model, source)
    assert "\n" not in str(error.value)
    same(model, before)


def test_weights_of_another_config_are_refused():
    with pytest.raises(
        WeightsError, match=r"^entry\.token_embed\.cls_token has shape \(1, 1, 48\)"
    ):
        load_weights(Conformer(changed(embed_dim=96)), clones(filled()))


@pytest.mark.parametrize(
    ("model", "file", "words"),
    [
        (
            "conformer_small_patch16",
            "conformer_small_patch32",
            r"^trans_patch_conv\.weight has shape \(384, 64, 8, 8\), but the model needs "
            r"\(384, 64, 4, 4\); the weights fit conformer_small_patch32: build the model with the",
        ),
        (
            "conformer_base_patch16",
            "conformer_tiny_patch16",
            r"^cls_token has shape \(1, 1, 384\), .*; the weights fit conformer_tiny_patch16:",
        ),
        (
            "conformer_tiny_patch16",
            "conformer_micro",
            r"^conv_trans_7\.cnn_block\.conv1\.weight is missing, and \d+ more; "
            "the weights fit conformer_micro: build",
        ),
    ],
)
@pytest.mark.parametrize("classes", [7, 1000])
def test_a_misfit_names_the_variant_that_the_file_is_for(model, file, words, classes):
    with torch.device("meta"):
        model = Conformer(replace(VARIANTS[model], num_classes=10))
        shapes = Conformer(replace(VARIANTS[file], num_classes=classes)).state_dict()
    source = {official_name(n): torch.zeros(()).expand(t.shape) for n, t in shapes.items()}
    with pytest.raises(WeightsError, match=words):
        load_weights(model.to_empty(device="cpu"), source)


def test_an_ablation_of_a_variant_is_told_what_is_missing():
    config = replace(VARIANTS["conformer_micro"], pos_embed=4)
    source = official(Conformer(VARIANTS["conformer_micro"]))
    words = r"^entry\.token_embed\.pos_embed is missing; the weights fit conformer_micro: build"
    with pytest.raises(WeightsError, match=words):
        load_weights(Conformer(config), source)


@pytest.mark.parametrize(
    "changes", [{}, {"pos_embed": 4}, {"branches": "trans"}, {"branches": "conv"}], ids=str
)
@pytest.mark.parametrize("naming", weights.NAMINGS)
def test_the_naming_is_found_whatever_the_network_has_of_its_own(naming, changes):
    names = list(export_weights(Conformer(changed(**changes)), naming))
    assert find_naming(names) == naming
    assert find_naming(reversed(names)) == naming


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "module.module."])
@NAMINGS
def test_prefixes_of_wrappers_are_stripped(naming, prefix):
    source = {prefix + naming(name): tensor for name, tensor in clones(filled()).items()}
    same(load_weights(Conformer(TOY), source), clones(filled()))


def test_a_prefix_in_the_middle_of_a_name_stays():
    found = find_state_dict({"a.module.b": torch.zeros(1), "modules.c": torch.zeros(1)})
    assert list(found) == ["a.module.b", "modules.c"]


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "wrap", [compiled, nn.DataParallel, lambda model: compiled(nn.DataParallel(model))]
)
def test_a_wrapped_model_is_loaded_saved_and_exported_as_the_one_inside(wrap, tmp_path):
    model = Conformer(TOY)
    wrapped = wrap(model)
    assert load_weights(wrapped, official(filled())) is wrapped
    same(model, clones(filled()))
    assert export_weights(wrapped).keys() == official(model).keys()
    save_weights(wrapped, tmp_path / "a.safetensors")
    same(load_model(tmp_path / "a.safetensors"), clones(filled()))


@pytest.mark.parametrize(
    "use",
    [
        lambda model: load_weights(model, clones(filled())),
        export_weights,
        lambda model: save_weights(model, "never.safetensors"),
    ],
)
def test_a_model_without_values_is_refused(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.device("meta"):
        model = Conformer(TOY)
    with pytest.raises(ValueError, match=r"^the model is on the device meta and has no values"):
        use(model)
    assert not any(tmp_path.iterdir())


# Heads


@pytest.mark.parametrize("naming", weights.NAMINGS)
@pytest.mark.parametrize(("theirs", "ours"), [(7, 10), (10, 7), (0, 10), (10, 0)])
def test_heads_for_other_classes_stay_and_it_is_said(naming, theirs, ours):
    source, model = filled(changed(num_classes=theirs)), Conformer(changed(num_classes=ours))
    before, expected = clones(model), clones(source)
    words = f"^the weights are for {theirs} classes and the model for {ours}, so it keeps its own h"
    with pytest.warns(UserWarning, match=words) as heard:
        load_weights(model, export_weights(source, naming))
    assert len(heard) == 1
    assert heard[0].filename == __file__  # the line that loaded
    after = model.state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor if name in HEADS else expected[name])
    assert not torch.equal(after["entry.stem.conv1.weight"], before["entry.stem.conv1.weight"])


def test_nothing_is_said_when_all_fits(recwarn):
    load_weights(Conformer(TOY), official(filled()))
    assert not recwarn.list


def test_other_heads_do_not_excuse_another_width():
    source = official(filled(changed(num_classes=7, embed_dim=96)))
    with pytest.raises(WeightsError, match=r"^cls_token has shape \(1, 1, 96\)"):
        load_weights(Conformer(TOY), source)


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(5, 3), (5,), (5, 2), (5,)], 5),
        ([(5, 3), (5,), None, None], 5),
        ([None] * 4, 0),
        ([(5, 3), (5,), (4, 2), (4,)], None),
        ([(5, 3), (4,), None, None], None),
        ([(), (), (), ()], None),
        ([(5, 3), (), None, None], None),
    ],
)
def test_classes_are_counted(shapes, expected):
    pairs = zip(HEADS, shapes, strict=True)
    state = {name: torch.zeros(shape) for name, shape in pairs if shape is not None}
    assert weights.count_classes(state) == expected


# Files


def authors_training(model, **changes):
    """What the authors' script writes."""
    return {
        "model": official(model),
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{}]},
        "lr_scheduler": {"warmup_t": 5},
        "epoch": 299,
        "model_ema": {name: tensor * 0 for name, tensor in official(model).items()},
        "args": argparse.Namespace(lr=0.001, data_path="images"),
    } | changes


def openmmlab_published(model, **changes):
    """What OpenMMLab's publishing tool writes."""
    named = {mmpretrain_name(name): tensor for name, tensor in clones(model).items()}
    meta = {
        "epoch": 300,
        "cfg": "model = dict()",
        "dataset_meta": {"classes": ("tench", "goldfish")},
    }
    return {"meta": meta, "state_dict": named} | changes


WRITERS = {
    "the authors', bare": lambda model, path: torch.save(official(model), path),
    "the authors', training": lambda model, path: torch.save(authors_training(model), path),
    "OpenMMLab's": lambda model, path: torch.save(openmmlab_published(model), path),
    "ours, torch": lambda model, path: torch.save(model.state_dict(), path),
    "ours": save_weights,
    "foreign safetensors": lambda model, path: save_file(official(model), path, {"format": "pt"}),
    "safetensors without notes": lambda model, path: save_file(official(model), path),
}


@pytest.mark.parametrize("as_type", [str, Path])
@pytest.mark.parametrize("writer", WRITERS)
def test_each_kind_of_file_loads_bit_by_bit(writer, as_type, tmp_path):
    path = tmp_path / "weights"  # no ending: the content tells
    WRITERS[writer](filled(), path)
    same(load_weights(Conformer(TOY), as_type(path)), clones(filled()))


@pytest.mark.parametrize("classes", [10, 7, 0])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_model_is_built_for_each_kind_of_file(writer, classes, tmp_path, recwarn):
    config = replace(VARIANTS["conformer_micro"], num_classes=classes)
    source = filled(config)
    WRITERS[writer](source, tmp_path / "weights")
    model = load_model(tmp_path / "weights")
    assert model.config == config
    same(model, clones(source))
    assert not recwarn.list
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    images = golden.image(2, 3, 32, 32)
    found, expected = model.eval()(images), source.eval()(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_our_own_file_builds_any_model_again(tmp_path):
    config = changed(pos_embed=4, fcu_down="max", coupling="down", drop_path_rate=0.1, in_chans=1)
    source = Conformer(config)
    save_weights(source, tmp_path / "a.safetensors")
    model = load_model(str(tmp_path / "a.safetensors"))
    assert model.config == config
    same(model, clones(source))


def test_shapes_that_are_no_variants_build_no_model(tmp_path):
    torch.save(official(filled()), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"^the weights fit no variant; build their model"):
        load_model(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "^this is no config of a Conformer "),
        ("[1]", "^this is no config of a Conformer "),
        ('{"wings": 2}', "^this is no config of a Conformer .*wings"),
        ('{"depth": 5}', "^this is no config of a Conformer .*depth must be a multiple of 3"),
        ('{"depth": 3000000000}', "^the config has more blocks than the weights"),
        ('{"num_med_block": 3000000000}', "^the config has more blocks than the weights"),
        ('{"channel_ratio": 1e30}', "^no model can be built from ConformerConfig"),
        (
            '{"embed_dim": 3000000000000000000000, "num_heads": 1}',
            "^no model can be built from ConformerConfig",
        ),
        ("[" * 100_000, "^this is no config of a Conformer "),
        (json.dumps(asdict(TOY) | {"embed_dim": 96}), r"^entry\.token_embed\.cls_token has shape"),
    ],
)
def test_a_header_with_another_config_is_refused(config, words, tmp_path):
    state = clones(filled())
    notes = {"config": config, "sha256": digest(state, config)}
    save_file(state, tmp_path / "a.safetensors", notes)
    with pytest.raises(WeightsError, match=words) as error:
        load_model(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_parts_of_one_memory_become_tensors_of_their_own(tmp_path):
    """Torch files can hold one memory under two names; training must not tie them."""
    source = filled(VARIANTS["conformer_micro"])
    state = official(source)
    one = torch.rand(2, 64)
    state["trans_1.norm1.bias"], state["trans_1.norm2.bias"] = one[0], one[1]
    state["trans_norm.bias"] = one[0]
    state["trans_norm.weight"] = torch.ones(1).expand(64)
    state["conv_trans_2.trans_block.norm1.bias"] = one[0]
    torch.save(state, tmp_path / "a.pth")
    model = load_model(tmp_path / "a.pth")
    for name, tensor in export_weights(model).items():
        assert torch.equal(tensor, state[name]), name
        assert tensor.is_contiguous()
        tensor.fill_(0)  # in the model
        state[name] = torch.zeros_like(state[name])
    starts = [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert len(set(starts)) == len(starts)


def test_the_average_is_taken_when_asked_for():
    content = authors_training(filled())
    assert load_weights(Conformer(TOY), content, ema=True).trans_head.norm.weight.eq(0).all()
    assert not load_weights(Conformer(TOY), content).trans_head.norm.weight.eq(0).any()


def test_the_average_of_openmmlab_is_its_state_dict():
    """Their hook exchanges the two before it saves, and the average has a counter more."""
    average = openmmlab_published(filled())["state_dict"]
    plain = {f"module.{name}": tensor * 0 for name, tensor in average.items()}
    content = {"state_dict": average, "ema_state_dict": plain | {"steps": torch.tensor(3)}}
    same(load_weights(Conformer(TOY), content, ema=True), clones(filled()))


@pytest.mark.parametrize("content", [openmmlab_published, official])
def test_an_average_that_is_not_there_is_said(content):
    with pytest.raises(WeightsError, match=r"^there is no moving average here; load"):
        load_weights(Conformer(TOY), content(filled()), ema=True)


@pytest.mark.parametrize("content", [[], None, 3, {"model": None}, {"state_dict": [1]}])
def test_what_holds_no_weights_is_said(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"^there is no state dict here, that is"):
        load_model(tmp_path / "a.pth")


@pytest.mark.parametrize("naming", weights.NAMINGS)
def test_there_and_back_is_bit_equal(naming, tmp_path):
    source = filled()
    exported = export_weights(source, naming)
    assert find_naming(exported) == naming
    assert len(exported) == len(source.state_dict())
    torch.save(exported, tmp_path / "a.pth")
    model = load_weights(Conformer(TOY), tmp_path / "a.pth")
    same(model, clones(source))
    torch.testing.assert_close(export_weights(model, naming), exported, rtol=0, atol=0)


def test_exports_have_the_names_of_the_manifests():
    with torch.device("meta"):
        state = Conformer(VARIANTS["conformer_tiny_patch16"]).state_dict()
    assert {weights.NAMINGS["official"](name) for name in state} == set(manifest("tiny_p16"))


def test_another_naming_is_refused():
    with pytest.raises(
        ValueError, match=r"^naming must be one of ours, official, mmpretrain, not '"
    ):
        export_weights(Conformer(TOY), "timm")


# A checkpoint of a run of ours


def run_of_ours(model, average):
    """What a run writes between two steps, with the state of a real optimizer and schedule."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(golden.image(2, 3, 32, 32)).sum().sum().backward()
    optimizer.step()
    halves = [torch.optim.lr_scheduler.LinearLR(optimizer) for _ in range(2)]
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, halves, [3])
    return {
        "step": 1,
        "model": model.state_dict(),
        "model_ema": average and average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
        "scaler": None,
        "recipe": {"model": "conformer_micro", "lr": 0.001, "model_options": {}},
    }


@pytest.mark.parametrize("classes", [10, 7])
def test_a_checkpoint_of_a_run_is_loaded_and_its_average_too(classes, tmp_path):
    config = replace(VARIANTS["conformer_micro"], num_classes=classes)
    model, average = Conformer(config), filled(config)
    torch.save(run_of_ours(model, average), tmp_path / "a.pt")
    for ema, expected in ((False, model), (True, average)):
        found = load_model(tmp_path / "a.pt", ema=ema)
        assert found.config == config
        same(found, clones(expected))
        same(load_weights(Conformer(config), tmp_path / "a.pt", ema=ema), clones(expected))


@pytest.mark.parametrize("content", [{}, {"ema_state_dict": {}}, {"model_ema": None}])
def test_an_average_of_none_is_an_average_that_is_not_there(content, tmp_path):
    model = Conformer(VARIANTS["conformer_micro"])
    torch.save(run_of_ours(model, None) | content, tmp_path / "a.pt")
    before = clones(model)
    for load in (load_model, lambda path, ema: load_weights(model, path, ema)):
        with pytest.raises(WeightsError, match=r"^there is no moving average here; load the w"):
            load(tmp_path / "a.pt", ema=True)
    same(model, before)
    same(load_model(tmp_path / "a.pt"), before)


# Names of the classes

NAMES = ("ant", "bee", "crane", "crane", "früh", "\udcff", "a, b", '"', "", "\n")


def named(config=TOY, classes=NAMES):
    model = filled(config)
    model.classes = classes
    return model


def notes_of(path):
    with safe_open(path, framework="pt") as stream:
        return stream.metadata()


@pytest.mark.parametrize(
    ("classes", "changes"),
    [(NAMES, {}), (list(NAMES), {}), ((), {"num_classes": 0}), (("one",), {"num_classes": 1})],
    ids=str,
)
def test_names_of_classes_travel_with_the_weights(classes, changes, tmp_path, recwarn):
    save_weights(named(changed(**changes), classes), tmp_path / "a.safetensors")
    assert json.loads(notes_of(tmp_path / "a.safetensors")["classes"]) == list(classes)
    for model in (
        load_model(tmp_path / "a.safetensors"),
        load_weights(Conformer(changed(**changes)), tmp_path / "a.safetensors"),
    ):
        assert model.classes == tuple(classes)
        assert type(model.classes) is tuple
    assert not recwarn.list


def test_without_names_there_are_none(tmp_path):
    save_weights(filled(), tmp_path / "a.safetensors")
    assert load_model(tmp_path / "a.safetensors").classes is None
    assert load_weights(Conformer(TOY), tmp_path / "a.safetensors").classes is None
    assert named().classes == NAMES
    assert Conformer.classes is None  # only that model was named


def test_a_file_from_before_there_were_names_still_loads(tmp_path):
    """The checksum as it was computed then, written out once more."""
    state, config = clones(filled()), json.dumps(asdict(TOY))
    total = hashlib.sha256(config.encode())
    for name in sorted(state):
        head = f"\n{name} {state[name].dtype} {tuple(state[name].shape)}\n"
        total.update(head.encode() + state[name].numpy().tobytes())
    notes = {"config": config, "package": "conformer_src 0.1", "sha256": total.hexdigest()}
    save_file(state, tmp_path / "a.safetensors", notes)
    model = load_model(tmp_path / "a.safetensors")
    same(model, state)
    assert model.classes is None
    save_weights(filled(), tmp_path / "b.safetensors")
    assert notes_of(tmp_path / "b.safetensors")["sha256"] == total.hexdigest()


def test_the_checksum_covers_the_names(tmp_path):
    save_weights(named(), tmp_path / "a.safetensors")
    notes = notes_of(tmp_path / "a.safetensors")
    others = json.dumps(["wasp", *NAMES[1:]])
    for spoilt in (notes | {"classes": others}, {k: notes[k] for k in notes if k != "classes"}):
        save_file(clones(filled()), tmp_path / "b.safetensors", spoilt)
        with pytest.raises(WeightsError, match="its values are not those that were saved"):
            load_model(tmp_path / "b.safetensors")
    save_file(clones(filled()), tmp_path / "b.safetensors", notes)
    assert load_model(tmp_path / "b.safetensors").classes == NAMES


def test_heads_that_stay_take_no_names(tmp_path):
    save_weights(named(), tmp_path / "a.safetensors")
    fresh, own = Conformer(changed(num_classes=2)), Conformer(changed(num_classes=2))
    own.classes = ("left", "right")
    for model in (fresh, own):
        with pytest.warns(UserWarning, match="^the weights are for 10 classes and the model for 2"):
            load_weights(model, tmp_path / "a.safetensors")
    assert fresh.classes is None
    assert own.classes == ("left", "right")


@pytest.mark.parametrize("classes", [NAMES, list(NAMES)], ids=type)
def test_the_same_names_are_nothing_to_speak_of(classes, tmp_path, recwarn):
    save_weights(named(), tmp_path / "a.safetensors")
    model = Conformer(TOY)
    model.classes = classes
    assert load_weights(model, tmp_path / "a.safetensors").classes == classes
    assert not recwarn.list


def test_a_model_with_other_names_keeps_them_and_it_is_said(tmp_path):
    save_weights(named(), tmp_path / "a.safetensors")
    model, mine = Conformer(TOY), ("ant", "wasp", *NAMES[2:])
    model.classes = mine
    words = (
        "^the weights call 'bee' what the model calls 'wasp', and it keeps its names; set its "
        "classes to None first to take theirs$"
    )
    with pytest.warns(UserWarning, match=words) as heard:
        load_weights(model, tmp_path / "a.safetensors")
    assert len(heard) == 1
    assert heard[0].filename == __file__
    assert model.classes == mine
    same(model, clones(filled()))
    model.classes = None
    assert load_weights(model, tmp_path / "a.safetensors").classes == NAMES


def test_names_stay_when_weights_without_names_come():
    model = named()
    assert load_weights(model, official(filled())).classes == NAMES


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (json.dumps(NAMES[:3]), "holds 3 names for 10 classes; save the weights again"),
        ("[]", "holds 0 names for 10 classes; save"),
        (json.dumps([*NAMES[:9], 3]), "holds names of type int; save"),
        (json.dumps([*NAMES[:9], None]), "holds names of type NoneType; save"),
        ("[[]]", "holds names of type list; save"),
        ('"abcdefghij"', "holds str, not a list of names; save"),
        ('{"ant": 0}', "holds dict, not a list of names; save"),
        ("null", "holds NoneType, not a list of names; save"),
        ('["ant", ', r"holds no JSON \(.*\); save"),
        ("", r"holds no JSON \(.*\); save"),
        ("[" * 100_000, r"holds no JSON \(.*\); save"),
        ("9" * 5000, r"holds no JSON \(.*\); save"),
    ],
    ids=lambda value: value[:20],
)
@pytest.mark.parametrize("by", ["us", "others"])
def test_what_is_no_names_in_a_header_is_refused(by, classes, words, tmp_path):
    state, config = clones(filled()), json.dumps(asdict(TOY))
    notes = {"config": config, "classes": classes}
    if by == "us":
        notes["sha256"] = digest(state, config, classes)
    save_file(state, tmp_path / "a.safetensors", notes)
    same_heads, others = Conformer(TOY), Conformer(changed(num_classes=2))
    before = clones(same_heads), clones(others)
    for load in (
        load_model,
        lambda path: load_weights(same_heads, path),
        lambda path: load_weights(others, path),
    ):
        with pytest.raises(WeightsError, match=f'^"classes" in the header {words}') as error:
            load(tmp_path / "a.safetensors")
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 300
    for model, state in zip((same_heads, others), before, strict=True):
        same(model, state)
        assert model.classes is None


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (NAMES[:3], "3 names for 10 classes"),
        ((), "0 names for 10 classes"),
        ("abcdefghij", "str, not a list of names"),
        (range(10), "range, not a list of names"),
        (tuple(range(10)), "names of type int"),
    ],
    ids=str,
)
def test_names_that_could_not_be_loaded_are_not_saved(classes, words, tmp_path):
    save_weights(filled(), tmp_path / "before.safetensors")
    model = named(classes=classes)
    sentence = f"^model.classes holds {words}; set a tuple with one name for each class\\.$"
    with pytest.raises(WeightsError, match=sentence):
        save_weights(model, tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["before.safetensors"]
    fresh = Conformer(TOY)
    fresh.classes, before = classes, clones(fresh)
    with pytest.raises(ValueError, match=sentence):
        load_weights(fresh, tmp_path / "before.safetensors")
    same(fresh, before)


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: optimize_for_inference(model, compile=False),
        compiled,
        lambda model: optimize_for_inference(compiled(model), compile=False),
        lambda model: nn.DataParallel(model).module,
        lambda model: model.to(torch.float64),
    ],
)
def test_copies_and_other_forms_keep_the_names(copied):
    assert copied(named()).classes == NAMES


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel])
def test_names_reach_the_model_inside_and_come_from_it(wrap, tmp_path):
    save_weights(wrap(named()), tmp_path / "a.safetensors")
    model = Conformer(TOY)
    load_weights(wrap(model), tmp_path / "a.safetensors")
    assert model.classes == NAMES


# How images are made ready

INPUT = InputConfig(48, (0.1, 0.2, 0.3), (0.4, 0.5, 1 / 3), crop=0.9, pad=3)


def prepared(config=TOY, ready=INPUT):
    model = filled(config)
    model.input = ready
    return model


def test_the_input_travels_with_the_weights(tmp_path, recwarn):
    save_weights(prepared(), tmp_path / "a.safetensors")
    assert InputConfig(**json.loads(notes_of(tmp_path / "a.safetensors")["input"])) == INPUT
    for model in (
        load_model(tmp_path / "a.safetensors"),
        load_weights(Conformer(TOY), tmp_path / "a.safetensors"),
    ):
        assert model.input == INPUT
        assert model.classes is None
    assert not recwarn.list


def test_without_an_input_there_is_none(tmp_path):
    save_weights(named(), tmp_path / "a.safetensors")
    assert notes_of(tmp_path / "a.safetensors").keys() == {"config", "classes", "sha256", "package"}
    assert load_model(tmp_path / "a.safetensors").input is None
    assert load_weights(Conformer(TOY), tmp_path / "a.safetensors").input is None
    assert prepared().input == INPUT
    assert Conformer.input is None  # only that model has one


def test_files_without_an_input_keep_their_checksum(tmp_path):
    for model in (filled(), named()):
        save_weights(model, tmp_path / "a.safetensors")
        notes = notes_of(tmp_path / "a.safetensors")
        texts = [notes[key] for key in ("config", "classes") if key in notes]
        assert notes["sha256"] == digest(clones(model), *texts)


def test_the_checksum_covers_the_input(tmp_path):
    model = prepared()
    model.classes = NAMES
    save_weights(model, tmp_path / "a.safetensors")
    notes = notes_of(tmp_path / "a.safetensors")
    other = json.dumps(asdict(replace(INPUT, image_size=64)))
    for spoilt in (notes | {"input": other}, {k: notes[k] for k in notes if k != "input"}):
        save_file(clones(filled()), tmp_path / "b.safetensors", spoilt)
        with pytest.raises(WeightsError, match="its values are not those that were saved"):
            load_model(tmp_path / "b.safetensors")
    save_file(clones(filled()), tmp_path / "b.safetensors", notes)
    found = load_model(tmp_path / "b.safetensors")
    assert (found.classes, found.input) == (NAMES, INPUT)


def test_an_input_of_its_own_stays_without_a_word(tmp_path, recwarn):
    save_weights(prepared(), tmp_path / "a.safetensors")
    model = prepared(ready=InputConfig(96))
    assert load_weights(model, tmp_path / "a.safetensors").input == InputConfig(96)
    assert load_weights(prepared(), official(filled())).input == INPUT
    assert not recwarn.list


def test_fresh_heads_see_what_the_backbone_saw(tmp_path):
    save_weights(prepared(), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="it keeps its own heads"):
        found = load_weights(Conformer(changed(num_classes=2)), tmp_path / "a.safetensors")
    assert found.input == INPUT


@pytest.mark.parametrize(
    ("ready", "words"),
    [
        (
            '{"image_size": 0}',
            r"no InputConfig \(image_size must be a whole number of at least 1, n",
        ),
        ('{"mean": [1, 2]}', r"no InputConfig \(mean and std must be equally long"),
        ('{"std": [1, 1, NaN]}', r"no InputConfig \(std must hold"),
        ('{"colour": 1}', r"no InputConfig \(.*unexpected keyword argument 'colour'"),
        ('{"mean": [0.5], "std": [1]}', "mean and std for 1 channels, but the model takes 3"),
        ("[]", "list, not an InputConfig"),
        ("32", "int, not an InputConfig"),
        ("null", "NoneType, not an InputConfig"),
        ("", r"no InputConfig \("),
        ("{" * 3, r"no InputConfig \("),
        ("[" * 100_000, r"no InputConfig \("),
        ('{"pad": %s}' % ("9" * 5000), r"no InputConfig \("),
    ],
    ids=lambda value: value[:20],
)
@pytest.mark.parametrize("by", ["us", "others"])
def test_what_is_no_input_in_a_header_is_refused(by, ready, words, tmp_path):
    state, config = clones(filled()), json.dumps(asdict(TOY))
    notes = {"config": config, "input": ready}
    if by == "us":
        notes["sha256"] = digest(state, config, ready)
    save_file(state, tmp_path / "a.safetensors", notes)
    model = Conformer(TOY)
    before = clones(model)
    for load in (load_model, lambda path: load_weights(model, path)):
        with pytest.raises(WeightsError, match=f'^"input" in the header holds {words}') as error:
            load(tmp_path / "a.safetensors")
        assert str(error.value).endswith("; save the weights again.")
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 300
    same(model, before)
    assert model.input is None


@pytest.mark.parametrize(
    ("ready", "words"),
    [
        (48, "int, not an InputConfig"),
        (asdict(INPUT), "dict, not an InputConfig"),
        (InputConfig(32, (0.5,), (1,)), "mean and std for 1 channels, but the model takes 3"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_input_that_could_not_be_loaded_is_not_saved(ready, words, tmp_path):
    sentence = f"^model.input holds {words}; set an InputConfig that fits, or None.$"
    with pytest.raises(WeightsError, match=sentence):
        save_weights(prepared(ready=ready), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    fresh = Conformer(TOY)
    fresh.input, before = ready, clones(fresh)
    with pytest.raises(ValueError, match=sentence):
        load_weights(fresh, clones(filled()))
    same(fresh, before)


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, copy.deepcopy])
def test_the_input_is_kept_by_copies_and_other_forms(wrap, tmp_path):
    save_weights(wrap(prepared()), tmp_path / "a.safetensors")
    assert load_model(tmp_path / "a.safetensors").input == INPUT
    fast = optimize_for_inference(prepared(), compile=False)
    assert fast.input == INPUT


# Saving


def test_the_header_tells_where_a_file_comes_from(tmp_path):
    model = filled()
    save_weights(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as stream:
        notes = stream.metadata()
    assert json.loads(notes["config"]) == asdict(TOY)
    assert (
        notes["package"] == f"conformer_src {conformer_src.__version__}, torch {torch.__version__}"
    )
    assert notes["sha256"] == digest(model.state_dict(), notes["config"])
    assert set(notes) == {"config", "package", "sha256"}


def test_a_saved_file_is_the_same_each_time(tmp_path):
    for name in "ab":
        save_weights(filled(), tmp_path / name)
    assert len({(tmp_path / name).read_bytes()[-1000:] for name in "ab"}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_saving_over_a_file_that_was_loaded(tmp_path):
    path = tmp_path / "a.safetensors"
    save_weights(filled(), path)
    model = load_model(path)
    path.write_bytes(b"")  # the model has its own memory
    same(model, clones(filled()))
    save_weights(model, path)
    same(load_model(path), clones(filled()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_is_kept_in_the_file_and_values_in_the_model(dtype, tmp_path):
    source = filled().to(dtype)
    save_weights(source, tmp_path / "a.safetensors")
    kept = read_file(tmp_path / "a.safetensors")[0]
    torch.testing.assert_close(kept, clones(source), rtol=0, atol=0)
    model = load_model(tmp_path / "a.safetensors")
    same(model, clones(source.float()))


def test_weights_that_could_not_be_loaded_are_not_saved(tmp_path):
    model = filled()
    model.trans_head.norm.bias.data[0] = float("nan")
    with pytest.raises(
        WeightsError, match=r"^trans_head\.norm\.bias holds values that are not fin"
    ):
        save_weights(model, tmp_path / "a.safetensors")
    folded = fold_norms(filled().eval())
    with pytest.raises(
        WeightsError, match=r"^entry\.stem\.bn1\.weight is missing, and \d+ more, by"
    ):
        save_weights(folded, tmp_path / "a.safetensors")
    assert not any(tmp_path.iterdir())


def test_random_numbers_are_not_used_up_by_loading(tmp_path):
    save_weights(filled(), tmp_path / "a.safetensors")
    before = torch.get_rng_state()
    load_model(tmp_path / "a.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


MEASURE = """
import sys
from conformer_src.conformer import Conformer, VARIANTS
from conformer_src.weights import load_model, load_weights

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

path, small, how = sys.argv[1:]
load_model(small)  # whatever is imported or allocated once
model = how == "into" and Conformer(VARIANTS["conformer_tiny_patch16"])
before = peak()
load_weights(model, path) if model else load_model(path)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", ["new", "into"])
def test_memory_of_loading_is_little_more_than_the_file(how, tmp_path):
    path, small = tmp_path / "tiny.safetensors", tmp_path / "micro.safetensors"
    save_weights(Conformer(VARIANTS["conformer_tiny_patch16"]), path)
    save_weights(Conformer(VARIANTS["conformer_micro"]), small)
    command = [sys.executable, "-c", MEASURE, str(path), str(small), how]
    environment = os.environ | {"PYTHONPATH": str(Path(conformer_src.__file__).parents[1])}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    times = int(run.stdout) / path.stat().st_size
    print(f"{how}: {times:.2f} times the file")
    assert 0.5 < times <= 1.2
