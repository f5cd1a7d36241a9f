"""The command line, as people and as programs use it."""

import io
import json
import os
import shlex
import subprocess
import sys
import tomllib
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from test_predict import build, picture

import conformer_src as cs
from conformer_src import cli
from conformer_src.conformer import CARDS, VARIANTS
from conformer_src.files import read_file
from conformer_src.predict import predict

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "mine.safetensors"
    cs.save_weights(build(), path)
    return path


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(3):
        picture(seed=seed).save(folder / f"{seed}.png")
    return folder


def fails(result, words):
    """Nothing on stdout, one sentence on stderr."""
    status, out, err = result
    assert (status, out) == (1, "")
    assert err.startswith("conformer: ")
    assert err.count("\n") == 1
    assert words in err


# --- list, info -----------------------------------------------------------------------------------


def test_list_shows_each_model_in_an_aligned_table(run):
    status, out, err = run("list")
    assert (status, err) == (0, "")
    head, *rows = out.splitlines()
    assert [row.split()[0] for row in rows] == cs.list_models()
    assert all(len(line) <= 80 for line in out.splitlines())
    ends = [head.index(title) + len(title) for title in ("image", "parameters", "top-1")]
    for row in rows:
        assert all(row[end - 1] != " " and row[end : end + 1] == " " for end in ends)
    assert "23.5 M" in out
    assert "81.3" in out


def test_list_takes_a_pattern(run):
    assert len(run("list", "*patch16")[1].splitlines()) == 4
    fails(run("list", "resnet*"), "no model matches 'resnet*'; `conformer list` shows all.")


@pytest.mark.parametrize("words", [["list", "--json"], ["--json", "list"]])
def test_list_as_json_has_the_cards(run, words):
    status, out, err = run(*words)
    assert (status, err) == (0, "")
    rows = json.loads(out)
    for row in rows:
        card = CARDS[row["model"]]._asdict()
        assert {key: row[key] for key in card} == card
    published = [row["model"] for row in rows if row["pretrained"]]
    assert published == [name for name in cs.list_models() if "micro" not in name]


@pytest.mark.parametrize("name", VARIANTS)
def test_info_tells_all(run, name):
    known = json.loads(run("info", name, "--json")[1])
    assert known["config"] == asdict(VARIANTS[name])
    assert known["parameters"] == CARDS[name].parameters
    status, out, err = run("info", name)
    assert (status, err) == (0, "")
    lines = dict(line.strip().partition(" ")[::2] for line in out.splitlines())
    assert lines["parameters"].strip() == f"{CARDS[name].parameters:,}"
    for field, value in asdict(VARIANTS[name]).items():
        assert lines[field].strip() == str(value)


def test_info_names_where_weights_are_published(run):
    address = json.loads(run("info", "conformer_base_patch16", "--json")[1])["pretrained"]
    assert address.startswith("https://")
    assert address.endswith("-bfdf8637.pth")
    assert address in run("info", "conformer_base_patch16")[1]
    assert "not published" in run("info", "conformer_micro")[1]


def test_a_wrong_name_is_answered_with_the_nearest(run):
    fails(run("info", "conformer_tny_patch16"), "choose conformer_tiny_patch16.")


# --- predict --------------------------------------------------------------------------------------


def test_predict_says_what_the_function_says(run, weights, images):
    status, out, err = run("predict", images, "--weights", weights, "--topk", 3, "--json")
    assert (status, err) == (0, "")
    expected = predict(build(), images, 3)
    assert len(expected) == 3
    assert json.loads(out) == [
        {
            "image": one.image,
            "classes": [
                {"index": index, "label": label, "probability": probability}
                for index, label, probability in zip(
                    one.indices, one.labels, one.probabilities, strict=True
                )
            ],
            "conv": {"label": one.conv[0], "probability": one.conv[1]},
            "trans": {"label": one.trans[0], "probability": one.trans[1]},
        }
        for one in expected
    ]


