"""The micro-batch that a device has memory for, found by trying before a run begins."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.recipe import Recipe
from electra_ds.core import devices
from electra_ds.core.errors import ConfigError
from electra_ds.core.program import command
from electra_ds.core.ranks import Ranks
from electra_ds.pretraining.memory import (
    CONTEXT_BYTES,
    CPU_SHARE,
    FRAGMENTATION,
    Kernels,
)
from electra_ds.pretraining.objectives.base import Objective
from electra_ds.training.model import set_up_model


def kernels_of(device: torch.device) -> Kernels:
    return "cuda" if device.type == "cuda" else "cpu"


def free_bytes(device: torch.device, ranks: Ranks) -> int:
    """What a run may take of the device: of a GPU what is free, of the CPU's memory this rank's share of that."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + CONTEXT_BYTES  # which is there already, and needed
    return int(CPU_SHARE * psutil.virtual_memory().available / ranks.launch.local_size)


def fitting_plan(
    recipe: Recipe, vocab_size: int, plan: DeepSpeedPlan, device: torch.device, ranks: Ranks
) -> DeepSpeedPlan:
    """Return the plan with the largest micro-batch that every rank has memory for. To be called by all ranks.

    A GPU is tried. The CPU, where running out of memory kills, and ZeRO stage 3, whose ranks must run a model together,
    are computed. An objective that does not say what it needs keeps the plan's micro-batch. Raises ConfigError if not
    even one sequence fits.
    """
    objective: Objective[Any] = Objective.of(recipe, vocab_size)
    if objective.peak_memory(plan, kernels_of(device)) is None:
        return plan
    if device.type == "cuda" and plan.stage < 3:
        fitting = _tried(objective, plan, device, ranks)
    else:
        fitting = _computed(objective, plan, device, ranks)
    if fitting is None:
        raise ConfigError(
            "Not even one sequence fits into the memory that is free. Close what else uses it, shard over more cards "
            "(--ds-config zero3-offload), or add an activation_checkpointing section to the DeepSpeed JSON. "
            f"{command('plan')} shows which part takes how much."
        )
    return fitting


def _tried(objective: Objective[Any], plan: DeepSpeedPlan, device: torch.device, ranks: Ranks) -> DeepSpeedPlan | None:
    for cut in plan.batch.others():
        candidate = plan.with_micro_batch(cut.micro_batch_size)
        if all(ranks.gather(has_room(objective, candidate, device))):
            return candidate
    return None


def _computed(
    objective: Objective[Any], plan: DeepSpeedPlan, device: torch.device, ranks: Ranks
) -> DeepSpeedPlan | None:
    budget, kernels = free_bytes(device, ranks), kernels_of(device)

    def fits(size: int) -> bool:
        peak = objective.peak_memory(plan.with_micro_batch(size), kernels)
        return peak is not None and peak.needed_bytes(kernels) <= budget

    found = next((cut.micro_batch_size for cut in plan.batch.others() if fits(cut.micro_batch_size)), 0)
    size = min(ranks.gather(found))
    return plan.with_micro_batch(size) if size else None


def has_room(objective: Objective[Any], plan: DeepSpeedPlan, device: torch.device) -> bool:
    """Return whether a forward and backward pass over the plan's longest micro-batch fits next to everything else of a
    step.

    The optimizer's state, buffers and the allocator's waste are stood in for by empty tensors of their size.
    """
    try:
        _pass(objective, plan, device)
    except RuntimeError as error:
        if not devices.is_out_of_memory(error):
            raise
        return False
    finally:
        devices.release_memory(device)
    return True


def _pass(objective: Objective[Any], plan: DeepSpeedPlan, device: torch.device) -> None:
    peak = objective.peak_memory(plan, "cuda")
    micro_batch = objective.longest_micro_batch(plan.batch.micro_batch_size)
    assert peak is not None
    assert micro_batch is not None
    model = objective.build_model()
    model.to(device, set_up_model(model, plan)).train()
    elsewhere = peak.update.optimizer + peak.update.buffers + round(peak.allocated_bytes * FRAGMENTATION)
    stand_in = torch.empty(elsewhere, dtype=torch.uint8, device=device)
    for _ in range(min(2, plan.batch.gradient_accumulation_steps)):  # the second meets the gradients of the first
        output = model(micro_batch.to(device))
        torch.stack([*output.losses.values()]).sum().backward()
        del output
    torch.empty(peak.update.workspace, dtype=torch.uint8, device=device)
    del stand_in
