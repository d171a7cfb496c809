"""A classification or a regression of a text or a pair."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from electra_ds.config.finetune_recipe import FinetuneRecipe
from electra_ds.finetuning.inputs import TaskInputs, tokenised, unscaled
from electra_ds.finetuning.metrics import baseline, confusion, has_constant_predictions, score
from electra_ds.finetuning.tasks.base import EvaluationResult, Outputs, TokenizedTask, chosen, lines_file
from electra_ds.finetuning.tasks.examples import Examples, TaskData

_AX_METRICS = ("matthews",)  # GLUE's for its diagnostic set


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

        self.train = inputs(data.train.select(chosen(len(data.train), max_train, recipe.seed)), True)
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
            files[f"submission/{self.task.submission[name]}"] = lines_file(["index\tprediction", *lines])
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
        return lines_file(lines)
