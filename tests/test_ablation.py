"""Chapter 10's module: studies, runs that are not repeated, comparisons; and what is stored."""

import json
import math
import re
import statistics
from dataclasses import replace
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from conformer_src import ablation
from conformer_src.ablation import (
    DATASETS,
    DRAWN_LABELS,
    HEADS,
    STUDENT_T,
    Comparison,
    DrawnImages,
    Study,
    TensorImages,
    compare,
    cue_accuracy,
    drawn_study,
    fashion_study,
    learn,
    margin,
    open_images,
    plot_comparison,
    run,
    run_all,
)
from conformer_src.conformer import DualLogits, create_model
from conformer_src.data import FashionSubset, fashion_transform, local_global
from conformer_src.fcu import DOWN_MODES, UP_MODES, down_sampler
from conformer_src.recipes import Recipe
from conformer_src.training import Scores
from conformer_src.weights import WeightsError, load_model

ROOT = Path(__file__).resolve().parents[1]
TOY = {"depth": 3, "embed_dim": 24, "num_heads": 3, "channel_ratio": 0.25}
RECIPE = Recipe(batch_size=4, epochs=1, workers=0, model_options=TOY, flip=True)
STUDY = Study(
    RECIPE,
    {"fashion": 1},
    {
        "base": {},
        "no coupling": {"model_options": {"coupling": "none"}},
        "CNN alone": {"model_options": {"branches": "conv"}},
    },
)


@pytest.fixture
def few(monkeypatch):
    """Let each data set have a dozen images, so that a training takes a moment."""
    opened = []

    def few(name, test=2000):
        opened.append(name)
        train, scored = open_images(name, test=12 if name != "fashion" else 2000)
        if name == "fashion":
            train = TensorImages(train.images[::900], train.labels[::900], train.classes)
        else:
            train = DrawnImages(train.label, 12)
        some = slice(None, None, 180 if name == "fashion" else 1)
        return train, TensorImages(scored.images[some], scored.labels[some], scored.classes)

    monkeypatch.setattr(ablation, "open_images", few)
    monkeypatch.setattr(ablation, "cue_accuracy", lambda model: cue_accuracy(model, count=8))
    return opened


def batches(images, recipe, start=0):
    return list(images.load_batches(recipe, start, Accelerator()))


# Data sets


def test_the_shipped_images_are_those_of_chapter_1_and_all_are_used():
    train, test = open_images("fashion")
    assert (len(train), len(test)) == (10_000, 2_000)
    assert train.classes == test.classes == FashionSubset.classes
    plain = FashionSubset(train=False, transform=fashion_transform(train=False))
    for index in (0, 777, 1999):
        image, label = plain[index]
        assert torch.equal(test[index][0], image)
        assert test[index][1] == label


@pytest.mark.parametrize("name", DRAWN_LABELS)
def test_drawn_images_come_with_the_label_of_their_name(name):
    train, test = open_images(name, test=5)
    drawn = local_global(5, seed=ablation.TEST_SEED)
    assert torch.equal(test.images, drawn.images)
    expected = {
        "corners": 2 * drawn.rotation,
        "additive": drawn.additive_label(),
        "coupled": drawn.coupled_label(),
    }
    assert torch.equal(test.labels, expected[name])
    assert len(train) == 6_400
    assert len(train.classes) == len(test.classes) == 8


def test_an_unknown_data_set_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"^there is no data set 'garments'; choose one of fash"):
        open_images("garments")
    assert DATASETS == ("fashion", "corners", "additive", "coupled")


def test_half_of_the_training_images_are_mirrored_and_the_source_stays():
    pictures = torch.arange(2 * 200.0).view(200, 1, 1, 2)
    images = TensorImages(pictures.clone(), torch.arange(200), tuple("abc"))
    [[part]] = batches(images, replace(RECIPE, batch_size=200))
    shown, labels, names = part
    mirrored = (shown != pictures[labels]).flatten(1).any(1)
    assert 60 < mirrored.sum() < 140
    assert torch.equal(shown[mirrored], pictures[labels][mirrored].flip(-1))
    assert torch.equal(images.images, pictures)
    assert names[0] == f"image {labels[0]}"
    [[part]] = batches(images, replace(RECIPE, batch_size=200, flip=False))
    assert torch.equal(part[0], pictures[part[1]])


