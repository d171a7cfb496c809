"""Any number of classes for a text or a pair, each predicted where its probability is above one half."""

from __future__ import annotations

import json
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from electra_ds.config.finetune_recipe import FinetuneRecipe
from electra_ds.config.run_record import TaskSource
from electra_ds.core.errors import DataError
from electra_ds.finetuning.heads import SequenceHead
from electra_ds.finetuning.metrics import further_metrics
from electra_ds.finetuning.own_files import PAIR_COLUMNS, TEXT_COLUMNS
from electra_ds.finetuning.own_rows import OwnRows, own_rows, row_ids, texts_of
from electra_ds.finetuning.tables import Table, listed
from electra_ds.finetuning.tasks.base import EvaluationResult, FinetuneTask, Outputs, lines_file
from electra_ds.finetuning.tasks.examples import Examples, Task, TaskData, task_data
from electra_ds.finetuning.tasks.sequence import SequenceTask

LABELS_COLUMNS = ("labels", "label", "classes", "tags")
"""If no label column is named, the first of these that the file has."""
_YES_OR_NO = {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0, "0.0": 0.0, "1.0": 1.0}


class MultiLabelHead(SequenceHead):
    """A classifier of each class on its own. Its loss is the mean over the classes of the binary cross-entropy."""

    def _loss_sum(self, logits_BC: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
        if labels is None:
            return None
        losses_BC = functional.binary_cross_entropy_with_logits(logits_BC, labels, reduction="none")
        return losses_BC.mean(-1).sum()


class MultiLabelTask(SequenceTask):
    """Several classes for a text: `--task multi-label`."""

    problem_type = "multi_label_classification"
    usage = "from transformers import pipeline; pipeline('text-classification', model='PATH', top_k=None)(['…'])"
    example = """\
from transformers import pipeline

classifier = pipeline("text-classification", model="PATH", top_k=None)
[found["label"] for found in classifier(["…"], truncation=True)[0] if found["score"] > 0.5]
"""
    outputs = "Each class has a probability of its own."
    takes = (*FinetuneTask.takes, "pair")
    possible_metrics: ClassVar[tuple[str, ...]] = ("f1_micro", "f1_macro", "accuracy")

    @classmethod
    def load(cls, source: TaskSource) -> TaskData:
        found = own_rows(source, "multi-label")
        text = found.column(source.text, TEXT_COLUMNS, "text")
        pair = source.pair
        if pair is None and source.text is None:
            pair = next((name for name in PAIR_COLUMNS if name in found.tables["train"].frame), None)
        given = [name.strip() for name in (source.label or "").split(",") if name.strip()]
        if repeated := [name for name in given if given.count(name) > 1]:
            raise DataError(f"--label names the column '{repeated[0]}' twice.")
        columns = [found.column(name, (), "label", is_label=True) for name in given]
        columns = columns or [found.column(None, LABELS_COLUMNS, "label", is_label=True)]
        held = {
            name: _held(table, columns) for name, table in found.tables.items() if found.is_labelled(name, *columns)
        }
        train = found.tables["train"].source
        labels = tuple(columns) if len(columns) > 1 else tuple(sorted({each for row in held["train"] for each in row}))
        if not labels:
            raise DataError(f"{train}: no row has a label in '{columns[0]}', so there is nothing to learn.")
        if len({frozenset(row) for row in held["train"]}) == 1:
            raise DataError(f"{train}: every row has the same classes, {listed(labels)}, so there is nothing to learn.")
        sets = {name: _examples(found, name, text, pair, labels, held.get(name)) for name in found.tables}
        task = Task(found.name, "multi-label", labels, pair is not None, cls.possible_metrics, labels)
        label = columns[0] if len(columns) == 1 else None
        return task_data(task, sets, found.read_as(text=text, pair=pair, label=label))

    @classmethod
    def make_head(cls, recipe: FinetuneRecipe, hidden_size: int, num_outputs: int | None) -> nn.Module:
        assert num_outputs is not None
        return MultiLabelHead(recipe.head, hidden_size, num_outputs, is_regression=False)

    def class_shares(self) -> np.ndarray | None:
        return None

    def evaluate(self, name: str, outputs: Outputs) -> EvaluationResult:
        examples = self._sets[name]
        logits_NC = np.stack([row["logits"] for row in outputs])
        predicted_NC = logits_NC > 0
        lines = []
        for row, identity in enumerate(examples.ids):
            line: dict[str, Any] = {"id": identity, "prediction": self._of(predicted_NC[row])}
            line["logits"] = logits_NC[row].tolist()
            if examples.labels is not None:
                line["label"] = self._of(examples.labels[row] > 0)
            lines.append(json.dumps(line, ensure_ascii=False))
        files = {f"predictions/{name}.jsonl": lines_file(lines)}
        if examples.labels is None:
            return EvaluationResult(len(examples), files=files)
        truth_NC = examples.labels > 0
        best_C = constant_answer(truth_NC)
        constant_NC = np.broadcast_to(best_C, truth_NC.shape)
        more = partial(further_metrics, self._recipe.metrics, self.labels, truth_NC)
        metrics = scores(truth_NC, predicted_NC) | more(predicted_NC)
        baseline = scores(truth_NC, constant_NC) | more(constant_NC)
        differ = bool((truth_NC != truth_NC[0]).any())
        is_constant = differ and bool((predicted_NC == predicted_NC[0]).all())
        return EvaluationResult(
            len(examples),
            metrics,
            baseline,
            self._answer(best_C),
            self._answer(predicted_NC[0]) if is_constant else None,
            is_beaten=differ and metrics["f1_micro"] <= baseline["f1_micro"],
            details={"labels": list(self.labels)},
            files=files,
        )

    def _of(self, is_held_C: np.ndarray) -> list[str]:
        return [label for label, is_held in zip(self.labels, is_held_C, strict=True) if is_held]

    def _answer(self, is_held_C: np.ndarray) -> str:
        return listed(self._of(is_held_C)) or "no class"


def scores(truth_NC: np.ndarray, predicted_NC: np.ndarray) -> dict[str, float]:
    """Return F1 over all decisions, the mean of the classes' F1, and the share of rows whose classes are all right."""
    # Imported here, because it takes seconds that would delay a run's first step.
    from sklearn.metrics import accuracy_score, f1_score

    truth, predicted = truth_NC.astype(int), predicted_NC.astype(int)
    if truth.shape[1] == 1:  # scikit-learn would take it for a classification of two classes
        truth, predicted = (np.concatenate([each, np.zeros_like(each)], 1) for each in (truth, predicted))
        macro = float(f1_score(truth[:, 0], predicted[:, 0], zero_division=0))
    else:
        macro = float(f1_score(truth, predicted, average="macro", zero_division=0))
    micro = float(f1_score(truth, predicted, average="micro", zero_division=0))
    return {"f1_micro": micro, "f1_macro": macro, "accuracy": float(accuracy_score(truth, predicted))}


def constant_answer(truth_NC: np.ndarray) -> np.ndarray:
    """Return bool [C], the classes that, predicted for every row, have the highest F1 over all decisions."""
    order = np.argsort(-truth_NC.sum(0), kind="stable")
    right = np.cumsum(truth_NC.sum(0)[order])
    f1 = 2 * right / (len(truth_NC) * np.arange(1, len(order) + 1) + truth_NC.sum())
    answer = np.zeros(len(order), bool)
    answer[order[: int(f1.argmax()) + 1]] = True
    return answer


def _held(table: Table, columns: list[str]) -> list[tuple[str, ...]]:
    """Return the classes of each row, from one column of lists or from a column of 0 and 1 for each class."""
    if len(columns) > 1:
        values = {column: [value.strip().lower() for value in table.column(column)] for column in columns}
        for column, of_rows in values.items():
            for row, value in enumerate(of_rows):
                if value not in _YES_OR_NO:
                    raise DataError(
                        f"{table.source}, row {row + 1}: '{column}' is '{value}'. With several --label columns, each "
                        f"value must be 0 or 1."
                    )
        return [
            tuple(column for column in columns if _YES_OR_NO[values[column][row]]) for row in range(len(table.frame))
        ]
    (column,) = columns
    found: list[tuple[str, ...]] = []
    for row, value in enumerate(table.frame[column]):
        if isinstance(value, str) and not value.lstrip().startswith("["):  # of a CSV file
            found.append(tuple(part.strip() for part in value.split(",") if part.strip()))
        else:
            found.append(texts_of(table, row, column, value))
    if {each.lower() for row in found for each in row} <= _YES_OR_NO.keys() and any(found):
        raise DataError(
            f"{table.source}: '{column}' has only the values 0 and 1. Name one column for each class with --label "
            f"first,second,…, or give a column with a list of each row's class names."
        )
    return found


def _examples(
    found: OwnRows, name: str, text: str, pair: str | None, labels: tuple[str, ...], held: list[tuple[str, ...]] | None
) -> Examples:
    table = found.tables[name]
    matrix_NC: np.ndarray | None = None
    if held is not None:
        places = {label: place for place, label in enumerate(labels)}
        matrix_NC = np.zeros((len(held), len(labels)), np.float32)
        for row, classes in enumerate(held):
            for each in classes:
                if each not in places:
                    raise DataError(
                        f"{table.source}, row {row + 1}: the class '{each}' is not one of the training file's, "
                        f"{listed(labels)}. Correct or drop the row."
                    )
                matrix_NC[row, places[each]] = 1
    return Examples(row_ids(table), found.texts(name, text), found.texts(name, pair) if pair else None, matrix_NC)
