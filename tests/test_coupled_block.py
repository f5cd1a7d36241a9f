"""Chapter 5's module: block 1, the med block and the coupled block."""

import ast
import copy
import json
from pathlib import Path

import pytest
import torch
from goldens import GOLDENS, with_digest
from torch import nn

from conformer_src.attention import TransformerBlock
from conformer_src.checks import golden
from conformer_src.conformer import Conformer, ConformerConfig
from conformer_src.conv_block import ConvBlock, ConvBlockOutput, count_macs, count_parameters
from conformer_src.coupled_block import ConvTransBlock, Features, FirstBlock, MedConvBlock
from conformer_src.fcu import FCUDown, FCUUp, NoCoupling
from conformer_src.weights import official_name

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = with_digest("conv_trans_2.conv")


def assemble(chans=64, width=64, stride=4, embed_dim=48, heads=3, last=False, med=0):
    begins = chans != width
    return ConvTransBlock(
        ConvBlock(chans, width, 1 + begins, project_shortcut=begins),
        FCUDown(width // 4, embed_dim, stride),
        TransformerBlock(embed_dim, heads),
        FCUUp(embed_dim, width // 4, stride),
        ConvBlock(width, width, 1 + last, project_shortcut=last),
        med,
    )


def features_of(chans=64, side=16, embed_dim=48, patches=16, batch=2):
    maps = torch.rand(batch, chans, side, side, dtype=torch.float64)
    return Features(maps, torch.randn(batch, 1 + patches, embed_dim, dtype=torch.float64))


class Part(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def test_block_by_hand():
    fusion = Part(lambda maps, extra: ConvBlockOutput(maps + extra, extra))
    fusion.conv1 = nn.Conv2d(1, 1, 1)
    block = ConvTransBlock(
        Part(lambda maps: ConvBlockOutput(2 * maps, maps)),
        Part(lambda tap, tokens: torch.cat([tokens[:, :1], tap.mean((2, 3))[..., None]], dim=1)),
        Part(lambda tokens: tokens + tokens.mean(1, keepdim=True)),
        Part(lambda tokens, tap: tokens[:, 1:, :, None].expand_as(tap)),
        fusion,
    )
    maps = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]])
    result = block(maps, torch.tensor([[[10.0], [2.0]]]))
    assert isinstance(result, Features)
    assert result.maps.flatten().tolist() == [21, 25, 29, 33]
    assert result.tokens.flatten().tolist() == [33, 19]


def test_block_equals_its_six_steps():
    block, (maps, tokens) = assemble(med=2).double().eval(), features_of()
    wide, tap = block.conv_block(maps)
    new = block.trans_block(tokens + block.down(tap, tokens))
    for med in block.med_block:
        wide = med(wide)
    expected = block.fusion_block(wide, block.up(new, tap)).maps
    result = block(maps, tokens)
    assert torch.equal(result.maps, expected)
    assert torch.equal(result.tokens, new)


def test_parts_run_in_the_order_of_the_drawing():
    block, order = assemble(med=1), []
    for name, part in block.named_children():
        part.register_forward_hook(lambda *_, name=name: order.append(name))
    block.double()(*features_of())
    order.remove("med_block")
    assert order == ["conv_block", "down", "trans_block", "up", "fusion_block"]


def test_class_token_enters_doubled_and_patches_do_not():
    block, (maps, tokens) = assemble().double().eval(), features_of()
    block.trans_block = nn.Identity()
    result = block(maps, tokens).tokens
    assert torch.equal(result[:, 0], 2 * tokens[:, 0])
    tap = block.conv_block(maps).tap
    torch.testing.assert_close(
        result[:, 1:] - tokens[:, 1:], block.down(tap, tokens)[:, 1:], rtol=1e-12, atol=1e-12
    )


def test_first_block_lets_nothing_cross():
    first = FirstBlock(ConvBlock(64, 64, project_shortcut=True), TransformerBlock(48, 3))
    maps, tokens = features_of()
    first.double().eval()
    result = first(maps, tokens)
    assert torch.equal(first(maps + 1, tokens).tokens, result.tokens)
    assert torch.equal(first(maps, tokens + 1).maps, result.maps)
    assert torch.equal(result.maps, first.conv_block(maps).maps)
    assert torch.equal(result.tokens, first.trans_block(tokens))


