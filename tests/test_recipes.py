"""Recipes: what they refuse and in which words, reading, writing, the files that are shipped."""

import math
from dataclasses import asdict, fields, replace

import pytest

from conformer_src import recipes
from conformer_src.conformer import VARIANTS
from conformer_src.files import WeightsError
from conformer_src.recipes import Recipe, list_recipes, load_recipe, write_recipe
from conformer_src.training import FREEZABLE, PRECISIONS

SHIPPED = ["fashion", "finetune", "imagenet-authors", "imagenet-openmmlab", "small-images"]


@pytest.fixture
def toml(tmp_path):
    """Write a recipe file; returns its path."""

    def write(text):
        path = tmp_path / "own.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# --- values


def test_the_defaults_are_a_recipe():
    assert Recipe().model == "conformer_micro"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0}, r"lr must be a number above 0, not 0\."),
        ({"lr": "fast"}, r"lr must be a number above 0, not 'fast'\."),
        ({"lr": math.nan}, "lr must be a number above 0, not nan"),
        ({"lr": math.inf}, "lr must be a number above 0, not inf"),
        ({"lr": True}, "lr must be a number above 0, not True"),
        ({"lr": None}, "lr must be a number above 0, not None"),
        ({"epochs": 1.0}, r"epochs must be a whole number of at least 1, not 1\.0\."),
        ({"epochs": 0}, "epochs must be a whole number of at least 1, not 0"),
        ({"epochs": True}, "epochs must be a whole number of at least 1, not True"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"repeats": 0}, "repeats must be a whole number of at least 1, not 0"),
        ({"keep": 0}, "keep must be a whole number of at least 1, not 0"),
        ({"workers": -1}, "workers must be a whole number of at least 0, not -1"),
        ({"seed": 2**31}, "seed must be a whole number of at least 0 and below 2147483648"),
        ({"mixup": -0.1}, r"mixup must be a number of at least 0, not -0\.1"),
        ({"cutmix": -1}, "cutmix must be a number of at least 0, not -1"),
        ({"validation": 1}, "validation must be a number of at least 0 and below 1, not 1"),
        ({"label_smoothing": 1.0}, "label_smoothing must be a number of at least 0 and below 1"),
        ({"ema": 1.0}, "ema must be a number of at least 0 and below 1"),
        ({"erasing": 1.5}, "erasing must be a number of at least 0 and at most 1, not 1.5"),
        ({"crop_scale": 0}, "crop_scale must be a number above 0 and at most 1, not 0"),
        ({"rand_augment": 31}, "rand_augment must be a whole number of at least 0 and at most 30"),
        ({"flip": 1}, r"flip must be true or false, not 1\."),
        ({"data": 3}, r"data must be a text, not 3\."),
        ({"model_options": []}, r"model_options must be a table, not \[\]\."),
        ({"freeze": "head"}, "freeze must be one of none, conv, trans, backbone, not 'head'"),
        ({"precision": "tf32"}, "precision must be one of fp32, bf16, fp16, not 'tf32'"),
        ({"reduction": ["sum"]}, r"reduction must be one of mean, sum, not \['sum'\]"),
        ({"model": "conformer_mikro"}, "no model 'conformer_mikro'; choose conformer_micro"),
        ({"model_options": {"depht": 3}}, "no field 'depht'; choose depth"),
        ({"model_options": {"depth": 4}}, "depth must be a multiple of 3, not 4"),
        ({"model_options": {"num_classes": 5}}, "must not name num_classes, which comes from"),
        ({"model_options": {"in_chans": 5}}, "must not name in_chans, which comes from"),
        ({"accumulate": 5}, "batch_size must be a multiple of accumulate, but 64 is no multiple"),
        ({"warmup_epochs": 5}, "warmup_epochs must be below epochs, which is 5, not 5"),
        ({"warmup_lr": 0.1}, "warmup_lr must be at most lr, which is 0.001, not 0.1"),
        ({"min_lr": 0.1}, "min_lr must be at most lr, which is 0.001, not 0.1"),
        ({"weights": "published"}, "published for conformer_tiny.* only, not for conformer_micro"),
        (
            {"weights": "published", "model": "conformer_tiny_patch16"},
            "in_chans must be 3 with published weights, not 1",
        ),
        (
            {"model": "conformer_tiny_patch16", "image_size": 230},
            "image_size must suit conformer_tiny_patch16, not be 230; choose a multiple of 16",
        ),
        (
            {"conv_weight": 0, "trans_weight": 0},
            "conv_weight or trans_weight must be above 0, because otherwise no head is taught",
        ),
        (
            {"model_options": {"branches": "conv"}, "conv_weight": 0},
            "conv_weight must be above 0, because otherwise no head is taught",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        Recipe(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 1, "validation": 0, "warmup_epochs": 0},  # whole numbers for numbers
        {"conv_weight": 0},
        {"model_options": {"branches": "trans"}, "conv_weight": 0},
        {"image_size": 57},  # micro pads
        {"model": "conformer_tiny_patch16", "image_size": 222},  # the stem rounds up
        {"batch_size": 60, "accumulate": 5},
        {"warmup_lr": 1e-3, "min_lr": 1e-3},
    ],
)
def test_what_works_is_accepted(changes):
    recipe = Recipe(**changes)
    assert {name: getattr(recipe, name) for name in changes} == changes


