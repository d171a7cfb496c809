"""What a training step needs of any model: batches that can be cut, and losses as named sums.

A loss is a sum over a micro-batch, which is divided by a count over the whole global batch. So a batch may be cut into
any micro-batches, accumulation steps and ranks, and its losses stay the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch


class LossTerm(NamedTuple):
    """One of a step's losses."""

    weight: float
    """Its weight in the loss that is differentiated."""
    divisor: int
    """What its sum is divided by: the number of its terms in the global batch."""


class StepBatch(Protocol):
    """The global batch of one step, of whatever a model is trained on."""

    @property
    def loss_terms(self) -> Mapping[str, LossTerm]:
        """The step's losses by name, in the order in which they are reported."""

    @property
    def num_tokens(self) -> int:
        """The number of tokens without padding."""

    def micro_batch(self, first: int, size: int) -> Any:
        """Return examples `first` to `first + size` as something with `to(device)` that the model takes."""


class StepOutput(Protocol):
    """What a model returns for a micro-batch."""

    @property
    def losses(self) -> Mapping[str, torch.Tensor]:
        """Scalar sums over the micro-batch, by the names of the batch's `loss_terms`."""


class StepLosses:
    """The losses of a step's micro-batches, normalised over the global batch."""

    def __init__(self, terms: Mapping[str, LossTerm]) -> None:
        self._terms = terms
        self._sums: dict[str, list[torch.Tensor]] = {name: [] for name in terms}

    def add(self, output: StepOutput) -> torch.Tensor:
        """Return the micro-batch's share of the global loss, to be differentiated."""
        shares, losses = [], output.losses
        for name, term in self._terms.items():
            loss_sum = losses[name]
            self._sums[name].append(loss_sum.detach())
            shares.append(term.weight / term.divisor * loss_sum)
        share = shares[0]
        for another in shares[1:]:
            share = share + another
        return share

    def result(self, grad_norm: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the step's scalars, still on the device so that nobody waits for them.

        `loss` is the weighted sum that was differentiated, and each loss's mean stands under its own name; a term named
        `loss` is reported as its mean. All are this rank's share: the sum over ranks is that of the global batch.
        `grad_norm`, the last one, is that of all ranks together before clipping; not finite if the step was skipped.
        """
        means = {name: torch.stack(sums).sum() / self._terms[name].divisor for name, sums in self._sums.items()}
        total = None
        for name, mean in means.items():
            weighted = self._terms[name].weight * mean
            total = weighted if total is None else total + weighted
        assert total is not None
        return {"loss": total} | means | {"grad_norm": grad_norm}
