"""Sweeps that run: two stages, schedulers, searchers, trials of several workers, and a Tuner of one's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd  # type: ignore[import-untyped]
import pytest

from electra_ds.data.token_store import TokenStore
from tests.finetune_runs import reviews, write_csv
from tests.helpers import REPOSITORY
from tests.launching import ENVIRONMENT
from tests.sweeping import (
    before_each_batch,
    records,
    run_sweep,
    small_sweep,
    table_of,
    write_sweep,
)
from tests.training.test_tracking import of_kind, wandb_records, wandb_rows

pytestmark = pytest.mark.slow


@pytest.mark.nightly
def test_the_shipped_smoke_sweep_runs(tmp_path: Path) -> None:
    program = [sys.executable, str(REPOSITORY / "bin" / "sweep"), "smoke"]
    result = subprocess.run(
        program, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=1000
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 stopped as planned of 4 trials" in result.stdout
    found = pd.read_csv(tmp_path / "runs" / "sweep-smoke" / "cells.csv")
    assert set(found["n"]) == {2}
    assert (found["std"] > 0).any()


@pytest.mark.parametrize("how", [["--local"], pytest.param([], marks=pytest.mark.nightly)], ids=["local", "ray"])
def test_each_checkpoint_of_what_has_not_collapsed_is_finetuned(
    store: TokenStore, tmp_path: Path, how: list[str]
) -> None:
    """A discriminator whose loss counts for nothing stays at chance while its generator learns."""
    values = small_sweep(store.path)
    changes = {"schedule.total_steps": 60, "generator.width_multiplier": 1.0, "generator.sharing": "none"}
    values["pretrain"] |= {
        "space": {}, "seeds": [2], "set": values["pretrain"]["set"] | changes, "checkpoints": [0.25, 1.0],
        "variants": {"live": {}, "dead": {"discriminator.loss_weight": 0.0}}, "stop_on_collapse": True,
        "eval_every": 5, "eval_windows": 64,
    }  # fmt: skip
    del values["pretrain"]["stop_at_share"]
    own = {name: str(write_csv(tmp_path / f"{name}.csv", ["text", "label"], reviews(24, seed)))
           for seed, name in enumerate(("train", "dev"))}  # fmt: skip
    values["finetune"] = {"recipe": "rc2020", "ds_config": "cpu", "set": {"schedule.epochs": 1}} | own
    out = tmp_path / "sweep"
    slow = before_each_batch(tmp_path, "time.sleep(0.6 if step > 25 else 0)")  # where the dead one has ended
    result = run_sweep(write_sweep(tmp_path, values), "--out", out, *how, environment={} if how else slow)
    table = pd.read_csv(out / "results.csv")
    told = result.stdout + result.stderr + table[["trial", "state", "reason"]].to_string()
    pretrained = table[table["stage"] == "pretrain"].set_index("variant")
    assert dict(pretrained["state"]) == {"live": "done", "dead": "collapsed"}, told
    assert (pretrained.loc["dead", "collapsed_at"], pretrained.loc["dead", "metric.step"]) == (5, 25)  # judged from 6
    finetuned = table[table["stage"] == "finetune"].set_index(["pretrain.variant", "pretrain.step"])["state"]
    assert dict(finetuned) == {
        (variant, step): "skipped" if (variant, step) == ("dead", 60) else "done"
        for variant in ("live", "dead") for step in (15, 60)
    }, told  # fmt: skip
    assert result.returncode == 0, told  # a collapse is a result
    if not how:
        (live,) = (one["attempts"][0] for key, one in records(out).items() if key.startswith("live-s2"))
        first = min(one["attempts"][0]["began"] for one in records(out).values() if one["stage"] == "finetune")
        assert first < live["began"] + live["seconds"]  # that one of the dead encoder, while the other was pretrained
    assert "collapsed: at step" in result.stdout
    again = run_sweep("--resume", out, "--local")
    assert again.returncode == 0
    assert "6 trials, 6 done before" in again.stdout


@pytest.mark.parametrize("how", [["--local"], pytest.param([], marks=pytest.mark.nightly)], ids=["local", "ray"])
def test_a_trial_of_two_workers_gets_its_place_and_survives_the_death_of_one(
    store: TokenStore, tmp_path: Path, how: list[str]
) -> None:
    """The attempt has the status of the killed worker, whatever the other one exits with."""
    values = small_sweep(store.path, resources={"workers": 2, "cpus": 1})
    values["pretrain"] |= {"space": {}, "seeds": [0]}
    spec = write_sweep(tmp_path, values)
    is_first = "os.environ['RANK'] == '1' and step == 12 and not Path(os.environ['KILLED']).exists()"
    fatal = before_each_batch(
        tmp_path, f"if {is_first}: Path(os.environ['KILLED']).touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    # The second one finds that it has been killed already.
    for name, way, statuses in (("disturbed", how, [-9, 0]), ("undisturbed", ["--local"], [0])):
        result = run_sweep(
            spec, "--out", tmp_path / name, *way, environment=fatal | {"KILLED": str(tmp_path / "killed")}
        )
        assert result.returncode == 0, result.stdout + result.stderr
        ((_, record),) = records(tmp_path / name).items()
        assert [each["status"] for each in record["attempts"]] == statuses
    pd.testing.assert_frame_equal(table_of(tmp_path / "disturbed"), table_of(tmp_path / "undisturbed"))
    assert set(pd.read_csv(tmp_path / "disturbed" / "results.csv")["world_size"]) == {2}


@pytest.mark.nightly
def test_asha_ends_trials_which_are_not_run_again(store: TokenStore, tmp_path: Path) -> None:
    values = small_sweep(
        store.path, metric={"name": "discriminator_auc"},
        scheduler={"kind": "asha", "grace_steps": 10, "reduction_factor": 2},
    )  # fmt: skip
    values["pretrain"] |= {"space": {"optimizer.learning_rate": {"grid": [1e-3, 1e-5, 1e-6]}}, "seeds": [0]}
    values["pretrain"]["set"] |= {"schedule.total_steps": 200}
    values["pretrain"]["wandb"] = "offline"
    del values["pretrain"]["set"]["optimizer.learning_rate"]
    del values["pretrain"]["stop_at_share"]
    out = tmp_path / "sweep"
    result = run_sweep(write_sweep(tmp_path, values), "--out", out)
    assert result.returncode == 0, result.stdout + result.stderr
    table = pd.read_csv(out / "results.csv")
    ended = table[table["reason"] == "ended by the scheduler"]
    assert len(ended) >= 1, table[["state", "reason", "metric.step"]]
    assert (ended["metric.step"] < 200).all()
    assert "done" in set(table["state"])
    before = records(out)
    assert run_sweep("--resume", out, "--local").returncode == 0
    assert records(out) == before
    statuses = [json.loads((Path(run) / "status.json").read_text()) for run in ended["run"]]
    assert {status["status"] for status in statuses} == {"stopped"}
    for run, step in zip(ended["run"], ended["metric.step"], strict=True):
        (told,) = wandb_records(Path(run))  # closed in order, so that nothing is lost
        assert step in {row["_step"] for row in wandb_rows(told) if "eval/discriminator_auc" in row}
        assert [one.exit_code for one in of_kind(told, "exit")] == [143]


@pytest.mark.nightly
def test_median_stopping_ends_what_is_worse_and_pauses_nothing(store: TokenStore, tmp_path: Path) -> None:
    values = small_sweep(store.path, metric={"name": "generator_gain"}, scheduler={"kind": "median", "grace_steps": 20})
    values["pretrain"] |= {"space": {"optimizer.learning_rate": {"grid": [1e-3, 9e-4, 8e-4, 7e-4, 1e-6]}}, "seeds": [0]}
    del values["pretrain"]["set"]["optimizer.learning_rate"], values["pretrain"]["stop_at_share"]
    values["pretrain"]["set"] |= {"schedule.total_steps": 300}
    out = tmp_path / "sweep"
    result = run_sweep(write_sweep(tmp_path, values), "--out", out)
    assert result.returncode == 0, result.stdout + result.stderr
    table = pd.read_csv(out / "results.csv").set_index("optimizer.learning_rate")
    assert table.loc[1e-6, "reason"] == "ended by the scheduler"
    assert table.loc[1e-3, "state"] == "done"
    assert (table["attempts"] == 1).all()


@pytest.mark.nightly
def test_optuna_learns_from_what_was_suggested_before(store: TokenStore, tmp_path: Path) -> None:
    values = small_sweep(store.path, metric={"name": "generator_gain"}, search={"kind": "optuna", "samples": 2})
    values["pretrain"] |= {"space": {"optimizer.learning_rate": {"loguniform": [1e-5, 1e-2]}}, "seeds": [0]}
    del values["pretrain"]["set"]["optimizer.learning_rate"]
    out = tmp_path / "sweep"
    first = run_sweep(write_sweep(tmp_path, values), "--out", out)
    assert first.returncode == 0, first.stdout + first.stderr
    before = records(out)
    assert len(before) == 2
    more = run_sweep("--resume", out, "--set", "search.samples=4")
    assert more.returncode == 0, more.stdout + more.stderr
    assert len(records(out)) == 4
    assert {key: records(out)[key] for key in before} == before


OWN_TUNER = """
import sys
from pathlib import Path
import ray, yaml
from ray import tune
from ray.tune.schedulers import FIFOScheduler
from electra_ds.sweep import trainable

