"""The files of one trial in a sweep's folder: its record, its status, its log and its metrics. No Ray here."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from electra_ds.config.run_directory import RunDirectory
from electra_ds.core.errors import CheckpointError
from electra_ds.core.files import complete_file
from electra_ds.sweep.options import SCORE, with_folder, without_folder
from electra_ds.sweep.spec import Resources
from electra_ds.sweep.trials import Trial
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
        return self._with_values(record, with_folder)

    def _with_values(self, record: TrialRecord, change: Callable[[Path, str, str, Any], Any]) -> TrialRecord:
        """Name the copies of inputs that the folder keeps with or without the folder's place."""
        values = {
            key: change(self._sweep, record.stage, key.removeprefix("pretrain."), value)
            for key, value in record.values.items()
        }
        return replace(record, values=values)

    def _write(self, record: TrialRecord) -> None:
        text = json.dumps(asdict(self._with_values(record, without_folder)), indent=1, default=str)
        with complete_file(self._record) as temporary:
            temporary.write_text(text + "\n", "utf8")

    def begin(self, trial: Trial, command: list[str], resources: Resources) -> None:
        """Record a new attempt."""
        before = self.record()
        if before is not None and before.attempts[-1].status is None:
            before = before.with_last(status=-signal.SIGKILL, reason="killed with what had started it")
        attempts = (*(before.attempts if before else ()), Attempt(time.time(), 0.0, None, "", os.uname().nodename))
        self._write(
            TrialRecord(
                self.key,
                trial.stage,
                trial.values,
                command,
                resources.workers,
                resources.cpus,
                resources.gpus,
                attempts,
            )
        )

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
        if status < 0:
            return f"killed by signal {-status}"
        lines = self.last_lines()
        ours = [line for line in lines if line.startswith("electra-ds ")]
        return (ours or lines or [f"exit status {status}"])[-1]

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
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


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


def as_result(stage: str, line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the evaluation in a line of metrics.jsonl under the names of the results table."""
    numbers = {}
    for name, value in line.items():
        place, _, metric = name.rpartition("/")
        if name not in ("kind", "step"):
            numbers[f"{metric}_mismatched" if place == "dev_mismatched" else metric] = value
    score = {SCORE: next(iter(numbers.values()))} if stage == "finetune" and numbers else {}
    return {"step": line["step"]} | score | numbers
