"""The recipe of a finetuning: every value that changes its mathematics, resolved for one task.

Recipes are YAML files; those in `electra_ds/finetune_recipes/` can be given by name. A file's `by_task` holds overrides
for single tasks, and is dropped when the recipe is resolved. Sources: papers and code of google-research/electra (the
original) and cccwam/rc2020_electra (the reproduction study).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from electra_ds.config.names import FINETUNE_RECIPES, TASKS, shipped_names
from electra_ds.config.plugins import TASK, registered_names
from electra_ds.config.recipe import RecipeSource, named_values, shown_source, validate_recipe
from electra_ds.config.sections import OptimizerSection, ScheduleSection, Section
from electra_ds.config.values import apply_overrides, put_value
from electra_ds.core.errors import ConfigError, did_you_mean


class TaskDataSection(Section):
    max_length: int = Field(default=128, ge=8)
    """Maximum number of tokens of an input, including special tokens. If a pair is too long, the longer text is
    truncated first."""
    segment_ids: bool = True
    """True to distinguish the two texts of a pair by segment ids, if the model has an embedding table for them. A model
    pretrained on single segments has an untrained second row."""
    double_unordered: bool = False
    """True to train on each pair in both orders (the original: MRPC and STS-B)."""
    regression_scale: Literal["raw", "unit"] = "raw"
    """Regression targets unchanged (`raw`), or scaled from the range of the scores to 0 to 1 (`unit`, the original)."""
    doc_stride: int = Field(default=128, ge=1)
    """Question answering: tokens between the starts of successive windows of a long context."""
    max_query_length: int = Field(default=64, ge=1)
    """Question answering: maximum number of tokens of a question; longer ones are truncated."""
    max_answer_length: int = Field(default=30, ge=1)
    """Question answering: maximum number of tokens of an answer."""
    n_best: int = Field(default=20, ge=1)
    """Question answering: number of starts and ends to try in each window."""
    negatives: int = Field(default=7, ge=1, le=1000, exclude_if=lambda number: number == 7)
    """Sentence embeddings of pairs without scores: number of wrong second texts drawn for each example."""


class HeadSection(Section):
    pooling: Literal["first", "mean"] = "first"
    """The vector that represents a text: the first token's, or the mean over all tokens except padding."""
    num_layers: Literal[1, 2] = 1
    """One matrix from the vector to the scores, or two with a GELU between them."""
    hidden_size: int | None = Field(default=None, ge=1)
    """Width between the two matrices; null means the encoder's width."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout on the vector, where `dropout_at` applies it."""
    dropout_at: Literal["first", "each"] = "first"
    """Dropout before the first matrix only, or before each one (transformers' ELECTRA)."""
    initializer: Literal["normal", "glorot-uniform"] = "normal"
    """Normal with `initializer_range`, or Glorot's uniform (TensorFlow's default, which the original keeps)."""
    initializer_range: float = Field(default=0.02, gt=0)
    span: Literal["independent", "joint"] = "independent"
    """Question answering: score start and end independently, or the end given the start, with a classifier that decides
    whether there is an answer (the original)."""
    span_hidden_size: int = Field(default=512, ge=1)
    """Width of the joint head's hidden layers."""
    beam_size: int = Field(default=20, ge=1)
    """The number of starts that the joint head considers, and of ends for each start."""
    answerable_weight: float = Field(default=0.5, ge=0)
    """Weight of the loss of the joint head's answerability classifier."""
    cosine_scale: float = Field(default=20.0, gt=0, exclude_if=lambda scale: scale == 20.0)
    """Sentence embeddings of pairs without scores: factor of the cosines in the cross-entropy over the candidates
    (sentence-transformers' default)."""
    null_threshold: float = 0.0
    """SQuAD 2.0: predict no answer if the evidence against one exceeds this."""