def test_an_enormous_number_is_no_crash():
    assert Recipe(clip_grad=10**400).clip_grad == 10**400
    with pytest.raises(ValueError, match="crop_scale must be"):
        Recipe(crop_scale=10**400)


def test_each_field_says_what_a_command_line_needs():
    for option in fields(Recipe):
        assert option.metadata["about"], option.name
        assert option.type in recipes._KINDS, option.name
        assert option.metadata["group"] in {
            *("model", "data", "augmentation", "loss", "optimizer", "machine", "run")
        }


def test_choices_are_those_of_the_loop():
    choices = {f.name: f.metadata.get("choices") for f in fields(Recipe)}
    assert choices["freeze"] == tuple(FREEZABLE)
    assert choices["precision"] == tuple(PRECISIONS)


def test_recipes_do_not_share_their_options():
    assert Recipe().model_options is not Recipe().model_options


# --- reading


def test_changes_replace_fields():
    recipe = load_recipe("fashion", epochs=9, data="photos")
    assert (recipe.epochs, recipe.data, recipe.in_chans) == (9, "photos", 1)


def test_changes_are_checked_together_with_the_file(toml):
    path = toml("epochs = 2\nwarmup_epochs = 1")
    assert load_recipe(path, epochs=3, warmup_epochs=2).warmup_epochs == 2
    with pytest.raises(ValueError, match=r"^warmup_epochs must be below epochs, which is 1"):
        load_recipe(path, epochs=1)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("batchsize", "choose batch_size"),
        ("batch-size", "choose batch_size"),
        ("learning_rate_of_all", "`conformer train --help` lists all"),
    ],
)
def test_unknown_fields_are_named(toml, name, way):
    with pytest.raises(ValueError, match=rf"own\.toml: a recipe has no field '{name}'; {way}\."):
        load_recipe(toml(f"{name} = 3"))
    with pytest.raises(ValueError, match=rf"^a recipe has no field '{name}'; {way}\."):
        load_recipe("fashion", **{name: 3})


def test_a_table_that_is_no_field(toml):
    with pytest.raises(ValueError, match="a recipe has no field 'optimizer'"):
        load_recipe(toml("[optimizer]\nlr = 1.0"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs = 3\nlr = fast", r"own\.toml is no TOML: .*line 2.*; a line looks like"),
        ("epochs = 3\nepochs = 4\n", r"own\.toml is no TOML: .*line 2"),
        (b"model = '\xff'", r"own\.toml is not text in UTF-8"),
        ("lr = '1'", r"own\.toml: lr must be a number above 0, not '1'"),
        ("epochs = 2.5", r"own\.toml: epochs must be a whole number"),
        ("lr = nan", r"own\.toml: lr must be a number above 0, not nan"),
        ("lr = 2026-01-01", r"own\.toml: lr must be a number above 0, not datetime"),
    ],
)
def test_bad_files_are_named(toml, text, words):
    with pytest.raises(ValueError, match=words) as caught:
        load_recipe(toml(text))
    assert "\n" not in str(caught.value)


