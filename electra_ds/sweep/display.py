"""The display of a running sweep: how many trials are done, what the running ones are doing, and when it will end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn, TimeElapsedColumn

from electra_ds.config.recipe import Recipe
from electra_ds.core.terminal import PREPARING, StatusProgress, flexible_bar, say
from electra_ds.sweep.folder import STOPPED_AT, MetricsTail, State, SweepFolder, TrialFiles
from electra_ds.sweep.trials import Trial

_LOOK_EVERY_S = 2.0
_PLAIN_LINE_EVERY_S = 60.0
_LEAST_S = 10.0
"""The time of steps before which their speed says little."""
_SHOWN = 2
"""Running trials that have a line of their own."""


@dataclass
class _Running:
    trial: Trial
    files: TrialFiles
    metrics: MetricsTail
    began: float
    is_resumed: bool
    """True if there were steps before."""
    first: tuple[float, int] | None = None
    """The time at which a step of this attempt was first seen, and that step."""
    step: int = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def look(self) -> str:
        """Return what the trial is doing."""
        if lines := self.metrics.lines():
            if self.first is None or lines[0]["step"] < self.step:  # a resumed run has cut its file back
                self.first = time.monotonic(), lines[-1]["step"]
            self.step = lines[-1]["step"]
        return f"{self.trial.label}: {f'step {self.step:,}' if self.step else self._preparation()}"

    def _preparation(self) -> str:
        """Return what a trial without a step is doing, by the last line of its log."""
        last = self.files.last_lines()[-1:]
        stages = [line.removeprefix(PREPARING) for line in last if line.startswith(PREPARING)]
        return stages[0] if stages else "prepares data and model"

    def by_steps(self) -> tuple[float, float] | None:
        """Return (seconds that are left, seconds that all steps take), or None if too few steps were made."""
        recipe = self.trial.recipe
        if not isinstance(recipe, Recipe) or self.first is None or self.step <= self.first[1]:
            return None
        seconds, last = time.monotonic() - self.first[0], self.trial.stop_at or recipe.schedule.total_steps
        of_one = seconds / (self.step - self.first[1])
        return None if seconds < _LEAST_S else (of_one * (last - self.step), of_one * last)


class SweepDisplay:
    """A progress bar with ETA on a terminal; elsewhere a line for each trial, and one a minute between them."""

    def __init__(self, console: Console, folder: SweepFolder, trials: int, at_once: int) -> None:
        """trials: how many are to be run; at_once: how many at a time."""
        self._console, self._folder, self.at_once = console, folder, at_once
        self._total, self._done = trials, 0
        self._waiting: dict[str, int] = {}
        """The number of trials of each stage that have not ended."""
        self._took: dict[str, list[float]] = {}
        self._running: dict[str, _Running] = {}
        self._looked = self._said = time.monotonic()
        self._progress = StatusProgress(
            TextColumn("trials"), MofNCompleteColumn(), flexible_bar(), TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=trials, status="", eta="")

    def __enter__(self) -> SweepDisplay:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.update(self._task, status="", eta="")
        self._progress.stop()

    def expect(self, stages: Sequence[str]) -> None:
        """Take note of the stage of each trial that is to be run."""
        self._waiting = dict(Counter(stages))

    def begin(self, trial: Trial) -> None:
        files = self._folder.trial(trial.key)
        metrics = MetricsTail(files.run.metrics)
        is_resumed = bool(metrics.lines())
        self._running.setdefault(trial.key, _Running(trial, files, metrics, time.monotonic(), is_resumed))

    def look(self) -> None:
        """Show what the running trials are doing, every few seconds."""
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY_S:
            return
        self._looked = now
        shown = [running.look() for running in self._running.values()]
        lines = shown[:_SHOWN] + ([f"and {len(shown) - _SHOWN} more"] if len(shown) > _SHOWN else [])
        self._progress.update(self._task, status="\n".join(lines), eta=self._eta())
        if not self._console.is_terminal and now - self._said >= _PLAIN_LINE_EVERY_S and shown:
            self.say(f"running: {' | '.join(lines)}  {self._eta()}")

    def end(self, trial: Trial, state: State, reason: str) -> None:
        """Say how a trial ended, or that it has saved and left."""
        running = self._running.pop(trial.key, None)
        seconds = 0.0 if running is None else running.seconds
        if state == "unfinished":
            self.say(f"saved  {trial.label}, which is unfinished  {_time(seconds)}")
            return
        if running is not None and not running.is_resumed and state != "failed":
            self._took.setdefault(trial.stage, []).append(seconds)
        self._waiting[trial.stage] = self._waiting.get(trial.stage, 1) - 1
        self._done += 1
        eta = self._eta()
        self._progress.update(self._task, completed=self._done, eta=eta)
        why = f": {reason}" if state in ("failed", "collapsed", "waiting", "skipped") and reason else ""
        how = "stopped as planned" if reason.startswith(STOPPED_AT) else state
        self.say(f"{self._done}/{self._total}  {trial.label}  {how}{why}  {_time(seconds)}  {eta}".rstrip())

    def refuse(self, message: str) -> None:
        """Say why a suggestion is no trial."""
        self._done += 1
        self._progress.update(self._task, completed=self._done)
        self.say(f"{self._done}/{self._total}  {message}")

    def say(self, line: str) -> None:
        """Print a line among those of the trials."""
        self._said = time.monotonic()
        say(self._console, line)

    def _eta(self) -> str:
        """Estimate the time left from the steps of the running trials and from the time that others of a stage took."""
        left = longest = 0.0
        for stage, count in self._waiting.items():
            if count <= 0:
                continue
            running = [each for each in self._running.values() if each.trial.stage == stage]
            by_steps = [each.by_steps() for each in running]
            known = [each[1] for each in by_steps if each is not None] + self._took.get(stage, [])
            if not known:
                return ""
            mean = sum(known) / len(known)
            rests = [
                max(0.0, mean - each.seconds) if estimate is None else estimate[0]
                for each, estimate in zip(running, by_steps, strict=True)
            ]
            left += sum(rests) + mean * (count - len(running))
            longest = max(longest, *rests, 0.0)
        return f"ETA {_time(max(left / self.at_once, longest))}" if left else ""


def _time(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
