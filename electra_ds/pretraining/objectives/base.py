"""The interface of an objective: everything in which one way of pretraining differs from another.

The loop, the engine, checkpoints, trackers, reports and sweeps get all names of losses and metrics from it. A new
objective is a subclass of `Objective` in one file, and an entry point (`config/names.py`). It must implement

    build_model      build the networks, initialised from the recipe's seed
    make_batch       turn the text of a step into the global batch: masks, noise keys, and whatever depends on the step
    measure          compute the results of a micro-batch of held-out text
    metrics          combine these results into metrics
    exports          return the networks as transformers models

Most of the rest has a default: the progress line, the detection of a collapse, the curves and samples of a report, and
the cost of a step.

Shape suffixes: B sequences of the global batch, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import numpy as np
import torch
from rich.text import Text

from electra_ds.config.cards import Card, find_card
from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.plugins import find_objective
from electra_ds.config.recipe import Recipe
from electra_ds.core import devices
from electra_ds.core.errors import ConfigError
from electra_ds.data.replacements import Replacements
from electra_ds.data.token_store import TokenStore
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.pretraining.masking import before
from electra_ds.pretraining.memory import Kernels, PeakMemory, peak_memory
from electra_ds.pretraining.run_time import (
    RunTime,
    StepTime,
    cpu_time,
    step_flops,
    step_operations,
    step_time,
    time_of_steps,
)
from electra_ds.pretraining.step_shape import StepShape
from electra_ds.training.optimizer import Rates, pretraining_rates
from electra_ds.training.step import AutocastModel, StepBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RecipeT = TypeVar("RecipeT", bound=Recipe)


class PretrainingBatch(StepBatch, ABC):
    """The global batch of one optimizer step, which an objective makes from text.

    In addition to what `StepBatch` requires, its micro-batches have `device`.
    """

    @property
    @abstractmethod
    def num_sequences(self) -> int:
        """The number of sequences."""

    def static_micro_batch(self, first: int, size: int) -> Any | None:
        """Return the micro-batch in the one shape of a compiled forward pass, or None if it does not fit that shape.

        The result's `is_static` is True.
        """
        return None


@dataclass(frozen=True)
class TextBatch:
    """The text of a global batch, laid out as [CLS] first [SEP], or [CLS] first [SEP] second [SEP], and padding."""

    ids_BT: np.ndarray
    """int64."""
    lengths_B: np.ndarray
    """int64, number of tokens of each sequence, including special ones."""
    second_segment_BT: np.ndarray | None
    """bool, True in the second segment; None if rows have only one."""
    maskable_BT: np.ndarray
    """bool, True where a token may be masked: neither a special token nor padding."""
    mask_token_id: int
    part: int = field(default=0, kw_only=True)
    """The number of this part, if other processes or forward passes make the rest of the step's batch. Random numbers
    must differ between parts."""
    replacements: Replacements | None = field(default=None, kw_only=True, repr=False)
    """The recorded replacements of the token store; None if it has none."""

    @property
    def part_key(self) -> tuple[int, ...]:
        """The last parts of a random key: none for part 0."""
        return (self.part,) if self.part else ()

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
        """Boolean [B, T], True at tokens, including special ones, and False at padding."""
        return before(self.lengths_B, self.ids_BT.shape[1])


class Curve(NamedTuple):
    """One panel of a run's curves."""

    label: str
    metrics: Mapping[str, str]
    """The labels of its lines, by the names of metrics."""
    is_loss: bool = False
    """True to show the training loss of the same name too."""
    baseline: float | None = None
    """A horizontal line, such as chance level."""


class Export(NamedTuple):
    """A network of a trained model, as a transformers model."""

    model: PreTrainedModel
    loaded_by: str
    """The transformers class that loads it, such as `ElectraForMaskedLM`."""
    purpose: str
    """Its purpose, which continues a sentence that begins with "This model"."""


