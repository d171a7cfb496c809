"""A sweep's folder, which is the truth about it: what is done is read from the runs, without Ray.

DIR/
  sweep.yaml          the sweep in full
  home                where this folder was when the sweep began: the paths in sweep.yaml are from that time
  inputs/             copies of its recipes and DeepSpeed JSON files, where they are the user's own
  runs/KEY/           each trial's run directory, as bin/pretrain and bin/finetune make it
  trials/KEY.json     what the trial is, and each attempt: when, how long, how it ended
  trials/KEY.log      what its processes said
  trials/KEY.ended    there once a scheduler wishes it to end
  stop                there while the sweep is to save and leave
  results.csv  results.parquet  cells.csv  curves.png
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
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
from electra_ds.sweep.options import INPUTS, is_small_file, moved_along, own_content, with_folder, without_folder
from electra_ds.sweep.spec import SweepSpec, load_sweep, sweep_yaml
from electra_ds.sweep.trials import Trial

State = Literal["done", "collapsed", "stopped", "skipped", "failed", "unfinished", "waiting"]
"""`stopped`: as it was told to, by stop_at_share or a scheduler. `skipped`: its encoder collapsed before the checkpoint
that it was to finetune. `unfinished`: begun. `waiting`: not begun."""
SUCCEEDED: tuple[State, ...] = ("done", "collapsed", "stopped")
AS_PLANNED: tuple[State, ...] = (*SUCCEEDED, "skipped")
ENDED: tuple[State, ...] = (*AS_PLANNED, "failed")
STOPPED_AT, ENDED_EARLY = "--stop-at", "ended by the scheduler"
"""Reasons for which a run that has stopped is not to be resumed."""
ENDED_AT_START = "asked to leave before training began"
"""A reason for which a run that has stopped is to be resumed."""
_TAIL_CHARACTERS = 4000
_LOOKS_AT_MOST_S = 0.5
"""For which somebody who only looks whether a sweep is being run may hold its lock."""


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
    """What trials/KEY.json says."""

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


_RECORD = TypeAdapter(TrialRecord)


class SweepFolder:
    """The folder of one sweep, held by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.start_in = Path.cwd()
        """Where trials are started, as somebody would by hand: token stores are made there."""
        self._copied: list[Path] = []

    def run(self, key: str) -> RunDirectory:
        return RunDirectory(self.path / "runs" / key)

    def log(self, key: str) -> Path:
        return self.path / "trials" / f"{key}.log"

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

    @cached_property
    def home(self) -> Path:
        """The place of the folder when the sweep began; if that was not recorded, the place where its oldest trial
        ran."""
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
        """The sweep with copies of its recipes and DeepSpeed JSON files: what is edited or removed while it runs, or
        before it goes on, changes nothing. Raises ConfigError if one cannot be read."""
        return spec.with_options(self._owned)

    def _owned(self, stage: str, name: str, value: Any) -> Any:
        if not is_small_file(stage, name, value) or value.startswith(f"{self.path}/{INPUTS}/"):
            return value
        content = own_content(stage, name, value)
        copy = self.path / INPUTS / hashlib.sha256(content).hexdigest()[:12] / Path(value).name
        if not copy.exists():
            _make(copy.parent)
            self._copied.append(copy)
            with complete_file(copy) as temporary:
                temporary.write_bytes(content)
        return str(copy)

    def make(self) -> None:
        for name in ("runs", "trials"):
            _make(self.path / name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Raises ConfigError if another process runs this sweep, CheckpointError if it cannot be written."""
        _make(self.path)
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
                if not self.exists():  # it was refused, and there is nothing to go on with
                    self._remove_what_is_empty()

    def _remove_what_is_empty(self) -> None:
        for file in (self.path / ".lock", *self._copied):
            with contextlib.suppress(OSError):
                file.unlink()
        for folder in (*{copy.parent for copy in self._copied}, self.path / INPUTS, self.path):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def ask_to_stop(self) -> None:
        """Let the trials that run save and leave, and no other begin."""
        _write(self.path / "stop", "")

    def is_being_run(self) -> bool:
        """Whether a process of this machine has it locked."""
        try:
            with (self.path / ".lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def wants_to_stop(self) -> bool:
        return (self.path / "stop").exists()

    def forget_stop(self) -> None:
        (self.path / "stop").unlink(missing_ok=True)

    # --- its trials

    def record(self, key: str) -> TrialRecord | None:
        """None where the trial was not begun, or its file is damaged. An attempt whose end nobody has noted took until
        its last words."""
        try:
            record = _RECORD.validate_json((self.path / "trials" / f"{key}.json").read_bytes())
        except (OSError, ValidationError):
            return None
        *before, last = record.attempts
        if last.status is None:
            with contextlib.suppress(OSError):
                last = replace(last, seconds=max(0.0, round(self.log(key).stat().st_mtime - last.began, 3)))
        return replace(record, attempts=(*before, last), values=self._values(record, with_folder))

    def _values(self, record: TrialRecord, change: Callable[[Path, str, str, Any], Any]) -> dict[str, Any]:
        """With the copies that the folder keeps by other names."""
        return {
            key: change(self.path, record.stage, key.removeprefix("pretrain."), value)
            for key, value in record.values.items()
        }

    def records(self) -> list[TrialRecord]:
        """Of every trial that was ever begun, in the order of their beginning."""
        keys = sorted(path.stem for path in (self.path / "trials").glob("*.json"))
        found = [record for key in keys if (record := self.record(key)) is not None]
        return sorted(found, key=lambda record: record.attempts[0].began)

    def begin(self, trial: Trial, command: list[str], spec: SweepSpec) -> None:
        """Note a new attempt."""
        given = spec.resources
        attempt = Attempt(time.time(), 0.0, None, "", os.uname().nodename)
        self._put(
            TrialRecord(
                trial.key, trial.stage, trial.values, command, given.workers, given.cpus, given.gpus,
                (*self._ended_attempts(trial.key), attempt),
            )
        )  # fmt: skip

    def _ended_attempts(self, key: str) -> tuple[Attempt, ...]:
        """Those before."""
        record = self.record(key)
        if record is None:
            return ()
        *before, last = record.attempts
        if last.status is None:
            last = replace(last, status=-signal.SIGKILL, reason="killed with what had started it")
        return (*before, last)

    def end(self, key: str, status: int) -> None:
        """Note how the attempt ended. Where a rank was killed, what others made of it is no status on the trial."""
        self._note(key, status, "" if status == 0 else self._reason(key, status))
        if status < 0:
            self.forget_failure(key)

    def refuse(self, trial: Trial, spec: SweepSpec, why: str) -> None:
        """Note that a trial cannot be begun."""
        self.begin(trial, [], spec)
        self._note(trial.key, 2, why)

    def _note(self, key: str, status: int, reason: str) -> None:
        record = self.record(key)
        if record is not None:
            *before, last = record.attempts
            ended = replace(last, seconds=round(time.time() - last.began, 3), status=status, reason=reason)
            self._put(replace(record, attempts=(*before, ended)))

    def _put(self, record: TrialRecord) -> None:
        record = replace(record, values=self._values(record, without_folder))
        _write(self.path / "trials" / f"{record.key}.json", json.dumps(asdict(record), indent=1, default=str) + "\n")

    def state(self, key: str) -> tuple[State, str]:
        """(how far the trial is, why it failed or was ended)."""
        run, record = self.run(key), self.record(key)
        status, details = run.status(), run.status_details()
        reason = str(details.get("reason", ""))
        if status == "collapsed":
            return status, f"at step {details.get('collapsed_at')}"
        is_by_signal = status == "stopped" and not reason.startswith((STOPPED_AT, ENDED_EARLY))
        if status is not None and not is_by_signal:
            return status, reason
        last = None if record is None else record.attempts[-1]
        if last is not None and last.status is not None and 0 < last.status < 128:  # refused to begin, or to go on
            return "failed", last.reason
        return ("unfinished", reason) if run.exists() or record is not None else ("waiting", "")

    def state_of(self, trial: Trial) -> tuple[State, str]:
        """As `state`, and of a trial that cannot be begun why that is."""
        state, reason = self.state(trial.key)
        if state != "waiting" or trial.pretraining is None:
            return state, reason
        encoder, _ = self.state(trial.pretraining.key)
        ended_at = self.run(trial.pretraining.key).status_details().get("step", 0)
        if encoder == "collapsed" and trial.checkpoint is not None and trial.checkpoint > ended_at:
            return "skipped", f"its encoder collapsed before step {trial.checkpoint}"
        return state, "" if encoder in SUCCEEDED else "its encoder is not pretrained"

    def can_begin(self, trial: Trial) -> bool:
        """Whether what a trial finetunes is pretrained as far as it is to be; True where nothing must be first."""
        if trial.pretraining is None:
            return True
        return self.state(trial.pretraining.key)[0] in SUCCEEDED and self.state_of(trial)[0] != "skipped"

    def encoder_of(self, trial: Trial) -> Path:
        """What a trial finetunes: a run that was pretrained before it, or one of its checkpoints.

        Raises CheckpointError if that is not there.
        """
        assert trial.pretraining is not None
        run = self.run(trial.pretraining.key)
        if trial.checkpoint is None:
            return run.path
        path = run.checkpoints / f"step-{trial.checkpoint:08d}"
        if not path.is_dir():
            raise CheckpointError(f"{run.path} has no checkpoint of step {trial.checkpoint}, which is to be finetuned.")
        return path

    def end_early(self, key: str) -> None:
        """Let a trial save and be done with, as a scheduler wishes."""
        _write(self.path / "trials" / f"{key}.ended", "")

    def is_to_end(self, key: str) -> bool:
        return (self.path / "trials" / f"{key}.ended").exists()

    @contextmanager
    def held(self, key: str) -> Iterator[bool]:
        """Whether this is the only one at a trial, for as long as it lasts: a searcher may suggest one twice."""
        with (self.path / "trials" / f".{key}.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def note_stopped(self, key: str, status: int, step: int) -> None:
        """Mark a trial as stopped whose processes were asked to leave before its run could note that itself, such as
        while it starts. It is resumed or started again, like any trial that a signal has stopped."""
        run = self.run(key)
        if run.status() is not None or 0 < status < 128:  # it has ended by itself
            return
        _make(run.path)
        run.write_status("stopped", step=step, reason=ENDED_AT_START)

    def give_up(self, key: str, why: str) -> None:
        """Let a trial that cannot be finished count as failed, where it has not come to something."""
        run = self.run(key)
        if self.state(key)[0] in SUCCEEDED:
            return
        _make(run.path)
        run.write_status("failed", reason=why)

    def forget_failure(self, key: str) -> None:
        """Let a trial resume where it was, if it failed; what its attempts took is kept."""
        run = self.run(key)
        if run.status() != "failed":
            return
        run.clear_status()
        try:
            if run.path.is_dir() and not any(run.path.iterdir()):
                run.path.rmdir()
        except OSError as error:
            raise CheckpointError(f"Cannot write into {run.path}: {error.strerror}.") from error

    def last_lines(self, key: str) -> list[str]:
        """Return the last lines that a trial's processes printed, without empty ones."""
        try:
            with self.log(key).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_CHARACTERS))
                return [line.strip() for line in file.read().decode("utf8", "replace").splitlines() if line.strip()]
        except OSError:
            return []

    def _reason(self, key: str, status: int) -> str:
        """Return the last line that its processes printed, or the signal that killed them."""
        if status < 0:
            return f"killed by signal {-status}"
        lines = self.last_lines(key)
        told = [line for line in lines if line.startswith("electra-ds ")]
        return (told or lines or [f"exit status {status}"])[-1]


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


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"Cannot make the folder {folder}: {error.strerror}.") from error


def _write(path: Path, text: str) -> None:
    with complete_file(path) as temporary:
        temporary.write_text(text, "utf8")
