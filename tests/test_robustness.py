"""Scale and rotation: what the changes do to images, and what curves say about a network."""

import copy
import json
import math
import runpy
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from conformer_src.ablation import fashion_study
from conformer_src.conformer import VARIANTS, Conformer, ConformerConfig, create_model
from conformer_src.data import FASHION_MEAN, FASHION_STD, FashionSubset, fashion_transform
from conformer_src.robustness import (
    Spread,
    accuracy_curve,
    black_level,
    over_seeds,
    plot_curves,
    reframe,
    refresh_norms,
    resize,
    retention,
    rotate,
)
from conformer_src.training import Scores, evaluate

ROOT = Path(__file__).resolve().parents[1]
TOY = {"num_classes": 10, "channel_ratio": 0.25, "embed_dim": 24, "depth": 3, "num_heads": 3}
CHOICES = [
    *({"patch_size": side, "pad": pad} for side in (16, 32) for pad in (False, True)),
    *({"branches": branch} for branch in ("conv", "trans")),
    *({"coupling": way} for way in ("down", "up", "none")),
    {"pos_embed": 4},
    {"branches": "trans", "pos_embed": 3, "stem": "small"},
    {"num_med_block": 1, "stem": "small", "in_chans": 1},
    {"num_med_block": 2},
]
FILL = [-1.0, 2.0, 0.5]


def toy(**changes):
    return Conformer(ConformerConfig(**TOY | changes))


def batch(count=6, chans=3, side=64):
    return torch.randn(count, chans, side, side), torch.arange(count) % 10


def one_sentence(error):
    text = str(error.value)
    return "\n" not in text and text.endswith(".")


# What the changes do to images


def test_black_is_what_the_transform_makes_of_zeros():
    black = fashion_transform(train=False)(torch.zeros(1, 28, 28, dtype=torch.uint8))
    (fill,) = black_level(FASHION_MEAN, FASHION_STD)
    assert black.unique().tolist() == pytest.approx([fill])
    assert fill == pytest.approx(-0.81, abs=0.005)


def test_a_mean_without_a_deviation_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        black_level([0.5, 0.5], [0.2])


@pytest.mark.parametrize("change", [resize, partial(reframe, fill=FILL)])
def test_the_own_size_changes_nothing(change):
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(change(images, 32), images)


def test_the_angle_zero_changes_nothing():
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(rotate(images, 0, FILL), images)


def test_resizing_keeps_the_proportions_and_goes_by_the_shorter_side():
    assert resize(torch.randn(2, 3, 64, 96), 32).shape == (2, 3, 32, 48)
    assert resize(torch.randn(2, 3, 96, 64), 128).shape == (2, 3, 192, 128)


def test_resizing_commutes_with_normalisation():
    images = torch.rand(2, 1, 32, 32).double()
    for size in (16, 24, 48):
        torch.testing.assert_close(
            resize((images - 0.3) / 0.4, size), (resize(images, size) - 0.3) / 0.4
        )


def test_shrinking_passes_no_pixel_over():
    dot = torch.zeros(1, 1, 32, 32)
    dot[..., 13, 18] = 1
    assert resize(dot, 8).sum().item() == pytest.approx(1 / 16, rel=1e-4)


def test_a_larger_frame_has_the_images_in_its_middle_and_the_fill_around():
    images = torch.randn(2, 3, 32, 32)
    framed = reframe(images, 48, FILL)
    assert framed.shape == (2, 3, 48, 48)
    assert torch.equal(framed[..., 8:40, 8:40], images)
    assert framed[:, :, :8].amax((0, 2, 3)).tolist() == FILL
    assert framed[..., 40:].amin((0, 2, 3)).tolist() == FILL


def test_a_smaller_frame_is_the_middle_and_odd_rests_are_shared():
    images = torch.randn(2, 3, 33, 40)
    framed = reframe(images, 34, FILL)
    assert torch.equal(framed[..., :33, :], images[..., 3:37])
    assert torch.equal(reframe(framed, 24, FILL), framed[..., 5:29, 5:29])


@pytest.mark.parametrize("turns", [1, 2, 3, -1])
def test_quarter_turns_go_against_the_clock_and_lose_nothing(turns):
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(rotate(images, 90 * turns, FILL), images.rot90(turns, (-2, -1)))


