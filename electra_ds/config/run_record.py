"""The content of run.json: the settings, the hardware and the data of a run."""

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
    """The intervals at which a run reports and saves: neither mathematics nor hardware."""

    log_every: _Count
    eval_every: _Count
    save_every: _Count
    keep: _Count


@dataclass(frozen=True)
class RunSettings(Settings):
    """The settings of a pretraining."""

    eval_windows: _Count
    compile: Compile = "auto"
    keep_at: list[_Count] = field(default_factory=list)
    """Steps whose checkpoints stay, whatever `keep` says."""
    stop_on_collapse: bool = False
    """True if the run ends where its discriminator has collapsed (pretraining/objectives/electra_evaluation.py)."""


@dataclass(frozen=True)
class FinetuneSettings(Settings):
    """The settings of a finetuning. early_stopping and best choose by the development set, whose scores are then no
    test."""

    predict_test: bool = False
    """True if the test sets are predicted at the end."""
    early_stopping: _Count | None = None
    """Evaluations without a better score after which training ends."""
    best: bool = False
    """True if the best evaluation's weights and scores are kept, in place of the last one's."""
    discard_weights: bool = False
    """True if the checkpoints are removed once the run is done: scores and predictions stay."""
    max_train_examples: _Count | None = None
    """Train on so many examples, which the seed chooses."""


@dataclass(frozen=True)
class TrackingSettings:
    """The places that a run's numbers go to besides metrics.jsonl. Folders are relative to the run's, None for none."""

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
    """The content of run.json that any run has."""

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
    """True if the user gave `threads`, which are else chosen again on other ranks or another device. Records of earlier
    versions do not say, and theirs stay."""
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
    """Folders or Hub names whose weights the run began with; empty for random ones."""
    kind: Literal["pretrain"] = "pretrain"


@dataclass(frozen=True, kw_only=True)
class FinetuneRecord(Record):
    """The content of a finetuning's run.json."""

    task: str
    source: TaskSource
    data_fingerprint: str
    num_examples: _Count
    """Training examples, those in both orders counted twice; windows, of question answering."""
    model: str
    """The value of --model."""
    model_fingerprint: str
    """SHA-256 of the encoder's tensors; of random ones, what it is random from."""
    has_random_weights: bool
    recipe_source: str
    """`shipped`, or of a file of the user's own what tells it from others of its name."""
    changes: list[str]
    """The differences from that recipe: overrides but for the seed, and fewer examples."""
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
