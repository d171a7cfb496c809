"""The interface of finetuning tasks: examples, inputs for a model, a head, and the scores of its outputs."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from electra_ds.config.finetune_recipe import FinetuneRecipe
from electra_ds.config.run_record import TaskSource
from electra_ds.core.errors import ConfigError
from electra_ds.core.keyed_random import permutation_at
from electra_ds.finetuning.heads import NotExportable, TaskModel, initialise
from electra_ds.finetuning.inputs import TaskInputs, TaskMicroBatch
from electra_ds.finetuning.load_task import LoadedTask

_PART = 0xF2
Outputs = Sequence[Mapping[str, np.ndarray]]
"""For each input, in order, its part of the head's `TaskOutput.scores`."""


@dataclass(frozen=True)
class EvaluationResult:
    """The evaluation of a model's outputs over one set."""

    rows: int
    metrics: dict[str, float] = field(default_factory=dict)
    """The scores by metric, empty if the set has no labels. Shares are in [0, 1], correlations in [-1, 1]."""
    baseline: dict[str, float] = field(default_factory=dict)
    """The scores of predicting `baseline_prediction` for every row; empty without labels, and for SQuAD 1.1."""
    baseline_prediction: str = ""
    constant: str | None = None
    """The one prediction made for all rows, if the labels differ and the predictions do not."""
    is_beaten: bool = False
    """True if the labels differ and the first metric is no better than its baseline."""
    details: dict[str, Any] = field(default_factory=dict)
    """More content for the set in scores.json."""
    files: dict[str, bytes] = field(default_factory=dict, repr=False)
    """The files of predictions, by name."""


class Scale(NamedTuple):
    """The scale of a regression: scores in the task's range are `lowest + unit * output`."""

    lowest: float = 0.0
    unit: float = 1.0