class Objective(ABC, Generic[RecipeT]):
    """One way of pretraining, for a recipe and a vocabulary."""

    recipe_type: ClassVar[type[Recipe]] = Recipe
    """The recipe's schema: `Recipe`, or a subclass with the objective's own sections."""
    metric_labels: ClassVar[Mapping[str, str]]
    """The metrics of an evaluation, with the labels of a summary's rows. A sweep can optimise any of them."""
    main_metric: ClassVar[str]
    """The metric that sweeps optimise by default."""
    key_metrics: ClassVar[Sequence[str]]
    """The metrics that a study's tables and plots show."""
    baselines: ClassVar[Mapping[str, str]] = {}
    """For a metric, the name of its baseline."""
    reads_replacements: ClassVar[bool] = False
    """True if it reads the recorded replacements of a token store."""
    encoder: ClassVar[str]
    """The name in `exports` of the network whose encoder is finetuned."""

    def __init__(self, recipe: RecipeT, vocab_size: int, pad_token_id: int = 0) -> None:
        self.recipe = recipe
        self.vocab_size = vocab_size
        self.pad_token_id = pad_token_id

    @classmethod
    def of(cls, recipe: Recipe, vocab_size: int, pad_token_id: int = 0) -> Self:
        """Return the objective that a recipe names. Raises ConfigError if it is not of this class."""
        found = find_objective(recipe.objective)
        if not issubclass(found, cls):
            raise ConfigError(
                f"This works only for {cls.__name__}, but the recipe {recipe.name} has {recipe.objective}."
            )
        return found(recipe, vocab_size, pad_token_id)

    # The model and its batches.

    @abstractmethod
    def build_model(self) -> AutocastModel:
        """Return the model with random weights that depend only on the recipe's seed."""

    def begin(self, model: Any, given: Mapping[str, torch.Tensor]) -> None:
        """Change the initial weights of a new run, after those that were given have been loaded into the model.

        given: them, by parameter name.
        """

    def check_store(self, store: TokenStore, eval_windows: int | None = None) -> None:
        """Raise DataError if a token store lacks what the objective reads beside its text.

        eval_windows: the number of held-out sequences of the run's evaluations; None to check only the training steps.
        """

    @abstractmethod
    def make_batch(self, text: TextBatch, seed: int, step: int) -> PretrainingBatch:
        """Return the global batch of a step.

        Random numbers must be a function of (seed, step, text.part, position in the batch). Values that depend on the
        step, such as a temperature, must be tensors of the micro-batches, so that compiled forward passes see them.
        seed: the recipe's, or another one for held-out text.
        """

    @classmethod
    def rates(cls, recipe: RecipeT) -> Rates:
        """Return the function from a parameter's name to its own learning rate, decay and clipping."""
        return pretraining_rates

    # Evaluation on held-out text.

    @abstractmethod
    def measure(self, micro_batch: Any, output: Any) -> Any:
        """Return the results of a held-out micro-batch, in CPU memory and picklable."""

    @abstractmethod
    def metrics(self, batch: PretrainingBatch, measured: Sequence[Any], unigram_nats_V: np.ndarray) -> dict[str, float]:
        """Return the metrics of an evaluation by name.

        measured: the results of `measure`, in the order of the sequences. unigram_nats_V: float64, -log of each token's
        share of the training text.
        """

    @classmethod
    def complete(cls, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return an evaluation of metrics.jsonl, completed by values that follow from it, such as baselines."""
        return dict(metrics)

    def describe(self, metrics: Mapping[str, float]) -> str:
        """Return a one-line description of an evaluation."""
        return ", ".join(f"{_words(name)} {value:.3f}" for name, value in metrics.items())

    def progress(self, losses: Mapping[str, float | None]) -> str:
        """Return the losses of a step for the progress line; a loss that is not finite is None."""
        return "  ".join(f"{_words(name)} {_shown(losses.get(name))}" for name in self.loss_names)

    @property
    @abstractmethod
    def loss_names(self) -> Sequence[str]:
        """The names of a batch's `loss_terms`."""

    def collapsed_at(self, evaluations: Sequence[Mapping[str, Any]]) -> int | None:
        """Return the step at which training collapsed, or None if it has not.

        evaluations: all evaluations of the run, in order, each with `step`.
        """
        return None

    def describe_collapse(self, step: int, evaluations: Sequence[Mapping[str, Any]]) -> str:
        """Return the message for the step of a collapse. evaluations: as in `collapsed_at`."""
        return f"Training has collapsed at step {step}."

    # Reports.

    @property
    def curves(self) -> Sequence[Curve]:
        """The panels of a run's curves, at most four: by default the losses, and the main metric."""
        losses = [Curve(_words(name), {name: _words(name)}, is_loss=True) for name in self.loss_names]
        return [*losses, Curve(self.main_metric, {self.main_metric: _words(self.main_metric)})][:4]

    def samples(self, model: Any, tokenizer: Tokenizer, batch: Any, count: int) -> list[Text]:
        """Return held-out sentences marked with the model's predictions, after a line that explains the marks."""
        return []

    # Exports.

    @abstractmethod
    def exports(self, model: Any) -> Mapping[str, Export]:
        """Return the networks to export, with copies of their weights, by folder name."""

    # Costs, which follow from the shape of a step; None if the objective does not have one.

    @property
    def shape(self) -> StepShape | None:
        """The sizes of a step."""
        return None

    def parameter_counts(self) -> dict[str, int]:
        """Return the number of parameters of each network, the last one first, or of the model if there is no
        `shape`."""
        if self.shape is not None:
            return {network.name: network.parameters for network in reversed(self.shape.networks)}
        with torch.device("meta"):
            model = self.build_model()
        return {"model": sum(parameter.numel() for parameter in model.parameters())}

    def flops(self, batch: Any) -> float | None:
        """Return the model FLOPs of a step's forward and backward pass over a batch, which has `lengths_B` and
        `num_selected`."""
        if self.shape is None:
            return None
        return step_flops(self.shape, batch.lengths_B, batch.num_selected).forward_and_backward

    def usual_flops(self) -> float | None:
        """Return the model FLOPs of a step over full rows."""
        if self.shape is None:
            return None
        rows, length = self.shape.global_batch_size, self.shape.length
        return step_flops(self.shape, [length] * rows, self.shape.selected(rows)).forward_and_backward

    def step_time(self, plan: DeepSpeedPlan, card: Card) -> StepTime | None:
        """Return the roofline of a step over full rows on a card; None also if the card lacks the precision."""
        return None if self.shape is None else step_time(self.shape, plan, card)

    def peak_memory(self, plan: DeepSpeedPlan, kernels: Kernels) -> PeakMemory | None:
        """Return the memory that a step with a plan takes on each rank."""
        return None if self.shape is None else peak_memory(self.shape, plan, kernels)

    def run_time(self, plan: DeepSpeedPlan, device: torch.device, *, steps: int, threads: int | None) -> RunTime | None:
        """Return the predicted time of this many steps on this rank's device.

        Return None if the objective does not predict it, or for a GPU whose rates are unknown. threads: of a rank on a
        CPU; None for torch's choice.
        """
        if device.type == "cpu":
            flops = self.usual_flops()
            if flops is None:
                return None
            operations = 0 if self.shape is None else steps * step_operations(self.shape, plan)
            return cpu_time(steps * flops, operations, threads or torch.get_num_threads(), plan.batch.world_size)
        card = find_card(devices.device_name(device))
        return time_of_steps(None if card is None else self.step_time(plan, card), steps)

    def needed_bytes(self, plan: DeepSpeedPlan, kernels: Kernels) -> int | None:
        """Return the bytes that must be free on a GPU or in CPU memory for a plan."""
        peak = self.peak_memory(plan, kernels)
        return None if peak is None else peak.needed_bytes(kernels)

    def longest_micro_batch(self, size: int) -> Any | None:
        """Return a micro-batch of this many sequences that takes the most memory, for `--micro-batch auto` to try on a
        GPU; its tokens are arbitrary. None to rely on `peak_memory`."""
        return None


def _words(name: str) -> str:
    return name.replace("_", " ")


def _shown(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.3f}"
