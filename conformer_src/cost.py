"""Forms of a trained network that compute the same and cost less."""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Names of a convolution and of the BatchNorm that follows it, within one module.
_FOLDS = (
    ("conv1", "bn1"),
    ("conv2", "bn2"),
    ("conv3", "bn3"),
    ("residual_conv", "residual_bn"),
    ("conv_project", "bn"),
)


def fold_norms(module: nn.Module) -> nn.Module:
    """Multiply each BatchNorm into the convolution before it, in place, and return the module.

    What it computes stays the same, to rounding.

    Raises:
        ValueError: A BatchNorm is in training mode; nothing was folded.
    """
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    if any(norm.training for norm in norms):
        raise ValueError(
            "a module in training mode cannot be folded, because its BatchNorms still measure each "
            "batch; call .eval() first."
        )
    for part in module.modules():
        for conv, norm in _FOLDS:
            if isinstance(getattr(part, norm, None), nn.BatchNorm2d):
                setattr(part, conv, fuse_conv_bn_eval(getattr(part, conv), getattr(part, norm)))
                setattr(part, norm, nn.Identity().eval())
    return module


def optimize_for_inference(model: nn.Module, compile: bool = True) -> nn.Module:
    """Return a copy that computes the same faster, and can no longer be trained.

    Its BatchNorms are folded and its memory format is channels_last. With `compile`, the first call
    for each shape of images takes about a minute and needs a C++ compiler.
    """
    fast = fold_norms(copy.deepcopy(model).eval()).requires_grad_(False)
    fast = fast.to(memory_format=torch.channels_last)
    return torch.compile(fast) if compile else fast
