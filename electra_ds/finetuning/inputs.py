"""Tokenised task examples, and the batch of each step, which depends only on the seed and the step.

Shape suffixes: N inputs of a set, B of a batch, S of a micro-batch, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

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
    """The tensors of one micro-batch, all on one device."""

    ids_BT: torch.Tensor
    """int64, with special tokens and padding."""
    attended_BT: torch.Tensor
    """bool, False at padding."""
    segments_BT: torch.Tensor | None = None
    """int64, 0 or 1; None if the model does not distinguish two texts."""
    targets: Mapping[str, torch.Tensor] = MappingProxyType({})
    """Further inputs of the head by name, from the task's `Targets`; labels only if they are known."""

    @property
    def labels(self) -> torch.Tensor | None:
        """The target `labels`, if the examples have them."""
        return self.targets.get("labels")

    def to(self, device: torch.device) -> TaskMicroBatch:
        """Return the same tensors on another device."""
        texts = {"ids_BT": self.ids_BT, "attended_BT": self.attended_BT, "segments_BT": self.segments_BT}
        return TaskMicroBatch(**moved(texts, device), targets=moved(self.targets, device))


class Targets(Protocol):
    """Labels and other inputs of a task's head, for N examples."""

    def count(self, rows_S: np.ndarray) -> int:
        """Return how many losses these examples have, over which a batch's loss is the mean."""

    def of(self, rows_S: np.ndarray, width: int, *, with_labels: bool) -> dict[str, np.ndarray]:
        """Return arrays by name, with a row for each of these examples. width: the number of positions of an input."""


