"""Networks as files for other programs: what they compute, say and refuse."""

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from test_ecosystem import assert_same, toy
from torchvision.transforms import v2

import conformer_src as cs
from conformer_src import export
from conformer_src.inputs import InputConfig

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SWITCHES = [
    {},
    {"stem": "small", "patch_size": 8, "pad": True, "pos_embed": 4},
    {"fcu_down": "conv", "fcu_up": "bilinear", "num_med_block": 1},
    {"fcu_down": "max", "coupling": "down"},
    {"in_chans": 1},
    {"branches": "conv"},
    {"branches": "trans"},
]


@pytest.fixture
def model():
    """A small network that knows its classes and its images."""
    model = toy(depth=3).eval()
    model.classes = tuple(f"kind {n}" for n in range(10))
    model.input = InputConfig(64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), crop=1.0)
    return model


def run_onnx(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": images.numpy()})
    return torch.from_numpy(found), session


def run_pt2(path, images):
    notes = {"classes": "", "input": ""}
    return torch.export.load(path, extra_files=notes).module()(images), notes


@pytest.mark.parametrize(
    ("changes", "ending"), [({}, ".pt2"), *((one, ".onnx") for one in SWITCHES)], ids=str
)
@torch.no_grad()
def test_the_file_computes_the_sum_for_any_batch(changes, ending, tmp_path):
    model = toy(**{"depth": 3} | changes).eval()
    done = cs.export_model(model, tmp_path / f"net{ending}", 64)
    assert done.shape == (model.config.in_chans, 64, 64)
    assert done.deviation < 1e-4
    run = {".onnx": run_onnx, ".pt2": run_pt2}[ending]
    for batch in (1, 2, 5):
        images = torch.randn(batch, *done.shape)
        found, _ = run(done.path, images)
        assert_same([found], [model(images).sum()])
    assert [path.name for path in tmp_path.iterdir()] == [done.path.name]


def test_classes_and_input_stand_in_the_file(model, tmp_path):
    _, session = run_onnx(cs.export_model(model, tmp_path / "net.onnx").path, images(64))
    _, notes = run_pt2(cs.export_model(model, tmp_path / "net.pt2").path, images(64))
    for found in (session.get_modelmeta().custom_metadata_map, notes):
        assert tuple(json.loads(found["classes"])) == model.classes
        assert InputConfig(**json.loads(found["input"])) == model.input
    shapes = [(one.name, one.shape) for one in (*session.get_inputs(), *session.get_outputs())]
    assert shapes == [("images", ["batch", 3, 64, 64]), ("logits", ["batch", 10])]


@torch.no_grad()
def test_the_page_reads_the_file_without_this_package(model, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "book/api/export.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "conformer" not in code
    assert "torch" not in code
    cs.export_model(model, tmp_path / "flowers.onnx")
    monkeypatch.chdir(tmp_path)
    pixels = torch.rand(4, 3, 64, 64)
    exec(code, {"pixels": pixels.movedim(1, -1).double().numpy()})
    best = model(v2.functional.normalize(pixels, model.input.mean, model.input.std)).sum().argmax(1)
    assert capsys.readouterr().out == f"{[model.classes[place] for place in best]}\n"


def images(side, channels=3):
    return torch.randn(2, channels, side, side)


def test_without_an_input_the_usual_one_is_written_if_there_is_one(tmp_path):
    small = {"depth": 3, "stem": "small", "patch_size": 8, "pos_embed": 4}
    done = cs.export_model(toy(**small), tmp_path / "net.pt2")
    assert done.shape == (3, 32, 32)
    assert InputConfig(**json.loads(done.notes["input"])) == InputConfig(32, crop=1.0)
    done = cs.export_model(toy(**small, in_chans=1), tmp_path / "grey.pt2")
    assert (done.shape, done.notes) == ((1, 32, 32), {})


def test_another_size_replaces_that_of_the_input(model, tmp_path):
    done = cs.export_model(model, tmp_path / "net.pt2", 96)
    assert done.shape == (3, 96, 96)
    assert json.loads(done.notes["input"])["image_size"] == 96
    assert model.input.image_size == 64


def test_the_model_stays_as_it_was(model, tmp_path):
    model = model.to(torch.float64).train()
    before = copy.deepcopy(model.state_dict())
    state, random = model.input, torch.get_rng_state()
    cs.export_model(torch.compile(model), tmp_path / "net.pt2")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(part.training for part in model.modules())
    assert model.input is state
    assert torch.equal(torch.get_rng_state(), random)


def test_a_file_that_computes_something_else_is_not_written(model, tmp_path, monkeypatch):
    translate, opened = export._KINDS[".pt2"]
    later = {".pt2": (translate, lambda path: lambda images: opened(path)(images.flip(0)))}
    monkeypatch.setattr(export, "_KINDS", later)
    with pytest.raises(ValueError, match=r"net.pt2 would compute something else \(deviation \d"):
        cs.export_model(model, tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_not_written(model, tmp_path):
    torch.nn.init.constant_(next(model.parameters()), torch.nan)
    (tmp_path / "net.pt2").write_text("precious")
    with pytest.raises(ValueError, match=r"\(deviation nan\).*are all weights finite\?$"):
        cs.export_model(model, tmp_path / "net.pt2")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("changes", "name", "size", "words"),
    [
        ({}, "net.pth", None, r"net.pth must end with .onnx or .pt2, which says what to write\."),
        ({}, "net", None, r"net must end with .onnx or .pt2"),
        ({}, "net.pt2", 0, "image_size must be a whole number of at least 1, not 0"),
        ({}, "net.pt2", "64", "image_size must be a whole number of at least 1, not '64'"),
        ({}, "net.pt2", 70, "height 70 does not fit"),
        ({"num_classes": 0}, "net.pt2", 64, "num_classes=0 ranks nothing; export one with heads"),
        ({}, "nowhere/net.pt2", 64, r"cannot be written \(No such file or directory\)"),
    ],
)
def test_what_cannot_be_exported_is_said(changes, name, size, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        cs.export_model(toy(depth=3, **changes), tmp_path / name, size)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_conformer_is_said(tmp_path):
    with pytest.raises(TypeError, match="Linear has no ConformerConfig; give a Conformer"):
        cs.export_model(torch.nn.Linear(2, 2), tmp_path / "net.pt2")


def test_without_the_translator_the_package_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"install it: python -m pip install onnxscript$"):
        cs.export_model(model, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_torch_that_cannot_translate_is_named(model, tmp_path, monkeypatch):
    def cannot(*arguments, **options):
        raise torch.onnx.OnnxExporterError("step 3/3")

    monkeypatch.setattr(torch.onnx, "export", cannot)
    with pytest.raises(
        ValueError, match=r"^torch \d.* cannot translate .* or write a \.pt2 file\.$"
    ):
        cs.export_model(model, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


# --- conformer export -----------------------------------------------------------------------------


@pytest.fixture
def weights(model, tmp_path):
    path = tmp_path / "mine.safetensors"
    cs.save_weights(model, path)
    return path


@pytest.mark.parametrize("ending", export.ENDINGS)
def test_the_command_says_what_it_wrote(run, weights, tmp_path, ending):
    target = tmp_path / f"net{ending}"
    status, out, err = run("export", weights, target)
    assert (status, err) == (0, "")
    first, second = out.splitlines()
    assert first == f"wrote {target}: takes images (batch, 3, 64, 64)"
    assert second.startswith("run and compared: differs from the network by at most ")
    status, out, err = run("export", weights, target)
    assert (status, out) == (1, "")
    assert err == f"conformer: {target} exists; choose another name, or replace it with --force.\n"
    status, out, err = run("export", weights, target, "--force", "--size", "96", "--json")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert found["shape"] == [3, 96, 96]
    assert found["input"]["image_size"] == 96
    assert found["classes"][9] == "kind 9"
    assert found["deviation"] < 1e-4


def test_the_command_says_when_nothing_was_compared(run, weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status, out, err = run("export", weights, tmp_path / "net.onnx")
    assert (status, err) == (0, "")
    assert out.splitlines()[1].endswith("; for that: python -m pip install onnxruntime")


def test_the_command_refuses_other_endings(run, weights, tmp_path):
    status, out, err = run("export", weights, tmp_path / "net.pth")
    assert (status, out) == (2, "")
    assert err.endswith("error: DST ends with .onnx or .pt2.\n")
