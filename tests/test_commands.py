"""`conformer train`, `evaluate` and `shards`, as people and as programs use them."""

import json
import shlex
from dataclasses import fields

import pytest
from small_runs import draw_images, small_recipe

from conformer_src import cli
from conformer_src.recipes import Recipe, load_recipe, write_recipe
from conformer_src.runs import evaluate_file


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def recipe(images, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "mine.toml"
    write_recipe(small_recipe(images, save_steps=0, epochs=2), path)
    return path


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert cli.main(["train", str(recipe), "--out", str(folder)]) == 0
    return folder


def refused(result, words):
    status, out, err = result
    assert status == 1
    assert out == ""
    assert words in err
    assert err.count("conformer:") == 1


def test_train_shows_a_table_and_the_scores(run, recipe, tmp_path):
    status, out, err = run("train", recipe, "--out", tmp_path / "run", "--lr", "5e-4")
    assert status == 0
    rows = [line.split() for line in err.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["1", "2"]
    assert "both" in out
    assert f"written: {tmp_path / 'run'}" in out
    assert load_recipe(tmp_path / "run" / "recipe.toml").lr == 5e-4


def test_train_with_json_prints_nothing_else_on_stdout(run, recipe, tmp_path):
    status, out, _ = run("train", recipe, "--out", tmp_path / "run", "--json", "--epochs", "1")
    found = json.loads(out)
    assert status == 0
    assert found["epoch"] == 1
    assert {"val_conv", "val_trans", "val_sum", "ema_sum", "train_loss"} <= found.keys()


def test_each_field_of_a_recipe_is_an_option(run):
    status, out, _ = run("train", "--help")
    assert status == 0
    assert all(len(line) <= 100 for line in out.splitlines())
    for field in fields(Recipe):
        assert f"--{field.name.replace('_', '-')}" in out
        assert field.metadata["about"].split()[0] in out
    for name in ("fashion", "small-images", "finetune", "imagenet-authors", "imagenet-openmmlab"):
        assert name in out


def test_the_examples_of_the_help_parse(run):
    _, out, _ = run("train", "--help")
    examples = [line.strip() for line in out.splitlines() if line.startswith("  conformer ")]
    assert len(examples) == 3
    for example in examples:
        cli.build_parser().parse_args(shlex.split(example)[1:])


def test_options_of_every_kind(recipe):
    words = "--flip --no-channels-last --mixup 0.5 --precision bf16 --batch-size 8"
    words += " --model-options depth=3 branches=conv"
    arguments = cli.build_parser().parse_args(["train", str(recipe), *words.split()])
    assert (arguments.flip, arguments.channels_last, arguments.mixup) == (True, False, 0.5)
    assert dict(arguments.model_options) == {"depth": 3, "branches": "conv"}
    assert not hasattr(arguments, "lr")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "give a recipe, or --resume"),
        (("fashion", "--resume", "runs/x"), "give a recipe, or --resume"),
        (("--resume", "runs/x", "--out", "y"), "leave out --out"),
        (("fashion", "--lr", "fast"), "--lr"),
        (("fashion", "--precision", "fp8"), "invalid choice"),
        (("fashion", "--model-options", "depth"), "is not FIELD=VALUE"),
        (("fashion", "--learning-rate", "1"), "--learning-rate"),
    ],
)
def test_wrong_usage(run, words, complaint):
    status, out, err = run("train", *words)
    assert (status, out) == (2, "")
    assert complaint in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("fashio",), "there is no recipe fashio; choose fashion"),
        (("fashion", "--lr", "-1"), "lr must be a number above 0"),
        (("fashion", "--data", "nowhere"), "there is no folder nowhere"),
        (("finetune",), "give --data FOLDER"),
        (("--resume", "nowhere"), "there is no run in nowhere"),
        (("fashion", "--model-options", "width=3"), "has no field 'width'"),
        (("fashion", "--precision", "fp16"), "fp16"),
        (("fashion", "--freeze-norm"), "statistics that nobody has learnt"),
        (("fashion", "--weights", "nowhere.pth"), "there is no file nowhere.pth"),
    ],
)
def test_what_cannot_work_is_one_sentence(run, words, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(run("train", *words), complaint)
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_train_in_a_folder_with_a_run(run, recipe, finished):
    refused(run("train", recipe, "--out", finished), f"go on with --resume {finished}")


def test_resume_a_finished_run(run, finished):
    status, out, _ = run("train", "--resume", finished, "--json")
    assert status == 0
    assert json.loads(out)["epoch"] == 2


def test_weights_of_a_run_begin_another_with_fewer_classes(run, finished, recipe, tmp_path):
    two = draw_images(tmp_path / "two", classes=("x", "y"))
    words = ("--data", two, "--weights", finished / "best.safetensors", "--freeze", "backbone")
    status, _, err = run("train", recipe, "--out", tmp_path / "run", *words, "--freeze-norm")
    assert status == 0
    assert "the weights are for 3 classes and the model for 2" in err


def test_evaluate_gives_the_scores_of_the_run(run, finished, images):
    status, out, _ = run("evaluate", finished, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["images"] == 9  # what was held out
    result = json.loads((finished / "result.json").read_text())
    last = evaluate_file(finished / "last.safetensors")
    assert last["sum"] == result["ema_sum"]
    assert last["loss"] == pytest.approx(result["ema_loss"], rel=1e-6)  # another memory format
    status, text, _ = run("evaluate", finished)
    assert f"{found['sum']:6.2f} %" in text
    assert json.loads(run("evaluate", finished, "--json")[1]) == found  # to the last digit
    everything = json.loads(run("evaluate", finished, "--data", images, "--json")[1])
    assert everything["images"] == 36


def test_evaluate_refuses_other_classes_and_missing_recipes(run, finished, tmp_path):
    other = draw_images(tmp_path / "other", classes=("x", "y"))
    refused(run("evaluate", finished, "--data", other), "sub-folders that are no classes: x, y")
    refused(run("evaluate", finished, "--recipe", "fashion"), "fashion-subset")
    lonely = tmp_path / "lonely.safetensors"
    lonely.write_bytes((finished / "best.safetensors").read_bytes())
    refused(run("evaluate", lonely), "give --recipe")
    refused(run("evaluate", tmp_path / "nothing.safetensors"), "give --recipe")


def test_shards_are_written_and_trained_on(run, images, recipe, tmp_path):
    pytest.importorskip("webdataset")
    for part in ("train", "val"):
        status, out, _ = run("shards", images, tmp_path / "data" / part, "--size", "10")
        assert status == 0
        assert "36 images" in out
    words = ("--data", tmp_path / "data", "--out", tmp_path / "run", "--json")
    status, out, _ = run("train", recipe, *words)
    assert status == 0
    assert json.loads(out)["epoch"] == 2
    status, out, _ = run("evaluate", tmp_path / "run", "--json")
    assert json.loads(out)["images"] == 36