@pytest.mark.parametrize("kind", ["memory", "drawn"])
def test_batches_are_equal_for_equal_seeds_and_go_on_from_any_step(kind):
    images = open_images("additive", test=12)[kind == "memory"]
    images = images if kind == "memory" else DrawnImages("additive", 12)
    recipe = replace(RECIPE, epochs=2)
    whole = batches(images, recipe)
    assert len(whole) == 6
    later = batches(images, recipe, start=4)
    for one, other in zip(whole[4:], later, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[0][:2], other[0][:2], strict=True))
    others = batches(images, replace(recipe, seed=1))
    assert not torch.equal(whole[0][0][0], others[0][0][0])


def test_accumulation_cuts_a_batch_in_parts():
    images = open_images("additive", test=12)[1]
    parts = batches(images, replace(RECIPE, accumulate=2))
    assert [len(part) for part in parts] == [2, 2, 2]
    assert all(len(one[0]) == 2 for part in parts for one in part)


def test_drawn_images_never_come_a_second_time_and_are_none_of_the_test():
    recipe = replace(RECIPE, epochs=3)
    seen = [part[0] for parts in batches(DrawnImages("coupled", 12), recipe) for part in parts]
    flat = torch.cat([*seen, local_global(20, seed=ablation.TEST_SEED).images]).flatten(1)
    assert len(flat.unique(dim=0)) == len(flat)
    labels = torch.cat([p[1] for ps in batches(DrawnImages("coupled", 64), recipe) for p in ps])
    assert set(labels.tolist()) == {0, 1, 2, 3}


# Studies


def test_a_plan_adds_its_options_to_those_in_common_and_takes_the_seed():
    plan = STUDY.plan("no coupling", 3)
    assert plan.model_options == {**TOY, "coupling": "none"}
    assert plan.seed == 3
    assert replace(plan, model_options=TOY, seed=0) == RECIPE
    assert STUDY.variants["no coupling"] == {"model_options": {"coupling": "none"}}


def test_an_unknown_variant_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError, match=r"no variant 'bsae'; choose one of base, no coupling, CNN"
    ):
        STUDY.plan("bsae", 0)


def test_keys_follow_what_decides_a_training_and_nothing_else():
    key = STUDY.key("no coupling", 0)
    renamed = replace(STUDY, variants={"base": {}, "apart": STUDY.variants["no coupling"]})
    assert renamed.key("apart", 0) == key
    others = [
        STUDY.key("no coupling", 1),
        STUDY.key("base", 0),
        replace(STUDY, phases={"fashion": 2}).key("no coupling", 0),
        replace(STUDY, phases={"additive": 1}).key("no coupling", 0),
        replace(STUDY, recipe=replace(RECIPE, lr=5e-4)).key("no coupling", 0),
        replace(STUDY, recipe=replace(RECIPE, model_options={})).key("no coupling", 0),
    ]
    assert len({key, *others}) == 7


def test_the_order_of_phases_decides_too():
    one = replace(STUDY, phases={"additive": 1, "coupled": 1})
    other = replace(STUDY, phases={"coupled": 1, "additive": 1})
    assert one.key("base", 0) != other.key("base", 0)


def test_keys_of_stored_runs_stand():
    """Hours of training hang on them; these values are not to be changed."""
    study = Study(Recipe(lr=4e-3), {"fashion": 3}, {"base": {"model_options": {"pos_embed": 4}}})
    assert study.key("base", 0) == "dd71f1eb601a898c"


@pytest.mark.parametrize("study", [fashion_study(), drawn_study()], ids=["fashion", "drawn"])
def test_all_variants_can_be_built_and_differ(study):
    keys = {study.key(name, 0) for name in study.variants}
    assert len(keys) == len(study.variants)
    assert next(iter(study.variants)) == "base"
    images = torch.zeros(1, 1, *2 * [study.recipe.image_size])
    for name in study.variants:
        plan = study.plan(name, 0)
        model = create_model(plan.model, in_chans=1, num_classes=8, **plan.model_options).eval()
        with torch.no_grad():
            assert all(own.shape == (1, 8) for own in model(images) if own is not None)


def parameters(study, variant):
    plan = study.plan(variant, 0)
    model = create_model(plan.model, in_chans=1, **plan.model_options)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("study", [fashion_study(), drawn_study()], ids=["fashion", "drawn"])
