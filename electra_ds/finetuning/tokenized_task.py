"""A task tokenised for a model, and the scores and predictions from the model's outputs over its sets."""

from __future__ import annotations

import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from electra_ds.config.finetune_recipe import FinetuneRecipe
from electra_ds.core.keyed_random import permutation_at
from electra_ds.finetuning.inputs import TaskInputs, span_inputs, tokenised, unscaled
from electra_ds.finetuning.metrics import (
    baseline,
    confusion,
    evaluate_squad1,
    evaluate_squad2,
    has_constant_predictions,
    score,
)
from electra_ds.finetuning.squad import Question, SquadData
from electra_ds.finetuning.squad_features import (
    Answer,
    Candidate,
    Window,
    best_answers,
    independent_candidates,
    joint_candidates,
    make_features,
    null_score,
)
from electra_ds.finetuning.tasks import Examples, TaskData

_PART = 0xF2
_AX_METRICS = ("matthews",)  # GLUE's for its diagnostic set
_SHARES = (
    "exact_match", "exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1", "best_exact", "best_f1",
)  # fmt: skip
_OWN_NAMES = {"exact_match": "exact"}
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


class TokenizedTask(ABC):
    """One task, tokenised for one model under one recipe."""

    name: str
    num_outputs: int | None
    """The number of scores that the head returns; None for question answering."""
    is_regression: bool
    labels: tuple[str, ...]
    """The classes in order; empty for regression and question answering."""
    train: TaskInputs
    dev: dict[str, TaskInputs]
    """The labelled sets. The first decides which evaluation is best."""
    test: dict[str, TaskInputs]
    chosen_by: str
    """The metric that decides which evaluation is best."""
    shown_metrics: tuple[str, ...] = ()
    """The metrics that the terminal shows; empty for all of them."""

    @abstractmethod
    def evaluate(self, name: str, outputs: Outputs) -> EvaluationResult:
        """Score the outputs over a set. name: the name of a set in `dev` or `test`."""

    def shown(self, metrics: Mapping[str, float], baseline: Mapping[str, float]) -> str:
        """Return scores for the terminal, each next to its baseline if there is one."""
        return "  ".join(
            f"{name} {metrics[name]:.4f}" + (f" (baseline {baseline[name]:.4f})" if name in baseline else "")
            for name in self.shown_metrics or metrics
        )


def _chosen(count: int, max_train: int | None, seed: int) -> list[int]:
    """Return the indices of the examples to train on, of `count`. If not all are used, the seed chooses."""
    if max_train is None or max_train >= count:
        return list(range(count))
    return [int(index) for index in permutation_at(np.arange(max_train), count, seed, _PART)]


