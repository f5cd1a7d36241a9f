"""What the network costs, and the forms that compute the same and cost less."""

import copy
import itertools
import json
import math
import runpy
from functools import cache, partial
from pathlib import Path

import matplotlib
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from conformer_src import cost
from conformer_src.checks import golden
from conformer_src.conformer import CARDS, VARIANTS, Conformer, ConformerConfig, create_model
from conformer_src.conv_block import ConvBlock, count_macs, count_parameters
from conformer_src.cost import (
    WAYS,
    Cost,
    Int8Linear,
    Limits,
    Timing,
    block_of,
    branch_of,
    count_costs,
    exact_forms,
    fit_exponent,
    fold_norms,
    gains,
    kept_bytes,
    machine_limits,
    measure_growth,
    optimize_for_inference,
    part_of,
    plot_blocks,
    plot_roofline,
    quantize_linears,
    race,
    roofline,
    run,
    sum_costs,
    time_parts,
    to_int8,
)
from conformer_src.fcu import DOWN_MODES, FCUDown, FCUUp
from conformer_src.weights import official_name

matplotlib.use("Agg")

BENCHMARK = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/cost.py"))
TOY = {"num_classes": 10, "channel_ratio": 0.25, "embed_dim": 48, "depth": 6, "num_heads": 3}
CHOICES = [
    {},
    {"stem": "small", "patch_size": 8},
    {"num_med_block": 1, "fcu_down": "conv"},
    {"branches": "conv"},
    {"branches": "trans"},
    {"coupling": "down"},
    {"coupling": "up", "fcu_up": "bilinear"},
    {"coupling": "none", "pos_embed": 3},
    {"patch_size": 32, "num_med_block": 2, "fcu_down": "max"},
]
PUBLISHED = {  # G, as far as it was printed: the paper, OpenMMLab's page; then million parameters
    "conformer_tiny_patch16": ("5.2", "4.90", "23.52"),
    "conformer_small_patch16": ("10.6", "10.31", "37.67"),
    "conformer_small_patch32": (None, "7.09", "38.85"),
    "conformer_base_patch16": ("23.3", "22.89", "83.29"),
}
COUNTED = {  # G, three decimals: fvcore on the authors' code, convolutions and linear maps alone
    "conformer_tiny_patch16": ("5.250", "4.868"),
    "conformer_small_patch16": ("10.651", "10.242"),
    "conformer_small_patch32": ("7.087", "7.023"),
    "conformer_base_patch16": ("23.403", "22.789"),
}
SHARES = {  # CNN, transformer, FCU: million parameters, and G as fvcore counts
    "conformer_tiny_patch16": ("1.11 22.07 0.35", "0.47 4.63 0.15"),
    "conformer_small_patch16": ("14.26 22.07 1.34", "5.43 4.63 0.60"),
    "conformer_small_patch32": ("14.26 23.25 1.34", "5.43 1.16 0.50"),
    "conformer_base_patch16": ("31.24 49.03 3.01", "11.98 10.08 1.34"),
}


def toy(**changes):
    """A small network whose BatchNorms are far from the identity, in evaluation mode."""
    return golden.fill_(Conformer(ConformerConfig(**TOY | changes)), official_name).eval()


def images_of(batch=2):
    return golden.image(batch, 3, 64, 96)


def norms(module):
    return [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]


@pytest.mark.parametrize("changes", CHOICES, ids=str)
def test_folding_leaves_no_batchnorm_and_the_same_numbers(changes):
    model, images = toy(**changes).double(), images_of().double()
    assert norms(model)
    expected = [part for part in model(images) if part is not None]
    folded = fold_norms(model)
    assert folded is model
    assert norms(folded) == []
    found = [part for part in folded(images) if part is not None]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_single_parts_fold_too():
    block = golden.fill_(ConvBlock(8, 16, 2, project_shortcut=True).double()).eval()
    up = golden.fill_(FCUUp(12, 4, 2).double()).eval()
    maps, tokens = torch.randn(2, 8, 6, 6).double(), torch.randn(2, 10, 12).double()
    before = block(maps), up(tokens, maps)
    after = fold_norms(block)(maps), fold_norms(up)(tokens, maps)
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-12)
    assert norms(block) == norms(up) == []


def test_folding_twice_changes_nothing():
    model, images = fold_norms(toy()), images_of()
    torch.testing.assert_close(fold_norms(copy.deepcopy(model))(images), model(images))


