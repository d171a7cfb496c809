"""ZeRO stages 1 to 3: DeepSpeed's optimizers, which shard state over ranks, presented as one optimizer.

DeepSpeed itself scales, clips and skips here. This module adds two things. It saves and loads the state by parameter
name, as at stage 0, so that a checkpoint fits every stage. And it lets the loss scale grow between steps: DeepSpeed
0.19.8 doubles it inside a step, after the gradients were scaled and before they are unscaled, which halves them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import distributed, nn

from electra_ds.config.deepspeed_sections import LossScaling
from electra_ds.config.sections import OptimizerSection
from electra_ds.core.compat import flat_partitions, link_moments
from electra_ds.training.optimizer import (
    FIRST_SCALE,
    MOMENTS,
    NO_SCALING,
    Rates,
    RuleOptimizer,
    adamw_state,
    counts_updates,
    parameter_groups,
    pretraining_rates,
    put_learning_rate,
    update_rule,
)

_NEVER = 2**62  # steps


def sharded_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], section: OptimizerSection, rates: Rates = pretraining_rates
) -> torch.optim.Optimizer:
    """Return the optimizer that DeepSpeed shards: the recipe's update rule or torch's AdamW, since DeepSpeed's own
    AdamW would be compiled at first start."""
    groups = parameter_groups(parameters, section.weight_decay, rates)
    rule = update_rule(section)
    if rule is not None:
        return RuleOptimizer(groups, section, rule)
    return torch.optim.AdamW(
        groups,
        lr=section.learning_rate,
        betas=(section.beta1, section.beta2),
        eps=section.epsilon,
        fused=True,
    )


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Return a context in which the parameters, which stage 3 has partitioned, are whole on every rank."""
    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([*parameters])
    return context


