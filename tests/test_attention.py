"""Chapter 3's module: attention, its weights, the norm, the MLP and the block."""

import ast
import json
import math
from pathlib import Path

import pytest
import torch
from einops import rearrange
from goldens import GOLDENS, with_digest
from torch import nn

from conformer_src.attention import (
    Attention,
    Mlp,
    TokenNorm,
    TransformerBlock,
    attention_weights,
    require_tokens,
    scaled_dot_product,
    split_heads,
)
from conformer_src.checks import golden
from conformer_src.conv_block import Stem, count_macs, count_parameters

ROOT = Path(__file__).resolve().parents[1]
BLOCK_1 = with_digest("trans_1.cls")


def tokens_of(embed_dim=48, batch=2, count=17, dtype=torch.float64):
    return torch.randn(batch, count, embed_dim, dtype=dtype)


def test_four_tokens_by_hand():
    four = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0]], dtype=torch.float64)
    mixed, weights = scaled_dot_product(four, four, four)
    e = math.exp(1 / math.sqrt(2))
    expected = torch.tensor([e, 1, e, 1], dtype=torch.float64) / (2 * e + 2)
    torch.testing.assert_close(weights[0], expected)
    torch.testing.assert_close(
        mixed[0], torch.stack([expected[0] + expected[2], expected[1:3].sum()])
    )
    torch.testing.assert_close(mixed[3], four.mean(0))


def test_weights_are_shares_for_other_counts_of_keys_and_widths_of_values():
    queries, keys, values = (
        torch.randn(2, 3, 5, 8),
        torch.randn(2, 3, 7, 8),
        torch.randn(2, 3, 7, 4),
    )
    mixed, weights = scaled_dot_product(queries, keys, values)
    assert mixed.shape == (2, 3, 5, 4)
    assert weights.shape == (2, 3, 5, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))
    expected = nn.functional.scaled_dot_product_attention(queries, keys, values)
    torch.testing.assert_close(mixed, expected)


def test_heads_lie_as_three_then_heads_then_width():
    qkv = torch.arange(24.0).view(1, 1, 24)  # E 8, 2 heads of 4
    queries, keys, values = split_heads(qkv, 2)
    assert queries.shape == (1, 2, 1, 4)
    assert queries[0, 1, 0].tolist() == [4, 5, 6, 7]
    assert keys[0, 0, 0].tolist() == [8, 9, 10, 11]
    assert values[0, 1, 0].tolist() == [20, 21, 22, 23]


@pytest.mark.parametrize("bias", [True, False])
def test_attention_equals_torch_nn_with_copied_weights(bias):
    attention, tokens = Attention(48, 3, qkv_bias=bias).double(), tokens_of()
    reference = nn.MultiheadAttention(48, 3, batch_first=True).double()
    with torch.no_grad():
        reference.in_proj_weight.copy_(attention.qkv.weight)
        reference.in_proj_bias.copy_(attention.qkv.bias if bias else torch.zeros(144))
    reference.out_proj.load_state_dict(attention.proj.state_dict())
    expected, weights = reference(tokens, tokens, tokens, average_attn_weights=False)
    torch.testing.assert_close(attention(tokens), expected)
    torch.testing.assert_close(attention_weights(attention, tokens), weights)


def test_fused_attention_equals_the_formula_written_out():
    attention, tokens = Attention(48, 3).double(), tokens_of()
    mixed, _ = scaled_dot_product(*split_heads(attention.qkv(tokens), 3))
    expected = attention.proj(rearrange(mixed, "b h n d -> b n (h d)"))
    torch.testing.assert_close(attention(tokens), expected)


