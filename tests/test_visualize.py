"""Chapter 11's module: what the branches see."""

import base64
import io
import shutil
from contextlib import nullcontext
from dataclasses import replace

import captum.attr
import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from bs4 import BeautifulSoup
from PIL import Image
from torch import nn

from conformer_src import attention as attention_module
from conformer_src.attention import attention_weights, scaled_dot_product
from conformer_src.conformer import VARIANTS, Conformer, ConformerBackbone, ConformerConfig
from conformer_src.visualize import (
    attention_rollout,
    block_slider,
    class_activation,
    class_attention,
    finish,
    grad_cam,
    overlay,
    record_blocks,
    relevance,
    show_maps,
    strength,
    token_grid,
    tokens_to_maps,
    watch,
)

SMALL = {"num_classes": 5, "channel_ratio": 0.25, "embed_dim": 24, "depth": 6, "num_heads": 3}
TOY = ConformerConfig(**SMALL)
TOYS = {name: replace(config, **SMALL) for name, config in VARIANTS.items()}
CHANGES = [
    {"branches": "conv"},
    {"branches": "trans"},
    {"branches": "trans", "pos_embed": 4},
    {"coupling": "down"},
    {"coupling": "up", "pos_embed": 4},
    {"coupling": "none", "num_med_block": 1},
    {"num_med_block": 2, "fcu_down": "max", "fcu_up": "bilinear"},
    {"patch_size": 32, "stem": "small", "in_chans": 1},
]
TOYS |= {" ".join(f"{k}={v}" for k, v in c.items()): replace(TOY, **c) for c in CHANGES}
TOYS = {name: replace(config, depth=3) for name, config in TOYS.items()}
every_variant = pytest.mark.parametrize("name", TOYS)

EXPLAIN = {
    "class_activation": (class_activation, "conv"),
    "grad_cam": (grad_cam, "conv"),
    "class_attention": (class_attention, "trans"),
    "relevance": (relevance, "trans"),
}


def lively(config, dtype=torch.float64):
    """A network in eval mode whose attention is far from even and whose norms do something."""
    model = Conformer(config).to(dtype).eval()
    for part in model.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=1.5 * part.in_features**-0.5)
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model


def images_for(config, batch=3, sides=None):
    sides = sides or (2 * config.patch_size, 3 * config.patch_size)
    return torch.randn(batch, config.in_chans, *sides, dtype=torch.float64)


def pair(name=None, **changes):
    """A network and images of 2 x 3 patches; without a name the usual one, and more patches."""
    config = replace(TOYS.get(name, TOY), **changes)
    return lively(config), images_for(config, sides=None if name else (64, 96))


def has(model, branch):
    return model.config.branches in ("both", branch)


# What is recorded


@every_variant
def test_the_record_is_what_the_blocks_put_out(name):
    model, images = pair(name)
    config, (rows, columns) = model.config, token_grid(model, images)
    records = record_blocks(model, images)
    assert len(records) == config.depth
    with torch.no_grad():
        expected = model.forward_blocks(images)
    for record, (maps, tokens) in zip(records, expected, strict=True):
        torch.testing.assert_close(record.maps, maps if has(model, "conv") else None)
        torch.testing.assert_close(record.tokens, tokens if has(model, "trans") else None)
        if has(model, "trans"):
            count = 1 + rows * columns
            assert record.tokens.shape == (3, count, config.embed_dim)
            assert record.attention.shape == (3, config.num_heads, count, count)
            torch.testing.assert_close(record.attention.sum(-1), torch.ones(3, 3, count).double())
        else:
            assert record.attention is None


@every_variant
@torch.no_grad()
def test_the_record_holds_what_crossed(name):
    model, images = pair(name)
    config, records = model.config, record_blocks(model, images)
    assert records[0].down is None
    assert records[0].up is None
    features = model.entry(images)
    for block, record in zip(model.blocks, records, strict=True):
        before, features = features, block(*features)
        coupled = block is not model.blocks[0] and config.branches == "both"
        down = coupled and config.coupling in ("both", "down")
        up = coupled and config.coupling in ("both", "up")
        tap = block.conv_block(before.maps).tap
        expected_down = block.down(tap, before.tokens) if down else None
        expected_up = block.up(features.tokens, tap) if up else None
        torch.testing.assert_close(record.down, expected_down)
        torch.testing.assert_close(record.up, expected_up)


