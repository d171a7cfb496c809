"""A task's sets as a model's inputs, and a model's outputs as scores and predictions."""

from __future__ import annotations

import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from electra_ds.config.finetune_recipe import FinetuneRecipe
from electra_ds.core.keyed_random import permutation_at
from electra_ds.finetuning.batches import TaskInputs, span_inputs, tokenised, unscaled
from electra_ds.finetuning.metrics import baseline, confusion, has_constant_predictions, score
from electra_ds.finetuning.spans import (
    Answer,
    Candidate,
    best_answers,
    independent_candidates,
    joint_candidates,
    null_score,
)
from electra_ds.finetuning.squad import Question, SquadData
from electra_ds.finetuning.squad_features import Features, make_features
from electra_ds.finetuning.squad_metrics import Golds, evaluate
from electra_ds.finetuning.tasks import TaskData

_PART = 0xF2
_AX_METRICS = ("matthews",)  # GLUE's for its diagnostic set
_SHARES = (
    "exact_match",
    "exact",
    "f1",
    "HasAns_exact",
    "HasAns_f1",
    "NoAns_exact",
    "NoAns_f1",
    "best_exact",
    "best_f1",
)
_OWN_NAMES = {"exact_match": "exact"}
Outputs = Sequence[Mapping[str, np.ndarray]]
"""For each input, in order, what a head's `TaskOutput.scores` say of it."""


@dataclass(frozen=True)
class Judged:
    """What a model's outputs over one set come to."""

    rows: int
    metrics: dict[str, float]
    """Empty where the set has no labels. Shares lie in [0, 1], correlations in [-1, 1]."""
    baseline: dict[str, float]
    """The scores of `baseline_prediction` if it is given for every row; empty if there is none."""
    baseline_prediction: str
    constant: str | None
    """The prediction for all rows, if the labels differ and the predictions do not."""
    is_beaten: bool
    """True if the labels differ and the first metric is no better than its baseline."""
    details: dict[str, Any]
    """What else scores.json says of the set."""
    files: dict[str, str | bytes] = field(repr=False)
    """By name, what is kept of the predictions."""


class TaskSets(ABC):
    """One task, tokenised for one model under one recipe."""

    name: str
    num_outputs: int | None
    """Scores that the head gives; None for question answering."""
    is_regression: bool
    labels: tuple[str, ...]
    """The classes in order; empty where there are none."""
    train: TaskInputs
    dev: dict[str, TaskInputs]
    """Choices are made by the first."""
    test: dict[str, TaskInputs]
    chosen_by: str
    """The metric of choices."""
    shown_metrics: tuple[str, ...] = ()
    """The metrics that the terminal shows; empty if it shows all."""

    @abstractmethod
    def judge(self, name: str, outputs: Outputs) -> Judged:
        """name: of a set in `dev` or `test`."""

    def shown(self, metrics: Mapping[str, float], baseline: Mapping[str, float]) -> str:
        """Return scores for the terminal, each next to its baseline if there is one."""
        return "  ".join(
            f"{name} {metrics[name]:.4f}" + (f" (baseline {baseline[name]:.4f})" if name in baseline else "")
            for name in self.shown_metrics or metrics
        )


class LabelledSets(TaskSets):
    """Of a classification or regression."""

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
        """max_train: train on so many examples, which the seed chooses."""
        assert data.train is not None
        self._data, self._recipe = data, recipe
        self.task = data.task
        self.name, self.labels = data.task.name, data.task.labels
        self.is_regression = data.task.kind == "regression"
        self.num_outputs = 1 if self.is_regression else len(self.labels)
        self.chosen_by = data.task.metrics[0]
        train = data.train
        if max_train is not None and max_train < len(train):
            train = train.select(permutation_at(np.arange(max_train), len(train), recipe.seed, _PART))

        def inputs(examples: Any, for_training: bool) -> TaskInputs:
            return tokenised(
                examples, data.task, tokenizer, recipe,
                has_segments=has_segments, for_training=for_training, progress=progress,
            )  # fmt: skip

        self.train = inputs(train, True)
        self.dev = {name: inputs(examples, False) for name, examples in data.dev.items()}
        self.test = {name: inputs(examples, False) for name, examples in data.test.items() if len(examples)}

    def judge(self, name: str, outputs: Outputs) -> Judged:
        examples = self._data.sets()[name]
        logits = np.stack([row["logits"] for row in outputs])
        predictions = unscaled(logits[:, 0], self.task, self._recipe) if self.is_regression else logits.argmax(-1)
        files: dict[str, str | bytes] = {f"predictions/{name}.jsonl": self._lines(examples, predictions, logits)}
        if name in self.task.submission:
            rows = zip(examples.ids, predictions, strict=True)
            lines = [f"{index}\t{self.task.written_prediction(prediction)}" for index, prediction in rows]
            files[f"submission/{self.task.submission[name]}"] = "\n".join(["index\tprediction", *lines]) + "\n"
        if examples.labels is None:
            return Judged(len(examples), {}, {}, "", None, False, {}, files)
        wanted = _AX_METRICS if name == "ax" else self.task.metrics
        metrics = score(wanted, examples.labels, predictions)
        trivial = baseline(wanted, examples.labels, is_regression=self.is_regression)
        is_beaten = metrics[wanted[0]] <= trivial.metrics[wanted[0]] and len(set(examples.labels.tolist())) > 1
        constant = None
        if has_constant_predictions(examples.labels, predictions, is_regression=self.is_regression):
            constant = ("about " if self.is_regression else "") + self._named(float(np.mean(predictions)))
        details: dict[str, Any] = {}
        if not self.is_regression:
            counts = confusion(examples.labels, predictions, len(self.labels))
            details = {"labels": list(self.labels), "confusion": counts}
        return Judged(
            len(examples), metrics, trivial.metrics, self._named(trivial.prediction), constant, is_beaten, details,
            files,
        )  # fmt: skip

    def _named(self, prediction: float) -> str:
        """Return a prediction as people read it."""
        return f"{prediction:.4g}" if self.is_regression else f"'{self.labels[int(prediction)]}'"

    def _lines(self, examples: Any, predictions: np.ndarray, logits: np.ndarray) -> str:
        def named(value: Any) -> Any:
            return float(value) if self.is_regression else self.labels[int(value)]

        lines = []
        for row, (index, prediction) in enumerate(zip(examples.ids, predictions, strict=True)):
            line = {"id": index, "prediction": named(prediction), "logits": [float(value) for value in logits[row]]}
            if examples.labels is not None:
                line["label"] = named(examples.labels[row])
            lines.append(json.dumps(line, ensure_ascii=False))
        return "\n".join(lines) + "\n"


