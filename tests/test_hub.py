"""`from_pretrained`, `save_pretrained`, `push_to_hub`: a folder, and a Hub that is made up."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file

import conformer_src
from conformer_src.checks import golden
from conformer_src.conformer import VARIANTS, Conformer
from conformer_src.files import WeightsError
from conformer_src.inputs import InputConfig
from conformer_src.weights import export_weights, load_model, official_name

CONFIG = replace(VARIANTS["conformer_micro"], num_classes=7, pos_embed=4)
FILES = ["config.json", "model.safetensors"]


@pytest.fixture(scope="module")
def model():
    return golden.fill_(Conformer(CONFIG), official_name)


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "new/model")
    return tmp_path / "new/model"


def same(found, expected):
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_folder_there_and_back(as_type, model, folder, recwarn):
    assert names(folder) == FILES
    found = Conformer.from_pretrained(as_type(folder))
    assert type(found) is Conformer
    assert found.config == CONFIG
    same(found, model)
    assert not recwarn.list


def test_the_files_are_those_of_the_package(model, folder):
    same(load_model(folder / "model.safetensors"), model)
    assert json.loads((folder / "config.json").read_text()) == asdict(CONFIG)
    model.save_pretrained(folder)  # a second time, over what is there
    assert names(folder) == FILES


def test_changes_replace_fields_of_the_config(model, folder):
    words = "^the weights are for 7 classes and the model for 3, so it keeps its own heads$"
    with pytest.warns(UserWarning, match=words):
        found = Conformer.from_pretrained(folder, num_classes=3, drop_path_rate=0.1)
    assert found.config == replace(CONFIG, num_classes=3, drop_path_rate=0.1)
    assert torch.equal(found.entry.stem.conv1.weight, model.entry.stem.conv1.weight)


def test_names_of_the_classes_come_along(model, tmp_path):
    named = Conformer(CONFIG)
    named.classes = tuple("abcdefg")
    named.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == asdict(CONFIG)
    assert Conformer.from_pretrained(tmp_path).classes == named.classes
    assert Conformer.from_pretrained(tmp_path, drop_path_rate=0.1).classes == named.classes
    with pytest.warns(UserWarning, match="it keeps its own heads"):
        assert Conformer.from_pretrained(tmp_path, num_classes=3).classes is None
    model.save_pretrained(tmp_path)
    assert Conformer.from_pretrained(tmp_path).classes is None


@pytest.mark.parametrize("changes", [{}, {"num_classes": 3}])
def test_names_that_are_none_are_refused(changes, model, folder):
    notes = {"classes": '["a", "b"]'}  # and no config: the folder has one
    save_file(model.state_dict(), folder / "model.safetensors", notes)
    words = '^"classes" in the header holds 2 names for 7 classes; save the weights again'
    with pytest.raises(WeightsError, match=words):
        Conformer.from_pretrained(folder, **changes)


def test_the_input_comes_along_to_fresh_heads_as_well(model, tmp_path):
    taught = Conformer(CONFIG)
    taught.input = InputConfig(40, crop=0.9)
    taught.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == asdict(CONFIG)
    assert Conformer.from_pretrained(tmp_path).input == taught.input
    with pytest.warns(UserWarning, match="it keeps its own heads"):
        assert Conformer.from_pretrained(tmp_path, num_classes=3).input == taught.input
    model.save_pretrained(tmp_path)
    assert Conformer.from_pretrained(tmp_path).input is None


@pytest.mark.parametrize("changes", [{}, {"num_classes": 3}])
def test_an_input_that_is_none_is_refused(changes, model, folder):
    save_file(model.state_dict(), folder / "model.safetensors", {"input": '{"image_size": 0}'})
    words = r'^"input" in the header holds no InputConfig \(image_size must be a whole number of at'
    with pytest.raises(WeightsError, match=words):
        Conformer.from_pretrained(folder, **changes)


def test_wrong_names_are_not_saved(tmp_path):
    wrong = Conformer(CONFIG)
    wrong.classes = ("a", "b")
    with pytest.raises(WeightsError, match=r"^model\.classes holds 2 names for 7 classes; set"):
        wrong.save_pretrained(tmp_path)
    assert names(tmp_path) == []


def test_a_class_that_inherits_is_what_comes_back(model, folder):
    class Mine(Conformer):
        pass

    assert type(Mine.from_pretrained(folder)) is Mine


def test_weights_of_others_with_a_config_are_enough(model, tmp_path):
    save_file(export_weights(model, "mmpretrain"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(asdict(CONFIG)))
    same(Conformer.from_pretrained(tmp_path), model)


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def without_config(folder):
    (folder / "config.json").unlink()


def damaged(folder):
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-9] ^= 4
    (folder / "model.safetensors").write_bytes(raw)


def other_config(folder):
    (folder / "config.json").write_text(json.dumps(asdict(replace(CONFIG, num_heads=2))))


def no_config(folder):
    (folder / "config.json").write_text("{")


def no_text(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\xff")


def wings(folder):
    (folder / "config.json").write_text('{"wings": 2}')


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_weights, r"^there is no model\.safetensors in .*; write it with save_pretrained"),
        (without_config, r"^there is no config\.json in .*; write it with save_pretrained"),
        (damaged, "is damaged: its values are not those that were saved; fetch it again"),
        (other_config, r"^config\.json and the header of model\.safetensors disagree; save both"),
        (no_config, r"^this is no config of a Conformer \(.*\): \{$"),
        (wings, r"^this is no config of a Conformer \(.*wings.*\)"),
        (no_text, r"config\.json cannot be read \(.*\); fetch it again"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(spoil, words, folder):
    spoil(folder)
    with pytest.raises(WeightsError, match=words) as error:
        Conformer.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_an_unknown_field_is_refused(folder):
    with pytest.raises(
        ValueError, match=r"^ConformerConfig has no field 'num_class'; choose num_c"
    ):
        Conformer.from_pretrained(folder, num_class=3)


@pytest.mark.parametrize(
    "source", ["no_such_folder", "./no/folder", "/no/such/folder", Path("a/b")]
)
def test_what_is_neither_a_folder_nor_a_repository_is_said(source):
    with pytest.raises(
        WeightsError, match=r"^there is no folder .*, and a repository is called ac"
    ):
        Conformer.from_pretrained(source)


def test_a_folder_that_cannot_be_made_is_said(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match=r"file/a cannot be made \(Not a directory\)"):
        model.save_pretrained(tmp_path / "file/a")


@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_repository_is_asked_for_both_files(revision, model, folder, monkeypatch):
    asked = []

    def hf_hub_download(repo_id, filename, *, revision=None):
        asked.append((repo_id, filename, revision))
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    options = {"revision": revision} if revision else {}
    same(Conformer.from_pretrained("some-one/conformer_1.0", **options), model)
    assert sorted(asked) == [("some-one/conformer_1.0", name, revision) for name in FILES]


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("cannot reach the Hub.\nCheck the network."),
        EntryNotFoundError("cannot reach the Hub"),
        RuntimeError("cannot reach the Hub\n\nand more"),
        ConnectionError("cannot reach the Hub"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_hub_raises_becomes_one_sentence(error, model, monkeypatch):
    def fails(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fails)
    for call in (lambda: Conformer.from_pretrained("a/b"), lambda: model.push_to_hub("a/b")):
        with pytest.raises(WeightsError, match=r"^the Hub did not do it \(cannot reach the Hub\)"):
            call()


@pytest.mark.parametrize("private", [None, True])
def test_a_model_is_uploaded_as_it_lies_in_a_folder(private, model, monkeypatch, tmp_path):
    made, uploaded = [], []

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        made.append((repo_id, private, exist_ok))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/someone/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        uploaded.append((repo_id, commit_message, names(Path(folder_path))))
        same(Conformer.from_pretrained(folder_path), model)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    address = model.push_to_hub("mine", private=private, message="First")
    assert address == "https://huggingface.co/someone/mine"
    assert made == [("mine", private, True)]
    assert uploaded == [("someone/mine", "First", FILES)]


def test_what_is_faked_here_exists_in_the_library():
    """The functions above stand in for these: their arguments must be real."""
    from inspect import signature

    wanted = {
        huggingface_hub.hf_hub_download: {"repo_id", "filename", "revision"},
        huggingface_hub.HfApi.create_repo: {"repo_id", "private", "exist_ok"},
        huggingface_hub.HfApi.upload_folder: {"repo_id", "folder_path", "commit_message"},
    }
    for function, arguments in wanted.items():
        assert arguments <= set(signature(function).parameters)
    assert huggingface_hub.RepoUrl("https://huggingface.co/a/b").repo_id == "a/b"


def test_without_the_library_folders_work_and_the_rest_says_what_to_install(
    model, folder, monkeypatch
):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    same(Conformer.from_pretrained(folder), model)
    for call in (lambda: Conformer.from_pretrained("a/b"), lambda: model.push_to_hub("a/b")):
        with pytest.raises(
            WeightsError, match=r"^the Hub needs a package .* pip install huggingfa"
        ):
            call()


def test_the_library_is_imported_only_when_it_is_needed(folder):
    code = (
        "import sys, conformer_src as cs; cs.Conformer.from_pretrained(sys.argv[1]); "
        "print('huggingface_hub' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(conformer_src.__file__).parents[1])}
    command = [sys.executable, "-c", code, str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr
