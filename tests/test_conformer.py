"""Chapter 6's module: the whole network, its variants, its choices, and the authors' numbers."""

import itertools
import math
from dataclasses import FrozenInstanceError, replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from goldens import GOLDENS, with_digest
from torch import nn
from torchvision.ops import StochasticDepth

from conformer_src.attention import TransformerBlock
from conformer_src.checks import golden
from conformer_src.conformer import (
    CARDS,
    STEM_STRIDES,
    VARIANTS,
    Conformer,
    ConformerConfig,
    DualLogits,
    create_model,
    fcu_strides,
    list_models,
    model_card,
    size_fits,
    stage_widths,
)
from conformer_src.conv_block import ConvBlock, count_macs, count_parameters
from conformer_src.coupled_block import ConvTransBlock
from conformer_src.fcu import DOWN_MODES, UP_MODES
from conformer_src.weights import official_name

FORWARD = with_digest("conv_logits")
TOY = ConformerConfig(num_classes=10, channel_ratio=0.25, embed_dim=48, depth=6, num_heads=3)
ABLATIONS = [
    {},
    *({"fcu_down": mode} for mode in DOWN_MODES[1:]),
    *({"fcu_up": mode} for mode in UP_MODES[1:]),
    *({"coupling": kind} for kind in ("down", "up", "none")),
    *({"branches": kind} for kind in ("conv", "trans")),
    {"pos_embed": 4},
    {"num_med_block": 2},
    {"stem": "small", "patch_size": 8},
]


def toy(**changes):
    """A small network in float64, filled with golden weights, which keep activations near 1."""
    return golden.fill_(Conformer(replace(TOY, **changes)).double(), official_name)


def on_meta(config):
    """A network without numbers: shapes alone run through it."""
    with torch.device("meta"):
        return Conformer(config).eval()


def images_of(height=64, width=None, batch=2, chans=3):
    return golden.image(batch, chans, height, width or height).double()


def shown(value):
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def refused(words, call, *arguments, **named):
    """The call raises one sentence that holds these words."""
    with pytest.raises(ValueError, match=words) as error:
        call(*arguments, **named)
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert ". " not in text


# The authors' numbers


def of_golden(name, dtype=torch.float64):
    """The network of a golden file with its weights, and its images."""
    data = GOLDENS[name]
    choices = {key: value for key, value in data["model"].items() if key != "base_channel"}
    padded = "stem_padded" in data["digests"]
    model = Conformer(ConformerConfig(**choices, pad=padded)).to(dtype)
    images = golden.image(**data["input"]).to(dtype)
    return golden.fill_(model.train(data["mode"] == "train"), official_name), images


def digested(model, images):
    """Run the network and return what the digests are of, by the names of the golden files."""
    found = {}

    def keep(module, take):
        module.register_forward_hook(lambda _, args, out: found.update(take(args[0], out)))

    keep(model.entry.stem, lambda _, out: {"stem": out})
    keep(model.entry.token_embed, lambda x, out: {"stem_padded": x, "patch_embed": out[:, 1:]})
    for number, block in enumerate(model.blocks, 1):
        maps, tokens = ("conv_1", "trans_1") if number == 1 else (f"conv_trans_{number}.conv", "")
        tokens = tokens or f"conv_trans_{number}"

        def after(_, out, maps=maps, tokens=tokens):
            cls, patches = out.tokens[:, 0], out.tokens[:, 1:]
            return {maps: out.maps, f"{tokens}.cls": cls, f"{tokens}.patches": patches}

        keep(block, after)
        if number > 1:
            keep(block.down, lambda _, out, key=f"{tokens}.squeeze": {key: out[:, 1:]})
            keep(block.up, lambda _, out, key=f"{tokens}.expand": {key: out})
    keep(model.conv_head.fc, lambda x, _: {"conv_feature": x})
    keep(model.trans_head.norm, lambda _, out: {"trans_feature": out})
    with torch.no_grad():
        logits = model(images)
    return found | dict(conv_logits=logits.conv, trans_logits=logits.trans, sum_logits=logits.sum())


@pytest.mark.parametrize("name", FORWARD)
def test_every_digest_agrees_with_the_authors(name):
    model, images = of_golden(name)
    found, digests = digested(model, images), GOLDENS[name]["digests"]
    errors = {key: golden.check(found[key], d, rtol=1e-9, name=key) for key, d in digests.items()}
    worst = max(errors, key=errors.get)
    print(f"{name}: largest of {len(errors)} deviations {errors[worst]:.1e} of the rms, at {worst}")