class SpanSets(TaskSets):
    """Of question answering."""

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
        self._recipe, self._dev = recipe, data.dev
        self.name = data.name
        questions = data.train
        if max_train is not None and max_train < len(questions):
            chosen = permutation_at(np.arange(max_train), len(questions), recipe.seed, _PART)
            questions = [questions[index] for index in chosen.tolist()]
        section = recipe.data

        def features(of: Sequence[Question], for_training: bool) -> Features:
            before = [0]

            def advance(done: int) -> None:
                progress(done - before[0])
                before[0] = done

            return make_features(
                of, tokenizer, max_length=section.max_length, max_query_length=section.max_query_length,
                doc_stride=section.doc_stride, for_training=for_training, progress=advance,
            )  # fmt: skip

        self._features = features(data.dev, False)
        trained = features(questions, True)
        self.train = span_inputs(questions, trained, tokenizer, recipe, has_segments=has_segments)
        self.dev = {"dev": span_inputs(data.dev, self._features, tokenizer, recipe, has_segments=has_segments)}
        self.test = {}

    def judge(self, name: str, outputs: Outputs) -> Judged:
        answers = self._answers(outputs)
        is_second = self.name == "squad2"
        # The official script of 2.0 wants the best span of every question, and applies the threshold itself.
        told = {key: answer.span if is_second else answer.text for key, answer in answers.items()}
        na_scores = {key: answer.na_score for key, answer in answers.items()} if is_second else None
        golds = {question.id: question.answers for question in self._dev}
        percents = evaluate(self.name, golds, told, na_scores, self._recipe.head.null_threshold)
        metrics = _shares(percents)
        files: dict[str, str | bytes] = {
            f"predictions/{name}-logits.npz": _packed(outputs, self.dev[name]),
            f"predictions/{name}.json": _json({key: answer.text for key, answer in answers.items()}),
            f"predictions/{name}-n-best.json": _json({key: answer.n_best for key, answer in answers.items()}),
        }
        if na_scores is not None:
            files[f"predictions/{name}-na-scores.json"] = _json(na_scores)
        # In 1.1 every question has an answer, and no answer is right for all of them.
        trivial = _shares(evaluate(self.name, golds, *_unanswered(golds))) if is_second else {}
        has_answers = is_second and any(golds.values())
        constant = "no answer" if has_answers and not any(answer.text for answer in answers.values()) else None
        is_beaten = has_answers and metrics["exact"] <= trivial["exact"]
        details = {key: value for key, value in percents.items() if key not in _SHARES}
        return Judged(
            len(self._dev), metrics, trivial, "no answer" if trivial else "", constant, is_beaten, details, files
        )

    def _answers(self, outputs: Outputs) -> dict[str, Answer]:
        section, features = self._recipe.data, self._features
        candidates: list[list[Candidate]] = []
        nulls = []
        for row, context, is_max_context in zip(outputs, features.context, features.is_max_context, strict=True):
            limits = (context, is_max_context, section.n_best, section.max_answer_length)
            if "start" in row:
                candidates.append(independent_candidates(row["start"], row["end"], *limits))
                nulls.append(null_score(row["start"], row["end"]))
            else:
                beam = (row["start_top"], row["start_index"], row["end_top"], row["end_index"])
                candidates.append(joint_candidates(*beam, *limits))
                nulls.append(float(row["unanswerable"]))
        head = self._recipe.head
        return best_answers(
            self._dev, features, candidates, nulls if self.name == "squad2" else None,
            threshold=head.null_threshold, against_best=head.span == "independent", n_best=section.n_best,
        )  # fmt: skip


def _shares(percents: Mapping[str, float]) -> dict[str, float]:
    return {_OWN_NAMES.get(key, key): value / 100 for key, value in percents.items() if key in _SHARES}


def _unanswered(golds: Golds) -> tuple[dict[str, str], dict[str, float]]:
    """Return (answers, scores of no answer) of a model that never answers."""
    return dict.fromkeys(golds, ""), dict.fromkeys(golds, math.inf)


def _packed(outputs: Outputs, inputs: TaskInputs) -> bytes:
    """numpy's archive: each of the head's scores, in fp16 where they are no indices; those of every position end to
    end without padding, window after window, with `lengths`, the windows' positions."""
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


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, indent=1) + "\n"