class ZeroAdamW:
    """Counters and state of a DeepSpeed engine's sharded AdamW, under the names of `MasterAdamW`.

    The host knows if a step overflowed, because DeepSpeed itself reads that back.
    """

    def __init__(self, engine: Any, section: OptimizerSection, scaling: LossScaling | None) -> None:
        """engine: a `DeepSpeedEngine` at stage 1, 2 or 3, around `sharded_optimizer`."""
        self._engine = engine
        self._zero = engine.optimizer
        self._stage = engine.zero_optimization_stage()
        self._scaling = scaling
        self._counts_updates = counts_updates(section)
        self.named_parameters = list(engine.module.named_parameters())
        self.taken_steps = self._skipped = self._consecutive = 0
        self.can_repeat_step = True
        # The training loop gives up with advice on what to do; DeepSpeed's scaler would raise a bare exception.
        self._zero.loss_scaler.raise_error_at_min_scale = False
        self._window = 0
        if isinstance(self._zero.loss_scaler, DynamicLossScaler):
            self._window = self._zero.loss_scaler.scale_window
            self._zero.loss_scaler.scale_window = _NEVER
        # DeepSpeed creates the moments at the first step; loading needs them now.
        for flat in flat_partitions(self._zero, self._stage):
            self._zero.optimizer.state[flat] = adamw_state(flat, bias_correction=self._counts_updates)
        link_moments(self._zero, self._stage)

    def set_learning_rate(self, rate: Callable[[int | None], float]) -> None:
        """rate: as in `put_learning_rate`."""
        put_learning_rate(self._zero.optimizer.param_groups, rate)

    def count_step(self) -> None:
        """Update the counters. Call it after every optimizer step."""
        applied = self._engine.was_step_applied()
        self.taken_steps += applied
        self._skipped += not applied
        self._consecutive = 0 if applied else self._consecutive + 1
        scaler = self._zero.loss_scaler
        if not self._window or not applied:
            return
        good = scaler.cur_iter - scaler.last_overflow_iter - 2  # since the last overflow, before this step
        if good > 0 and good % self._window == 0:
            scaler.cur_scale *= scaler.scale_factor
            scaler.cur_hysteresis = scaler.delayed_shift

    @property
    def grad_norm(self) -> torch.Tensor:
        """The gradient norm of the last step, unscaled, before clipping."""
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(float("nan") if norm is None else norm, dtype=torch.float32, device=self._engine.device)

    @property
    def loss_scale(self) -> torch.Tensor:
        return torch.tensor(float(self._zero.loss_scaler.loss_scale))

    @property
    def skipped_steps(self) -> torch.Tensor:
        return torch.tensor(float(self._skipped))

    @property
    def consecutive_skips(self) -> torch.Tensor:
        return torch.tensor(float(self._consecutive))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all parameters by name."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.named_parameters}

    def trained(self) -> set[str]:
        """Return the names of the parameters that are not frozen."""
        return {name for name, parameter in self.named_parameters if parameter.requires_grad}

    def snapshot(self, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
        """Return complete masters and moments by name in CPU memory, of the named parameters or of all.

        All ranks must call it, each with the parameters that it needs.
        """
        result: dict[str, torch.Tensor] = {}
        for name, parameter in self.named_parameters:
            if parameter.requires_grad:
                whole = {f"master/{name}": safe_get_full_fp32_param(parameter)}
                whole |= {f"{key}/{name}": safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            else:
                with self._gathered(parameter):
                    whole = {f"master/{name}": parameter.detach().to(torch.float32, copy=True)}
            if names is None or name in names:
                result |= {key: tensor.to("cpu", torch.float32) for key, tensor in whole.items()}  # they are copies
        return result

    def counters(self) -> dict[str, float]:
        """Return everything else that the next step depends on, as `MasterAdamW.counters` does."""
        scaler = self._zero.loss_scaler
        dynamic = isinstance(scaler, DynamicLossScaler)
        return {
            "taken_steps": self.taken_steps,
            "skipped_steps": self._skipped,
            "consecutive_skips": self._consecutive,
            "is_scaled": float(self._scaling is not None),
            "loss_scale": float(scaler.loss_scale),
            "good_steps": float(scaler.cur_iter - scaler.last_overflow_iter - 1) if dynamic else 0.0,
            "hysteresis_left": float(scaler.cur_hysteresis if dynamic else NO_SCALING.hysteresis),
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor], counters: Mapping[str, float]) -> None:
        """Load the results of `snapshot` and `counters` from any stage and precision, the same on every rank."""
        for name, parameter in self.named_parameters:
            if not parameter.requires_grad:
                with self._gathered(parameter, modifier_rank=0):
                    if self._stage < 3 or distributed.get_rank() == 0:
                        parameter.copy_(tensors[f"master/{name}"])
                continue
            values = {key: tensors[f"{key}/{name}"].to(self._engine.device) for key in ("master", *MOMENTS)}
            if self._stage == 3:
                self._set_partition(parameter, values)
            else:
                safe_set_full_fp32_param(parameter, values["master"])
                for key in MOMENTS:
                    safe_set_full_optimizer_state(parameter, values[key], key)
                parameter.copy_(values["master"])
        self.taken_steps = int(counters["taken_steps"])
        self._skipped, self._consecutive = int(counters["skipped_steps"]), int(counters["consecutive_skips"])
        if self._counts_updates:
            for flat in flat_partitions(self._zero, self._stage):
                self._zero.optimizer.state[flat]["step"].fill_(self.taken_steps)
        scaler = self._zero.loss_scaler
        if isinstance(scaler, DynamicLossScaler) and counters["taken_steps"] and not counters["is_scaled"]:
            scaler.cur_scale = min(scaler.cur_scale, FIRST_SCALE)
        if isinstance(scaler, DynamicLossScaler) and counters["is_scaled"]:
            scaler.cur_scale = counters["loss_scale"]
            scaler.cur_iter, scaler.last_overflow_iter = int(counters["good_steps"]), -1
            scaler.cur_hysteresis = int(counters["hysteresis_left"])

    def _gathered(self, parameter: nn.Parameter, modifier_rank: int | None = None) -> AbstractContextManager[Any]:
        """Return a context in which a parameter is complete; stage 3 otherwise keeps a slice of it on each rank."""
        if self._stage < 3:
            return contextlib.nullcontext()
        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter], modifier_rank)
        return gathered

    def _set_partition(self, parameter: nn.Parameter, values: dict[str, torch.Tensor]) -> None:
        """Set this rank's slice of a parameter at stage 3, which pads the last slices with zeros."""
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        first = size * distributed.get_rank()

        def own(whole: torch.Tensor) -> torch.Tensor:
            padded = whole.new_zeros(size * distributed.get_world_size())
            padded[: whole.numel()] = whole.flatten()
            return padded[first : first + size]

        safe_set_local_fp32_param(parameter, own(values["master"]))
        for key in MOMENTS:
            safe_set_local_optimizer_state(parameter, own(values[key]), key)
        with self._gathered(parameter, modifier_rank=0):
            if distributed.get_rank() == 0:
                parameter.copy_(values["master"])