@pytest.mark.parametrize("name", [name for name in FORWARD if GOLDENS[name]["mode"] == "eval"])
def test_float32_stays_near_the_authors(name):
    model, images = of_golden(name, torch.float32)
    found, digests = digested(model, images), GOLDENS[name]["digests"]
    errors = {key: golden.check(found[key], d, rtol=2e-5, name=key) for key, d in digests.items()}
    print(f"{name}: largest deviation in float32 {max(errors.values()):.1e} of the rms")
    if "top1" in GOLDENS[name]:
        assert found["sum_logits"].argmax(1).tolist() == GOLDENS[name]["top1"]


def test_goldens_of_the_whole_network_are_found():
    assert len(FORWARD) >= 8
    assert "stem_padded" in GOLDENS["padded_reduced"]["digests"]


@pytest.mark.parametrize("name", [name for name in FORWARD if "parameters" in GOLDENS[name]])
def test_parameters_are_as_many_as_the_authors(name):
    choices = dict(GOLDENS[name]["model"])
    assert choices.pop("base_channel") == 64
    assert count_parameters(on_meta(ConformerConfig(**choices))) == GOLDENS[name]["parameters"]


# One training step of the authors

STEP = GOLDENS["train_step"]
LABELS = torch.tensor(STEP["labels"])


def canonical(named):
    return {official_name(name): tensor for name, tensor in named}


def losses(model, images):
    return [F.cross_entropy(logits, LABELS) for logits in model(images)]


def decayed(name, parameter):
    """Whether the golden step with two groups decays a parameter."""
    return parameter.ndim > 1 and not name.endswith((".bias", "cls_token"))


@cache
def stepped(checkpointing=False, grouped=False):
    """Take the recorded training step and return what it computes, by the authors' names."""
    model, images = of_golden("train_step")
    model.checkpointing = checkpointing
    conv, trans = losses(model, images)
    (conv + trans).backward()
    named = list(model.named_parameters())
    taken = SimpleNamespace(
        losses={"conv": conv.item(), "trans": trans.item(), "total": (conv + trans).item()},
        gradients=canonical((name, p.grad.clone()) for name, p in named),
        buffers=canonical((name, buffer.clone()) for name, buffer in model.named_buffers()),
    )
    choices = {key: value for key, value in STEP["optimizer"].items() if key != "name"}
    kept = {"params": [p for name, p in named if not decayed(name, p)]}
    if grouped:
        kept["weight_decay"] = 0.0
    decaying = {"params": [p for name, p in named if decayed(name, p)]}
    torch.optim.AdamW([decaying, kept], **choices).step()
    taken.after_step = canonical((name, p.detach()) for name, p in named)
    with torch.no_grad():
        taken.total_after = sum(losses(model, images)).item()
    return taken


RECOMPUTED = pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])


def compare(found, digests, **bounds):
    """Check each digest and return the largest deviation."""
    errors = [golden.check(found[key], d, name=key, **bounds) for key, d in digests.items()]
    return max(errors)


@RECOMPUTED
def test_losses_are_the_authors(checkpointing):
    for key, loss in stepped(checkpointing).losses.items():
        assert loss == pytest.approx(STEP["losses"][key], rel=1e-9), key


@RECOMPUTED
def test_gradients_are_the_authors(checkpointing):
    found = stepped(checkpointing).gradients
    error = compare(found, STEP["gradients"], rtol=1e-8, atol=1e-12)
    print(f"gradients: largest deviation {error:.1e} of the rms")


@RECOMPUTED
def test_each_gradient_has_the_norm_of_the_authors(checkpointing):
    found, expected = stepped(checkpointing).gradients, STEP["gradient_norms"]
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.norm().item() == pytest.approx(expected[name], rel=1e-8, abs=1e-12), name
    total = math.hypot(*(gradient.norm().item() for gradient in found.values()))
    assert total == pytest.approx(STEP["gradient_norm"], rel=1e-9)


@RECOMPUTED
def test_running_statistics_count_the_batch_once(checkpointing):
    found = stepped(checkpointing).buffers
    error = compare(found, STEP["buffers"], rtol=1e-9)
    print(f"buffers: largest deviation {error:.1e} of the rms")
    counts = [int(b) for name, b in found.items() if name.endswith("num_batches_tracked")]
    assert counts == [1] * len(counts)
    assert counts


@RECOMPUTED
@pytest.mark.parametrize("grouped", [False, True], ids=["all decay", "grouped"])
def test_weights_after_a_step_of_adamw_are_the_authors(checkpointing, grouped):
    suffix = "_grouped" if grouped else ""
    taken = stepped(checkpointing, grouped)
    error = compare(taken.after_step, STEP["after_step" + suffix], rtol=1e-9)
    print(f"after the step{suffix}: largest deviation {error:.1e} of the rms")
    expected = STEP["losses"]["total_after_step" + suffix]
    assert taken.total_after == pytest.approx(expected, rel=1e-9)