def test_folding_in_training_mode_is_refused_and_leaves_the_model_alone():
    model = toy()
    model.blocks[3].up.train()
    before = len(norms(model))
    with pytest.raises(ValueError, match=r"^.* training mode .* \.eval\(\)") as error:
        fold_norms(model)
    assert "\n" not in str(error.value)
    assert len(norms(model)) == before


@pytest.mark.parametrize("changes", CHOICES, ids=str)
@torch.no_grad()
def test_the_fast_form_computes_the_same(changes):
    model, images = toy(**changes), images_of()
    fast = optimize_for_inference(model, compile=False)
    for found, expected in zip(fast(images), model(images), strict=True):
        if expected is None:
            assert found is None
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_fast_form_is_in_evaluation_mode_and_learns_nothing():
    fast = optimize_for_inference(toy().train(), compile=False)
    assert norms(fast) == []
    assert not any(part.training for part in fast.modules())
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    kernels = [part.weight for part in fast.modules() if isinstance(part, nn.Conv2d)]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


def test_the_original_stays_and_can_be_trained_on():
    model, images = toy().train(), images_of()
    before = copy.deepcopy(model.state_dict())
    optimize_for_inference(model, compile=False)(images)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training
    assert all(part.training for part in norms(model))
    model(images).sum().square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@cache
def costs_of(name):
    """What a variant costs for an image of its card, counted without any values."""
    with torch.device("meta"):
        return count_costs(create_model(name), torch.empty(1, 3, *2 * [CARDS[name].image_size]))


def small(**changes):
    return toy(depth=3, **changes)


def total(costs, way):
    return sum(cost.macs(way) for cost in costs)


def state_of(model):
    """Everything that measuring must leave as it was."""
    modes = [part.training for part in model.modules()]
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    return copy.deepcopy(model.state_dict()), modes, hooks, torch.get_rng_state()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_papers_way_gives_the_cards(name):
    costs = costs_of(name)
    assert total(costs, "paper") == CARDS[name].macs
    assert sum(cost.parameters for cost in costs) == CARDS[name].parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_published_numbers_come_out_to_the_printed_digit(name):
    costs = costs_of(name)
    paper, openmmlab, parameters = PUBLISHED[name]
    assert paper in (None, f"{total(costs, 'paper') / 1e9:.1f}")
    assert f"{total(costs, 'openmmlab') / 1e9:.2f}" == openmmlab
    assert f"{sum(cost.parameters for cost in costs) / 1e6:.2f}" == parameters
    found = tuple(f"{total(costs, way) / 1e9:.3f}" for way in ("fvcore", "layers"))
    assert found == COUNTED[name]


def test_openmmlabs_page_is_met_in_each_digit():
    pages = (4_899_611_328, 10_311_309_312, 7_087_281_792, 22_892_078_080)
    found = tuple(total(costs_of(name), "openmmlab") for name in PUBLISHED)
    assert found == pages


def test_operations_are_twice_the_multiply_accumulates_of_base():
    macs = total(costs_of("conformer_base_patch16"), "paper")
    assert 2 * float(f"{macs / 1e9:.1f}") == 46.6


@pytest.mark.parametrize("name", SHARES)
def test_the_branches_have_the_known_shares(name):
    sums = sum_costs(costs_of(name), branch_of)
    branches = ("CNN", "transformer", "FCU")
    assert set(sums) == set(branches)
    for key, unit, expected in zip(("parameters", "fvcore"), (1e6, 1e9), SHARES[name], strict=True):
        assert " ".join(f"{sums[branch][key] / unit:.2f}" for branch in branches) == expected


