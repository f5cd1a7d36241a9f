"""Chapter 2's module: the stem, the bottleneck with its two doors, and the two counters."""

import ast
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from goldens import GOLDENS, with_digest
from torch import nn
from torchvision.models.resnet import Bottleneck

from conformer_src.checks import golden
from conformer_src.conv_block import (
    ConvBlock,
    ConvBlockOutput,
    Stem,
    conv_norm,
    count_macs,
    count_parameters,
)

ROOT = Path(__file__).resolve().parents[1]
BLOCK_1 = with_digest("conv_1")
MANIFESTS = sorted((ROOT / "tests/golden/manifests").glob("*_p*.json"))
# in_chans, out_chans, stride, project_shortcut: every kind of block that the network has, small
KINDS = [(8, 8, 1, False), (8, 8, 1, True), (8, 16, 2, True), (8, 8, 2, True), (8, 4, 1, True)]


def filled(*arguments):
    """A float64 block with norms far from the identity, in evaluation mode."""
    return golden.fill_(ConvBlock(*arguments).double().eval())


def maps_of(channels=8, size=(7, 5), batch=2):
    return torch.randn(batch, channels, *size, dtype=torch.float64)


def test_conv_norm_has_no_bias_and_the_authors_eps():
    conv, norm = conv_norm(3, 8, 5, stride=2)
    assert (conv.bias, conv.padding, conv.stride) == (None, (2, 2), (2, 2))
    assert (norm.eps, norm.momentum) == (1e-6, 0.1)
    assert conv_norm(3, 8, 5, eps=1e-5)[1].eps == 1e-5


def test_norm_by_hand():
    norm = conv_norm(1, 1, 1)[1].double()
    four = torch.tensor([1.0, 3, 5, 7], dtype=torch.float64).view(1, 1, 2, 2)
    expected = torch.tensor([-3.0, -1, 1, 3], dtype=torch.float64) / math.sqrt(5 + 1e-6)
    torch.testing.assert_close(norm(four).flatten(), expected, rtol=1e-12, atol=0)
    assert norm.running_mean.item() == pytest.approx(0.4)
    assert norm.running_var.item() == pytest.approx(0.9 + 0.1 * 20 / 3)
    expected = (four - 0.4) / math.sqrt(0.9 + 2 / 3 + 1e-6)
    torch.testing.assert_close(norm.eval()(four), expected)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(13, 16, (4, 4)), (14, 15, (4, 4)), (12, 17, (3, 5)), (221, 224, (56, 56)), (1, 2, (1, 1))],
)
def test_stem_rounds_up_twice(height, width, expected):
    maps = Stem().eval()(torch.zeros(1, 3, height, width))
    assert maps.shape == (1, 64, *expected)
    assert expected == (math.ceil(height / 4), math.ceil(width / 4))


def test_stem_is_its_four_layers():
    stem, images = golden.fill_(Stem(2, 8).double().eval()), maps_of(2, (20, 13))
    norm = nn.functional.batch_norm(
        nn.functional.conv2d(images, stem.conv1.weight, stride=2, padding=3),
        *(stem.bn1.running_mean, stem.bn1.running_var, stem.bn1.weight, stem.bn1.bias),
        eps=1e-5,
    )
    expected = nn.functional.max_pool2d(norm.clamp(min=0), 3, 2, padding=1)
    torch.testing.assert_close(stem(images), expected, rtol=1e-12, atol=1e-12)
    assert count_parameters(Stem()) == 9536


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_have_the_promised_shapes(kind):
    in_chans, out_chans, stride, _ = kind
    maps, extra = maps_of(in_chans), maps_of(out_chans // 4)
    result = filled(*kind)(maps, extra)
    size = (math.ceil(7 / stride), math.ceil(5 / stride))
    assert isinstance(result, ConvBlockOutput)
    assert result.maps.shape == (2, out_chans, *size)
    assert result.tap.shape == (2, out_chans // 4, *size)
    assert result.maps.min() >= 0 <= result.tap.min()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_block_equals_torchvision_with_copied_weights(stride, training):
    norm = partial(nn.BatchNorm2d, eps=1e-6)
    ours = filled(8, 16, stride, True).train(training)
    shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, stride, bias=False), norm(16))
    theirs = Bottleneck(8, 4, stride, shortcut, norm_layer=norm).double().train(training)
    names = {"residual_conv": "downsample.0", "residual_bn": "downsample.1"}
    state = {}
    for name, tensor in ours.state_dict().items():
        layer, _, kind = name.partition(".")
        state[f"{names.get(layer, layer)}.{kind}"] = tensor.clone()
    theirs.load_state_dict(state)
    maps = maps_of()
    torch.testing.assert_close(ours(maps).maps, theirs(maps), rtol=1e-12, atol=1e-12)
    # In training mode the running averages must have moved alike.
    torch.testing.assert_close(ours.bn2.running_var, theirs.bn2.running_var)


