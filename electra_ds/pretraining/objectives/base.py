"""The interface of an objective: everything in which one way of pretraining differs from another.

The loop, the engine, checkpoints, trackers, reports and sweeps read names from it and know none themselves. A new
objective is a subclass of `Objective` in one file, and an entry point (`config/names.py`). It must say how to

    build_model      make the networks, initialised from the recipe's seed
    make_batch       turn the text of a step into the global batch: masks, noise keys, and whatever depends on the step
    measure          say what a micro-batch of held-out text shows, and
    metrics          what all of them together come to

Everything else has a default: what the progress line shows, when a run has collapsed, what can be exported, what
curves and samples a report has, and what a step costs.

Shape suffixes: B sequences of the global batch, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import numpy as np
import torch
from rich.text import Text

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.names import find_objective
from electra_ds.config.recipe import Recipe
from electra_ds.core.errors import ConfigError
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.pretraining.masking import before
from electra_ds.pretraining.memory import Kernels, PeakMemory
from electra_ds.training.step import AutocastModel, StepBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RecipeT = TypeVar("RecipeT", bound=Recipe)


class PretrainingBatch(StepBatch, ABC):
    """The global batch of one optimiser step, as an objective makes it of text.

    Besides what `StepBatch` asks for, its micro-batches have `device`.
    """

    @property
    @abstractmethod
    def num_sequences(self) -> int:
        """The number of sequences."""

    def static_micro_batch(self, first: int, size: int) -> Any | None:
        """Return the same in a shape that all full micro-batches have, for a compiled forward; None if it has another.

        What it returns has `is_static`, which is True.
        """
        return None


@dataclass(frozen=True)
class TextBatch:
    """The text of a global batch, laid out as [CLS] first [SEP], or [CLS] first [SEP] second [SEP], and padding."""

    ids_BT: np.ndarray
    """int64."""
    lengths_B: np.ndarray
    """int64, tokens of each sequence, special ones included."""
    second_segment_BT: np.ndarray | None
    """bool, True in the second segment; None where rows have only one."""
    maskable_BT: np.ndarray
    """bool, True where a token may be masked: neither a special token nor padding."""
    mask_token_id: int

    @property
    def num_tokens(self) -> int:
        """The number of tokens without padding."""
        return int(self.lengths_B.sum())

    @property
    def num_sequences(self) -> int:
        """The number of sequences."""
        return len(self.ids_BT)

    @property
    def is_token(self) -> np.ndarray:
        """Boolean [B, T], True at tokens, special ones included, and False at padding."""
        return before(self.lengths_B, self.ids_BT.shape[1])


class Curve(NamedTuple):
    """One panel of a run's curves."""

    label: str
    metrics: Mapping[str, str]
    """The labels of its lines, by the names of metrics."""
    is_loss: bool = False
    """Whether it shows a loss in training too, of the same name."""
    baseline: float | None = None
    """A horizontal line, such as what chance gives."""


class Export(NamedTuple):
    """A network of a trained model, as transformers knows it."""

    model: PreTrainedModel
    loaded_by: str
    """The class of transformers that opens it, such as `ElectraForMaskedLM`."""
    purpose: str
    """What it is good for, as the rest of a sentence that begins with "This model"."""


