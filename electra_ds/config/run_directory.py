"""A run's folder: its lock, the record from which the run can be rebuilt, its status, and its metrics.

    RUN/
      recipe.yaml       the recipe with every value
      deepspeed.json    the resolved DeepSpeed JSON
      run.json          command, versions, hardware, data fingerprint
      status.json       how the run ended: done, stopped, collapsed or failed
      requeue           exists after a signal or the time limit stopped the run, until it is resumed
      checkpoints/      see `training/checkpoint.py`; each has a copy of the record
      generator/        the run that made the frozen generator, if the recipe has one for it

The end of the module finds the inputs of a run that has moved.
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
from electra_ds.config.recipe import Recipe, RecipeT, recipe_yaml, validate_recipe
from electra_ds.config.run_record import Record, RunRecord
from electra_ds.config.sections import Section
from electra_ds.config.values import load_yaml
from electra_ds.core.errors import CheckpointError, ConfigError, DataError, PluginError, did_you_mean
from electra_ds.core.program import command

_PATIENCE_S = 10
_CHECKPOINT = "step-" + 8 * "[0-9]"
_GENERATOR = "generator"
_STATUS, _OLD_STATUS = "status.json", "verdict.json"  # versions before 0.2 wrote the second
_Parsed = TypeVar("_Parsed")
_RecordT = TypeVar("_RecordT", bound=Record, default=RunRecord)
Status = Literal["done", "stopped", "collapsed", "failed"]


class RunDirectory:
    """The folder of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    # --- the lock, which only one process can hold at a time

    @contextmanager
    def locked(self, *, is_new: bool = False) -> Iterator[None]:
        """Lock the folder while the context lasts. is_new: True to start a new run in it.

        Raises CheckpointError if the folder is not writable or another process has locked it, and ConfigError if
        another run was started there before a new one.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a+")
        except OSError as error:
            raise CheckpointError(f"Cannot write into the run directory {self.path}: {error.strerror}.") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = self.owner() or "unknown"
                raise CheckpointError(
                    f"The run directory {self.path} is in use by process {owner}. Wait for that process, or stop it."
                ) from error
            with contextlib.suppress(OSError):  # a full disk has room for the lock, but not for the process number
                os.truncate(lock.fileno(), 0)
                os.write(lock.fileno(), f"{os.getpid()}\n".encode())
            if is_new:
                self.check_free()
            yield

    @property
    def generator(self) -> RunDirectory:
        """The run that makes this one's generator, if its recipe names the generator's."""
        return RunDirectory(self.path / _GENERATOR)

    @property
    def resumed(self) -> Path:
        """The folder to name after --resume: of the run that waits for this generator, if there is one."""
        outer = RunDirectory(self.path.parent)
        return outer.path if self.path.name == _GENERATOR and outer.exists() else self.path

    def lacks(self, what: str) -> CheckpointError:
        """Return the error that the run has no `what` yet. It names the generator for which the run waits, if any."""
        waits = self.generator.exists() and self.generator.status() != "done"
        why = f", because it waits for its generator, whose run is {self.generator.path}" if waits else ""
        return CheckpointError(f"The run {self.path} has no {what} yet{why}.")

    @property
    def title(self) -> str:
        """The folder's name, after that of the run that waits for it if it makes a generator."""
        path = self.path.resolve()
        return path.name if self.resumed == self.path else f"{path.parent.name}-{path.name}"

    def exists(self) -> bool:
        """Return whether a run was started here. Checkpoints also count, if the record is missing."""
        return (self.path / "run.json").is_file() or any(self.checkpoints.glob(_CHECKPOINT))

    def check_free(self) -> None:
        """Raise ConfigError if a run was started here."""
        if self.exists():
            raise ConfigError(f"{self.path} already holds a run. Resume it with --resume, or choose another --run-dir.")

    def owner(self) -> str:
        """Return the id of the process that holds or last held the lock; empty if unknown.

        It also distinguishes the folder from one of the same name on another disk.
        """
        try:
            return (self.path / ".lock").read_text("utf8").strip()
        except OSError:
            return ""

    def check_shared(self, owner: str) -> None:
        """Raise CheckpointError if this rank does not see the main rank's folder. owner: the main rank's `owner()`."""
        deadline = time.monotonic() + _PATIENCE_S
        while owner and self.owner() != owner:
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{platform.node()} does not see the main rank's run directory {self.path.resolve()}. "
                    f"All ranks write checkpoints, so put --run-dir on a file system that all of them share."
                )
            time.sleep(0.1)  # a network file system may show a new file to other machines with a delay

    # --- the files from which a run can be rebuilt; each checkpoint has a copy

    def write_record(self, recipe: Section, plan: DeepSpeedPlan, record: Record) -> None:
        """Write the files. Raises CheckpointError if the folder cannot be written."""
        for name, text in self.record_files(recipe, plan, record).items():
            _write(self.path / name, text)

    @staticmethod
    def record_files(recipe: Section, plan: DeepSpeedPlan, record: Record) -> dict[str, str]:
        """Return the content of the files by name."""
        return {
            "recipe.yaml": recipe_yaml(recipe),
            "deepspeed.json": json.dumps(plan.document, indent=2) + "\n",
            "run.json": replace(record, given_batch=plan.given_batch).to_json(),
        }

    def read_recipe(self, kind: type[RecipeT] = Recipe) -> RecipeT:  # type: ignore[assignment]
        """Return the recipe. This and the methods below raise CheckpointError if no copy of the file can be read."""
        return self._read("recipe.yaml", lambda text: validate_recipe(load_yaml(text, "It"), str(self.path), kind))

    def read_deepspeed_json(self) -> dict[str, Any]:
        """Return the resolved DeepSpeed JSON."""
        return self._read("deepspeed.json", _json_object)

    def read_record(self, kind: type[_RecordT] = RunRecord) -> _RecordT:  # type: ignore[assignment]
        """Return the content of run.json. kind: `Record` reads the fields that all kinds of runs have."""
        return self._read("run.json", lambda text: TypeAdapter(kind).validate_python(_json_object(text)))

    def kind(self) -> str:
        """Return `pretrain` or `finetune`."""
        return self._read("run.json", lambda text: str(_json_object(text).get("kind", "pretrain")))

    def check_kind(self, wanted: Literal["pretrain", "finetune"]) -> None:
        """Raise CheckpointError for a run of the other kind."""
        kind = self.kind()
        if kind != wanted:
            raise CheckpointError(
                f"{self.path} is a run of {command(kind)}, but a run of {command(wanted)} is needed here."
            )

    def check_resumable(self, wanted: Literal["pretrain", "finetune"]) -> None:
        """Raise CheckpointError for a run of the other kind, and for a checkpoint instead of a run's folder."""
        if (self.path / "manifest.json").exists():
            raise CheckpointError(
                f"{self.path} is a checkpoint, but --resume takes the folder of its run: --resume "
                f"{self.path.resolve().parent.parent}"
            )
        self.check_kind(wanted)

    def _read(self, name: str, parse: Callable[[str], _Parsed]) -> _Parsed:
        """Parse a file of the record; if it is missing or damaged, the newest readable copy in a checkpoint."""
        if not self.path.is_dir():
            beside = [path.name for path in self.path.parent.glob("*/")] if self.path.parent.is_dir() else []
            raise CheckpointError(f"There is no folder {self.path}{did_you_mean(self.path.name, beside) or '.'}")
        problem = ""
        for folder in (self.path, *sorted(self.checkpoints.glob(_CHECKPOINT), reverse=True)):
            try:
                return parse((folder / name).read_text("utf8"))
            except FileNotFoundError:
                problem = problem or f"{name} is missing"
            except PluginError:  # no fault of the file
                raise
            except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
                problem = problem or f"{name} is damaged ({error})"
        raise CheckpointError(f"{self.path} is not a usable run directory: {problem}.")

    # --- the run's final status, and the marker that asks for the run to be queued again

    def status(self) -> Status | None:
        """Return the run's final status; None if it has not ended, or if the file cannot be read."""
        status = self.status_details().get("status")
        return status if status in get_args(Status) else None

    def status_details(self) -> dict[str, Any]:
        """Return the status with its step and reason, if known."""
        for name in (_STATUS, _OLD_STATUS):
            with contextlib.suppress(OSError, ValueError):
                details = _json_object((self.path / name).read_text("utf8"))
                return details | {"status": details.pop("verdict")} if "verdict" in details else details
        return {}

    def write_status(self, status: Status, **details: Any) -> None:
        """Write the status. This and the methods below raise CheckpointError if the folder cannot be written."""
        _remove(self.path / "requeue")
        _write(self.path / _STATUS, json.dumps({"status": status} | details, indent=2) + "\n")

    def mark_requeue(self, reason: str) -> None:
        """Mark the run for job scripts, since some launchers do not pass on the exit status."""
        _write(self.path / "requeue", reason + "\n")

    def is_to_be_requeued(self) -> bool:
        return (self.path / "requeue").exists()

    def clear_status(self) -> None:
        """Remove the status and the marker, because the run continues."""
        for name in (_STATUS, _OLD_STATUS, "requeue"):
            _remove(self.path / name)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, "utf8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # a disk that has become read-only
            temporary.unlink(missing_ok=True)
        raise CheckpointError(f"Cannot write {path}: {error.strerror}.") from error


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"Cannot remove {path}: {error.strerror}.") from error


