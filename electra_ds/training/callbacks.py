"""What a run calls while it trains, so that others can read, log and stop it.

class StopAtLoss(Callback):
    def on_step(self, progress, step, metrics):
        if metrics["loss"] is not None and metrics["loss"] < 1:
            progress.stop("the loss is below 1")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from electra_ds.core.errors import ElectraError, TrainingError
from electra_ds.core.ranks import Ranks

Metrics = Mapping[str, float | None]
"""Numbers by name, as in metrics.jsonl; None for one that is not finite."""


@dataclass
class Progress:
    """The place that a run has reached."""

    run: Path
    """The run's folder."""
    step: int
    """Optimiser steps that are done."""
    stop_at: int
    """The step at which this start of the run saves and leaves."""
    total_steps: int
    """The steps of the schedule."""
    stop_reason: str | None = field(default=None, init=False)

    def stop(self, reason: str) -> None:
        """Ask the run to save a checkpoint and leave after the next step, as a signal does. It can be resumed."""
        self.stop_reason = reason


class Callback:
    """Called by a run on its main rank. Override what you need; none of these does anything by itself.

    An exception ends the run on all ranks, which then has failed; its checkpoints stay.
    """

    def on_start(self, progress: Progress) -> None:
        """Training is about to begin, or to resume at `progress.step`."""

    def on_step(self, progress: Progress, step: int, metrics: Metrics) -> None:
        """A step is done. Losses are read back together, so this comes up to `log_every` steps after the step."""

    def on_report(self, progress: Progress, summary: str) -> None:
        """Losses were read back; `summary` says in one line how the last step went."""

    def on_evaluate(self, progress: Progress, metrics: Metrics) -> None:
        """An evaluation on held-out text, or on a task's development sets, is done."""

    def on_checkpoint(self, progress: Progress, path: Path) -> None:
        """A checkpoint is complete. It was written in the background, so training may be further already."""

    def on_end(self, progress: Progress, status: str) -> None:
        """Training has ended, with the status that is in status.json."""


class Callbacks:
    """The callbacks of a run, which are called on its main rank."""

    def __init__(self, callbacks: Sequence[Callback], ranks: Ranks) -> None:
        self._callbacks = callbacks if ranks.is_main else ()
        self._is_alone = ranks.world_size == 1

    def call(self, method: str, *arguments: Any) -> None:
        """Call a method of each. Use it inside `fail_together`, so that no rank waits for one whose callback failed.

        Raises what a callback raised; with several ranks it is the cause of a TrainingError.
        """
        for callback in self._callbacks:
            try:
                getattr(callback, method)(*arguments)
            except Exception as error:
                if self._is_alone or isinstance(error, ElectraError):
                    raise
                name = type(callback).__name__
                raise TrainingError(f"{name}.{method}, a callback of this run, failed: {error!r}") from error