def test_checkpointing_changes_no_gradient_and_no_statistic():
    plain, again = stepped(), stepped(checkpointing=True)
    for one, other in ((plain.gradients, again.gradients), (plain.buffers, again.buffers)):
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-12, atol=1e-14)


def test_checkpointing_repeats_the_same_random_choices():
    gradients = []
    for checkpointing in (False, True):
        model = toy(drop_path_rate=0.5, drop_rate=0.2)
        model.checkpointing = checkpointing
        torch.manual_seed(1)
        model(images_of()).sum().square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


# How weights start


def within(parameter, kind, value):
    """Whether numbers look drawn from a distribution: five standard errors."""
    count = parameter.numel()
    if kind == "constant":
        return bool((parameter == value).all())
    std, excess = (value, 0.0) if kind == "normal" else (value / math.sqrt(3), -1.2)
    mean_off = abs(parameter.mean().item()) / (std / math.sqrt(count))
    std_off = abs(parameter.std().item() - std) / (std * math.sqrt((excess + 2) / 4 / count))
    moment = ((parameter - parameter.mean()) ** 4).mean().item() / parameter.var().item() ** 2 - 3
    shape_off = abs(moment - excess) / math.sqrt(24 / count)
    largest = value if kind == "uniform" else 7 * value
    return max(mean_off, std_off, shape_off) < 5 and parameter.abs().max() <= largest


@pytest.fixture(scope="module")
def fresh_tiny():
    torch.manual_seed(0)
    return create_model("conformer_tiny_patch16")


def test_weights_start_as_the_authors_do(fresh_tiny):
    recorded = GOLDENS["init_tiny_p16"]["parameters"]
    found = canonical((name, p.detach()) for name, p in fresh_tiny.named_parameters())
    assert found.keys() == recorded.keys()
    off = [name for name, p in found.items() if not within(p, *recorded[name])]
    assert off == []


def test_running_statistics_start_at_nought_and_one(fresh_tiny):
    for name, buffer in fresh_tiny.named_buffers():
        assert (buffer == name.endswith("running_var")).all(), name


