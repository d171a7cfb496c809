"""Metrics of steps: their losses, which are read back from the device together, and their speed."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from electra_ds.config.cards import find_card, peak_flops
from electra_ds.config.deepspeed_sections import LossScaling
from electra_ds.core import devices
from electra_ds.core.ranks import Ranks
from electra_ds.training.callbacks import Callbacks, Metrics, Progress
from electra_ds.training.optimizer import MasterAdamW
from electra_ds.training.step import StepBatch
from electra_ds.training.tracking import RunLog
from electra_ds.training.zero import ZeroAdamW

_HOPELESS_SKIPS = 20
"""Consecutive steps without a finite gradient, in addition to those that a loss scale may need to decrease."""


def joint_peak_flops(device: torch.device, precision: str, world_size: int) -> float | None:
    """Return the peak FLOP/s of all ranks, assuming the same card on each; None on a CPU or an unknown card."""
    card = find_card(devices.device_name(device)) if device.type == "cuda" else None
    peak = None if card is None else peak_flops(card, precision)
    return None if peak is None else peak * world_size


class Throughput:
    """Tokens and model FLOPs per second of all ranks since the last reading, without padding."""

    def __init__(self, device: torch.device, peak_flops: float | None, flops_of: Callable[[Any], float | None]) -> None:
        """flops_of: returns the model FLOPs of a batch's step, or None if unknown; called only if the peak is known."""
        self._device = device
        self._peak_flops = peak_flops
        self._flops_of = flops_of
        self._tokens, self._flops = 0, 0.0
        self._clock = time.monotonic()

    def count(self, batch: StepBatch) -> None:
        """Count a step over this batch, which has begun."""
        self._tokens += batch.num_tokens
        flops = self._flops_of(batch) if self._peak_flops is not None else None
        if flops is None:
            self._peak_flops = None
        else:
            self._flops += flops

    def read(self) -> dict[str, float]:
        """Return `tokens_per_s` and, if the peak is known, `mfu`: model FLOPs per second divided by the peak."""
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
        """Do not count the time that passes inside."""
        started = self._now()
        yield
        self._clock += self._now() - started

    def _now(self) -> float:
        """Return the time after the GPU has finished all queued work; the host may be several steps ahead of it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.monotonic()


class StepLog:
    """Keeps the scalars of steps on the device until they are read. All ranks must call each method together."""

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device,
        throughput: Throughput,
        log: RunLog | None,
        progress: Progress,
        callbacks: Callbacks,
        shown: Callable[[Metrics], str],
    ) -> None:
        """log: the log to write to, on the main rank only. shown: returns a short text with a step's losses."""
        self._ranks, self._device, self._throughput, self._shown = ranks, device, throughput, shown
        self._log, self._progress, self._callbacks = log, progress, callbacks
        self._unread: list[tuple[int, dict[str, torch.Tensor], dict[str, float]]] = []

    def add(self, step: int, result: dict[str, torch.Tensor], known: dict[str, float]) -> None:
        """Keep a step's scalars. known: numbers that are not on the device."""
        self._unread.append((step, result, known))

    def report(self, optimizer: MasterAdamW | ZeroAdamW) -> str | None:
        """Read back the steps since the last call and log them; return a one-line summary of the last one, or None if
        there was none."""
        extra = self._throughput.read()
        shown = f"{extra['tokens_per_s']:,.0f} tokens/s"
        if "mfu" in extra:
            shown += f"  MFU {extra['mfu']:.1%}"
        if skipped := int(optimizer.skipped_steps.item()):
            shown += f"  skipped {skipped}"
        if self._device.type == "cuda":
            extra["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(self._device) / 2**30, 3)
        values = self.read(skipped_steps=skipped, loss_scale=optimizer.loss_scale.item(), **extra)
        return f"{self._shown(values)}  {shown}" if values else None

    def read(self, **extra: float) -> Metrics:
        """Write a line for each step whose losses are still on the device; return the last one's values.

        extra: further values for the last one.
        """
        values: Metrics = {}
        with self._ranks.fail_together():
            for step, values in self._read_back():
                if step == self._progress.step:
                    values = {**values, **extra}
                if self._log is not None:
                    self._log.write("train", step, values)
                self._callbacks.call("on_step", self._progress, step, values)
        return values

    def _read_back(self) -> list[tuple[int, Metrics]]:
        """Return (step, metrics) of the unread steps, with one sum over ranks and one wait for the device."""
        if not self._unread:
            return []
        steps, results, known = zip(*self._unread, strict=True)
        self._unread.clear()
        norms = torch.stack([result.pop("grad_norm") for result in results]).tolist()
        losses = self._ranks.sum(torch.stack([torch.stack([*result.values()]) for result in results])).tolist()
        names = [*results[0], "grad_norm"]
        return [
            (step, {**finite_values(dict(zip(names, (*loss, norm), strict=True))), **of_step})
            for step, loss, norm, of_step in zip(steps, losses, norms, known, strict=True)
        ]


def finite_values(values: Mapping[str, float]) -> Metrics:
    """Return numbers by name with None for those that are not finite, which JSON cannot represent."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def allowed_skips(scaling: LossScaling | None) -> int:
    """Return the allowed number of consecutive steps with non-finite gradients: what a loss scale may need to decrease,
    and a margin. scaling: the plan's; None without loss scaling."""
    if scaling is None or not scaling.is_dynamic:
        return _HOPELESS_SKIPS
    return _HOPELESS_SKIPS + scaling.hysteresis + int(math.log2(max(1.0, scaling.initial_scale)))