def test_the_corners_of_a_turned_image_are_filled_for_each_channel():
    turned = rotate(torch.zeros(1, 3, 32, 32), 45, FILL)
    corners = turned[0, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, torch.tensor(FILL).unsqueeze(1).expand(3, 4))
    torch.testing.assert_close(turned[0, :, 16, 16], torch.zeros(3))


def test_a_turned_black_image_stays_black():
    """With `fill`, torchvision 0.29 leaves a seam of up to a fifth of the way to 0."""
    fill = black_level(FASHION_MEAN, FASHION_STD)
    black = torch.full((1, 1, 32, 32), fill[0])
    for angle in (15, 45, 77):
        torch.testing.assert_close(rotate(black, angle, fill), black)


@pytest.mark.parametrize("size", [0, -3, 16.0, "32", True])
@pytest.mark.parametrize("change", [resize, partial(reframe, fill=FILL)])
def test_a_size_that_is_none_is_refused(change, size):
    with pytest.raises(ValueError, match=r"^size must be a whole number of pixels") as error:
        change(torch.randn(1, 3, 8, 8), size)
    assert one_sentence(error)


# Curves


@pytest.mark.parametrize("changes", CHOICES, ids=str)
def test_all_variants_have_curves_over_sizes_and_angles(changes):
    model = toy(**changes)
    chans, side = model.config.in_chans, 64
    images, labels = batch(chans=chans, side=side)
    fill = FILL[:chans]
    sizes = accuracy_curve(model, images, labels, resize, [32, 64, 96], batch_size=4)
    angles = accuracy_curve(model, images, labels, partial(rotate, fill=fill), [0, 30.5])
    assert list(sizes) == [32, 64, 96]
    assert list(angles) == [0, 30.5]
    assert sizes[64] == pytest.approx(angles[0])
    for scores in (*sizes.values(), *angles.values()):
        assert scores.images == 6
        assert math.isfinite(scores.loss)
        assert (scores.conv is None) == (model.config.branches == "trans")
        assert (scores.trans is None) == (model.config.branches == "conv")
        assert 0 <= scores.sum <= 100


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_the_five_networks_have_curves(name):
    model = create_model(name, in_chans=1, num_classes=10)
    curve = accuracy_curve(model, *batch(2, 1, 32), resize, [32, 64])
    assert [scores.images for scores in curve.values()] == [2, 2]


def test_the_unchanged_value_is_what_evaluate_says():
    model = create_model("conformer_micro", in_chans=1)
    images = fashion_transform(train=False)(FashionSubset(train=False).images[::40])
    labels = FashionSubset(train=False).labels[::40]
    curve = accuracy_curve(model, images, labels, resize, [32, 24], batch_size=17)
    expected = evaluate(model, TensorDataset(images, labels))
    assert curve[32] == pytest.approx(expected)
    smaller = evaluate(model, TensorDataset(resize(images, 24), labels))
    assert curve[24] == pytest.approx(smaller)


