"""A sweep's folder, its only record: the state of every trial is read from the runs, without Ray.

DIR/
  sweep.yaml          the full sweep
  home                this folder's place when the sweep began; the paths in sweep.yaml date from then
  inputs/             copies of the user's own recipes and DeepSpeed JSON files
  runs/KEY/           each trial's run directory, as bin/pretrain and bin/finetune make it
  trials/KEY.json     the trial's command, and each attempt: when, how long, how it ended
  trials/KEY.log      the output of its processes
  trials/KEY.ended    exists once a scheduler has decided to end it
  stop                exists while the sweep is asked to save and stop
  results.csv  results.parquet  cells.csv  curves.png
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from electra_ds.config.run_directory import RunDirectory, metrics_lines
from electra_ds.core.errors import CheckpointError, ConfigError
from electra_ds.core.files import complete_file
from electra_ds.sweep.options import (
    INPUTS,
    SCORE,
    absolute_path,
    is_small_file,
    moved_path,
    own_content,
    relative_path,
)
from electra_ds.sweep.spec import Resources, SweepSpec
from electra_ds.sweep.sweep_file import load_sweep, sweep_yaml, with_options
from electra_ds.sweep.trials import Trial, suggested

State = Literal["done", "collapsed", "stopped", "skipped", "failed", "unfinished", "waiting"]
"""The states of a trial.

`stopped`: as planned, by stop_at_share or a scheduler. `skipped`: its encoder collapsed before the checkpoint to
finetune. `unfinished`: started. `waiting`: not started.
"""
SUCCEEDED: tuple[State, ...] = ("done", "collapsed", "stopped")
AS_PLANNED: tuple[State, ...] = (*SUCCEEDED, "skipped")
ENDED: tuple[State, ...] = (*AS_PLANNED, "failed")
STOPPED_AT, ENDED_EARLY = "--stop-at", "ended by the scheduler"
"""Reasons why a stopped run is not resumed."""
ENDED_AT_START = "asked to leave before training began"
"""A reason why a stopped run is resumed."""
_TAIL_BYTES = 4000


@dataclass(frozen=True)
class Attempt:
    """One start of a trial's processes."""

    began: float
    """Seconds since 1970."""
    seconds: float
    status: int | None
    """The first nonzero exit status of a rank; -N after signal N; None while it runs."""
    reason: str
    """The reason of a failure, else empty."""
    host: str


@dataclass(frozen=True)
class TrialRecord:
    """The content of trials/KEY.json."""

    key: str
    stage: str
    values: dict[str, Any]
    command: list[str]
    workers: int
    cpus: int
    gpus: float
    attempts: Annotated[tuple[Attempt, ...], Field(min_length=1)]

    @property
    def seconds(self) -> float:
        return sum(attempt.seconds for attempt in self.attempts)

    def with_last(self, **changes: Any) -> TrialRecord:
        """Return the record with its last attempt changed."""
        *before, last = self.attempts
        return replace(self, attempts=(*before, replace(last, **changes)))


_RECORD = TypeAdapter(TrialRecord)


