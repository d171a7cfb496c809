"""The losses of one step of finetuning, and what an engine reports of it.

Separate from `pretraining.step`, since its imports take seconds that a pretraining need not wait for.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from electra_ds.finetuning.heads import TaskOutput
from electra_ds.finetuning.inputs import TaskBatch


class TaskStepResult(NamedTuple):
    """Scalars of one step of finetuning, still on the device."""

    loss: torch.Tensor
    """Mean over the global batch; this rank's share of it."""
    grad_norm: torch.Tensor
    """See `StepResult`."""


class TaskLosses:
    """A step's losses over its examples: differentiated as their mean or sum, reported as their mean."""

    def __init__(self, reduction: Literal["mean", "sum"], batch: TaskBatch) -> None:
        self._size = len(batch)
        self._divisor = self._size if reduction == "mean" else 1
        self._sums: list[torch.Tensor] = []

    def add(self, output: TaskOutput) -> torch.Tensor:
        assert output.loss_sum is not None
        self._sums.append(output.loss_sum.detach())
        return output.loss_sum / self._divisor

    def result(self, grad_norm: torch.Tensor) -> TaskStepResult:
        return TaskStepResult(torch.stack(self._sums).sum() / self._size, grad_norm)
