"""Runs are stopped in every way that happens, and go on to the same bits."""

import csv
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_runs import draw_images, small_recipe, start

from conformer_src import checkpoints, runs
from conformer_src.cli import main
from conformer_src.files import WeightsError, read_file
from conformer_src.recipes import load_recipe, write_recipe
from conformer_src.runs import RunError, Stopped, resume_run, start_run
from conformer_src.weights import load_model

KILLS = 20


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("images"))


def begin(recipe, folder):
    start_run(recipe, folder)


def go_on(folder):
    resume_run(folder)


@pytest.fixture(scope="module")
def whole_run(images, tmp_path_factory):
    """A run that nobody disturbed, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start(int, log=folder.parent / "log").join()  # the server imports once
    began = time.monotonic()
    process = start(begin, small_recipe(images), folder, log=folder.parent / "log")
    process.join()
    assert process.exitcode == 0, (folder.parent / "log").read_text()
    return folder, time.monotonic() - began


def newest(folder):
    return checkpoints.load_checkpoint(folder)


def same(one, other):
    """Say whether nested content is equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


TIMED = ("images_per_second", "waiting")


def require_same_weights(folder, reference):
    for name in ("last.safetensors", "best.safetensors"):
        mine, theirs = read_file(folder / name), read_file(reference / name)
        assert same(mine, theirs)  # tensors, config, classes, checksum


def require_same_run(folder, reference):
    """Everything but the times must be equal, to the last bit."""
    require_same_weights(folder, reference)
    mine, theirs = newest(folder), newest(reference)
    for content in (mine, theirs):
        for row in content["progress"]["history"]:
            for name in TIMED:
                row.pop(name)
        content["recipe"].pop("save_steps")
        content["recipe"].pop("data")
    assert same(mine, theirs)


def resume_to_the_end(folder, recipe, log):
    """Go on as a user would: with --resume if there is a run, else from the start."""
    function, arguments = (
        (go_on, (folder,)) if (folder / "recipe.toml").exists() else (begin, (recipe, folder))
    )
    process = start(function, *arguments, log=log)
    process.join()
    assert process.exitcode == 0, log.read_text()


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_killed_run_ends_in_the_same_bits(seed, images, whole_run, tmp_path):
    reference, seconds = whole_run
    folder, log, recipe = tmp_path / "run", tmp_path / "log", small_recipe(images)
    process = start(begin, recipe, folder, log=log)
    time.sleep(random.Random(seed).uniform(0, seconds))
    process.kill()
    process.join()
    resume_to_the_end(folder, recipe, log)
    require_same_run(folder, reference)
    assert not list(folder.glob(".*.part")) or process.exitcode == -signal.SIGKILL


