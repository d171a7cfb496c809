"""Fast-ELECTRA offline: a run on recorded replacements computes what one with the frozen generator computes."""

# ruff: noqa: F811  # a fixture of another module

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import electra_ds
from electra_ds.cli import main
from electra_ds.config.recipe import load_recipe
from electra_ds.core.errors import ConfigError, DataError
from electra_ds.core.ranks import Ranks
from electra_ds.data import replacements
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining import draw_replacements
from electra_ds.pretraining.batches import objective_of
from electra_ds.pretraining.evaluation import load_trained
from tests.pretraining.test_fast_electra import FAST, SHARED, STEPS, auxiliary, latest, pretrain  # noqa: F401  # a fixture
from tests.pretraining.test_pretrain import train_losses

DRAWN = {"eval_windows": 16, "threads": 1, "quiet": True, "overrides": [*FAST, *STEPS]}


@pytest.fixture(autouse=True)
def _short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (replacements, draw_replacements):
        monkeypatch.setattr(module, "STRETCH", 8)


def draw(store: TokenStore, auxiliary: Path, out: Path, **more: object) -> TokenStore:
    (out.parent / "draw.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 4}))
    settings = DRAWN | {"ds_config": out.parent / "draw.json"} | more
    return electra_ds.corrupt_data(store, out, recipe="tiny-fast-electra", init_from=auxiliary, **settings)


def evaluations(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "eval"]


def offline(drawn: TokenStore, run: Path, auxiliary: Path, *more: str, stage: int = 0) -> Path:
    """A run of the recipe that was recorded with the replacements."""
    recipe = str(drawn.path / "replacements" / "recipe.yaml")
    return pretrain(drawn, run, recipe, [], "--init-from", str(auxiliary), *more, stage=stage)


@pytest.mark.slow
def test_a_run_without_the_generator_is_the_run_with_it_bit_for_bit(
    store: TokenStore,
    auxiliary: Path,
    tmp_path: Path,
    process_group: Ranks,
) -> None:
    drawn = draw(store, auxiliary, tmp_path / "drawn")
    live = pretrain(store, tmp_path / "live", "tiny-fast-electra", FAST, "--init-from", str(auxiliary))
    alone = offline(drawn, tmp_path / "alone", auxiliary)
    expected, found = latest(live), latest(alone)
    assert {name for name in expected if ".discriminator" in name or "/discriminator" in name} == set(found)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    assert train_losses(alone) == train_losses(live)
    for one, other in zip(evaluations(alone), evaluations(live), strict=True):
        assert {name: other[name] for name in one if name != "tokens_per_s"} == {
            name: value for name, value in one.items() if name != "tokens_per_s"
        }
    halved = offline(drawn, tmp_path / "halved", auxiliary, "--stop-at", "20")
    main(["pretrain", "--resume", str(halved)])
    assert all(torch.equal(tensor, latest(halved)[name]) for name, tensor in found.items())
    main(["export", str(alone), "--out", str(tmp_path / "exported")])
    assert [path.name for path in (tmp_path / "exported").iterdir()] == ["discriminator"]
    parameters = sum(parameter.numel() for parameter in load_trained(alone).model.parameters())
    assert json.loads((alone / "run.json").read_text())["parameters"] == {"discriminator": parameters}


def test_at_stage_2_too(store: TokenStore, auxiliary: Path, tmp_path: Path, process_group: Ranks) -> None:
    drawn = draw(store, auxiliary, tmp_path / "drawn")
    live = pretrain(store, tmp_path / "live", "tiny-fast-electra", FAST, "--init-from", str(auxiliary), stage=2)
    alone = offline(drawn, tmp_path / "alone", auxiliary, stage=2)
    assert all(torch.equal(tensor, latest(live)[name]) for name, tensor in latest(alone).items())


def test_drawing_continues_where_it_stopped(
    store: TokenStore,
    auxiliary: Path,
    tmp_path: Path,
    process_group: Ranks,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = draw(store, auxiliary, tmp_path / "whole").replacements
    write, written = draw_replacements.write_steps, []

    def stop_at_second(out: Path, first: int, drawn: list[np.ndarray]) -> None:
        if written:
            raise KeyboardInterrupt
        write(out, first, drawn)
        written.append(first)

    monkeypatch.setattr(draw_replacements, "write_steps", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        draw(store, auxiliary, tmp_path / "cut")
    with pytest.raises(DataError, match="which were not finished"):
        draw(store, auxiliary, tmp_path / "cut", overrides=[*FAST, *STEPS, "seed=5"])
    with pytest.raises(DataError, match="Run the command that draws the replacements again"):
        TokenStore(tmp_path / "cut")
    later: list[int] = []

    def note(out: Path, first: int, drawn: list[np.ndarray]) -> None:
        later.append(first)
        write(out, first, drawn)

    monkeypatch.setattr(draw_replacements, "write_steps", note)
    continued = draw(store, auxiliary, tmp_path / "cut", micro_batch=2).replacements
    assert later == [8, 16, 24]
    assert whole is not None
    assert continued is not None
    for step in range(30):
        np.testing.assert_array_equal(continued.of_step(step), whole.of_step(step))
    np.testing.assert_array_equal(continued.of_held_out(16), whole.of_held_out(16))
    assert draw(store, auxiliary, tmp_path / "cut").replacements is not None  # nothing is left to draw


def test_replacements_of_another_recipe_or_no_recipe_are_refused(
    store: TokenStore,
    auxiliary: Path,
    tmp_path: Path,
    process_group: Ranks,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drawn = draw(store, auxiliary, tmp_path / "drawn")

    with pytest.raises(SystemExit):
        offline(drawn, tmp_path / "run", auxiliary, "--seed", "7")
    assert "seed: 0 when they were drawn, 7 in this recipe" in " ".join(capsys.readouterr().err.split())
    path = drawn.path / "replacements" / "recipe.yaml"
    recorded = load_recipe(path)
    with pytest.raises(DataError, match="evaluations on 16 or 64 windows, not on 32"):
        objective_of(recorded, drawn.tokenizer).check_store(drawn, 32)
    with pytest.raises(SystemExit):
        pretrain(store, tmp_path / "run", str(path), [], "--init-from", str(auxiliary))
    assert "Draw them with" in capsys.readouterr().err
    with pytest.raises(DataError, match="another recipe, generator or text"):
        draw(store, auxiliary, tmp_path / "drawn", overrides=[*FAST, *STEPS, "seed=5"])
    with pytest.raises(ConfigError, match="so give a recipe of fast-electra"):
        electra_ds.corrupt_data(store, tmp_path / "x", recipe="tiny", init_from=auxiliary, quiet=True)
    with pytest.raises(ConfigError, match="is the store itself, or inside it"):
        draw(store, auxiliary, store.path / "inside")
    with pytest.raises(ConfigError, match="Give the frozen generator"):
        electra_ds.corrupt_data(store, tmp_path / "x", recipe="tiny-fast-electra", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_with_the_replacements_of_another_generator(
    store: TokenStore, auxiliary: Path, tmp_path: Path, process_group: Ranks
) -> None:
    drawn = draw(store, auxiliary, tmp_path / "drawn")
    run = offline(drawn, tmp_path / "run", auxiliary, "--stop-at", "10")
    electra_ds.pretrain("tiny-mlm", data=store.path, run_dir=tmp_path / "lm", overrides=[*SHARED, *STEPS], quiet=True,
                        seed=7)  # fmt: skip
    other = draw(store, tmp_path / "lm", tmp_path / "other")
    with pytest.raises(DataError, match=r"are not those that .* was started with: they were drawn with another"):
        electra_ds.pretrain(resume=run, data=other.path, quiet=True)
    assert electra_ds.pretrain(resume=run, data=drawn.path, quiet=True).status == "done"


def test_the_command_says_how_to_train_on_what_it_drew(
    store: TokenStore, auxiliary: Path, tmp_path: Path, process_group: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = [
        "build-data", "--corrupt", str(store.path), "--recipe", "tiny-fast-electra", "--init-from", str(auxiliary),
        "--ds-config", "cpu", "--eval-windows", "16", "--threads", "1", "--out", str(tmp_path / "drawn"), "--set",
        *FAST, *STEPS,
    ]  # fmt: skip
    main(drawn)
    said = capsys.readouterr().out
    assert "replacements for 30 steps" in said
    (line,) = [line for line in said.splitlines() if "pretrain --recipe" in line]
    words = shlex.split(line[line.index("--recipe") :])
    main(["pretrain", *words, "--run-dir", str(tmp_path / "run"), "--threads", "1", "--ds-config", "cpu"])
    assert len(evaluations(tmp_path / "run")) > 1
    for words, complaint in (
        (["--corpus", "builtin", "--corrupt", str(store.path)], "either --corpus"),
        ([], "either --corpus"),
        (["--corpus", "builtin", "--threads", "1"], "can be used only with --corrupt"),
        (["--corrupt", str(store.path), "--workers", "2"], "leave out --tokenizer and --workers"),
    ):
        with pytest.raises(SystemExit):
            main(["build-data", *words, "--out", str(tmp_path / "other")])
        assert complaint in " ".join(capsys.readouterr().err.split())
