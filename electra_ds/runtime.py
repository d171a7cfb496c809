"""The process: device, threads, process group, signals. Nothing is read from the environment but what launchers set."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import numpy as np
import torch
from torch import distributed

from electra_ds.errors import ConfigError


def device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(own)
        return own
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """For the record: the card's name, or that it is a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({os.cpu_count()} cores)"


def world_size() -> int:
    """Ranks that the launcher started; 1 without a launcher. Raises ConfigError where there are more."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks != "1":
        raise ConfigError(f"WORLD_SIZE is {ranks}, but several ranks are not supported yet. Start a single one.")
    return 1


@contextmanager
def process_group() -> Iterator[None]:
    """A process group of this one process, without a port."""
    with warnings.catch_warnings():
        # DeepSpeed and torch warn about their own deprecated calls; nothing in it is for the user.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch|deepspeed")
        started = not distributed.is_initialized()
        if started:
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            store = distributed.HashStore()  # type: ignore[attr-defined]  # needs no port
            distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asserts that it is set
        try:
            yield
        finally:
            if started:
                distributed.destroy_process_group()


def set_threads(threads: int | None) -> int:
    """Set the number of CPU threads, which is part of a run's plan; returns the number in use."""
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def seed_dropout(*parts: int) -> None:
    """Seed torch's generators, which feed dropout alone: every other random number is keyed by (seed, step)."""
    first, second = np.random.SeedSequence(parts).generate_state(2)
    torch.manual_seed(int(first) << 31 | int(second) >> 1)


class StopSignal:
    """Turns SIGINT and SIGTERM into a wish to stop at the next step boundary.

    A second signal of the same kind has the default effect again, so an impatient Ctrl-C still works.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        signal.signal(number, self._previous[self.received])

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
