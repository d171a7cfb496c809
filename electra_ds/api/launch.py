"""Start or resume a run from a command's options, the same way for pretraining and finetuning, and show its progress.

Everything below the command line logs, calls callbacks or returns data. A run shows the log on the terminal, and its
progress by the callback `ConsoleDisplay`; `quiet=True` prints nothing.
"""

from __future__ import annotations

import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from rich.console import Console
from rich.progress import TimeRemainingColumn

from electra_ds.api.run import Run
from electra_ds.config.options import RunOptions
from electra_ds.config.plugins import CALLBACK, find
from electra_ds.config.run_directory import RunDirectory
from electra_ds.core.errors import ConfigError
from electra_ds.core.program import command
from electra_ds.core.ranks import Ranks, join_ranks
from electra_ds.core.terminal import StageProgress, counting_bar, display, log_command, say
from electra_ds.data.build import ShowProgress
from electra_ds.pretraining.run_time import RunTime
from electra_ds.training import prepare
from electra_ds.training.callbacks import Callback, Progress, check_callbacks
from electra_ds.training.loop import Job
from electra_ds.training.preemption import Preemption

_log = logging.getLogger(__name__)
_PLAIN_LINE_EVERY_S = 15.0
OptionsT = TypeVar("OptionsT", bound=RunOptions)


RunFirst = Callable[["RunStart[Any]", Callback], Run]


class RunStart(ABC, Generic[OptionsT]):
    """One start of a run. All ranks call its methods, in the order in which they are defined here."""

    kind: Literal["pretrain", "finetune"]
    run: RunDirectory
    job: Job
    ranks: Ranks
    show_progress: ShowProgress
    callbacks: Sequence[Callback]

    def __init__(self, options: OptionsT) -> None:
        """Read the recipe of a new run. `launch` sets the attributes that the methods need. Raises ConfigError."""
        self.options = options
        self.is_new = options.resume is None

    @abstractmethod
    def default_path(self) -> Path:
        """Return the default directory of a new run."""

    def is_finished(self) -> bool:
        """Return whether a resumed run has nothing left to do."""
        return prepare.is_finished(self.run, self.kind, self.ranks)

    @abstractmethod
    def say_finished(self) -> None:
        """Log that nothing is left to do, and where the results are."""

    @abstractmethod
    def check(self) -> None:
        """Check everything that can be checked before anything is written or built."""

    @abstractmethod
    def show(self) -> None:
        """Log what a run would do, for a dry run, which calls none of the methods below except `run_time`."""

    @abstractmethod
    def run_time(self) -> RunTime | None:
        """Return the predicted time of the run; None for a GPU whose rates are unknown."""

    @property
    @abstractmethod
    def stop_at(self) -> int:
        """The step at which the run ends."""

    @property
    def num_steps(self) -> int:
        """The steps that `run_time` predicts."""
        return self.stop_at

    def build(self) -> None:  # a finetuning has read its examples by now
        """Build the data that the run reads."""

    @abstractmethod
    def train(self, preemption: Preemption, run_first: RunFirst) -> bool:
        """Announce the run and train in the locked run directory; return False if it stopped before `stop_at`.

        preemption: decides whether to stop early. run_first: launches another run, with one more callback, and returns
        when it has ended or stopped, for a run that needs its result.
        """

    @abstractmethod
    def say_end(self) -> None:
        """Log the results, on the main rank."""


def launch(start: RunStart[Any], *, quiet: bool, callbacks: Sequence[Callback]) -> Run:
    """Start or resume a run, and return it once it has ended or stopped. All ranks must call it.

    quiet: print nothing. callbacks: called in addition to the display.

    Raises InterruptedBySignalError after a signal, once a checkpoint is saved, and the package's other errors.
    """
    check_callbacks(callbacks)
    began = time.monotonic()
    with join_ranks() as ranks, display(quiet or not ranks.is_main) as console:
        return run_to_end(start, ranks, console, callbacks, began)


def run_to_end(
    start: RunStart[Any],
    ranks: Ranks,
    console: Console,
    callbacks: Sequence[Callback],
    began: float,
    preemption: Preemption | None = None,
) -> Run:
    """Do what `launch` does, for ranks that have already joined and a console that already shows the log.

    began: when the time limit began to count, by `time.monotonic`. preemption: that of the run that needs this one
    first, so that one signal or time limit stops both.
    """
    options = start.options
    with contextlib.ExitStack() as held:
        run = RunDirectory(ranks.broadcast(options.resume or options.run_dir or start.default_path()))
        start.run, start.ranks, start.show_progress = run, ranks, partial(StageProgress, console)
        start.callbacks = [ConsoleDisplay(console), *callbacks, *_named(options.callback or ())]
        if not start.is_new and start.is_finished():
            start.say_finished()
            return Run(run.path)
        start.check()
        if options.dry_run:
            start.show()
            _say_dry_run(start.run_time(), start.num_steps)
            return Run(run.path)
        if start.is_new:
            check_run_time(options, start.run_time, ranks)
        start.build()
        if options.callback is None:  # of the run that is resumed
            start.callbacks = [*start.callbacks, *_named(start.job.record.settings.callback)]
        prepare.lock_run(run, ranks, held, is_new=start.is_new)
        limit = None if options.time_limit is None else options.time_limit - (time.monotonic() - began)
        stoppable = Preemption(ranks, limit) if preemption is None else contextlib.nullcontext(preemption)
        with stoppable as entered:

            def run_first(first: RunStart[Any], callback: Callback) -> Run:
                return run_to_end(first, ranks, console, [callback, *callbacks], began, entered)

            has_ended = start.train(entered, run_first)
        if has_ended and ranks.is_main:
            start.say_end()
            if run.status() == "stopped":
                total = start.job.total_steps
                lead = f"Stopped at step {start.stop_at:,} of {total:,}, because of --stop-at. To resume:"
                log_command(_log, lead, f"{command(start.kind)} --resume {run.path}")
    return Run(run.path)


def _named(names: Sequence[str]) -> list[Callback]:
    """Return the callbacks of these names. Raises PluginError."""
    return [find(CALLBACK, name)() for name in names]


def check_run_time(options: RunOptions, predict: Callable[[], RunTime | None], ranks: Ranks) -> None:
    """Raise ConfigError for a run that may take a year or more, unless `yes` or a `time_limit` is given.

    All ranks must call it. predict: takes measurements on this machine, so it is called only if needed.
    """
    with ranks.fail_together():
        if not ranks.is_main or options.yes or options.time_limit is not None:
            return
        time = predict()
        if time is not None and time.may_take_years:
            raise ConfigError(
                f"This run is predicted to take {time} on this machine. Choose a smaller recipe or model, or "
                f"fewer steps, or add --yes to start it anyway."
            )


def _say_dry_run(time: RunTime | None, steps: int) -> None:
    if time is not None and time.may_take_years:
        _log.info("A run this long starts only with --yes.")
    shown = f"predicted to take {time}" if time is not None else "not predicted for this objective on this device"
    _log.info(f"time: {steps:,} steps, {shown}\nDry run: nothing was written and nothing was started.")


class ConsoleDisplay(Callback):
    """Shows a progress bar with ETA on a terminal, and a line from time to time elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = counting_bar(console, "step", "ETA", TimeRemainingColumn())

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