@dataclass(frozen=True)
class Labels:
    """One label, or several, for each input."""

    labels_N: np.ndarray
    """int64 classes or float32 scores, [N]; float32 [N, C] where several classes may hold."""

    def count(self, rows_S: np.ndarray) -> int:
        return len(rows_S)

    def of(self, rows_S: np.ndarray, width: int, *, with_labels: bool) -> dict[str, np.ndarray]:
        return {"labels": self.labels_N[rows_S]} if with_labels else {}


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

    def count(self, rows_S: np.ndarray) -> int:
        return len(rows_S)

    def of(self, rows_S: np.ndarray, width: int, *, with_labels: bool) -> dict[str, np.ndarray]:
        """Return `answerable` [S, T], True for the context, the special token after it, and the first token (the
        original's choice); and as labels `starts` and `ends` [S], 0 for a window without the answer, and
        `is_impossible` [S], float32."""
        places_T = np.arange(width)
        first_S1, stop_S1 = self.context_N2[rows_S].T[:, :, None]
        arrays = {"answerable": ((places_T >= first_S1) & (places_T <= stop_S1)) | (places_T == 0)}
        if with_labels:
            arrays["starts"] = self.starts_N[rows_S].astype(np.int64)  # the type that torch takes as an index
            arrays["ends"] = self.ends_N[rows_S].astype(np.int64)
            arrays["is_impossible"] = self.is_impossible_N[rows_S].astype(np.float32)
        return arrays


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
    targets: Targets | None = None
    """None if the examples have no labels."""

    def __len__(self) -> int:
        """The number of examples, each of which is one input."""
        return len(self.bounds) - 1

    @property
    def input_lengths(self) -> np.ndarray:
        """The number of tokens of each input, int64 [N]."""
        return np.diff(self.bounds)

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each example, int64."""
        return self.input_lengths

    def draws(self, numbers_B: np.ndarray, seed: int) -> np.ndarray | None:
        """Return what training draws at random for the examples with these numbers, counted from the first of the run,
        with a row for each; None if nothing is drawn. `micro_batch` gets the rows of its examples."""
        return None

    def micro_batch(
        self, rows_S: np.ndarray, draws: np.ndarray | None = None, *, with_labels: bool = True
    ) -> TaskMicroBatch:
        """Return these examples as CPU tensors, padded to the longest."""
        return self._tensors(rows_S, self.targets, rows_S, with_labels)

    def _tensors(
        self, rows_S: np.ndarray, targets: Targets | None, examples: np.ndarray, with_labels: bool
    ) -> TaskMicroBatch:
        lengths_S = self.input_lengths[rows_S]
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
        arrays = {} if targets is None else targets.of(examples, width, with_labels=with_labels)
        return TaskMicroBatch(
            **{name: torch.from_numpy(array) for name, array in tensors.items()},
            targets={name: torch.from_numpy(array) for name, array in arrays.items()},
        )


@dataclass(frozen=True)
class GroupedInputs(TaskInputs):
    """Examples of several inputs each, such as the choices of a question."""

    groups: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    """int64 [examples + 1], the first input of each example, then the number of inputs."""

    def __len__(self) -> int:
        return len(self.groups) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.bounds[self.groups])

    def micro_batch(
        self, rows_S: np.ndarray, draws: np.ndarray | None = None, *, with_labels: bool = True
    ) -> TaskMicroBatch:
        """Return the inputs of these examples, one example after the other, with the target `sizes` [S], the number of
        inputs of each."""
        inputs = np.concatenate([np.arange(self.groups[row], self.groups[row + 1]) for row in rows_S])
        batch = self._tensors(inputs, self.targets, rows_S, with_labels)
        sizes = torch.from_numpy(np.diff(self.groups)[rows_S])
        return batch._replace(targets={**batch.targets, "sizes": sizes})


@dataclass(frozen=True)
class TaskBatch:
    """The inputs of one optimizer step."""

    inputs: TaskInputs
    rows_B: np.ndarray
    reduction: Literal["mean", "sum"] = "mean"
    """The loss that is differentiated. The mean is reported."""
    draws: np.ndarray | None = None
    """The random draws of each row, see `TaskInputs.draws`."""

    def __len__(self) -> int:
        return len(self.rows_B)

    @property
    def loss_terms(self) -> dict[str, LossTerm]:
        size = len(self) if self.inputs.targets is None else self.inputs.targets.count(self.rows_B)
        return {"loss": LossTerm(1.0 if self.reduction == "mean" else float(size), size)}

    @property
    def num_tokens(self) -> int:
        return int(self.inputs.lengths[self.rows_B].sum())

    def micro_batch(self, first: int, size: int) -> TaskMicroBatch:
        """Return the inputs `first` to `first + size` of the batch."""
        part = slice(first, first + size)
        return self.inputs.micro_batch(self.rows_B[part], None if self.draws is None else self.draws[part])


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
        rows_B = shuffled(numbers_B, len(self._inputs), self._seed, _ORDER)
        return TaskBatch(self._inputs, rows_B, self._reduction, self._inputs.draws(numbers_B, self._seed))


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
        of_order = encoded(texts, pairs, tokenizer, recipe, progress)
        ids += of_order[0]
        segments += of_order[1]
    labels = examples.labels
    if labels is not None:
        labels = np.concatenate([labels] * len(orders))
        labels = scaled(labels, task, recipe).astype(np.float32) if task.kind == "regression" else labels
    uses_segments = has_segments and recipe.data.segment_ids
    targets = None if labels is None else Labels(labels)
    return task_inputs(ids, segments if uses_segments else None, tokenizer, targets)


def encoded(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerFast,
    recipe: FinetuneRecipe,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return each text's ids and segment ids, with special tokens, cut at the recipe's `data.max_length`."""
    ids: list[np.ndarray] = []
    segments: list[np.ndarray] = []
    for first in range(0, len(texts), _TOKENISE_AT_ONCE):
        part = slice(first, first + _TOKENISE_AT_ONCE)
        found = tokenizer(
            list(texts[part]),
            None if pairs is None else list(pairs[part]),
            truncation="longest_first",
            max_length=recipe.data.max_length,
            return_attention_mask=False,
            return_token_type_ids=True,
        )
        ids += [np.asarray(row, np.int32) for row in found["input_ids"]]
        segments += [np.asarray(row, np.int8) for row in found["token_type_ids"]]
        progress(len(found["input_ids"]))
    return ids, segments


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
    return task_inputs([window.input_ids_L for window in windows], segments, tokenizer, spans)


def task_inputs(
    ids: list[np.ndarray],
    segments: list[np.ndarray] | None,
    tokenizer: PreTrainedTokenizerFast,
    targets: Targets | None,
    groups: Sequence[int] | None = None,
) -> TaskInputs:
    """Return tokenised inputs.

    ids, segments: one array per input, of one length each. groups: the number of inputs of each example, if examples
    have several.
    """
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int)  # `read_encoder` ensures this
    bounds = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    flat_segments = None if segments is None else np.concatenate(segments)
    flat_ids = np.concatenate(ids)
    if groups is None:
        return TaskInputs(flat_ids, flat_segments, bounds, pad_id, targets)
    firsts = np.concatenate([[0], np.cumsum(groups)]).astype(np.int64)
    return GroupedInputs(flat_ids, flat_segments, bounds, pad_id, targets, firsts)