def test_a_branch_alone_has_about_as_many_parameters_as_both(study):
    whole = parameters(study, "base")
    for name in ("CNN alone", "ViT alone"):
        assert parameters(study, name) == pytest.approx(whole, rel=0.06)


def test_the_wider_cnn_weighs_as_much_as_two_med_blocks():
    study = fashion_study()
    assert parameters(study, "wider CNN") == pytest.approx(
        parameters(study, "2 med blocks"), rel=0.06
    )


def test_the_fashion_study_has_each_switch_of_the_model_and_of_its_training():
    plans = [fashion_study().plan(name, 0) for name in fashion_study().variants]

    def values(name):
        return {plan.model_options.get(name) for plan in plans}

    assert values("fcu_down") == {None, *DOWN_MODES} - {"average"}
    assert values("fcu_up") == {None, *UP_MODES} - {"nearest"}
    assert values("coupling") == {None, "down", "up", "none"}
    assert values("branches") == {None, "conv", "trans"}
    assert values("num_med_block") == {None, 1, 2}
    assert {plan.conv_weight for plan in plans} == {plan.trans_weight for plan in plans} == {0, 1}


def test_the_drawn_cnn_sees_less_than_the_distance_between_the_bars():
    plan = drawn_study().plan("CNN alone", 0)
    model = create_model(plan.model, in_chans=1, num_classes=8, **plan.model_options).eval()
    images = torch.randn(1, 1, 64, 64, requires_grad=True)
    maps = model.forward_features(images).maps
    maps[0, :, maps.shape[2] // 2, maps.shape[3] // 2].sum().backward()
    columns = images.grad[0, 0].abs().sum(0).nonzero().flatten()
    assert columns.max() - columns.min() + 1 < 64 - 10 - 10


# Runs


def test_a_run_stores_its_row_and_its_weights(few, tmp_path):
    row = run(STUDY, "no coupling", 2, tmp_path / "new")
    key = STUDY.key("no coupling", 2)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        f"{key}.json",
        f"{key}-fashion.safetensors",
    }
    assert (row["variant"], row["seed"]) == ("no coupling", 2)
    assert set(row["scores"]["fashion"]) == set(Scores._fields)
    model = load_model(tmp_path / "new" / f"{key}-fashion.safetensors")
    assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert model.config.coupling == "none"
    assert "cues" not in row


def test_a_stored_run_is_not_repeated_and_gets_its_new_name(few, tmp_path):
    first = run(STUDY, "no coupling", 0, tmp_path)
    del few[:]
    assert run(STUDY, "no coupling", 0, tmp_path) == first
    renamed = replace(STUDY, variants={"apart": STUDY.variants["no coupling"]})
    assert run(renamed, "apart", 0, tmp_path) == {**first, "variant": "apart"}
    assert few == []


def test_a_run_is_the_same_each_time_and_another_with_another_seed(few, tmp_path):
    def weights(folder, seed):
        run(STUDY, "base", seed, tmp_path / folder)
        path = tmp_path / folder / f"{STUDY.key('base', seed)}-fashion.safetensors"
        return load_model(path).state_dict()

    once, again, other = weights("a", 0), weights("b", 0), weights("c", 1)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not torch.equal(once["conv_head.fc.weight"], other["conv_head.fc.weight"])


def test_pairs_start_with_the_same_values_where_both_have_them(few):
    starts = {}
    for variant in STUDY.variants:
        torch.manual_seed(0)
        plan = STUDY.plan(variant, 0)
        model = create_model(plan.model, in_chans=1, **plan.model_options)
        starts[variant] = model.state_dict()
    shared = [name for name in starts["base"] if name.startswith("entry.stem.conv")]
    assert shared
    for name in shared:
        assert torch.equal(starts["base"][name], starts["no coupling"][name])


def test_what_is_left_of_a_study_that_was_stopped(few, tmp_path):
    rows = run_all(STUDY, [0], tmp_path)
    stopped = f"{STUDY.key('CNN alone', 0)}.json"
    (tmp_path / stopped).unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert [row["scores"] for row in run_all(STUDY, [0], tmp_path)] == [r["scores"] for r in rows]
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert (tmp_path / stopped).exists()


def test_the_seeds_are_the_outer_loop(monkeypatch, tmp_path):
    monkeypatch.setattr(ablation, "run", lambda study, variant, seed, folder: (seed, variant))
    pairs = run_all(STUDY, range(2), tmp_path)
    assert pairs == [(seed, variant) for seed in range(2) for variant in STUDY.variants]