def test_predict_shows_the_sum_and_each_head(run, weights, images):
    image = images / "0.png"
    status, out, err = run("predict", image, "--weights", weights)
    assert (status, err) == (0, "")
    [found] = predict(build(), image)
    first, both, *others, conv, trans = out.splitlines()
    assert first == str(image)
    assert both.split()[:2] == ["both", "heads"]
    assert len(others) == 4
    for line, label, chance in zip([both, *others], found.labels, found.probabilities, strict=True):
        assert line.endswith(f"{chance:6.1%}  {label}")
    assert conv.endswith(f"{found.conv[1]:6.1%}  {found.conv[0]}")
    assert trans.endswith(f"{found.trans[1]:6.1%}  {found.trans[0]}")
    assert len({line.index("%") for line in out.splitlines()[1:]}) == 1  # aligned


def test_predict_leaves_out_a_branch_that_is_not_there(run, tmp_path, images):
    cs.save_weights(build(branches="conv"), tmp_path / "conv.safetensors")
    words = ["predict", images / "0.png", "--weights", tmp_path / "conv.safetensors"]
    assert "transformer" not in run(*words)[1]
    assert json.loads(run(*words, "--json")[1])[0]["trans"] is None


def test_predict_uses_your_names(run, weights, images, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\ufeffäpfel\n" + "\n".join("bcdefghij") + "\n", encoding="utf-8")
    words = ["predict", images, "--weights", weights, "--classes", names, "--topk", 10]
    [first, *_] = json.loads(run(*words, "--json")[1])
    assert {one["index"]: one["label"] for one in first["classes"]}[0] == "äpfel"
    names.write_text("a\nb\n")
    fails(run(*words), "2 names were given for 10 classes")
    names.write_bytes(b"\xff\xfe\xff")
    fails(run(*words), "is not text in UTF-8; give one class name a line.")
    names.unlink()
    fails(run(*words), f"{names} cannot be read")


def test_predict_uses_the_names_that_the_weights_bring(run, images, tmp_path):
    model = build()
    model.classes = tuple("klmnopqrst")
    cs.save_weights(model, tmp_path / "named.safetensors")
    words = ["predict", images, "--weights", tmp_path / "named.safetensors", "--topk", 10]
    [first, *_] = json.loads(run(*words, "--json")[1])
    assert [one["label"] for one in first["classes"]] == [
        "klmnopqrst"[one["index"]] for one in first["classes"]
    ]
    assert first["conv"]["label"] in model.classes
    names = tmp_path / "names.txt"
    names.write_text("\n".join("abcdefghij"))
    [first, *_] = json.loads(run(*words, "--classes", names, "--json")[1])
    assert {one["label"] for one in first["classes"]} == set("abcdefghij")


def test_bad_images_are_named_and_the_others_predicted(run, weights, images):
    (images / "1b.jpg").write_text("no image")
    missing = images / "missing.png"
    words = ["predict", images, missing, "--weights", weights]
    status, out, err = run(*words, "--json")
    assert status == 1
    assert [Path(one["image"]).name for one in json.loads(out)] == ["0.png", "1.png", "2.png"]
    assert err.splitlines() == [
        f"conformer: {images / '1b.jpg'} is no image of a kind that Pillow can read.",
        f"conformer: there is no file or folder {missing}.",
    ]
    status, out, err = run("predict", missing, "--weights", weights)
    fails((status, out, err), f"there is no file or folder {missing}.")


def test_an_empty_folder_is_an_error(run, tmp_path):
    """Said before anything is fetched or read."""
    (tmp_path / "empty").mkdir()
    words = ["predict", tmp_path / "empty", "--weights", tmp_path / "missing.pth"]
    fails(run(*words), "there are no images in ")


def test_the_model_of_a_name_gets_published_weights(run, images, monkeypatch):
    asked = []

    def create(name, **options):
        asked.append((name, options))
        return build()

    monkeypatch.setattr(cs, "create_model", create)
    assert run("predict", images, "--model", "conformer_tiny_patch16")[0] == 0
    assert asked == [("conformer_tiny_patch16", {"pretrained": True})]


def test_the_file_must_fit_the_name(run, tmp_path, images):
    micro = cs.create_model("conformer_micro", num_classes=7)
    cs.save_weights(micro, tmp_path / "micro.safetensors")
    words = ["predict", images, "--weights", tmp_path / "micro.safetensors", "--model"]
    assert run(*words, "conformer_micro")[0] == 0
    fails(run(*words, "conformer_tiny_patch16"), "holds another model than conformer_tiny_patch16")
    fails(run(*words, "conformer_mikro"), "there is no model 'conformer_mikro'")


# --- convert --------------------------------------------------------------------------------------


@pytest.fixture
def micro():
    return cs.create_model("conformer_micro", num_classes=7)


def test_weights_come_back_bit_by_bit_from_each_naming(run, tmp_path, micro):
    first = tmp_path / "0.safetensors"
    cs.save_weights(micro, first)
    route = [("official", "1.pth"), ("mmpretrain", "2.pth"), ("ours", "3.safetensors")]
    for naming, name in route:
        target = tmp_path / name
        status, out, err = run("convert", first, target, "--to", naming, "--json")
        assert (status, err) == (0, "")
        assert json.loads(out) == {
            "written": str(target),
            "names": naming,
            "tensors": len(micro.state_dict()),
            "left_out": [],
        }
        first = target
    back = cs.load_model(first)
    assert back.config == micro.config
    torch.testing.assert_close(back.state_dict(), micro.state_dict(), rtol=0, atol=0)
    official = torch.load(tmp_path / "1.pth", weights_only=True)["model"]
    assert official.keys() == cs.export_weights(micro, "official").keys()
    openmmlab = torch.load(tmp_path / "2.pth", weights_only=True)["state_dict"]
    assert openmmlab.keys() == cs.export_weights(micro, "mmpretrain").keys()


def test_convert_says_what_it_leaves_out_and_takes_the_average_when_asked(run, tmp_path, micro):
    average = cs.create_model("conformer_micro", num_classes=7)
    content = {
        "model": cs.export_weights(micro, "official"),
        "model_ema": cs.export_weights(average, "official"),
        "optimizer": {},
        "epoch": 3,
    }
    torch.save(content, tmp_path / "train.pth")
    words = ["convert", tmp_path / "train.pth", tmp_path / "out.safetensors", "--to", "ours"]
    status, out, err = run(*words)
    assert (status, err) == (0, "")
    assert out.splitlines()[1] == "left out: epoch, model_ema, optimizer"
    loaded = cs.load_model(tmp_path / "out.safetensors")
    torch.testing.assert_close(loaded.state_dict(), micro.state_dict(), rtol=0, atol=0)
    status, out, err = run(*words, "--ema", "--force")
    assert out.splitlines()[1] == "left out: epoch, model, optimizer"
    loaded = cs.load_model(tmp_path / "out.safetensors")
    torch.testing.assert_close(loaded.state_dict(), average.state_dict(), rtol=0, atol=0)


def test_nothing_is_overwritten_unless_forced(run, tmp_path, micro):
    source, target = tmp_path / "source.safetensors", tmp_path / "target.pth"
    cs.save_weights(micro, source)
    target.write_text("precious")
    words = ["convert", source, target, "--to", "official"]
    fails(run(*words), f"{target} exists; choose another name, or replace it with --force.")
    assert target.read_text() == "precious"
    status, out, err = run(*words, "--force")
    assert (status, err) == (0, "")
    assert out == f"wrote {target}: {len(micro.state_dict())} tensors, named as in 'official'\n"
    assert cs.load_model(target).config.num_classes == 7


def test_a_file_can_be_replaced_by_itself(run, tmp_path, micro):
    path = tmp_path / "weights.pth"
    torch.save(cs.export_weights(micro, "official"), path)
    words = ["convert", path, path, "--to", "mmpretrain"]
    fails(run(*words), "exists; choose another name")
    assert run(*words, "--force")[0] == 0
    back = torch.load(path, weights_only=True)["state_dict"]
    expected = cs.export_weights(micro, "mmpretrain")
    torch.testing.assert_close(back, dict(expected), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_precision_stays(run, tmp_path, micro, dtype):
    state = cs.export_weights(micro.to(dtype), "official")
    torch.save({"model": state}, tmp_path / "a.pth")
    assert run("convert", tmp_path / "a.pth", tmp_path / "b.pth", "--to", "official")[0] == 0
    back = torch.load(tmp_path / "b.pth", weights_only=True)["model"]
    torch.testing.assert_close(back, dict(state), rtol=0, atol=0)
    words = ["convert", tmp_path / "a.pth", tmp_path / "c.safetensors", "--to", "ours"]
    assert run(*words)[0] == 0
    back = read_file(tmp_path / "c.safetensors")[0]
    torch.testing.assert_close(back, dict(micro.state_dict()), rtol=0, atol=0)


def test_of_openmmlabs_training_files_the_average_is_taken(run, tmp_path, micro):
    """Theirs holds the average under "state_dict", and the other weights beside it."""
    other = cs.create_model("conformer_micro", num_classes=7)
    names = {"state_dict": micro, "ema_state_dict": other}
    content = {key: cs.export_weights(model, "mmpretrain") for key, model in names.items()}
    torch.save({**content, "meta": {}}, tmp_path / "train.pth")
    words = ["convert", tmp_path / "train.pth", tmp_path / "a.safetensors", "--to", "ours", "--ema"]
    assert run(*words)[1].splitlines()[1] == "left out: ema_state_dict, meta"
    loaded = cs.load_model(tmp_path / "a.safetensors").state_dict()
    torch.testing.assert_close(loaded, micro.state_dict(), rtol=0, atol=0)


def test_a_config_that_weights_do_not_tell_is_left_out_loudly(run, tmp_path, weights):
    status, out, err = run("convert", weights, tmp_path / "a.pth", "--to", "official")
    assert (status, err) == (0, "")
    assert out.splitlines()[1] == "left out: config"
    status, out, err = run("convert", weights, tmp_path / "b.safetensors", "--to", "ours")
    assert (status, err, len(out.splitlines())) == (0, "", 1)
    assert cs.load_model(tmp_path / "b.safetensors").config == build().config


def test_names_of_classes_are_kept_in_our_files_and_left_out_of_others(run, tmp_path, micro):
    micro.classes = tuple("abcdefg")
    cs.save_weights(micro, tmp_path / "a.safetensors")
    words = ["convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "ours"]
    assert json.loads(run(*words, "--json")[1])["left_out"] == []
    assert cs.load_model(tmp_path / "b.safetensors").classes == micro.classes
    for naming in ("official", "mmpretrain"):
        words = ["convert", tmp_path / "b.safetensors", tmp_path / f"{naming}.pth", "--to", naming]
        status, out, err = run(*words)
        assert (status, err) == (0, "")
        assert out.splitlines()[1] == "left out: classes"
    changed = build()
    changed.classes, changed.input = tuple("abcdefghij"), cs.inputs.InputConfig(64)
    cs.save_weights(changed, tmp_path / "c.safetensors")
    words = ["convert", tmp_path / "c.safetensors", tmp_path / "c.pth", "--to", "official"]
    assert run(*words)[1].splitlines()[1] == "left out: config, classes, input"


def test_what_a_run_did_not_keep_is_not_left_out(run, tmp_path, micro):
    content = {"model": micro.state_dict(), "model_ema": None, "scaler": None, "step": 3}
    torch.save(content, tmp_path / "run.pt")
    words = ["convert", tmp_path / "run.pt", tmp_path / "a.safetensors", "--to", "ours"]
    assert run(*words)[1].splitlines()[1] == "left out: step"
    fails(run(*words, "--ema", "--force"), "there is no moving average here")


def test_a_refused_source_costs_nothing(run, tmp_path):
    source, target = tmp_path / "source.pth", tmp_path / "target.safetensors"
    source.write_text("<html>")
    target.write_text("precious")
    words = ["convert", source, target, "--to", "ours", "--force"]
    fails(run(*words), f"{source} is a web page, not weights")
    assert target.read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == [source, target]


def test_the_ending_must_say_what_is_inside(run, tmp_path, weights):
    for naming, name in (("ours", "a.pth"), ("official", "a.safetensors"), ("mmpretrain", "a")):
        status, out, err = run("convert", weights, tmp_path / name, "--to", naming)
        assert (status, out) == (2, "")
        assert f"with --to {naming}, DST ends with " in err
        assert not (tmp_path / name).exists()


def test_a_folder_that_is_not_there_is_named(run, tmp_path, weights):
    target = tmp_path / "nowhere" / "a.pth"
    fails(run("convert", weights, target, "--to", "official"), f"{target} cannot be written")


# --- the program ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "arguments are required: COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["info"], "required: MODEL"),
        (["predict"], "required: IMAGE"),
        (["predict", "a.jpg"], "give --model, for published weights, or --weights, for a file"),
        (["predict", "a.jpg", "--model", "m", "--topk", "0"], "'0' is not a whole number of at"),
        (["predict", "a.jpg", "--model", "m", "--topk", "-1"], "whole number of at least 1"),
        (["predict", "a.jpg", "--model", "m", "--topk", "x"], "whole number of at least 1"),
        (["convert", "a", "b"], "required: --to"),
        (["convert", "a", "b", "--to", "keras"], "invalid choice: 'keras'"),
    ],
)
def test_wrong_usage_is_status_2(run, words, complaint):
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    assert err.startswith("usage: conformer")
    assert complaint in err.splitlines()[-1]


def test_help_has_the_exit_codes_and_examples_that_parse(run):
    status, out, _ = run("--help")
    assert status == 0
    assert all(len(line) <= 80 for line in out.splitlines())
    for code in ("  0 ", "  1 ", "  2 ", "  130 "):
        assert code in out
    examples = [
        line.split(maxsplit=1)[1] for line in out.splitlines() if line[:12] == "  conformer "
    ]
    assert len(examples) == 9
    for example in examples:
        cli.build_parser().parse_args(shlex.split(example))


@pytest.mark.parametrize("command", ["list", "info", "predict", "convert", "export"])
def test_each_command_has_help(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0
    assert "--json" in out
    assert "--debug" in out


def test_debug_shows_the_traceback(run):
    with pytest.raises(ValueError, match="no model matches"):
        run("list", "resnet", "--debug")


def broken(error):
    def command(arguments):
        raise error

    return command


def test_an_error_that_nobody_foresaw_is_one_line_too(run, monkeypatch):
    monkeypatch.setattr(cli, "list_command", broken(RuntimeError("out of\nmemory")))
    fails(run("list"), "RuntimeError: out of memory (--debug shows where)")
    monkeypatch.setattr(cli, "list_command", broken(ValueError()))
    fails(run("list"), "ValueError")


def test_ctrl_c_is_130(run, monkeypatch):
    monkeypatch.setattr(cli, "list_command", broken(KeyboardInterrupt()))
    assert run("list") == (130, "", "conformer: stopped.\n")


def test_warnings_are_notes_on_stderr(run, monkeypatch):
    def command(arguments):
        warnings.warn("look at this", stacklevel=2)
        return []

    monkeypatch.setattr(cli, "list_command", command)
    assert run("list", "--json") == (0, "[]\n", "conformer: note: look at this\n")


def test_names_that_the_terminal_cannot_show_are_written_as_numbers(
    weights, images, monkeypatch, tmp_path
):
    (images / "0.png").rename(images / "früh.png")
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    assert cli.main(["predict", str(images), "--weights", str(weights)]) == 0
    screen.seek(0)
    assert "fr\\xfch.png" in screen.read()


def test_version(run):
    assert run("--version") == (0, f"conformer {cs.__version__}\n", "")


def test_a_reader_that_stops_reading_is_no_error():
    """As in `conformer list | head -0`; the only test that starts a program, which takes long."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "conformer_src.cli", "list"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(command, env=environment, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (shown.returncode, shown.stderr) == (141, b"")


def test_the_command_is_installed_under_its_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"conformer": "conformer_src.cli:main"}
    assert cli.build_parser().prog == "conformer"
