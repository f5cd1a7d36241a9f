"""Equal weights, equal outputs: this package's network and OpenMMLab's, side by side.

`make test-peers` installs mmpretrain and runs this; `make test` leaves it out.
"""

import pytest
import torch
import torch.nn.functional as F
from networks import PEERS, build_peer, deviation

from conformer_src import create_model
from conformer_src.checks import golden
from conformer_src.weights import load_weights, mmpretrain_name, official_name

SIZES = [(224, 224), (202, 135)]  # the second fits no variant: both networks pad
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def build_both(name, dtype, **changes):
    """The two networks with the same weights, whose BatchNorms are far from the identity."""
    own = golden.fill_(create_model(name, pad=True, **changes), official_name).to(dtype)
    peer = build_peer(name).to(dtype)
    weights = {mmpretrain_name(key): tensor for key, tensor in own.state_dict().items()}
    peer.load_state_dict(weights, strict=True)
    return own, peer


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_both_heads_agree(name, dtype):
    own, peer = (model.eval() for model in build_both(name, dtype))
    for size in SIZES:
        images = golden.image(2, 3, *size).to(dtype)
        found, expected = own(images), peer(images)
        for head, ours, theirs in zip(("conv", "trans"), found, expected, strict=True):
            off = deviation(ours, theirs)
            print(f"{name}, {dtype}, {size[0]} x {size[1]}, {head} head: {off:.1e}")
            assert off <= TOLERANCES[dtype], f"{head} head at {size}"


def test_gradients_and_running_statistics_agree():
    own, peer = (model.train() for model in build_both("conformer_tiny_patch16", torch.float64))
    images, labels = golden.image(2, 3, 224, 224).double(), torch.tensor([3, 5])
    for model in (own, peer):
        sum(F.cross_entropy(logits, labels) for logits in model(images)).backward()
    theirs = dict(peer.named_parameters())
    for name, parameter in own.named_parameters():
        gradient = theirs[mmpretrain_name(name)].grad
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-7, atol=1e-9, msg=name)
    theirs = dict(peer.named_buffers())
    for name, buffer in own.named_buffers():
        torch.testing.assert_close(buffer, theirs[mmpretrain_name(name)], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", PEERS)
def test_their_weights_load(name):
    peer = build_peer(name)
    own = load_weights(create_model(name), peer.state_dict())
    theirs = peer.state_dict()
    for key, tensor in own.state_dict().items():
        assert torch.equal(tensor, theirs[mmpretrain_name(key)]), key
