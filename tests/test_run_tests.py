"""The runner counts what ran, says what was skipped and fails if a part failed."""

import sys

import pytest
import run_tests


def part(tmp_path, text: str) -> run_tests.Part:
    """A part that runs pytest on one small test file."""
    (tmp_path / "test_sample.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    return run_tests.Part("sample", [command])


def test_outcomes_and_reasons_are_counted(tmp_path, capfd):
    sample = part(
        tmp_path,
        "import pytest\ndef test_a(): assert 1 + 1 == 2\ndef test_b(): assert 1 + 1 == 3\n"
        "@pytest.mark.skip(reason='no browser')\ndef test_c(): assert False\n",
    )
    sample.run()
    assert dict(sample.counts) == {"passed": 1, "failed": 1, "skipped": 1}
    assert sample.failed
    run_tests.summary([sample], ["site tests"])
    printed = capfd.readouterr().out
    assert "FAILED   sample" in printed
    assert "skipped 1: no browser" in printed
    assert "not asked for: site tests" in printed
    assert printed.splitlines()[-1] == "1 passed, 1 failed, 1 skipped"


def test_a_part_without_pytest_is_one_check(tmp_path):
    for code, outcome in (("", "passed"), ("raise SystemExit(3)", "failed")):
        command = run_tests.Part("command", [[sys.executable, "-c", code]])
        command.run()
        assert dict(command.counts) == {outcome: 1}
        assert command.failed == (outcome == "failed")


def test_no_test_at_all_is_a_failure(tmp_path):
    sample = part(tmp_path, "")
    sample.run()
    assert sample.failed


def test_unknown_chapter_and_part_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"there is no chapter 99; there are 01"):
        run_tests.parts("99")
    monkeypatch.setattr(sys, "argv", ["run_tests.py", "spelling"])
    with pytest.raises(SystemExit):
        run_tests.main()
    assert "no part 'spelling'; there are lint, mirror" in capsys.readouterr().err


def test_one_chapter_runs_its_own_tests_only():
    commands = [" ".join(c) for chosen in run_tests.parts("1") for c in chosen.commands]
    assert any("tests/test_data.py" in command for command in commands)
    assert any("--nbval" in command and "01_data.ipynb" in command for command in commands)
    assert not any("test_site" in command for command in commands)
