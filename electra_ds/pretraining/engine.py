"""Pretraining's DeepSpeed engine, which compiles the forward pass where that pays."""

from __future__ import annotations

from functools import partial

import torch

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.recipe import Recipe
from electra_ds.config.run_record import Compile
from electra_ds.pretraining.batches import GlobalBatch
from electra_ds.pretraining.compiled import CompiledForward, check_compile
from electra_ds.pretraining.electra import Electra
from electra_ds.pretraining.microbatch import MicroBatch
from electra_ds.pretraining.step import StepLosses
from electra_ds.training.engine import Engine


class PretrainingEngine(Engine):
    """Of pretraining: generator and discriminator together, compiled where that pays."""

    def __init__(
        self, model: Electra, recipe: Recipe, plan: DeepSpeedPlan, device: torch.device, compile: Compile = "off"
    ) -> None:
        """Raises ConfigError, too, where the device cannot compile and must."""
        super().__init__(model, recipe, plan, device, partial(StepLosses, recipe))
        self.module: Electra = self._engine.module
        self.is_compiled = check_compile(compile, device, plan)
        self._compiled = CompiledForward(self.module, recipe, plan, device, compile) if self.is_compiled else None

    def _micro_batch(self, batch: GlobalBatch, first: int, size: int) -> MicroBatch:
        if self._compiled is None:
            return batch.micro_batch(first, size)
        return self._compiled.micro_batch(batch, first, size)

    def close(self) -> None:
        super().close()
        if self.is_compiled:
            torch.compiler.reset()  # what is compiled, and how often it may be, is the process's