class TrialFiles:
    """The files of one trial in a sweep's folder."""

    def __init__(self, sweep: Path, key: str) -> None:
        self.key = key
        self._sweep, self._trials = sweep, sweep / "trials"
        self.run = RunDirectory(sweep / "runs" / key)
        self.log = self._trials / f"{key}.log"
        self._record = self._trials / f"{key}.json"
        self._ended = self._trials / f"{key}.ended"

    # --- the record of its attempts

    def record(self) -> TrialRecord | None:
        """Return the record, or None if the trial has not started or its file is damaged.

        An attempt without a recorded end is assumed to have lasted until its last output.
        """
        try:
            record = _RECORD.validate_json(self._record.read_bytes())
        except (OSError, ValidationError):
            return None
        last = record.attempts[-1]
        if last.status is None:
            with contextlib.suppress(OSError):
                record = record.with_last(seconds=max(0.0, round(self.log.stat().st_mtime - last.began, 3)))
        return record

    def _write(self, record: TrialRecord) -> None:
        _write(self._record, json.dumps(asdict(record), indent=1, default=str) + "\n")

    def begin(self, trial: Trial, command: list[str], resources: Resources) -> None:
        """Record a new attempt."""
        before = self.record()
        if before is not None and before.attempts[-1].status is None:
            before = before.with_last(status=-signal.SIGKILL, reason="killed together with the process that started it")
        attempts = (*(before.attempts if before else ()), Attempt(time.time(), 0.0, None, "", os.uname().nodename))
        given = (resources.workers, resources.cpus, resources.gpus)
        values = _by_option(trial.values, partial(relative_path, self._sweep, trial.stage))
        self._write(TrialRecord(self.key, trial.stage, values, command, *given, attempts))

    def end(self, status: int, reason: str | None = None) -> None:
        """Record how the attempt ended. status: the trial's, not that of ranks which failed because another died."""
        if (record := self.record()) is not None:
            seconds = round(time.time() - record.attempts[-1].began, 3)
            why = self._reason(status) if reason is None else reason
            self._write(record.with_last(seconds=seconds, status=status, reason=why))
        if status < 0:
            self.clear_failure()

    def refuse(self, trial: Trial, resources: Resources, why: str) -> None:
        """Record that the trial cannot start."""
        self.begin(trial, [], resources)
        self.end(2, why)

    def _reason(self, status: int) -> str:
        """Return the last line of the output, or the signal that killed the processes."""
        if status == 0:
            return ""
        lines = self.last_lines() if status > 0 else []
        ours = [line for line in lines if line.startswith("electra-ds ")]
        return (ours or lines or [ending(status)])[-1]

    def last_lines(self) -> list[str]:
        """Return the last non-empty lines of the trial's output."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                return [line.strip() for line in file.read().decode("utf8", "replace").splitlines() if line.strip()]
        except OSError:
            return []

    # --- its status

    def state(self) -> tuple[State, str]:
        """Return the trial's state, and the reason if it failed or was ended."""
        record, status, details = self.record(), self.run.status(), self.run.status_details()
        reason = str(details.get("reason", ""))
        if status == "collapsed":
            return status, f"at step {details.get('collapsed_at')}"
        is_by_signal = status == "stopped" and not reason.startswith((STOPPED_AT, ENDED_EARLY))
        if status is not None and not is_by_signal:
            return status, reason
        last = None if record is None else record.attempts[-1]
        if last is not None and last.status is not None and 0 < last.status < 128:  # it refused to start or resume
            return "failed", last.reason
        return ("unfinished", reason) if self.run.exists() or record is not None else ("waiting", "")

    @property
    def has_ended(self) -> bool:
        return self.state()[0] in ENDED

    @property
    def has_succeeded(self) -> bool:
        return self.state()[0] in SUCCEEDED

    def note_stopped(self, status: int, step: int) -> None:
        """Mark a trial as stopped if its run could not do so itself, for example because it was still starting.

        The trial is resumed or started again, like any trial that a signal has stopped.
        """
        if self.run.status() is None and not 0 < status < 128:  # else it ended by itself
            make_folder(self.run.path)
            self.run.write_status("stopped", step=step, reason=ENDED_AT_START)

    def give_up(self, why: str) -> None:
        """Mark a trial that cannot be finished as failed, unless it has succeeded."""
        if not self.has_succeeded:
            make_folder(self.run.path)
            self.run.write_status("failed", reason=why)

    def clear_failure(self) -> None:
        """Make a failed trial resumable where it stopped. The time of its attempts is kept."""
        if self.run.status() == "failed":
            self.run.clear_status()
            with contextlib.suppress(OSError):  # a run exists there
                self.run.path.rmdir()

    def end_early(self) -> None:
        """Ask the trial to save and end, as a scheduler has decided."""
        make_folder(self._trials)
        self._ended.touch()

    @property
    def is_asked_to_stop(self) -> bool:
        return self._ended.exists()

    def ended_early(self, step: int) -> bool:
        """Set the status of a trial that a scheduler has ended and that no longer runs; return True if it is one."""
        if not self.is_asked_to_stop or self.has_ended:
            return False
        self.run.write_status("stopped", step=step, reason=ENDED_EARLY)
        return True

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Hold the trial's lock; yield False if another process has it, since a searcher may suggest a trial twice."""
        with (self._trials / f".{self.key}.lock").open("a") as lock:
            yield _try_lock(lock)


