"""A trial that a scheduler of the user's own tuner ends while it starts is stopped, and can be resumed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from electra_ds.data.token_store import TokenStore
from electra_ds.sweep.folder import ENDED_AT_START, SweepFolder
from electra_ds.sweep.sweep_file import parse_sweep
from electra_ds.sweep.trials import expand
from tests.helpers import REPOSITORY
from tests.launching import ENVIRONMENT
from tests.sweeping import small_sweep, write_sweep

OWN_TUNER = """
import sys
from pathlib import Path
import ray, yaml
from ray import tune
from ray.tune.schedulers import FIFOScheduler
from electra_ds.sweep import trainable

given, out = sys.argv[1:]


class Impatient(FIFOScheduler):
    ended = set()

    def choose_trial_to_run(self, controller):
        for trial in controller.get_trials():
            if trial.status == "RUNNING" and trial.trial_id not in self.ended:
                self.ended.add(trial.trial_id)
                controller.stop_trial(trial)
        return super().choose_trial_to_run(controller)


ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=1)
tune.Tuner(
    trainable(yaml.safe_load(open(given)), out), param_space={"seed": 3},
    tune_config=tune.TuneConfig(scheduler=Impatient()),
    run_config=tune.RunConfig(storage_path=str(Path(out).parent / "tune")),
).fit()
"""


def begun(tmp_path: Path) -> tuple[SweepFolder, str]:
    """A sweep's folder and the key of a trial whose processes have been started."""
    spec = parse_sweep(small_sweep(tmp_path), "test")
    folder, trial = SweepFolder(tmp_path / "sweep"), expand(spec, check=False)[0]
    folder.make()
    folder.trial(trial.key).begin(trial, ["electra-ds", "pretrain"], spec.resources)
    return folder, trial.key


@pytest.mark.parametrize("status", [-signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGKILL, 0])
def test_a_trial_that_left_before_its_run_could_note_it_is_stopped_and_not_at_its_end(
    status: int, tmp_path: Path
) -> None:
    folder, key = begun(tmp_path)
    folder.trial(key).end(status)
    folder.trial(key).note_stopped(status, 0)
    assert folder.trial(key).run.status_details() == {"status": "stopped", "step": 0, "reason": ENDED_AT_START}
    assert folder.trial(key).state() == ("unfinished", ENDED_AT_START)  # to be resumed
    assert not folder.trial(key).run.exists()  # and so to be begun anew


def test_a_trial_that_has_ended_by_itself_keeps_its_status(tmp_path: Path) -> None:
    folder, key = begun(tmp_path)
    folder.trial(key).end(2)
    folder.trial(key).note_stopped(2, 0)
    assert folder.trial(key).run.status() is None
    assert folder.trial(key).state()[0] == "failed"
    folder.trial(key).run.path.mkdir()
    folder.trial(key).run.write_status("done", step=30)
    folder.trial(key).note_stopped(-signal.SIGTERM, 0)
    assert folder.trial(key).run.status() == "done"


@pytest.mark.slow
def test_a_scheduler_of_ones_own_tuner_that_ends_a_trial_while_it_starts_leaves_it_stopped(
    store: TokenStore, tmp_path: Path
) -> None:
    values = small_sweep(store.path)
    values["pretrain"] |= {"space": {}}
    (tmp_path / "mine.py").write_text(OWN_TUNER)
    ended = subprocess.run(
        [sys.executable, str(tmp_path / "mine.py"), str(write_sweep(tmp_path, values)), str(tmp_path / "out")],
        cwd=tmp_path, env=ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False,
        timeout=200,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    folder = SweepFolder(tmp_path / "out")
    (record,) = folder.records()
    assert folder.trial(record.key).run.status() == "stopped", (record, folder.trial(record.key).log.read_text())