def test_block_equals_torch_nn_with_copied_weights():
    block, tokens = TransformerBlock(48, 3).double(), tokens_of()
    reference = nn.TransformerEncoderLayer(
        48, 3, 192, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
    ).double()
    parts = [
        (reference.self_attn.out_proj, block.attn.proj),
        (reference.linear1, block.mlp.fc1),
        (reference.linear2, block.mlp.fc2),
        (reference.norm1, block.norm1),
        (reference.norm2, block.norm2),
    ]
    for theirs, ours in parts:
        theirs.load_state_dict(ours.state_dict())
        nn.init.normal_(theirs.bias)  # else a missing bias would go unseen in the norms
        ours.bias.data.copy_(theirs.bias)
    reference.self_attn.in_proj_weight.data.copy_(block.attn.qkv.weight)
    reference.self_attn.in_proj_bias.data.copy_(block.attn.qkv.bias)
    torch.testing.assert_close(block(tokens), reference(tokens))


def test_block_commutes_with_a_shuffle_and_does_not_mix_samples():
    block, tokens = TransformerBlock(48, 3).double(), tokens_of()
    order = torch.randperm(17)
    torch.testing.assert_close(block(tokens[:, order]), block(tokens)[:, order])
    torch.testing.assert_close(block(tokens[1:]), block(tokens)[1:])


def test_norm_by_hand_and_its_eps():
    norm = TokenNorm(2).double()
    token = torch.tensor([[[1.0, 3.0]]], dtype=torch.float64)
    expected = torch.tensor([-1.0, 1.0], dtype=torch.float64) / math.sqrt(1 + 1e-6)
    torch.testing.assert_close(norm(token)[0, 0], expected, rtol=1e-12, atol=0)


