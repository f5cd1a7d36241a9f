"""Two hundred spoilt files of weights: none executed, none a silently wrong model.

Each is either refused with a `WeightsError`, and the model stays bit by bit what it was, or it
gives exactly the weights that were saved: not every byte of a file matters.
"""

import argparse
import io
import json
import os
import pickle
import random
import warnings
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from conformer_src.checks import golden
from conformer_src.conformer import Conformer, ConformerConfig
from conformer_src.files import WeightsError
from conformer_src.inputs import InputConfig
from conformer_src.weights import (
    export_weights,
    load_model,
    load_weights,
    official_name,
    save_weights,
)

REDUCED = ConformerConfig(
    patch_size=8,
    num_classes=3,
    channel_ratio=0.125,
    embed_dim=8,
    depth=6,
    num_heads=2,
    stem="small",
)
MODEL = golden.fill_(Conformer(REDUCED), official_name)
MODEL.classes = NAMES = ("cat", "dog", "früh")
MODEL.input = INPUT = InputConfig(48, (0.5, 0.25, 0.5), (0.25, 0.5, 0.25), crop=1.0, pad=1)
STATE = {name: tensor.clone() for name, tensor in MODEL.state_dict().items()}
SEEDS = range(20)


def torch_file(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bytes of a sound file of each kind."""
    path = tmp_path_factory.mktemp("sound") / "a.safetensors"
    save_weights(MODEL, path)
    named = export_weights(MODEL, "mmpretrain")
    return {
        "ours.safetensors": path.read_bytes(),
        "authors.pth": torch_file({"model": export_weights(MODEL), "args": argparse.Namespace()}),
        "openmmlab.pth": torch_file({"meta": {"epoch": 300}, "state_dict": named}),
    }


KINDS = pytest.mark.parametrize("kind", ["ours.safetensors", "authors.pth", "openmmlab.pth"])


def equal(model, state):
    found = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[n], state[n]) for n in state)


def verdict(error):
    return "more than one sentence" if "\n" in str(error) else "refused"


def outcome(path):
    """Return "refused" or "same"; fail at anything else that loading can do."""
    outcomes = set()
    model = Conformer(REDUCED)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # heads that stay would be a silent loss
            load_weights(model, path)
        assert equal(model, STATE), "other weights were loaded"
        if path.suffix == ".safetensors":
            assert (model.classes, model.input) == (NAMES, INPUT), "other notes were loaded"
        outcomes.add("same")
    except WeightsError as error:
        assert equal(model, before), "a refused file changed the model"
        assert model.classes is model.input is None, "a refused file left notes"
        outcomes.add(verdict(error))
    try:
        model = load_model(path)
        assert equal(model, STATE), "another model was built"
        if path.suffix == ".safetensors":
            assert (model.config, model.classes, model.input) == (REDUCED, NAMES, INPUT)
        outcomes.add("same")
    except WeightsError as error:
        if path.suffix == ".safetensors":  # torch files do not tell this model
            outcomes.add(verdict(error))
    (only,) = outcomes  # both agree
    assert only in ("same", "refused")
    return only


def spoilt(path, raw):
    path.write_bytes(raw)
    return path


@KINDS
def test_the_sound_files_load(kind, files, tmp_path):
    assert outcome(spoilt(tmp_path / kind, files[kind])) == "same"


@KINDS
@pytest.mark.parametrize("seed", SEEDS)
def test_one_flipped_bit(kind, seed, files, tmp_path):
    raw, chance = bytearray(files[kind]), random.Random(seed)
    raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    outcome(spoilt(tmp_path / kind, raw))


@KINDS
@pytest.mark.parametrize("seed", SEEDS)
def test_one_flipped_bit_among_the_names(kind, seed, files, tmp_path):
    """In the header of a safetensors file, in the directory at the end of a zip."""
    raw, chance = bytearray(files[kind]), random.Random(seed)
    size = int.from_bytes(raw[:8], "little") if kind.endswith("safetensors") else -len(raw) // 4
    place = chance.randrange(abs(size))
    raw[8 + place if size > 0 else -1 - place] ^= 1 << chance.randrange(8)
    outcome(spoilt(tmp_path / kind, raw))


@KINDS
@pytest.mark.parametrize("seed", range(5))
def test_a_part_overwritten_with_noise(kind, seed, files, tmp_path):
    raw, chance = bytearray(files[kind]), random.Random(seed)
    start = chance.randrange(len(raw) - 600)
    raw[start : start + 600] = chance.randbytes(600)
    assert outcome(spoilt(tmp_path / kind, raw)) == "refused"


@KINDS
@pytest.mark.parametrize("seed", range(8))
def test_a_file_that_ends_early(kind, seed, files, tmp_path):
    raw = files[kind]
    length = [0, 1, 7, 8, 100, len(raw) - 1][seed] if seed < 6 else len(raw) * (seed - 5) // 3
    assert outcome(spoilt(tmp_path / kind, raw[:length])) == "refused"


@KINDS
@pytest.mark.parametrize("seed", range(3))
def test_a_file_that_goes_on(kind, seed, files, tmp_path):
    more = [b"\0", b"</html>", files[kind]][seed]
    outcome(spoilt(tmp_path / kind, files[kind] + more))


def _name(chance):
    """Return a name of a tensor with more than one number."""
    return chance.choice([name for name in STATE if STATE[name].numel() > 1])


def dropped(state, chance):
    del state[_name(chance)]


def added(state, chance):
    state[f"{_name(chance)}2"] = torch.zeros(1)


def misspelt(state, chance):
    name = _name(chance)
    state[f"{name[:-1]}_"] = state.pop(name)


def turned(state, chance):
    name = chance.choice([n for n, t in STATE.items() if t.ndim == 2 and t.shape[0] != t.shape[1]])
    state[name] = state[name].T.contiguous()


def shorter(state, chance):
    name = _name(chance)
    state[name] = state[name][:-1].clone()


def deeper(state, chance):
    name = _name(chance)
    state[name] = state[name][None].clone()


def not_a_number(state, chance):
    name = _name(chance)
    state[name] = state[name].clone()
    state[name].view(-1)[chance.randrange(state[name].numel())] = float("nan")


def infinite(state, chance):
    name = _name(chance)
    state[name] = state[name].clone()
    state[name].view(-1)[chance.randrange(state[name].numel())] = float("-inf")


CHANGES = [dropped, added, misspelt, turned, shorter, deeper, not_a_number, infinite]


@KINDS
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("change", CHANGES)
def test_a_sound_file_of_other_tensors(kind, change, seed, files, tmp_path):
    """No checksum helps here: the file is just as it was written."""
    state, chance = dict(STATE), random.Random(seed)
    change(state, chance)
    if kind == "ours.safetensors":
        raw = save(state)
    elif kind == "authors.pth":
        raw = torch_file({"model": {official_name(name): state[name] for name in state}})
    else:
        raw = torch_file(state)
    assert outcome(spoilt(tmp_path / kind, raw)) == "refused"


@pytest.mark.parametrize("change", [not_a_number, infinite, dropped, turned])
def test_our_header_does_not_vouch_for_other_tensors(change, files, tmp_path):
    path = spoilt(tmp_path / "a.safetensors", files["ours.safetensors"])
    with safe_open(path, framework="pt") as stream:
        notes = stream.metadata()
    state = load(files["ours.safetensors"])
    change(state, random.Random(0))
    assert outcome(spoilt(path, save(state, notes))) == "refused"


def edited(files, path, edit):
    """Our file with another header around the same tensors."""
    with safe_open(spoilt(path, files["ours.safetensors"]), framework="pt") as stream:
        notes = stream.metadata()
    edit(notes)
    return spoilt(path, save(load(files["ours.safetensors"]), notes))


@pytest.mark.parametrize(
    "classes",
    [
        None,
        "",
        "null",
        "{}",
        '"abc"',
        "[1, 2, 3]",
        '["cat", "dog"]',
        '["cat", "dog", "frueh"]',
        '["dog", "cat", "fr\\u00fch"]',
        '["cat","dog","fr\\u00fch"]',
        '["cat", "dog", "fr\\u00fch"] ',
        "[" * 100_000,
    ],
    ids=lambda value: str(value)[:26],
)
def test_other_names_of_classes(classes, files, tmp_path):
    def edit(notes):
        notes.pop("classes") if classes is None else notes.update(classes=classes)

    assert outcome(edited(files, tmp_path / "a.safetensors", edit)) == "refused"


@pytest.mark.parametrize(
    "changes",
    [
        None,
        {"image_size": 40},
        {"mean": [0.5, 0.5, 0.5]},
        {"std": [0.25, 0.5, 0.2500001]},
        {"crop": 0.875},
        {"pad": 0},
        {"pad": 24},
        {"mean": [0.5], "std": [0.25]},
        {"mean": []},
        {"std": [1, 1, 0]},
        {"std": [1, 1, float("nan")]},
        {"crop": 0},
        {"image_size": 10**400},
        {"colour": "grey"},
    ],
    ids=lambda value: str(value)[:26],
)
def test_another_input(changes, files, tmp_path):
    def edit(notes):
        found = notes.pop("input")
        if changes is not None:
            notes["input"] = json.dumps(json.loads(found) | changes)

    assert outcome(edited(files, tmp_path / "a.safetensors", edit)) == "refused"


@pytest.mark.parametrize("key", ["config", "package", "sha256"])
def test_a_header_that_lacks_a_note(key, files, tmp_path):
    """Who wrote the file does not matter, as long as the checksum and what it covers are there."""
    path = edited(files, tmp_path / "a.safetensors", lambda notes: notes.pop(key))
    assert outcome(path) == ("same" if key == "package" else "refused")


# Pickles that run something when Python opens them: each would make the file `it_ran`.
HOSTILE = {
    "os.system": lambda trace: (os.system, (f"touch {trace}",)),
    "exec": lambda trace: (exec, (f"open({trace!r}, 'w')",)),
    "eval": lambda trace: (eval, (f"open({trace!r}, 'w')",)),
    "open": lambda trace: (open, (trace, "w")),
    "import": lambda trace: (__import__, ("no_such_module",)),
    "getattr": lambda trace: (getattr, (argparse.Namespace, "__init__")),
    "torch.load": lambda trace: (torch.load, (trace,)),
    "pickle.loads": lambda trace: (
        pickle.loads,
        (pickle.dumps(_Calls(exec, (f"open({trace!r}, 'w')",))),),
    ),
}


class _Calls:
    def __init__(self, function, arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("place", ["beside", "among", "inside"])
@pytest.mark.parametrize("call", HOSTILE)
def test_no_pickle_is_executed(call, place, tmp_path):
    trace = tmp_path / "it_ran"
    trap = _Calls(*HOSTILE[call](str(trace)))
    content = {
        "beside": {"model": export_weights(MODEL), "args": trap},
        "among": export_weights(MODEL) | {"cls_token": trap},
        "inside": {"model": export_weights(MODEL), "args": argparse.Namespace(lr=trap)},
    }[place]
    assert outcome(spoilt(tmp_path / "a.pth", torch_file(content))) == "refused"
    assert not trace.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_is_not_opened(protocol, tmp_path):
    trace = tmp_path / "it_ran"
    raw = pickle.dumps(_Calls(exec, (f"open({str(trace)!r}, 'w')",)), protocol)
    assert outcome(spoilt(tmp_path / "a.pth", raw)) == "refused"
    assert not trace.exists()
    pickle.loads(raw)
    assert trace.exists()  # it does work


@pytest.mark.parametrize("kind", [kind for kind in KINDS.args[1] if kind.endswith(".pth")])
def test_a_hostile_pickle_in_place_of_a_part(kind, files, tmp_path):
    """A sound zip with right checksums, whose pickle is another."""
    trace = tmp_path / "it_ran"
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(files[kind])) as old, zipfile.ZipFile(target, "w") as new:
        for part in old.infolist():
            body = old.read(part)
            if part.filename.endswith("data.pkl"):
                body = pickle.dumps(_Calls(exec, (f"open({str(trace)!r}, 'w')",)), 2)
            new.writestr(part.filename, body)
    assert outcome(spoilt(tmp_path / kind, target.getvalue())) == "refused"
    assert not trace.exists()


def test_there_are_two_hundred_of_them(request):
    ran = [item for item in request.session.items if item.path == request.path]
    spoilt_ones = [item for item in ran if item.originalname != "test_the_sound_files_load"]
    if len(spoilt_ones) < 20:
        pytest.skip("only a part was asked for")
    assert len(spoilt_ones) - 1 >= 200
