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

from electra_ds.config.run_directory import RunDirectory
from electra_ds.core.errors import CheckpointError, ConfigError
from electra_ds.core.files import complete_file
from electra_ds.sweep.options import (
    INPUTS,
    SCORE,
    is_small_file,
    moved_along,
    own_content,
    with_folder,
    without_folder,
)
from electra_ds.sweep.spec import Resources, SweepSpec
from electra_ds.sweep.sweep_file import load_sweep, sweep_yaml, with_options
from electra_ds.sweep.trials import Trial, suggested
from electra_ds.training.tracking import metrics_lines

State = Literal["done", "collapsed", "stopped", "skipped", "failed", "unfinished", "waiting"]
"""`stopped`: as planned, by stop_at_share or a scheduler. `skipped`: its encoder collapsed before the checkpoint that
it was to finetune. `unfinished`: begun. `waiting`: not begun."""
SUCCEEDED: tuple[State, ...] = ("done", "collapsed", "stopped")
AS_PLANNED: tuple[State, ...] = (*SUCCEEDED, "skipped")
ENDED: tuple[State, ...] = (*AS_PLANNED, "failed")
STOPPED_AT, ENDED_EARLY = "--stop-at", "ended by the scheduler"
"""Reasons for which a stopped run is not resumed."""
ENDED_AT_START = "asked to leave before training began"
"""A reason for which a stopped run is resumed."""
_TAIL_BYTES = 4000


@dataclass(frozen=True)
class Attempt:
    """One start of a trial's processes."""

    began: float
    """Seconds since 1970."""
    seconds: float
    status: int | None
    """The first exit status of a rank that is not 0; -N after signal N; None while it runs."""
    reason: str
    """Why it failed; empty where it did not."""
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
    """One trial in the folder of a sweep, by its key."""

    def __init__(self, sweep: Path, key: str) -> None:
        self.key = key
        self._sweep, self._trials = sweep, sweep / "trials"
        self.run = RunDirectory(sweep / "runs" / key)
        self.log = self._trials / f"{key}.log"
        self._record = self._trials / f"{key}.json"
        self._ended = self._trials / f"{key}.ended"

    # --- the record of its attempts

    def record(self) -> TrialRecord | None:
        """Return the record; None if the trial was not begun, or its file is damaged. An attempt whose end was not
        recorded is taken to have lasted until its last output."""
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
            before = before.with_last(status=-signal.SIGKILL, reason="killed with what had started it")
        attempts = (*(before.attempts if before else ()), Attempt(time.time(), 0.0, None, "", os.uname().nodename))
        given = (resources.workers, resources.cpus, resources.gpus)
        values = _by_option(trial.values, partial(without_folder, self._sweep, trial.stage))
        self._write(TrialRecord(self.key, trial.stage, values, command, *given, attempts))

    def end(self, status: int, reason: str | None = None) -> None:
        """Record how the attempt ended. What other ranks made of the death of one is not the trial's status."""
        if (record := self.record()) is not None:
            seconds = round(time.time() - record.attempts[-1].began, 3)
            why = self._reason(status) if reason is None else reason
            self._write(record.with_last(seconds=seconds, status=status, reason=why))
        if status < 0:
            self.forget_failure()

    def refuse(self, trial: Trial, resources: Resources, why: str) -> None:
        """Record that the trial cannot be begun."""
        self.begin(trial, [], resources)
        self.end(2, why)

    def _reason(self, status: int) -> str:
        """Return the last line that its processes printed, or the signal that killed them."""
        if status == 0:
            return ""
        lines = self.last_lines() if status > 0 else []
        ours = [line for line in lines if line.startswith("electra-ds ")]
        return (ours or lines or [ending(status)])[-1]

    def last_lines(self) -> list[str]:
        """Return the last lines that the trial's processes printed, without empty ones."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                return [line.strip() for line in file.read().decode("utf8", "replace").splitlines() if line.strip()]
        except OSError:
            return []

    # --- its status

    def state(self) -> tuple[State, str]:
        """Return how far the trial is, and why it failed or was ended."""
        record, status, details = self.record(), self.run.status(), self.run.status_details()
        reason = str(details.get("reason", ""))
        if status == "collapsed":
            return status, f"at step {details.get('collapsed_at')}"
        is_by_signal = status == "stopped" and not reason.startswith((STOPPED_AT, ENDED_EARLY))
        if status is not None and not is_by_signal:
            return status, reason
        last = None if record is None else record.attempts[-1]
        if last is not None and last.status is not None and 0 < last.status < 128:  # refused to begin or to resume
            return "failed", last.reason
        return ("unfinished", reason) if self.run.exists() or record is not None else ("waiting", "")

    @property
    def has_ended(self) -> bool:
        return self.state()[0] in ENDED

    @property
    def has_succeeded(self) -> bool:
        return self.state()[0] in SUCCEEDED

    def note_stopped(self, status: int, step: int) -> None:
        """Mark a trial as stopped whose processes were asked to leave before its run could note that itself, such as
        while it starts. It is resumed or started again, like any trial that a signal has stopped."""
        if self.run.status() is None and not 0 < status < 128:  # else it has ended by itself
            make_folder(self.run.path)
            self.run.write_status("stopped", step=step, reason=ENDED_AT_START)

    def give_up(self, why: str) -> None:
        """Let a trial that cannot be finished count as failed, unless it has succeeded."""
        if not self.has_succeeded:
            make_folder(self.run.path)
            self.run.write_status("failed", reason=why)

    def forget_failure(self) -> None:
        """Let a trial resume where it was, if it failed; the time that its attempts took is kept."""
        if self.run.status() == "failed":
            self.run.clear_status()
            with contextlib.suppress(OSError):  # a run has been begun there
                self.run.path.rmdir()

    def end_early(self) -> None:
        """Let the trial save and end, as a scheduler has decided."""
        make_folder(self._trials)
        self._ended.touch()

    @property
    def is_to_end(self) -> bool:
        return self._ended.exists()

    def ended_early(self, step: int) -> bool:
        """Give a trial that a scheduler has ended, and that no longer runs, its status; return whether that is so."""
        if not self.is_to_end or self.has_ended:
            return False
        self.run.write_status("stopped", step=step, reason=ENDED_EARLY)
        return True

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Yield whether no other process works on this trial, and keep it so: a searcher may suggest one twice."""
        with (self._trials / f".{self.key}.lock").open("a") as lock:
            yield _could_lock(lock)


