"""`create_model(name, pretrained=True)`: from an address to the logits, over a local server.

The published files cannot be had where the tests run. Those here have the same structure, made of
golden weights; their addresses differ in the host and, because the values do, in the hash.
"""

import hashlib
import io
import re
import warnings

import pytest
import torch
from file_server import fetched, serving

import conformer_src as cs
from conformer_src import weights
from conformer_src.checks import golden
from conformer_src.conformer import VARIANTS, Conformer
from conformer_src.files import WeightsError
from conformer_src.weights import PRETRAINED, export_weights, load_model, official_name

NAME = "conformer_tiny_patch16"
META = {
    "mmengine_version": "0.10.4",
    "cfg": "model = dict(type='ImageClassifier')",
    "dataset_meta": {"classes": ("tench", "goldfish")},
    "epoch": 300,
    "iter": 375_300,
}


def make(config):
    """Return a model with golden weights, and its file as OpenMMLab publishes one."""
    model = golden.fill_(Conformer(config), official_name)
    stream = io.BytesIO()
    torch.save({"meta": META, "state_dict": export_weights(model, "mmpretrain")}, stream)
    return model, stream.getvalue()


@pytest.fixture(scope="module")
def made():
    return make(VARIANTS[NAME])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server in the place of OpenMMLab's, and an empty cache."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    with serving() as server:
        monkeypatch.setattr(weights, "_OPENMMLAB", server.url("conformer-"))
        yield server


def publish(hub, monkeypatch, name, body):
    """Offer a file under the name that the package asks for, with the hash that is right for it."""
    file = PRETRAINED[name].rpartition("-")[0] + f"-{hashlib.sha256(body).hexdigest()[:8]}.pth"
    monkeypatch.setitem(PRETRAINED, name, file)
    hub.files[f"conformer-{file}"] = body
    return f"conformer-{file}"


def cached(tmp_path):
    return fetched(tmp_path / "hub/checkpoints")


def test_the_addresses_are_the_published_ones():
    pattern = (
        r"https://download\.openmmlab\.com/mmclassification/v0/conformer/conformer-"
        r"(tiny|small|base)-p(16|32)_(3rdparty_)?8xb128_in1k_20211206-[0-9a-f]{8}\.pth"
    )
    for name, file in PRETRAINED.items():
        size, patch = re.fullmatch(pattern, weights._OPENMMLAB + file).groups()[:2]
        assert name == f"conformer_{size}_patch{patch}"
    hashes = {name: file[-12:-4] for name, file in PRETRAINED.items()}
    assert hashes == {
        "conformer_tiny_patch16": "f6860372",
        "conformer_small_patch16": "3065dcf5",
        "conformer_small_patch32": "947a0816",
        "conformer_base_patch16": "bfdf8637",
    }
    assert set(PRETRAINED) == set(VARIANTS) - {"conformer_micro"}


def test_from_the_address_to_the_logits(hub, made, monkeypatch, tmp_path):
    source, body = made
    file = publish(hub, monkeypatch, NAME, body)
    hub.cuts = [len(body) // 3, len(body) // 3]  # the connection is cut twice
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = cs.create_model(NAME, pretrained=True)
    assert len(hub.asked) == 3
    assert cached(tmp_path) == [file]
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)
    images = golden.image(1, 3, 224, 224)
    with torch.no_grad():
        found, expected = model.eval()(images), source.eval()(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)

    hub.shutdown()  # the second time from the cache
    again = cs.create_model(NAME, pretrained=True)
    assert torch.equal(again.trans_head.fc.weight, source.trans_head.fc.weight)


