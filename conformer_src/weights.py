"""Weights from elsewhere: one network, three ways to name its tensors.

- ours: `blocks.1.down.ln.weight`
- the authors': `conv_trans_2.squeeze_block.ln.weight`
- OpenMMLab's: `backbone.conv_trans_2.squeeze_block.ln.weight`
"""

import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

# Starts of our names and of the authors'. The blocks from the second on follow a pattern.
_STARTS = {
    "entry.stem.": "",
    "entry.token_embed.cls_token": "cls_token",
    "entry.token_embed.proj.": "trans_patch_conv.",
    "blocks.0.conv_block.": "conv_1.",
    "blocks.0.trans_block.": "trans_1.",
    "trans_head.norm.": "trans_norm.",
    "trans_head.fc.": "trans_cls_head.",
    "conv_head.fc.": "conv_cls_head.",
}
_PARTS = {"conv_block": "cnn_block", "down": "squeeze_block", "up": "expand_block"}
# Parts of the authors' names and of OpenMMLab's; only transformer blocks have a norm and an mlp.
_MMPRETRAIN = {
    r"(trans_\w+(?:\.trans_block)?)\.norm([12])\.": r"\1.ln\2.",
    r"\.mlp\.fc1\.": ".ffn.layers.0.0.",
    r"\.mlp\.fc2\.": ".ffn.layers.1.",
}


def official_name(name: str) -> str:
    """Return the name that the authors' checkpoints give to a tensor of a `Conformer`."""
    for ours, theirs in _STARTS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    if match := re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(.+)", name):
        number, part, rest = match.groups()
        return f"conv_trans_{int(number) + 1}.{_PARTS.get(part, part)}.{rest}"
    return name  # what the authors' network does not have keeps its name


def mmpretrain_name(name: str) -> str:
    """Return the name that OpenMMLab's checkpoints give to a tensor of a `Conformer`."""
    name = official_name(name)
    for theirs, other in _MMPRETRAIN.items():
        name = re.sub(theirs, other, name)
    return ("head." if "_cls_head." in name else "backbone.") + name


def _naming(names: Mapping[str, Tensor]) -> Callable[[str], str]:
    """Return what turns our names into those of a state dict."""
    if any(name.startswith("backbone.") for name in names):
        return mmpretrain_name
    if any(name.startswith("entry.stem.") for name in names):
        return str
    return official_name


def load_weights(model: nn.Module, source: Mapping[str, Tensor]) -> nn.Module:
    """Copy a state dict into a model, whoever named its tensors, and return the model.

    Args:
        model: a `Conformer`.
        source: tensors by name: ours, the authors' or OpenMMLab's.

    Raises:
        ValueError: A tensor is missing, left over, or of another shape; the model is as before.
    """
    naming, own = _naming(source), model.state_dict()
    theirs = {naming(name): name for name in own}
    missing = [name for name in theirs if name not in source]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(theirs)} tensors are missing, {missing[0]} first; "
            "build the model with the config that the weights were made for."
        )
    spare = [name for name in source if name not in theirs]
    if spare:
        raise ValueError(
            f"{len(spare)} tensors have no place in the model, {spare[0]} first; "
            "build the model with the config that the weights were made for."
        )
    for name, ours in theirs.items():
        if source[name].shape != own[ours].shape:
            raise ValueError(
                f"{name} has shape {tuple(source[name].shape)}, but the model needs "
                f"{tuple(own[ours].shape)}; build the model with the config that fits."
            )
    model.load_state_dict({ours: source[name] for name, ours in theirs.items()})
    return model
