"""The progress of a run on a terminal, or as lines in a file."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from electra_ds.core.terminal import StatusProgress, flexible_bar, say
from electra_ds.training.callbacks import Callback, Progress

_PLAIN_LINE_EVERY_S = 15.0


class ConsoleDisplay(Callback):
    """A progress bar with ETA on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = StatusProgress(
            TextColumn("step"), MofNCompleteColumn(), flexible_bar(), TimeElapsedColumn(), TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def on_start(self, progress: Progress) -> None:
        self._started = self._last_line = time.monotonic()
        self._first_step = progress.step
        self._task = self._bar.add_task("", total=progress.stop_at, completed=progress.step, status="")
        self._bar.start()

    def on_report(self, progress: Progress, summary: str) -> None:
        self._bar.update(self._task, completed=progress.step, status=summary)
        now, is_last = time.monotonic(), progress.step == progress.stop_at
        if not self.console.is_terminal and (now - self._last_line > _PLAIN_LINE_EVERY_S or is_last):
            self._last_line = now
            rate = (now - self._started) / max(1, progress.step - self._first_step)
            eta = int(rate * (progress.stop_at - progress.step))
            eta_text = f"ETA {eta // 3600}:{eta // 60 % 60:02}:{eta % 60:02}"
            say(self.console, f"step {progress.step}/{progress.stop_at}  {summary}  {eta_text}")

    def on_end(self, progress: Progress, status: str) -> None:
        self._bar.stop()