def ending(status: int) -> str:
    """Return how a process with this status ended."""
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


def make_folder(folder: Path) -> None:
    """Make a folder and its parents. Raises CheckpointError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"Cannot make the folder {folder}: {error.strerror}.") from error


# --- a trial's metrics


class MetricsTail:
    """Reads each line of a growing metrics.jsonl once.

    A resumed run replaces the file by a shorter one, which is read from its beginning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = self._read_bytes = 0

    def lines(self) -> list[dict[str, Any]]:
        """Return the new, complete lines."""
        try:
            with self._path.open("rb") as file:
                if (inode := os.fstat(file.fileno()).st_ino) != self._inode:
                    self._inode, self._read_bytes = inode, 0
                file.seek(self._read_bytes)
                text = file.read()
        except OSError:
            return []
        complete = text[: text.rfind(b"\n") + 1]
        self._read_bytes += len(complete)
        return metrics_lines(complete.decode("utf8", "replace"))


def evaluations_of(metrics: Path) -> list[dict[str, float]]:
    """Return the numbers of each evaluation of a run, with its step, as far as metrics.jsonl can be read."""
    return [
        {name: float(value) for name, value in line.items() if type(value) in (int, float) and math.isfinite(value)}
        for line in MetricsTail(metrics).lines()
        if line["kind"] == "eval"
    ]