@pytest.mark.parametrize(
    ("chans", "width", "stride", "side", "last", "tap", "out"),
    [
        (256, 256, 4, 56, False, (64, 56, 56), (256, 56, 56)),
        (256, 512, 2, 56, False, (128, 28, 28), (512, 28, 28)),
        (512, 1024, 1, 28, False, (256, 14, 14), (1024, 14, 14)),
        (1024, 1024, 1, 14, True, (256, 14, 14), (1024, 7, 7)),
    ],
    ids=["block 2", "block 5", "block 9", "block 12"],
)
def test_strides_of_conformer_s(chans, width, stride, side, last, tap, out):
    with torch.device("meta"):
        block = assemble(chans, width, stride, 384, 6, last)
        maps, tokens = torch.empty(1, chans, side, side), torch.empty(1, 197, 384)
    seen = {}
    for name, part in block.named_children():
        part.register_forward_hook(lambda _, i, o, name=name: seen.update({name: (i, o)}))
    result = block(maps, tokens)
    assert result.maps.shape[1:] == out
    assert result.tokens.shape == tokens.shape
    assert seen["conv_block"][1].tap.shape[1:] == tap
    assert seen["up"][1].shape[1:] == tap  # before the last stride


@pytest.mark.parametrize("coupled", [True, False])
def test_coupling_reaches_every_place_and_bottlenecks_two_places_far(coupled):
    for med in (0, 1):
        block, (maps, tokens) = assemble(med=med).double().eval(), features_of(batch=1)
        if not coupled:
            block.down, block.up = NoCoupling(), NoCoupling()
        touched = maps.clone()
        touched[:, :, 7, 7] += 1
        change = (block(touched, tokens).maps - block(maps, tokens).maps).abs().amax((0, 1)) > 0
        assert change.sum() == (256 if coupled else (2 * (2 + med) + 1) ** 2)


@pytest.mark.parametrize("silenced", [["up"], ["down"]])
def test_one_direction_alone_brings_nothing_back(silenced):
    block, (maps, tokens) = assemble().double().eval(), features_of(batch=1)
    for name in silenced:
        setattr(block, name, NoCoupling())
    touched = maps.clone()
    touched[:, :, 7, 7] += 1
    change = (block(touched, tokens).maps - block(maps, tokens).maps).abs().amax((0, 1)) > 0
    assert change.sum() == 25


def test_without_down_the_class_token_is_not_doubled():
    block, (maps, tokens) = assemble().double().eval(), features_of()
    block.down, block.trans_block = NoCoupling(), nn.Identity()
    assert torch.equal(block(maps, tokens).tokens, tokens)


def test_med_block_is_a_bottleneck_that_only_the_maps_hear():
    med, plain = MedConvBlock(64).double().eval(), ConvBlock(64, 64).double().eval()
    plain.load_state_dict(med.state_dict())
    maps, tokens = features_of()
    assert torch.equal(med(maps), plain(maps).maps)
    without, one = assemble().double().eval(), assemble(med=1).double().eval()
    missing, unexpected = one.load_state_dict(without.state_dict(), strict=False)
    assert not unexpected
    assert {name.split(".")[0] for name in missing} == {"med_block"}
    assert torch.equal(one(maps, tokens).tokens, without(maps, tokens).tokens)
    assert not torch.allclose(one(maps, tokens).maps, without(maps, tokens).maps)


