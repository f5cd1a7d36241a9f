"""A run on two processes: whole, stopped, with one of them dying, and under a launcher."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import free_port, run
from small_runs import draw_images, small_recipe

from conformer_src import cli, runs
from conformer_src.checkpoints import find_checkpoints, load_checkpoint
from conformer_src.files import read_file
from conformer_src.recipes import write_recipe
from conformer_src.runs import RunError, evaluate_file, resume_run, start_run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("images"))


def plain_recipe(images, **changes):
    """Return a recipe whose steps do not depend on the number of processes: no chance in them."""
    recipe = small_recipe(images, mixup=0.0, sync_norm=True, **changes)
    recipe.model_options.pop("drop_path_rate", None)
    return recipe


def train(recipe, folder):
    return start_run(recipe, folder, lambda line: None)


def score(folder):
    return evaluate_file(folder / "last.safetensors")


@pytest.fixture(scope="module")
def pair(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair") / "run"
    return folder, run(2, train, plain_recipe(images), folder)


def test_both_processes_give_the_same_scores_and_one_folder(pair):
    folder, (first, second) = pair
    timed = ("images_per_second", "waiting")
    for one in (first, second):
        for name in timed:
            one.pop(name, None)
    assert first == second
    (started,) = json.loads((folder / "environment.json").read_text())
    assert started["processes"] == 2
    assert not list(folder.glob(".*"))


def require_close(one, other):
    """AdamW makes much of the smallest gradients; tests/test_scaling.py compares exactly."""
    mine, theirs = (read_file(folder / "last.safetensors")[0] for folder in (one, other))
    apart = torch.cat([(mine[name] - theirs[name]).double().abs().flatten() for name in mine])
    assert apart.mean() < 1e-5
    assert apart.max() < 1e-3  # the learning rate: what one step moves


def test_one_process_trains_to_the_same_weights(images, pair, tmp_path):
    start_run(plain_recipe(images), tmp_path / "run", lambda line: None)
    require_close(tmp_path / "run", pair[0])


def test_scores_are_identical_on_one_process_and_on_two_and_again(pair):
    alone = evaluate_file(pair[0] / "last.safetensors")
    assert run(2, score, pair[0]) == [alone, alone]
    assert evaluate_file(pair[0] / "last.safetensors") == alone


def die(recipe, folder, step):
    """Train; the second process dies without a word after a step."""
    original = runs.fit

    def dying(trainer, dataset):
        for loss in original(trainer, dataset):
            if trainer.step == step and trainer.accelerator.process_index == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield loss

    runs.fit = dying
    try:
        start_run(recipe, folder, lambda line: None)
    except RunError as error:
        (folder / "said").write_text(str(error))


def test_a_process_that_dies_ends_the_run_which_another_number_continues(images, pair, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(AssertionError, match="process 1 ended with code -9"):
        run(2, die, plain_recipe(images), folder, 6)
    said = (folder / "said").read_text()
    assert "process 0 stopped, because another one died" in said
    assert "saved up to step 5: conformer train --resume" in said
    assert "\n" not in said
    resume_run(folder, lambda line: None)
    require_close(folder, pair[0])


def stop(recipe, folder):
    """Train; the second process is asked to stop after the first epoch, and only it."""
    original = runs.fit

    def asked(trainer, dataset):
        for loss in original(trainer, dataset):
            if trainer.step == 5 and trainer.accelerator.process_index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield loss

    runs.fit = asked
    return cli.main(["train", str(recipe), "--out", str(folder)]), dist.is_initialized()


def test_a_signal_to_one_process_stops_all_at_the_same_step(images, tmp_path):
    folder, recipe = tmp_path / "run", tmp_path / "mine.toml"
    write_recipe(plain_recipe(images, save_steps=0), recipe)
    assert run(2, stop, recipe, folder) == [(143, False)] * 2  # and they have parted
    assert load_checkpoint(folder)["step"] == 5
    assert len(find_checkpoints(folder)) == 2


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        # On CPUs Accelerate's launcher starts one process, or leaves several to MPI.
        (["accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1"], 1),
        (["torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"], 2),
    ],
    ids=["accelerate", "torchrun"],
)
def test_launchers(launcher, processes, images, tmp_path):
    recipe = tmp_path / "mine.toml"
    write_recipe(plain_recipe(images, epochs=1), recipe)
    command = [sys.executable, "-m", *launcher, "-m", "conformer_src.cli", "train"]
    command += [str(recipe), "--out", str(tmp_path / "run"), "--json"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "CUDA_VISIBLE_DEVICES": "",  # a machine without a GPU, where nobody says so
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["epoch"] == 1  # printed once
    (started,) = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert started["processes"] == processes
