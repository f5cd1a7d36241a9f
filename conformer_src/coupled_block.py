"""The coupled block: two bottlenecks, one transformer block, and the coupling between them.

The letters are those of the book: B batch, C, H and W a map, N tokens, E embedding width. A block
is put together from finished parts, so that each part can be looked at, counted or exchanged alone;
each part checks what it is given. A block maps `(maps, tokens)` to `Features(maps, tokens)`.
"""

from typing import NamedTuple

from torch import Tensor, nn

from conformer_src.attention import TransformerBlock
from conformer_src.conv_block import ConvBlock
from conformer_src.fcu import FCUDown, FCUUp


class Features(NamedTuple):
    """What the two branches hold after a block."""

    maps: Tensor  # (B, C, H, W), the CNN branch
    tokens: Tensor  # (B, N, E), the transformer branch; row 0 is the class token


class MedConvBlock(ConvBlock):
    """A further bottleneck between the two of a block; no published variant has one."""

    def __init__(self, chans: int) -> None:
        super().__init__(chans, chans)

    def forward(self, maps: Tensor) -> Tensor:
        """Refine the maps without a word to the other branch: (B, C, H, W) -> (B, C, H, W)."""
        return super().forward(maps).maps


class FirstBlock(nn.Module):
    """Block 1: the branches part, and nothing crosses yet (Conformer paper, section 3.1)."""

    def __init__(self, conv_block: ConvBlock, trans_block: TransformerBlock) -> None:
        super().__init__()
        self.conv_block, self.trans_block = conv_block, trans_block

    def forward(self, maps: Tensor, tokens: Tensor) -> Features:
        """Map (B, C, H, W) and (B, N, E), each on its own."""
        return Features(self.conv_block(maps).maps, self.trans_block(tokens))


class ConvTransBlock(nn.Module):
    """Blocks 2 to d: convolve, couple down, attend, couple up, convolve (paper, section 3.1)."""

    def __init__(
        self,
        conv_block: ConvBlock,
        down: FCUDown,
        trans_block: TransformerBlock,
        up: FCUUp,
        fusion_block: ConvBlock,
        num_med_block: int = 0,
    ) -> None:
        super().__init__()
        self.conv_block, self.down, self.trans_block = conv_block, down, trans_block
        self.up, self.fusion_block = up, fusion_block
        chans = fusion_block.conv1.in_channels
        self.med_block = nn.Sequential(*[MedConvBlock(chans) for _ in range(num_med_block)])

    def forward(self, maps: Tensor, tokens: Tensor) -> Features:
        """Map (B, C, H, W) and (B, N, E); the strides of the two bottlenecks shrink H and W."""
        maps, tap = self.conv_block(maps)
        tokens = self.trans_block(tokens + self.down(tap, tokens))  # the class token doubles here
        maps, _ = self.fusion_block(self.med_block(maps), self.up(tokens, tap))
        return Features(maps, tokens)
