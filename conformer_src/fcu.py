"""The Feature Coupling Units: what the branches tell each other.

`FCUDown` turns the tap of a `ConvBlock` into tokens, `FCUUp` turns tokens into the extra map of a
`ConvBlock`. The letters are those of the book: B batch, C, H and W a map, N tokens (the class token
and the patches), E embedding width, s stride: a patch is s x s positions of the map. The arguments
mean the same in both:

- `in_chans`, `out_chans`: channels of the map, a quarter of the stage's width.
- `embed_dim`: E.
- `stride`: s.
- `mode`: how the size changes; the authors' is the default, the others are there for comparison.

Maps and tokens that do not belong to one grid raise `ValueError`. Attribute names are those of the
authors' checkpoints.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from conformer_src.attention import TokenNorm, require_tokens
from conformer_src.conv_block import _require_maps

DOWN_MODES = ("average", "max", "conv", "nearest", "bilinear", "bicubic")
UP_MODES = ("nearest", "bilinear")


def _require_sizes(chans: int, embed_dim: int, stride: int, mode: str, modes: tuple) -> None:
    """Raise a `ValueError` for a Feature Coupling Unit that cannot be built."""
    if min(chans, embed_dim, stride) < 1:
        raise ValueError(
            f"{chans} channels, embed_dim {embed_dim} and stride {stride} make no Feature Coupling "
            "Unit; choose at least 1 for each."
        )
    if mode not in modes:
        raise ValueError(f"mode {mode!r} does not exist; choose one of {', '.join(modes)}.")


def _require_grid(maps: Tensor, tokens: Tensor, stride: int) -> None:
    """Raise a `ValueError` unless each s x s square of the maps has its token, beside the first."""
    if maps.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"{maps.shape[0]} maps and the tokens of {tokens.shape[0]} images do not belong "
            "together; give both for the same batch."
        )
    (height, width), patches = maps.shape[-2:], tokens.shape[1] - 1
    if height % stride or width % stride or patches != height * width // stride**2:
        raise ValueError(
            f"{patches} patch tokens do not cover maps of {height} x {width} with squares of "
            f"{stride} x {stride}: 1 + (H / {stride}) (W / {stride}) tokens are needed, and an "
            f"H and W that {stride} divides."
        )


def down_sampler(chans: int, stride: int, mode: str = "average") -> nn.Module:
    """Return what shrinks maps (B, chans, H, W) to (B, chans, H / stride, W / stride)."""
    if stride == 1:
        return nn.Identity()
    if mode == "average":
        return nn.AvgPool2d(stride)
    if mode == "max":
        return nn.MaxPool2d(stride)
    if mode == "conv":
        return nn.Conv2d(chans, chans, stride, stride)
    return nn.Upsample(scale_factor=1 / stride, mode=mode)  # the name misleads: it resizes


class FCUDown(nn.Module):
    """Turn a map into an update of the tokens (Conformer paper, section 3.2)."""

    def __init__(self, in_chans: int, embed_dim: int, stride: int, mode: str = "average") -> None:
        super().__init__()
        _require_sizes(in_chans, embed_dim, stride, mode, DOWN_MODES)
        self.stride = stride
        self.sample = down_sampler(in_chans, stride, mode)
        self.conv_project = nn.Conv2d(in_chans, embed_dim, 1)
        self.ln = TokenNorm(embed_dim)

    def forward(self, maps: Tensor, tokens: Tensor) -> Tensor:
        """Summarise each square of maps (B, C, H, W); the class token of tokens comes along.

        Returns (B, N, E), to be added to the tokens: the class token, and a row for each patch.
        """
        _require_maps(maps, self.conv_project.in_channels)
        require_tokens(tokens, self.conv_project.out_channels)
        _require_grid(maps, tokens, self.stride)
        patches = self.conv_project(self.sample(maps))  # (B, E, H / s, W / s)
        patches = F.gelu(self.ln(rearrange(patches, "b e g h -> b (g h) e")))
        return torch.cat([tokens[:, :1], patches], dim=1)  # (B, N, E)


class FCUUp(nn.Module):
    """Turn tokens into an extra map for a `ConvBlock` (Conformer paper, section 3.2)."""

    def __init__(self, embed_dim: int, out_chans: int, stride: int, mode: str = "nearest") -> None:
        super().__init__()
        _require_sizes(out_chans, embed_dim, stride, mode, UP_MODES)
        self.stride, self.mode = stride, mode
        self.conv_project = nn.Conv2d(embed_dim, out_chans, 1)
        self.bn = nn.BatchNorm2d(out_chans, eps=1e-6)

    def forward(self, tokens: Tensor, maps: Tensor) -> Tensor:
        """Spread each patch of tokens (B, N, E) over its square of maps (B, ., H, W).

        Of the maps only H and W are read. Returns (B, out_chans, H, W).
        """
        require_tokens(tokens, self.conv_project.in_channels)
        _require_grid(maps, tokens, self.stride)
        rows = maps.shape[-2] // self.stride
        patches = rearrange(tokens[:, 1:], "b (g h) e -> b e g h", g=rows)
        patches = self.bn(self.conv_project(patches)).relu()  # (B, out_chans, H / s, W / s)
        return F.interpolate(patches, scale_factor=self.stride, mode=self.mode)


class NoCoupling(nn.Module):
    """Stands where a Feature Coupling Unit is left out, in either direction: it adds nothing."""

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return zeros of the target's shape; the source is not looked at."""
        return target.new_zeros(()).expand_as(target)
