"""Where a run's numbers go: metrics.jsonl and the terminal."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from electra_ds.core.errors import CheckpointError
from electra_ds.core.terminal import StatusProgress, flexible_bar, say

_PLAIN_LINE_EVERY_S = 15.0


class MetricsFile:
    """metrics.jsonl: one JSON object a line, with `step` and `kind` ("train" or "eval")."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Lines after `resume_step`, which a killed run wrote beyond its last checkpoint, are dropped.

        `reached` is the last step that they told of, `evaluated` the last one that is kept of an evaluation.
        """
        try:
            lines = read_metrics(path) if path.exists() else []
            self.reached = max((line["step"] for line in lines), default=0)
            kept = [line for line in lines if line["step"] <= resume_step]
            self.evaluated = max((line["step"] for line in kept if line["kind"] == "eval"), default=0)
            if path.exists():
                temporary = path.with_suffix(".tmp")
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf8")
                temporary.replace(path)
            self._file = path.open("a", encoding="utf8", buffering=1)
        except OSError as error:
            raise CheckpointError(f"Cannot write {path}: {error.strerror}.") from error

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Raises CheckpointError if the disk is full."""
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        except OSError as error:
            raise CheckpointError(f"Cannot write {self._file.name}: {error.strerror}.") from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the line that did not fit was reported when it was written
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line; one may have been cut by a kill."""
    return metrics_lines(path.read_text("utf8", errors="replace"))


def metrics_lines(text: str) -> list[dict[str, Any]]:
    lines = []
    for line in text.splitlines():
        try:
            values = json.loads(line)
            lines.append(values | {"step": int(values["step"]), "kind": str(values["kind"])})
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
    return lines


class TrainingDisplay:
    """A progress bar with ETA on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, total_steps: int, first_step: int) -> None:
        self.console = console
        self.total_steps = total_steps
        self._first_step = first_step
        self._started = self._last_line = time.monotonic()
        self._progress = StatusProgress(
            TextColumn("step"), MofNCompleteColumn(), flexible_bar(), TimeElapsedColumn(), TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=total_steps, completed=first_step, status="")

    def __enter__(self) -> TrainingDisplay:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def update(self, step: int, numbers: str) -> None:
        """Say where training is. `step` counts finished steps."""
        self._progress.update(self._task, completed=step, status=numbers)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self._last_line > _PLAIN_LINE_EVERY_S or step == self.total_steps):
            self._last_line = now
            rate = (now - self._started) / max(1, step - self._first_step)
            eta = int(rate * (self.total_steps - step))
            eta_text = f"ETA {eta // 3600}:{eta // 60 % 60:02}:{eta % 60:02}"
            self.say(f"step {step}/{self.total_steps}  {numbers}  {eta_text}")

    def say(self, text: str) -> None:
        say(self.console, text)