def _json_object(text: str) -> dict[str, Any]:
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    return values


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a metrics.jsonl, since a kill may have truncated the last; none without a file."""
    return metrics_lines(path.read_text("utf8", errors="replace")) if path.exists() else []


def metrics_lines(text: str) -> list[dict[str, Any]]:
    """Return the complete lines of the text of a metrics.jsonl."""
    lines = []
    for line in text.splitlines():
        try:
            values = json.loads(line)
            lines.append(values | {"step": int(values["step"]), "kind": str(values["kind"])})
        except (ValueError, KeyError, TypeError):
            continue
    return lines


def places_of(recorded: str, folder: Path) -> Iterator[Path]:
    """Yield the existing paths to which a file or folder may have moved from the path `recorded`.

    Paths relative to `folder`, which contains the record, come first: if both moved together, a parent of that folder
    contains the last parts of the recorded path. The nearest parent comes first, and for each the longest such path.
    The recorded path itself comes last. The caller must check the content.
    """
    parts = Path(recorded).parts[1:]
    above = dict.fromkeys((*folder.absolute().parents, *folder.resolve().parents))  # before and after following links
    found = (base.joinpath(*parts[start:]) for base in above for start in range(len(parts)))
    for place in dict.fromkeys((*found, Path(recorded))):
        if os.path.exists(place):
            yield place


def read_where_it_is(recorded: str, folder: Path, read: Callable[[Path], _Parsed], missing: str) -> _Parsed:
    """Return the result of `read` for the first path of `places_of` at which it does not raise.

    Raises the error of `read` for the recorded path, or DataError with the message `missing` if nothing is there.
    """
    problem: CheckpointError | DataError = DataError(missing)
    for place in places_of(recorded, folder):
        try:
            return read(place)
        except (CheckpointError, DataError) as error:
            if place == Path(recorded):
                problem = error
    raise problem
