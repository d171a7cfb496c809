"""Pretraining's DeepSpeed engine, which compiles the forward pass if that makes it faster.

A compiled forward pass has one shape with padding and one without, which an objective's batch provides for full or
nearly full rows (`PretrainingBatch.static_micro_batch`). Everything else (packed short sequences, evaluation, replayed
draws) runs uncompiled.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch

from electra_ds.config.cards import TRITON_CAPABILITY
from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.plugins import find_objective
from electra_ds.config.recipe import Recipe
from electra_ds.config.run_record import Compile
from electra_ds.core import devices
from electra_ds.core.compat import compiler_error
from electra_ds.core.errors import ConfigError
from electra_ds.pretraining.objectives.base import PretrainingBatch
from electra_ds.training.engine import Engine
from electra_ds.training.step import AutocastModel

_GRAPH_MEMORY_BYTES = 15 * 10**9  # cards of 16 GB and more
_log = logging.getLogger(__name__)


def check_compile(wanted: Compile, device: torch.device, plan: DeepSpeedPlan) -> bool:
    """Return whether to compile. Raises ConfigError if compiling is required but impossible."""
    if wanted == "off":
        return False
    obstacle = _obstacle(device, plan)
    if wanted == "on" and obstacle is not None:
        raise ConfigError(f"--compile on is not possible: {obstacle}. Leave it at auto.")
    return obstacle is None and (wanted == "on" or device.type == "cuda")  # no faster on a CPU (docs/experiments.md)


def _obstacle(device: torch.device, plan: DeepSpeedPlan) -> str | None:
    """Return why a plan cannot be compiled for a device; None if it can."""
    if plan.stage == 3:
        return "ZeRO stage 3 gathers weights in hooks, which a compiled forward pass does not call"
    if plan.checkpointed_layers:
        return "layers with activation_checkpointing are not compiled"
    if device.type == "cpu":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < TRITON_CAPABILITY:
        return f"Triton needs compute capability 7.0, and this card has {capability[0]}.{capability[1]}"
    return "Triton is not installed" if importlib.util.find_spec("triton") is None else None


class CompiledForward:
    """Replaces a model's `run`, and uses the compiled version for micro-batches with the compiled shape."""

    def __init__(self, model: AutocastModel, plan: DeepSpeedPlan, device: torch.device, wanted: Compile):
        self._eager = model.run
        mode = "reduce-overhead" if _has_graphs(device, plan) else "default"
        self._compiled: Callable[..., Any] | None = torch.compile(model.run, dynamic=False, fullgraph=True, mode=mode)
        self._must = wanted == "on"
        model.run = self  # type: ignore[method-assign]

    def micro_batch(self, batch: PretrainingBatch, first: int, size: int) -> Any:
        """Return sequences `first` to `first + size`, in the compiled shape if the batch has it."""
        static = None if self._compiled is None else batch.static_micro_batch(first, size)
        return batch.micro_batch(first, size) if static is None else static

    def __call__(self, batch: Any, replayed: Any) -> Any:
        is_static = getattr(batch, "is_static", False)
        if self._compiled is None or not is_static or replayed is not None or not torch.is_grad_enabled():
            return self._eager(batch, replayed)
        torch.compiler.cudagraph_mark_step_begin()
        try:
            return self._compiled(batch, None)
        except compiler_error() as error:
            inner = getattr(error, "inner_exception", None)
            if inner is not None and devices.is_out_of_memory(inner):
                raise inner from error
            if self._must:
                raise ConfigError(f"torch.compile failed; leave out --compile on. Its message: {error}") from error
            _log.warning("torch.compile failed, so the run continues without it: %s", error)
            self._compiled = None
            return self._eager(batch, None)


def _has_graphs(device: torch.device, plan: DeepSpeedPlan) -> bool:
    """Return whether to use CUDA graphs.

    They need one micro-batch per step and our own optimizer, since the next replay overwrites the gradients' memory,
    and room for a micro-batch of another shape next to the graph.
    """
    if device.type != "cuda" or plan.stage > 0 or plan.batch.gradient_accumulation_steps > 1:
        return False
    return torch.cuda.get_device_properties(device).total_memory >= _GRAPH_MEMORY_BYTES


class PretrainingEngine(Engine):
    """The engine for any objective's model, compiled if that makes it faster."""

    def __init__(
        self, model: AutocastModel, recipe: Recipe, plan: DeepSpeedPlan, device: torch.device, compile: Compile = "off"
    ) -> None:
        """Raises ConfigError also if `compile` is "on" and the device cannot compile."""
        super().__init__(model, recipe, plan, device, find_objective(recipe.objective).rates(recipe))
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
            torch.compiler.reset()  # compiled code and the limit on recompilations belong to the process
