"""An option is declared once: the command line, Python, sweeps and the reference page follow from that."""

from __future__ import annotations

import argparse
import runpy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from electra_ds.cli import build_parser
from electra_ds.config.commands import COMMANDS
from electra_ds.config.option import add_options, options_of
from electra_ds.config.options import FinetuneOptions, PretrainOptions
from electra_ds.config.recipe import given_options
from electra_ds.config.run_record import FinetuneSettings, RunSettings
from electra_ds.core.errors import ConfigError
from electra_ds.sweep.options import INSTEAD, KINDS, OPTIONS
from tests.helpers import REPOSITORY


def parsed(kind: type[PretrainOptions] | type[FinetuneOptions], *arguments: str) -> Any:
    add_options(parser := argparse.ArgumentParser(), kind)
    return kind.parsed(parser.parse_args(arguments))


def parser_of(name: str) -> argparse.ArgumentParser:
    found = build_parser()
    for word in name.split():
        (actions,) = (each for each in found._actions if isinstance(each, argparse._SubParsersAction))
        found = actions.choices[word]
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_takes_its_options_and_no_others(name: str) -> None:
    there = {action.dest for action in parser_of(name)._actions} - {"help", "local_rank", "deepspeed"}
    assert there == options_of(COMMANDS[name]).keys()
    for of in options_of(COMMANDS[name]).values():
        assert of.flag is not None
        assert of.help


@pytest.mark.parametrize("name", ["options.md", "recipes.md", "deepspeed.md"])
def test_a_reference_page_is_what_the_code_says(name: str) -> None:
    pages = runpy.run_path(str(REPOSITORY / "docs" / "generate.py"))["PAGES"]
    page = (REPOSITORY / "docs" / "reference" / name).read_text("utf8")
    assert page == pages[name](), "run python docs/generate.py"


@pytest.mark.parametrize("kind", [PretrainOptions, FinetuneOptions])
def test_an_option_that_is_not_given_is_none(kind: Any) -> None:
    assert parsed(kind) == kind()
    assert set(vars(kind()).values()) == {None}
    assert kind().given() == {}


@pytest.mark.parametrize(("kind", "settings"), [(PretrainOptions, RunSettings), (FinetuneOptions, FinetuneSettings)])
def test_every_recorded_setting_is_an_option(kind: Any, settings: Any) -> None:
    assert {each.name for each in fields(settings)} <= options_of(kind).keys()
    defaults = settings(log_every=1, eval_every=2, save_every=3, keep=4, **_more(settings))
    assert kind().settings(defaults) == defaults
    assert kind(keep=9).settings(defaults).keep == 9


def _more(settings: Any) -> dict[str, Any]:
    return {"eval_windows": 5} if settings is RunSettings else {}


@pytest.mark.parametrize("stage", KINDS)
def test_a_stage_of_a_sweep_takes_an_option_or_says_what_to_write(stage: str) -> None:
    assert OPTIONS[stage] | INSTEAD.keys() >= options_of(KINDS[stage]).keys()
    assert not OPTIONS[stage] & INSTEAD.keys()


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["--keep", "3", "--stop-at", "7"], {"keep": 3, "stop_at": 7}),
        (["--time-limit", "90m"], {"time_limit": "90m"}),
        (["--time-limit", "5400s"], {"time_limit": 5400.0}),
        (["--micro-batch", "auto"], {"micro_batch": "auto"}),
        (["--micro-batch", "4"], {"micro_batch": 4}),
        (["--corpus", "a"], {"corpus": "a"}),
        (["--corpus", "a", "b"], {"corpus": ["a", Path("b")]}),
        (["--corpus", "a", "b", "--corpus", "c"], {"corpus": [["a", "b"], ["c"]]}),
        (["--init-from", "a"], {"init_from": "a"}),
        (["--data", "s", "--run-dir", "r"], {"data": "s", "run_dir": Path("r")}),
        (["--uncased", "--no-strip-accents"], {"cased": False, "strip_accents": False}),
        (["--no-tensorboard", "--compile", "off"], {"tensorboard": False, "compile": "off"}),
        (["--keep-at", "3", "4", "--keep-at", "5"], {"keep_at": [3, 4, 5]}),
        (["--set", "a=1", "--set", "b=2"], {"overrides": ["a=1", "b=2"]}),
        (["--dry-run", "--yes"], {"dry_run": True, "yes": True}),
        (["--deepspeed_config", "cpu"], {"ds_config": "cpu"}),
    ],
)
def test_python_and_the_command_line_give_the_same_options(words: list[str], given: dict[str, Any]) -> None:
    options = parsed(PretrainOptions, *words)
    assert options == PretrainOptions.of(given)
    assert options == given_options(PretrainOptions, options, {})  # what a command hands to the API


def test_what_python_gives_wrongly_is_refused_by_name_all_at_once() -> None:
    wrong = {"sav_every": 1, "keep": 0, "compile": "perhaps", "corpus": 3, "yes": 1, "stop_at": "soon", "seed": -1}
    with pytest.raises(ConfigError) as refused:
        PretrainOptions.of(wrong)
    message = str(refused.value)
    assert "sav_every: there is no such option; did you mean 'save_every'?" in message
    for part in ("keep: '0' is not a positive", "'perhaps' is not one of auto, on, off", "corpus: 3", "yes: 1 is"):
        assert part in message
    assert "stop_at: 'soon' is not a positive" in message
    assert "seed: '-1' is not a whole number of at least 0" in message


def test_options_of_a_new_run_are_refused_with_resume() -> None:
    new_only = {name for name, of in options_of(PretrainOptions).items() if of.new_run_only}
    assert new_only >= {"recipe", "overrides", "seed", "init_from", "corpus", "allow_unknown", "run_dir"}
    with pytest.raises(ConfigError, match="cannot be combined with --set, --seed"):
        PretrainOptions.of({"resume": "runs/x", "seed": 1, "overrides": ["a=1"]}).check()
    PretrainOptions.of({"resume": "runs/x", "data": "s", "keep": 2, "ds_config": "cpu"}).check()
    with pytest.raises(ConfigError, match="cannot be combined with --max-train-examples"):
        FinetuneOptions.of({"resume": "runs/x", "max_train_examples": 5}).check()
    FinetuneOptions.of({"resume": "runs/x", "random_init": False, "train": "t.csv"}).check()


def test_old_spellings_are_taken_and_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    shown = parser_of("pretrain").format_help() + parser_of("sweep").format_help()
    assert "--deepspeed_config" not in shown
    assert "--run-dir" not in parser_of("sweep").format_help()
    assert parser_of("sweep").parse_args(["smoke", "--run-dir", "x"]).out == Path("x")
