"""The examples of a classification or a regression: a text or a pair, and a class or a score."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from electra_ds.finetuning.tables import listed

Kind = Literal["classification", "regression", "multi-label"]


@dataclass(frozen=True)
class Task:
    """The definition of a task: what is predicted, how it is scored, and how predictions are written."""

    name: str
    """A GLUE task's name in lower case, with hyphens ("sst-2"), or the stem of the user's own file."""
    kind: Kind
    labels: tuple[str, ...]
    """The names of the classes, in the order of their indices; empty for regression."""
    is_pair: bool
    metrics: tuple[str, ...]
    """Names from `finetuning.metrics`. The first decides which evaluation is best."""
    written: tuple[str, ...] = ()
    """The spelling of each class in the official files and in a submission: its name, or 0 and 1."""
    submission: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The official file of predictions for each test set, by its name; empty for the user's own tasks."""
    score_range: tuple[float, float] | None = None
    """The lowest and highest score of a regression, from the official range or the training labels."""

    def written_prediction(self, prediction: float) -> str:
        """Return a class index or a score as a file of predictions spells it.

        Official scores are clipped to their range and have 3 decimals, as in STS-B's own files.
        """
        if self.kind == "classification":
            return self.written[int(prediction)]
        if self.submission and self.score_range:
            low, high = self.score_range
            return f"{min(max(float(prediction), low), high):.3f}"
        return f"{float(prediction):.6g}"


@dataclass(frozen=True, eq=False)
class Examples:
    """N examples of one set, in the order of the file."""

    ids: list[str]
    """The name of each row in the file of predictions: its id in the file, or its number from 0."""
    texts: list[str]
    pairs: list[str] | None
    """The second text of each example; None if the task has only one text."""
    labels: np.ndarray | None
    """int64 class indices or float64 scores, [N]; float32 [N, C] where several classes may hold, 1 for those that do;
    None if they are not known."""

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Iterable[int] | np.ndarray) -> Examples:
        """Return these examples in this order."""
        chosen = [int(index) for index in indices]
        return Examples(
            [self.ids[index] for index in chosen],
            [self.texts[index] for index in chosen],
            None if self.pairs is None else [self.pairs[index] for index in chosen],
            None if self.labels is None else self.labels[np.array(chosen, np.int64)],
        )


@dataclass(frozen=True, eq=False)
class TaskData:
    """A task and the sets of it that were found. `task_data` makes it."""

    task: Task
    sets: dict[str, Examples]
    """The sets by name, in this order, of which train and dev are labelled.

    "train"; "dev", or MNLI's "dev_matched" and "dev_mismatched", the first of which decides which evaluation is best;
    "test", or MNLI's "test_matched", "test_mismatched" and "ax".
    """
    source: str
    """The files or the data set that was read, for messages."""
    fingerprint: str
    """The SHA-256 of the classes and of every set's texts and labels, independent of the place of the files."""
    notes: tuple[str, ...] = ()
    """Notes for the user that are not errors, one sentence each."""

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def labels(self) -> tuple[str, ...]:
        return self.task.labels

    @property
    def sizes(self) -> Mapping[str, int]:
        """The number of examples of each set."""
        return {name: len(examples) for name, examples in self.sets.items()}

    @property
    def train(self) -> Examples | None:
        return self.sets.get("train")

    @property
    def dev(self) -> dict[str, Examples]:
        return {name: examples for name, examples in self.sets.items() if kind_of_set(name) == "dev"}

    @property
    def test(self) -> dict[str, Examples]:
        return {name: examples for name, examples in self.sets.items() if kind_of_set(name) == "test"}


def kind_of_set(name: str) -> str:
    """Return train, dev or test."""
    return "test" if name == "ax" else name.partition("_")[0]


def task_data(task: Task, sets: dict[str, Examples], source: str, notes: Iterable[str] = ()) -> TaskData:
    """Return the data with its fingerprint, and with notes on classes that a set lacks.

    The fingerprint does not include the task's name and the rows' ids.
    """
    digest = hashlib.sha256()

    def add(*texts: str) -> None:
        for text in texts:
            encoded = text.encode("utf8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)

    add(task.kind, str(len(task.labels)), *task.labels)
    for name, examples in sets.items():
        add(kind_of_set(name), name, str(len(examples)), *examples.texts)
        add("one text" if examples.pairs is None else "pairs", *(examples.pairs or ()))
        add("no labels" if examples.labels is None else "labels")
        if examples.labels is not None:
            digest.update(examples.labels.astype("<i8" if task.kind == "classification" else "<f8").tobytes())
    return TaskData(task, sets, source, digest.hexdigest(), (*notes, *_missing_classes(task, sets)))


def _missing_classes(task: Task, sets: dict[str, Examples]) -> Iterable[str]:
    """Yield a sentence for each train or dev set that lacks classes."""
    for name, examples in sets.items():
        if kind_of_set(name) == "test" or examples.labels is None:
            continue
        there = np.flatnonzero(examples.labels.sum(0)) if task.kind == "multi-label" else examples.labels
        if len(missing := np.setdiff1d(np.arange(len(task.labels)), there)):
            effect = "it will not be predicted" if name == "train" else "its scores say nothing about it"
            yield f"No example of {name} has the label {listed([task.labels[i] for i in missing])}: {effect}."
