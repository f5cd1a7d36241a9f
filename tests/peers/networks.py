"""OpenMMLab's networks, by our names."""

import pytest

mmpretrain = pytest.importorskip("mmpretrain", reason="make test-peers installs mmpretrain")

PEERS = {
    "conformer_tiny_patch16": "conformer-tiny-p16_3rdparty_in1k",
    "conformer_small_patch16": "conformer-small-p16_3rdparty_in1k",
    "conformer_small_patch32": "conformer-small-p32_8xb128_in1k",
    "conformer_base_patch16": "conformer-base-p16_3rdparty_in1k",
}


def build_peer(name):
    """OpenMMLab's network without stochastic depth, with fresh weights."""
    return mmpretrain.get_model(PEERS[name], backbone={"drop_path_rate": 0.0})


def deviation(found, expected):
    """The largest difference, over the root mean square of what is expected."""
    return float((found - expected).abs().max() / expected.square().mean().sqrt())