def test_the_attention_is_that_of_chapter_3():
    model, images = pair()
    records = record_blocks(model, images)
    block, before = model.blocks[3], records[2]
    tokens = before.tokens + records[3].down
    expected = attention_weights(block.trans_block.attn, block.trans_block.norm1(tokens))
    torch.testing.assert_close(records[3].attention, expected.detach())
    assert expected.std() > 0.01  # not even, or the test would see little


def test_a_part_put_in_by_hand_is_recorded_too():
    class Twos(nn.Module):
        def forward(self, source, target):
            return torch.full_like(target, 2)

    model, images = pair()
    model.blocks[2].down = Twos()
    assert (record_blocks(model, images)[2].down == 2).all()


def test_finish_goes_on_where_the_record_stopped():
    model, images = pair()
    with torch.no_grad():
        outputs = model.forward_blocks(images)
        torch.testing.assert_close(finish(model, outputs[1], 2), model(images))
        torch.testing.assert_close(finish(model, outputs[-1], 6), model(images))


@every_variant
def test_the_grid_counts_the_patches(name):
    model, images = pair(name)
    patch = model.config.patch_size
    assert token_grid(model, images) == (2, 3)
    larger = images_for(model.config, sides=(192, 64))
    assert token_grid(model, larger) == (192 // patch, 64 // patch)


def test_the_grid_covers_the_padding_and_refuses_what_does_not_fit():
    padding = lively(replace(TOY, pad=True))
    images = images_for(TOY, sides=(33, 60))
    assert token_grid(padding, images) == (3, 4)
    assert class_attention(padding, images).shape == (3, 3, 4)
    assert class_activation(padding, images).shape == (3, 2, 2)
    with pytest.raises(ValueError, match="height 33 does not fit"):
        token_grid(lively(TOY), images)


def test_the_grid_follows_the_stem_where_it_rounds_up():
    model, images = lively(TOY), images_for(TOY, sides=(61, 96))
    assert token_grid(model, images) == (4, 6)
    assert class_attention(model, images).shape == (3, 4, 6)


def test_tokens_lie_as_the_patches_do():
    tokens = torch.arange(7).view(1, 7, 1).expand(2, 7, 3)
    maps = tokens_to_maps(tokens, (2, 3))
    assert maps.shape == (2, 3, 2, 3)
    assert maps[0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_bright_patch_is_found_where_it_is():
    model, images = lively(TOY), torch.zeros(1, 3, 64, 96).double()
    images[:, :, 16:32, 64:80] = 3  # row 1, column 4
    tokens = model.entry(images).tokens.detach()
    maps = strength(tokens_to_maps(tokens - tokens[:, -1:], token_grid(model, images)))[0]
    assert divmod(maps.argmax().item(), 6) == (1, 4)


def test_strength_by_hand():
    maps = torch.tensor([[[[1.0, -2.0]], [[-3.0, 0.0]]]])  # (1, 2, 1, 2)
    assert strength(maps).tolist() == [[[2.0, 1.0]]]


# Which places speak for a class


@every_variant
@pytest.mark.parametrize("function", EXPLAIN)
def test_every_variant_is_explained_or_refused_in_a_sentence(name, function):
    (explain, branch), (model, images) = EXPLAIN[function], pair(name)
    if not has(model, branch):
        word = "CNN" if branch == "conv" else "transformer"
        with pytest.raises(ValueError, match=f"^this model has no {word} branch [^\n]*$"):
            explain(model, images)
        return
    heat, (rows, columns) = explain(model, images), token_grid(model, images)
    assert heat.dtype == torch.float64
    assert not heat.requires_grad
    if branch == "trans":
        assert heat.shape == (3, rows, columns)
    else:
        assert heat.shape == (3, *record_blocks(model, images)[-1].maps.shape[-2:])
    assert heat.isfinite().all()
    assert (function == "class_activation") or (heat >= 0).all()
    assert heat.abs().sum() > 0
    for row in range(3):  # an image's heat does not depend on the others in the batch
        torch.testing.assert_close(explain(model, images[row : row + 1]), heat[row : row + 1])


@pytest.mark.parametrize("name", [n for n, c in TOYS.items() if c.branches != "trans"])
def test_class_activation_sums_to_the_logit(name):
    model, images = pair(name)
    target = torch.tensor([4, 0, 2])
    logits = model(images).conv.gather(1, target[:, None])[:, 0]
    found = class_activation(model, images, target).sum((1, 2)) + model.conv_head.fc.bias[target]
    torch.testing.assert_close(found, logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [n for n, c in TOYS.items() if c.branches != "trans"])
def test_grad_cam_of_the_last_block_is_the_positive_part_of_class_activation(name):
    model, images = pair(name)
    shares = class_activation(model, images, 1)
    torch.testing.assert_close(grad_cam(model, images, target=1), shares.relu())
    assert (shares < 0).any() or shares[0].numel() < 4


class Probed(nn.Module):
    """A `Conformer` taken apart for captum, which wants a layer that puts out one tensor."""

    def __init__(self, model, after):
        super().__init__()
        self.model, self.after, self.probe = model, after, nn.Identity()

    def forward(self, images):
        features = self.model.entry(images)
        for number, block in enumerate(self.model.blocks, 1):
            features = block(*features)
            if number == self.after:
                features = features._replace(maps=self.probe(features.maps))
        return self.model.conv_head(features.maps)


@pytest.mark.parametrize("name", [n for n, c in TOYS.items() if c.branches != "trans"])
@pytest.mark.parametrize("block", [1, 2])
def test_grad_cam_agrees_with_captum(name, block):
    model, images = pair(name)
    target = torch.tensor([4, 0, 2])
    probed = Probed(model, block)
    peer = captum.attr.LayerGradCam(probed, probed.probe)
    expected = peer.attribute(images, target, relu_attributions=True).squeeze(1).detach()
    torch.testing.assert_close(grad_cam(model, images, block, target), expected)


def test_class_activation_agrees_with_captum():
    model, images = pair()
    probed = Probed(model, 6)
    peer = captum.attr.LayerGradCam(probed, probed.probe)
    expected = peer.attribute(images, 3).squeeze(1).detach()
    torch.testing.assert_close(class_activation(model, images, 3), expected)


@pytest.mark.parametrize("explain", [class_activation, grad_cam, relevance])
def test_without_a_target_the_sum_of_both_heads_chooses(explain):
    model, images = pair()
    with torch.no_grad():
        model.conv_head.fc.bias.copy_(torch.tensor([1e6, 0, 0, 0, 0]))
        model.trans_head.fc.bias.copy_(torch.tensor([0.0, 1e8, 0, 0, 0]))
        assert model(images).conv.argmax(1).tolist() == [0, 0, 0]
    torch.testing.assert_close(explain(model, images), explain(model, images, target=1))
    assert not torch.equal(explain(model, images), explain(model, images, target=0))


@pytest.mark.parametrize("explain", [class_activation, grad_cam, relevance])
def test_a_target_is_a_number_or_one_for_each_image(explain):
    model, images = pair()
    each = explain(model, images, target=[2, 0, 4])
    torch.testing.assert_close(explain(model, images, target=torch.tensor([2, 0, 4])), each)
    torch.testing.assert_close(explain(model, images, target=0)[1], each[1])
    torch.testing.assert_close(explain(model, images, target=torch.tensor(4))[2], each[2])


# Attention through the blocks


def test_rollout_of_two_tokens_by_hand():
    first = torch.tensor([[0.5, 0.5], [0.0, 1.0]])  # half itself: [[3/4, 1/4], [0, 1]]
    heads = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])
    # mean of the heads [[1/2, 1/2], [1, 0]]; half itself: [[3/4, 1/4], [1/2, 1/2]]
    found = attention_rollout([first.expand(1, 2, 2, 2), heads[None]])
    expected = [[9 / 16, 7 / 16], [3 / 8, 5 / 8]]
    torch.testing.assert_close(found[0], torch.tensor(expected))


