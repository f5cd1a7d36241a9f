"""OpenMMLab's own files: what their network saves, ours loads, and both compute the same."""

import pytest
import torch
from networks import PEERS, build_peer, deviation, mmpretrain

from conformer_src import create_model, load_model, load_weights
from conformer_src.checks import golden
from conformer_src.weights import mmpretrain_name

META = {"mmpretrain_version": mmpretrain.__version__, "dataset_meta": {"classes": ("tench",)}}


@torch.no_grad()
def filled_peer(name):
    """OpenMMLab's network, with values in whose sums every tensor counts."""
    return golden.fill_(build_peer(name))


@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_their_file_gives_their_outputs(name, tmp_path):
    peer = filled_peer(name).eval()
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
            off = deviation(ours, other)
            print(f"{name}: {off:.1e}")
            assert off <= 1e-5


@pytest.mark.parametrize("average", [True, False])
def test_a_training_file_of_theirs_with_an_average(average, tmp_path):
    """Their hook exchanges weights and average before it saves: done here by the hook itself."""
    from mmengine.hooks import EMAHook
    from mmengine.model import ExponentialMovingAverage

    name = "conformer_tiny_patch16"
    peer = filled_peer(name)
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
