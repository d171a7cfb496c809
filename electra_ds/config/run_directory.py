"""A run's folder: who holds it, the record it can be rebuilt from, and how the run ended.

RUN/
  recipe.yaml       the recipe, every value in full
  deepspeed.json    the DeepSpeed JSON, resolved
  run.json          command, versions, hardware, data fingerprint
  status.json       how it ended: done, stopped, collapsed or failed
  requeue           there while a signal or the time limit has stopped the run: it is to be resumed
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import TypeAdapter
from typing_extensions import TypeVar

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.recipe import Recipe, RecipeT, Section, load_yaml, recipe_yaml, validate_recipe
from electra_ds.config.run_record import Record, RunRecord
from electra_ds.core.errors import CheckpointError, ConfigError
from electra_ds.core.program import command

_PATIENCE_S = 10
_CHECKPOINT = "step-" + 8 * "[0-9]"
_STATUS, _OLD_STATUS = "status.json", "verdict.json"  # versions before 0.2 wrote the second
_Parsed = TypeVar("_Parsed")
_RecordT = TypeVar("_RecordT", bound=Record, default=RunRecord)
Status = Literal["done", "stopped", "collapsed", "failed"]


class RunDirectory:
    """A run's folder, held by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @contextmanager
    def locked(self, *, is_new: bool = False) -> Iterator[None]:
        """Hold the folder. Raises CheckpointError if it cannot be written or another process holds it, and
        ConfigError if a new run is to begin in it and another one has by now."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a+")
        except OSError as error:
            raise CheckpointError(f"Cannot write into the run directory {self.path}: {error.strerror}.") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = self._owner() or "unknown"
                raise CheckpointError(
                    f"The run directory {self.path} is in use by process {owner}. Wait for it, or stop it."
                ) from error
            with contextlib.suppress(OSError):  # a full disk has room for the lock, if not for our name in it
                os.truncate(lock.fileno(), 0)
                os.write(lock.fileno(), f"{os.getpid()}\n".encode())
            if is_new:
                self.check_free()
            yield

    def check_free(self) -> None:
        """Raises ConfigError if a run is there already."""
        if self.exists():
            raise ConfigError(f"{self.path} already holds a run. Resume it with --resume, or choose another --run-dir.")

    def mark(self) -> tuple[int, str]:
        """What tells this folder from one of the same name on another disk: the lock's inode, and who wrote into it."""
        try:
            return (self.path / ".lock").stat().st_ino, self._owner()
        except OSError:
            return 0, ""

    def check_shared(self, mark: tuple[int, str]) -> None:
        """Raises CheckpointError if this rank does not see the folder that the main rank holds, whose mark it is."""
        deadline = time.monotonic() + _PATIENCE_S
        while not (same := self._is_same(mark)) and time.monotonic() < deadline:
            time.sleep(0.1)  # file systems of several machines tell news late
        if not same:
            raise CheckpointError(
                f"The main rank's run directory {self.path.resolve()} is not what {platform.node()} sees there. "
                f"Checkpoints are written by all ranks, so put --run-dir on a file system that all of them share."
            )

    def _is_same(self, mark: tuple[int, str]) -> bool:
        inode, owner = self.mark()  # some file systems number a file differently on each machine; full ones name nobody
        return inode == mark[0] or (owner != "" and owner == mark[1])

    def _owner(self) -> str:
        try:
            return (self.path / ".lock").read_text("utf8").strip()
        except OSError:
            return ""

    def exists(self) -> bool:
        """Whether a run was started here; its checkpoints are one, whatever became of its record."""
        return (self.path / "run.json").is_file() or any(self.checkpoints.glob(_CHECKPOINT))

    def write_record(self, recipe: Section, plan: DeepSpeedPlan, record: Record) -> None:
        """Raises CheckpointError if the folder cannot be written."""
        for name, text in self.record_files(recipe, plan, record).items():
            self._write(name, text)

    @staticmethod
    def record_files(recipe: Section, plan: DeepSpeedPlan, record: Record) -> dict[str, str]:
        """The record's files by name, which travel in each checkpoint too."""
        return {
            "recipe.yaml": recipe_yaml(recipe),
            "deepspeed.json": json.dumps(plan.document, indent=2) + "\n",
            "run.json": replace(record, given_batch=plan.given_batch).to_json(),
        }

    def kind(self) -> str:
        """`pretrain` or `finetune`. Raises CheckpointError if there is no run, as do those below."""
        return self._read("run.json", lambda text: str(_json_object(text).get("kind", "pretrain")))

    def check_kind(self, wanted: Literal["pretrain", "finetune"]) -> None:
        """Raises CheckpointError for a run of the other kind."""
        kind = self.kind()
        if kind != wanted:
            raise CheckpointError(
                f"{self.path} was made by {command(kind)}, but a run of {command(wanted)} is needed here."
            )

    def check_resumable(self, wanted: Literal["pretrain", "finetune"]) -> None:
        """The same, and for a checkpoint, in which a run would begin anew."""
        if (self.path / "manifest.json").exists():
            raise CheckpointError(
                f"{self.path} is a checkpoint, and --resume takes the run that it is of: --resume "
                f"{self.path.resolve().parent.parent}"
            )
        self.check_kind(wanted)

    def read_recipe(self, kind: type[RecipeT] = Recipe) -> RecipeT:  # type: ignore[assignment]
        return self._read("recipe.yaml", lambda text: validate_recipe(load_yaml(text, "It"), str(self.path), kind))

    def read_deepspeed_json(self) -> dict[str, Any]:
        return self._read("deepspeed.json", _json_object)

    def read_record(self, kind: type[_RecordT] = RunRecord) -> _RecordT:  # type: ignore[assignment]
        """kind: `Record` reads what any run's says."""
        return self._read("run.json", lambda text: TypeAdapter(kind).validate_python(_json_object(text)))

    def status(self) -> Status | None:
        """Return how the run ended; None while it has not, or if the file cannot be read."""
        status = self.status_details().get("status")
        return status if status in get_args(Status) else None

    def status_details(self) -> dict[str, Any]:
        """Return the status with its step and its reason, as far as they are known."""
        for name in (_STATUS, _OLD_STATUS):
            with contextlib.suppress(OSError, ValueError):
                details = _json_object((self.path / name).read_text("utf8"))
                return details | {"status": details.pop("verdict")} if "verdict" in details else details
        return {}

    def write_status(self, status: Status, **details: Any) -> None:
        """Raises CheckpointError if the folder cannot be written, as do those below."""
        self._remove("requeue")
        self._write(_STATUS, json.dumps({"status": status} | details, indent=2) + "\n")

    def mark_requeue(self, reason: str) -> None:
        """For job scripts under launchers that swallow the exit status."""
        self._write("requeue", reason + "\n")

    def clear_status(self) -> None:
        for name in (_STATUS, _OLD_STATUS, "requeue"):
            self._remove(name)

    def _read(self, name: str, parse: Callable[[str], _Parsed]) -> _Parsed:
        """A file of the record, or where it is damaged, the copy that travels in the newest checkpoint."""
        problem = ""
        for folder in (self.path, *sorted(self.checkpoints.glob(_CHECKPOINT), reverse=True)):
            try:
                return parse((folder / name).read_text("utf8"))
            except FileNotFoundError:
                problem = problem or f"{name} is missing"
            except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
                problem = problem or f"{name} is damaged ({error})"
        raise CheckpointError(f"{self.path} is not a run directory that can be used: {problem}.")

    def _write(self, name: str, text: str) -> None:
        temporary = self.path / f".{name}.tmp"
        try:
            temporary.write_text(text, "utf8")
            temporary.replace(self.path / name)
        except OSError as error:
            with contextlib.suppress(OSError):  # a disk that has become read-only
                temporary.unlink(missing_ok=True)
            raise CheckpointError(f"Cannot write {self.path / name}: {error.strerror}.") from error

    def _remove(self, name: str) -> None:
        try:
            (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"Cannot remove {self.path / name}: {error.strerror}.") from error


def _json_object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    return values
