"""The transformer branch's block: attention, MLP, two residual sums.

The letters are those of the book: B batch, N tokens, E embedding width, h heads, d = E / h. The
arguments mean the same in each class:

- `embed_dim`: E.
- `num_heads`: h; must divide E.
- `mlp_ratio`: hidden width of the MLP over E.
- `qkv_bias`: whether the projection to queries, keys and values has a bias.
- `drop_rate`: dropout after the output projection, after the GELU and after the MLP.
- `attn_drop_rate`: dropout on the attention weights.
- `drop_path_rate`: probability that a sample skips a residual branch in training.

Tokens that are not floating-point numbers of shape (B, N, E), and heads that do not share E
evenly, raise `ValueError`. Attribute names are those of the authors' checkpoints.
"""

import math

import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn
from torchvision.ops import StochasticDepth


def scaled_dot_product(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mix the values by softmax(q k^T / sqrt(d)), written out (Vaswani et al. 2017, eq. 1).

    Args:
        queries: (..., N, d), one row for each token that looks.
        keys: (..., M, d), one row for each token that is looked at.
        values: (..., M, c), what such a token hands over.

    Returns:
        The mixed values (..., N, c), and the weights (..., N, M), of which each row sums to 1.
    """
    scores = einsum(queries, keys, "... n d, ... m d -> ... n m") / math.sqrt(queries.shape[-1])
    weights = scores.softmax(dim=-1)  # over the tokens looked at
    return einsum(weights, values, "... n m, ... m c -> ... n c"), weights


def attention_weights(attention: nn.Module, tokens: Tensor) -> Tensor:
    """Return the weights (B, h, N, N) with which an `Attention` mixes tokens (B, N, E).

    Entry [b, i, n, m] is how much of token m's value head i hands to token n.
    """
    return scaled_dot_product(*split_heads(attention.qkv(tokens), attention.num_heads))[1]


def require_tokens(tokens: Tensor, embed_dim: int) -> None:
    """Raise a `ValueError` unless tokens are floating-point numbers of shape (B, N, embed_dim)."""
    if tokens.ndim != 3 or tokens.shape[-1] != embed_dim or not tokens.is_floating_point():
        raise ValueError(
            f"tokens are {tokens.dtype} of shape {tuple(tokens.shape)}, but must be floating-point "
            f"(B, N, {embed_dim}), one row for each token; make them from a map (B, {embed_dim}, "
            "H, W) with rearrange(maps, 'b e h w -> b (h w) e')."
        )


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the qkv projection into queries, keys and values for each head.

    Args:
        qkv: (B, N, 3 E). The 3 E numbers lie as [3][heads][E / heads], as in the checkpoints.
        num_heads: h, a divisor of E.

    Returns:
        Queries, keys, values, each (B, h, N, E / h).
    """
    return rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=num_heads).unbind()


class Attention(nn.Module):
    """Multi-head self-attention (Conformer paper, section 3; Vaswani et al. 2017, 3.2.2)."""

    def __init__(self, embed_dim, num_heads, qkv_bias=True, attn_drop_rate=0.0, drop_rate=0.0):
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"{num_heads} heads cannot share embed_dim {embed_dim} evenly; "
                "choose num_heads that divides embed_dim."
            )
        self.num_heads, self.attn_drop_rate = num_heads, attn_drop_rate
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(drop_rate)

    def forward(self, tokens: Tensor) -> Tensor:
        """Let each token look at all: (B, N, E) -> (B, N, E)."""
        require_tokens(tokens, self.proj.in_features)
        queries, keys, values = split_heads(self.qkv(tokens), self.num_heads)  # (B, h, N, E / h)
        rate = self.attn_drop_rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(queries, keys, values, dropout_p=rate)
        return self.proj_drop(self.proj(rearrange(mixed, "b h n d -> b n (h d)")))


class TokenNorm(nn.LayerNorm):
    """LayerNorm over the E numbers of each token, eps 1e-6 as in the authors' blocks.

    `forward` takes and returns tokens (B, N, E) and raises `ValueError` for anything else.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__(embed_dim, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        """Give each token mean 0 and variance 1, then scale and shift: (B, N, E) -> (B, N, E)."""
        require_tokens(tokens, *self.normalized_shape)
        return super().forward(tokens)


class Mlp(nn.Module):
    """Two linear maps around a GELU, for each token on its own (Conformer paper, section 3)."""

    def __init__(self, embed_dim: int, hidden_dim: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.act = nn.GELU()  # the exact one, with erf; the tanh formula is another function
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, N, E) -> (B, N, hidden) -> (B, N, E)."""
        hidden = self.drop(self.act(self.fc1(tokens)))  # (B, N, hidden)
        return self.drop(self.fc2(hidden))


class TransformerBlock(nn.Module):
    """Pre-norm transformer block, attention and then MLP (Conformer paper, section 3)."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = TokenNorm(embed_dim)
        self.attn = Attention(embed_dim, num_heads, qkv_bias, attn_drop_rate, drop_rate)
        self.norm2 = TokenNorm(embed_dim)
        self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio), drop_rate)
        self.drop_path = StochasticDepth(drop_path_rate, mode="row")

    def forward(self, tokens: Tensor) -> Tensor:
        """Add what the tokens tell each other, then what each computes: (B, N, E) -> (B, N, E)."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))
