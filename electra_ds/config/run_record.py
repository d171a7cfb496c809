"""The content of run.json: a run's settings, hardware and data."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import secrets
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import Field

from electra_ds.config.options import Compile as Compile
from electra_ds.config.options import TaskSource as TaskSource
from electra_ds.config.options import WandbMode

FORMAT = 1
_PACKAGES = ("electra_ds", "torch", "deepspeed", "transformers", "tokenizers", "numpy")
_Count = Annotated[int, Field(gt=0)]


@dataclass(frozen=True)
class Settings:
    """The intervals at which a run logs, evaluates and saves. They affect neither mathematics nor hardware."""

    log_every: _Count
    eval_every: _Count
    save_every: _Count
    keep: _Count
    callback: list[str] = field(default_factory=list, kw_only=True)
    """Names of callbacks, or their `module:Class`."""


@dataclass(frozen=True)
class RunSettings(Settings):
    """The settings of a pretraining."""

    eval_windows: _Count
    compile: Compile = "auto"
    keep_at: list[_Count] = field(default_factory=list)
    """Steps whose checkpoints are retained regardless of `keep`."""
    stop_on_collapse: bool = False
    """True to end the run if training collapses."""


@dataclass(frozen=True)
class FinetuneSettings(Settings):
    """The settings of a finetuning. early_stopping and best select on the development set, so its scores are then no
    longer an unbiased test."""

    predict_test: bool = False
    """True to predict the test sets at the end."""
    early_stopping: _Count | None = None
    """Number of evaluations without a better score after which training ends."""
    best: bool = False
    """True to keep the best evaluation's weights and scores instead of the last one's."""
    discard_weights: bool = False
    """True to remove the checkpoints when the run is done, keeping scores and predictions."""
    max_train_examples: _Count | None = None
    """Maximum number of training examples, which the seed selects."""


@dataclass(frozen=True)
class TrackingSettings:
    """The trackers that receive a run's metrics in addition to metrics.jsonl. Folders are relative to the run's."""

    wandb: WandbMode = "off"
    wandb_id: str = field(default_factory=lambda: secrets.token_hex(4))
    """Generated once, so that a resumed run continues the same wandb run."""
    wandb_project: str = "electra_ds"
    wandb_entity: str | None = None
    wandb_group: str | None = None
    tensorboard: str | None = None
    csv: str | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """The content of run.json that all runs have in common."""

    parameters: dict[str, int]
    """Number of parameters of each part of the model."""
    device: str
    threads: _Count
    world_size: _Count
    settings: Settings
    command: list[str]
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    given_batch: dict[str, int] | None = None
    """`DeepSpeedPlan.given_batch` of the plan that is written with it. Records of earlier versions lack it."""
    threads_given: bool | None = None
    """True if the user gave `threads`; otherwise they are chosen again on another number of ranks or another device.
    None in records of earlier versions, whose threads stay the same."""
    format: int = FORMAT
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    versions: dict[str, str] = field(default_factory=lambda: versions())

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """The content of a pretraining's run.json."""

    store: str
    """Path of the token store."""
    store_fingerprint: str
    settings: RunSettings
    initialised_from: list[str] = field(default_factory=list)
    """Folders or Hub names of the initial weights; empty for random ones."""
    replacements_fingerprint: str | None = None
    """The fingerprint of the recorded replacements that the run reads; None if its objective reads none."""
    kind: Literal["pretrain"] = "pretrain"


@dataclass(frozen=True, kw_only=True)
class FinetuneRecord(Record):
    """The content of a finetuning's run.json."""

    task: str
    source: TaskSource
    data_fingerprint: str
    num_examples: _Count
    """Number of training examples, counting those used in both orders twice; for question answering, of windows."""
    model: str
    """The value of --model."""
    model_fingerprint: str
    """SHA-256 of the encoder's tensors; for random weights, what they are generated from."""
    has_random_weights: bool
    recipe_source: str
    """`shipped`, or the start of a hash of the user's own recipe."""
    changes: list[str]
    """The differences from that recipe: overrides except for the seed, and fewer examples."""
    test_sets: list[str] = field(default_factory=list)
    """The sets that --predict-test predicts. Records of earlier versions lack them."""
    task_kind: str | None = None
    """The value of --task for a kind of task of the user's own, such as token-classification."""
    settings: FinetuneSettings
    kind: Literal["finetune"] = "finetune"

    @property
    def loaded_as(self) -> str | None:
        """The value of --task; None for a classification or regression of the user's own."""
        return self.task_kind or (None if self.source.train is not None else self.task)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect a run."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