def test_rollout_of_tokens_that_look_at_themselves_changes_nothing():
    same = torch.eye(4).expand(2, 3, 4, 4)
    torch.testing.assert_close(attention_rollout([same] * 5), torch.eye(4).expand(2, 4, 4))


@pytest.mark.parametrize("name", [n for n, c in TOYS.items() if c.branches != "conv"])
def test_rollout_hands_out_all_of_a_token(name):
    model, images = pair(name)
    attentions = [record.attention for record in record_blocks(model, images)]
    rollout = attention_rollout(attentions)
    torch.testing.assert_close(rollout.sum(-1), torch.ones(rollout.shape[:2]).double())
    heat = class_attention(model, images)
    torch.testing.assert_close(heat.flatten(1), rollout[:, 0, 1:])
    upto = class_attention(model, images, block=2)
    torch.testing.assert_close(upto.flatten(1), attention_rollout(attentions[:2])[:, 0, 1:])


def test_the_first_block_hands_on_half_of_what_it_looks_at():
    model, images = pair()
    looked = record_blocks(model, images)[0].attention.mean(1)[:, 0, 1:]
    torch.testing.assert_close(class_attention(model, images, block=1).flatten(1), looked / 2)


@pytest.mark.parametrize("changes", [{}, {"branches": "trans"}, {"coupling": "up"}], ids=str)
def test_relevance_from_gradients_found_by_trying(changes, monkeypatch):
    """Nudge each attention weight up and down, see what the logit does, and follow the formula."""
    config = replace(TOY, depth=3, num_heads=2, embed_dim=8, **changes)
    model, images, target = lively(config), images_for(config, 1, (32, 32)), 3
    nudge, seen = {}, {}

    def fused(queries, keys, values, dropout_p):
        weights = scaled_dot_product(queries, keys, values)[1].clone()
        number = seen["calls"] = seen["calls"] + 1
        seen[number] = weights.clone()
        if number == nudge["block"]:
            weights[0, nudge["head"], nudge["row"], nudge["column"]] += nudge["by"]
        return weights @ values

    monkeypatch.setattr(attention_module.F, "scaled_dot_product_attention", fused)

    @torch.no_grad()
    def logit(*place, by):
        nudge.update(zip(("block", "head", "row", "column"), place, strict=True), by=by)
        seen["calls"] = 0
        return model(images).trans[0, target].item()

    total = torch.eye(5).double()
    for block in (1, 2, 3):
        mean = torch.zeros(5, 5).double()
        for head, row, column in torch.cartesian_prod(*map(torch.arange, (2, 5, 5))).tolist():
            place, step = (block, head, row, column), 1e-5
            slope = (logit(*place, by=step) - logit(*place, by=-step)) / (2 * step)
            weight = seen[block][0, head, row, column].item()
            mean[row, column] += max(slope * weight, 0) / 2
        total = total + mean @ total
    monkeypatch.undo()
    found = relevance(model, images, target)
    torch.testing.assert_close(found, total[:1, 1:].view(1, 2, 2), rtol=1e-6, atol=1e-9)
    assert found.max() > 1e-3


