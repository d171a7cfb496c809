"""What a model is finetuned on: a task, its examples, and which sets of them there are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Kind = Literal["classification", "regression"]


@dataclass(frozen=True)
class Task:
    """What is predicted, and how it is scored and written down."""

    name: str
    """One of GLUE's in lower case, with its hyphens ("sst-2"), or the stem of the user's own file."""
    kind: Kind
    labels: tuple[str, ...]
    """The classes' names in the order of their index; empty for regression."""
    is_pair: bool
    metrics: tuple[str, ...]
    """Of `finetuning.metrics`; the first is the one that choices are made by."""
    written: tuple[str, ...] = ()
    """How each class is written in the official files and in a submission: its name, or 0 and 1."""
    submission: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The official file of predictions by the test set's name; empty for the user's own tasks."""
    score_range: tuple[float, float] | None = None
    """The lowest and highest score of a regression: the official ones, or those of the training labels."""

    def written_prediction(self, prediction: float) -> str:
        """A class index or a score as a file of predictions has it.

        Official scores are held within their range and have 3 decimals, as those of STS-B's own files.
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
    """What a row is called in the file of predictions: its number from 0, or what the file calls it."""
    texts: list[str]
    pairs: list[str] | None
    """The second text of each; None where the task has one text."""
    labels: np.ndarray | None
    """int64 class indices or float64 scores, [N]; None where they are not known."""

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Iterable[int] | np.ndarray) -> Examples:
        """These examples in this order."""
        chosen = [int(index) for index in indices]
        return Examples(
            [self.ids[index] for index in chosen],
            [self.texts[index] for index in chosen],
            None if self.pairs is None else [self.pairs[index] for index in chosen],
            None if self.labels is None else self.labels[np.array(chosen, np.int64)],
        )


@dataclass(frozen=True, eq=False)
class TaskData:
    """A task and the sets of it that were found. Made by `task_data`."""

    task: Task
    train: Examples | None
    dev: dict[str, Examples]
    """Labelled: "dev", or MNLI's "dev_matched" and "dev_mismatched"; choices are made by the first."""
    test: dict[str, Examples]
    """"test", or MNLI's "test_matched", "test_mismatched" and "ax"."""
    source: str
    """What was read, for people."""
    fingerprint: str
    """SHA-256 of the classes and of every set's texts and labels: the same wherever the files lie."""
    remarks: tuple[str, ...] = ()
    """What was passed over in reading, a sentence each."""

    def sets(self) -> dict[str, Examples]:
        """Every set by its name, the training set first."""
        return ({"train": self.train} if self.train is not None else {}) | self.dev | self.test


def task_data(
    task: Task,
    train: Examples | None,
    dev: dict[str, Examples],
    test: dict[str, Examples],
    source: str,
    remarks: Iterable[str] = (),
) -> TaskData:
    """With the fingerprint. The name of the task and the rows' ids are not part of it."""
    digest = hashlib.sha256()

    def add(*texts: str) -> None:
        for text in texts:
            encoded = text.encode("utf8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)

    add(task.kind, str(len(task.labels)), *task.labels)
    for kind, sets in (("train", {"train": train} if train is not None else {}), ("dev", dev), ("test", test)):
        for name, examples in sets.items():
            add(kind, name, str(len(examples)), *examples.texts)
            add("one text" if examples.pairs is None else "pairs", *(examples.pairs or ()))
            add("no labels" if examples.labels is None else "labels")
            if examples.labels is not None:
                digest.update(examples.labels.astype("<i8" if task.kind == "classification" else "<f8").tobytes())
    return TaskData(task, train, dev, test, source, digest.hexdigest(), tuple(remarks))
