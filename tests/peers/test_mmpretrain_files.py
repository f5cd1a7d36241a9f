"""OpenMMLab's own files: what their network saves, ours loads, and both compute the same."""

import logging
import warnings

import pytest
import torch

from conformer_src import create_model, load_model, load_weights
from conformer_src.checks import golden
from conformer_src.weights import mmpretrain_name

mmpretrain = pytest.importorskip("mmpretrain", reason="make test-peers installs mmpretrain")

PEERS = {
    "conformer_tiny_patch16": "conformer-tiny-p16_3rdparty_in1k",
    "conformer_small_patch16": "conformer-small-p16_3rdparty_in1k",
    "conformer_small_patch32": "conformer-small-p32_8xb128_in1k",
    "conformer_base_patch16": "conformer-base-p16_3rdparty_in1k",
}
META = {"mmpretrain_version": mmpretrain.__version__, "dataset_meta": {"classes": ("tench",)}}


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@torch.no_grad()
def build_peer(name):
    """OpenMMLab's network, with values in whose sums every tensor counts."""
    peer = mmpretrain.get_model(PEERS[name], backbone={"drop_path_rate": 0.0})
    return golden.fill_(peer)


@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_their_file_gives_their_outputs(name, tmp_path):
    peer = build_peer(name).eval()
    path = tmp_path / "published.pth"
    torch.save({"meta": META, "state_dict": peer.state_dict()}, path)
    images = golden.image(1, 3, 224, 224)
    expected = peer(images)
    theirs = peer.state_dict()
    for own in (load_model(path), load_weights(create_model(name), path)):
        assert own.config == create_model(name).config
        for key, tensor in own.state_dict().items():
            assert torch.equal(tensor, theirs[mmpretrain_name(key)]), key
        for ours, other in zip(own.eval()(images), expected, strict=True):
            off = float((ours - other).abs().max() / other.square().mean().sqrt())
            print(f"{name}: {off:.1e}")
            assert off <= 1e-5


@pytest.mark.parametrize("average", [True, False])
def test_a_training_file_of_theirs_with_an_average(average, tmp_path):
    """Their hook exchanges weights and average before it saves: done here by the hook itself."""
    from mmengine.hooks import EMAHook
    from mmengine.model import ExponentialMovingAverage

    name = "conformer_tiny_patch16"
    peer = build_peer(name)
    hook = EMAHook()
    hook.ema_model = ExponentialMovingAverage(peer, momentum=0.5)
    hook.ema_model.update_parameters(peer)  # the first time, it copies
    with torch.no_grad():
        peer.backbone.cls_token.fill_(3)  # a step of training
    hook.ema_model.update_parameters(peer)
    content = {"meta": META, "state_dict": peer.state_dict(), "optimizer": {"state": {}}}
    content["ema_state_dict"] = hook.ema_model.state_dict()
    hook._swap_ema_state_dict(content)
    torch.save(content, tmp_path / "epoch_1.pth")
    own = load_weights(create_model(name), tmp_path / "epoch_1.pth", ema=average)
    expected = hook.ema_model.module.backbone.cls_token
    assert torch.equal(own.entry.token_embed.cls_token, expected)
    assert not torch.equal(expected, peer.backbone.cls_token)
