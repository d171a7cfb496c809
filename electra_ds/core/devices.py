"""The device and CPU threads of this process, and the recognition of out-of-memory and disk-full errors."""

from __future__ import annotations

import errno
import gc
import os
import re

import numpy as np
import psutil
import torch

from electra_ds.core.errors import ConfigError
from electra_ds.core.launcher import Launch

_MAX_THREADS_PER_CORE = 16
_CPU_SAMPLE_S = 0.2


def device(launch: Launch) -> torch.device:
    """Return this rank's GPU, or the CPU if there is none. Raises ConfigError if ranks outnumber the GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index, visible = device_index(launch), torch.cuda.device_count()
    if index >= visible:
        raise ConfigError(
            f"Local rank {launch.local_rank} has no GPU: {visible} {'is' if visible == 1 else 'are'} visible. "
            f"Start one process per GPU."
        )
    own = torch.device("cuda", index)
    torch.cuda.set_device(own)
    return own


def device_index(launch: Launch) -> int:
    """Return the index of this rank's GPU among the visible ones.

    `srun --gpus-per-task 1` makes only its own GPU visible to each rank.
    """
    return 0 if launch.launcher == "srun" and torch.cuda.device_count() == 1 else launch.local_rank


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or CPU with its number of cores, for the run record."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({os.cpu_count()} cores)"


# Messages of the driver, cuBLAS and the CPU's allocator, which torch does not raise as its OutOfMemoryError.
_OUT_OF_MEMORY = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether torch raised the error because memory ran out."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_disk_full(error: Exception) -> bool:
    """Return whether the error was raised because a disk is full."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (match := re.search(r"os error (\d+)", str(error))):  # safetensors' format
        number = int(match[1])
    return number in _DISK_FULL


def release_memory(device: torch.device) -> None:
    """Free all memory that nothing refers to, reference cycles included."""
    # A backward pass that failed leaves its remaining nodes in this thread's queue until the next backward pass.
    torch.zeros((), requires_grad=True).backward()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def shown_threads(device: str, threads: int) -> str:
    """Return a device's name, with the number of threads if it is a CPU."""
    return f"{device}, {threads} thread{'s' if threads > 1 else ''}" if device.startswith("CPU") else device


def busy_note(device: str, threads: int) -> str | None:
    """Return a note if other programs occupy CPU cores that the threads of a run on the CPU need.

    Threads wait for each other after every operation, so one that waits for its core delays all of them. Measured on 2
    cores at a load of 12: 700 to 1,400 tokens/s with two threads, 31,000 with one.
    """
    if threads < 2 or not device.startswith("CPU"):
        return None
    cores = os.cpu_count() or 1
    busy = cores * psutil.cpu_percent(interval=_CPU_SAMPLE_S) / 100
    if busy + threads < cores + 0.5:
        return None
    return (
        f"other programs keep {busy:.1f} of the {cores} cores busy. Threads wait for each other, so one may be many "
        f"times faster than {threads}: --threads 1"
    )


def set_threads(threads: int | None, launch: Launch) -> int:
    """Set the number of CPU threads, which is part of a run's plan, and return the number in use.

    None keeps torch's default, except that several ranks on a node share its cores unless they are bound to cores.
    Raises ConfigError if the number is far above the number of cores.
    """
    if threads is None:
        cores = os.cpu_count() or 1
        threads = torch.get_num_threads()
        if launch.local_size > 1 and len(os.sched_getaffinity(0)) == cores:
            threads = min(threads, max(1, cores // launch.local_size))
    if threads > _MAX_THREADS_PER_CORE * (os.cpu_count() or 1):
        raise ConfigError(f"{threads} CPU threads were requested, but this machine has {os.cpu_count()} cores.")
    torch.set_num_threads(threads)
    return torch.get_num_threads()


def seed_dropout(device: torch.device, *parts: int) -> None:
    """Seed a device's generator, which only dropout uses: every other random number is keyed by (seed, step)."""
    first, second = np.random.SeedSequence(parts).generate_state(2)
    seed = int(first) << 31 | int(second) >> 1
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a hundred times as long
    else:
        torch.manual_seed(seed)
