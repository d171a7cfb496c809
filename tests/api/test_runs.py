"""Runs that Python starts: what they return, what they refuse, and that they are those of the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

import electra_ds
from electra_ds.api.stores import store_name
from electra_ds.cli import main
from electra_ds.config.options import PretrainOptions
from electra_ds.core.errors import CheckpointError, ConfigError, DataError
from tests.api.conftest import STEPS
from tests.helpers import REPOSITORY, SMALL, small_recipe

HOW: dict[str, Any] = {"ds_config": "cpu", "threads": 1, "eval_windows": 16, "log_every": 1, "quiet": True}
LOSSES = ["step", "loss", "generator_loss", "discriminator_loss", "grad_norm"]


def losses(run: electra_ds.Run) -> list[list[float]]:
    return run.metrics.query("kind == 'train'")[LOSSES].to_numpy().tolist()


def test_a_run_of_python_is_that_of_the_command(examples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["pretrain", "--recipe", "tiny", "--data", "stores/small", "--run-dir", "runs/command", "--ds-config", "cpu",
          "--threads", "1", "--eval-windows", "16", "--log-every", "1", "--set", *SMALL, *STEPS])  # fmt: skip
    capsys.readouterr()
    run = electra_ds.Run("runs/mine")
    other = electra_ds.Run("runs/command")
    assert losses(run) == losses(other)
    assert run.recipe == other.recipe
    assert run.record.settings == other.record.settings
    assert len(losses(run)) == 6
    assert [path.name for path in run.checkpoints] == [path.name for path in other.checkpoints]


def test_a_run_that_stopped_is_resumed_and_equals_a_straight_one(
    examples: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "electra_ds")
    run = electra_ds.pretrain(small_recipe(*STEPS), data="stores/small", run_dir="runs/halves", stop_at=3, **HOW)
    assert run.status == "stopped"
    end = "Stopped at step 3 of 6, because of --stop-at. To resume: electra-ds pretrain --resume runs/halves"
    assert caplog.messages[-1] == end
    caplog.clear()
    again = run.resume(quiet=True)
    assert again.status == "done"
    assert not any("Stopped at step" in message for message in caplog.messages)
    assert losses(again) == losses(electra_ds.Run("runs/mine"))
    finished = again.resume(quiet=True)
    assert finished.status == "done"
    assert capsys.readouterr().out == ""


def test_a_callback_reads_a_run_and_stops_it(examples: Path) -> None:
    class StopAtTwo(electra_ds.Callback):
        seen: ClassVar[list[tuple[int, float]]] = []

        def on_step(self, progress: Any, step: int, metrics: Any) -> None:
            self.seen.append((step, metrics["loss"]))
            if step == 2:
                progress.stop("two are enough")

    run = electra_ds.pretrain(
        small_recipe(*STEPS), data="stores/small", run_dir="runs/two", callbacks=[StopAtTwo()], **HOW
    )
    assert run.status == "stopped"
    assert [list(pair) for pair in StopAtTwo.seen] == [row[:2] for row in losses(run)]
    assert losses(run.resume(quiet=True)) == losses(electra_ds.Run("runs/mine"))


def test_a_sweep_that_cannot_run_is_refused_from_python(examples: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'save_every'"):
        electra_ds.run_sweep({"name": "x", "pretrain": {"recipe": "tiny", "sav_every": 3}}, local=True, quiet=True)


def test_a_run_tells_what_it_is(examples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = electra_ds.Run("runs/mine")
    assert run.exists
    assert (run.kind, run.status, repr(run)) == ("pretrain", "done", "Run('runs/mine')")
    assert {"train", "eval"} <= {*run.metrics["kind"]}
    report = run.report()
    assert capsys.readouterr().out == ""
    assert "discriminator AUC" in str(report)
    assert repr(report) == str(report)
    assert [*report.results["step"]] == [*run.metrics.query("kind == 'eval'")["step"]]
    with pytest.raises(CheckpointError, match="has no scores"):
        run.scores  # noqa: B018
    nothing = electra_ds.Run("nowhere")
    assert not nothing.exists
    for name in ("kind", "status", "recipe", "record", "metrics", "checkpoints"):
        with pytest.raises(CheckpointError, match=r"There is no folder nowhere"):
            getattr(nothing, name)


def test_a_finetuning_takes_a_run_and_has_scores(examples: Path) -> None:
    tuned = electra_ds.finetune(
        electra_ds.Run("runs/mine"), train="train.csv", dev="dev.csv", ds_config="cpu", quiet=True,
        overrides={"schedule.min_steps": 4, "data.max_length": 32, "name": "mine"},
    )  # fmt: skip
    assert (tuned.kind, tuned.status) == ("finetune", "done")
    assert "accuracy" in tuned.scores["sets"]["dev"]["metrics"]
    assert tuned.recipe.name == "mine"
    assert tuned.path.name.startswith("train-mine-s0-")
    assert electra_ds.export(tuned, "tuned").is_dir()
    assert electra_ds.export(tuned) == tuned.path / "export"


def test_what_cannot_be_run_is_an_error_of_the_project_and_never_an_exit(examples: Path) -> None:
    with pytest.raises(ConfigError, match=r"sav_every: .*did you mean 'save_every'"):
        electra_ds.pretrain("tiny", sav_every=3)
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        electra_ds.pretrain("tinny")
    with pytest.raises(ConfigError, match=r"did you mean 'schedule\.total_steps'"):
        electra_ds.pretrain("tiny", overrides={"schedule.totl_steps": 3})
    with pytest.raises(ConfigError, match="already holds a run"):
        electra_ds.pretrain("tiny", run_dir="runs/mine", **HOW)
    with pytest.raises(ConfigError, match="Say what to finetune with"):
        electra_ds.finetune(task="mrpc")
    with pytest.raises(ConfigError, match="card and memory_gb: give only one"):
        electra_ds.plan("tiny", card="cpu", memory_gb=3)
    with pytest.raises(ConfigError, match=r"options must be an object of electra_ds\.PretrainOptions"):
        electra_ds.pretrain("tiny", options={"stop_at": 3})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--retry-failed works only with --resume"):
        electra_ds.run_sweep("smoke", "sweep", retry_failed=True)
    with pytest.raises(ConfigError, match="--local runs without Ray, so leave out --address"):
        electra_ds.run_sweep("smoke", "sweep", local=True, address="auto")
    with pytest.raises(ConfigError, match="Give a sweep to run, or the folder of one to resume"):
        electra_ds.run_sweep(None)


def test_the_pieces_take_a_recipe_and_a_store_by_name_and_path(examples: Path) -> None:
    values = {"extends": "tiny", "global_batch_size": 4, "schedule": {"total_steps": 2}}
    of_names = list(electra_ds.batches(values, "stores/small"))
    of_objects = list(electra_ds.batches(electra_ds.load_recipe(values), electra_ds.open_store("stores/small")))
    assert [step for step, _ in of_names] == [0, 1]
    for (_, one), (_, other) in zip(of_names, of_objects, strict=True):
        assert (one.ids_BT == other.ids_BT).all()  # type: ignore[attr-defined]
    assert sum(parameter.numel() for parameter in electra_ds.build_model(values, "stores/small").parameters()) > 0
    with pytest.raises(DataError, match="nowhere does not exist"):
        electra_ds.build_model("tiny", "nowhere")
    with pytest.raises(ConfigError, match="there is no task"):
        electra_ds.finetune("runs/mine", "mprc")
    with pytest.raises(ConfigError, match=r"predicted to take .* years"):
        electra_ds.pretrain("rc2020-small", data="stores/small", overrides={"schedule.total_steps": 10**9}, **HOW)
    with pytest.raises(CheckpointError):
        electra_ds.pretrain(resume="nowhere")


def test_a_dry_run_returns_a_run_that_is_not_there(examples: Path) -> None:
    run = electra_ds.pretrain("tiny", data="stores/small", run_dir="runs/dry", dry_run=True, **HOW)
    assert not run.exists
    assert not run.path.exists()


def test_options_may_be_made_first_and_named_ones_win(examples: Path) -> None:
    options = PretrainOptions(recipe="tiny", data=Path("stores/small"), stop_at=2, overrides=[*SMALL, *STEPS])
    run = electra_ds.pretrain(options=options, run_dir="runs/made", **HOW)
    assert (run.status, len(losses(run))) == ("stopped", 2)


def test_overrides_are_texts_or_a_mapping_of_any_values() -> None:
    given = {
        "optimizer.learning_rate": 2e-3, "name": "mine", "description": "a: b, 5e-3", "data.corpus_weights": [1, 2],
        "optimizer.bias_correction": False,
    }  # fmt: skip
    recipe = electra_ds.load_recipe("tiny", given)
    assert (recipe.optimizer.learning_rate, recipe.name, recipe.description) == (2e-3, "mine", "a: b, 5e-3")
    assert (recipe.data.corpus_weights, recipe.optimizer.bias_correction) == ([1, 2], False)
    assert electra_ds.load_recipe("tiny", ["seed=3"]) == electra_ds.load_recipe("tiny", {"seed": 3})


def test_a_recipe_is_a_name_a_file_values_or_itself(tmp_path: Path) -> None:
    recipe = electra_ds.load_recipe({"extends": "tiny", "name": "mine", "schedule": {"total_steps": 7}})
    assert (recipe.name, recipe.schedule.total_steps) == ("mine", 7)
    assert electra_ds.load_recipe({"extends": "tiny"}).name == "custom"
    assert electra_ds.load_recipe(recipe) == recipe
    (tmp_path / "mine.yaml").write_text("extends: tiny\nschedule: {total_steps: 7}\n")
    assert electra_ds.load_recipe(tmp_path / "mine.yaml").model_dump() == recipe.model_dump() | {"name": "mine"}
    with pytest.raises(ConfigError, match=r"Recipe 'x' is not valid:\n  shedule: unknown key"):
        electra_ds.load_recipe({"extends": "tiny", "name": "x", "shedule": {}})


def test_a_recipe_in_python_names_its_store_as_one_in_a_file() -> None:
    named = PretrainOptions.of({"recipe": "tiny", "corpus": "a"})
    given = PretrainOptions.of({"recipe": {"extends": "tiny"}, "corpus": [["a"]]})
    assert store_name(named, electra_ds.load_recipe("tiny")) == store_name(given, electra_ds.load_recipe(given.recipe))


def test_a_plan_is_a_forecast() -> None:
    assert electra_ds.plan("rc2020-small", card="GTX 1060 6GB").fits
    with pytest.raises(ConfigError, match="No card"):
        electra_ds.plan("tiny", card="GTX 99")


def test_the_parts_give_the_losses_of_a_run(examples: Path) -> None:
    recipe, store = small_recipe(*STEPS), electra_ds.open_store("stores/small")
    with electra_ds.open_engine(recipe, store, ds_config="cpu") as engine:
        found = []
        for step, batch in electra_ds.batches(recipe, store):
            result = engine.train_step(batch, step)
            found.append([step + 1, *(float(result[name]) for name in LOSSES[1:])])
        metrics = electra_ds.evaluate(engine, recipe, store, windows=16)
    assert found == losses(electra_ds.Run("runs/mine"))
    table = electra_ds.Run("runs/mine").metrics.query("kind == 'eval' and step == 6")
    assert metrics["discriminator_auc"] == table["discriminator_auc"].item()
    later = [step for step, _ in electra_ds.batches(recipe, store, first_step=4)]
    assert later == [4, 5]


SCRIPT = """
import json, electra_ds
for name in ("stage0", "stage2"):
    how = dict(ds_config=f"{name}.json", threads=1, quiet=True)
    runs = [
        electra_ds.pretrain("tiny", data="stores/small", run_dir=f"runs/{name}-{turn}", overrides=OVERRIDES,
                            eval_windows=16, log_every=1, **how)
        for turn in range(2)
    ]
    assert [run.status for run in runs] == ["done", "done"]
    first, second = (run.metrics.query("kind == 'train'")["loss"].tolist() for run in runs)
    assert first == second and len(first) == 6
    tuned = electra_ds.finetune(runs[0], train="train.csv", dev="dev.csv", run_dir=f"runs/{name}-tuned",
                                overrides={"schedule.min_steps": 4, "data.max_length": 32}, **how)
    assert tuned.status == "done"
print("all done")
"""


@pytest.mark.slow
def test_runs_follow_each_other_in_one_process_at_stages_0_and_2(examples: Path) -> None:
    """Each meets in a process group of its own, as a script's runs do."""
    for stage in (0, 2):
        (examples / f"stage{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    (examples / "script.py").write_text(SCRIPT.replace("OVERRIDES", repr([*SMALL, *STEPS])))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=examples, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("all done\n"), done.stdout + done.stderr