def as_result(stage: str, line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the evaluation in a line of metrics.jsonl, under the names of the results table."""
    numbers = {}
    for name, value in line.items():
        place, _, metric = name.rpartition("/")
        if name not in ("kind", "step"):
            numbers[f"{metric}_mismatched" if place == "dev_mismatched" else metric] = value
    score = {SCORE: next(iter(numbers.values()))} if stage == "finetune" and numbers else {}
    return {"step": line["step"]} | score | numbers


# --- the folder

_LOOKS_AT_MOST_S = 0.5
"""The time for which a process that only checks whether a sweep is running may hold its lock."""


class SweepFolder:
    """The folder of one sweep, which one process holds at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.start_in = Path.cwd()
        """The working directory of trials, as if a user had started them. Token stores are made there."""

    def make(self) -> None:
        for name in ("runs", "trials"):
            make_folder(self.path / name)

    # --- the sweep itself

    def exists(self) -> bool:
        return (self.path / "sweep.yaml").is_file()

    def read(self, overrides: Sequence[str] = ()) -> SweepSpec:
        """Return the sweep. Raises CheckpointError if there is none, and ConfigError if its file is damaged."""
        if not self.exists():
            raise CheckpointError(f"{self.path} holds no sweep: it has no sweep.yaml.")
        return load_sweep(str(self.path / "sweep.yaml"), overrides)

    def write(self, spec: SweepSpec) -> None:
        self.make()
        if not (self.path / "home").exists():
            _write(self.path / "home", f"{self.home}\n")
        _write(self.path / "sweep.yaml", sweep_yaml(with_options(spec, partial(relative_path, self.path))))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the sweep. Raises ConfigError if another process runs it, CheckpointError if it cannot be written."""
        make_folder(self.path)
        try:
            lock = (self.path / ".lock").open("a+")
        except OSError as error:
            raise CheckpointError(f"Cannot write into {self.path}: {error.strerror}.") from error
        with lock:
            deadline = time.monotonic() + _LOOKS_AT_MOST_S
            while not _try_lock(lock):
                if time.monotonic() > deadline:
                    raise ConfigError(f"The sweep in {self.path} is being run by another process.")
                time.sleep(0.05)
            yield

    def is_being_run(self) -> bool:
        """Return True if a process on this machine has locked it."""
        if not (self.path / ".lock").exists():
            return False
        try:
            with (self.path / ".lock").open() as lock:
                return not _try_lock(lock, fcntl.LOCK_SH)
        except OSError:  # a file system without locks
            return False

    def ask_to_stop(self) -> None:
        """Ask running trials to save and stop, and let no other start."""
        _write(self.path / "stop", "")

    def wants_to_stop(self) -> bool:
        return (self.path / "stop").exists()

    def clear_stop(self) -> None:
        (self.path / "stop").unlink(missing_ok=True)

    # --- the sweep's inputs

    @cached_property
    def home(self) -> Path:
        """The folder's place when the sweep began."""
        try:
            return Path((self.path / "home").read_text("utf8").rstrip("\n"))
        except OSError:
            return self.path

    def relocated(self, stage: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return a trial's options with the current places of its inputs.

        Its key depends on their original places, so a sweep that is moved together with its inputs stays the same.
        """
        if self.home == self.path:
            return dict(options)
        return {name: moved_path(self.home, self.path, stage, name, value) for name, value in options.items()}

    def with_own_inputs(self, spec: SweepSpec) -> SweepSpec:
        """Return the sweep with copies of its recipes and DeepSpeed JSON files. Raises ConfigError if that fails.

        Editing or removing the originals, while it runs or before it is resumed, then changes nothing.
        """
        return with_options(spec, self._owned)

    def _owned(self, stage: str, name: str, value: Any) -> Any:
        if not is_small_file(stage, name, value) or value.startswith(f"{self.path}/{INPUTS}/"):
            return value
        content = own_content(stage, name, value)
        copy = self.path / INPUTS / hashlib.sha256(content).hexdigest()[:12] / Path(value).name
        if not copy.exists():
            make_folder(copy.parent)
            with complete_file(copy) as temporary:
                temporary.write_bytes(content)
        return str(copy)

    # --- the sweep's trials

    def trial(self, key: str) -> TrialFiles:
        return TrialFiles(self.path, key)

    def records(self) -> list[TrialRecord]:
        """Return the records of all trials that were ever started, in the order of their start."""
        keys = sorted(path.stem for path in (self.path / "trials").glob("*.json"))
        found = [record for key in keys if (record := self.trial(key).record()) is not None]
        return sorted(found, key=lambda record: record.attempts[0].began)

    def suggested_before(self, spec: SweepSpec) -> list[Trial]:
        """Return the trials that Optuna has suggested so far."""
        found = {}
        for record in self.records() if spec.is_suggested else ():
            with contextlib.suppress(ConfigError):  # the sweep has changed since
                values = _by_option(record.values, partial(absolute_path, self.path, record.stage))
                trial = suggested(spec, values, check=False)
                found[trial.key] = trial
        return list(found.values())

    def state_of(self, trial: Trial) -> tuple[State, str]:
        """Return a trial's state and the reason, even if it cannot start."""
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
        """Return True if the encoder that a trial finetunes is ready, or if it needs none."""
        if trial.pretraining is None:
            return True
        return self.trial(trial.pretraining.key).has_succeeded and self.state_of(trial)[0] != "skipped"

    def encoder_of(self, trial: Trial) -> Path:
        """Return what a trial finetunes: a pretraining of the sweep, or one of its checkpoints.

        Raises CheckpointError if it does not exist.
        """
        assert trial.pretraining is not None
        run = self.trial(trial.pretraining.key).run
        if trial.checkpoint is None:
            return run.path
        path = run.checkpoints / f"step-{trial.checkpoint:08d}"
        if not path.is_dir():
            raise CheckpointError(f"{run.path} has no checkpoint of step {trial.checkpoint} to finetune.")
        return path


def _try_lock(file: IO[str], how: int = fcntl.LOCK_EX) -> bool:
    """Try to lock a file until it is closed. Return False if another process holds the lock."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _by_option(values: Mapping[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Return a trial's values after `change`. Those of its pretraining have the prefix `pretrain.`."""
    return {key: change(key.removeprefix("pretrain."), value) for key, value in values.items()}


def _write(path: Path, text: str) -> None:
    with complete_file(path) as temporary:
        temporary.write_text(text, "utf8")
