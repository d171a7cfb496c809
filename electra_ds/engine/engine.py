"""The one module that imports deepspeed: the joint step through a DeepSpeed engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig

from electra_ds import runtime
from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.recipe import Recipe
from electra_ds.data.batches import GlobalBatch
from electra_ds.engine.optimizer import MasterAdamW
from electra_ds.engine.step import StepLosses, StepResult
from electra_ds.errors import ConfigError
from electra_ds.model.electra import Electra
from electra_ds.objective.schedule import linear_warmup_decay

_WEIGHTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
_AUTOCAST = {"autocast-fp16": torch.float16, "autocast-bf16": torch.bfloat16}


class DeepSpeedEngine:
    """ZeRO stage 0 in any precision. Needs an initialised process group (`runtime.process_group`)."""

    def __init__(self, model: Electra, recipe: Recipe, plan: DeepSpeedPlan, device: torch.device) -> None:
        """Raises ConfigError where the device cannot run the plan's precision."""
        self.recipe = recipe
        self.plan = plan
        self.device = device
        check_plan(plan, device, "the DeepSpeed JSON")
        model.autocast_dtype = _AUTOCAST.get(plan.precision.name)
        model.to(device=device, dtype=_WEIGHTS.get(plan.precision.name, torch.float32))
        self.optimizer = MasterAdamW(model.named_parameters(), recipe.optimizer, plan.precision.loss_scaling)
        # On a CPU DeepSpeed would compile a shared-memory collective with ninja and g++ at every first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=plan.engine_config(), dist_init_required=False
        )
        self.module: Electra = self._engine.module

    def train_step(self, batch: GlobalBatch, step: int, samples: Sequence[torch.Tensor] | None = None) -> StepResult:
        """One optimiser step over this rank's micro-batches.

        Losses are sums divided by counts over the global batch, so DeepSpeed's own division by the
        accumulation steps is switched off. samples: int64 [M] per micro-batch, to replay another run's.
        """
        self._engine.train()
        self.optimizer.set_learning_rate(
            linear_warmup_decay(
                step, learning_rate=self.recipe.optimizer.learning_rate, **self.recipe.schedule.model_dump()
            )
        )
        losses = StepLosses(self.recipe, batch)
        size = self.plan.batch.micro_batch_size
        for index in range(self.plan.batch.gradient_accumulation_steps):
            runtime.seed_dropout(self.recipe.seed, step, index, 0)
            micro_batch = batch.micro_batch(index * size, size).to(self.device)
            output = self._engine(micro_batch, None if samples is None else samples[index])
            loss = losses.add(output) * self.optimizer.loss_scale
            self._engine.backward(loss, scale_wrt_gas=False)
            self._engine.step()
        return losses.result(self.optimizer.grad_norm)

    def close(self) -> None:
        """Frees what DeepSpeed holds, so that the process ends quietly."""
        self._engine.destroy()


def check_plan(plan: DeepSpeedPlan, device: torch.device, source: str) -> None:
    """ConfigError where the device cannot train in the plan's precision, or DeepSpeed refuses the JSON."""
    name = plan.precision.name
    if name == "fp16" and device.type == "cpu" and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            "fp16 needs a GPU, and this machine has none that torch can use. "
            "On a CPU take ds_configs/cpu.json, or bf16 in its place."
        )
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(f"{runtime.device_name(device)} has no bf16. Use fp16, as in ds_configs/gtx1060-6gb.json.")
    for document in (plan.document, plan.engine_config()):
        try:
            DeepSpeedConfig(document)
        except Exception as error:  # pydantic's, its own and plain assertions
            raise ConfigError(f"DeepSpeed refuses {source}: {error}") from error
