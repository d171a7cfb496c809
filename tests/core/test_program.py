"""Messages and help name the commands as this process was called."""

from __future__ import annotations

import argparse
import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from electra_ds.cli import build_parser, main
from electra_ds.config.commands import COMMANDS
from electra_ds.config.option import options_of
from electra_ds.core.program import PACKAGES, as_called, command, missing_package
from tests.helpers import REPOSITORY


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
    for name in {each.partition(" ")[0] for each in COMMANDS}:
        with pytest.raises(SystemExit):
            build_parser().parse_args([name, "--help"])
        said = capsys.readouterr().out
        assert "bin/" not in said
        assert f"electra-ds {name}" in said


@pytest.mark.parametrize("name", ["pretrain", "checkpoint ls"])
def test_an_unknown_option_is_answered_by_the_command_that_was_called(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", [str(REPOSITORY / "bin" / name.split()[0])])
    with pytest.raises(SystemExit):
        main([*name.split(), *(["run"] if "ls" in name else []), "--oops"])
    said = capsys.readouterr().err
    assert said.startswith(f"usage: {command(name)} ")
    assert f"{command(name)}: error: unrecognized arguments: --oops" in said


def test_bench_without_a_checkout_says_where_the_benchmarks_are(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--sections", "step"])
    assert "run bin/bench in a checkout" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_misspelt_option_gets_a_suggestion_in_every_command(name: str, capsys: pytest.CaptureFixture) -> None:
    """Also if a required argument is missing, which may be the misspelt one."""
    options = [of.flag for of in options_of(COMMANDS[name]).values() if of.flag and of.help != argparse.SUPPRESS]
    for flag, value in itertools.product({*options[:1], *options[-1:]}, (" x", "=x")):
        given = f"{flag}{flag[-1]}{value}".split()
        with pytest.raises(SystemExit):
            main([*name.split(), *given])
        said = " ".join(capsys.readouterr().err.split())
        assert f"error: unrecognized arguments: {given[0]}; did you mean '{flag}'?" in said


@pytest.mark.parametrize(
    ("words", "hint"), [(["pretrian"], "; did you mean 'pretrain'?"), (["checkpoint", "lst"], "; did you mean 'ls'?"),
                        (["xyz"], "; the commands are pretrain, finetune, ")],
)  # fmt: skip
def test_a_misspelt_command_gets_a_suggestion(words: list[str], hint: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert f"there is no command {words[-1]!r}{hint}" in capsys.readouterr().err


def test_as_called_changes_names_of_commands_alone() -> None:
    assert as_called("bin/pretrain, /usr/bin/env and cabin/x") == "electra-ds pretrain, /usr/bin/env and cabin/x"


# --- outside the environment

SCRIPTS: dict[str, list[str]] = {
    "bench": [], "build-data": ["--corpus", "x", "--out", "y"], "checkpoint": ["ls", "x"], "doctor": [], "plugins": [],
    "export": ["x"], "finetune": ["--model", "x", "--task", "rte"], "plan": [], "pretrain": [], "recipes": [],
    "report": ["x"], "sweep": ["smoke", "--dry-run"],
}  # fmt: skip


def test_every_script_is_tested() -> None:
    assert SCRIPTS.keys() == {path.name for path in (REPOSITORY / "bin").iterdir()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_command_without_its_packages_says_which_is_missing_and_what_to_run(name: str, tmp_path: Path) -> None:
    """-S hides every installed package. What is imported when the handler runs counts, not only what comes first."""
    result = subprocess.run(
        [sys.executable, "-S", str(REPOSITORY / "bin" / name), *SCRIPTS[name]],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={},
    )  # fmt: skip
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert re.match(r"The package (rich|pydantic|yaml|numpy|torch|hjson) is not installed in the env", result.stderr)
    assert "/activate'" in result.stderr


def test_a_missing_module_that_is_not_installed_with_the_program_is_not_taken_for_one() -> None:
    assert missing_package(ModuleNotFoundError("No module named 'my_plugin'", name="my_plugin")) is None
    assert missing_package(ModuleNotFoundError("No module named 'torch.x'", name="torch.x")) is None
    assert missing_package(ModuleNotFoundError("no name")) is None
    told = missing_package(ModuleNotFoundError("No module named 'rich'", name="rich"))
    assert told is not None
    assert told.startswith("The package rich is not installed")


def test_the_packages_that_are_known_are_those_that_are_imported() -> None:
    imported = set()
    for path in (REPOSITORY / "electra_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    late = {"wandb"}  # by name
    optional = {"optuna"}
    assert imported - set(sys.stdlib_module_names) - {"electra_ds"} - optional | late == PACKAGES
