"""What an engine needs of any model's batches and losses."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class StepBatch(Protocol):
    """The global batch of one step, of whatever a model is trained on."""

    def micro_batch(self, first: int, size: int) -> Any:
        """Examples `first` to `first + size`, as something with `to(device)` that the model takes."""


class Losses(Protocol):
    """Gathers the losses of a step's micro-batches, normalised over the global batch."""

    def add(self, output: Any) -> torch.Tensor:
        """The micro-batch's share of the global loss, to be differentiated."""

    def result(self, grad_norm: torch.Tensor) -> Any:
        """Scalars of the step, still on the device, by name: losses, of which this rank has a share, and the norm."""
