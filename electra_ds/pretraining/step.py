"""What an engine does in one optimiser step, and what it reports."""

from __future__ import annotations

from typing import NamedTuple

import torch

from electra_ds.config.recipe import Recipe
from electra_ds.pretraining.batches import GlobalBatch
from electra_ds.pretraining.electra import ElectraOutput


class StepResult(NamedTuple):
    """Scalars of one optimiser step, still on the device so that nobody waits for them.

    The losses are this rank's share: the sum over ranks is that of the global batch.
    """

    loss: torch.Tensor
    generator_loss: torch.Tensor
    discriminator_loss: torch.Tensor
    grad_norm: torch.Tensor
    """Of all ranks together, before clipping; not finite where the step was skipped."""


class StepLosses:
    """Gathers the losses of a step's micro-batches, normalised by counts over the global batch."""

    def __init__(self, recipe: Recipe, batch: GlobalBatch) -> None:
        self.generator_weight = recipe.generator.loss_weight / batch.num_selected
        self.discriminator_weight = recipe.discriminator.loss_weight / batch.num_counted
        self.recipe = recipe
        self._generator: list[torch.Tensor] = []
        self._discriminator: list[torch.Tensor] = []
        self.batch = batch

    def add(self, output: ElectraOutput) -> torch.Tensor:
        """The micro-batch's share of the global loss, to be differentiated."""
        self._generator.append(output.generator_loss_sum.detach())
        self._discriminator.append(output.discriminator_loss_sum.detach())
        return (
            self.generator_weight * output.generator_loss_sum
            + self.discriminator_weight * output.discriminator_loss_sum
        )

    def result(self, grad_norm: torch.Tensor) -> StepResult:
        generator = torch.stack(self._generator).sum() / self.batch.num_selected
        discriminator = torch.stack(self._discriminator).sum() / self.batch.num_counted
        loss = self.recipe.generator.loss_weight * generator + self.recipe.discriminator.loss_weight * discriminator
        return StepResult(loss, generator, discriminator, grad_norm)
