"""The CNN branch: the stem, and the bottleneck with its tap and its extra input.

The letters are those of the book: B batch, C channels, H and W a map, s stride. The arguments mean
the same everywhere:

- `in_chans`: channels of what comes in.
- `out_chans`: channels of what goes out; a `ConvBlock` is a quarter as wide inside.
- `stride`: by how much H and W shrink, rounded up.
- `project_shortcut`: whether the shortcut of a `ConvBlock` is a 1x1 convolution with BatchNorm.

Widths that cannot work, and maps that are not floating-point numbers of shape (B, C, H, W), raise
`ValueError`. Attribute names are those of the authors' checkpoints.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def _require_maps(maps: Tensor, channels: int, name: str = "maps") -> None:
    """Raise a `ValueError` unless maps are floating-point (B, channels, H, W) and not empty."""
    if maps.ndim != 4 or maps.shape[1] != channels or not maps.is_floating_point():
        raise ValueError(
            f"{name} are {maps.dtype} of shape {tuple(maps.shape)}, but must be floating-point "
            f"(B, {channels}, H, W); add a missing batch axis with {name}.unsqueeze(0), convert "
            f"whole numbers with {name} / 255, or build the layer with other in_chans."
        )
    if 0 in maps.shape[2:]:
        raise ValueError(
            f"{name} have shape {tuple(maps.shape)} and hold nothing; choose a height and a width "
            "of at least 1."
        )


def _require_extra(extra: Tensor, inner: Tensor) -> None:
    """Raise a `ValueError` unless the extra map has the shape of the map it is added to."""
    if extra.shape != inner.shape:
        raise ValueError(
            f"extra has shape {tuple(extra.shape)}, but must be {tuple(inner.shape)} like the map "
            "between conv1 and conv2, to which it is added; project and resize it before."
        )


def _require_sizes(in_chans: int, out_chans: int, kernel: int, stride: int) -> None:
    """Raise a `ValueError` for a convolution that cannot be built or does not keep its centre."""
    if min(in_chans, out_chans, kernel, stride) < 1 or kernel % 2 == 0:
        raise ValueError(
            f"a convolution of {in_chans} -> {out_chans} channels with kernel {kernel} and stride "
            f"{stride} cannot be built; choose at least 1 for each, and an odd kernel."
        )


def _require_widths(in_chans: int, out_chans: int, stride: int, project_shortcut: bool) -> None:
    """Raise a `ValueError` for a bottleneck that cannot be built or cannot add up."""
    if out_chans < 4 or out_chans % 4:
        raise ValueError(
            f"out_chans {out_chans} cannot be quartered for the inside of the bottleneck; "
            "choose a positive multiple of 4."
        )
    if not project_shortcut and (in_chans != out_chans or stride != 1):
        raise ValueError(
            f"an identity shortcut cannot be added to the result of {in_chans} -> {out_chans} "
            f"channels with stride {stride}; set project_shortcut=True."
        )


def conv_norm(
    in_chans: int, out_chans: int, kernel: int, stride: int = 1, eps: float = 1e-6
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Return a convolution without bias, started as He et al. (2015), and its BatchNorm.

    Maps (B, in_chans, H, W) become (B, out_chans, ceil(H / stride), ceil(W / stride)). The two come
    apart, because in the checkpoints each has a name of its own.
    """
    _require_sizes(in_chans, out_chans, kernel, stride)
    conv = nn.Conv2d(in_chans, out_chans, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv, nn.BatchNorm2d(out_chans, eps=eps)


class Stem(nn.Module):
    """Shrink images by 4, before the two branches part (Conformer paper, section 3.1).

    `forward` raises `ValueError` for images that are not floating-point (B, in_chans, H, W).
    """

    def __init__(self, in_chans: int = 3, out_chans: int = 64) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_norm(in_chans, out_chans, 7, stride=2, eps=1e-5)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Extract edges: images (B, in_chans, H, W) -> maps (B, 64, ceil(H / 4), ceil(W / 4))."""
        _require_maps(images, self.conv1.in_channels, "images")
        maps = self.bn1(self.conv1(images)).relu()  # (B, 64, ceil(H / 2), ceil(W / 2))
        return self.pool(maps)  # (B, 64, ceil(H / 4), ceil(W / 4))


class ConvBlockOutput(NamedTuple):
    """What a `ConvBlock` hands on: `maps` to the next block, `tap` to the transformer branch.

    H and W are those of the input over the stride, rounded up.
    """

    maps: Tensor  # (B, out_chans, H, W)
    tap: Tensor  # (B, out_chans / 4, H, W)


class ConvBlock(nn.Module):
    """Bottleneck with a tap and an extra input (Conformer paper, section 3.2)."""

    def __init__(self, in_chans, out_chans, stride=1, project_shortcut=False):
        super().__init__()
        _require_widths(in_chans, out_chans, stride, project_shortcut)
        inner, shortcut = out_chans // 4, (nn.Identity(), nn.Identity())
        if project_shortcut:
            shortcut = conv_norm(in_chans, out_chans, 1, stride)
        self.conv1, self.bn1 = conv_norm(in_chans, inner, 1)
        self.conv2, self.bn2 = conv_norm(inner, inner, 3, stride)
        self.conv3, self.bn3 = conv_norm(inner, out_chans, 1)
        self.residual_conv, self.residual_bn = shortcut

    def forward(self, maps: Tensor, extra: Tensor | None = None) -> ConvBlockOutput:
        """Map (B, in_chans, H, W), and an extra (B, out_chans / 4, H, W), to the two outputs."""
        _require_maps(maps, self.conv1.in_channels)
        inner = self.bn1(self.conv1(maps)).relu()  # (B, out_chans / 4, H, W)
        if extra is not None:
            _require_extra(extra, inner)
            inner = inner + extra
        tap = self.bn2(self.conv2(inner)).relu()  # from here on ceil(H / s), ceil(W / s)
        change = self.bn3(self.conv3(tap))  # (B, out_chans, ...)
        return ConvBlockOutput((change + self.residual_bn(self.residual_conv(maps))).relu(), tap)


def count_parameters(module: nn.Module) -> int:
    """Return how many numbers a module learns."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, *inputs: Tensor) -> int:
    """Return the multiply-accumulates of all convolutions and matrix products for these inputs.

    Nothing is computed and the module stays as it is: shapes alone run through it.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors}
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        functional_call(module, shapes, tuple(tensor.to("meta") for tensor in inputs))
    return counter.get_total_flops() // 2  # one multiplication and one addition each