@pytest.mark.parametrize("changes", CHOICES, ids=str)
def test_what_runs_here_is_what_torch_counts_block_by_block(changes):
    model, images = toy(**changes), images_of()
    costs = count_costs(model, images)
    assert total(costs, "ours") == count_macs(model, images)
    assert sum(cost.parameters for cost in costs) == count_parameters(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    by_torch, sums = counter.get_flop_counts(), sum_costs(costs, block_of)
    for number in range(1, model.config.depth + 1):
        operations = sum(by_torch[f"Conformer.blocks.{number - 1}"].values())
        assert 2 * sums[str(number)]["ours"] == operations
    for name in ("conv_head", "trans_head"):
        operations = sum(by_torch.get(f"Conformer.{name}", {}).values())
        assert 2 * sum_costs(costs, part_of).get(name, {}).get("ours", 0) == operations


def test_counts_grow_with_the_batch_and_nothing_else():
    model = toy()
    one, three = (count_costs(model, images_of(batch)) for batch in (1, 3))
    assert [cost.name for cost in one] == [cost.name for cost in three]
    for single, triple in zip(one, three, strict=True):
        assert all(triple.macs(way) == 3 * single.macs(way) for way in WAYS)
        assert triple.parameters == single.parameters


@pytest.mark.parametrize("mode", DOWN_MODES)
def test_only_average_pooling_has_an_order_of_the_authors(mode):
    costs = count_costs(toy(fcu_down=mode), images_of())
    ordered = {part_of(each.name) for each in costs if each.counts["order"]}
    stages_that_pool = {f"blocks.{index}.down" for index in (1, 2, 3)}
    assert ordered == (stages_that_pool if mode == "average" else set())


def test_the_order_of_the_authors_costs_what_it_says():
    model, images = toy(), images_of()
    written = exact_forms(model)["as written"]
    assert total(count_costs(model, images), "paper") == count_macs(written, images)
    assert total(count_costs(written, images), "ours") == count_macs(written, images)
    for way in ("paper", "fvcore", "layers"):
        assert total(count_costs(written, images), way) == total(count_costs(model, images), way)


def test_bytes_are_those_of_the_operations():
    """A linear map reads input, weights and biases and writes its output, in four bytes each."""
    found = {each.name: each.counts["bytes"] for each in count_costs(toy(), images_of())}
    rows, width, hidden = 2 * 25, 48, 192  # tokens of two images of 64 x 96
    numbers = rows * width + width * hidden + hidden + rows * hidden
    assert found["blocks.2.trans_block.mlp.fc1"] == 4 * numbers
    assert found["blocks.2.trans_block.mlp.act"] == 4 * 2 * rows * hidden
    assert found["blocks.2.trans_block.attn"] == 4 * 4 * rows * width


def test_fused_attention_and_folded_norms_move_fewer_bytes():
    model, images = toy(), images_of()
    moved = {
        name: sum(each.counts["bytes"] for each in count_costs(form, images))
        for name, form in exact_forms(model).items()
    }
    written = moved["as written"]
    assert all(
        moved[name] < written for name in moved if name not in ("as written", "channels last")
    )
    assert moved["channels last"] == written
    assert moved["all four"] == min(moved.values())


def test_names_tell_part_block_and_branch():
    assert part_of("blocks.3.up.bn") == "blocks.3.up"
    assert part_of("entry.stem.conv1") == "entry.stem"
    assert part_of("trans_head.fc") == "trans_head"
    assert [block_of(name) for name in ("entry.stem", "blocks.11.up.bn", "conv_head")] == [
        "entry",
        "12",
        "heads",
    ]
    known = {
        "CNN": ("entry.stem", "blocks.0.conv_block", "blocks.4.med_block.0", "conv_head.fc"),
        "transformer": ("entry.token_embed.proj", "blocks.0.trans_block.attn", "trans_head"),
        "FCU": ("blocks.1.down.ln", "blocks.1.up.bn", "blocks.1"),
    }
    for branch, names in known.items():
        assert {branch_of(name) for name in names} == {branch}


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="no way of counting 'timm'; choose paper, "):
        count_costs(toy(), images_of())[0].macs("timm")


def require_untouched(model, measure):
    model.blocks[0].eval()
    before = state_of(model)
    found = measure()
    after = state_of(model)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1:3] == before[1:3]
    assert torch.equal(after[3], before[3])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()
    return found


@pytest.mark.parametrize("changes", CHOICES, ids=str)
def test_measuring_works_on_all_variants_and_leaves_the_model_as_it_was(changes):
    model, images = small(drop_rate=0.1, drop_path_rate=0.1, **changes).train(), images_of()
    costs = require_untouched(model, lambda: count_costs(model, images))
    timings = require_untouched(model, lambda: time_parts(model, images, 1, training=True))
    kept = require_untouched(model, lambda: kept_bytes(model, images))
    names = [timing.part for timing in timings]
    assert len(set(names)) == len(names)
    assert names[:2] == ["entry", "entry.stem"]
    assert names[-2:] == ["conv_head", "trans_head"]
    assert all(part_of(name) == name for name in names)
    assert {part_of(each.name) for each in costs} <= set(names)
    assert set(kept) <= set(names)
    busy = {timing.part for timing in timings if timing.seconds > 0}
    assert busy >= {part_of(each.name) for each in costs if each.macs("ours")}


