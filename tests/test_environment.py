"""The lists of dependencies agree, and an installation that cannot work says how to repair it."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements() -> list[str]:
    """The package's dependencies and those of every group but `peers`, which stands apart."""
    groups = PROJECT["dependency-groups"] | {"peers": []}
    in_groups = [entry for group in groups.values() for entry in group if isinstance(entry, str)]
    return PROJECT["project"]["dependencies"] + in_groups


def test_conda_users_get_the_same_ranges():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, _, pip = environment["dependencies"]
    assert python == f"python{PROJECT['project']['requires-python']}"
    assert sorted(pip["pip"]) == sorted([*requirements(), "--editable ."])


def test_readers_get_ranges_and_only_the_book_tool_is_pinned():
    assert [entry for entry in requirements() if "==" in entry] == ["jupyter-book==1.0.4.post1"]


def test_lock_pins_and_hashes_everything_and_names_no_host():
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    blocks = re.findall(r"^(\S+==\S+).*?((?:\\\n\s+--hash=sha256:[0-9a-f]{64} ?)+)$", text, re.M)
    names = {re.match(r"[\w.-]+", pin)[0] for pin, _ in blocks}
    assert text.count("==") >= len(blocks) > 100
    assert len(re.findall(r"^\S", text, re.M)) == len(blocks)  # no line without hashes
    wanted = {re.match(r"[\w.-]+", entry)[0] for entry in requirements()}
    assert wanted <= names


def test_version_is_the_same_everywhere():
    version = PROJECT["project"]["version"]
    assert f'__version__ = "{version}"' in (ROOT / "conformer_src/__init__.py").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("failure", ["RuntimeError", "ImportError", "OSError"])
def test_broken_torchvision_says_how_to_repair_it(tmp_path, failure):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text(f"raise {failure}('operator nms is missing')")
    run = subprocess.run(
        [sys.executable, "-c", "import conformer_src"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    sentence = run.stderr.splitlines()[-1]
    assert run.returncode == 1
    assert "torchvision does not fit the installed torch" in sentence
    assert "pip install --upgrade --force-reinstall torch torchvision" in sentence


def test_import_needs_no_plotting_and_no_notebook_tools():
    code = "import sys, conformer_src; print(sorted({'matplotlib', 'IPython'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