class FinetuneOptimizerSection(OptimizerSection):
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of a layer divided by that of the layer above it."""
    layer_decay_exponents: Literal["original", "corrected", "study"] = "corrected"
    """The exponent of the decay, in an encoder of n layers. `corrected`: 0 at the head, 1 at the last layer, n at
    the first, n + 1 at the embeddings. `original`: one more everywhere except at the head, as in the original code
    (google-research/electra issue 51). `study`: 0 at head and last layer, n - 1 at the first and the embeddings."""
    loss: Literal["mean", "sum"] = "mean"
    """Reduction over the examples of a batch. `sum` (the original's code) multiplies the gradients by the number of
    examples, so that nearly every step is clipped and epsilon matters less by the same factor."""
    weight_decay_on: Literal["matrices", "all"] = "matrices"
    """`all`: biases and LayerNorm decay too (the study's code)."""


class FinetuneScheduleSection(Section):
    kind: Literal["linear", "product"] = "linear"
    """As in pretraining."""
    epochs: float = Field(default=3.0, gt=0, le=10_000)
    """Passes over the training examples. A file or an override that sets them does not inherit `min_steps`."""
    min_steps: int = Field(default=0, ge=0, le=10**9, exclude_if=lambda steps: steps == 0)
    """Minimum number of optimizer steps of a run: if `epochs` gives fewer, the run has more epochs."""
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""


class FinetuneRecipe(Section):
    """A validated finetuning recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the head's initial weights, the order of the examples and dropout."""
    global_batch_size: int = Field(default=32, ge=1, le=1_000_000)
    """Examples in one optimizer step, over all ranks and accumulation steps."""
    metrics: tuple[str, ...] = Field(default=(), exclude_if=lambda names: not names)
    """Further metrics of each evaluation, by registered name or as `module:Class` (docs/tasks.md)."""
    data: TaskDataSection = TaskDataSection()
    head: HeadSection = HeadSection()
    optimizer: FinetuneOptimizerSection
    schedule: FinetuneScheduleSection = FinetuneScheduleSection()


@dataclass(frozen=True)
class Finetuning:
    """A recipe and the number of training examples, as an engine and a DeepSpeed JSON need them."""

    recipe: FinetuneRecipe
    num_examples: int
    num_hidden_layers: int

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def seed(self) -> int:
        return self.recipe.seed

    @property
    def global_batch_size(self) -> int:
        return self.recipe.global_batch_size

    @property
    def optimizer(self) -> FinetuneOptimizerSection:
        return self.recipe.optimizer

    @property
    def steps_of_epochs(self) -> int:
        """The number of steps in the recipe's epochs."""
        return math.ceil(self.recipe.schedule.epochs * self.num_examples / self.global_batch_size - 1e-9)

    @property
    def schedule(self) -> ScheduleSection:
        """The schedule in steps; the last step may begin another epoch."""
        section = self.recipe.schedule
        total = max(1, section.min_steps, self.steps_of_epochs)
        return ScheduleSection(kind=section.kind, total_steps=total, warmup_share=section.warmup_share)


def load_finetune_recipe(source: RecipeSource, task: str, overrides: Sequence[str] = ()) -> FinetuneRecipe:
    """Return a validated finetuning recipe, with its `by_task` for the task and then the overrides applied."""
    values = named_values(source, FINETUNE_RECIPES)
    by_task = values.pop("by_task", None) or {}
    if not isinstance(by_task, dict) or not all(isinstance(inner, dict) for inner in by_task.values()):
        raise ConfigError(
            f"Recipe {shown_source(source)}: by_task must be a mapping of tasks to dotted keys, such as "
            f"rte: {{schedule.epochs: 10}}."
        )
    known, tasks = FinetuneRecipe.dotted_keys(), (*TASKS, *registered_names(TASK))
    for name, inner in by_task.items():
        if name not in tasks and ":" not in str(name):  # a class of the user's own
            hint = did_you_mean(str(name).lower(), tasks) or f"; tasks are {', '.join(tasks)}."
            raise ConfigError(f"Recipe {shown_source(source)}: by_task.{name}: there is no such task{hint}")
        for key in inner:
            if key not in known:
                hint = did_you_mean(str(key), known) or "."
                raise ConfigError(f"Recipe {shown_source(source)}: by_task.{name}: unknown key {key}{hint}")
    for key, value in by_task.get(task, {}).items():
        put_value(values, str(key), value)
    values = apply_overrides(values, overrides, known)
    return validate_recipe(values, shown_source(source), FinetuneRecipe)


def recipe_source(source: RecipeSource) -> str:
    """Return `shipped`, or the start of a hash of the user's own recipe."""
    if isinstance(source, str) and source in shipped_names(FINETUNE_RECIPES):
        return "shipped"
    values = named_values(source, FINETUNE_RECIPES)
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]