def test_relevance_is_about_the_class_and_attention_is_not():
    model, images = pair()
    assert not torch.allclose(relevance(model, images, 0), relevance(model, images, 1))


def test_nothing_is_relevant_to_a_class_that_does_not_read_the_tokens():
    model, images = pair()
    with torch.no_grad():
        model.trans_head.fc.weight[2] = 0
    assert relevance(model, images, 2).abs().max() == 0


# The model stays as it was


def state_of(model):
    return {
        "modes": [part.training for part in model.modules()],
        "hooks": [len(part._forward_hooks) for part in model.modules()],
        "learns": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad is None for parameter in model.parameters()],
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
    }


def same_state(model, before):
    after = state_of(model)
    torch.testing.assert_close(after.pop("values"), before["values"], rtol=0, atol=0)
    assert after == {name: before[name] for name in after}


@pytest.mark.parametrize("explain", [record_blocks, *(f for f, _ in EXPLAIN.values())])
def test_modes_gradients_and_hooks_are_left_alone(explain):
    model, images = pair(drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5)
    expected = explain(model, images)
    model.train()
    model.blocks[1].eval()
    model.entry.requires_grad_(False)
    model.blocks[2].register_forward_hook(lambda *_: None)
    before = state_of(model)
    assert True in before["modes"]
    assert False in before["modes"]
    found = explain(model, images)
    same_state(model, before)
    torch.testing.assert_close(found, expected)  # in eval mode although the model trains
    assert not images.requires_grad