class Objective(ABC, Generic[RecipeT]):
    """One way of pretraining, for a recipe and a vocabulary."""

    recipe_type: ClassVar[type[Recipe]] = Recipe
    """The recipe's schema: `Recipe`, or a subclass with sections of the objective's own."""
    metric_labels: ClassVar[Mapping[str, str]]
    """What an evaluation reports, with the labels of a summary's rows. A sweep may optimise each of them."""
    main_metric: ClassVar[str]
    """The metric that sweeps optimise unless their file says otherwise."""
    key_metrics: ClassVar[Sequence[str]]
    """The metrics that the tables and pictures of a study show."""
    baselines: ClassVar[Mapping[str, str]] = {}
    """The names of metrics that others are to be compared with."""
    encoder: ClassVar[str]
    """The one of `exports` whose encoder is finetuned."""

    def __init__(self, recipe: RecipeT, vocab_size: int, pad_token_id: int = 0) -> None:
        self.recipe = recipe
        self.vocab_size = vocab_size
        self.pad_token_id = pad_token_id

    @classmethod
    def of(cls, recipe: Recipe, vocab_size: int, pad_token_id: int = 0) -> Self:
        """Return the objective that a recipe names. Raises ConfigError if it is not an objective of this class."""
        found = find_objective(recipe.objective)
        if not issubclass(found, cls):
            raise ConfigError(f"This is for {cls.__name__}, and the recipe {recipe.name} has {recipe.objective}.")
        return found(recipe, vocab_size, pad_token_id)

    # What it computes.

    @abstractmethod
    def build_model(self) -> AutocastModel:
        """Return the model with random weights, a function of the recipe's seed alone."""

    @abstractmethod
    def make_batch(self, text: TextBatch, seed: int, step: int) -> PretrainingBatch:
        """Return the global batch of a step.

        Random numbers must be a function of (seed, step, position in the global batch). What depends on the step, such
        as a temperature, reaches the model as a tensor of the micro-batches, so that compiled forwards see its value.
        seed: the recipe's, or another one for held-out text.
        """

    # Evaluation on held-out text.

    @abstractmethod
    def measure(self, micro_batch: Any, output: Any) -> Any:
        """Return what a held-out micro-batch shows, in the CPU's memory; it must be picklable."""

    @abstractmethod
    def metrics(self, batch: PretrainingBatch, measured: Sequence[Any], unigram_nats_V: np.ndarray) -> dict[str, float]:
        """Return the metrics of an evaluation by name.

        measured: what `measure` returned, in the order of the sequences. unigram_nats_V: float64, -log of each token's
        share of the training text.
        """

    @classmethod
    def complete(cls, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return an evaluation as metrics.jsonl has it with what follows from its values, such as baselines."""
        return dict(metrics)

    def describe(self, metrics: Mapping[str, float]) -> str:
        """Return an evaluation in one line."""
        return ", ".join(f"{_words(name)} {value:.3f}" for name, value in metrics.items())

    def progress(self, losses: Mapping[str, float | None]) -> str:
        """Return the losses of a step for the progress line; a loss that is not finite is None."""
        return "  ".join(f"{_words(name)} {_shown(losses.get(name))}" for name in self.loss_names)

    @property
    @abstractmethod
    def loss_names(self) -> Sequence[str]:
        """The names of a batch's `loss_terms`."""

    def collapsed_at(self, evaluations: Sequence[Mapping[str, Any]]) -> int | None:
        """Return the step since which training is worthless, None while it is not.

        evaluations: all of the run's, in order, each with `step`.
        """
        return None

    def describe_collapse(self, step: int) -> str:
        """Return what a user reads when `collapsed_at` returns a step: a sentence without its full stop."""
        return f"Training has collapsed at step {step}"

    # What reports show.

    @property
    def curves(self) -> Sequence[Curve]:
        """The panels of a run's curves, at most four: by default the losses, and the main metric."""
        losses = [Curve(_words(name), {name: _words(name)}, is_loss=True) for name in self.loss_names]
        return [*losses, Curve(self.main_metric, {self.main_metric: _words(self.main_metric)})][:4]

    def samples(self, model: Any, tokenizer: Tokenizer, batch: Any, count: int) -> list[Text]:
        """Return held-out sentences with what the model makes of them, after a line that explains the marks."""
        return []

    # What comes out of it.

    @abstractmethod
    def exports(self, model: Any) -> Mapping[str, Export]:
        """Return the networks to export, with copies of their weights, by the names of their folders."""

    # What it costs; None where the objective does not say.

    def parameter_counts(self) -> dict[str, int]:
        """Return the sizes of the model's parts, which add up to all of it. By default there is one part."""
        with torch.device("meta"):
            model = self.build_model()
        return {"model": sum(parameter.numel() for parameter in model.parameters())}

    def flops(self, batch: Any) -> float | None:
        """Return the model FLOPs of a step's forward and backward pass over a batch."""
        return None

    def usual_flops(self) -> float | None:
        """Return the same for a batch of full rows."""
        return None

    def peak_memory(self, plan: DeepSpeedPlan, kernels: Kernels) -> PeakMemory | None:
        """Return the memory that a step under a plan takes on each of its ranks."""
        return None

    def longest_micro_batch(self, size: int) -> Any | None:
        """Return the micro-batch of so many sequences that takes the most memory; its tokens mean nothing."""
        return None


def _words(name: str) -> str:
    return name.replace("_", " ")


def _shown(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.3f}"
