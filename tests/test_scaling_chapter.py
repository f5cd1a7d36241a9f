"""The commands that chapter 9 prints are understood by the programs that they call."""

import json
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from conformer_src.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
CELLS = json.loads((ROOT / "chapters/09_scaling.ipynb").read_text(encoding="utf-8"))["cells"]
PROSE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]
BLOCKS = [
    block.replace("\\\n", " ")
    for text in PROSE
    for block in re.findall(r"```\n(.*?)```", text, re.S)
]
LINES = [line for block in BLOCKS for line in block.splitlines() if not line.startswith("#")]


def starting(program):
    bare = [re.sub(r"^srun (--\S+ )*", "", line) for line in LINES]
    return [line for line in bare if line.startswith(program)]


def require_command(module, words):
    """Require that words behind a launcher are a command of this package."""
    assert module == "conformer_src.cli"
    arguments = build_parser().parse_args(words)
    assert arguments.recipe == "imagenet-authors"


def test_the_chapter_shows_all_ways_to_start():
    assert len(LINES) == 3
    assert [len(starting(program)) for program in ("accelerate launch", "torchrun")] == [1, 2]


def test_accelerate_understands_its_line():
    (line,) = starting("accelerate launch")
    found = launch_command_parser().parse_args(shlex.split(line)[2:])
    assert (found.num_machines, found.num_processes, found.machine_rank) == (2, 16, 0)
    require_command(found.training_script, found.training_script_args)


@pytest.mark.parametrize("number", [0, 1])
def test_torchrun_understands_its_lines(number):
    line = re.sub(r"\$\(.*?\)", "10.0.0.1", starting("torchrun")[number])
    found = get_args_parser().parse_args(shlex.split(line)[1:])
    assert (found.nnodes, found.nproc_per_node) == ("2", "8")
    assert found.rdzv_endpoint == "10.0.0.1:29500"
    require_command(found.training_script, found.training_script_args)