@pytest.mark.parametrize("explain", [record_blocks, *(f for f, _ in EXPLAIN.values())])
def test_an_error_in_the_middle_leaves_nothing_behind(explain):
    model, images = pair()
    model.train()

    class Odd(nn.Module):
        def forward(self, *_):
            raise RuntimeError("out of luck")

    model.blocks[3].fusion_block = Odd()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="out of luck"):
        explain(model, images)
    same_state(model, before)


def look(model, images):
    with watch(model) as seen:
        assert sum(state_of(model)["hooks"]) == 3 * 6 - 2  # nothing crosses in block 1
        model(images)
        assert set(seen[1]) == {"attention", "down", "up"}
        return seen[0]["down"]


def test_hooks_go_when_the_reader_errs():
    model, images = pair()
    before = state_of(model)
    with pytest.raises(KeyError, match="down"):
        look(model, images)
    same_state(model, before)


def test_watching_changes_no_number():
    model, images = pair()
    expected = model(images)
    with watch(model):
        found = model(images)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("explain", [record_blocks, *(f for f, _ in EXPLAIN.values())])
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "frozen", "checkpointing"])
def test_whatever_the_mode_of_autograd(explain, mode):
    model, images = pair()
    expected = explain(model, images)
    model.checkpointing = mode == "checkpointing"
    model.requires_grad_(mode != "frozen")
    surrounding = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with surrounding.get(mode, nullcontext)():
        found = explain(model, images.clone())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("explain", [record_blocks, *(f for f, _ in EXPLAIN.values())])
def test_compiled_models_are_looked_into(explain):
    model, images = pair()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(explain(compiled, images), explain(model, images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_take_the_type_of_the_model(dtype):
    exact, images = pair()
    model = Conformer(exact.config).to(dtype)
    model.load_state_dict(exact.state_dict())
    rough = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.2, "atol": 0.1}
    for explain, _ in EXPLAIN.values():
        options = {} if explain is class_attention else {"target": 2}
        found = explain(model, images, **options)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), explain(exact, images, **options), **rough)
    assert record_blocks(model, images)[3].attention.dtype == dtype


# What cannot be done


@pytest.fixture(scope="module")
def refusing():
    """One network for all that is refused: it stays as it was."""
    torch.manual_seed(0)
    return lively(TOY)


@pytest.mark.parametrize("explain", [class_activation, grad_cam, relevance])
@pytest.mark.parametrize("target", [5, -1, [0, 1], [0, 1, 5], 1.0, True, [[0], [1], [2]]], ids=str)
def test_a_class_that_does_not_exist_is_refused(refusing, explain, target):
    images = images_for(TOY)
    with pytest.raises(ValueError, match=r"^target must be a class from 0 to 4, or one [^\n]*$"):
        explain(refusing, images, target=target)


@pytest.mark.parametrize("explain", [grad_cam, class_attention])
@pytest.mark.parametrize("block", [0, 7, -1, 1.0, True])
def test_a_block_that_does_not_exist_is_refused(refusing, explain, block):
    images = images_for(TOY)
    with pytest.raises(ValueError, match=r"^block must be a whole number from 1 to 6, not"):
        explain(refusing, images, block=block)


