"""Tokenised task examples, and the batch of each step, which depends only on the seed and the step.

Shape suffixes: N inputs of a set, B of a batch, S of a micro-batch, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from electra_ds.config.finetune_recipe import FinetuneRecipe
from electra_ds.data.sampling import shuffled
from electra_ds.finetuning.squad import Question
from electra_ds.finetuning.squad_features import Window
from electra_ds.finetuning.tasks.examples import Examples, Task
from electra_ds.training.step import LossTerm, moved

_ORDER = 0xF1
_PAD_TO = 8  # tensor cores need widths that are multiples of this
_TOKENISE_AT_ONCE = 1000


class TaskMicroBatch(NamedTuple):
    """The tensors of one micro-batch, all on one device. None stands for what the task or the model does not have."""

    ids_BT: torch.Tensor
    """int64, with special tokens and padding."""
    attended_BT: torch.Tensor
    """bool, False at padding."""
    segments_BT: torch.Tensor | None = None
    """int64, 0 or 1."""
    labels_B: torch.Tensor | None = None
    """int64 classes, or float32 scores."""
    starts_B: torch.Tensor | None = None
    """int64, the first position of the answer, or 0 (the first token) for a window without the answer."""
    ends_B: torch.Tensor | None = None
    """int64, the last position of the answer."""
    is_impossible_B: torch.Tensor | None = None
    """float32, 1 for a window without an answer."""
    answerable_BT: torch.Tensor | None = None
    """bool, True for the context, the special token after it, and the first token (the original's choice)."""

    def to(self, device: torch.device) -> TaskMicroBatch:
        """Return the same tensors on another device."""
        return self._replace(**moved(self._asdict(), device))


@dataclass(frozen=True)
class SpanTargets:
    """The positions of the answers in N windows, and the positions that answers may have."""

    starts_N: np.ndarray
    """int64 positions, 0 if a window does not hold the answer."""
    ends_N: np.ndarray
    is_impossible_N: np.ndarray
    """bool, True if the window's question has no answer at all."""
    context_N2: np.ndarray
    """The first position of each window's context, and the position after its last."""


@dataclass(frozen=True)
class TaskInputs:
    """N inputs of a model, without padding."""

    ids: np.ndarray
    """int32, the ids of all inputs, one input after the other."""
    segments: np.ndarray | None
    """int8, one per id; None if the model does not distinguish a second text from a first."""
    bounds: np.ndarray
    """int64 [N + 1], the start of each input, then the end of the last."""
    pad_id: int
    labels_N: np.ndarray | None = None
    """int64 classes, or float32 scores."""
    spans: SpanTargets | None = None

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each input, int64 [N]."""
        return np.diff(self.bounds)

    def micro_batch(self, rows_S: np.ndarray, *, with_labels: bool = True) -> TaskMicroBatch:
        """Return these inputs as CPU tensors, padded to the longest."""
        lengths_S = self.lengths[rows_S]
        width = -(-int(lengths_S.max()) // _PAD_TO) * _PAD_TO
        places_T = np.arange(width)
        attended_ST = places_T < lengths_S[:, None]
        sources_ST = np.where(attended_ST, self.bounds[rows_S][:, None] + places_T, 0)
        tensors = {
            "ids_BT": np.where(attended_ST, self.ids[sources_ST], self.pad_id).astype(np.int64),
            "attended_BT": attended_ST,
        }
        if self.segments is not None:
            tensors["segments_BT"] = np.where(attended_ST, self.segments[sources_ST], 0).astype(np.int64)
        if self.labels_N is not None and with_labels:
            tensors["labels_B"] = self.labels_N[rows_S]
        if self.spans is not None:
            first_S1, stop_S1 = self.spans.context_N2[rows_S].T[:, :, None]
            tensors["answerable_BT"] = ((places_T >= first_S1) & (places_T <= stop_S1)) | (places_T == 0)
            if with_labels:
                tensors["starts_B"] = self.spans.starts_N[rows_S].astype(
                    np.int64
                )  # the type that torch takes as an index
                tensors["ends_B"] = self.spans.ends_N[rows_S].astype(np.int64)
                tensors["is_impossible_B"] = self.spans.is_impossible_N[rows_S].astype(np.float32)
        return TaskMicroBatch(**{name: torch.from_numpy(array) for name, array in tensors.items()})


@dataclass(frozen=True)
class TaskBatch:
    """The inputs of one optimizer step."""

    inputs: TaskInputs
    rows_B: np.ndarray
    reduction: Literal["mean", "sum"] = "mean"
    """The loss that is differentiated. The mean is reported."""

    def __len__(self) -> int:
        return len(self.rows_B)

    @property
    def loss_terms(self) -> dict[str, LossTerm]:
        size = len(self)
        return {"loss": LossTerm(1.0 if self.reduction == "mean" else float(size), size)}

    @property
    def num_tokens(self) -> int:
        return int(self.inputs.lengths[self.rows_B].sum())

    def micro_batch(self, first: int, size: int) -> TaskMicroBatch:
        """Return the inputs `first` to `first + size` of the batch."""
        return self.inputs.micro_batch(self.rows_B[first : first + size])


class TaskBatchBuilder:
    """Builds the batch of any step.

    Every example comes once per epoch, in an order that the seed decides. A batch may hold the end of one epoch and the
    beginning of the next.
    """

    def __init__(
        self, inputs: TaskInputs, batch_size: int, seed: int, reduction: Literal["mean", "sum"] = "mean"
    ) -> None:
        self._inputs, self._batch_size, self._seed, self._reduction = inputs, batch_size, seed, reduction

    def build(self, step: int) -> TaskBatch:
        numbers_B = step * self._batch_size + np.arange(self._batch_size)
        return TaskBatch(self._inputs, shuffled(numbers_B, len(self._inputs), self._seed, _ORDER), self._reduction)


def evaluation_chunks(inputs: TaskInputs, size: int) -> list[np.ndarray]:
    """Return all rows in chunks of similar length, the longest first, so running out of memory shows at once."""
    order = np.argsort(-inputs.lengths, kind="stable")
    return [order[first : first + size] for first in range(0, len(order), size)]


def trains_both_orders(examples: Examples, recipe: FinetuneRecipe) -> bool:
    """Return whether training uses each pair in both orders."""
    return recipe.data.double_unordered and examples.pairs is not None


def tokenised(
    examples: Examples,
    task: Task,
    tokenizer: PreTrainedTokenizerFast,
    recipe: FinetuneRecipe,
    *,
    has_segments: bool,
    for_training: bool,
    progress: Callable[[int], None] = lambda done: None,
) -> TaskInputs:
    """Return the inputs of a set's examples; for training, with pairs in both orders if the recipe says so.

    has_segments: True if the model has a table that distinguishes a second text from a first. progress: called with the
    number of examples done since the last call.
    """
    orders = [(examples.texts, examples.pairs)]
    if for_training and trains_both_orders(examples, recipe):
        assert examples.pairs is not None
        orders.append((examples.pairs, examples.texts))
    ids: list[np.ndarray] = []
    segments: list[np.ndarray] = []
    for texts, pairs in orders:
        for first in range(0, len(texts), _TOKENISE_AT_ONCE):
            part = slice(first, first + _TOKENISE_AT_ONCE)
            encoded = tokenizer(
                texts[part],
                None if pairs is None else pairs[part],
                truncation="longest_first",
                max_length=recipe.data.max_length,
                return_attention_mask=False,
                return_token_type_ids=True,
            )
            ids += [np.asarray(row, np.int32) for row in encoded["input_ids"]]
            segments += [np.asarray(row, np.int8) for row in encoded["token_type_ids"]]
            progress(len(encoded["input_ids"]))
    labels = examples.labels
    if labels is not None:
        labels = np.concatenate([labels] * len(orders))
        labels = scaled(labels, task, recipe).astype(np.float32) if task.kind == "regression" else labels
    uses_segments = has_segments and recipe.data.segment_ids
    return _inputs(ids, segments if uses_segments else None, tokenizer, labels)


def scaled(scores: np.ndarray, task: Task, recipe: FinetuneRecipe) -> np.ndarray:
    """Return scores of a regression task on the scale that the model predicts."""
    low, size = _scale(task, recipe)
    return (scores - low) / size


def unscaled(outputs: np.ndarray, task: Task, recipe: FinetuneRecipe) -> np.ndarray:
    """Return the model's outputs on the scale of the task's scores."""
    low, size = _scale(task, recipe)
    return outputs * size + low


def _scale(task: Task, recipe: FinetuneRecipe) -> tuple[float, float]:
    """Return the score that the model predicts as 0, and the distance from it to the score that it predicts as 1."""
    if recipe.data.regression_scale == "raw":
        return 0.0, 1.0
    assert task.score_range is not None  # every regression has one
    low, high = task.score_range
    return low, high - low


def span_inputs(
    questions: Sequence[Question],
    windows: Sequence[Window],
    tokenizer: PreTrainedTokenizerFast,
    recipe: FinetuneRecipe,
    *,
    has_segments: bool,
) -> TaskInputs:
    """Return the windows of a question answering set."""
    segments = None
    if has_segments and recipe.data.segment_ids:
        segments = [window.token_type_ids_L for window in windows]
    starts, ends = np.array([window.answer for window in windows], np.int64).reshape(-1, 2).T
    # As in the original: a window without the answer does not make its question unanswerable.
    is_impossible = np.array([questions[window.question].is_impossible for window in windows], bool)
    context = np.array([window.context for window in windows], np.int64).reshape(-1, 2)
    spans = SpanTargets(starts, ends, is_impossible, context)
    return _inputs([window.input_ids_L for window in windows], segments, tokenizer, spans=spans)


def _inputs(
    ids: list[np.ndarray],
    segments: list[np.ndarray] | None,
    tokenizer: PreTrainedTokenizerFast,
    labels_N: np.ndarray | None = None,
    spans: SpanTargets | None = None,
) -> TaskInputs:
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int)  # `read_encoder` ensures this
    bounds = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    flat_segments = None if segments is None else np.concatenate(segments)
    return TaskInputs(np.concatenate(ids), flat_segments, bounds, pad_id, labels_N, spans)