def test_a_network_learns_one_phase_after_the_other(few, tmp_path):
    shared = {**TOY, "patch_size": 8}
    recipe = replace(RECIPE, image_size=64, model_options=shared)
    study = Study(recipe, {"additive": 1, "coupled": 1}, {"base": {}})
    found = {name: scores for name, _, scores in learn(study, "base", 0)}
    assert list(found) == ["additive", "coupled"]
    row = run(study, "base", 0, tmp_path)
    assert {name: Scores(**own) for name, own in row["scores"].items()} == found
    assert set(row["cues"]) == set(HEADS)
    states = [
        load_model(tmp_path / f"{study.key('base', 0)}-{name}.safetensors").state_dict()
        for name in found
    ]
    assert not torch.equal(states[0]["conv_head.fc.weight"], states[1]["conv_head.fc.weight"])
    alone = dict((name, model) for name, model, _ in islice(learn(study, "base", 0), 1))
    for name, value in alone["additive"].state_dict().items():
        assert torch.equal(value, states[0][name])


def test_a_run_that_fails_stores_no_row(few, monkeypatch, tmp_path):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(STUDY, "base", 0, tmp_path)
    assert list(tmp_path.glob("*.json")) == []


@pytest.mark.parametrize("below", [".", "deeper"])
def test_a_folder_that_cannot_be_made_is_refused_before_the_training(below, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match=r"cannot be used as a folder \(.*\); choose another\.$"):
        run(STUDY, "base", 0, tmp_path / "file" / below)


def test_a_damaged_row_is_named_and_stays(tmp_path):
    path = tmp_path / f"{STUDY.key('base', 0)}.json"
    path.write_text('{"variant": ')
    with pytest.raises(WeightsError, match=rf"^{path} is damaged; delete it, and the run is "):
        run(STUDY, "base", 0, tmp_path)
    assert path.read_text() == '{"variant": '


@pytest.mark.parametrize(
    ("options", "heads"),
    [({}, HEADS), ({"branches": "conv"}, ("conv", "sum")), ({"branches": "trans"}, HEADS[1:])],
    ids=["both", "conv", "trans"],
)
def test_cues_are_taken_apart_for_each_head_that_there_is(options, heads):
    model = create_model("conformer_micro", in_chans=1, num_classes=8, **TOY, **options)
    found = cue_accuracy(model, count=40)
    assert tuple(found) == heads
    assert all(0 <= share <= 100 for pair in found.values() for share in pair)
    assert model.training


def test_who_knows_the_label_knows_both_cues_and_who_knows_one_has_the_other_by_chance():
    drawn = local_global(200, seed=ablation.TEST_SEED)

    class Knowing(nn.Module):
        """Answers as if it knew the labels: the images come in order."""

        def __init__(self, label):
            super().__init__()
            self.answers = iter(F.one_hot(label, 8).float().split(256))
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, images):
            return DualLogits(next(self.answers), None)

    both = cue_accuracy(Knowing(drawn.additive_label()), count=200)
    assert both == {"conv": [100.0, 100.0], "sum": [100.0, 100.0]}
    corners = cue_accuracy(Knowing(2 * drawn.rotation), count=200)["sum"]
    assert corners[0] == 100
    assert 35 < corners[1] < 65


# Operators that are the same


def test_which_modes_are_one_operator():
    maps = torch.randn(2, 3, 8, 8)
    average, nearest, bilinear = (
        [down_sampler(3, stride, mode)(maps) for stride in (2, 4)]
        for mode in ("average", "nearest", "bilinear")
    )
    for stride, pooled in zip((2, 4), average, strict=True):
        torch.testing.assert_close(
            F.interpolate(maps, scale_factor=1 / stride, mode="area"), pooled
        )
    assert torch.equal(nearest[0], maps[..., ::2, ::2])
    assert torch.equal(nearest[1], maps[..., ::4, ::4])
    torch.testing.assert_close(bilinear[0], average[0])
    centre = F.avg_pool2d(F.pad(maps, [-1] * 4), 2, stride=4)
    torch.testing.assert_close(bilinear[1], centre)
    assert not torch.allclose(bilinear[1], average[1])


# Comparisons