# The authors' numbers


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_agree_with_the_authors(name):
    data = GOLDENS[name]
    fields = {key: value for key, value in data["model"].items() if key != "base_channel"}
    config = ConformerConfig(**fields, pad="stem_padded" in data["digests"])
    model = golden.fill_(Conformer(config).double(), official_name)
    model.train(data["mode"] == "train")
    with torch.no_grad():
        outputs = model.forward_blocks(golden.image(**data["input"]).double())
    errors = []
    for number, (maps, tokens) in enumerate(outputs[1:], 2):
        found = {"conv": maps, "patches": tokens[:, 1:], "cls": tokens[:, 0]}
        for key, tensor in found.items():
            key = f"conv_trans_{number}.{key}"
            errors.append(golden.check(tensor, data["digests"][key], rtol=1e-9, name=key))
    assert len(errors) == 3 * (config.depth - 1)
    print(f"{name}: largest deviation {max(errors):.1e} of the rms")


def test_goldens_of_the_blocks_are_found_with_and_without_med_blocks():
    assert {"reduced", "reduced_med1", "tiny_p16_224", "small_p32_224"} <= set(BLOCKS)
    digests = [GOLDENS[name]["digests"] for name in ("reduced", "reduced_med1")]
    for key in ("patches", "cls"):  # the authors' code agrees: block 2's tokens do not notice
        assert digests[0][f"conv_trans_2.{key}"] == digests[1][f"conv_trans_2.{key}"]
    assert digests[0]["conv_trans_2.conv"] != digests[1]["conv_trans_2.conv"]


def test_tap_before_the_3x3_does_not_agree_with_the_authors():
    data = GOLDENS["reduced"]
    fields = {key: value for key, value in data["model"].items() if key != "base_channel"}
    model = golden.fill_(Conformer(ConformerConfig(**fields)).double().eval(), official_name)
    maps, tokens = model.forward_blocks(golden.image(**data["input"]).double())[0]
    block, digest = model.blocks[1], data["digests"]["conv_trans_2.squeeze"]
    early = block.conv_block.bn1(block.conv_block.conv1(maps)).relu()
    for tap, agrees in ((block.conv_block(maps).tap, True), (early, False)):
        found = golden.deviation(block.down(tap, tokens)[:, 1:], digest)
        assert found < 1e-9 if agrees else found > 1e-2


def test_chapter_shows_the_recorded_digests():
    notebook = json.loads((ROOT / "chapters/05_coupled_block.ipynb").read_text())
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    (source,) = [text for text in sources if text.startswith("expected = {")]
    shown = ast.literal_eval(source.partition("\n}")[0].removeprefix("expected = ") + "\n}")
    for label, name in (("no med block", "reduced"), ("one med block", "reduced_med1")):
        recorded = GOLDENS[name]["digests"]["conv_trans_2.conv"]
        digest = shown.pop(label)
        head = digest.pop("head")
        assert head == recorded["head"][: len(head)] != []
        assert digest == {key: value for key, value in recorded.items() if key != "head"}
    assert not shown


# Sizes and costs


def bottleneck(chans, width, projected):
    inner = width // 4
    weights = chans * inner + 9 * inner**2 + inner * width + 4 * inner + 2 * width
    return weights + projected * (chans * width + 2 * width)


