"""The record of a run: what it needs to be rebuilt from itself, on disk before step 1.

RUN/
  recipe.yaml       the recipe, every value in full
  deepspeed.json    the DeepSpeed JSON, resolved
  run.json          command, versions, hardware, data fingerprint
  verdict.json      how it ended: done, stopped, collapsed or failed
  requeue           there while a signal or the time limit has stopped the run: it is to be resumed
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, TypeAdapter
from typing_extensions import TypeVar

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.recipe import Recipe, RecipeT, Section, load_yaml, recipe_yaml, validate_recipe
from electra_ds.core.errors import CheckpointError, ConfigError
from electra_ds.core.program import command

FORMAT = 1
_PATIENCE_S = 10
_CHECKPOINT = "step-" + 8 * "[0-9]"
_PACKAGES = ("electra_ds", "torch", "deepspeed", "transformers", "tokenizers", "numpy")
_Parsed = TypeVar("_Parsed")
_RecordT = TypeVar("_RecordT", bound="Record", default="RunRecord")
_Count = Annotated[int, Field(gt=0)]
Verdict = Literal["done", "stopped", "collapsed", "failed"]
WandbMode = Literal["off", "online", "offline"]
Compile = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Settings:
    """How often a run reports and saves: neither mathematics nor hardware."""

    log_every: _Count
    eval_every: _Count
    save_every: _Count
    keep: _Count


@dataclass(frozen=True)
class RunSettings(Settings):
    """Of a pretraining."""

    eval_windows: _Count
    compile: Compile = "auto"
    keep_at: list[_Count] = field(default_factory=list)
    """Steps whose checkpoints stay, whatever `keep` says."""
    stop_on_collapse: bool = False
    """Whether the run ends where its discriminator has collapsed (pretraining/collapse.py)."""


@dataclass(frozen=True)
class FinetuneSettings(Settings):
    """Of a finetuning. early_stopping and best choose by the development set, whose scores are no test then."""

    predict_test: bool = False
    """Whether the test sets are predicted at the end."""
    early_stopping: _Count | None = None
    """Evaluations without a better score after which training ends."""
    best: bool = False
    """Whether the best evaluation's weights and scores are kept, in place of the last one's."""
    discard_weights: bool = False
    """Whether the checkpoints go once the run is done: scores and predictions stay."""
    max_train_examples: _Count | None = None
    """Train on so many examples, which the seed chooses."""


@dataclass(frozen=True)
class TrackingSettings:
    """Where a run's numbers go besides metrics.jsonl. Folders are relative to the run's, None for none."""

    wandb: WandbMode = "off"
    wandb_id: str = field(default_factory=lambda: secrets.token_hex(4))
    """Made once: whatever resumes the run continues the same run at wandb."""
    wandb_project: str = "electra_ds"
    wandb_entity: str | None = None
    wandb_group: str | None = None
    tensorboard: str | None = None
    csv: str | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """What run.json says of any run."""

    parameters: dict[str, int]
    """Sizes of the model's parts."""
    device: str
    threads: _Count
    world_size: _Count
    settings: Settings
    command: list[str]
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    given_batch: dict[str, int] | None = None
    """`DeepSpeedPlan.given_batch` of the plan that is written with it. Records of earlier versions have none."""
    threads_given: bool | None = None
    """Whether the user gave `threads`, which are else chosen again on other ranks or another device. Those of earlier
    versions do not say, and theirs stay."""
    format: int = FORMAT
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    versions: dict[str, str] = field(default_factory=lambda: versions())

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """Of a pretraining."""

    store: str
    """Path of the token store."""
    store_fingerprint: str
    settings: RunSettings
    initialised_from: list[str] = field(default_factory=list)
    """Folders or Hub names whose weights the run began with; empty for random ones."""
    kind: Literal["pretrain"] = "pretrain"


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """Where a task's examples come from: one of the three."""

    folder: str | None = None
    """Of official files."""
    hub: str | None = None
    """A dataset's name on the Hub."""
    revision: str | None = None
    """Its commit, branch or tag."""
    train: str | None = None
    """The user's own files, and below what their columns are called."""
    dev: str | None = None
    test: str | None = None
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    label_kind: Literal["auto", "classification", "regression"] = "auto"


@dataclass(frozen=True, kw_only=True)
class FinetuneRecord(Record):
    """Of a finetuning."""

    task: str
    source: TaskSource
    data_fingerprint: str
    num_examples: _Count
    """Training examples, those in both orders counted twice; windows, of question answering."""
    model: str
    """What --model named."""
    model_fingerprint: str
    """SHA-256 of the encoder's tensors; of random ones, what it is random from."""
    has_random_weights: bool
    recipe_source: str
    """`shipped`, or of a file of the user's own what tells it from others of its name."""
    changes: list[str]
    """What is otherwise than in that recipe: overrides but for the seed, and fewer examples."""
    settings: FinetuneSettings
    kind: Literal["finetune"] = "finetune"


def versions() -> dict[str, str]:
    """Python's and the decisive packages' versions."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


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

    def verdict(self) -> Verdict | None:
        """How the run ended, None while it has not, or where the file cannot be read."""
        verdict = self.verdict_details().get("verdict")
        return verdict if verdict in get_args(Verdict) else None

    def verdict_details(self) -> dict[str, Any]:
        """The verdict with its step and its reason, as far as they are told."""
        try:
            return _json_object((self.path / "verdict.json").read_text("utf8"))
        except (OSError, ValueError):
            return {}

    def write_verdict(self, verdict: Verdict, **details: Any) -> None:
        """Raises CheckpointError if the folder cannot be written, as do those below."""
        self._remove("requeue")
        self._write("verdict.json", json.dumps({"verdict": verdict} | details, indent=2) + "\n")

    def mark_requeue(self, reason: str) -> None:
        """For job scripts under launchers that swallow the exit status."""
        self._write("requeue", reason + "\n")

    def clear_verdict(self) -> None:
        for name in ("verdict.json", "requeue"):
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
