"""Training steps with a DeepSpeed engine, at every ZeRO stage and precision, for any model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from torch import distributed
from torch.nn import functional

from electra_ds.config.cards import has_slow_fp16
from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.sections import TrainingRecipe
from electra_ds.core import devices
from electra_ds.core.compat import clear_stage3_caches, import_muon, leave_out_shared_memory_collective
from electra_ds.core.errors import ConfigError
from electra_ds.training.optimizer import MasterAdamW, Rates, learning_rate_at, pretraining_rates
from electra_ds.training.step import StepBatch, StepLosses, TrainableModel, set_up_model
from electra_ds.training.zero import ZeroAdamW, sharded_optimizer

leave_out_shared_memory_collective()
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# Stage 3 replaces it with its own for the rest of the process's life.
_TORCH_LINEAR = functional.linear


class Engine:
    """One rank's engine. Needs an initialised process group (`join_ranks`).

    At stage 0 our `MasterAdamW` owns precision, loss scale and clipping; at stages 1 to 3 DeepSpeed does.
    """

    def __init__(
        self,
        model: TrainableModel,
        recipe: TrainingRecipe,
        plan: DeepSpeedPlan,
        device: torch.device,
        rates: Rates = pretraining_rates,
    ) -> None:
        """Raises ConfigError if the device cannot run the plan's precision."""
        self.recipe = recipe
        self.plan = plan
        self.device = device
        self.rank = distributed.get_rank()
        check_plan(plan, device, "the DeepSpeed JSON")
        dtype = set_up_model(model, plan)
        model.to(device)
        optimizer: torch.optim.Optimizer
        if plan.stage == 0:
            model.to(dtype=dtype)
            optimizer = MasterAdamW(model.named_parameters(), recipe.optimizer, plan.precision.loss_scaling, rates)
        else:
            import_muon()
            optimizer = sharded_optimizer(model.named_parameters(), recipe.optimizer, rates)
            if any(group["clipped_to"] is not None for group in optimizer.param_groups):
                raise ConfigError(
                    f"A max_grad_norm for a part of the model needs ZeRO stage 0, but the DeepSpeed JSON has stage "
                    f"{plan.stage}, where DeepSpeed clips all gradients together. Use stage 0, or leave it out."
                )
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=plan.engine_config(), dist_init_required=False
        )
        if plan.stage == 0 and plan.batch.world_size == 1:
            # DeepSpeed would flatten all gradients, "sum" them over the single rank, and copy each of them back.
            self._engine.enable_backward_allreduce = False
        self.optimizer: MasterAdamW | ZeroAdamW = (
            optimizer
            if isinstance(optimizer, MasterAdamW)
            else ZeroAdamW(self._engine, recipe.optimizer, plan.precision.loss_scaling)
        )
        # Losses are normalised over the global batch, so gradients are summed over ranks; stage 3 can only average.
        self._loss_factor = plan.batch.world_size if plan.stage == 3 else 1

    def learning_rate(self, step: int, total_steps: int | None = None) -> float:
        """Return the learning rate of a step, counted from 0, before any parameter's own scale.

        total_steps: the step at which it reaches 0; None for the recipe's.
        """
        schedule = self.recipe.schedule.model_dump() | ({} if total_steps is None else {"total_steps": total_steps})
        return learning_rate_at(step, learning_rate=self.recipe.optimizer.learning_rate, **schedule)

    def train_step(self, batch: StepBatch, step: int, samples: Sequence[Any] | None = None) -> dict[str, torch.Tensor]:
        """Take one optimizer step over this rank's micro-batches; return its scalars, as in `StepLosses.result`.

        Losses are sums divided by counts over the global batch, so DeepSpeed's own division by the
        accumulation steps is switched off. samples: another run's random draws for each micro-batch, to replay them.
        """
        self._engine.train()
        self.optimizer.can_repeat_step = True
        self.optimizer.set_learning_rate(partial(self.learning_rate, step))
        losses = StepLosses(batch.loss_terms)
        size, accumulation = self.plan.batch.micro_batch_size, self.plan.batch.gradient_accumulation_steps
        for index in range(accumulation):
            devices.seed_dropout(self.device, self.recipe.seed, step, index, self.rank)
            first = (self.rank * accumulation + index) * size
            if samples is None:
                output = self._engine(self._micro_batch(batch, first, size).to(self.device))
            else:
                output = self._engine(batch.micro_batch(first, size).to(self.device), samples[index])
            loss = losses.add(output) * self._loss_factor
            if isinstance(self.optimizer, MasterAdamW):
                loss = loss * self.optimizer.loss_scale
            self._engine.backward(loss, scale_wrt_gas=False)
            if isinstance(self.optimizer, ZeroAdamW):
                self.optimizer.can_repeat_step = index < accumulation - 1  # the last call updates the weights
            self._engine.step()
        if isinstance(self.optimizer, ZeroAdamW):
            self.optimizer.count_step()
        return losses.result(self.optimizer.grad_norm)

    def _micro_batch(self, batch: Any, first: int, size: int) -> Any:
        return batch.micro_batch(first, size)

    @torch.no_grad()
    def evaluate(self, micro_batch: Any) -> Any:
        """Return the model's output without dropout or gradients. At stage 3 all ranks must call it together."""
        self._engine.eval()
        return self._engine(micro_batch.to(self.device))

    def close(self) -> None:
        """Free what DeepSpeed holds, so that the process can exit cleanly or continue."""
        close_deepspeed(self._engine)


def close_deepspeed(engine: Any) -> None:
    """Free what a `DeepSpeedEngine` holds, and undo what stage 3 changed in the process."""
    engine.destroy()
    functional.linear = _TORCH_LINEAR
    clear_stage3_caches()


def wants_fp16(device: torch.device) -> bool:
    """Return whether a JSON that leaves the precision open gets fp16: on every GPU except those that it slows down."""
    return device.type == "cuda" and not has_slow_fp16(devices.device_name(device))


def has_bf16(device: torch.device) -> bool:
    """Return whether the hardware multiplies bf16 matrices. Other hardware emulates bf16, if it works at all."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check_plan(plan: DeepSpeedPlan, device: torch.device, source: str, unused_gpu: str = "") -> None:
    """Raise ConfigError if the device cannot train in the plan's precision, or DeepSpeed rejects the JSON.

    unused_gpu: a sentence that explains why torch cannot use this machine's GPU, if that is so.
    """
    name = plan.precision.name
    if name == "fp16" and device.type == "cpu" and not get_accelerator().is_fp16_supported():
        reason = f" {unused_gpu}." if unused_gpu else ""
        raise ConfigError(
            f"fp16 needs a GPU, and this machine has none that torch can use.{reason} "
            "On a CPU, use ds_configs/cpu.json, or bf16 instead of fp16."
        )
    if name == "bf16" and device.type == "cuda" and not has_bf16(device):
        instead = "fp16, as in ds_configs/gtx1060-6gb.json" if wants_fp16(device) else "fp32"
        raise ConfigError(f"{devices.device_name(device)} has no bf16. Use {instead}.")
    if distributed.is_initialized():
        deepspeed.init_distributed(dist_init_required=False)  # DeepSpeedConfig asks it for the number of ranks
    for document in (plan.document, plan.engine_config()):
        try:
            DeepSpeedConfig(document)
        except Exception as error:  # pydantic's errors, DeepSpeed's own, and plain assertions
            raise ConfigError(f"DeepSpeed rejects {source}: {error}") from error