class SequenceTask(TokenizedTask):
    """A classification or regression."""

    def __init__(
        self,
        data: TaskData,
        tokenizer: PreTrainedTokenizerFast,
        recipe: FinetuneRecipe,
        *,
        has_segments: bool,
        max_train: int | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """max_train: the number of examples to train on, which the seed chooses."""
        assert data.train is not None
        self._sets, self._recipe, self.task = data.sets, recipe, data.task
        self.name, self.labels = data.task.name, data.task.labels
        self.is_regression = data.task.kind == "regression"
        self.num_outputs = 1 if self.is_regression else len(self.labels)
        self.chosen_by = data.task.metrics[0]

        def inputs(examples: Examples, for_training: bool) -> TaskInputs:
            return tokenised(
                examples,
                data.task,
                tokenizer,
                recipe,
                has_segments=has_segments,
                for_training=for_training,
                progress=progress,
            )

        self.train = inputs(data.train.select(_chosen(len(data.train), max_train, recipe.seed)), True)
        self.dev = {name: inputs(examples, False) for name, examples in data.dev.items()}
        self.test = {name: inputs(examples, False) for name, examples in data.test.items() if len(examples)}

    def evaluate(self, name: str, outputs: Outputs) -> EvaluationResult:
        examples = self._sets[name]
        logits = np.stack([row["logits"] for row in outputs])
        predictions = unscaled(logits[:, 0], self.task, self._recipe) if self.is_regression else logits.argmax(-1)
        files: dict[str, bytes] = {f"predictions/{name}.jsonl": self._prediction_lines(examples, predictions, logits)}
        if name in self.task.submission:
            rows = zip(examples.ids, predictions, strict=True)
            lines = [f"{index}\t{self.task.written_prediction(prediction)}" for index, prediction in rows]
            files[f"submission/{self.task.submission[name]}"] = _lines(["index\tprediction", *lines])
        labels = examples.labels
        if labels is None:
            return EvaluationResult(len(examples), files=files)
        wanted = _AX_METRICS if name == "ax" else self.task.metrics
        metrics = score(wanted, labels, predictions)
        trivial = baseline(wanted, labels, is_regression=self.is_regression)
        answer = self._named(trivial.prediction)
        if "f1" in wanted and trivial.prediction != 1:
            answer += f" (f1: {self._named(1)})"
        constant = None
        if has_constant_predictions(labels, predictions, is_regression=self.is_regression):
            constant = ("about " if self.is_regression else "") + self._named(float(np.mean(predictions)))
        details: dict[str, Any] = {}
        if not self.is_regression:
            details = {"labels": list(self.labels), "confusion": confusion(labels, predictions, len(self.labels))}
        return EvaluationResult(
            len(examples),
            metrics,
            trivial.metrics,
            answer,
            constant,
            is_beaten=metrics[wanted[0]] <= trivial.metrics[wanted[0]] and len(np.unique(labels)) > 1,
            details=details,
            files=files,
        )

    def _named(self, prediction: float) -> str:
        """Return a prediction as messages show it."""
        return f"{prediction:.4g}" if self.is_regression else f"'{self.labels[int(prediction)]}'"

    def _prediction_lines(self, examples: Examples, predictions: np.ndarray, logits: np.ndarray) -> bytes:
        """Return each row's prediction, logits and label as JSON lines."""

        def named(value: Any) -> Any:
            return float(value) if self.is_regression else self.labels[int(value)]

        lines = []
        for row, (index, prediction) in enumerate(zip(examples.ids, predictions, strict=True)):
            line = {"id": index, "prediction": named(prediction), "logits": logits[row].tolist()}
            if examples.labels is not None:
                line["label"] = named(examples.labels[row])
            lines.append(json.dumps(line, ensure_ascii=False))
        return _lines(lines)


class QuestionAnsweringTask(TokenizedTask):
    """Extractive question answering."""

    num_outputs = None
    is_regression = False
    labels = ()
    chosen_by = "f1"
    shown_metrics = ("exact", "f1")

    def __init__(
        self,
        data: SquadData,
        tokenizer: PreTrainedTokenizerFast,
        recipe: FinetuneRecipe,
        *,
        has_segments: bool,
        max_train: int | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """max_train: the number of questions to train on, which the seed chooses."""
        self._recipe, self._dev = recipe, data.dev
        self.name = data.name
        section = recipe.data

        def inputs(questions: Sequence[Question], for_training: bool) -> tuple[list[Window], TaskInputs]:
            windows = make_features(
                questions,
                tokenizer,
                max_length=section.max_length,
                max_query_length=section.max_query_length,
                doc_stride=section.doc_stride,
                for_training=for_training,
                progress=progress,
            )
            return windows, span_inputs(questions, windows, tokenizer, recipe, has_segments=has_segments)

        self._windows, dev = inputs(data.dev, False)
        chosen = [data.train[index] for index in _chosen(len(data.train), max_train, recipe.seed)]
        _, self.train = inputs(chosen, True)
        self.dev = {"dev": dev}
        self.test = {}

    def evaluate(self, name: str, outputs: Outputs) -> EvaluationResult:
        answers = self._answers(outputs)
        is_second = self.name == "squad2"
        # The official script of 2.0 takes the best span of every question and applies the threshold itself.
        given = {key: answer.span if is_second else answer.text for key, answer in answers.items()}
        na_scores = {key: answer.na_score for key, answer in answers.items()}
        golds = {question.id: question.answers for question in self._dev}
        if is_second:
            percents = evaluate_squad2(golds, given, na_scores, self._recipe.head.null_threshold)
        else:
            percents = evaluate_squad1(golds, given)
        metrics = _shares(percents)
        files: dict[str, bytes] = {
            f"predictions/{name}-logits.npz": _packed(outputs, self.dev[name]),
            f"predictions/{name}.json": _json({key: answer.text for key, answer in answers.items()}),
            f"predictions/{name}-n-best.json": _json({key: answer.n_best for key, answer in answers.items()}),
        }
        if is_second:
            files[f"predictions/{name}-na-scores.json"] = _json(na_scores)
        trivial = {}
        if is_second:  # in 1.1 every question has an answer, and no single answer fits them all
            never, certain = dict.fromkeys(golds, ""), dict.fromkeys(golds, math.inf)
            trivial = _shares(evaluate_squad2(golds, never, certain))
        has_answers = is_second and any(golds.values())
        return EvaluationResult(
            len(self._dev),
            metrics,
            trivial,
            "no answer" if trivial else "",
            constant="no answer" if has_answers and not any(answer.text for answer in answers.values()) else None,
            is_beaten=has_answers and metrics["exact"] <= trivial["exact"],
            details={key: value for key, value in percents.items() if key not in _SHARES},
            files=files,
        )

    def _answers(self, outputs: Outputs) -> dict[str, Answer]:
        section = self._recipe.data
        candidates: list[list[Candidate]] = []
        nulls = []
        for row, window in zip(outputs, self._windows, strict=True):
            limits = (window.context, window.is_max_context_C, section.n_best, section.max_answer_length)
            if "start" in row:
                candidates.append(independent_candidates(row["start"], row["end"], *limits))
                nulls.append(null_score(row["start"], row["end"]))
            else:
                beam = (row["start_top"], row["start_index"], row["end_top"], row["end_index"])
                candidates.append(joint_candidates(*beam, *limits))
                nulls.append(float(row["unanswerable"]))
        head = self._recipe.head
        return best_answers(
            self._dev,
            self._windows,
            candidates,
            nulls if self.name == "squad2" else None,
            threshold=head.null_threshold,
            against_best=head.span == "independent",
            n_best=section.n_best,
        )


def _shares(percents: Mapping[str, float]) -> dict[str, float]:
    return {_OWN_NAMES.get(key, key): value / 100 for key, value in percents.items() if key in _SHARES}


def _packed(outputs: Outputs, inputs: TaskInputs) -> bytes:
    """Return a NumPy archive of each of the head's scores, in fp16 unless they are indices.

    Scores of positions are stored without padding, window after window, with the number of positions in `lengths`.
    """
    lengths = inputs.lengths
    arrays: dict[str, Any] = {"lengths": lengths}
    for name in outputs[0]:
        if name in ("start", "end"):
            joined = np.concatenate([row[name][:length] for row, length in zip(outputs, lengths, strict=True)])
        else:
            joined = np.stack([row[name] for row in outputs])
        arrays[name] = joined.astype(np.float16 if joined.dtype.kind == "f" else np.int16)
    archive = io.BytesIO()
    np.savez_compressed(archive, **arrays)
    return archive.getvalue()


def _json(values: Mapping[str, Any]) -> bytes:
    return _lines([json.dumps(values, ensure_ascii=False, indent=1)])


def _lines(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
