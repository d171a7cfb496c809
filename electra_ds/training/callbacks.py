"""Callbacks, with which you can monitor, log and stop a run while it trains.

class StopAtLoss(Callback):
    def on_step(self, progress, step, metrics):
        if metrics["loss"] is not None and metrics["loss"] < 1:
            progress.stop("the loss is below 1")
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from electra_ds.core.errors import ConfigError, ElectraError, TrainingError, did_you_mean
from electra_ds.core.ranks import Ranks

Metrics = Mapping[str, float | None]
"""Numbers by name, as in metrics.jsonl; None means not finite."""


@dataclass
class Progress:
    """The progress of a run."""

    run: Path
    """The run's folder."""
    step: int
    """The number of completed optimizer steps."""
    stop_at: int
    """The step at which this process saves and exits."""
    total_steps: int
    """The number of steps in the schedule."""
    stop_reason: str | None = field(default=None, init=False)

    def stop(self, reason: str) -> None:
        """Ask the run to save a checkpoint and stop after the next step, as a signal does. You can resume it later."""
        self.stop_reason = reason


class Callback:
    """Base class of callbacks, which a run calls on its main rank. Override what you need; the defaults do nothing.

    An exception ends the run on all ranks, with the status failed; its checkpoints remain.
    """

    def __init_subclass__(cls) -> None:
        """Raise ConfigError for a method `on_...` that no run would call, or not with these arguments."""
        known = [name for name in vars(Callback) if name.startswith("on_")]
        for name in (each for each in vars(cls) if each.startswith("on_")):
            if name not in known:
                hint = did_you_mean(name, known) or f"; the methods are {', '.join(known)}."
                raise ConfigError(f"{cls.__name__}.{name}: a run calls no such method{hint}")
            given = [*inspect.signature(getattr(Callback, name)).parameters]
            try:
                inspect.signature(getattr(cls, name)).bind(*given)
            except TypeError as error:
                raise ConfigError(f"{cls.__name__}.{name} must take ({', '.join(given)}): {error}.") from error

    def on_start(self, progress: Progress) -> None:
        """Called when training is about to start, or to resume at `progress.step`."""

    def on_step(self, progress: Progress, step: int, metrics: Metrics) -> None:
        """Called for every step. Losses are read back together, so the call may be up to `log_every` steps late."""

    def on_report(self, progress: Progress, summary: str) -> None:
        """Called when losses were read back. summary: one line about the last step."""

    def on_evaluate(self, progress: Progress, metrics: Metrics) -> None:
        """Called after an evaluation on held-out text, or on a task's development sets."""

    def on_checkpoint(self, progress: Progress, path: Path) -> None:
        """Called when a checkpoint is complete. It is written in the background, so training may already be further."""

    def on_end(self, progress: Progress, status: str) -> None:
        """Called when training has ended, with the status in status.json."""


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Raise ConfigError for anything but a list of callbacks, such as a class instead of an object of it."""
    is_list = isinstance(callbacks, Sequence) and not isinstance(callbacks, str)
    if not is_list or not all(isinstance(each, Callback) for each in callbacks):
        raise ConfigError(
            f"callbacks must be a list of objects of subclasses of electra_ds.Callback, such as [MyCallback()], not "
            f"{callbacks!r}."
        )


class Callbacks:
    """The callbacks of a run, which are called on its main rank."""

    def __init__(self, callbacks: Sequence[Callback], ranks: Ranks) -> None:
        self._callbacks = callbacks if ranks.is_main else ()
        self._is_alone = ranks.world_size == 1

    def call(self, method: str, *arguments: Any) -> None:
        """Call a method of each callback. Use it inside `fail_together`, so that no rank waits for one that failed.

        Raises the callback's exception; with several ranks, a TrainingError with that cause.
        """
        for callback in self._callbacks:
            try:
                getattr(callback, method)(*arguments)
            except Exception as error:
                if self._is_alone or isinstance(error, ElectraError):
                    raise
                name = type(callback).__name__
                raise TrainingError(f"{name}.{method}, a callback of this run, failed: {error!r}") from error
