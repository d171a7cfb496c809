"""When Ray is given which trial, and what becomes of one that is ended while it starts."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.search import Searcher

from electra_ds.finetuning.glue import GLUE
from electra_ds.sweep.folder import ENDED_AT_START, SweepFolder
from electra_ds.sweep.options import metrics_of
from electra_ds.sweep.sweep_file import parse_sweep
from electra_ds.sweep.trials import Trial, expand
from electra_ds.sweep.tune import FixedOrderSearcher
from tests.sweep.test_sweep_results import FEW, both, made, pretend
from tests.sweeping import small_sweep


@FEW
@given(data=st.data())
def test_a_finetuning_begins_once_its_encoder_is_there_and_no_trial_twice_or_never(data: st.DataObject) -> None:
    """Whatever ends when, and whether it fails."""
    _, trials = made(both([0, 1, 2], [0, 1]))
    by_key = {trial.key: trial for trial in trials}
    with tempfile.TemporaryDirectory() as path:
        folder = SweepFolder(Path(path))
        folder.make()
        refused: list[Trial] = []
        order = FixedOrderSearcher(trials, folder, refused.append)
        running: list[str] = []
        begun: list[str] = []
        failed: set[str] = set()
        while True:
            suggestion = order.suggest(f"tune-{len(begun)}")
            if isinstance(suggestion, dict):
                trial = by_key[suggestion["key"]]
                if trial.pretraining is not None:
                    assert folder.trial(trial.pretraining.key).state()[0] == "done"
                begun.append(trial.key)
                running.append(f"tune-{len(begun) - 1}")
                if data.draw(st.booleans()):
                    continue
            if not running:
                assert suggestion == Searcher.FINISHED
                break
            name = running.pop(data.draw(st.integers(0, len(running) - 1)))
            key = begun[int(name.removeprefix("tune-"))]
            if data.draw(st.integers(0, 3)) == 0:
                failed.add(key)
            pretend(folder, by_key[key], 0.5, "failed" if key in failed else "done")
            order.on_trial_complete(name)
        assert len({*begun}) == len(begun)
        assert {*begun, *(trial.key for trial in refused)} == by_key.keys()
        assert {trial.key for trial in refused} == {
            trial.key for trial in trials if trial.pretraining is not None and trial.pretraining.key in failed
        }
        assert len(refused) == len({trial.key for trial in refused})
        pretrainings = [key for key in begun if by_key[key].stage == "pretrain"]
        assert pretrainings == [trial.key for trial in trials if trial.stage == "pretrain"]


def test_a_scheduler_goes_by_a_metric_of_one_stage() -> None:
    """So it never compares a pretraining with a finetuning."""
    for task in (*GLUE, "squad1", None):
        assert not {*metrics_of("pretrain", {}, {})} & {*metrics_of("finetune", {"task": task}, {})}


def test_nothing_begins_once_the_sweep_is_to_stop(tmp_path: Path) -> None:
    _, trials = made(both([0], [0]))
    folder = SweepFolder(tmp_path)
    folder.make()
    order = FixedOrderSearcher(trials, folder, lambda trial: None)
    folder.ask_to_stop()
    assert order.suggest("tune-0") == Searcher.FINISHED


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
