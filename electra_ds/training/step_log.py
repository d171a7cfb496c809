"""What is known of steps: their losses, read back from the device together, and how fast they went."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from electra_ds.config.cards import find_card, peak_flops
from electra_ds.config.deepspeed_sections import LossScaling
from electra_ds.core import devices
from electra_ds.core.errors import TrainingError
from electra_ds.core.ranks import Ranks
from electra_ds.training.callbacks import Callback, Metrics, Progress
from electra_ds.training.optimizer import MasterAdamW
from electra_ds.training.tracking import RunLog
from electra_ds.training.zero import ZeroAdamW


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


class StepLog:
    """Keeps the scalars of steps on the device until somebody reads them. All ranks must call each method together."""

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device,
        throughput: Throughput,
        log: RunLog | None,
        progress: Progress,
        callbacks: Sequence[Callback],
        shown: Callable[[Metrics], str],
    ) -> None:
        """log: where lines go, None on all ranks but the main one. shown: a step's losses in a few words."""
        self._ranks, self._device, self._throughput, self._shown = ranks, device, throughput, shown
        self._log = log
        self._progress, self._callbacks = progress, callbacks
        self._unread: deque[tuple[int, dict[str, torch.Tensor], dict[str, float]]] = deque()

    def add(self, step: int, result: dict[str, torch.Tensor], known: dict[str, float]) -> None:
        """Keep a step's scalars. known: numbers that are not on the device."""
        self._unread.append((step, result, known))

    def report(self, optimizer: MasterAdamW | ZeroAdamW) -> int:
        """Read back the steps since the last call, write them down, and say how the last one went.

        Returns the number of steps in a row whose gradients were not finite.
        """
        rates = self._throughput.read()
        loss_scale, skipped = optimizer.loss_scale.item(), int(optimizer.skipped_steps.item())
        memory = {}
        if self._device.type == "cuda":
            memory["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(self._device) / 2**30, 3)
        values = self.read(skipped_steps=skipped, loss_scale=loss_scale, **rates, **memory)
        if values:  # else nothing has happened since the last line
            summary = f"{self._shown(values)}  {_shown_rates(**rates)}" + (f"  skipped {skipped}" if skipped else "")
            for callback in self._callbacks:
                callback.on_report(self._progress, summary)
        return int(optimizer.consecutive_skips.item())

    def read(self, **extra: float) -> Metrics:
        """Write a line for each step whose losses are still on the device; return the last one's values.

        extra: more for the last one.
        """
        values: Metrics = {}
        with self._ranks.fail_together():
            for step, values in self._read_back():
                if step == self._progress.step:
                    values = {**values, **extra}
                if self._log is not None:
                    self._log.write("train", step, values)
                for callback in self._callbacks:
                    callback.on_step(self._progress, step, values)
        return values

    def _read_back(self) -> list[tuple[int, Metrics]]:
        """Return (step, its numbers) of the unread steps: one sum over ranks, one wait for the device."""
        if not self._unread:
            return []
        steps, results, known = zip(*self._unread, strict=True)
        self._unread.clear()
        norms = torch.stack([result.pop("grad_norm") for result in results]).tolist()
        losses = self._ranks.sum(torch.stack([torch.stack([*result.values()]) for result in results])).tolist()
        names = [*results[0], "grad_norm"]
        return [
            (step, dict(zip(names, map(finite, (*loss, norm)), strict=True)) | of_step)
            for step, loss, norm, of_step in zip(steps, losses, norms, known, strict=True)
        ]


def finite(value: float) -> float | None:
    """Return the value, or None for one that is not finite, which JSON does not know."""
    return value if math.isfinite(value) else None


def check_progress(
    consecutive_skips: int, scaling: LossScaling | None, step: int, last_checkpoint: Callable[[], str]
) -> None:
    """Raise TrainingError if gradients have not been finite for longer than a loss scale needs to come down.

    scaling: the plan's loss scaling, None for none. last_checkpoint: says what is there to resume from.
    """
    allowed = _HOPELESS_SKIPS
    if scaling is not None and scaling.is_dynamic:
        allowed += scaling.hysteresis + int(math.log2(max(1.0, scaling.initial_scale)))
    if consecutive_skips < allowed:
        return
    raise TrainingError(
        f"The gradients have not been finite for {consecutive_skips} steps (now at step {step}); the weights "
        f"were left as they were, and {last_checkpoint()}. Lower optimizer.learning_rate, or use bf16 or fp32 in place "
        f"of fp16."
    )


# Steps in a row without a finite gradient, beyond those that a loss scale may need to come down.
_HOPELESS_SKIPS = 20


def _shown_rates(tokens_per_s: float, mfu: float | None = None) -> str:
    return f"{tokens_per_s:,.0f} tokens/s" + ("" if mfu is None else f"  MFU {mfu:.1%}")


def finite_values(values: Mapping[str, float]) -> Metrics:
    """Return numbers by name with None for those that are not finite."""
    return {name: finite(value) for name, value in values.items()}
