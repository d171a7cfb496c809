"""How fast training goes, and how much of the cards' peak that is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from electra_ds.config.cards import find_card, peak_flops
from electra_ds.core import devices


def joint_peak_flops(device: torch.device, precision: str, world_size: int) -> float | None:
    """Peak FLOP/s of all ranks, whose cards are taken to be like this one; None on a CPU or an unknown card."""
    card = find_card(devices.device_name(device)) if device.type == "cuda" else None
    peak = None if card is None else peak_flops(card, precision)
    return None if peak is None else peak * world_size


class CountedBatch(Protocol):
    @property
    def num_tokens(self) -> int:
        """Without padding."""


class Throughput:
    """Tokens and model FLOPs a second of all ranks since the last reading; padding is neither."""

    def __init__(self, device: torch.device, peak_flops: float | None, flops_of: Callable[[Any], float | None]) -> None:
        """flops_of: model FLOPs of a step over a batch, asked for if the peak is known; None if they are not known."""
        self._device = device
        self._peak_flops = peak_flops
        self._flops_of = flops_of
        self._tokens, self._flops = 0, 0.0
        self._clock = time.monotonic()

    def count(self, batch: CountedBatch) -> None:
        """A step over this batch was begun."""
        self._tokens += batch.num_tokens
        flops = self._flops_of(batch) if self._peak_flops is not None else None
        if flops is None:
            self._peak_flops = None
        else:
            self._flops += flops

    def read(self) -> dict[str, float]:
        """`tokens_per_s` and, where the peak is known, `mfu`: model FLOPs a second over the peak."""
        now = self._now()
        elapsed_s = max(now - self._clock, 1e-9)
        rates: dict[str, float] = {"tokens_per_s": round(self._tokens / elapsed_s)}
        if self._peak_flops is not None:
            rates["mfu"] = round(self._flops / elapsed_s / self._peak_flops, 4)
        self._tokens, self._flops = 0, 0.0
        self._clock = now
        return rates

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time of what is done meanwhile does not count."""
        started = self._now()
        yield
        self._clock += self._now() - started

    def _now(self) -> float:
        """When all that was begun is done: a GPU may still be at steps that the host has left behind."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.monotonic()