def rows_of(data=None, **variants):
    """Make rows of accuracies by the sum; None leaves a seed out."""
    return [
        {"variant": name, "seed": seed, "scores": {"fashion": {"sum": value, "trans": None}}}
        for name, values in variants.items()
        for seed, value in enumerate(values)
        if value is not None
    ]


def student_density(t, freedom):
    log = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    return (
        math.exp(log) / math.sqrt(freedom * math.pi) * (1 + t * t / freedom) ** (-(freedom + 1) / 2)
    )


@pytest.mark.parametrize(("freedom", "t"), list(enumerate(STUDENT_T, 1)))
def test_the_printed_quantiles_leave_5_percent_outside(freedom, t):
    steps = 20_000  # Simpson's rule from 0 to t
    grid = [student_density(t * n / steps, freedom) for n in range(steps + 1)]
    inside = t / steps / 3 * (grid[0] + 4 * sum(grid[1::2]) + 2 * sum(grid[2:-1:2]) + grid[-1])
    assert 2 * inside == pytest.approx(0.95, abs=1e-4)


def test_the_margin_of_four_numbers():
    assert margin([1, 2, 1, 2]) == pytest.approx(3.182 * math.sqrt(1 / 3) / 2)
    assert margin([5.0, 5.0, 5.0]) == 0


def test_one_number_has_no_margin_and_many_have_a_cautious_one():
    assert margin([]) == margin([3.0]) == math.inf
    values = [float(n % 2) for n in range(40)]
    assert margin(values) == pytest.approx(2.262 * statistics.stdev(values) / math.sqrt(40))


def test_comparison_is_seed_by_seed():
    rows = rows_of(base=[80, 84, 78, 82], better=[81, 86, 79, 84], same=[80, 84, 78, 82])
    base, better, same = compare(rows, "fashion", "sum")
    assert base[:5] == ("base", 4, 81, statistics.stdev([80, 84, 78, 82]), 0)
    assert math.isnan(base.margin)
    assert (better.difference, better.margin) == (1.5, pytest.approx(margin([1, 2, 1, 2])))
    assert (base.verdict, better.verdict) == ("base", "better")
    assert (same.difference, same.margin, same.verdict) == (0, 0, "noise")
    assert compare(rows[::-1], "fashion", "sum")[:2] == [same, better]


def test_verdicts():
    def verdict(difference, margin):
        return Comparison("one", 5, 80.0, 1.0, difference, margin).verdict

    assert verdict(1.0, 0.9) == "better"
    assert verdict(-1.0, 0.9) == "worse"
    assert verdict(1.0, 1.0) == verdict(-0.2, 1.0) == "noise"
    assert verdict(0.0, 0.0) == "noise"
    assert verdict(9.0, math.inf) == verdict(math.nan, math.inf) == "too few"
    assert verdict(1.0, 0.0) == "better"  # each seed gave the same difference
    assert verdict(0.0, math.nan) == "base"


def test_only_seeds_that_both_have_make_pairs():
    rows = rows_of(base=[80, 84, 78, None], late=[None, 85, 79, 99])
    late = compare(rows, "fashion", "sum")[1]
    assert (late.runs, late.difference) == (3, 1)
    lonely = compare(rows_of(base=[80, None], late=[None, 81]), "fashion", "sum")[1]
    assert math.isnan(lonely.difference)
    assert lonely.verdict == "too few"
    single = compare(rows_of(base=[80], late=[90]), "fashion", "sum")[1]
    assert (single.difference, single.margin, single.verdict) == (10, math.inf, "too few")
    assert math.isnan(single.spread)


def test_variants_without_the_head_are_left_out_and_a_base_without_it_is_refused():
    rows = rows_of(base=[80, 81], other=[70, 71])
    rows[0]["scores"]["fashion"]["trans"] = rows[1]["scores"]["fashion"]["trans"] = 60.0
    assert [one.variant for one in compare(rows, "fashion", "trans")] == ["base"]
    with pytest.raises(ValueError, match=r"^no run of 'other' has a trans on fashion; choose"):
        compare(rows, "fashion", "trans", base="other")


def test_another_variant_can_be_the_base():
    rows = rows_of(base=[80, 82], other=[70, 73])
    base, other = compare(rows, "fashion", "sum", base="other")
    assert (base.difference, other.verdict) == (9.5, "base")


