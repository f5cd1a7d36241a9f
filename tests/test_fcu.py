"""Chapter 4's module: the Feature Coupling Units, down and up."""

import ast
import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from goldens import GOLDENS, with_digest
from torch import nn

from conformer_src.checks import golden
from conformer_src.conformer import Conformer, ConformerConfig
from conformer_src.conv_block import count_macs, count_parameters
from conformer_src.fcu import DOWN_MODES, UP_MODES, FCUDown, FCUUp, NoCoupling, down_sampler
from conformer_src.weights import official_name

ROOT = Path(__file__).resolve().parents[1]
COUPLED = with_digest("conv_trans_2.squeeze")
STRIDES = (1, 2, 4, 8)


def pair(stride=4, grid=(2, 3), batch=2, chans=6, embed_dim=10, dtype=torch.float64):
    """Return maps and tokens of one grid, which is not square unless asked."""
    maps = torch.randn(batch, chans, grid[0] * stride, grid[1] * stride, dtype=dtype)
    return maps, torch.randn(batch, 1 + grid[0] * grid[1], embed_dim, dtype=dtype)


def scramble(unit):
    """Give a unit random weights, and its BatchNorm running statistics, that are no identity."""
    for tensor in (*unit.parameters(), *unit.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return unit


def test_four_tokens_by_hand():
    maps = torch.tensor([[[[1.0, 3, 0, 0, 2, 0], [5, 7, 0, 0, 4, 2]]]], dtype=torch.float64)
    tokens = torch.tensor([[[1.0, 2], [2, -1], [1, 2], [4, 1]]], dtype=torch.float64)
    down, up = FCUDown(1, 2, 2).double(), FCUUp(2, 1, 2).double()
    with torch.no_grad():
        down.conv_project.weight.copy_(torch.tensor([1.0, 0]).view(2, 1, 1, 1))
        down.conv_project.bias.copy_(torch.tensor([0.0, 2]))
        up.conv_project.weight.fill_(1)
        up.conv_project.bias.zero_()
    high, low = 0.8413447, -0.1586553  # GELU of 1 and of -1
    expected = torch.tensor([[[1.0, 2], [high, low], [low, high], [0, 0]]], dtype=torch.float64)
    torch.testing.assert_close(down(maps, tokens), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close((tokens + down(maps, tokens))[0, 0], 2 * tokens[0, 0])
    row = torch.tensor([0, 0, 0, 0, 1.5**0.5, 1.5**0.5], dtype=torch.float64)
    torch.testing.assert_close(up(tokens, maps), row.expand(1, 1, 2, 6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stride", STRIDES)
def test_down_equals_torch_in_the_papers_order(stride):
    unit = scramble(FCUDown(6, 10, stride).double())
    maps, tokens = pair(stride)
    patches = F.avg_pool2d(unit.conv_project(maps), stride).flatten(2).mT
    patches = F.gelu(F.layer_norm(patches, [10], unit.ln.weight, unit.ln.bias, eps=1e-6))
    result = unit(maps, tokens)
    torch.testing.assert_close(result[:, 1:], patches, rtol=1e-12, atol=1e-12)
    assert torch.equal(result[:, 0], tokens[:, 0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride", STRIDES)
def test_up_equals_torch_in_the_figures_order(stride, training):
    unit = scramble(FCUUp(10, 6, stride).double()).train(training)
    maps, tokens = pair(stride)
    before = copy.deepcopy(unit.bn)
    result = unit(tokens, maps)
    spread = rearrange(tokens[:, 1:], "b (g h) e -> b e g h", g=2, h=3)
    spread = spread.repeat_interleave(stride, 2).repeat_interleave(stride, 3)
    expected = before(unit.conv_project(spread)).relu()
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(unit.bn.running_mean, before.running_mean)
    same = torch.allclose(unit.bn.running_var, before.running_var, rtol=1e-9)
    assert same is (not training or stride == 1)  # the n - 1 of the running variance


def test_up_fills_the_square_of_each_token_and_of_no_other():
    unit = scramble(FCUUp(10, 6, 4).double()).eval()
    maps, tokens = pair()
    for row in range(2):
        for column in range(3):
            changed = tokens.clone()
            changed[:, 1 + 3 * row + column] += 3
            moved = (unit(changed, maps) != unit(tokens, maps)).any(1)
            square = torch.zeros(2, 8, 12, dtype=torch.bool)
            square[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = True
            assert torch.equal(moved, square)
    changed = tokens.clone()
    changed[:, 0] += 3  # the class token does not go up
    torch.testing.assert_close(unit(changed, maps), unit(tokens, maps), rtol=0, atol=0)


@pytest.mark.parametrize("mode", DOWN_MODES)
def test_down_reads_the_square_of_each_token(mode):
    unit = FCUDown(6, 10, 4, mode).double()
    maps, tokens = pair()
    for row in range(2):
        for column in range(3):
            changed = maps.clone()
            changed[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 3 * torch.rand(6)[
                :, None, None
            ].to(maps)
            moved = (unit(changed, tokens) != unit(maps, tokens)).any(-1)[0].nonzero().flatten()
            assert moved.tolist() == [1 + 3 * row + column]


@pytest.mark.parametrize("mode", DOWN_MODES)
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_every_way_to_shrink_has_its_shape_and_its_own_parameters(mode, stride):
    maps, tokens = pair(stride)
    unit = FCUDown(6, 10, stride, mode).double()
    assert unit.sample(maps).shape == (2, 6, 2, 3)
    assert unit(maps, tokens).shape == tokens.shape
    extra = 6 * (6 * stride**2 + 1) if mode == "conv" and stride > 1 else 0
    assert count_parameters(unit) == 6 * 10 + 3 * 10 + extra


@pytest.mark.parametrize("mode", DOWN_MODES)
def test_no_way_to_shrink_acts_at_stride_1(mode):
    maps, _ = pair(1)
    assert torch.equal(down_sampler(6, 1, mode)(maps), maps)


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_area_averages_at_every_factor_and_bilinear_at_2_only(factor):
    maps = torch.rand(1, 2, 48, 24, dtype=torch.float64)
    average = F.avg_pool2d(maps, factor)
    torch.testing.assert_close(down_sampler(2, factor)(maps), average)
    area = F.interpolate(maps, scale_factor=1 / factor, mode="area")
    torch.testing.assert_close(area, average)
    equal = {
        mode: torch.allclose(down_sampler(2, factor, mode)(maps), average)
        for mode in ("nearest", "bilinear", "bicubic", "max")
    }
    assert equal == {"nearest": False, "bilinear": factor == 2, "bicubic": False, "max": False}


def test_what_nearest_and_bilinear_read():
    maps = torch.rand(1, 1, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(down_sampler(1, 4, "nearest")(maps), maps[:, :, ::4, ::4])
    centres = F.avg_pool2d(rearrange(maps, "b c (g s) w -> b c g s w", s=4)[0, 0, :, 1:3], (2, 1))
    centres = F.avg_pool2d(rearrange(centres[:, 0], "g (h t) -> g h t", t=4)[..., 1:3], (1, 2))
    bilinear = down_sampler(1, 4, "bilinear")(maps)[0, 0]
    torch.testing.assert_close(bilinear, centres[..., 0])


@pytest.mark.parametrize("mode", ["average", "max", "nearest", "bilinear", "bicubic"])
def test_every_weighted_sum_commutes_with_the_projection_but_not_the_maximum(mode):
    conv, (maps, _) = nn.Conv2d(6, 10, 1).double(), pair()
    before = conv(down_sampler(6, 4, mode)(maps))
    after = down_sampler(10, 4, mode)(conv(maps))
    assert torch.allclose(before, after, rtol=1e-10) is (mode != "max")


def test_bilinear_up_sampling_is_another_function_of_the_same_weights():
    maps, tokens = pair()
    nearest, bilinear = (scramble(FCUUp(10, 6, 4, mode).double()).eval() for mode in UP_MODES)
    bilinear.load_state_dict(nearest.state_dict())
    assert bilinear(tokens, maps).shape == nearest(tokens, maps).shape
    assert not torch.allclose(bilinear(tokens, maps), nearest(tokens, maps))


def test_pooling_first_costs_a_sixteenth():
    maps, tokens = torch.zeros(1, 64, 56, 56), torch.zeros(1, 197, 384)
    assert count_macs(FCUDown(64, 384, 4), maps, tokens) == 14**2 * 64 * 384
    assert count_macs(nn.Conv2d(64, 384, 1), maps) == 16 * 14**2 * 64 * 384
    assert count_macs(FCUUp(384, 64, 4).eval(), tokens, maps) == 14**2 * 64 * 384


@pytest.mark.parametrize(("chans", "embed_dim"), [(16, 384), (64, 384), (96, 576)])
def test_parameters_follow_the_formulas(chans, embed_dim):
    assert count_parameters(FCUDown(chans, embed_dim, 4)) == chans * embed_dim + 3 * embed_dim
    assert count_parameters(FCUUp(embed_dim, chans, 4)) == chans * embed_dim + 3 * chans
    assert count_parameters(NoCoupling()) == 0


def test_eps_is_that_of_the_authors():
    assert FCUDown(6, 10, 4).ln.eps == 1e-6
    assert FCUUp(10, 6, 4).bn.eps == 1e-6


def test_names_and_shapes_are_those_of_the_checkpoints():
    manifest = json.loads((ROOT / "tests/golden/manifests/small_p16.json").read_text())
    shapes = manifest.get("tensors", manifest)
    units = {"squeeze_block": FCUDown(64, 384, 4), "expand_block": FCUUp(384, 64, 4)}
    for block, unit in units.items():
        start = f"conv_trans_2.{block}."
        recorded = {key.removeprefix(start) for key in shapes if key.startswith(start)}
        state = unit.state_dict()
        assert set(state) == recorded
        for name, tensor in state.items():
            assert list(tensor.shape) == shapes[start + name], name


@pytest.mark.parametrize("name", COUPLED)
def test_both_ways_agree_with_the_authors_in_every_block(name):
    data = GOLDENS[name]
    known = set(ConformerConfig.__dataclass_fields__)
    config = {key: value for key, value in data["model"].items() if key in known}
    padded = "stem_padded" in data["digests"]
    model = golden.fill_(Conformer(ConformerConfig(**config, pad=padded)).double(), official_name)
    model.train(data["mode"] == "train")
    errors = []
    for number, block in enumerate(model.blocks[1:], 2):
        for way, unit in (("squeeze", block.down), ("expand", block.up)):

            def compare(_, __, out, key=f"conv_trans_{number}.{way}"):
                if key.endswith("squeeze"):
                    out = out[:, 1:]
                if key in data["digests"]:
                    errors.append(golden.check(out, data["digests"][key], rtol=1e-9, name=key))

            unit.register_forward_hook(compare)
    with torch.no_grad():
        model(golden.image(**data["input"]).double())
    recorded = [key for key in data["digests"] if key.endswith((".squeeze", ".expand"))]
    assert len(errors) == len(recorded) > 0
    print(f"{name}: {len(errors)} digests, largest deviation {max(errors):.1e} of the rms")


def test_goldens_of_the_coupling_are_found():
    assert {"reduced", "reduced_p32", "padded_reduced"} <= set(COUPLED)


def test_chapter_shows_the_recorded_digests():
    notebook = json.loads((ROOT / "chapters/04_fcu.ipynb").read_text())
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    (source,) = [text for text in sources if text.startswith("expected = {")]
    shown = ast.literal_eval(source.partition("\n}")[0].removeprefix("expected = ") + "\n}")
    assert set(shown) == {"squeeze", "expand"}
    for way, digest in shown.items():
        recorded = GOLDENS["reduced"]["digests"][f"conv_trans_2.{way}"]
        assert digest == recorded | {"head": recorded["head"][:3]}


@pytest.mark.parametrize("mode", DOWN_MODES)
def test_gradients_reach_what_goes_down(mode):
    unit = FCUDown(6, 10, 4, mode).double()
    maps, tokens = (tensor.requires_grad_() for tensor in pair())
    (unit(maps, tokens) * torch.randn_like(tokens)).sum().backward()
    for name, parameter in unit.named_parameters():
        assert parameter.grad.abs().max() > 1e-4, name
    assert maps.grad.abs().max() > 1e-4
    assert tokens.grad[:, 0].abs().max() > 1e-4  # through the copy
    assert (tokens.grad[:, 1:] == 0).all()


@pytest.mark.parametrize("mode", UP_MODES)
def test_gradients_reach_what_goes_up_but_not_the_bias_before_the_norm(mode):
    unit = FCUUp(10, 6, 4, mode).double()
    maps, tokens = (tensor.requires_grad_() for tensor in pair())
    (unit(tokens, maps) * torch.randn_like(maps)).sum().backward()
    for name, parameter in unit.named_parameters():
        reached = parameter.grad.abs().max().item() > 1e-4
        assert reached is (name != "conv_project.bias"), name
    assert unit.conv_project.bias.grad.abs().max() < 1e-10
    assert maps.grad is None
    assert (tokens.grad[:, 0] == 0).all()
    assert tokens.grad[:, 1:].abs().max() > 1e-4


def test_layer_norm_forgets_strength_and_company_batch_norm_forgets_neither():
    maps, tokens = pair()
    down, up = scramble(FCUDown(6, 10, 4).double()), scramble(FCUUp(10, 6, 4).double())
    nn.init.normal_(down.conv_project.weight)
    nn.init.zeros_(down.conv_project.bias)
    strong = maps.clone()
    strong[:, :, :4, :4] *= 10
    torch.testing.assert_close(down(strong, tokens), down(maps, tokens), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(down(maps[:1], tokens[:1]), down(maps, tokens)[:1])
    assert not torch.allclose(up(tokens[:1], maps[:1]), up(tokens, maps)[:1])
    up.eval()
    torch.testing.assert_close(up(tokens[:1], maps[:1]), up(tokens, maps)[:1])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_other_precisions_stay_near(dtype, bound):
    maps, tokens = pair()
    units = (FCUDown(6, 10, 4).double(), (maps, tokens)), (FCUUp(10, 6, 4).double(), (tokens, maps))
    for unit, inputs in units:
        unit.eval()
        expected = unit(*inputs)
        result = unit.to(dtype)(*(tensor.to(dtype) for tensor in inputs))
        assert result.dtype == dtype
        assert (result - expected).abs().max() < bound * expected.abs().max()


def test_an_empty_batch_passes():
    maps, tokens = pair(batch=0)
    assert FCUDown(6, 10, 4).double()(maps, tokens).shape == tokens.shape
    assert FCUUp(10, 6, 4).double().eval()(tokens, maps).shape == maps.shape


def test_no_coupling_adds_nothing_and_looks_at_nothing():
    maps, tokens = pair()
    nothing = NoCoupling()
    assert torch.equal(tokens + nothing(maps, tokens), tokens)
    assert torch.equal(maps + nothing(tokens, maps), maps)
    assert nothing(torch.full_like(maps, float("nan")), tokens).abs().max() == 0


WRONG_GRIDS = {
    "no class token": ((2, 6, 8, 12), (2, 6, 10)),
    "too many tokens": ((2, 6, 8, 12), (2, 8, 10)),
    "height does not divide": ((2, 6, 9, 12), (2, 7, 10)),
    "width does not divide": ((2, 6, 8, 14), (2, 7, 10)),
    "the map of another stage": ((2, 6, 4, 6), (2, 7, 10)),
}


@pytest.mark.parametrize(("maps", "tokens"), WRONG_GRIDS.values(), ids=WRONG_GRIDS.keys())
def test_maps_and_tokens_of_two_grids_are_refused_in_one_sentence(maps, tokens):
    maps, tokens = torch.zeros(maps), torch.zeros(tokens)
    for unit, inputs in (
        (FCUDown(6, 10, 4), (maps, tokens)),
        (FCUUp(10, 6, 4), (tokens, maps)),
    ):
        with pytest.raises(ValueError, match=r"patch tokens do not cover maps of") as error:
            unit(*inputs)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "tokens",
    [torch.zeros(2, 7, 8), torch.zeros(7, 10), torch.zeros(2, 7, 10).long()],
    ids=["another width", "no batch", "whole numbers"],
)
def test_what_is_not_tokens_is_refused(tokens):
    maps = torch.zeros(2, 6, 8, 12)
    for unit, inputs in (
        (FCUDown(6, 10, 4), (maps, tokens)),
        (FCUUp(10, 6, 4), (tokens, maps)),
    ):
        with pytest.raises(ValueError, match=r"^tokens are torch\.\w+ of shape .*\(B, N, 10\)"):
            unit(*inputs)


@pytest.mark.parametrize("maps", [torch.zeros(2, 24, 8, 12), torch.zeros(6, 8, 12)])
def test_what_is_not_a_tap_is_refused(maps):
    with pytest.raises(ValueError, match=r"^maps are torch\.float32 of shape .*\(B, 6, H, W\)"):
        FCUDown(6, 10, 4)(maps, torch.zeros(2, 7, 10))


@pytest.mark.parametrize("unit", [FCUDown, FCUUp])
def test_what_cannot_be_built_is_refused(unit):
    for sizes in [(0, 10, 4), (6, 0, 4), (6, 10, 0), (6, 10, -1)]:
        with pytest.raises(ValueError, match="make no Feature Coupling Unit; choose at least 1"):
            unit(*sizes)
    with pytest.raises(ValueError, match=r"^mode 'area' does not exist; choose one of .*nearest"):
        unit(6, 10, 4, mode="area")


@pytest.mark.parametrize("unit", [FCUDown(8, 12, 4), FCUUp(12, 8, 4)])
def test_maps_and_tokens_of_different_batches_are_refused(unit):
    maps, tokens = torch.rand(2, 8, 16, 16), torch.rand(3, 17, 12)
    both = (maps, tokens) if isinstance(unit, FCUDown) else (tokens, maps)
    with pytest.raises(ValueError, match="same batch"):
        unit(*both)
