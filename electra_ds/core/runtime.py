"""The process among its ranks: device, threads, process group, agreement, and the wish to stop."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import distributed

from electra_ds.core.errors import ConfigError, ElectraError, FailedElsewhereError, LostRankError
from electra_ds.core.launcher import Launch, LauncherWatch, detect
from electra_ds.core.signals import SECOND_SIGNAL_AFTER_S, STOP_SIGNALS, leave_at_once

# Over gloo a rank that died is noticed at once, by its closed connections. This bounds only the waiting for one that
# lives, such as rank 0 while it tokenises a corpus.
_PATIENCE = timedelta(days=7)
_MEETING_TIMEOUT = timedelta(minutes=10)
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


class Ranks:
    """All ranks of the job. Every method but `is_main` must be called by all of them, in the same order."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.rank = launch.rank
        self.world_size = launch.world_size
        self.is_main = launch.is_main
        self.launcher_watch = LauncherWatch(launch)
        # On the CPU, so that agreeing never waits for a GPU.
        self._control = distributed.new_group(backend="gloo", timeout=_PATIENCE) if self.world_size > 1 else None
        self._background = distributed.new_group(backend="gloo", timeout=_PATIENCE) if self.world_size > 1 else None

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is inside succeeds on every rank or fails on every rank.

        Raises the ElectraError that happened here, or FailedElsewhereError if it happened on another rank.
        """
        error = None
        try:
            yield
        except ElectraError as caught:
            error = caught
        failed = [rank for rank, wrong in enumerate(self.gather(error is not None)) if wrong]
        if not failed:
            return
        if failed[0] == self.rank and error is not None:
            error.rank = self.rank
            raise error
        raise FailedElsewhereError(f"Rank {failed[0]} failed.")

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank."""
        return self._gather(value, self._control)

    def gather_in_background(self, value: Any) -> list[Any]:
        """The same from a thread beside the one that trains; one thread at a time on each rank."""
        return self._gather(value, self._background)

    def _gather(self, value: Any, group: distributed.ProcessGroup | None) -> list[Any]:
        if group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value, group=group)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's value."""
        return self.gather(value if self.is_main else None)[0]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a tensor on this rank's device."""
        if self.world_size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def start_maximum(self, value: int) -> Any:
        """Begin to find the largest value of several ranks; `finish_maximum` waits for it."""
        tensor = torch.tensor([value])
        return tensor, distributed.all_reduce(tensor, distributed.ReduceOp.MAX, group=self._control, async_op=True)

    @staticmethod
    def finish_maximum(started: Any) -> int:
        tensor, work = started
        work.wait()
        return int(tensor.item())


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Meet the other ranks, for as long as the context lasts; in a process group that is there already, stay in it.

    A process without a launcher is a group of its own, without a port. Raises ConfigError if the ranks cannot
    meet, and LostRankError if one of them is gone.
    """
    launch = detect(os.environ)
    with warnings.catch_warnings():
        # DeepSpeed and torch warn about their own deprecated calls; nothing in it is for the user.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch|deepspeed")
        started = not distributed.is_initialized()
        if started:
            _meet(launch)
        alone = launch.world_size == 1
        completed = False
        try:
            yield Ranks(launch)
            completed = True
        except ElectraError as error:
            if not alone and error.rank is None:
                error.rank = launch.rank  # nobody else may have met it
            raise
        except RuntimeError as error:
            if alone or not is_lost_connection(error):
                raise
            lost = LostRankError(
                f"lost contact with another rank. What ended that one is shown above; if nothing is, it was killed, "
                f"perhaps for want of memory. ({str(error).splitlines()[0]})"
            )
            lost.rank = launch.rank
            raise lost from error
        finally:
            if started and (alone or completed):  # after an error the others may never come
                _part()


def _part() -> None:
    """Leave the process group, DeepSpeed with us: it would go on with this one where another is met later."""
    theirs = sys.modules.get("deepspeed.comm")
    (theirs if theirs is not None and theirs.is_initialized() else distributed).destroy_process_group()


def _meet(launch: Launch) -> None:
    os.environ["LOCAL_RANK"] = str(device_index(launch))  # by which DeepSpeed chooses the GPU
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if launch.world_size == 1:
        store = distributed.HashStore()  # type: ignore[attr-defined]  # needs no port
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        return
    os.environ |= {  # torch and DeepSpeed read them; srun leaves them to us
        "RANK": str(launch.rank), "WORLD_SIZE": str(launch.world_size),
        "MASTER_ADDR": launch.address, "MASTER_PORT": str(launch.port),
    }  # fmt: skip
    try:
        distributed.init_process_group(backend, init_method="env://", timeout=_MEETING_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"Rank {launch.rank} cannot meet the other {launch.world_size - 1} at {launch.address}:{launch.port} "
            f"({str(error).splitlines()[0]}). Is that host reachable, the port free, and were all ranks started?"
        ) from error


def is_lost_connection(error: BaseException) -> bool:
    """Whether torch.distributed raised it because another rank is gone."""
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "Gloo", "NCCL"))


class StopRequest(NamedTuple):
    """Why all ranks are to stop."""

    reason: str
    signum: int | None
    """The signal, where it was one."""


_TIME_LIMIT, _LAUNCHER_DIED, _SAVE_FAILED = 1000, 1001, 1002


class StopWish:
    """Turns a signal on any rank, the end of the time limit, or the launcher's death into one decision of all ranks.

    Signals are read by a thread, so that a second one, at least 5 s after the first, ends the process at once even
    where the main thread waits for another rank.
    """

    def __init__(self, ranks: Ranks, time_limit_s: float | None = None) -> None:
        """time_limit_s: seconds from now."""
        self._ranks = ranks
        self._deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._signal = 0
        self._asked: Any = None

    def __enter__(self) -> StopWish:
        self._reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._writer = writer
        self._previous_descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _leave_to_thread) for number in STOP_SIGNALS}
        self._thread = threading.Thread(target=self._read, name="signals", daemon=True)
        self._thread.start()
        return self

    def _read(self) -> None:
        first: float | None = None
        while numbers := self._reader.recv(1):
            if numbers[0] not in STOP_SIGNALS:
                continue
            now = time.monotonic()
            if first is None:
                first, self._signal = now, numbers[0]
            elif now - first >= SECOND_SIGNAL_AFTER_S:
                leave_at_once(numbers[0])

    def decide(self, *, save_failed: bool = False) -> StopRequest | None:
        """To be called by every rank after every step; all get the same answer.

        save_failed: whether this rank wishes to stop since a checkpoint could not be written. With several ranks a wish
        is answered one step later, so that nobody waits for the asking.
        """
        wish = self._signal
        if not wish and self._deadline is not None and time.monotonic() > self._deadline:
            wish = _TIME_LIMIT
        if not wish and self._ranks.launcher_watch.died():
            wish = _LAUNCHER_DIED
        if save_failed:
            wish = _SAVE_FAILED
        if self._ranks.world_size > 1:
            before, self._asked = self._asked, self._ranks.start_maximum(wish)
            wish = 0 if before is None else self._ranks.finish_maximum(before)
        if not wish:
            return None
        if wish == _TIME_LIMIT:
            return StopRequest("time limit", None)
        if wish == _LAUNCHER_DIED:
            return StopRequest("the launcher died", signal.SIGTERM)
        if wish == _SAVE_FAILED:
            return StopRequest("a checkpoint could not be written", None)
        return StopRequest(signal.Signals(wish).name, wish)

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None and self._asked is not None:
            with contextlib.suppress(RuntimeError):  # the others may have left already
                self._ranks.finish_maximum(self._asked)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_descriptor)
        self._writer.close()
        self._thread.join()
        self._reader.close()


def _leave_to_thread(number: int, frame: Any) -> None:
    """Python needs a handler to be there; the thread reads the signal's number."""