@pytest.mark.parametrize(
    ("ratio", "embed_dim", "counts"),
    [
        (1, 384, [1797040, 1842272, 1835872, 1990848, 1965760, 2031808]),
        (4, 384, [1965760, 2533760, 2434432, 4602624, 4207360, 5257984]),
        (6, 576, [4417056, 5692992, 5470272, 10344576, 9456768, 11819136]),
    ],
    ids=["tiny", "small", "base"],
)
def test_parameters_follow_the_formula_and_the_checkpoints(ratio, embed_dim, counts):
    kinds = [(64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256)]
    for index, (chans, width) in enumerate(kinds):
        chans, width, last = ratio * chans, ratio * width, index == 5
        block = assemble(chans, width, 1, embed_dim, embed_dim // 64, last)
        inner = width // 4
        expected = bottleneck(chans, width, chans != width) + bottleneck(width, width, last)
        expected += 12 * embed_dim**2 + 13 * embed_dim  # transformer block
        expected += 2 * inner * embed_dim + 3 * embed_dim + 3 * inner  # down and up
        assert count_parameters(block) == expected == counts[index]


def test_names_are_those_of_the_checkpoints():
    manifest = json.loads((ROOT / "tests/golden/manifests/tiny_p16.json").read_text())
    text = json.dumps(manifest.get("tensors", manifest))
    for name in assemble(64, 64, 4, 384, 6).state_dict():
        assert f'"{official_name(f"blocks.1.{name}")}"' in text


@pytest.mark.parametrize("ratio", [1, 4, 6])
def test_med_block_costs_the_same_macs_in_each_stage(ratio):
    found = set()
    for width, side in ((64, 56), (128, 28), (256, 14)):
        width *= ratio
        med = MedConvBlock(width)
        assert count_parameters(med) == bottleneck(width, width, False)
        found.add(count_macs(med, torch.zeros(1, width, side, side)))
    assert found == {56**2 * 17 * (64 * ratio) ** 2 // 16}


@pytest.mark.parametrize("count", [0, 1, 3])
def test_each_med_block_adds_a_bottleneck(count):
    assert count_parameters(assemble(med=count)) == count_parameters(
        assemble()
    ) + count * bottleneck(64, 64, False)


# Gradients


def chain_after(readout, silenced=(), training=True, gamma=1.0):
    """Return blocks 1 to 3 with gradients, the last with the last stride, all with med blocks."""
    first = FirstBlock(ConvBlock(64, 64, project_shortcut=True), TransformerBlock(48, 3))
    chain = nn.ModuleList([first, assemble(med=1), assemble(med=1, last=True)])
    for block in chain[1:]:
        for name in silenced:
            setattr(block, name, NoCoupling())
    for part in chain.modules():
        if isinstance(part, ConvBlock):
            nn.init.constant_(part.bn3.weight, gamma)
    features = features_of()
    for block in chain.double().train(training):
        features = block(*features)
    read = features.tokens[:, 0] if readout == "class" else features.maps.mean((2, 3))
    read.square().sum().backward()
    return chain


def silent(chain):
    """Return the names of the parameters whose gradient is None."""
    return {name for name, parameter in chain.named_parameters() if parameter.grad is None}


def names(chain, *parts):
    return {name for name, _ in chain.named_parameters() if name.startswith(parts)}


def test_maps_alone_reach_every_parameter():
    assert silent(chain_after("maps")) == set()


def test_class_token_alone_misses_the_end_of_the_last_block():
    chain = chain_after("class")
    missed = ("2.up.", "2.med_block.", "2.fusion_block.", "2.conv_block.conv3", "2.conv_block.bn3")
    assert silent(chain) == names(chain, *missed) != set()


def test_without_up_the_maps_train_the_cnn_branch_only():
    chain = chain_after("maps", ["up"])
    tokens_only = ("0.trans", "1.trans", "2.trans", "1.down", "2.down")
    assert silent(chain) == names(chain, *tokens_only) != set()
    alone = chain_after("maps", ["up", "down"])
    assert silent(alone) == names(alone, "0.trans", "1.trans", "2.trans")


def test_without_down_the_class_token_trains_the_transformer_branch_only():
    for silenced in (["down"], ["up", "down"]):
        chain = chain_after("class", silenced)
        heard = names(chain, "0.trans", "1.trans", "2.trans")
        assert silent(chain) == names(chain, "") - heard != set()


def test_other_readouts_do_not_notice_a_silenced_direction():
    assert silent(chain_after("maps", ["down"])) == set()
    chain = chain_after("class", ["up"])
    missed = ("2.med_block.", "2.fusion_block.", "2.conv_block.conv3", "2.conv_block.bn3")
    assert silent(chain) == names(chain, *missed)


def largest(chain, name):
    return chain.get_parameter(name).grad.abs().max().item()


def test_gradients_that_vanish_to_rounding_do_so_behind_a_norm():
    names_ = ["2.up.conv_project.bias", "2.trans_block.mlp.fc2.bias"]
    trained, evaluated = chain_after("maps"), chain_after("maps", training=False)
    for name in names_:
        assert largest(trained, name) < 1e-12 < 1e-6 < largest(evaluated, name)
    assert largest(chain_after("class"), "2.trans_block.mlp.fc2.bias") > 1e-6


def test_gradients_are_exactly_zero_behind_norms_that_start_at_zero():
    chain = chain_after("maps", gamma=0.0)
    assert silent(chain) == set()
    for name in names(chain, "1.up", "2.up", "0.trans", "1.trans", "2.trans", "1.down", "2.down"):
        assert largest(chain, name) == 0
    assert largest(chain, "2.fusion_block.bn3.weight") > 1e-6
    by_class_token = chain_after("class", gamma=0.0)
    assert largest(by_class_token, "2.down.conv_project.weight") > 1e-6
    assert largest(by_class_token, "1.up.conv_project.weight") == 0


def test_every_other_parameter_has_a_gradient_that_is_not_zero():
    chain = chain_after("maps", training=False)
    for name, parameter in chain.named_parameters():
        assert parameter.grad.abs().max() > 1e-9, name


def test_gradients_cross_in_both_directions():
    block, (maps, tokens) = assemble().double().eval(), features_of()
    maps.requires_grad_(), tokens.requires_grad_()
    result = block(maps, tokens)
    (across,) = torch.autograd.grad(result.tokens[:, 0].sum(), maps, retain_graph=True)
    assert across.abs().max() > 1e-6
    (across,) = torch.autograd.grad(result.maps.sum(), tokens)
    assert across.abs().amax((0, 2)).min() > 1e-9  # the class token too, through attention


# Use


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_other_precisions_stay_near(dtype, bound):
    block, features = assemble(med=1).double().eval(), features_of()
    with torch.no_grad():
        expected = block(*features)
        result = block.to(dtype)(*(tensor.to(dtype) for tensor in features))
    for found, right in zip(result, expected, strict=True):
        assert found.dtype == dtype
        assert (found - right).abs().max() < bound * right.abs().max()


def test_blocks_can_be_copied_and_their_parts_are_not_shared():
    block, features = assemble(med=1).double().eval(), features_of()
    twin = copy.deepcopy(block)
    assert torch.equal(block(*features).maps, twin(*features).maps)
    nn.init.zeros_(twin.fusion_block.bn3.weight)
    assert not torch.equal(block(*features).maps, twin(*features).maps)


def test_an_empty_batch_passes():
    result = assemble().double().eval()(*features_of(batch=0))
    assert result.maps.shape == (0, 64, 16, 16)
    assert result.tokens.shape == (0, 17, 48)


@pytest.mark.parametrize(
    ("maps", "tokens", "words"),
    [
        (torch.rand(2, 32, 16, 16), torch.rand(2, 17, 48), r"^maps are .*\(B, 64, H, W\)"),
        (torch.rand(64, 16, 16), torch.rand(2, 17, 48), r"^maps are .*unsqueeze"),
        (torch.rand(2, 64, 16, 16), torch.rand(2, 16, 48), "^15 patch tokens do not cover"),
        (torch.rand(2, 64, 15, 16), torch.rand(2, 17, 48), "^16 patch tokens do not cover"),
        (torch.rand(2, 64, 16, 16), torch.rand(2, 17, 40), r"\(B, N, 48\)"),
    ],
    ids=["other channels", "no batch", "no class token", "no whole squares", "other width"],
)
def test_what_does_not_fit_is_refused_in_one_sentence(maps, tokens, words):
    with pytest.raises(ValueError, match=words) as error:
        assemble()(maps, tokens)
    assert "\n" not in str(error.value)


def test_parts_that_do_not_fit_together_are_refused_in_one_sentence():
    block = ConvTransBlock(
        ConvBlock(64, 64),
        FCUDown(16, 48, 4),
        TransformerBlock(48, 3),
        FCUUp(48, 8, 4),
        ConvBlock(64, 64),
    )
    with pytest.raises(ValueError, match=r"^extra has shape \(2, 8, 16, 16\), but must be"):
        block.double()(*features_of())
    with pytest.raises(ValueError, match=r"^out_chans 6 cannot be quartered"):
        MedConvBlock(6)
