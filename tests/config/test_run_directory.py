"""A run's folder among processes, ranks and machines."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from electra_ds.config import run_directory
from electra_ds.config.run_directory import RunDirectory
from electra_ds.core.errors import CheckpointError, ConfigError


def test_ranks_see_at_once_that_they_share_a_folder_even_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, text: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_directory, "_PATIENCE_S", 0)
    run = RunDirectory(tmp_path / "run")
    with run.locked():
        RunDirectory(tmp_path / "run").check_shared(run.owner())
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with RunDirectory(tmp_path / "other").locked():
            RunDirectory(tmp_path / "other").check_shared(RunDirectory(tmp_path / "other").owner())


def test_ranks_with_folders_of_their_own_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory, "_PATIENCE_S", 0)
    ours, theirs = RunDirectory(tmp_path / "ours"), RunDirectory(tmp_path / "theirs")
    with ours.locked():
        with pytest.raises(CheckpointError, match=r"does not see the main rank.*file system that all of them share"):
            theirs.check_shared(ours.owner())
        theirs.path.mkdir()
        (theirs.path / ".lock").write_text("1\n")  # of a run before, or of another job on that machine
        with pytest.raises(CheckpointError, match="share"):
            theirs.check_shared(ours.owner())


def test_a_new_run_does_not_begin_where_another_began_while_its_data_was_made(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.check_free()
    with run.locked(is_new=True):
        (run.path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="already holds a run"), run.locked(is_new=True):
        pass
    with run.locked():
        pass
    (run.path / "run.json").unlink()
    (run.checkpoints / "step-00000004").mkdir(parents=True)
    with pytest.raises(ConfigError, match="already holds a run"):
        run.check_free()
    (run.checkpoints / "step-00000004").rename(run.checkpoints / "step-00000004-mine")
    run.check_free()


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="in use by process unknown"), run.locked():
            pass


def test_the_status_of_an_earlier_version_is_read_and_replaced(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    (tmp_path / "verdict.json").write_text('{"verdict": "collapsed", "step": 9, "collapsed_at": 3}')
    assert run.status() == "collapsed"
    assert run.status_details() == {"status": "collapsed", "step": 9, "collapsed_at": 3}
    run.clear_status()
    assert run.status() is None
    run.write_status("done", step=12)
    assert run.status_details() == {"status": "done", "step": 12}