def test_timing_without_training_keeps_nothing_for_a_backward_pass():
    model, images = small(), images_of()
    found = require_untouched(model.train(), lambda: time_parts(model, images, 1))
    block = next(timing for timing in found if timing.part == "blocks.1.trans_block")
    assert block.bytes == 2 * 25 * 48 * 4  # its output alone


def test_profiler_and_autograd_agree_on_what_a_training_step_keeps():
    model, images = toy(), images_of(4)
    by_autograd = kept_bytes(model, images)
    timings = time_parts(model, images, 1, training=True)
    by_profiler = sum(timing.bytes for timing in timings)
    assert by_profiler == pytest.approx(sum(by_autograd.values()), rel=0.1)
    found = {timing.part: timing.bytes for timing in timings}
    for part in ("blocks.3.trans_block", "blocks.3.fusion_block"):
        assert found[part] == pytest.approx(by_autograd[part], rel=0.05)


@torch.no_grad()
def test_the_compiled_form_computes_the_same():
    model, images = toy(depth=3), images_of()
    fast, expected = optimize_for_inference(model), model(images)
    for part in zip(fast(images), expected, strict=True):
        torch.testing.assert_close(*part, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


def test_what_is_kept_is_what_can_be_named():
    """An MLP keeps the inputs of its two linear maps and of the GELU between them."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.trans_head = toy(branches="trans").blocks[1].trans_block.mlp

        def forward(self, tokens):
            return self.trans_head(tokens)

    tokens, hidden = 2 * 25 * 48 * 4, 2 * 25 * 192 * 4
    kept = kept_bytes(Tokens(), torch.randn(2, 25, 48))
    assert kept == {"trans_head": tokens + 2 * hidden}


def test_kept_bytes_grow_with_the_batch():
    model = small()
    one, two = (sum(kept_bytes(model, images_of(batch)).values()) for batch in (2, 4))
    assert two == pytest.approx(2 * one, rel=0.05)


def test_checkpointing_keeps_little_more_than_what_enters_the_blocks():
    model, images = small(), images_of()
    plain = kept_bytes(model, images)
    model.checkpointing = True
    kept = kept_bytes(model, images)
    assert not any(name.startswith("blocks") for name in kept)
    assert kept["entry.stem"] == plain["entry.stem"]
    in_blocks = sum(count for name, count in plain.items() if name.startswith("blocks"))
    assert 0 < kept[""] < 0.25 * in_blocks


def test_a_compiled_model_is_refused_by_what_looks_into_it():
    model, images = torch.compile(small()), images_of()
    for look in (count_costs, time_parts, kept_bytes):
        with pytest.raises(ValueError, match="compiled") as error:
            look(model, images)
        assert "\n" not in str(error.value)


def test_forms_take_turns_and_the_first_round_does_not_count():
    calls, ticks = [], itertools.count()
    forms = {name: partial(calls.append, name) for name in "abc"}
    seconds = race(forms, 3, clock=lambda: float(next(ticks)))
    assert "".join(calls) == "cba" + "abc" + "cba" + "abc"
    assert seconds == {name: [1.0, 1.0, 1.0] for name in "abc"}


def test_a_gain_is_the_median_of_the_rounds_own_ratios():
    found = gains({"plain": [2.0, 9.0, 4.0], "fast": [1.0, 3.0, 4.0]})
    assert found["plain"] == (4.0, 1.0, 0.0)
    assert found["fast"] == (3.0, 2.0, 0.5)


@pytest.mark.parametrize("power", [0.5, 1, 2, 4])
def test_the_exponent_of_a_power_law_is_found(power):
    sizes = [3, 5, 8, 21]
    assert fit_exponent(sizes, [7 * size**power for size in sizes]) == pytest.approx(power)


def test_too_little_to_measure_is_refused():
    for sizes, costs in (
        ([2], [3]),
        ([2, 2], [3, 4]),
        ([1, 2], [0, 3]),
        ([0, 1], [1, 2]),
        ([], []),
    ):
        with pytest.raises(ValueError, match="two different sizes"):
            fit_exponent(sizes, costs)
    with pytest.raises(ValueError, match="1 rounds are too few to tell; choose at least 2"):
        race({}, 1)
    with pytest.raises(ValueError, match="0 rounds are too few to tell; choose at least 1"):
        time_parts(small(), images_of(), 0)


def test_growth_predicts_by_counting():
    model = toy(depth=3)
    cases = {batch: (model, images_of(batch)) for batch in (1, 2, 4)}
    growth = measure_growth(cases, rounds=2)
    assert growth.sizes == [1, 2, 4]
    assert growth.macs == [batch * count_macs(model, images_of(1)) for batch in (1, 2, 4)]
    assert growth.predicted == pytest.approx(1)
    assert growth.measured == pytest.approx(fit_exponent(growth.sizes, growth.seconds))


def test_attention_grows_with_the_fourth_power_of_the_side_and_the_rest_with_the_square():
    sides, model = (128, 256, 512), toy()
    found = [count_costs(model, torch.empty(1, 3, side, side)) for side in sides]
    convolutions = [sum(each.counts["conv"] for each in costs) for costs in found]
    attention = [sum(each.counts["attention"] for each in costs) for costs in found]
    assert fit_exponent(sides, convolutions) == pytest.approx(2)
    assert fit_exponent(sides, attention) == pytest.approx(4, abs=0.03)  # the class token


def test_a_device_shows_its_limits():
    limits = machine_limits(side=64)
    assert all(math.isfinite(limit) and limit > 0 for limit in limits)


def costed(part, macs, moved):
    counts = cost.Counter(conv=macs, bytes=moved)
    return Cost(f"{part}.conv1", 0, counts)


def test_the_roof_is_arithmetic_or_memory_whichever_is_less():
    costs = [costed("blocks.0.conv_block", 100, 10), costed("blocks.1.up", 10, 100)]
    timings = [Timing("blocks.0.conv_block", 2.0, 0), Timing("blocks.1.up", 5.0, 0)]
    timings.append(Timing("blocks.1.med_block", 1.0, 0))  # multiplies nothing, is left out
    first, second = roofline(costs, timings, Limits(macs=80.0, bytes=40.0))
    assert first == ("blocks.0.conv_block", 10.0, 50.0, 80.0)
    assert second == ("blocks.1.up", 0.1, 2.0, 4.0)


@pytest.mark.parametrize("changes", CHOICES, ids=str)
def test_all_parts_that_multiply_come_under_the_roof_and_into_the_picture(changes):
    model, images = small(**changes), images_of()
    costs, limits = count_costs(model, images), Limits(1e9, 1e9)
    roofs = roofline(costs, time_parts(model, images, 1), limits)
    assert {roof.part for roof in roofs} == {part_of(c.name) for c in costs if c.macs("ours")}
    assert all(roof.roof == min(1e9, roof.intensity * 1e9) for roof in roofs)
    axes = plot_roofline(roofs, limits)
    assert sum(len(points.get_offsets()) for points in axes.collections) == len(roofs)
    matplotlib.pyplot.close(axes.figure)


@pytest.mark.parametrize("changes", CHOICES, ids=str)
def test_bars_show_each_block_and_lose_nothing(changes):
    costs = count_costs(small(**changes), images_of())
    axes = plot_blocks({each.name: each.macs() for each in costs}, "MACs")
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["entry", *(str(number) for number in range(1, 4)), "heads"]
    assert sum(bar.get_height() for bar in axes.patches) == total(costs, "paper")
    assert axes.get_ylabel() == "MACs"
    matplotlib.pyplot.close(axes.figure)


@pytest.mark.parametrize("changes", CHOICES, ids=str)
@torch.no_grad()
def test_all_exact_forms_compute_the_same(changes):
    model, images = toy(**changes).double(), images_of().double()
    expected = [part for part in model(images) if part is not None]
    forms = exact_forms(model)
    assert next(iter(forms)) == "as written"
    assert len(forms) == 6
    for form in forms.values():
        assert form is not model
        found = [part for part in run(form, images) if part is not None]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_each_form_has_its_own_rewrite_and_no_other():
    def traits(form):
        parts = list(form.modules())
        return (
            any(type(part) is FCUDown for part in parts),
            any(type(part) is cost.Attention for part in parts),
            not norms(form),
            form.blocks[2].conv_block.conv2.weight.is_contiguous(memory_format=torch.channels_last),
        )

    found = [traits(form) for form in exact_forms(toy()).values()]
    alone = [tuple(place == number for place in range(4)) for number in range(4)]
    assert found == [(False,) * 4, *alone, (True,) * 4]


def test_rounding_to_eight_bits_is_off_by_half_a_step_at_most():
    values = torch.randn(20, 33) * torch.logspace(-6, 3, 20)[:, None]
    rounded, steps = to_int8(values)
    assert rounded.dtype == torch.int8
    assert (rounded.abs().amax(1) == 127).all()
    assert ((rounded * steps - values).abs() <= steps * 0.5001).all()
    zeros, step = to_int8(torch.zeros(2, 3))
    assert not zeros.any()
    assert step.isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
def test_int8_multiplies_the_rounded_numbers_exactly(bias):
    linear, tokens = nn.Linear(32, 24, bias=bias), torch.randn(2, 9, 32)
    small = Int8Linear(linear)
    rounded = [part * steps for part, steps in (to_int8(linear.weight), to_int8(tokens[0]))]
    expected = rounded[1] @ rounded[0].t() + (linear.bias if bias else 0)
    torch.testing.assert_close(small(tokens)[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small(tokens), linear(tokens), rtol=0.1, atol=0.05)
    assert count_parameters(small) == 0


@pytest.mark.parametrize("changes", CHOICES, ids=str)
@torch.no_grad()
def test_quantized_linears_give_nearly_the_same(changes):
    model, images = toy(**changes), images_of()
    small = quantize_linears(model)
    for found, expected in zip(small(images), model(images), strict=True):
        if expected is not None:
            assert (found - expected).norm() < 0.1 * expected.norm()
    left = [name for name, part in small.named_modules() if isinstance(part, nn.Linear)]
    assert set(left) <= {"conv_head.fc", "trans_head.fc"}
    has_tokens = model.config.branches != "conv"
    assert any(isinstance(part, Int8Linear) for part in small.modules()) == has_tokens
    assert not any(isinstance(part, Int8Linear) for part in model.modules())
    counted = [total(count_costs(form, images), "paper") for form in (small, model)]
    assert counted[0] == counted[1]


@torch.no_grad()
def test_bfloat16_runs_under_autocast():
    model, images = toy(), images_of()
    exact, rounded = run(model, images), run(model, images, bfloat16=True)
    assert not exact.conv.requires_grad
    assert rounded.conv.dtype == torch.bfloat16
    assert (rounded.trans - exact.trans).norm() < 0.1 * exact.trans.norm()


def test_the_benchmark_replaces_the_row_that_it_measures_again(tmp_path):
    path = tmp_path / "results" / "cost.json"
    for part, model, found in (("roof", "tiny", 1), ("counts", "tiny", 2), ("roof", "tiny", 3)):
        BENCHMARK["store"](path, {"part": part, "model": model, "found": found})
    rows = BENCHMARK["stored"](path)
    assert [(row["part"], row["found"]) for row in rows] == [("counts", 2), ("roof", 3)]
    assert [file.name for file in path.parent.iterdir()] == ["cost.json"]


def test_the_benchmarks_table_shows_each_form_but_the_first():
    found = {"plain": {"ratio": 1.0, "spread": 0.0}, "fast": {"ratio": 1.234, "spread": 0.056}}
    rows = [{"part": "exact", "model": model, "found": found} for model in ("micro", "tiny")]
    assert BENCHMARK["race_table"](rows, "exact").splitlines()[2:] == [
        "| fast | 1.23 ± 0.06 | 1.23 ± 0.06 |"
    ]
    for name, table in BENCHMARK["tables"]([]).items():
        assert len(table.splitlines()) == 2, name


def test_a_race_of_the_benchmark_says_how_far_the_logits_are_off(monkeypatch):
    monkeypatch.setitem(BENCHMARK["SIZES"], "micro", (2, 32))
    exact, inexact = (BENCHMARK[part]("micro", 2) for part in ("exact", "inexact"))
    assert all(form["deviation"] < 1e-4 for form in exact.values())
    assert 1e-4 < inexact["int8 linear maps"]["deviation"] < 0.2
    assert next(iter(exact.values()))["ratio"] == next(iter(inexact.values()))["ratio"] == 1


def test_the_stored_counts_are_those_of_today():
    result = json.loads(BENCHMARK["RESULT"].read_text())
    assert result["command"] == "python benchmarks/cost.py"
    assert {"processor", "machine", "seed", "versions"} <= result.keys()
    assert all({"date", "rounds", "load"} <= row.keys() for row in result["rows"])
    counted = BENCHMARK["find"](result["rows"], "counts", "tiny")
    for name in VARIANTS:
        assert counted[name] == {way: total(costs_of(name), way) for way in WAYS}
