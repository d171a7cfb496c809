"""A trial that a scheduler of the user's own tuner ends while it starts is stopped, and can be resumed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from electra_ds.sweep.folder import ENDED_AT_START, SweepFolder
from electra_ds.sweep.sweep_file import parse_sweep
from electra_ds.sweep.trials import expand
from tests.sweeping import small_sweep


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