@pytest.fixture
def poisoned():
    """Memory that nobody filled holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("changes", ABLATIONS, ids=shown)
def test_no_value_is_left_undrawn(changes):
    assert torch.empty(4).isnan().all()
    for name, tensor in Conformer(replace(TOY, **changes)).state_dict().items():
        assert tensor.isfinite().all(), name


def test_a_seed_fixes_the_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(Conformer(TOY).state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)
    torch.testing.assert_close(torch.zeros(2), nn.Linear(2, 2).bias * 0)  # torch draws again


# Sizes of images


@pytest.mark.parametrize("patch", [16, 32])
def test_sizes_that_fit_are_those_of_the_authors(patch):
    fitting = [size for size in range(1, 321) if size_fits(size, patch)]
    assert fitting == GOLDENS["sizes"]["accepted"][f"patch{patch}"]
    assert not size_fits(0, patch)


def accepts(model, height, width):
    """Whether a network takes images of this size; it may refuse them with our sentence only."""
    device = model.trans_head.norm.weight.device
    try:
        logits = model(torch.ones(1, 3, height, width, device=device))
    except ValueError as error:
        if "does not fit" in str(error):
            return False
        raise
    return logits.conv.shape == logits.trans.shape == (1, 10)


@pytest.mark.parametrize("patch", [16, 32])
def test_the_network_takes_these_sizes_and_no_others(patch):
    model = on_meta(replace(TOY, patch_size=patch, depth=3))
    taken = [size for size in range(1, 321) if accepts(model, size, size)]
    assert taken == GOLDENS["sizes"]["accepted"][f"patch{patch}"]


@pytest.mark.parametrize("choices", [{}, {"patch_size": 32}, {"stem": "small", "patch_size": 8}])
def test_height_and_width_obey_the_rule_each_on_its_own(choices):
    config = replace(TOY, depth=3, **choices)
    model, stride = on_meta(config), STEM_STRIDES[config.stem]
    for height, width in itertools.product(range(25, 98, 6), range(28, 97, 7)):
        fits = [size_fits(side, config.patch_size, stride) for side in (height, width)]
        assert accepts(model, height, width) == all(fits), (height, width)


@pytest.mark.parametrize(
    ("choices", "size", "words"),
    [
        ({}, (225, 224), "^height 225 does not fit, 221 to 224 or 237 to 240 does: "),
        ({}, (224, 200), "^width 200 does not fit, 189 to 192 or 205 to 208 does: "),
        ({}, (12, 32), "^height 12 does not fit, 13 to 16 does: "),
        ({}, (33, 34), "^height 33 does .* 29 to 32 or 45 to 48 does; width 34 does not fit, 29 "),
        ({"patch_size": 32}, (240, 64), "^height 240 does not fit, 221 to 224 or 253 to 256 does"),
        ({"stem": "small", "patch_size": 8}, (28, 32), "^height 28 does .* 23 to 24 or 31 to 32 "),
    ],
    ids=shown,
)
def test_a_size_that_does_not_fit_is_refused_with_the_nearest_that_do(choices, size, words):
    model = on_meta(replace(TOY, **choices))
    refused(words, model, torch.empty(1, 3, *size, device="meta"))
    refused(r"resize the images, or .* pad=True\.$", model, torch.empty(1, 3, *size, device="meta"))


@torch.no_grad()
@pytest.mark.parametrize("choices", [{}, {"patch_size": 32}, {"stem": "small", "patch_size": 8}])
def test_padding_takes_every_size(choices):
    model = Conformer(replace(TOY, depth=3, pad=True, **choices)).eval()
    for size in range(1, 66):
        assert accepts(model, size, size), size
        assert accepts(model, size, 66 - size), size


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (37, 50)])
def test_padding_computes_finite_numbers(size):
    logits = toy(pad=True).eval()(images_of(*size))
    assert all(part.isfinite().all() for part in logits)


def test_padding_changes_nothing_where_the_size_fits():
    images = images_of(61, 32)
    torch.testing.assert_close(toy(pad=True).eval()(images), toy().eval()(images), rtol=0, atol=0)


def test_padding_is_at_the_right_and_at_the_bottom_of_the_stems_maps():
    found = digested(toy(pad=True).eval(), images_of(40, 52))
    padded = found["stem_padded"]
    assert padded.shape == (2, 64, 12, 16)
    assert torch.equal(padded[..., :10, :13], found["stem"])
    assert not padded[..., 10:, :].any()
    assert not padded[..., 13:].any()


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(3, 64, 64),
        torch.zeros(1, 3, 64, 64).byte(),
        torch.zeros(1, 1, 64, 64),
        torch.zeros(1, 64, 64, 3),
        torch.zeros(1, 3, 0, 64),
        torch.zeros(1, 3, 64, 0),
    ],
    ids=["no batch", "whole numbers", "grey", "channels last", "no height", "no width"],
)
@pytest.mark.parametrize("choices", [{}, {"pad": True}, {"stem": "small", "patch_size": 8}])
def test_what_is_not_images_is_refused(images, choices):
    words = r"^images are torch\.\w+ of shape .* \(B, 3, H, W\)|^images have shape .* hold nothing;"
    refused(words, Conformer(replace(TOY, depth=3, **choices)), images)


def test_an_empty_batch_passes_in_evaluation():
    logits = toy().eval()(torch.zeros(0, 3, 64, 64).double())
    assert logits.conv.shape == logits.trans.shape == (0, 10)


# Variants and their cards


def silent(name):
    """Whether a gradient is zero but for rounding: a bias that the batch's mean takes away."""
    return name.endswith("up.conv_project.bias")


@pytest.mark.parametrize("name", list_models())
def test_each_variant_learns_in_all_its_parameters(name):
    model = create_model(name)
    size, count = 64 if model.config.patch_size == 32 else 32, 4
    logits = model(torch.randn(count, 3, size, size))
    assert logits.conv.shape == logits.trans.shape == (count, model.config.num_classes)
    sum(F.cross_entropy(part, torch.arange(count)) for part in logits).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any() or silent(parameter_name), parameter_name


@pytest.mark.parametrize("name", list_models())
def test_the_card_holds_the_parameters(name):
    assert model_card(name).parameters == count_parameters(on_meta(VARIANTS[name]))