given, out = sys.argv[1:]
IMPATIENT, GOOD, DIVERGING = 1e-4, 1e-3, 1e30


class Impatient(FIFOScheduler):
    \"\"\"Ends one of the trials once Tune has started it.\"\"\"

    ended = set()

    def choose_trial_to_run(self, controller):
        for trial in controller.get_trials():
            is_one = trial.config["optimizer.learning_rate"] == IMPATIENT
            if is_one and trial.status == "RUNNING" and trial.trial_id not in self.ended:
                self.ended.add(trial.trial_id)
                controller.stop_trial(trial)
        return super().choose_trial_to_run(controller)


ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=6)  # all three at once
rates = tune.grid_search([IMPATIENT, GOOD, DIVERGING])
grid = tune.Tuner(
    trainable(yaml.safe_load(open(given)), out),
    param_space={"optimizer.learning_rate": rates, "seed": 3, "optimizer.max_grad_norm": 1e30},
    tune_config=tune.TuneConfig(scheduler=Impatient()),
    run_config=tune.RunConfig(storage_path=str(Path(out).parent / "tune")),
).fit()
assert len(grid.errors) == 1 and "finite" in str(grid.errors[0]), grid.errors
best = grid.get_best_result("discriminator_auc", "max")
assert best.metrics["step"] == 30 and best.config["seed"] == 3, best.metrics
assert len(best.metrics_dataframe) >= 3
"""


def test_the_trainable_drops_into_a_tuner_of_ones_own_whose_scheduler_may_end_a_trial(
    store: TokenStore, tmp_path: Path
) -> None:
    values = small_sweep(store.path, resources={"workers": 2, "cpus": 1})
    values["pretrain"] |= {"space": {}}
    (tmp_path / "mine.py").write_text(OWN_TUNER)
    out = tmp_path / "out"
    slow = before_each_batch(tmp_path, "time.sleep(0.3 if 'learning_rate=0.0001' in ' '.join(sys.orig_argv) else 0)")
    environment = ENVIRONMENT | {"PYTHONPATH": f"{REPOSITORY}:{slow['PYTHONPATH']}"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "mine.py"), str(write_sweep(tmp_path, values)), str(out)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=1000,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    statuses = {
        record["values"]["optimizer.learning_rate"]: json.loads((out / "runs" / key / "status.json").read_text())
        for key, record in records(out).items()
    }
    assert {rate: status["status"] for rate, status in statuses.items()} == {
        1e-4: "stopped", 1e-3: "stopped", 1e30: "failed",
    }  # fmt: skip
    assert statuses[1e-3]["reason"].startswith("--stop-at")  # as planned
    assert not statuses[1e-4]["reason"].startswith("--stop-at")
