"""Messages and help name the commands as this process was called."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from electra_ds.cli import build_parser
from electra_ds.program import as_called, command


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the two files by which a checkout is recognised."""
    for name in ("bin/pretrain", "electra_ds/__main__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("called", "expected"),
    [
        ("bin/pretrain", "bin/export"),
        ("{checkout}/bin/pretrain", "{checkout}/bin/export"),
        ("{checkout}/electra_ds/__main__.py", "python -m electra_ds export"),
        ("/usr/local/lib/ipykernel_launcher.py", "electra-ds export"),
        ("/nowhere/bin/electra-ds", "/nowhere/bin/electra-ds export"),
        ("", "electra-ds export"),
    ],
)
def test_a_command_is_named_as_this_process_was_called(
    called: str, expected: str, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(sys, "argv", [called.format(checkout=checkout), "--resume", "x"])
    assert command("export") == expected.format(checkout=checkout)


def test_a_console_script_on_the_path_is_named_without_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "electra-ds"
    script.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(script), "pretrain"])
    assert command("checkpoint import") == "electra-ds checkpoint import"


def test_help_names_the_program_that_was_called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/ipykernel_launcher.py"])
    for name in ("pretrain", "finetune", "sweep", "build-data", "plan", "report", "export", "checkpoint", "doctor"):
        with pytest.raises(SystemExit):
            build_parser().parse_args([name, "--help"])
        said = capsys.readouterr().out
        assert "bin/" not in said
        assert f"electra-ds {name}" in said


def test_as_called_changes_names_of_commands_alone() -> None:
    assert as_called("bin/pretrain, /usr/bin/env and cabin/x") == "electra-ds pretrain, /usr/bin/env and cabin/x"