def test_a_mark_at_the_beginning_and_other_line_ends_do_not_matter(toml):
    assert load_recipe(toml(b"\xef\xbb\xbfepochs = 7\r\nlr = 0.5\r\n")).epochs == 7


def test_an_empty_file_is_the_defaults(toml):
    assert load_recipe(toml("")) == Recipe()


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no recipe fashionn; choose fashion, or"):
        load_recipe("fashionn")
    with pytest.raises(
        FileNotFoundError, match=r"no recipe .*mine\.toml; choose fashion, finetune"
    ):
        load_recipe(tmp_path / "mine.toml")
    with pytest.raises(ValueError, match=r"cannot be read .*; give a \.toml file"):
        load_recipe(tmp_path)


# --- writing


@pytest.mark.parametrize("name", SHIPPED)
def test_round_trip(tmp_path, name):
    recipe = load_recipe(name)
    write_recipe(recipe, tmp_path / "copy.toml")
    assert load_recipe(tmp_path / "copy.toml") == recipe


def test_round_trip_of_strange_values(tmp_path):
    recipe = Recipe(
        model_options={"depth": 3, "pad": True, "drop_path_rate": 0.1, "stem": "small"},
        data='C:\\my "photos"\n\u00e9\u4e2d',
        lr=0.1 + 0.2,
        warmup_lr=5e-324,
        seed=2**31 - 1,
    )
    write_recipe(recipe, tmp_path / "copy.toml")
    copy = load_recipe(tmp_path / "copy.toml")
    assert copy == recipe
    assert {k: type(v) for k, v in asdict(copy).items()} == {
        k: type(v) for k, v in asdict(recipe).items()
    }


def test_a_written_recipe_has_all_fields_in_groups(tmp_path):
    write_recipe(Recipe(), tmp_path / "copy.toml")
    text = (tmp_path / "copy.toml").read_text()
    assert all(
        f"{option.name} = " in text or f"[{option.name}]" in text for option in fields(Recipe)
    )
    assert text.startswith("# model\n")
    assert "\n\n# optimizer\nepochs = 5\n" in text


def test_writing_replaces_in_one_step(tmp_path):
    path = tmp_path / "copy.toml"
    write_recipe(Recipe(), path)
    write_recipe(Recipe(epochs=7), path)
    assert load_recipe(path).epochs == 7
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(WeightsError, match="cannot be written"):
        write_recipe(Recipe(), tmp_path / "nowhere" / "copy.toml")


# --- the files that come with the package


def test_the_shipped_recipes():
    assert list_recipes() == SHIPPED


def test_who_must_name_the_images():
    assert [name for name in SHIPPED if load_recipe(name).data] == ["fashion"]


@pytest.mark.parametrize("name", SHIPPED)
def test_each_model_can_be_built(name):
    recipe = load_recipe(name)
    config = replace(VARIANTS[recipe.model], in_chans=recipe.in_chans, **recipe.model_options)
    assert config.in_chans == recipe.in_chans


def test_both_imagenet_recipes_differ_where_their_sources_do():
    authors = asdict(load_recipe("imagenet-authors"))
    openmmlab = asdict(load_recipe("imagenet-openmmlab"))
    differing = {name for name in authors if authors[name] != openmmlab[name]}
    assert differing == {"model", "reduction", "repeats", "ema", "precision", "workers"}
    common = {
        **{"epochs": 300, "batch_size": 1024, "lr": 1e-3, "warmup_epochs": 5, "warmup_lr": 1e-6},
        **{"min_lr": 1e-5, "weight_decay": 0.05, "clip_grad": 0, "label_smoothing": 0.1},
        **{"mixup": 0.8, "cutmix": 1.0, "erasing": 0.25, "crop_scale": 0.08},
        **{"image_size": 224, "in_chans": 3, "model_options": {"drop_path_rate": 0.1}},
    }
    assert authors | common == authors
    assert (authors["reduction"], authors["repeats"], authors["ema"]) == ("mean", 3, 0.99996)
    assert (openmmlab["reduction"], openmmlab["repeats"], openmmlab["ema"]) == ("sum", 1, 0)


def test_fine_tuning_keeps_the_statistics():
    recipe = load_recipe("finetune")
    assert recipe.freeze_norm
    assert recipe.weights == "published"
    assert recipe.lr < load_recipe("imagenet-authors").lr
