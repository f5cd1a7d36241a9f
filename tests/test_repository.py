"""The repository's address is one setting; a change reaches every place, and nothing else."""

from pathlib import Path

import nbformat
import pytest
import repository

OLD, NEW = "https://github.com/old-one/conformer-step-by-step", "https://github.com/new/book"
FILES = {
    "_config.yml": (
        "# repository\nlogo: a\nrepository:\n  # one place\n  url: {url}\n  branch: main\n"
        "other:\n  url: https://a.org\n"
    ),
    "pyproject.toml": (
        '[project]\nname = "conformer-step-by-step"\n\n'
        '[project.urls]\nRepository = "{url}"\nPaper = "https://arxiv.org/abs/2105.03889"\n'
    ),
    "CITATION.cff": "title: A book\nrepository-code: {url}\nurl: https://a.org\n",
    "environment.yml": "# git clone {url}.git\nname: conformer\n",
    "README.md": (
        "git clone {url} and [issues]({url}/issues), [authors](https://github.com/pengzhiliang/"
        "Conformer), [Colab](https://colab.research.google.com/github/{path}/blob/main/a.ipynb), "
        "git@github.com:{path}.git, [read](https://{pages}/), the name conformer-step-by-step\n"
    ),
    "book/intro.md": "[source]({url})\n",
    ".github/workflows/pages.yml": "# published from {url}\n",
}


def fill(root: Path, url: str) -> None:
    owner, name = url.split("/")[-2:]
    for file, text in FILES.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        names = {"url": url, "path": f"{owner}/{name}", "pages": f"{owner}.github.io/{name}"}
        (root / file).write_text(text.format(**names))
    (root / "chapters").mkdir(exist_ok=True)
    for number in ("01_data", "02_conv_block"):
        cells = [nbformat.v4.new_code_cell(repository.bootstrap(url), id="first")]
        text = nbformat.writes(nbformat.v4.new_notebook(cells=cells))
        (root / f"chapters/{number}.ipynb").write_text(text)


def contents(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): p.read_text() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    fill(tmp_path, OLD)
    return tmp_path


def test_this_repository_agrees(capsys):
    assert repository.main(["--check"]) == 0, capsys.readouterr().err


def test_a_new_address_reaches_every_place(root, tmp_path_factory, capsys):
    assert repository.main([f"{NEW}/"], root) == 0
    expected = tmp_path_factory.mktemp("expected")
    fill(expected, NEW)
    assert contents(root) == contents(expected)
    assert len(capsys.readouterr().out.splitlines()) == len(FILES) + 2
    assert repository.main(["--check"], root) == 0
    assert repository.address(root) == NEW


def test_it_can_be_changed_back_and_a_second_time_writes_nothing(root, capsys):
    before = contents(root)
    repository.main([NEW], root)
    repository.main([OLD], root)
    assert contents(root) == before
    capsys.readouterr()
    repository.main([OLD + ".git"], root)
    assert capsys.readouterr().out == ""
    assert contents(root) == before


def test_the_placeholder_is_an_address(tmp_path):
    placeholder = OLD.replace("old-one", "YOUR_ACCOUNT")
    fill(tmp_path, placeholder)
    assert repository.main(["--check"], tmp_path) == 0
    repository.main([NEW], tmp_path)
    assert not any("YOUR_ACCOUNT" in text for text in contents(tmp_path).values())


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("pyproject.toml", 5),
        ("CITATION.cff", 2),
        ("environment.yml", 1),
        ("README.md", 1),
        ("book/intro.md", 1),
        (".github/workflows/pages.yml", 1),
        ("chapters/02_conv_block.ipynb", None),
    ],
)
def test_check_names_the_place_that_disagrees(root, file, line, capsys):
    text = (root / file).read_text()
    assert "github.com/old-one" in text
    (root / file).write_text(text.replace("github.com/old-one", "github.com/else", 1))
    assert repository.main(["--check"], root) == 1
    (shown,) = capsys.readouterr().err.splitlines()
    assert shown.startswith(f"{file}, line {line or ''}")
    assert "else/conformer-step-by-step" in shown


@pytest.mark.parametrize("file", ["pyproject.toml", "CITATION.cff", "chapters/01_data.ipynb"])
def test_check_sees_an_address_of_another_name_in_the_known_places(root, file, capsys):
    text = (root / file).read_text()
    (root / file).write_text(text.replace("old-one/conformer-step-by-step", "a/b"))
    assert repository.main(["--check"], root) == 1
    assert "https://github.com/a/b" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["book", "https://gitlab.com/a/b", "https://github.com/a", NEW * 2])
def test_what_is_no_address_is_refused(root, url, capsys):
    before = contents(root)
    with pytest.raises(SystemExit) as stop:
        repository.main([url], root)
    assert stop.value.code == 2
    assert "is not https://github.com/ACCOUNT/NAME" in capsys.readouterr().err
    assert contents(root) == before


def test_address_and_check_together_are_refused(root, capsys):
    with pytest.raises(SystemExit):
        repository.main([NEW, "--check"], root)
    assert "not both" in capsys.readouterr().err


def test_without_words_it_prints_the_setting(root, capsys):
    assert repository.main([], root) == 0
    assert capsys.readouterr().out == OLD + "\n"