@pytest.mark.parametrize("name", list_models())
def test_the_card_counts_the_authors_order_of_operations(name):
    config, size = VARIANTS[name], model_card(name).image_size
    side = -(-size // STEM_STRIDES[config.stem])
    patches = -(-side // fcu_strides(config)[0])  # per side; the last one may be padding
    places = [patches * stride for stride in fcu_strides(config)]
    taps = [width // 4 for width in stage_widths(config)]
    third = config.depth // 3
    blocks = (third - 1, third, third)  # block 1 is not coupled
    saved = sum(  # pooling before the projection instead of after it
        count * (place**2 - patches**2) * tap * config.embed_dim
        for count, place, tap in zip(blocks, places, taps, strict=True)
    )
    macs = count_macs(on_meta(config), torch.empty(1, config.in_chans, size, size))
    assert model_card(name).macs == macs + saved


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("conformer_tiny_patch16", 23_524_704, 5_225_936_896),
        ("conformer_small_patch16", 37_673_424, 10_599_350_272),
        ("conformer_small_patch32", 38_853_072, 7_045_835_776),
        ("conformer_base_patch16", 83_289_136, 23_325_745_152),
    ],
)
def test_the_cards_agree_with_what_was_counted_in_the_authors_code(name, parameters, macs):
    card = model_card(name)
    assert (card.image_size, card.parameters, card.macs) == (224, parameters, macs)


def test_every_variant_has_a_card_and_a_source_for_its_accuracy():
    assert CARDS.keys() == VARIANTS.keys()
    for card in CARDS.values():
        assert (card.top1 is None) == (card.source == "none")


def test_the_small_variant_has_tokens_enough_for_small_images():
    model = on_meta(VARIANTS["conformer_micro"])
    for size, least in ((28, 16), (32, 16), (64, 64), (96, 64)):
        tokens = model.entry(torch.empty(1, 3, size, size, device="meta")).tokens
        assert tokens.shape[1] > least


def test_names_are_listed_sorted_and_by_pattern():
    assert list_models() == sorted(VARIANTS)
    assert list_models("*small*") == ["conformer_small_patch16", "conformer_small_patch32"]
    assert list_models("resnet*") == []


@pytest.mark.parametrize("chans", [1, 4])
def test_images_may_have_other_channels(chans):
    logits = toy(in_chans=chans).eval()(images_of(chans=chans))
    assert logits.sum().shape == (2, 10)


@pytest.mark.parametrize("classes", [1, 10])
def test_each_head_has_the_classes_that_were_asked_for(classes):
    logits = toy(num_classes=classes).eval()(images_of())
    assert logits.conv.shape == logits.trans.shape == (2, classes)


def test_without_classes_the_features_before_the_heads_come_out():
    features, found = toy(num_classes=0).eval()(images_of()), digested(toy().eval(), images_of())
    torch.testing.assert_close(features.conv, found["conv_feature"])
    torch.testing.assert_close(features.trans, found["trans_feature"])


def test_the_sum_leaves_out_a_head_that_is_not_there():
    one, other = torch.randn(2, 2, 5)
    assert torch.equal(DualLogits(one, other).sum(), one + other)
    assert torch.equal(DualLogits(one, None).sum(), one)
    assert torch.equal(DualLogits(None, other).sum(), other)


def test_without_bias_the_queries_keys_and_values_have_none():
    names = {name for name, _ in toy(qkv_bias=False).named_parameters()}
    assert not any(name.endswith("qkv.bias") for name in names)
    assert sum(name.endswith("qkv.weight") for name in names) == TOY.depth


@pytest.mark.parametrize("rates", [{"drop_rate": 0.5}, {"attn_drop_rate": 0.5}])
def test_dropout_acts_in_the_transformer_and_in_training_only(rates):
    model, images = toy(**rates, coupling="none"), images_of()
    one, other = model(images), model(images)
    assert torch.equal(one.conv, other.conv)
    assert not torch.allclose(one.trans, other.trans)
    model.eval()
    torch.testing.assert_close(model(images), model(images), rtol=0, atol=0)


def test_stochastic_depth_grows_linearly_from_block_to_block():
    model = toy(drop_path_rate=0.3)
    rates = [block.trans_block.drop_path.p for block in model.blocks]
    assert rates == pytest.approx(torch.linspace(0, 0.3, 6).tolist())


def test_stochastic_depth_acts_on_the_transformer_blocks_only():
    model, images = toy(drop_path_rate=0.9, coupling="none"), images_of()
    paths = [name for name, part in model.named_modules() if isinstance(part, StochasticDepth)]
    assert all(name.endswith("trans_block.drop_path") for name in paths)
    one, other = model(images), model(images)
    assert torch.equal(one.conv, other.conv)
    assert not torch.allclose(one.trans, other.trans)


@pytest.mark.parametrize("count", [1, 2])
def test_each_coupled_block_has_so_many_further_bottlenecks(count):
    widths = [16, 32, 32, 64, 64]  # of blocks 2 to 6
    further = sum(count_parameters(ConvBlock(width, width)) for width in widths)
    model, plain = toy(num_med_block=count), toy()
    assert count_parameters(model) - count_parameters(plain) == count * further


def test_further_bottlenecks_are_not_seen_by_the_tokens_of_their_block():
    images = images_of()
    outputs, plain = (toy(num_med_block=n).eval().forward_blocks(images) for n in (1, 0))
    assert torch.equal(outputs[1].tokens, plain[1].tokens)
    assert not torch.allclose(outputs[1].maps, plain[1].maps)
    assert not torch.allclose(outputs[2].tokens, plain[2].tokens)


# Features


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_outputs_of_the_blocks_lead_to_the_features_and_to_the_logits(checkpointing):
    model, images = toy().eval(), images_of()
    model.checkpointing = checkpointing
    outputs, features = model.forward_blocks(images), model.forward_features(images)
    assert len(outputs) == len(model.blocks) == 6
    torch.testing.assert_close(outputs[-1], features, rtol=0, atol=0)
    logits = model.conv_head(features.maps), model.trans_head(features.tokens)
    torch.testing.assert_close(tuple(model(images)), logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", list_models())
def test_maps_shrink_and_tokens_stay_from_block_to_block(name):
    model, size = on_meta(VARIANTS[name]), model_card(name).image_size
    outputs = model.forward_blocks(torch.empty(1, 3, size, size, device="meta"))
    first, third = STEM_STRIDES[model.config.stem], model.config.depth // 3
    strides = [first * 2**stage for stage in range(3) for _ in range(third)]
    strides[-1] *= 2  # the last fusion
    assert [size // out.maps.shape[-1] for out in outputs] == strides
    widths = [width for width in stage_widths(model.config) for _ in range(third)]
    assert [out.maps.shape[1] for out in outputs] == widths
    patches = (size // model.config.patch_size) ** 2
    assert {out.tokens.shape for out in outputs} == {(1, 1 + patches, model.config.embed_dim)}


@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("conformer_tiny_patch16", [4, 8, 16, 32]),
        ("conformer_small_patch32", [4, 8, 16, 32]),
        ("conformer_micro", [2, 4, 8, 16]),
    ],
)
def test_the_pyramid_has_the_maps_of_each_stride(name, strides):
    model = on_meta(VARIANTS[name])
    levels = model.forward_pyramid(torch.empty(1, 3, 64, 96, device="meta"))
    assert [tuple(level.maps.shape[-2:]) for level in levels] == [
        (64 // s, 96 // s) for s in strides
    ]
    patch = model.config.patch_size
    assert {level.tokens.shape[1] for level in levels} == {1 + (64 // patch) * (96 // patch)}


def test_the_pyramid_takes_the_last_block_of_each_stride():
    model, images = toy().eval(), images_of()
    levels, outputs = model.forward_pyramid(images), model.forward_blocks(images)
    for level, number in zip(levels, (2, 4, 5, 6), strict=True):
        torch.testing.assert_close(level, outputs[number - 1], rtol=0, atol=0)


def test_without_a_block_of_stride_16_there_is_no_pyramid():
    refused("^with depth 3 .* choose 6 or more", toy(depth=3).forward_pyramid, images_of())


# Choices for comparison


def reached(logits, model):
    """Which parameters, by name, a head's logits depend on."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    weights = torch.randn(logits.shape, dtype=logits.dtype)  # other than in a sum, nothing cancels
    total = (logits * weights).sum()
    gradients = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
    found = zip(names, gradients, strict=True)
    return {name for name, gradient in found if gradient is not None and gradient.any()}


def of_branch(model, branch):
    """The parameters of one branch, or of neither, by name: what the stem shares is apart."""
    parts = {
        "stem": ("entry.stem.",),
        "conv": (".conv_block.", ".fusion_block.", ".med_block.", "conv_head."),
        "trans": ("token_embed.", ".trans_block.", "trans_head."),
        "down": (".down.",),
        "up": (".up.",),
    }[branch]
    names = (name for name, _ in model.named_parameters())
    return {name for name in names if any(part in name for part in parts)}


@pytest.mark.parametrize("changes", ABLATIONS, ids=shown)
def test_each_choice_learns_in_all_its_parameters(changes):
    model = toy(**changes)
    parts = [part for part in model(images_of(batch=4)) if part is not None]
    assert all(part.shape == (4, 10) for part in parts)
    torch.stack([part * torch.randn(4, 10) for part in parts]).sum().backward()
    for name, parameter in model.named_parameters():
        largest = parameter.grad.abs().max()
        assert largest < 1e-9 if silent(name) else largest > 1e-6, name


@pytest.mark.parametrize("changes", ABLATIONS[1:], ids=shown)
def test_each_choice_makes_another_function(changes):
    plain, changed = toy().eval()(images_of()), toy(**changes).eval()(images_of())
    pairs = [pair for pair in zip(plain, changed, strict=True) if pair[1] is not None]
    assert pairs
    assert not any(torch.allclose(*pair) for pair in pairs)


@pytest.mark.parametrize("mode", DOWN_MODES)
def test_every_way_down_shrinks_as_it_says(mode):
    model = toy(fcu_down=mode)
    for block in model.blocks[1:]:
        tap = torch.randn(2, block.down.conv_project.in_channels, 8, 8).double()
        stride = block.down.stride
        small = block.down.sample(tap)
        expected = {
            "average": lambda t, s: F.avg_pool2d(t, s),
            "max": lambda t, s: F.max_pool2d(t, s),
            "conv": lambda t, s, d=block.down: F.conv2d(t, d.sample.weight, d.sample.bias, s),
        }.get(mode, lambda t, s: F.interpolate(t, scale_factor=1 / s, mode=mode))
        torch.testing.assert_close(small, tap if stride == 1 else expected(tap, stride))


@pytest.mark.parametrize("mode", UP_MODES)
def test_every_way_up_grows_as_it_says(mode):
    assert all(block.up.mode == mode for block in toy(fcu_up=mode).blocks[1:])


@pytest.mark.parametrize("coupling", ["both", "down", "up", "none"])
def test_coupling_goes_in_the_directions_that_were_chosen(coupling):
    model = toy(coupling=coupling)
    conv, trans = (reached(logits, model) for logits in model(images_of()))
    assert bool(conv & of_branch(model, "trans")) == (coupling in ("both", "up"))
    assert bool(trans & of_branch(model, "conv")) == (coupling in ("both", "down"))
    assert bool(of_branch(model, "down")) == (coupling in ("both", "down"))
    assert bool(of_branch(model, "up")) == (coupling in ("both", "up"))


def test_one_head_alone_leaves_only_what_comes_after_it_without_a_gradient():
    model = toy()
    conv, trans = (reached(logits, model) for logits in model(images_of()))
    names = {name for name, _ in model.named_parameters()}
    assert names - conv == {n for n in names if n.startswith("trans_head.")}
    last = ("conv_block.conv3", "conv_block.bn3", "up", "fusion_block")  # after the tap
    after = tuple(f"blocks.5.{part}." for part in last)
    assert names - trans == {n for n in names if n.startswith(("conv_head.", *after))}


@pytest.mark.parametrize(("branch", "other"), [("conv", "trans"), ("trans", "conv")])
def test_a_branch_alone_is_the_branch_of_an_uncoupled_network(branch, other):
    alone, images = toy(branches=branch).eval(), images_of()
    both = toy(coupling="none").eval()(images)
    logits = alone(images)
    assert getattr(logits, other) is None
    torch.testing.assert_close(getattr(logits, branch), getattr(both, branch), rtol=0, atol=0)
    torch.testing.assert_close(logits.sum(), getattr(logits, branch), rtol=0, atol=0)
    names = {name for name, _ in alone.named_parameters()}
    assert names == of_branch(alone, "stem") | of_branch(alone, branch)


def test_without_coupling_the_class_token_is_not_doubled():
    model, tokens = toy(coupling="up").eval(), torch.randn(2, 17, 48).double()
    block, maps = model.blocks[1], torch.randn(2, 16, 16, 16).double()
    torch.testing.assert_close(block(maps, tokens).tokens, block.trans_block(tokens))


@pytest.mark.parametrize("grid", [(4, 4), (6, 3)])
def test_positions_are_added_in_the_size_of_the_grid(grid):
    maps = torch.randn(2, 64, 4 * grid[0], 4 * grid[1]).double()
    with_positions, plain = toy(pos_embed=4).entry.token_embed, toy().entry.token_embed
    positions = with_positions.pos_embed
    if grid != (4, 4):
        positions = F.interpolate(positions, grid, mode="bicubic", align_corners=False)
    added = with_positions(maps) - plain(maps)
    torch.testing.assert_close(added[:, 1:], positions.flatten(2).mT.expand(2, -1, -1))
    assert not added[:, 0].any()


@pytest.mark.parametrize("side", [0, 4])
def test_only_positions_tell_the_transformer_where_a_patch_was(side):
    model = toy(pos_embed=side).eval()
    blocks = nn.Sequential(*(block.trans_block for block in model.blocks))
    maps = torch.randn(2, 64, 16, 16).double()
    logits = [
        model.trans_head(blocks(model.entry.token_embed(shifted)))
        for shifted in (maps, maps.roll(4, -1))  # by one patch
    ]
    assert torch.allclose(*logits, rtol=1e-9) == (not side)


# What cannot work


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 10}, "^depth must be a multiple of 3, not 10, because"),
        ({"depth": 0}, "^depth must be a whole number of at least 1, not 0"),
        ({"depth": 6.0}, r"^depth must be a whole number of at least 1, not 6\.0"),
        ({"patch_size": 8}, "^patch_size must be a multiple of 16 with the standard stem, not 8"),
        ({"patch_size": 24}, "^patch_size must be a multiple of 16 with the standard stem, not 24"),
        ({"patch_size": 4, "stem": "small"}, "^patch_size must be a multiple of 8 with the small "),
        (
            {"embed_dim": 50},
            "^embed_dim must be a multiple of num_heads, .* 50 is no multiple ",
        ),
        ({"embed_dim": -384}, "^embed_dim must be a whole number of at least 1, not -384"),
        ({"num_heads": True}, "^num_heads must be a whole number of at least 1, not True"),
        ({"num_heads": "6"}, "^num_heads must be a whole number of at least 1, not '6'"),
        ({"in_chans": 0}, "^in_chans must be a whole number of at least 1, not 0"),
        ({"num_classes": -1}, "^num_classes must be a whole number of at least 0, not -1"),
        ({"num_classes": None}, "^num_classes must be a whole number of at least 0, not None"),
        ({"num_med_block": -1}, "^num_med_block must be a whole number of at least 0, not -1"),
        ({"pos_embed": True}, "^pos_embed must be a whole number of at least 0, not True"),
        ({"drop_rate": 1}, "^drop_rate must be a number of at least 0 and below 1, not 1"),
        ({"attn_drop_rate": -0.1}, "^attn_drop_rate must be a number of at least 0 and below 1"),
        ({"drop_path_rate": math.nan}, "^drop_path_rate must be a number .* not nan"),
        ({"drop_path_rate": "0.1"}, r"^drop_path_rate must be a number .* not '0\.1'"),
        ({"drop_path_rate": False}, "^drop_path_rate must be a number .* not False"),
        ({"channel_ratio": 0.3}, r"^channel_ratio must be a multiple of 1/16, not 0\.3, because"),
        ({"channel_ratio": 0}, "^channel_ratio must be a number above 0, not 0"),
        ({"channel_ratio": True}, "^channel_ratio must be a number above 0, not True"),
        ({"channel_ratio": math.nan}, "^channel_ratio must be a number above 0, not nan"),
        ({"drop_rate": 10**400}, "^drop_rate must be a number of at least 0 and below 1"),
        ({"channel_ratio": math.inf}, "^channel_ratio must be a number above 0, not inf"),
        ({"mlp_ratio": math.inf}, "^mlp_ratio must be a number above 0, not inf"),
        ({"mlp_ratio": -4}, "^mlp_ratio must be a number above 0, not -4"),
        ({"mlp_ratio": 0.001}, r"^mlp_ratio 0\.001 leaves the MLP no hidden unit; choose more"),
        ({"qkv_bias": "no"}, "^qkv_bias must be True or False, not 'no'"),
        ({"pad": 1}, "^pad must be True or False, not 1"),
        ({"stem": "tiny"}, "^stem must be one of standard, small, not 'tiny'"),
        ({"fcu_down": "area"}, "^fcu_down must be one of average, max, .*, not 'area'"),
        ({"fcu_up": "average"}, "^fcu_up must be one of nearest, bilinear, not 'average'"),
        ({"coupling": True}, "^coupling must be one of both, down, up, none, not True"),
        ({"branches": "cnn"}, "^branches must be one of both, conv, trans, not 'cnn'"),
    ],
    ids=shown,
)
def test_configs_that_cannot_work_are_refused_with_the_rule(changes, words):
    refused(words, ConformerConfig, **changes)
    refused(words, create_model, "conformer_tiny_patch16", **changes)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (
            "conformer_tiny",
            {},
            "^there is no model 'conformer_tiny'; choose conformer_tiny_patch16",
        ),
        ("vit", {}, "^there is no model 'vit'; choose conformer_base_patch16, conformer_micro, "),
        ("conformer_micro", {"classes": 5}, "^ConformerConfig has no field 'classes'; choose num_"),
        ("conformer_micro", {"patchsize": 8}, "no field 'patchsize'; choose patch_size"),
        ("conformer_micro", {"zzz": 8}, "no field 'zzz'; choose patch_size, in_chans, "),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, changes, words):
    refused(words, create_model, name, **changes)


def test_a_card_of_an_unknown_model_is_refused():
    refused(
        "^there is no model 'conformer_smal_patch16'; choose", model_card, "conformer_smal_patch16"
    )


def test_a_config_stands_and_can_be_compared():
    with pytest.raises(FrozenInstanceError):
        TOY.depth = 12
    assert VARIANTS["conformer_tiny_patch16"] == ConformerConfig()
    assert len(set(VARIANTS.values())) == len(VARIANTS)


def test_a_rate_may_be_whole_or_broken():
    config = ConformerConfig(drop_rate=0, drop_path_rate=0.1, channel_ratio=2, mlp_ratio=2.5)
    assert stage_widths(config) == (128, 256, 512)


def test_blocks_are_numbered_as_in_the_book():
    model = on_meta(TOY)
    kinds = [isinstance(block, ConvTransBlock) for block in model.blocks]
    assert kinds == [False, True, True, True, True, True]
    assert all(isinstance(block.trans_block, TransformerBlock) for block in model.blocks)