def test_a_curve_leaves_mode_weights_and_images_alone():
    model, (images, labels) = toy().train(), batch()
    model.conv_head.eval()
    before, kept = copy.deepcopy(model.state_dict()), images.clone()
    accuracy_curve(model, images, labels, partial(rotate, fill=FILL), [10])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(images, kept)
    assert model.training
    assert not model.conv_head.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_size_that_does_not_fit_is_refused_before_anything_is_computed():
    model, calls = toy(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(
        ValueError, match=r"value 40 .* 29 to 32 or 45 to 48 does.*pad=True"
    ) as error:
        accuracy_curve(model, *batch(), resize, [64, 40])
    assert one_sentence(error)
    assert calls == []
    assert accuracy_curve(toy(pad=True), *batch(), resize, [40])[40].images == 6


def test_the_small_stem_names_its_own_sizes():
    model = toy(stem="small", patch_size=8)
    with pytest.raises(ValueError, match="15 to 16 or 23 to 24"):
        accuracy_curve(model, *batch(), resize, [20])


@pytest.mark.parametrize(
    ("images", "labels", "values", "words"),
    [
        (torch.randn(2, 1, 64, 64), torch.arange(2), [64], "expected"),
        (torch.randn(2, 3, 64, 64), torch.arange(3), [64], "labels are"),
        (torch.randn(2, 3, 64, 64), torch.tensor([0, 10]), [64], "label 10"),
        (torch.randn(0, 3, 64, 64), torch.arange(0), [64], "0 images"),
        (torch.randn(2, 3, 64, 64), torch.arange(2), [], "0 values"),
    ],
)
def test_what_makes_no_curve_is_refused(images, labels, values, words):
    with pytest.raises(ValueError, match=words) as error:
        accuracy_curve(toy(), images, labels, resize, values)
    assert "\n" not in str(error.value)


# Retention and spread


def curve(*right, conv=None):
    return {8 * n: Scores(100, 1.0, conv, None, value) for n, value in enumerate(right, 2)}


def test_retention_is_relative_to_the_value_of_training():
    assert retention(curve(20.0, 60.0, 80.0), 32) == {16: 25.0, 24: 75.0, 32: 100.0}
    own = retention(curve(20.0, 60.0, conv=50.0), 24, head="conv")
    assert own == {16: 100.0, 24: 100.0}


@pytest.mark.parametrize(
    ("rows", "trained", "head", "words"),
    [
        (curve(20.0, 60.0), 32, "sum", "at 32"),
        (curve(20.0, 0.0), 24, "sum", "at 24"),
        (curve(20.0, 60.0), 24, "conv", "no conv head"),
        (curve(20.0, 60.0), 24, "cnn", "not 'cnn'"),
    ],
)
def test_retention_without_something_to_compare_with_is_refused(rows, trained, head, words):
    with pytest.raises(ValueError, match=words) as error:
        retention(rows, trained, head)
    assert one_sentence(error)


def test_the_spread_is_that_of_the_seeds():
    found = over_seeds([curve(10.0, 50.0), curve(20.0, 50.0), curve(30.0, 50.0)])
    assert found == {16: Spread(3, 20.0, 10.0), 24: Spread(3, 50.0, 0.0)}


def test_one_seed_has_no_spread():
    (row,) = over_seeds([curve(10.0)]).values()
    assert (row.seeds, row.mean) == (1, 10.0)
    assert math.isnan(row.deviation)


@pytest.mark.parametrize("curves", [[], [curve(1.0), curve(1.0, 2.0)]])
def test_curves_that_do_not_go_together_are_refused(curves):
    with pytest.raises(ValueError, match="at least one curve") as error:
        over_seeds(curves)
    assert one_sentence(error)


def test_the_drawing_shows_means_and_bands():
    seeds = [curve(10.0, 50.0), curve(20.0, 60.0)]
    _, axis = plt.subplots()
    plot_curves({"CNN": over_seeds(seeds), "another": over_seeds(seeds[:1])}, "pixels", axis)
    first, second = axis.get_lines()
    assert first.get_xydata().tolist() == [[16, 15], [24, 55]]
    assert second.get_xydata().tolist() == [[16, 10], [24, 50]]
    assert first.get_color() == "#1f5f99"
    assert first.get_marker() != second.get_marker()
    band = axis.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(15 - math.sqrt(50))
    assert band[:, 1].max() == pytest.approx(55 + math.sqrt(50))
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["CNN", "another"]
    assert axis.get_xlabel() == "pixels"
    plot_curves({"CNN": over_seeds(seeds)}, "degrees")  # draws its own axes
    plt.close("all")


# Statistics


@pytest.mark.parametrize("changes", CHOICES, ids=str)
def test_refreshed_norms_measure_these_images(changes):
    model = toy(**changes, drop_path_rate=0.5).train()
    images, _ = batch(7, model.config.in_chans)
    before = copy.deepcopy(model.state_dict())
    fresh = refresh_norms(model, images, batch_size=7)
    assert model.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(part.training for part in fresh.modules())
    torch.testing.assert_close(dict(fresh.named_parameters()), dict(model.named_parameters()))
    norm, seen = fresh.entry.stem.bn1, []
    fresh.entry.stem.conv1.register_forward_hook(lambda *call: seen.append(call[-1]))
    fresh(images)
    (maps,) = seen
    torch.testing.assert_close(norm.running_mean, maps.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, maps.var((0, 2, 3)))
    pairs = zip(fresh.modules(), model.modules(), strict=True)
    norms = [pair for pair in pairs if isinstance(pair[0], nn.BatchNorm2d)]
    assert norms
    assert all(new.momentum == old.momentum == 0.1 for new, old in norms)


def test_refreshing_depends_on_images_and_not_on_what_was_there():
    images, _ = batch(8)
    model = toy()
    spoilt = copy.deepcopy(model)
    for part in spoilt.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.fill_(3.0)
    one, other = (refresh_norms(each, images, batch_size=3) for each in (model, spoilt))
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert one.entry.stem.bn1.num_batches_tracked == 3


def test_batches_without_a_single_image_are_made():
    """A batch of one image has one value a channel where maps are 1 x 1, and no variance."""
    refreshed = refresh_norms(toy(), torch.randn(5, 3, 16, 16), batch_size=4)
    assert all(buffer.isfinite().all() for buffer in refreshed.buffers())


def test_too_few_images_for_statistics_are_refused():
    with pytest.raises(ValueError, match="at least two images, not 1") as error:
        refresh_norms(toy(), torch.randn(1, 3, 64, 64))
    assert one_sentence(error)


# The chapter and the stored result


def chapter_cells(kind):
    cells = json.loads((ROOT / "chapters/12_robustness.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def test_the_chapter_shows_the_stored_curves():
    benchmark = runpy.run_path(str(ROOT / "benchmarks/robustness.py"))
    rows = benchmark["stored"](benchmark["RESULT"])
    assert rows
    (cell,) = (cell for cell in chapter_cells("code") if "\nSTORED = " in cell)
    shown = {}
    exec(cell, shown)
    assert len({row["seed"] for row in rows}) == shown["SEEDS"]
    assert shown["STORED"] == {
        "pixels": benchmark["compact"](rows, "size"),
        "degrees": benchmark["compact"](rows, "angle"),
    }
    (cell,) = (cell for cell in chapter_cells("code") if cell.startswith("KEPT = "))
    exec(cell, shown)
    assert shown["KEPT"] == {
        "pixels": benchmark["kept"](rows, "size", 32),
        "degrees": benchmark["kept"](rows, "angle", 0),
    }


def test_stored_rows_say_where_they_come_from():
    result = json.loads((ROOT / "benchmarks/results/robustness.json").read_text())
    assert {"command", "processor", "machine", "versions", "images"} <= result.keys()
    study = fashion_study()
    for row in result["rows"]:
        assert row["key"] == study.key(row["variant"], row["seed"])
        assert row["date"]
        heads = row["curves"]["size"]["32"]
        assert heads == pytest.approx(row["curves"]["angle"]["0"], abs=0.2, nan_ok=True)


def test_the_difference_is_paired_by_seed_and_starred_beyond_its_interval():
    benchmark = runpy.run_path(str(ROOT / "benchmarks/robustness.py"))

    def row(variant, seed, *right):
        heads = {"16": right[0], "32": right[1]}
        curve = {v: {"conv": None, "trans": None, "sum": r} for v, r in heads.items()}
        return {"variant": variant, "seed": seed, "curves": {"size": curve}}

    rows = [row("base", s, 40.0 + s, 90.0) for s in range(3)]
    rows += [row("CNN alone", s, 20.0 + s, 90.0) for s in range(3)]
    rows += [row("ViT alone", s, 40.0 + s * s, 90.0) for s in range(3)]
    rows += [row("no coupling", s, 10.0, 50.0) for s in range(3)]  # keeps nothing but chance
    found = benchmark["kept"](rows, "size", 32)
    assert found["CNN"] == "+25.0±0.0* +0.0±0.0"
    assert "*" not in found["ViT"]
    assert found["no coupling"].startswith("+38.8±3.1*")  # 30, 31, 32 of 80, and 0 of 40
    table = benchmark["difference_table"](rows, "size", 32).splitlines()
    assert table[0] == "| kept, size, against | 16 | 32 |"
    assert table[2] == "| CNN | +25.0±0.0* | +0.0±0.0 |"
    assert benchmark["compact"](rows, "size")["CNN"] == "21.0±1.0 90.0±0.0"
