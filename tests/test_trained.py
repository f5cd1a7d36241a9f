"""The networks that come with the package: they are what the stored studies say they are."""

from pathlib import Path

import pytest
import torch

from benchmarks.ablation import SHIPPED, again, stored
from conformer_src.ablation import fashion_study, open_images
from conformer_src.files import WeightsError
from conformer_src.predict import predict
from conformer_src.trained import _FOLDER, list_trained, load_trained
from conformer_src.training import evaluate

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "benchmarks" / "results" / "ablation.json"


def test_all_six_are_there_and_small():
    assert list_trained() == sorted(SHIPPED)
    assert sum(path.stat().st_size for path in _FOLDER.iterdir()) < 6_000_000


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_each_scores_what_its_run_scored(name):
    """16 bits change a few answers of 2,000 at most."""
    study, variant, phase = SHIPPED[name]
    row = next(
        row for row in stored(STORED)[study] if (row["variant"], row["seed"]) == (variant, 0)
    )
    scores = evaluate(load_trained(name), open_images(phase)[1])._asdict()
    for head, accuracy in row["scores"][phase].items():
        if head in ("conv", "trans", "sum"):
            assert (accuracy is None) == (scores[head] is None)
            assert accuracy is None or abs(scores[head] - accuracy) <= 0.2


def test_the_drawn_networks_know_their_cues():
    """The CNN sees corners, the ViT bars, and only the Conformer both."""
    cues = {(row["variant"], row["seed"]): row["cues"]["sum"] for row in stored(STORED)["drawn"]}
    corners, bars = cues["CNN alone", 0]
    assert corners > 90
    assert bars < 60
    corners, bars = cues["ViT alone", 0]
    assert corners < 40
    assert bars > 90
    assert min(cues["base", 0]) > 60  # chance: 25 and 50


def test_they_are_in_evaluation_mode_and_in_32_bits():
    for name in list_trained():
        model = load_trained(name)
        assert not model.training
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_fashion_networks_predict_pictures():
    """Names and input travel with the weights, so that a plain 28 x 28 picture is enough."""
    images = open_images("fashion")[1]
    picture = images.images[0, :, 2:-2, 2:-2] * 0.353 + 0.286
    found = predict(load_trained("fashion-conformer"), picture, topk=1)
    assert found[0].labels[0] in images.classes


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="choose fashion-cnn"):
        load_trained("fashion-cn")


def test_an_altered_file_is_refused(tmp_path, monkeypatch):
    source = _FOLDER / "fashion-vit.safetensors"
    damaged = bytearray(source.read_bytes())
    damaged[-100] ^= 1
    (tmp_path / source.name).write_bytes(damaged)
    monkeypatch.setattr("conformer_src.trained._FOLDER", tmp_path)
    with pytest.raises(WeightsError):
        load_trained("fashion-vit")


def test_a_stored_run_can_be_rebuilt(capsys):
    """The cheapest run of all, trained again, ends within the spread of its seeds."""
    assert again(fashion_study(), stored(STORED)["fashion"], "ViT alone", 0) == 0
    assert "stored" in capsys.readouterr().out
