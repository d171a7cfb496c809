"""Pretraining's DeepSpeed engine, which compiles the forward pass where that pays."""

from __future__ import annotations

from typing import Any

import torch

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.recipe import Recipe
from electra_ds.config.run_record import Compile
from electra_ds.pretraining.compiled import CompiledForward, check_compile
from electra_ds.pretraining.objectives.base import PretrainingBatch
from electra_ds.training.engine import Engine
from electra_ds.training.model import AutocastModel


class PretrainingEngine(Engine):
    """The engine for any objective's model, compiled where that pays."""

    def __init__(
        self, model: AutocastModel, recipe: Recipe, plan: DeepSpeedPlan, device: torch.device, compile: Compile = "off"
    ) -> None:
        """Raises ConfigError, too, if `compile` is "on" and the device cannot compile."""
        super().__init__(model, recipe, plan, device)
        self.module: Any = self._engine.module
        self.is_compiled = check_compile(compile, device, plan)
        self._compiled = CompiledForward(self.module, plan, device, compile) if self.is_compiled else None

    def _micro_batch(self, batch: PretrainingBatch, first: int, size: int) -> Any:
        if self._compiled is None:
            return batch.micro_batch(first, size)
        return self._compiled.micro_batch(batch, first, size)

    def close(self) -> None:
        super().close()
        if self.is_compiled:
            torch.compiler.reset()  # what is compiled, and how often it may be, is the process's
