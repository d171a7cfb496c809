"""Time, memory and operations of a step, so that two of them can be compared on a noisy machine."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that would make the host wait for a GPU.
_BLOCKING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "item")


class Clock:
    """CPU seconds of this process on a CPU, where other work comes and goes; seconds of the wall clock on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()


class Ratio(NamedTuple):
    """How many times as fast as the reference, over the rounds of one run."""

    median: float
    low: float
    high: float
    """Quartiles."""

    def figure(self) -> dict[str, Any]:
        """As it stands in the results."""
        return {"speed": self.median, "speed_quartiles": [self.low, self.high]}


def interleaved(
    contestants: Mapping[str, Callable[[int], object]],
    rounds: int,
    clock: Clock,
    told: Callable[[], None],
    calls_a_turn: int = 1,
) -> dict[str, list[float]]:
    """Seconds a call in every round. Each round gives all of them a turn, in an order of its own, since what ran
    before leaves caches and memory in another state.

    One round before those that count warms up. `told` is called after each turn.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, rounds):
        for name in random.Random(number).sample(names, len(names)):
            started = clock()
            for call in range(calls_a_turn):
                contestants[name]((number + 1) * calls_a_turn + call)
            if number >= 0:
                seconds[name].append((clock() - started) / calls_a_turn)
            told()
    return seconds


def ratio(reference: list[float], seconds: list[float]) -> Ratio:
    """Of the times of equal rounds."""
    values = [theirs / ours for theirs, ours in zip(reference, seconds, strict=True)]
    if len(values) == 1:
        return Ratio(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(median, low, high)


def peak_bytes(function: Callable[[], None], device: torch.device) -> int:
    """The most that tensors take at once during the call, beyond what they took before it.

    From torch's allocator, so what libraries allocate for themselves is not in it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    results: Any = recorded.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def graph_bytes(function: Callable[[], None], device: torch.device) -> int:
    """What torch's allocator keeps of a GPU after the first calls and did not before: the memory of CUDA graphs."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    for _ in range(3):  # warms up, records, replays
        function()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device) - before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's C++ reports its starting and stopping on stderr, whatever it is told."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class Operations(TorchDispatchMode):
    """Counts torch's operations, views left out, and, on a CPU, those at which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.blocking = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        name = function.name().removeprefix("aten::").split(".")[0]
        if not function.is_view and not name.startswith("profiler::"):
            self.count += 1
        self.blocking += name in _BLOCKING
        return function(*arguments, **(keywords or {}))


def host_waits(function: Callable[[], None]) -> int:
    """How often the host waits for a GPU in a call, as torch tells."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in told)


def matrix_product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: what this device gives in practice."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    clock, best = Clock(device), float("inf")
    for _ in range(4):
        started = clock()
        left @ right
        best = min(best, clock() - started)
    return 2 * size**3 / best