def test_identity_shortcut_equals_torchvision_too():
    ours = filled(16, 16)
    theirs = Bottleneck(16, 4, norm_layer=partial(nn.BatchNorm2d, eps=1e-6)).double().eval()
    theirs.load_state_dict(ours.state_dict())
    maps = maps_of(16)
    torch.testing.assert_close(ours(maps).maps, theirs(maps), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_tap_and_extra_sit_around_the_3x3(kind):
    block, maps, extra = filled(*kind), maps_of(kind[0]), maps_of(kind[1] // 4)
    seen = {}
    for name in ("bn1", "conv2", "bn2", "conv3"):
        layer = getattr(block, name)
        layer.register_forward_hook(
            lambda _, given, result, name=name: seen.update({name: (given[0], result)})
        )
    tap = block(maps, extra).tap
    torch.testing.assert_close(seen["conv2"][0], seen["bn1"][1].clamp(min=0) + extra)
    torch.testing.assert_close(tap, seen["bn2"][1].clamp(min=0))
    assert seen["conv3"][0] is tap
    nothing = block(maps, torch.zeros_like(extra))
    assert all(map(torch.equal, nothing, block(maps)))


def test_one_place_of_the_extra_map_reaches_its_eight_neighbours():
    block, maps, spot = filled(16, 16), maps_of(16, (9, 9), 1), torch.zeros(1, 4, 9, 9).double()
    spot[:, :, 4, 4] = 1
    changed = (block(maps, spot).maps != block(maps).maps).any(1)[0]
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[3:6, 3:6] = True
    assert torch.equal(changed, expected)


def test_inputs_are_left_as_they_are():
    block, maps, extra = filled(8, 8), maps_of(), maps_of(2)
    before = maps.clone(), extra.clone()
    block(maps, extra)
    assert torch.equal(maps, before[0])
    assert torch.equal(extra, before[1])


@pytest.mark.parametrize("name", BLOCK_1)
def test_stem_and_block_1_agree_with_the_authors(name):
    data = GOLDENS[name]
    model, digests, training = data["model"], data["digests"], data["mode"] == "train"
    width = int(64 * model["channel_ratio"])
    stem = golden.fill_(Stem(model["in_chans"]).double().train(training))
    part = nn.ModuleDict({"conv_1": ConvBlock(64, width, project_shortcut=True)})
    block = golden.fill_(part.double().train(training))["conv_1"]
    with torch.no_grad():
        maps = stem(golden.image(**data["input"]).double())
        errors = [golden.check(maps, digests["stem"], rtol=1e-9, name="stem")]
        if "stem_padded" in digests:  # zeros at the right and the bottom, up to whole patches
            side = model["patch_size"] // 4
            maps = nn.functional.pad(maps, (0, -maps.shape[3] % side, 0, -maps.shape[2] % side))
            errors.append(golden.check(maps, digests["stem_padded"], rtol=1e-9, name="padded"))
        errors.append(golden.check(block(maps).maps, digests["conv_1"], rtol=1e-9, name="conv_1"))
    print(f"{name}: largest deviation {max(errors):.1e} of the rms")
    for key, digest in data.get("buffers", {}).items():  # after one batch in training mode
        layer, _, buffer = key.rpartition(".")
        if layer in ("bn1", "conv_1.bn3"):
            norm = stem.bn1 if layer == "bn1" else block.bn3
            golden.check(getattr(norm, buffer), digest, rtol=1e-9, name=key)


def test_goldens_of_this_chapter_are_found():
    assert len(BLOCK_1) >= 7
    assert {"bn1.running_mean", "conv_1.bn3.running_var"} <= GOLDENS["train_step"]["buffers"].keys()


def test_chapter_shows_the_recorded_digest():
    notebook = json.loads((ROOT / "chapters/02_conv_block.ipynb").read_text())
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    (source,) = [text for text in sources if text.startswith("expected = {")]
    shown = ast.literal_eval(source.partition("\n}")[0].removeprefix("expected = ") + "\n}")
    recorded = GOLDENS["tiny_p16_224"]["digests"]["conv_1"]
    assert shown.pop("head") == recorded["head"][:5]
    assert shown == {key: value for key, value in recorded.items() if key != "head"}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_names_and_shapes_are_those_of_the_checkpoints(path):
    manifest = json.loads(path.read_text())
    shapes = manifest.get("tensors", manifest)
    ratio = shapes["conv_1.conv3.weight"][0] // 64
    blocks = {
        "": Stem(),
        "conv_1.": ConvBlock(64, 64 * ratio, 1, True),
        "conv_trans_4.cnn_block.": ConvBlock(64 * ratio, 64 * ratio),
        "conv_trans_9.cnn_block.": ConvBlock(128 * ratio, 256 * ratio, 2, True),
        "conv_trans_12.fusion_block.": ConvBlock(256 * ratio, 256 * ratio, 2, True),
    }
    for prefix, block in blocks.items():
        ours = {prefix + name: list(tensor.shape) for name, tensor in block.state_dict().items()}
        start = prefix or ("conv1.", "bn1.")
        theirs = {name: list(shape) for name, shape in shapes.items() if name.startswith(start)}
        assert ours == theirs


def test_weights_start_as_the_authors_do():
    recorded = GOLDENS["init_tiny_p16"]["parameters"]
    block, stem = ConvBlock(128, 256, 2, True), Stem()
    prefix = "conv_trans_9.cnn_block."
    found = [(prefix + name, p) for name, p in block.named_parameters()] + [
        *stem.named_parameters()
    ]
    for name, parameter in found:
        kind, value = recorded[name]
        if kind == "constant":
            assert (parameter == value).all(), name
        else:
            assert kind == "normal"
            assert parameter.std().item() == pytest.approx(value, rel=0.05), name
            assert abs(parameter.mean().item()) < 4 * value / math.sqrt(parameter.numel()), name


@pytest.mark.parametrize("kind", [*KINDS, (64, 64, 1, True), (64, 256, 1, True)])
@pytest.mark.parametrize("size", [(14, 14), (7, 5)])
def test_counts_follow_the_formulas(kind, size):
    C, wide, stride, projected = kind
    q, block = wide // 4, ConvBlock(*kind)
    before, after = math.prod(size), math.prod(math.ceil(n / stride) for n in size)
    weights = C * q + 9 * q**2 + q * wide + projected * C * wide
    assert count_parameters(block) == weights + 4 * q + 2 * wide + 2 * projected * wide
    macs = before * C * q + after * (9 * q**2 + q * wide + projected * C * wide)
    assert count_macs(block, torch.empty(3, C, *size)) == 3 * macs
    with_extra = count_macs(block, torch.empty(3, C, *size), torch.empty(3, q, *size))
    assert with_extra == 3 * macs  # an addition is not counted


def test_block_1_has_the_published_sizes():
    widths = {"tiny": (64, 8768), "small": (256, 75008), "base": (384, 152448)}
    for width, parameters in widths.values():
        assert count_parameters(ConvBlock(64, width, project_shortcut=True)) == parameters
    assert count_macs(Stem(), torch.empty(1, 3, 224, 224)) == 112**2 * 49 * 3 * 64


def test_counting_leaves_the_module_alone():
    block = ConvBlock(8, 8)
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    assert block.training
    count_macs(block, torch.randn(2, 8, 6, 6))
    assert all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items())
    assert all(p.device.type == "cpu" and p.requires_grad for p in block.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter_and_both_inputs(kind):
    block = golden.fill_(ConvBlock(*kind).double())
    maps, extra = maps_of(kind[0]).requires_grad_(), maps_of(kind[1] // 4).requires_grad_()
    weights = maps_of(kind[1], (math.ceil(7 / kind[2]), math.ceil(5 / kind[2])))
    (block(maps, extra).maps * weights).sum().backward()
    for name, tensor in [*block.named_parameters(), ("maps", maps), ("extra", extra)]:
        assert tensor.grad.abs().max() > 1e-6, name


def test_gradient_of_the_tap_stops_before_the_expansion():
    block = golden.fill_(ConvBlock(8, 8).double())
    block(maps_of(), maps_of(2)).tap.square().sum().backward()
    assert block.conv3.weight.grad is None
    assert block.conv1.weight.grad.abs().max() > 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_other_precisions_stay_near(dtype, bound):
    stem, block = golden.fill_(Stem().double().eval()), filled(64, 64)
    images = maps_of(3, (32, 32))
    expected = block(stem(images)).maps
    result = block.to(dtype)(stem.to(dtype)(images.to(dtype))).maps
    assert result.dtype == dtype
    assert (result - expected).abs().max() < bound * expected.abs().max()


def test_an_empty_batch_passes_in_evaluation():
    assert ConvBlock(8, 8).eval()(torch.zeros(0, 8, 4, 4)).maps.shape == (0, 8, 4, 4)


def refused(words, call, *arguments):
    """The call raises one sentence that begins so."""
    with pytest.raises(ValueError, match=words) as error:
        call(*arguments)
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert ". " not in text


@pytest.mark.parametrize(
    "maps",
    [torch.zeros(8, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(1, 8, 4, 4).byte()],
    ids=["no batch", "other channels", "whole numbers"],
)
def test_what_is_not_maps_is_refused(maps):
    refused(r"^maps are torch\.\w+ of shape .* \(B, 8, H, W\)", ConvBlock(8, 8), maps)
    refused(r"^images are torch\.\w+ of shape .* \(B, 8, H, W\)", Stem(8), maps)


@pytest.mark.parametrize(
    "shape", [(2, 2, 3, 3), (2, 8, 6, 6), (1, 2, 6, 6), (2, 2, 6), (2, 2, 1, 1)]
)
def test_an_extra_map_of_another_shape_is_refused(shape):
    block = ConvBlock(8, 8, 2, project_shortcut=True)
    words = r"^extra has shape .* must be \(2, 2, 6, 6\)"
    refused(words, block, torch.zeros(2, 8, 6, 6), torch.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((8, 16), "^an identity shortcut cannot .* 8 -> 16 channels with stride 1; set project"),
        ((8, 8, 2), "^an identity shortcut cannot .* stride 2; set project_shortcut=True"),
        ((8, 6, 1, True), "^out_chans 6 cannot be quartered"),
        ((8, 0, 1, True), "^out_chans 0 cannot be quartered"),
        ((0, 8, 1, True), "^a convolution of 0 -> 8 channels with kernel 1"),
        ((8, 8, 0, True), "^a convolution of 8 -> 8 channels .* stride 0 cannot be built"),
    ],
)
def test_blocks_that_cannot_work_are_refused(arguments, words):
    refused(words, ConvBlock, *arguments)


def test_convolutions_that_cannot_work_are_refused():
    refused("^a convolution of 3 -> 8 channels with kernel 4 .* an odd kernel", conv_norm, 3, 8, 4)
    refused("^a convolution of 0 -> 64 channels", Stem, 0)