@pytest.mark.parametrize("explain", [class_activation, grad_cam, relevance])
def test_a_model_without_classes_has_none_to_explain(explain):
    for model in (lively(replace(TOY, num_classes=0)), ConformerBackbone(TOY)):
        with pytest.raises(ValueError, match=r"^this model names no classes[^\n]*$"):
            explain(model, images_for(TOY))
    headless = lively(replace(TOY, num_classes=0))
    assert class_attention(headless, images_for(TOY)).shape == (3, 2, 3)
    assert len(record_blocks(headless, images_for(TOY))) == 6


@pytest.mark.parametrize("explain", [record_blocks, *(f for f, _ in EXPLAIN.values())])
@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(3, 64, 64), r"images are .* \(3, 64, 64\)"),
        (torch.zeros(1, 1, 64, 64), r"images are .* \(1, 1, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64).byte(), r"images are torch.uint8"),
        (torch.zeros(1, 3, 64, 70), "width 70 does not fit"),
        (torch.zeros(0, 3, 64, 64), "there are no images"),
    ],
)
def test_what_are_no_images_of_the_model_is_refused(refusing, explain, images, words):
    before = state_of(refusing)
    with pytest.raises(ValueError, match=f"^{words}[^\n]*$"):
        explain(refusing, images)
    same_state(refusing, before)


def test_other_types_are_refused(refusing):
    with pytest.raises(TypeError, match="ndarray, but must be a tensor"):
        record_blocks(refusing, images_for(TOY).numpy())
    with pytest.raises(TypeError, match="Linear has no ConformerConfig"):
        relevance(nn.Linear(2, 2), images_for(TOY))


@pytest.mark.parametrize(
    "attentions",
    [[], [None], [torch.ones(2, 3, 3)], [torch.ones(2, 1, 3, 3), torch.ones(2, 1, 4, 4)]],
    ids=["none", "None", "no heads", "other tokens"],
)
def test_rollout_needs_attention(attentions):
    with pytest.raises(ValueError, match=r"^attention_rollout needs weights \(B, h, N, N\)[^\n]*$"):
        attention_rollout(attentions)


def test_tokens_must_fill_the_grid():
    with pytest.raises(ValueError, match=r"^tokens of shape \(1, 7, 2\) do not fill 2 x 2[^\n]*$"):
        tokens_to_maps(torch.zeros(1, 7, 2), (2, 2))


# Pictures


@pytest.fixture(autouse=True)
def _figures():
    matplotlib.use("agg")
    yield
    plt.close("all")


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_heat_is_scaled_up_to_the_image(channels):
    heat = torch.tensor([[0.0, -1.0], [2.0, 0.5]])
    axis = overlay(torch.rand(channels, 8, 12), heat)
    under, over = axis.images
    assert axis is plt.gca()
    assert under.get_array().shape == over.get_array().shape == (8, 12)
    shown = torch.as_tensor(over.get_array().data)
    assert (shown[0, 0], shown[-1, 0], shown[0, -1]) == (0, 1, -0.5)
    assert over.get_clim() == (-1, 1)
    assert (over.get_alpha()[0, 0], over.get_alpha().max()) == (0, pytest.approx(0.8))


def test_heat_without_negative_values_starts_clear():
    axis = overlay(torch.rand(3, 4, 4), torch.tensor([[0.25, 0.5], [0.25, 0.25]]).bfloat16())
    shown = axis.images[1].get_array()
    assert (shown.min(), shown.max()) == (0, 1)


def test_no_heat_is_no_error():
    axis = overlay(torch.zeros(1, 4, 4), torch.zeros(2, 2, requires_grad=True))
    assert axis.images[1].get_alpha().max() == 0
    axis.figure.canvas.draw()


