"""What a run calls while it trains, so that others can read, log and stop it.

class StopAtLoss(Callback):
    def on_step(self, progress, metrics):
        if metrics["loss"] is not None and metrics["loss"] < 1:
            progress.stop("the loss is below 1")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

Metrics = Mapping[str, float | None]
"""Numbers by name, as in metrics.jsonl; None for one that is not finite."""


@dataclass
class Progress:
    """Where a run is."""

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

    An exception ends the run, which then has failed; its checkpoints stay.
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
        """A checkpoint is complete. Checkpoints are written in the background, so training may be further already."""

    def on_end(self, progress: Progress, status: str) -> None:
        """Training has ended, with the status that is in status.json."""
