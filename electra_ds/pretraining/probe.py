"""The micro-batch that a device has memory for, found by trying before a run begins."""

from __future__ import annotations

import psutil
import torch

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.recipe import Recipe
from electra_ds.core import devices
from electra_ds.core.errors import ConfigError
from electra_ds.core.program import command
from electra_ds.core.ranks import Ranks
from electra_ds.pretraining.electra import Electra
from electra_ds.pretraining.masking import usual_most_selected
from electra_ds.pretraining.memory import (
    CONTEXT_BYTES,
    CPU_SHARE,
    FRAGMENTATION,
    Kernels,
    largest_micro_batch,
    peak_memory,
)
from electra_ds.pretraining.microbatch import MicroBatch
from electra_ds.training.precision import set_up_model


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
    """The plan with the largest micro-batch that every rank has memory for. To be called by all ranks.

    A GPU is tried. The CPU, where running out of memory kills, and ZeRO stage 3, whose ranks must run a model together,
    are computed. Raises ConfigError if not even one sequence fits.
    """
    if device.type == "cuda" and plan.stage < 3:
        fitting = _tried(recipe, vocab_size, plan, device, ranks)
    else:
        fitting = _computed(recipe, vocab_size, plan, device, ranks)
    if fitting is None:
        raise ConfigError(
            "Not even one sequence fits into the memory that is free. Close what else uses it, shard over more cards "
            "(--ds-config zero3-offload), or add an activation_checkpointing section to the DeepSpeed JSON. "
            f"{command('plan')} shows which part takes how much."
        )
    return fitting


def _tried(
    recipe: Recipe, vocab_size: int, plan: DeepSpeedPlan, device: torch.device, ranks: Ranks
) -> DeepSpeedPlan | None:
    for cut in plan.batch.others():
        candidate = plan.with_micro_batch(cut.micro_batch_size)
        if all(ranks.gather(has_room(recipe, vocab_size, candidate, device))):
            return candidate
    return None


def _computed(
    recipe: Recipe, vocab_size: int, plan: DeepSpeedPlan, device: torch.device, ranks: Ranks
) -> DeepSpeedPlan | None:
    budget, kernels = free_bytes(device, ranks), kernels_of(device)
    found = largest_micro_batch(recipe, vocab_size, plan, budget, kernels)
    size = min(ranks.gather(found.batch.micro_batch_size if found is not None else 0))
    return plan.with_micro_batch(size) if size else None


def has_room(recipe: Recipe, vocab_size: int, plan: DeepSpeedPlan, device: torch.device) -> bool:
    """Whether a forward and backward pass over the plan's longest micro-batch fits beside everything else of a step.

    The optimizer's state, buffers and the allocator's waste are stood in for by empty tensors of their size.
    """
    try:
        _pass(recipe, vocab_size, plan, device)
    except RuntimeError as error:
        if not devices.is_out_of_memory(error):
            raise
        return False
    finally:
        devices.release_memory(device)
    return True


def _pass(recipe: Recipe, vocab_size: int, plan: DeepSpeedPlan, device: torch.device) -> None:
    peak = peak_memory(recipe, vocab_size, plan)
    model = Electra(recipe, vocab_size, 0)
    model.to(device, set_up_model(model, plan)).train()
    elsewhere = peak.update.optimizer + peak.update.buffers + round(peak.allocated_bytes * FRAGMENTATION)
    stand_in = torch.empty(elsewhere, dtype=torch.uint8, device=device)
    for _ in range(min(2, plan.batch.gradient_accumulation_steps)):  # the second meets the gradients of the first
        output = model(longest_micro_batch(recipe, vocab_size, plan.batch.micro_batch_size).to(device))
        (output.generator_loss_sum + output.discriminator_loss_sum).backward()
        del output
    torch.empty(peak.update.workspace, dtype=torch.uint8, device=device)
    del stand_in


def longest_micro_batch(recipe: Recipe, vocab_size: int, size: int) -> MicroBatch:
    """The micro-batch that takes the most memory: full rows, with as many selected positions as are usual at most.

    Its tokens mean nothing.
    """
    length = recipe.data.sequence_length
    selected = usual_most_selected(
        size, length, mlm_probability=recipe.masking.mlm_probability, count=recipe.masking.count
    )
    places = torch.arange(size * length)
    ids_BT = (places % vocab_size).view(size, length)
    return MicroBatch(
        ids_BT=ids_BT,
        generator_ids_BT=ids_BT.clone(),
        selected_M=places[:selected].clone(),
        replaced_M=torch.ones(selected, dtype=torch.bool),
        noise_keys_M=torch.arange(selected, dtype=torch.int32),
        counted_BT=torch.ones(size, length, dtype=torch.bool),
        sequences_BT=None,
    )
