"""The parts of torch and DeepSpeed that this package uses beyond their documented interfaces.

Each function has a test in tests/core/test_compat.py, which says what broke when a new version changes it. DeepSpeed is
imported inside the functions, since most of what imports this module does not need it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

# --- torch


def add_param_group(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """Do what `Optimizer.add_param_group` does, without its decorator, which imports torch's compiler (1.2 CPU-s)."""
    torch.optim.Optimizer.add_param_group.__wrapped__(optimizer, group)  # type: ignore[attr-defined]


def norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the L2 norm of each tensor, by one operation for all of them."""
    return torch.stack(torch._foreach_norm(list(tensors)))


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source into its target, perhaps of another precision, by one operation for all of them."""
    torch._foreach_copy_(list(targets), list(sources))


def compiler_error() -> type[Exception]:
    """Return the base of what torch.compile raises, which includes errors of inductor, Triton and C++ compilers."""
    return torch._dynamo.exc.TorchDynamoException


# --- DeepSpeed


def leave_out_shared_memory_collective() -> None:
    """Keep DeepSpeed from compiling a collective with ninja and g++ at the first start on a CPU."""
    importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False


def import_muon() -> None:
    """Import DeepSpeed's optimizer Muon without compiling it, unless it is imported already.

    ZeRO compares the type of every optimizer with Muon, and importing Muon compiles its functions, for which torch
    imports its compiler: some 3 CPU-seconds on each rank. Without compilation the functions compute the same.
    """
    compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
    compile_function = compiler.compile
    compiler.compile = lambda *arguments, **named: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_function


def clear_stage3_caches() -> None:
    """Clear the process-wide state of stage 3, which otherwise keeps every model that it has run."""
    importlib.import_module("deepspeed.runtime.zero.parameter_offload").FWD_MODULE_STACK.clear()
    module = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    releases = module.PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    for cell in releases.__closure__:  # a cache inside DeepSpeed's wrapper
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


def flat_partitions(zero: Any, stage: int) -> list[torch.Tensor]:
    """Return this rank's fp32 partitions of the parameters in a ZeRO optimizer at stage 1, 2 or 3."""
    name = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
    partitions: list[torch.Tensor] = getattr(zero, name)
    return partitions


def link_moments(zero: Any, stage: int) -> None:
    """Let a ZeRO optimizer find the moments that its inner optimizer has, before the first step."""
    if stage < 3:
        zero._lazy_init_hp_params_optimizer_state()