def test_other_classes_keep_fresh_heads(hub, made, monkeypatch):
    publish(hub, monkeypatch, NAME, made[1])
    words = "^the weights are for 1000 classes and the model for 7, so it keeps its own heads$"
    with pytest.warns(UserWarning, match=words):
        model = cs.create_model(NAME, pretrained=True, num_classes=7, drop_path_rate=0.1)
    assert model.conv_head.fc.out_features == 7
    assert torch.equal(model.entry.stem.conv1.weight, made[0].entry.stem.conv1.weight)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_chans": 1}, r"conv1\.weight has shape \(64, 3, 7, 7\), but the model needs \(64, 1"),
        ({"patch_size": 32}, r"trans_patch_conv\.weight has shape \(384, 64, 4, 4\), but the mod"),
        ({"channel_ratio": 4}, r"conv_1\.conv1\.weight has shape \(16, 64, 1, 1\), but the model"),
        ({"pos_embed": 14}, r"entry\.token_embed\.pos_embed is missing"),
    ],
    ids=str,
)
def test_another_network_is_refused_by_its_first_tensor(hub, made, monkeypatch, changes, words):
    publish(hub, monkeypatch, NAME, made[1])
    with pytest.raises(WeightsError, match=rf"^backbone\.{words}.*; the weights fit {NAME}: build"):
        cs.create_model(NAME, pretrained=True, **changes)


def test_the_file_of_another_variant_is_refused(hub, made, monkeypatch):
    publish(hub, monkeypatch, "conformer_base_patch16", made[1])
    with pytest.raises(WeightsError, match=f"; the weights fit {NAME}: build the model with the"):
        cs.create_model("conformer_base_patch16", pretrained=True)


def test_a_file_with_another_hash_is_refused(hub, made, tmp_path):
    file = f"conformer-{PRETRAINED[NAME]}"
    hub.files[file] = made[1]  # whose hash is another than the published one's
    words = r"^what came from http://\S+ is another file than its name promises: its SHA-256 does n"
    with pytest.raises(WeightsError, match=words):
        cs.create_model(NAME, pretrained=True)
    assert cached(tmp_path) == []


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (
            b"<!DOCTYPE html><title>Maintenance</title>",
            None,
            "is a web page, not weights: the serv",
        ),
        (None, None, r"cannot be fetched \(HTTP Error 404: Not Found\); download http"),
        (None, 500, r"cannot be fetched \(HTTP Error 500: Internal Server Error\); download http"),
    ],
)
def test_what_the_server_sends_instead_is_not_kept(hub, body, status, words, tmp_path):
    hub.status = status
    if body:
        hub.files[f"conformer-{PRETRAINED[NAME]}"] = body
    with pytest.raises(WeightsError, match=words) as error:
        cs.create_model(NAME, pretrained=True)
    assert "\n" not in str(error.value)
    assert cached(tmp_path) == []


def test_offline_it_says_what_to_put_where_and_that_works(hub, made, monkeypatch, tmp_path):
    file = publish(hub, monkeypatch, NAME, made[1])
    url, place = hub.url(file), tmp_path / "hub/checkpoints" / file
    hub.shutdown()
    hub.server_close()
    words = rf"^{file} cannot be fetched \(.*\); download {url} elsewhere and save it as {place}, o"
    with pytest.raises(WeightsError, match=words):
        cs.create_model(NAME, pretrained=True)
    place.write_bytes(made[1])  # by hand
    model = cs.create_model(NAME, pretrained=True)
    assert torch.equal(model.entry.token_embed.cls_token, made[0].entry.token_embed.cls_token)


def test_a_model_without_published_weights_is_said(hub):
    words = r"^nobody published weights of conformer_micro; choose conformer_tiny_patch16, conforme"
    with pytest.raises(WeightsError, match=words):
        cs.create_model("conformer_micro", pretrained=True)
    assert hub.asked == []


@pytest.mark.parametrize("name", ["conformer_tiny", "resnet50"])
def test_an_unknown_name_is_refused_before_anything_is_fetched(hub, name):
    with pytest.raises(ValueError, match=f"^there is no model '{name}'; choose conformer_"):
        cs.create_model(name, pretrained=True)
    assert hub.asked == []


def test_without_pretrained_nothing_is_fetched(hub):
    cs.create_model("conformer_micro")
    cs.create_model("conformer_micro", False, num_classes=3)
    assert hub.asked == []


def test_any_address_can_be_loaded_from(hub):
    source, body = make(VARIANTS["conformer_micro"])
    hub.files["mine/model.pth"] = body
    for model in (
        cs.load_weights(cs.create_model("conformer_micro"), hub.url("mine/model.pth")),
        load_model(hub.url("mine/model.pth")),
    ):
        torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)
    assert len(hub.asked) == 1
