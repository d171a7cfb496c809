"""torch.compile and CUDA graphs for the joint forward, where the device has use for them.

A compiled forward has one shape. Unpadded micro-batches differ in their number of selected positions alone, so those
are filled up to a number that practically none exceeds; whatever has another shape (packed rows, evaluation, replayed
samples, the micro-batch in a billion with more) runs as it is written.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.manifest import Compile
from electra_ds.config.recipe import Recipe
from electra_ds.errors import ConfigError
from electra_ds.model.electra import Electra
from electra_ds.objective.masking import usual_most_selected
from electra_ds.objective.microbatch import MicroBatch

_OLDEST_CAPABILITY = (7, 0)  # Triton's
_log = logging.getLogger(__name__)


def obstacle(device: torch.device, plan: DeepSpeedPlan) -> str | None:
    """Why a run is better not compiled here; None where it is."""
    if plan.stage == 3:
        return "ZeRO stage 3 gathers weights in hooks, which a compiled forward does not call"
    if device.type == "cpu":
        return "on a CPU it is no faster (docs/experiments.md)"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        return f"Triton needs compute capability 7.0, and this card has {capability[0]}.{capability[1]}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def check_compile(wanted: Compile, device: torch.device, plan: DeepSpeedPlan) -> bool:
    """Whether to compile. Raises ConfigError where that was asked for and cannot be."""
    reason = None if wanted == "off" else obstacle(device, plan)
    if wanted == "on" and reason is not None and device.type != "cpu":
        raise ConfigError(f"--compile on cannot be done: {reason}. Leave it at auto.")
    if wanted == "on" and plan.stage == 3:
        raise ConfigError(f"--compile on cannot be done: {reason}. Leave it at auto.")
    return wanted == "on" or (wanted == "auto" and reason is None)


class CompiledForward:
    """Takes the place of a model's forward where a micro-batch has the one shape.

    CUDA graphs are used with a single micro-batch a step: with more, gradients would live on in memory that the next
    replay writes to.
    """

    def __init__(self, model: Electra, recipe: Recipe, plan: DeepSpeedPlan, device: torch.device, wanted: Compile):
        self._eager = model.run
        with_graphs = device.type == "cuda" and plan.batch.gradient_accumulation_steps == 1
        self._compiled: Callable[..., Any] | None = torch.compile(
            model.run, dynamic=False, fullgraph=True, mode="reduce-overhead" if with_graphs else "default"
        )
        self._must = wanted == "on"
        self._most_selected = usual_most_selected(
            plan.batch.micro_batch_size,
            recipe.data.sequence_length,
            mlm_probability=recipe.masking.mlm_probability,
            count=recipe.masking.count,
        )
        model.run = self  # type: ignore[method-assign]

    def prepared(self, micro_batch: MicroBatch) -> MicroBatch:
        """The micro-batch filled up to the one shape, or as it is where it has another."""
        fits = micro_batch.sequences_BT is None and len(micro_batch.selected_M) <= self._most_selected
        return micro_batch.filled(self._most_selected) if fits and self._compiled is not None else micro_batch

    def __call__(self, batch: MicroBatch, samples_M: torch.Tensor | None) -> Any:
        if self._compiled is None or batch.counts_M is None or samples_M is not None or not torch.is_grad_enabled():
            return self._eager(batch, samples_M)
        torch.compiler.cudagraph_mark_step_begin()
        try:
            return self._compiled(batch, None)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of dynamo, inductor, Triton or the C++ compiler
            if self._must:
                raise ConfigError(f"torch.compile failed; leave out --compile on. It says: {error}") from error
            _log.warning("torch.compile failed, so the run goes on without it: %s", error)
            self._compiled = None
            return self._eager(batch, None)
