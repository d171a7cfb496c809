"""A classification or a regression of a text or a pair."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn
from transformers import (
    ElectraConfig,
    ElectraForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from electra_ds.config.finetune_recipe import FinetuneRecipe
from electra_ds.config.run_record import TaskSource
from electra_ds.finetuning.heads import NotExportable, SequenceHead, TaskModel, fill, prefixed
from electra_ds.finetuning.inputs import TaskInputs, tokenised, trains_both_orders, unscaled
from electra_ds.finetuning.metrics import baseline, confusion, further_metrics, has_constant_predictions, score
from electra_ds.finetuning.own_files import load_own_source
from electra_ds.finetuning.tasks.base import EvaluationResult, FinetuneTask, Outputs, Scale, chosen, lines_file
from electra_ds.finetuning.tasks.examples import Examples, TaskData

_AX_METRICS = ("matthews",)  # GLUE's for its diagnostic set


class SequenceTask(FinetuneTask):
    """A classification or regression."""

    hub_task = "text-classification"
    takes = (*FinetuneTask.takes, "pair", "label_kind")
    problem_type: ClassVar[Literal["single_label_classification", "multi_label_classification"]] = (
        "single_label_classification"
    )
    """transformers' name for the loss of the classes."""

    @classmethod
    def load(cls, source: TaskSource) -> TaskData:
        return load_own_source(source)

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

    @classmethod
    def make_head(cls, recipe: FinetuneRecipe, hidden_size: int, num_outputs: int | None) -> nn.Module:
        assert num_outputs is not None
        return SequenceHead(recipe.head, hidden_size, num_outputs, is_regression=num_outputs == 1)

    @classmethod
    def training_inputs(cls, data: TaskData, recipe: FinetuneRecipe, max_train: int | None) -> int | None:
        assert data.train is not None
        orders = 2 if trains_both_orders(data.train, recipe) else 1
        return min(len(data.train), max_train or len(data.train)) * orders

    def class_shares(self) -> np.ndarray | None:
        labels = self._sets["train"].labels
        return None if self.is_regression or labels is None else np.bincount(labels) / len(labels)

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
        more = partial(further_metrics, self._recipe.metrics, self.labels, labels)
        metrics |= more(predictions)
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
            trivial.metrics | more(np.full(len(labels), trivial.prediction)),
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

    # --- as a transformers model

    @classmethod
    def why_not_exportable(
        cls, recipe: FinetuneRecipe, config: PretrainedConfig, num_outputs: int | None = None
    ) -> NotExportable | None:
        head, width = recipe.head, int(config.hidden_size)
        if config.model_type != "electra":
            return NotExportable(
                f"transformers' classes for {config.model_type} have other layers before the scores, which are not "
                f"trained here",
                "",
            )
        if head.pooling != "first":
            return NotExportable(
                f"head.pooling is {head.pooling}, but transformers scores the first token's vector",
                "head.pooling=first head.hidden_size=null",
            )
        if head.num_layers == 2 and head.hidden_size not in (None, width):
            return NotExportable(
                f"head.hidden_size is {head.hidden_size}, but that of transformers' head is the encoder's, {width}",
                "head.hidden_size=null",
            )
        if head.num_layers == 1 and num_outputs is not None and 2 * num_outputs > width:
            return NotExportable(
                f"head.num_layers is 1, but transformers' two-layer head holds one matrix for at most {width // 2} "
                f"classes, half of the encoder's hidden size; this task has {num_outputs}",
                "head.num_layers=2",
            )
        return None

    @classmethod
    def to_transformers(
        cls, trained: TaskModel, config: PretrainedConfig, labels: tuple[str, ...], scale: Scale
    ) -> PreTrainedModel:
        head = trained.head
        assert isinstance(head, SequenceHead)
        assert isinstance(config, ElectraConfig)
        names = labels or ("score",)
        config.id2label, config.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
        config.problem_type = "regression" if head.is_regression else cls.problem_type
        config.classifier_dropout = head.section.dropout
        model = ElectraForSequenceClassification(config)
        layers = two_layers(head, scale)
        fill(model, prefixed(trained.encoder, model) | {f"classifier.{name}": layers[name] for name in layers})
        return model


def two_layers(head: SequenceHead, scale: Scale = Scale()) -> dict[str, torch.Tensor]:  # noqa: B008  # it is immutable
    """Return the weights of transformers' two-layer head, `dense` and `out_proj`, that compute the same scores."""
    weight_CH = head.out_proj.weight.detach() * scale.unit
    bias_C = head.out_proj.bias.detach() * scale.unit + scale.lowest
    if head.dense is None:
        return one_layer_as_two(weight_CH, bias_C)
    layers = {"out_proj.weight": weight_CH, "out_proj.bias": bias_C}
    return layers | {f"dense.{name}": tensor for name, tensor in head.dense.state_dict().items()}


def one_layer_as_two(weight_CH: torch.Tensor, bias_C: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return weights with which transformers' head (dense, GELU and out_proj) computes W x + b.

    Since GELU(z) - GELU(-z) = z, dense holds W and -W, and out_proj subtracts the GELU of the second from that of the
    first. This is as precise as W x itself, in any precision: for LayerNorm outputs of 256 and 768 random numbers, the
    largest error was 7e-7 of the largest score in fp32, 6e-4 in fp16 and 5e-3 in bf16. It uses 2 C of dense's H rows.
    """
    classes, width = weight_CH.shape
    assert 2 * classes <= width  # `why_not_exportable` ensures this
    dense_HH, out_CH = torch.zeros(width, width), torch.zeros(classes, width)
    dense_HH[:classes], dense_HH[classes : 2 * classes] = weight_CH, -weight_CH
    out_CH[:, :classes], out_CH[:, classes : 2 * classes] = torch.eye(classes), -torch.eye(classes)
    return {
        "dense.weight": dense_HH,
        "dense.bias": torch.zeros(width),
        "out_proj.weight": out_CH,
        "out_proj.bias": bias_C,
    }