def test_the_plot_has_a_row_for_each_interval_and_noise_in_grey():
    found = [
        Comparison("base", 5, 80.0, 1.0, 0.0, math.nan),
        Comparison("up", 5, 82.0, 1.0, 2.0, 1.0),
        Comparison("down", 5, 78.0, 1.0, -2.0, 1.0),
        Comparison("grey", 5, 80.0, 1.0, 0.1, 1.0),
        Comparison("once", 1, 80.0, math.nan, 0.1, math.inf),
    ]
    plot_comparison(found)
    axis = plt.gca()
    assert [label.get_text() for label in axis.get_yticklabels()] == ["up", "down", "grey"]
    assert [bar.lines[0].get_color() for bar in axis.containers] == [
        "#2f7d4f",
        "#b45309",
        "#8f8f8f",
    ]
    assert [float(bar.lines[0].get_xdata()[0]) for bar in axis.containers] == [2, -2, 0.1]
    plt.close()


# What is stored, and what chapter 10 shows of it

CHAPTER = ROOT / "chapters" / "10_ablation.ipynb"
STORED = ROOT / "benchmarks" / "results" / "ablation.json"


@pytest.fixture(scope="module")
def sources():
    """The chapter's code in one text, and its prose."""
    cells = json.loads(CHAPTER.read_text())["cells"]
    kinds = ("code", "markdown")
    return ["\n".join("".join(c["source"]) for c in cells if c["cell_type"] == k) for k in kinds]


@pytest.fixture(scope="module")
def stored():
    return json.loads(STORED.read_text())


def counts_in(code, name):
    """Read a block of the chapter: (variant, seed) -> right answers of each head."""
    block = re.search(rf'{name} = """\n(.*?)\n"""', code, re.DOTALL)[1]
    found = {}
    for line in block.split("\n"):
        counts = line[24:].split()
        for seed in range(runs := len(counts) // 3):
            if counts[2 * runs + seed] != "-":
                found[line[:24].strip(), seed] = counts[seed::runs]
    return found


@pytest.mark.parametrize(
    ("name", "study", "data"),
    [
        ("GARMENTS", "fashion", "fashion"),
        ("ADDITIVE", "drawn", "additive"),
        ("COUPLED", "drawn", "coupled"),
    ],
)
def test_the_chapter_computes_with_what_is_stored(sources, stored, name, study, data):
    expected = {
        (row["variant"], row["seed"]): [
            "-" if row["scores"][data][head] is None else str(round(20 * row["scores"][data][head]))
            for head in HEADS
        ]
        for row in stored["rows"][study]
    }
    assert counts_in(sources[0], name) == expected


def test_the_chapter_says_how_often_a_head_is_right_about_a_cue(sources, stored):
    rows = stored["rows"]["drawn"]
    for variant in drawn_study().variants:
        own = [row["cues"] for row in rows if row["variant"] == variant]
        if own:
            line = f"| {variant} | " + " | ".join(map(known, cues_of(own))) + " |"
            assert line in sources[1]


def cues_of(own):
    """Yield what the CNN's head and the transformer's know in each run: (corners, bars)."""
    return [[cues[head] for cues in own if head in cues] for head in ("conv", "trans")]


def known(pairs):
    """Return the means over the runs, in per cent."""
    if not pairs:
        return ""
    corners, bars = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return f"corners {corners:.0f}, bars {bars:.0f}"


def test_the_stored_output_has_the_false_alarm_of_the_prose(sources):
    assert "In the output stored with this page the verdict even is *better*" in sources[1]
    cells = json.loads(CHAPTER.read_text())["cells"]
    printed = ["".join(o.get("text", "")) for c in cells for o in c.get("outputs", [])]
    table = next(text for text in printed if "same operator" in text)
    assert re.search(r"^same operator .* better$", table, re.MULTILINE)


def test_what_is_stored_can_be_rebuilt_and_says_where_it_comes_from(stored):
    assert stored["command"] == "python benchmarks/ablation.py"
    assert {"torch", "torchvision", "accelerate"} <= set(stored["versions"])
    assert stored["processor"]
    for name, study in (("fashion", fashion_study()), ("drawn", drawn_study())):
        assert stored["studies"][name]["phases"] == study.phases
        for row in stored["rows"][name]:
            assert row["variant"] in study.variants
            assert set(row["scores"]) == set(study.phases)
            assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"])
