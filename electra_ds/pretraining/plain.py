"""A reference engine: the same step in plain PyTorch, fp32, with torch's own AdamW and clipping.

Tests compare every precision of the DeepSpeed engine with it, and benchmarks time both. It shares the model and the
batches with the DeepSpeed engine, but not the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from electra_ds.config.recipe import Recipe
from electra_ds.core import devices
from electra_ds.pretraining.objectives.base import PretrainingBatch
from electra_ds.training.optimizer import adamw_state, learning_rate_at, parameter_groups
from electra_ds.training.step import AutocastModel, StepLosses


class PlainEngine:
    """One process, one device, no mixed precision."""

    def __init__(
        self, model: AutocastModel, recipe: Recipe, micro_batch_size: int, device: torch.device, *, fused: bool = False
    ) -> None:
        """fused: use torch's fused AdamW kernel, for benchmarks; tests use the unfused one."""
        self.module = model.to(device)
        self.recipe = recipe
        self.micro_batch_size = micro_batch_size
        self.device = device
        section = recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.module.named_parameters(), section.weight_decay),
            lr=section.learning_rate,
            betas=(section.beta1, section.beta2),
            eps=section.epsilon,
            fused=fused,
        )
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = adamw_state(parameter, bias_correction=section.bias_correction)
                self.optimizer.state[parameter] = state if fused else state | {"step": state["step"].cpu()}

    def train_step(
        self, batch: PretrainingBatch, step: int, samples: Sequence[torch.Tensor] | None = None
    ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Take one optimizer step; return its result and each micro-batch's samples.

        samples: int64 [M] per micro-batch, to replay another run's samples.
        """
        self.module.train()
        learning_rate = learning_rate_at(
            step, learning_rate=self.recipe.optimizer.learning_rate, **self.recipe.schedule.model_dump()
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        losses = StepLosses(batch.loss_terms)
        drawn = []
        for index, first in enumerate(range(0, self.recipe.global_batch_size, self.micro_batch_size)):
            devices.seed_dropout(self.device, self.recipe.seed, step, index, 0)
            micro_batch = batch.micro_batch(first, self.micro_batch_size).to(self.device)
            output = self.module(micro_batch, None if samples is None else samples[index])
            losses.add(output).backward()
            drawn.append(output.samples_M)
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.recipe.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses.result(norm), drawn
