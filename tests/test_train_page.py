"""The page "Train on your images" tells the truth: its table of fields, its commands, its file."""

import re
import shlex
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from conformer_src import cli
from conformer_src.recipes import Recipe, list_recipes

PAGE = (Path(__file__).parents[1] / "book" / "train_your_images.md").read_text(encoding="utf-8")


def shown(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'`"{value}"`' if value else "none"
    return "none" if value == {} else f"{value:g}"


def test_the_table_lists_each_field_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", PAGE, re.MULTILINE)
    recipe, expected = Recipe(), []
    for field in fields(Recipe):
        about = field.metadata["about"]
        if "choices" in field.metadata:
            about += ": " + ", ".join(field.metadata["choices"])
        expected.append((field.name, shown(getattr(recipe, field.name)), about))
    assert rows[-len(expected) :] == expected


def test_all_recipes_are_named():
    assert all(f"`{name}`" in PAGE for name in list_recipes())


COMMANDS = re.findall(r"^(?:\S.* -m conformer_src\.cli|conformer) (.+)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_parse(command):
    cli.build_parser().parse_args(shlex.split(command))


def test_there_are_commands():
    assert len(COMMANDS) >= 9


def test_the_file_is_a_recipe():
    (content,) = re.findall(r"```toml\n(.+?)```", PAGE, re.DOTALL)
    assert Recipe(**tomllib.loads(content)).image_size == 64
