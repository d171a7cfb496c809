"""The device and CPU threads of this process, and what memory and disk errors mean."""

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

_MOST_THREADS_OF_A_CORE = 16
_LOOK_AT_CPU_S = 0.2


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
    """Which of the visible GPUs is this rank's; `srun --gpus-per-task 1` shows each rank its own card alone."""
    return 0 if launch.launcher == "srun" and torch.cuda.device_count() == 1 else launch.local_rank


def device_name(device: torch.device) -> str:
    """For the record: the card's name, or that it is a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({os.cpu_count()} cores)"


# What torch does not tell as its own OutOfMemoryError: what the driver, cuBLAS and the CPU's allocator say.
_OUT_OF_MEMORY = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch raised it for want of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_disk_full(error: Exception) -> bool:
    """Whether it was raised for want of room on a disk."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (match := re.search(r"os error (\d+)", str(error))):  # as safetensors says it
        number = int(match[1])
    return number in _DISK_FULL


def release_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more, cycles included."""
    # A backward pass that failed leaves its rest in this thread's queue, until the next one.
    torch.zeros((), requires_grad=True).backward()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def shown_threads(device: str, threads: int) -> str:
    """Return a device's name, with the number of threads if it is a CPU."""
    return f"{device}, {threads} thread{'s' if threads > 1 else ''}" if device.startswith("CPU") else device


def busy_note(device: str, threads: int) -> str | None:
    """Return a note if other programs keep cores of this machine busy that the threads of a run on the CPU need.

    Threads wait for each other after every operation, so one that waits for its core holds up all. Measured on 2 cores
    at a load of 12: 700 to 1,400 tokens/s by two threads, 31,000 by one.
    """
    if threads < 2 or not device.startswith("CPU"):
        return None
    cores = os.cpu_count() or 1
    busy = cores * psutil.cpu_percent(interval=_LOOK_AT_CPU_S) / 100
    if busy + threads < cores + 0.5:
        return None
    return (
        f"other programs keep {busy:.1f} of the {cores} cores busy. Threads wait for each other, so one may be many "
        f"times faster than {threads}: --threads 1"
    )


def set_threads(threads: int | None, launch: Launch) -> int:
    """Set the number of CPU threads, which is part of a run's plan; returns the number in use.

    None leaves it to torch, but for several ranks on a node, which share its cores where nobody has bound them.
    Raises ConfigError if there are many more than cores.
    """
    if threads is None:
        cores = os.cpu_count() or 1
        threads = torch.get_num_threads()
        if launch.local_size > 1 and len(os.sched_getaffinity(0)) == cores:
            threads = min(threads, max(1, cores // launch.local_size))
    if threads > _MOST_THREADS_OF_A_CORE * (os.cpu_count() or 1):
        raise ConfigError(f"{threads} CPU threads are asked for, and this machine has {os.cpu_count()} cores.")
    torch.set_num_threads(threads)
    return torch.get_num_threads()


def seed_dropout(*parts: int) -> None:
    """Seed torch's generators, which feed dropout alone: every other random number is keyed by (seed, step)."""
    first, second = np.random.SeedSequence(parts).generate_state(2)
    torch.manual_seed(int(first) << 31 | int(second) >> 1)
