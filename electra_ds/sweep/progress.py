"""Show the progress of a running sweep: the trials done, the state of the running ones, and the time left."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from electra_ds.config.recipe import Recipe
from electra_ds.core.terminal import PREPARING
from electra_ds.sweep.folder import STOPPED_AT, MetricsTail, State, SweepFolder, TrialFiles
from electra_ds.sweep.trials import Trial

_LOOK_EVERY_S = 2.0
_LOG_EVERY_S = 60.0
_LEAST_S = 10.0
"""The time of training after which the speed of steps is meaningful."""
_SHOWN = 2
"""The number of running trials that get their own line."""
_log = logging.getLogger(__name__)


class SweepProgress:
    """The display of a sweep, called every few seconds. This one logs a line a minute; override it to show your own."""

    _logged: float

    def start(self, trials: int) -> None:
        """Start the display. trials: the number of trials to run."""
        self._logged = time.monotonic()

    def update(self, done: int, running: Sequence[str], eta: str) -> None:
        """Show the current state. done: the number of trials that have ended. running: lines about running trials,
        perhaps not all. eta: `ETA H:MM:SS`, or empty if it is not known."""
        if running and time.monotonic() - self._logged >= _LOG_EVERY_S:
            self._logged = time.monotonic()
            _log.info("running: %s  %s", " | ".join(running), eta)

    def stop(self) -> None:
        """Stop the display. No trial is running any more."""


@dataclass
class _Running:
    trial: Trial
    files: TrialFiles
    metrics: MetricsTail
    of_generator: MetricsTail
    """The metrics of the generator's own run, if the trial pretrains one first."""
    began: float
    is_resumed: bool
    """True if the run already had steps."""
    first: tuple[float, int] | None = None
    """The time at which a step of this attempt was first seen, and that step."""
    step: int = 0
    generator_step: int = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def describe(self) -> str:
        """Return a line about what the trial is doing."""
        if lines := self.metrics.lines():
            if self.first is None or lines[0]["step"] < self.step:  # a resumed run has truncated its file
                self.first = time.monotonic(), lines[-1]["step"]
            self.step = lines[-1]["step"]
        if self.step:
            return f"{self.trial.label}: step {self.step:,}"
        if lines := self.of_generator.lines():
            self.generator_step = lines[-1]["step"]
        if self.generator_step:
            return f"{self.trial.label}: step {self.generator_step:,} of its generator"
        last = "".join(self.files.last_lines()[-1:])
        stage = last.removeprefix(PREPARING) if last.startswith(PREPARING) else "prepares data and model"
        return f"{self.trial.label}: {stage}"

    def by_steps(self) -> tuple[float, float] | None:
        """Return (seconds left, seconds of all steps), or None if too few steps were made."""
        recipe = self.trial.recipe
        if not isinstance(recipe, Recipe) or self.first is None or self.step <= self.first[1]:
            return None
        seconds, last = time.monotonic() - self.first[0], self.trial.stop_at or recipe.schedule.total_steps
        of_one = seconds / (self.step - self.first[1])
        return None if seconds < _LEAST_S else (of_one * (last - self.step), of_one * last)


class SweepMonitor:
    """Watches the running trials for a `SweepProgress`, and logs how each of them ends."""

    def __init__(self, folder: SweepFolder, progress: SweepProgress, stages: Sequence[str], at_once: int = 1) -> None:
        """stages: the stage of each trial to run. at_once: the number of trials that run at a time."""
        self._folder, self._progress, self.at_once = folder, progress, at_once
        self._total, self._done = len(stages), 0
        self._waiting: Counter[str] = Counter(stages)
        """The number of trials of each stage that have not ended."""
        self._took: dict[str, list[float]] = {}
        self._running: dict[str, _Running] = {}
        self._lines: list[str] = []
        self._updated = time.monotonic()

    def __enter__(self) -> SweepMonitor:
        self._progress.start(self._total)
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def begin(self, trial: Trial) -> None:
        files = self._folder.trial(trial.key)
        metrics, of_generator = MetricsTail(files.run.metrics), MetricsTail(files.run.generator.metrics)
        is_resumed = bool(metrics.lines())
        running = _Running(trial, files, metrics, of_generator, time.monotonic(), is_resumed)
        self._running.setdefault(trial.key, running)

    def update(self) -> None:
        """Show what the running trials are doing, at most every few seconds."""
        if time.monotonic() - self._updated >= _LOOK_EVERY_S:
            self._updated = time.monotonic()
            lines = [running.describe() for running in self._running.values()]
            more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
            self._lines = lines[:_SHOWN] + more
            self._progress.update(self._done, self._lines, self._eta())

    def end(self, trial: Trial, state: State, reason: str) -> None:
        """Log how a trial ended, or that it saved and stopped."""
        running = self._running.pop(trial.key, None)
        seconds = 0.0 if running is None else running.seconds
        if state == "unfinished":
            _log.info("saved  %s, which is unfinished  %s", trial.label, _time(seconds))
            return
        if running is not None and not running.is_resumed and state != "failed":
            self._took.setdefault(trial.stage, []).append(seconds)
        self._waiting[trial.stage] -= 1
        why = f": {reason}" if state in ("failed", "collapsed", "waiting", "skipped") and reason else ""
        how = "stopped as planned" if reason.startswith(STOPPED_AT) else state
        self._count(f"{trial.label}  {how}{why}  {_time(seconds)}  {self._eta()}")

    def refuse(self, message: str) -> None:
        """Log why a suggestion is not a valid trial."""
        self._count(message)

    def _count(self, ended: str) -> None:
        self._done += 1
        _log.info("%s", f"{self._done}/{self._total}  {ended}".rstrip())
        self._progress.update(self._done, self._lines, self._eta())

    def _eta(self) -> str:
        """Estimate the time left from the steps of running trials and the duration of finished trials of each stage."""
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