def test_maps_stand_in_rows_and_columns():
    small, large = torch.rand(2, 3), torch.rand(4, 6)
    figure = show_maps({"CNN": [large, small], "up": [None, small]}, ["block 1", "block 2"])
    figure.canvas.draw()
    axes = figure.axes
    assert [axis.get_title() for axis in axes] == ["block 1", "block 2", "", ""]
    assert [axis.get_ylabel() for axis in axes] == ["CNN", "", "up", ""]
    assert [len(axis.images) for axis in axes] == [1, 1, 0, 1]
    torch.testing.assert_close(torch.as_tensor(axes[0].images[0].get_array().data), large)


@pytest.mark.parametrize(
    ("rows", "titles"), [({}, []), ({"up": []}, []), ({"up": [torch.rand(2, 2)]}, ["1", "2"])]
)
def test_maps_and_titles_go_together(rows, titles):
    with pytest.raises(ValueError, match=r"^[^\n]*; give a map for each\.$"):
        show_maps(rows, titles)


def pictures(count=3):
    frames = []
    for place in range(count):
        figure, axis = plt.subplots(figsize=(2, 1))
        axis.plot([0, place])
        frames.append(figure)
    return frames


CAPTIONS = ["flat", "a <slope> & more", "steep"]


def test_the_slider_holds_every_picture_and_asks_no_other_host():
    slider = block_slider(pictures(), CAPTIONS, "Block")
    assert repr(slider) == "a slider over 3 figures (Block)"
    page = BeautifulSoup(slider._repr_html_(), "html.parser")
    assert [image["alt"] for image in page.find_all("img")] == CAPTIONS
    assert ["none" in image["style"] for image in page.find_all("img")] == [False, True, True]
    drawn = set()
    for image in page.find_all("img"):
        kind, _, packed = image["src"].partition(",")
        assert kind == "data:image/png;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(packed)))
        assert picture.size == (200, 100)
        drawn.add(picture.convert("RGB").tobytes())
    assert len(drawn) == 3
    assert "http" not in slider.html
    assert "$" not in slider.html
    assert plt.get_fignums() == []  # or the notebook would show them once more


def test_the_same_figures_make_the_same_slider():
    assert block_slider(pictures(), CAPTIONS, "Block").html == (
        block_slider(pictures(), CAPTIONS, "Block").html
    )


@pytest.mark.parametrize(("count", "captions"), [(0, []), (3, ["one"])])
def test_a_slider_needs_figures_with_captions(count, captions):
    with pytest.raises(ValueError, match=r"^\d figures and \d captions make no slider; [^\n]*$"):
        block_slider(pictures(count), captions, "Block")


def shown(window):
    return [image.get_attribute("alt") for image in window.locator("img:visible").all()]


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: install chromium (apt) or Google Chrome")
def test_the_slider_moves_by_keyboard_and_stands_without_scripts(tmp_path):
    from playwright.sync_api import sync_playwright

    page = tmp_path / "page.html"
    one = block_slider(pictures(), CAPTIONS, "Block")._repr_html_()
    other = block_slider(pictures(2), ["left", "right"], "Stage")._repr_html_()
    page.write_text(f"<!doctype html><meta charset=utf-8>{one}{other}", encoding="utf-8")
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        window = browser.new_page()
        errors = []
        window.on("pageerror", lambda error: errors.append(error))
        window.goto(page.as_uri())
        assert shown(window) == ["flat", "left"]
        sliders = window.get_by_role("slider")
        assert sliders.count() == 2
        sliders.first.press("ArrowRight")
        assert shown(window) == ["a <slope> & more", "left"]
        assert window.get_by_text("Block 2 of 3: a <slope> & more").is_visible()
        sliders.first.press("End")
        sliders.last.press("ArrowRight")
        assert shown(window) == ["steep", "right"]
        assert not window.get_by_text("Where scripts run").first.is_visible()
        assert errors == []
        window = browser.new_context(java_script_enabled=False).new_page()
        window.goto(page.as_uri())
        assert shown(window) == ["flat", "left"]
        assert window.get_by_text("This is the first of 3 pictures").is_visible()
        assert not window.locator("input").first.is_visible()
        browser.close()