def die_while_saving(recipe, folder, count, moment):
    """Run until the `count`-th checkpoint, and die while it is written."""
    calls = []

    def dying(name, original):
        def call(*arguments, **options):
            is_checkpoint = any(
                str(one).endswith(".pt") or ".part" in str(one) for one in arguments
            )
            if is_checkpoint:
                calls.append(name)
            if calls.count(name) < count or not is_checkpoint:
                return original(*arguments, **options)
            if moment == "half":
                original(*arguments, **options)
                with open(arguments[1], "r+b") as stream:
                    stream.truncate(os.path.getsize(arguments[1]) // 2)
            if moment == "renamed":
                original(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        return call

    if moment == "half":
        torch.save = dying("save", torch.save)
    else:
        os.replace = dying("replace", os.replace)
    start_run(recipe, folder)


@pytest.mark.parametrize("moment", ["half", "before the renaming", "renamed"])
@pytest.mark.parametrize("count", [1, 6])
def test_a_run_killed_while_it_saves_ends_in_the_same_bits(
    moment, count, images, whole_run, tmp_path
):
    folder, log, recipe = tmp_path / "run", tmp_path / "log", small_recipe(images)
    process = start(die_while_saving, recipe, folder, count, moment, log=log)
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    resume_to_the_end(folder, recipe, log)
    require_same_run(folder, whole_run[0])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(number, code, images, whole_run, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    recipe = small_recipe(images, save_steps=0)
    write_recipe(recipe, tmp_path / "mine.toml")
    process = start(main, ["train", str(tmp_path / "mine.toml"), "--out", str(folder)], log=log)
    while not list(folder.glob("checkpoint-*")):  # the first epoch has ended
        assert process.is_alive(), log.read_text()
        time.sleep(0.005)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == code, log.read_text()
    assert f"go on with: conformer train --resume {folder}" in log.read_text()
    assert "Traceback" not in log.read_text()
    step = newest(folder)["step"]
    assert 4 <= step < 12
    resume_to_the_end(folder, recipe, log)
    require_same_run(folder, whole_run[0])


def test_a_second_ctrl_c_breaks_off_but_not_what_launchers_repeat(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: clock[0])
    with runs.stop_requests() as asked:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert asked.number == signal.SIGINT
        clock[0] += 2
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_folder_of_a_run(images, whole_run):
    folder = whole_run[0]
    assert load_recipe(folder / "recipe.toml") == small_recipe(images)
    with (folder / "metrics.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert {"train_loss", "val_conv", "val_trans", "val_sum", "ema_sum", "lr"} <= rows[0].keys()
    assert len(list(folder.glob("checkpoint-*.pt"))) == 2  # the last of twelve
    (starting,) = json.loads((folder / "environment.json").read_text())
    assert starting["versions"]["torch"] == torch.__version__
    assert "command" in starting
    assert Image.open(folder / "curves.png").width > 500
    result = json.loads((folder / "result.json").read_text())
    assert result["val_sum"] == float(rows[-1]["val_sum"])
    model = load_model(folder / "best.safetensors")
    assert model.classes == ("a", "b", "c")
    assert not list(folder.glob(".*"))


def test_a_checkpoint_gives_its_weights_and_its_average(images, whole_run, tmp_path):
    from conformer_src import create_model, load_weights

    content = newest(whole_run[0])
    model = create_model("conformer_micro", num_classes=3, **small_recipe(images).model_options)
    path = checkpoints.find_checkpoints(whole_run[0])[0]
    for ema, entry in ((False, "model"), (True, "model_ema")):
        load_weights(model, path, ema)
        assert same(dict(model.state_dict()), dict(content[entry]))


def test_a_finished_run_can_be_resumed_and_stays(images, whole_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run[0], folder)
    before = (folder / "metrics.csv").read_bytes()
    result = resume_run(folder, lambda line: None)
    assert result["epoch"] == 3
    assert (folder / "metrics.csv").read_bytes() == before
    require_same_run(folder, whole_run[0])


def test_a_folder_with_a_run_is_not_used_again(images, whole_run):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in whole_run[0].iterdir())
    with pytest.raises(RunError, match=r"holds a run; go on with --resume .*, or choose another"):
        start_run(small_recipe(images), whole_run[0])
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in whole_run[0].iterdir())


def test_what_defines_a_run_cannot_change(whole_run):
    with pytest.raises(RunError, match="lr cannot change while a run goes on"):
        resume_run(whole_run[0], lr=1e-4)
    with pytest.raises(RunError, match=r"there is no run in .*nowhere: it has no recipe.toml"):
        resume_run(whole_run[0] / "nowhere")


class Interrupt:
    """Called with each line of a run; does something after an epoch."""

    def __init__(self, deed, epoch=1):
        self.deed, self.epoch = deed, epoch

    def __call__(self, line):
        if line.split()[0] == str(self.epoch):
            self.deed()


@pytest.fixture
def own_images(images, tmp_path):
    return Path(shutil.copytree(images, tmp_path / "images"))


def test_a_vanished_folder(own_images, whole_run, tmp_path):
    folder, away = tmp_path / "run", tmp_path / "away"
    recipe = small_recipe(own_images)
    vanish = Interrupt(lambda: own_images.rename(away))
    with pytest.raises(
        RunError, match=r"images/./\d\d.png cannot be read .* saved up to step 4: "
    ) as error:
        start_run(recipe, folder, vanish)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*put it back"):
        resume_run(folder)
    resume_run(folder, lambda line: None, data=str(away))
    require_same_weights(folder, whole_run[0])


def test_an_image_that_breaks_in_the_middle(own_images, whole_run, tmp_path):
    folder, good = tmp_path / "run", {}

    def spoil():
        for path in own_images.glob("a/*.png"):
            good[path] = path.read_bytes()
            path.write_bytes(good[path][:60])

    for workers in (0, 1):
        shutil.rmtree(folder, ignore_errors=True)
        with pytest.raises(
            RunError, match=r"/a/\d\d.png cannot be read as an image .* saved up to step \d+: "
        ) as error:
            start_run(small_recipe(own_images, workers=workers), folder, Interrupt(spoil))
        assert "\n" not in str(error.value)
        assert "Traceback" not in str(error.value)
        assert newest(folder)["step"] >= 4
        for path, content in good.items():
            path.write_bytes(content)
        resume_run(folder, lambda line: None, workers=0)
        require_same_weights(folder, whole_run[0])


def lose_a_reader(recipe, folder):
    """Kill the processes that read images after the first epoch."""

    def kill():
        for child in multiprocessing.active_children():
            child.kill()

    start_run(recipe, folder, Interrupt(kill))


def test_a_reading_process_that_is_killed(images, whole_run, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    process = start(lose_a_reader, small_recipe(images, workers=1), folder, log=log)
    process.join()
    assert process.exitcode == 1
    said = log.read_text().splitlines()[-1]
    assert re.search(r"RunError: a process that reads images died .* up to step \d+: ", said), said
    resume_to_the_end(folder, None, log)
    require_same_weights(folder, whole_run[0])


def fill_the_disk(recipe, folder):
    """Forbid large files after the first epoch, as a full disk does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    fill = Interrupt(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    try:
        start_run(recipe, folder, fill)
    except RunError as error:
        print("refused:", error)
        return 7


def test_a_full_disk(images, whole_run, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    process = start(fill_the_disk, small_recipe(images), folder, log=log)
    process.join()
    assert process.exitcode == 7, log.read_text()
    assert "cannot be written" in log.read_text()
    assert "saved up to step 3: conformer train --resume" in log.read_text()
    assert not list(folder.glob(".*.part"))
    resume_to_the_end(folder, None, log)
    require_same_weights(folder, whole_run[0])


def test_a_loss_that_is_no_number_overwrites_nothing(images, tmp_path, monkeypatch):
    folder, kept = tmp_path / "run", {}

    def poison():
        kept.update({path: path.read_bytes() for path in folder.iterdir() if path.is_file()})
        monkeypatch.setattr(runs, "fit", None)  # nothing may begin again

    original = runs.fit

    def poisoned(trainer, dataset):
        for loss in original(trainer, dataset):
            yield loss
            if trainer.step == 5:
                poison()
                with torch.no_grad():
                    trainer.network.conv_head.fc.bias.fill_(float("inf"))

    monkeypatch.setattr(runs, "fit", poisoned)
    with pytest.raises(
        RunError, match=r"the loss is not finite in step 6, at learning rate .*png"
    ) as error:
        start_run(small_recipe(images, save_steps=0), folder, lambda line: None)
    assert "saved up to step 4: conformer train --resume" in str(error.value)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == kept


def test_a_damaged_checkpoint_is_passed_over(images, whole_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run[0], folder)
    last = checkpoints.find_checkpoints(folder)[0]
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"is damaged .* An older checkpoint is tried"):
        resume_run(folder, lambda line: None)
    require_same_run(folder, whole_run[0])
    for path in checkpoints.find_checkpoints(folder):
        path.write_bytes(b"PK")
    with (
        pytest.warns(UserWarning, match="An older checkpoint is tried"),
        pytest.raises(WeightsError, match=r"holds no checkpoint to go on from: .*another folder"),
    ):
        resume_run(folder)


def test_other_data_is_refused(own_images, tmp_path):
    folder = tmp_path / "run"

    stop = Interrupt(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        start_run(small_recipe(own_images), folder, stop)
    for path in list(own_images.glob("?/0*.png")):
        path.unlink()
    with pytest.raises(RunError, match=r"began with 27 training images and there are \d+ now"):
        resume_run(folder)
    (own_images / "c").rename(own_images / "d")
    with pytest.raises(RunError, match="began with other classes"):
        resume_run(folder)


def test_checkpoints_hold_nothing_that_is_executed(whole_run):
    for path in checkpoints.find_checkpoints(whole_run[0]):
        assert read_file(path)[0]["step"] > 0  # opens with weights_only


def test_tensorboard(images, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start_run(small_recipe(images, tensorboard=True, epochs=2), tmp_path / "run", lambda line: None)
    log = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    log.Reload()
    assert [event.step for event in log.Scalars("val_sum")] == [4, 8]
