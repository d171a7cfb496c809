"""What every finetuning task has: inputs for a model, and scores and predictions from the model's outputs."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from electra_ds.core.keyed_random import permutation_at
from electra_ds.finetuning.inputs import TaskInputs

_PART = 0xF2
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


def chosen(count: int, max_train: int | None, seed: int) -> list[int]:
    """Return the indices of the examples to train on, of `count`. If not all are used, the seed chooses."""
    if max_train is None or max_train >= count:
        return list(range(count))
    return [int(index) for index in permutation_at(np.arange(max_train), count, seed, _PART)]


def json_file(values: Mapping[str, Any]) -> bytes:
    return lines_file([json.dumps(values, ensure_ascii=False, indent=1)])


def lines_file(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