class FinetuneTask(ABC):
    """One task, tokenised for one model under one recipe. A subclass is one kind of task."""

    name: str
    num_outputs: int | None
    """The number of scores that the head returns; None if it is fixed."""
    labels: tuple[str, ...]
    """The classes in order; empty for tasks without classes."""
    train: TaskInputs
    dev: dict[str, TaskInputs]
    """The labelled sets. The first decides which evaluation is best."""
    test: dict[str, TaskInputs]
    chosen_by: str
    """The metric that decides which evaluation is best."""
    shown_metrics: tuple[str, ...] = ()
    """The metrics that the terminal shows; empty for all of them."""
    takes: ClassVar[tuple[str, ...]] = ("train", "dev", "test", "hub", "revision", "text", "label")
    """The fields of `TaskSource` that `load` reads; others are refused."""
    has_labels: ClassVar[bool] = True
    """True if it has classes, or scores in a range, which an exported model needs."""
    has_own_metrics: ClassVar[bool] = True
    """True if `evaluate` computes the metrics that a recipe adds."""
    possible_metrics: ClassVar[tuple[str, ...]] = ()
    """The metrics that an evaluation may have, by which sweeps can choose."""

    @classmethod
    @abstractmethod
    def load(cls, source: TaskSource) -> LoadedTask:
        """Read the examples. Raises DataError if they cannot be trained on or scored, and ConfigError for options that
        the task does not have."""

    @abstractmethod
    def __init__(
        self,
        data: Any,
        tokenizer: PreTrainedTokenizerFast,
        recipe: FinetuneRecipe,
        *,
        has_segments: bool,
        max_train: int | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Tokenise the examples that `load` returned.

        has_segments: True if the model has a table that distinguishes a second text from a first. max_train: the number
        of examples to train on, which the seed chooses. progress: called with the number of examples done since the
        last call.
        """

    @classmethod
    @abstractmethod
    def make_head(cls, recipe: FinetuneRecipe, hidden_size: int, num_outputs: int | None) -> nn.Module:
        """Return a module that maps `(hidden_BTH, batch)` to a `TaskOutput`. Its initial weights are set afterwards."""

    @classmethod
    def new_head(cls, recipe: FinetuneRecipe, hidden_size: int, num_outputs: int | None) -> nn.Module:
        """Return the head with the recipe's initial weights."""
        head = cls.make_head(recipe, hidden_size, num_outputs)
        initialise(head, recipe.head, recipe.seed)
        return head

    @classmethod
    def training_inputs(cls, data: Any, recipe: FinetuneRecipe, max_train: int | None) -> int | None:
        """Return the number of training inputs, or None if it is known only once they are tokenised."""
        return min(data.sizes["train"], max_train or data.sizes["train"])

    @abstractmethod
    def evaluate(self, name: str, outputs: Outputs) -> EvaluationResult:
        """Score the outputs over a set. name: the name of a set in `dev` or `test`."""

    def class_shares(self) -> np.ndarray | None:
        """Return the share of each class among the training labels, or None if that says nothing."""
        return None

    def shown(self, metrics: Mapping[str, float], baseline: Mapping[str, float]) -> str:
        """Return scores for the terminal, each next to its baseline if there is one."""
        return "  ".join(
            f"{name} {metrics[name]:.4f}" + (f" (baseline {baseline[name]:.4f})" if name in baseline else "")
            for name in self.shown_metrics or metrics
        )

    # --- as a transformers model

    hub_task: ClassVar[str] = "feature-extraction"
    """The Hub's name for what the exported model does."""
    library: ClassVar[str] = "transformers"
    """The library that opens the exported folder."""
    usage: ClassVar[str] = ""
    """A line of Python that uses the exported folder PATH."""
    example: ClassVar[str] = ""
    """Code for the model card that uses the exported folder PATH."""
    outputs: ClassVar[str] = ""
    """A sentence for the model card about what the code returns."""

    @classmethod
    def why_not_exportable(
        cls, recipe: FinetuneRecipe, config: PretrainedConfig, num_outputs: int | None = None
    ) -> NotExportable | None:
        """Return why no class of transformers computes this head, and what to do, or None if one may.

        num_outputs: the number of scores of an input, if known. For some encoders, only building the model shows it.
        """
        if "to_transformers" in {name for kind in cls.__mro__ if kind is not FinetuneTask for name in vars(kind)}:
            return None
        return NotExportable(f"{cls.__name__} defines no export", "")

    @classmethod
    def to_transformers(
        cls, trained: TaskModel, config: PretrainedConfig, labels: tuple[str, ...], scale: Scale
    ) -> PreTrainedModel:
        """Return a transformers model that computes the same scores. Raises ConfigError if there is no such class.

        config: a copy of the encoder's. labels: the classes, empty if the task has none.
        """
        raise ConfigError(
            f"{cls.__name__} does not define to_transformers, so its head cannot be exported. To export the encoder "
            f"without its head, add --encoder-only."
        )

    @classmethod
    def compared(
        cls, trained: TaskModel, model: Any, batch: TaskMicroBatch, scale: Scale
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the run's scores of some inputs, and those of the transformers model, which must be the same."""
        ours = trained(batch).scores["logits"] * scale.unit + scale.lowest
        return [(ours, model(**trained.encoder_inputs(batch)).logits)]

    @classmethod
    def more_files(cls, recipe: FinetuneRecipe, config: PretrainedConfig) -> dict[str, str]:
        """Return the files that the exported folder needs besides model and tokenizer, by their path in it."""
        return {}


def chosen(count: int, max_train: int | None, seed: int) -> list[int]:
    """Return the indices of the examples to train on, of `count`. If not all are used, the seed chooses."""
    if max_train is None or max_train >= count:
        return list(range(count))
    return [int(index) for index in permutation_at(np.arange(max_train), count, seed, _PART)]


def json_file(values: Mapping[str, Any]) -> bytes:
    return lines_file([json.dumps(values, ensure_ascii=False, indent=1)])


def lines_file(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
