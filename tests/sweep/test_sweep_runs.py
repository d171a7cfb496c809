"""Sweeps that run: the same numbers by Ray, without it and by hand; stopped, killed and resumed; trials that fail."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import psutil
import pytest
import yaml

import electra_ds
from electra_ds.config.names import RECIPES, shipped_text
from electra_ds.config.run_directory import read_metrics
from electra_ds.core.launcher import SECOND_SIGNAL_AFTER_S
from electra_ds.data.token_store import TokenStore
from tests.helpers import REPOSITORY
from tests.launching import ENVIRONMENT
from tests.sweeping import (
    alive,
    before_each_batch,
    line_of,
    ours,
    rays,
    records,
    run_sweep,
    small_sweep,
    start_sweep,
    table_of,
    wait_until,
    write_sweep,
)
from tests.training.test_tracking import of_kind, wandb_records

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that ran one trial after the other, without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = run_sweep(write_sweep(folder, small_sweep(store.path)), "--local", "--out", folder / "sweep")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 stopped as planned of 4 trials" in result.stdout
    return folder / "sweep"


TWO_TRIALS = "pretrain.seeds=[1]"
"""Of the four that the undisturbed sweep has."""


def assert_same_trials(folder: Path, undisturbed: Path) -> None:
    """The two have come to what they came to there."""
    found = table_of(folder)
    assert len(found) == 2
    pd.testing.assert_frame_equal(found, table_of(undisturbed).loc[found.index])


def test_ray_runs_two_side_by_side_and_gives_the_numbers_of_the_bare_command(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "by-ray"
    result = run_sweep(undisturbed / "sweep.yaml", "--out", out, "--set", TWO_TRIALS)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_same_trials(out, undisturbed)
    spans = sorted((a["began"], a["began"] + a["seconds"]) for r in records(out).values() for a in r["attempts"])
    assert any(later[0] < earlier[1] for earlier, later in itertools.pairwise(spans)), spans
    assert {len(record["attempts"]) for record in records(out).values()} == {1}
    assert not ours(out)
    assert not (out / "tune").exists()

    key, record = next(iter(records(out).items()))
    command = [word if word != str(out / "runs" / key) else str(tmp_path / "bare") for word in record["command"]]
    subprocess.run([sys.executable, "-m", *command[0].replace("-", "_").split(), *command[1:]], cwd=REPOSITORY,
                   env=ENVIRONMENT, check=True, capture_output=True)  # fmt: skip

    def losses(run: Path) -> list[Any]:
        return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in read_metrics(run / "metrics.jsonl")]

    assert losses(tmp_path / "bare") == losses(out / "runs" / key)
    table = pd.read_parquet(out / "results.parquet")
    assert set(table["command"].map(lambda line: shlex.split(line)[0])) == {"electra-ds"}
    assert (table["cpu_hours"] > 0).all()
    assert len(pd.read_csv(out / "cells.csv")) == 2 * 4
    assert (out / "curves.png").stat().st_size > 10_000


def test_a_finished_sweep_runs_nothing_again_and_new_seeds_alone(undisturbed: Path, tmp_path: Path) -> None:
    before = records(undisturbed)
    again = run_sweep("--resume", undisturbed, "--local")
    assert again.returncode == 0
    assert "4 trials, 4 done before" in again.stdout
    assert records(undisturbed) == before
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", undisturbed, copy], check=True)
    more = run_sweep("--resume", copy, "--local", "--set", "pretrain.seeds=[1,2]", "pretrain.space=null")
    assert more.returncode == 0, more.stdout + more.stderr
    assert set(records(copy)) > set(before)
    assert len(records(copy)) == 4 + 2  # width 0.25, which the recipe has, was not run before
    code = (
        f"import sys; from electra_ds.cli import main; main(['sweep', 'status', {str(copy)!r}]); "
        "sys.exit('ray' in sys.modules)"
    )
    read = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert read.returncode == 0, read.stderr
    assert "2 stopped as planned of 2 trials" in read.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.nightly)])
def test_a_signal_saves_leaves_nobody_and_the_sweep_continues_from_python(
    undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out, log = tmp_path / "sweep", tmp_path / "log"
    how = ["--set", TWO_TRIALS, *(["--local"] if number == signal.SIGTERM else [])]
    slow = before_each_batch(tmp_path, "time.sleep(0.2)")  # so that there is something to stop
    driver = start_sweep(undisturbed / "sweep.yaml", "--out", out, *how, log=log, environment=slow)
    wait_until(lambda: list(out.glob("runs/*/metrics.jsonl")), told=log.read_text)
    assert {trial.nice() for trial in ours(out, "electra_ds")} <= {os.nice(0)}  # Ray's own would be 15
    driver.send_signal(number)
    assert driver.wait(200) == (-2 if number == signal.SIGINT else 143), log.read_text()
    assert f"{number.name}: running trials save and stop." in log.read_text()
    assert "Resume it with: bin/sweep --resume" in log.read_text()
    assert not ours(out)
    assert electra_ds.run_sweep(None, out, local=True, quiet=True).is_complete
    assert_same_trials(out, undisturbed)


@pytest.mark.nightly
@pytest.mark.parametrize("how", [["--local"], []])
def test_a_second_signal_leaves_at_once_and_the_sweep_goes_on_without_the_files_it_was_given(
    undisturbed: Path, tmp_path: Path, how: list[str]
) -> None:
    """Trials stand still, so they cannot save."""
    out, log, recipe = tmp_path / "sweep", tmp_path / "log", tmp_path / "mine.yaml"
    recipe.write_text(shipped_text(RECIPES, "tiny"))
    values = yaml.safe_load((undisturbed / "sweep.yaml").read_text())
    values["pretrain"]["recipe"] = str(recipe)
    driver = start_sweep(write_sweep(tmp_path, values), "--out", out, *how, "--set", TWO_TRIALS, log=log)
    recipe.rename(wait_until(lambda: out.is_dir() and list(out.glob("inputs/*/mine.yaml")) and tmp_path / "moved"))
    wait_until(lambda: list(out.glob("runs/*/metrics.jsonl")), told=log.read_text)
    for trial in ours(out, "electra_ds"):
        trial.suspend()
    driver.send_signal(signal.SIGINT)
    time.sleep(SECOND_SIGNAL_AFTER_S + 1)
    assert driver.poll() is None, log.read_text()
    driver.send_signal(signal.SIGINT)
    assert driver.wait(10) == 128 + signal.SIGINT
    assert "SIGINT again: leaving at once." in log.read_text()
    wait_until(lambda: not ours(out), 100)
    resumed = run_sweep("--resume", out, "--local")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert_same_trials(out, undisturbed)


def test_killed_ranks_trials_and_drivers_lose_nothing_and_leave_nobody(undisturbed: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "sweep", tmp_path / "log"
    slow = before_each_batch(tmp_path, "time.sleep(0.3)")  # so that there is something to kill
    how = ["--set", "pretrain.wandb=offline", TWO_TRIALS]
    driver = start_sweep(undisturbed / "sweep.yaml", "--out", out, *how, log=log, environment=slow)

    def at_work(attempt: int) -> list[tuple[str, psutil.Process]]:
        """Runs in their so-and-so-many-th attempt that have made steps in it, each with its process."""
        found = []
        for key, record in records(out).items():
            if len(record["attempts"]) == attempt and _last(out / "runs" / key / "metrics.jsonl") >= 5 * attempt:
                found += [(key, process) for process in ours(out, f"runs/{key}") if "electra_ds" in line_of(process)]
        return found

    ((key, rank), *_) = wait_until(lambda: at_work(1), told=log.read_text)
    rank.kill()
    wait_until(lambda: key in dict(at_work(2)), told=log.read_text)  # Tune has begun it again, where it was
    begun = sum(len(record["attempts"]) for record in records(out).values())
    trials = [each for each in rays(driver.pid) if "ResourceTrainable" in line_of(each)]
    assert trials
    for trial in trials:  # of which another may be at its end
        trial.kill()
    wait_until(lambda: sum(len(r["attempts"]) for r in records(out).values()) > begun, told=log.read_text)
    cluster = rays(driver.pid)
    driver.kill()
    driver.wait()
    wait_until(lambda: not ours(out), 100)
    resumed = run_sweep("--resume", out)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "2 stopped as planned of 2 trials" in resumed.stdout
    assert_same_trials(out, undisturbed)
    assert records(out)[key]["attempts"][0]["status"] == -signal.SIGKILL
    # Agents of Ray's, which hold nothing, look once a minute whether theirs is there.
    wait_until(lambda: not list(alive(cluster)), 120, lambda: str([line_of(each)[:200] for each in alive(cluster)]))
    starts = sorted((out / "runs" / key / "wandb").glob("offline-run-*"))
    assert len(starts) > 1
    assert len({start.name.rpartition("-")[2] for start in starts}) == 1, starts  # one run, which went on
    (run,) = of_kind(wandb_records(out / "runs" / key)[-1], "run")
    assert run.run_group == "small"


def _last(metrics: Path) -> int:
    lines = read_metrics(metrics) if metrics.exists() else []
    return int(lines[-1]["step"]) if lines else 0


def test_trials_that_fail_or_are_killed_each_time_are_reported_and_do_not_spoil_the_rest(
    store: TokenStore, undisturbed: Path, tmp_path: Path
) -> None:
    """One is killed at its twelfth step, as the kernel would if memory ran out, until it is retried without that."""
    values = small_sweep(store.path, retries=1)
    values["pretrain"] |= {
        "seeds": [0],
        "space": {},
        "variants": {
            "good": {"generator.width_multiplier": 1.0},
            "killed": {"generator.width_multiplier": 0.5},
            "huge": {"model.hidden_size": 262_144, "model.num_attention_heads": 4096},  # no memory for its weights
            "diverging": {"optimizer.learning_rate": 1e30, "optimizer.max_grad_norm": 1e30},
        },
    }
    is_fatal = "step >= 12 and size is None and 'runs/killed' in ' '.join(sys.argv)"
    fatal = before_each_batch(tmp_path, f"if {is_fatal}: os.kill(os.getpid(), signal.SIGKILL)")
    out = tmp_path / "sweep"
    result = run_sweep(write_sweep(tmp_path, values), "--out", out, "--local", environment=fatal)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "3 failed" in result.stdout
    assert "1 stopped" in result.stdout
    table = pd.read_csv(out / "results.csv").set_index("variant")
    assert "memory" in table.loc["huge", "reason"]
    assert "finite" in table.loc["diverging", "reason"]
    assert table.loc["killed", "reason"] == "after 2 attempts: killed by signal 9"
    assert f"bin/sweep --resume {out} --retry-failed" in result.stdout
    again = run_sweep("--resume", out, "--local")
    assert again.returncode == 1
    attempts = {key.split("-")[0]: len(record["attempts"]) for key, record in records(out).items()}
    assert attempts == {"good": 1, "killed": 2, "huge": 1, "diverging": 1}
    retried = run_sweep("--resume", out, "--local", "--retry-failed")
    assert retried.returncode == 1
    attempts = {key.split("-")[0]: len(record["attempts"]) for key, record in records(out).items()}
    assert attempts == {"good": 1, "killed": 3, "huge": 2, "diverging": 2}
    found, same = table_of(out).filter(like="metric."), table_of(undisturbed).filter(like="metric.")
    for variant, width in (("good", "1"), ("killed", "0.5")):
        (here,) = (key for key in found.index if key.startswith(variant))
        (there,) = (key for key in same.index if key.startswith(f"width_multiplier={width}-s0"))
        assert found.loc[here].to_dict() == same.loc[there].to_dict()


@pytest.mark.nightly
def test_ray_gives_a_trial_up_that_is_killed_each_time(undisturbed: Path, tmp_path: Path) -> None:
    fatal = before_each_batch(tmp_path, "if step >= 12 and size is None: os.kill(os.getpid(), signal.SIGKILL)")
    out = tmp_path / "sweep"
    one = ["--set", "pretrain.seeds=[1]", "pretrain.space={generator.width_multiplier: {grid: [0.5]}}", "retries=1"]
    result = run_sweep(undisturbed / "sweep.yaml", "--out", out, *one, environment=fatal)
    assert result.returncode == 1, result.stdout + result.stderr
    ((_, record),) = records(out).items()
    assert [attempt["status"] for attempt in record["attempts"]] == [-signal.SIGKILL] * 2
    (reason,) = pd.read_csv(out / "results.csv")["reason"]
    assert reason.startswith("after 2 attempts: ")
    assert "killed by signal 9" in reason


@pytest.mark.nightly
def test_a_time_limit_lets_trials_save(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    cut = run_sweep(undisturbed / "sweep.yaml", "--out", out, "--time-limit", "12s")
    assert cut.returncode == 1, cut.stdout + cut.stderr
    assert "The time limit is reached: running trials save and stop." in cut.stderr
    assert f"Resume it with: bin/sweep --resume {out}" in cut.stdout
    assert not (out / "stop").exists()
    resumed = run_sweep("--resume", out)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    pd.testing.assert_frame_equal(table_of(out), table_of(undisturbed))
