"""A sweep's folder, which is the truth about it: what is done is read from the runs, without Ray.

DIR/
  sweep.yaml          the sweep in full
  home                where this folder was when the sweep began: the paths in sweep.yaml are from that time
  inputs/             copies of its recipes and DeepSpeed JSON files, where they are the user's own
  runs/KEY/           each trial's run directory, as bin/pretrain and bin/finetune make it
  trials/KEY.json     what the trial is, and each attempt: when, how long, how it ended
  trials/KEY.log      what its processes printed
  trials/KEY.ended    there once a scheduler has decided to end it
  stop                there while the sweep is to save and leave
  results.csv  results.parquet  cells.csv  curves.png
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

from electra_ds.core.errors import CheckpointError, ConfigError
from electra_ds.core.files import complete_file
from electra_ds.sweep.options import INPUTS, is_small_file, moved_along, own_content, without_folder
from electra_ds.sweep.records import SUCCEEDED, State, TrialFiles, TrialRecord, make_folder
from electra_ds.sweep.spec import SweepSpec, load_sweep, sweep_yaml
from electra_ds.sweep.trials import Trial, recorded

_LOOKS_AT_MOST_S = 0.5
"""The time for which somebody who only looks whether a sweep is being run may hold its lock."""


class SweepFolder:
    """The folder of one sweep, held by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.start_in = Path.cwd()
        """The folder in which trials are started, as a user would by hand: token stores are made there."""
        self._copied: list[Path] = []

    def make(self) -> None:
        for name in ("runs", "trials"):
            make_folder(self.path / name)

    # --- the sweep itself

    def exists(self) -> bool:
        try:
            return (self.path / "sweep.yaml").is_file()
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be a sweep's folder: {error.strerror}.") from error

    def read(self, overrides: Sequence[str] = ()) -> SweepSpec:
        """Raises CheckpointError if there is no sweep, ConfigError if its file is damaged."""
        if not self.exists():
            raise CheckpointError(f"{self.path} holds no sweep: there is no sweep.yaml in it.")
        return load_sweep(str(self.path / "sweep.yaml"), overrides)

    def write(self, spec: SweepSpec) -> None:
        self.make()
        if not (self.path / "home").exists():
            _write(self.path / "home", f"{self.home}\n")
        _write(self.path / "sweep.yaml", sweep_yaml(spec.with_options(partial(without_folder, self.path))))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the sweep. Raises ConfigError if another process runs it, CheckpointError if it cannot be written."""
        make_folder(self.path)
        try:
            lock = (self.path / ".lock").open("a+")
        except OSError as error:
            raise CheckpointError(f"Cannot write into {self.path}: {error.strerror}.") from error
        with lock:
            if not _locked_within(lock, _LOOKS_AT_MOST_S):
                raise ConfigError(f"The sweep in {self.path} is being run by another process.")
            try:
                yield
            finally:
                if not self.exists():  # it was refused, and there is nothing to resume
                    self._remove_what_is_empty()

    def _remove_what_is_empty(self) -> None:
        for file in (self.path / ".lock", *self._copied):
            with contextlib.suppress(OSError):
                file.unlink()
        for folder in (*{copy.parent for copy in self._copied}, self.path / INPUTS, self.path):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def is_being_run(self) -> bool:
        """Return whether a process of this machine has it locked."""
        try:
            with (self.path / ".lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def ask_to_stop(self) -> None:
        """Let the trials that run save and leave, and no other begin."""
        _write(self.path / "stop", "")

    def wants_to_stop(self) -> bool:
        return (self.path / "stop").exists()

    def forget_stop(self) -> None:
        (self.path / "stop").unlink(missing_ok=True)

    # --- its inputs

    @cached_property
    def home(self) -> Path:
        """The place of the folder when the sweep began; if that was not recorded, where its oldest trial ran."""
        try:
            return Path((self.path / "home").read_text("utf8").rstrip("\n"))
        except OSError:
            words = [word for record in self.records()[:1] for word in record.command]
        given = next((words[place + 1] for place, word in enumerate(words) if word in ("--run-dir", "--resume")), None)
        return self.path if given is None else Path(given).parent.parent

    def now(self, stage: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return a trial's options with its inputs where they are now. Its key depends on where they were, so a sweep
        that was moved together with its inputs is the same sweep."""
        if self.home == self.path:
            return dict(options)
        return {name: moved_along(self.home, self.path, stage, name, value) for name, value in options.items()}

    def with_own_inputs(self, spec: SweepSpec) -> SweepSpec:
        """Return the sweep with copies of its recipes and DeepSpeed JSON files, so that editing or removing them while
        it runs, or before it is resumed, changes nothing. Raises ConfigError if one cannot be read."""
        return spec.with_options(self._owned)

    def _owned(self, stage: str, name: str, value: Any) -> Any:
        if not is_small_file(stage, name, value) or value.startswith(f"{self.path}/{INPUTS}/"):
            return value
        content = own_content(stage, name, value)
        copy = self.path / INPUTS / hashlib.sha256(content).hexdigest()[:12] / Path(value).name
        if not copy.exists():
            make_folder(copy.parent)
            self._copied.append(copy)
            with complete_file(copy) as temporary:
                temporary.write_bytes(content)
        return str(copy)

    # --- its trials

    def trial(self, key: str) -> TrialFiles:
        return TrialFiles(self.path, key)

    def records(self) -> list[TrialRecord]:
        """Return the records of all trials that were ever begun, in the order of their beginning."""
        keys = sorted(path.stem for path in (self.path / "trials").glob("*.json"))
        found = [record for key in keys if (record := self.trial(key).record()) is not None]
        return sorted(found, key=lambda record: record.attempts[0].began)

    def suggested_before(self, spec: SweepSpec) -> list[Trial]:
        """Return the trials that Optuna has suggested so far."""
        return recorded(spec, [record.values for record in self.records()])

    def state_of(self, trial: Trial) -> tuple[State, str]:
        """Return how far a trial is and why, also if it cannot be begun."""
        state, reason = self.trial(trial.key).state()
        if state != "waiting" or trial.pretraining is None:
            return state, reason
        pretraining = self.trial(trial.pretraining.key)
        encoder, _ = pretraining.state()
        ended_at = pretraining.run.status_details().get("step", 0)
        if encoder == "collapsed" and trial.checkpoint is not None and trial.checkpoint > ended_at:
            return "skipped", f"its encoder collapsed before step {trial.checkpoint}"
        return state, "" if encoder in SUCCEEDED else "its encoder is not pretrained"

    def can_begin(self, trial: Trial) -> bool:
        """Return whether the encoder that a trial finetunes is pretrained; True if it needs none."""
        if trial.pretraining is None:
            return True
        return self.trial(trial.pretraining.key).has_succeeded and self.state_of(trial)[0] != "skipped"

    def encoder_of(self, trial: Trial) -> Path:
        """Return what a trial finetunes: a run that was pretrained before it, or one of its checkpoints.

        Raises CheckpointError if that is not there.
        """
        assert trial.pretraining is not None
        run = self.trial(trial.pretraining.key).run
        if trial.checkpoint is None:
            return run.path
        path = run.checkpoints / f"step-{trial.checkpoint:08d}"
        if not path.is_dir():
            raise CheckpointError(f"{run.path} has no checkpoint of step {trial.checkpoint}, which is to be finetuned.")
        return path


def _locked_within(lock: IO[str], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        else:
            return True


def _write(path: Path, text: str) -> None:
    with complete_file(path) as temporary:
        temporary.write_text(text, "utf8")