def ending(status: int) -> str:
    """Return how a process with this status ended."""
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


def make_folder(folder: Path) -> None:
    """Make a folder, with those above it. Raises CheckpointError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"Cannot make the folder {folder}: {error.strerror}.") from error


# --- its metrics


class MetricsTail:
    """The lines of a metrics.jsonl, each once, while the file grows. A resumed run replaces the file by a shorter one,
    which is read from its beginning."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = self._read_bytes = 0

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines that are new and complete."""
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
    """Return the numbers of a run's evaluations, each with its step, as far as its metrics.jsonl can be read."""
    return [
        {name: float(value) for name, value in line.items() if type(value) in (int, float) and math.isfinite(value)}
        for line in MetricsTail(metrics).lines()
        if line["kind"] == "eval"
    ]


def as_result(stage: str, line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the evaluation in a line of metrics.jsonl under the names of the results table."""
    numbers = {}
    for name, value in line.items():
        place, _, metric = name.rpartition("/")
        if name not in ("kind", "step"):
            numbers[f"{metric}_mismatched" if place == "dev_mismatched" else metric] = value
    score = {SCORE: next(iter(numbers.values()))} if stage == "finetune" and numbers else {}
    return {"step": line["step"]} | score | numbers


# --- the folder

_LOOKS_AT_MOST_S = 0.5
"""The time for which somebody who only looks whether a sweep is being run may hold its lock."""


class SweepFolder:
    """The folder of one sweep, held by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.start_in = Path.cwd()
        """The folder in which trials are started, as a user would by hand: token stores are made there."""

    def make(self) -> None:
        for name in ("runs", "trials"):
            make_folder(self.path / name)

    # --- the sweep itself

    def exists(self) -> bool:
        return (self.path / "sweep.yaml").is_file()

    def read(self, overrides: Sequence[str] = ()) -> SweepSpec:
        """Raises CheckpointError if there is no sweep, ConfigError if its file is damaged."""
        if not self.exists():
            raise CheckpointError(f"{self.path} holds no sweep: there is no sweep.yaml in it.")
        return load_sweep(str(self.path / "sweep.yaml"), overrides)

    def write(self, spec: SweepSpec) -> None:
        self.make()
        if not (self.path / "home").exists():
            _write(self.path / "home", f"{self.home}\n")
        _write(self.path / "sweep.yaml", sweep_yaml(with_options(spec, partial(without_folder, self.path))))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the sweep. Raises ConfigError if another process runs it, CheckpointError if it cannot be written."""
        make_folder(self.path)
        try:
            lock = (self.path / ".lock").open("a+")
        except OSError as error:
            raise CheckpointError(f"Cannot write into {self.path}: {error.strerror}.") from error
        with lock:
            deadline = time.monotonic() + _LOOKS_AT_MOST_S
            while not _could_lock(lock):
                if time.monotonic() > deadline:
                    raise ConfigError(f"The sweep in {self.path} is being run by another process.")
                time.sleep(0.05)
            yield

    def is_being_run(self) -> bool:
        """Return whether a process of this machine has it locked."""
        if not (self.path / ".lock").exists():
            return False
        try:
            with (self.path / ".lock").open() as lock:
                return not _could_lock(lock, fcntl.LOCK_SH)
        except OSError:  # a file system without locks
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
        """The place of the folder when the sweep began."""
        try:
            return Path((self.path / "home").read_text("utf8").rstrip("\n"))
        except OSError:
            return self.path

    def now(self, stage: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return a trial's options with its inputs where they are now. Its key depends on where they were, so a sweep
        that was moved together with its inputs is the same sweep."""
        if self.home == self.path:
            return dict(options)
        return {name: moved_along(self.home, self.path, stage, name, value) for name, value in options.items()}

    def with_own_inputs(self, spec: SweepSpec) -> SweepSpec:
        """Return the sweep with copies of its recipes and DeepSpeed JSON files, so that editing or removing them while
        it runs, or before it is resumed, changes nothing. Raises ConfigError if one cannot be read."""
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
        found = {}
        for record in self.records() if spec.is_suggested else ():
            with contextlib.suppress(ConfigError):  # the sweep has been changed since
                values = _by_option(record.values, partial(with_folder, self.path, record.stage))
                trial = suggested(spec, values, check=False)
                found[trial.key] = trial
        return list(found.values())

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


def _could_lock(file: IO[str], how: int = fcntl.LOCK_EX) -> bool:
    """Lock a file until it is closed; return whether nobody else holds its lock."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _by_option(values: Mapping[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Return a trial's values, changed; those of its pretraining come after `pretrain.`."""
    return {key: change(key.removeprefix("pretrain."), value) for key, value in values.items()}


def _write(path: Path, text: str) -> None:
    with complete_file(path) as temporary:
        temporary.write_text(text, "utf8")