def test_mlp_uses_the_exact_gelu():
    mlp, tokens = Mlp(4, 8).double(), tokens_of(4)
    hidden = mlp.fc1(tokens)
    expected = mlp.fc2(hidden / 2 * (1 + torch.erf(hidden / math.sqrt(2))))
    torch.testing.assert_close(mlp(tokens), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", BLOCK_1)
def test_block_1_agrees_with_the_authors(name):
    data = GOLDENS[name]
    model, digests = data["model"], data["digests"]
    width, patch = model["embed_dim"], model["patch_size"] // 4
    training = data["mode"] == "train"  # BatchNorm in the stem then uses the batch
    stem = golden.fill_(Stem(model["in_chans"]).double().train(training))
    parts = {
        "trans_patch_conv": nn.Conv2d(64, width, patch, stride=patch),
        "trans_1": TransformerBlock(
            width, model["num_heads"], model["mlp_ratio"], model["qkv_bias"]
        ),
    }
    parts = golden.fill_(nn.ModuleDict(parts).double().eval())
    with torch.no_grad():
        maps = stem(golden.image(**data["input"]).double())
        if "stem_padded" in digests:  # zeros at the right and the bottom, up to whole patches
            height, width_ = maps.shape[-2:]
            maps = nn.functional.pad(maps, (0, -width_ % patch, 0, -height % patch))
        patches = rearrange(parts["trans_patch_conv"](maps), "b e h w -> b (h w) e")
        class_token = golden.values("cls_token", (1, 1, width)).double()
        tokens = torch.cat([class_token.expand(len(patches), 1, width), patches], dim=1)
        result = parts["trans_1"](tokens)
    found = {"patch_embed": patches, "trans_1.patches": result[:, 1:], "trans_1.cls": result[:, 0]}
    errors = [golden.check(t, digests[key], rtol=1e-9, name=key) for key, t in found.items()]
    print(f"{name}: largest deviation {max(errors):.1e} of the rms")


def test_goldens_of_block_1_are_found():
    assert len(BLOCK_1) >= 6


def test_chapter_shows_the_recorded_digest():
    notebook = json.loads((ROOT / "chapters/03_attention.ipynb").read_text())
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    (source,) = [text for text in sources if text.startswith("expected = {")]
    shown = ast.literal_eval(source.partition("\n}")[0].removeprefix("expected = ") + "\n}")
    recorded = GOLDENS["reduced"]["digests"]["trans_1.patches"]
    assert shown.pop("head") == recorded["head"][:3]
    assert shown == {key: value for key, value in recorded.items() if key != "head"}


@pytest.mark.parametrize(("embed_dim", "num_heads"), [(48, 3), (384, 6), (576, 9)])
def test_parameters_follow_the_formula(embed_dim, num_heads):
    block = TransformerBlock(embed_dim, num_heads)
    count = count_parameters(block)
    assert count == 12 * embed_dim**2 + 13 * embed_dim
    bare = TransformerBlock(embed_dim, num_heads, qkv_bias=False)
    assert count - count_parameters(bare) == 3 * embed_dim


def test_names_are_those_of_the_checkpoints():
    manifest = json.loads((ROOT / "tests/golden/manifests/tiny_p16.json").read_text())
    shapes = manifest.get("tensors", manifest)
    text = json.dumps(shapes)
    for name in TransformerBlock(384, 6).state_dict():
        assert f'"trans_1.{name}"' in text


@pytest.mark.parametrize("count", [50, 197])
def test_cost_follows_the_formula(count):
    block = TransformerBlock(384, 6).eval()
    macs = count_macs(block, torch.zeros(1, count, 384))
    assert macs == 12 * count * 384**2 + 2 * count**2 * 384


def test_gradients_reach_every_parameter_but_the_key_bias():
    block = TransformerBlock(48, 3).double()
    block(tokens_of()).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name
    query, key, value = block.attn.qkv.bias.grad.chunk(3)
    assert key.abs().max() < 1e-10 < min(query.abs().max(), value.abs().max())


def test_drop_path_skips_whole_samples_and_keeps_the_mean():
    block = TransformerBlock(8, 2, drop_path_rate=0.5).double()
    tokens = tokens_of(8, count=3)[:1].expand(600, 3, 8)
    change = block(tokens) - tokens
    assert len(change.flatten(1).round(decimals=6).unique(dim=0)) == 4  # two branches, on or off
    untouched = (change == 0).flatten(1).all(1).float().mean()
    assert 0.15 < untouched < 0.35
    block.eval()
    torch.testing.assert_close(block(tokens), TransformerBlock.forward(block, tokens))
    assert (block(tokens) == block(tokens[:1])).flatten(1).any(1).all()


@pytest.mark.parametrize("rates", [{"drop_rate": 0.5}, {"attn_drop_rate": 0.5}])
def test_dropout_acts_in_training_only(rates):
    block, tokens = TransformerBlock(8, 2, **rates).double(), tokens_of(8)
    assert not torch.allclose(block(tokens), block(tokens))
    torch.testing.assert_close(block.eval()(tokens), block(tokens))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_other_precisions_stay_near(dtype, bound):
    block, tokens = TransformerBlock(48, 3).double(), tokens_of()
    expected = block(tokens)
    result = block.to(dtype)(tokens.to(dtype))
    assert result.dtype == dtype
    assert (result - expected).abs().max() < bound * expected.abs().max()


def test_any_number_of_tokens_and_an_empty_batch():
    block = TransformerBlock(48, 3)
    for shape in [(1, 1, 48), (3, 50, 48), (0, 17, 48)]:
        assert block(torch.randn(shape)).shape == shape


@pytest.mark.parametrize(
    "tokens",
    [
        torch.zeros(2, 48, 4, 4),
        torch.zeros(17, 48),
        torch.zeros(2, 17, 40),
        torch.zeros(1, 17, 48).long(),
    ],
    ids=["a map", "no batch", "another width", "whole numbers"],
)
@pytest.mark.parametrize(
    "take",
    [TransformerBlock(48, 3), Attention(48, 3), TokenNorm(48), lambda t: require_tokens(t, 48)],
    ids=["block", "attention", "norm", "function"],
)
def test_what_is_not_tokens_is_refused_in_one_sentence(take, tokens):
    with pytest.raises(
        ValueError, match=r"^tokens are torch\.\w+ of shape .* \(B, N, 48\).*rearrange"
    ) as error:
        take(tokens)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("heads", [5, 0, -3])
def test_heads_that_cannot_share_the_width_are_refused(heads):
    with pytest.raises(ValueError, match=f"^{heads} heads cannot share embed_dim 48 evenly"):
        TransformerBlock(48, heads)
