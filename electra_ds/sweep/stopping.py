"""The wish to stop a sweep: a signal or the end of its time."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from electra_ds.core.errors import InterruptedBySignalError
from electra_ds.core.launcher import SECOND_SIGNAL_AFTER_S, STOP_SIGNALS, leave_at_once
from electra_ds.core.program import command
from electra_ds.core.terminal import with_command
from electra_ds.sweep.folder import SweepFolder


@contextmanager
def stoppable(folder: SweepFolder, time_limit_s: float | None) -> Iterator[None]:
    """While it lasts, SIGINT, SIGTERM and SIGUSR1 and the end of the time ask the sweep's trials to save and leave. A
    second signal, at least 5 s after the first, ends this process at once and its trials with it.

    Raises InterruptedBySignalError at its end where a signal came.
    """
    came: list[tuple[int, float]] = []

    def stop(why: str, more: str = "") -> None:
        folder.ask_to_stop()
        with contextlib.suppress(OSError, ValueError):  # whoever read it may be gone
            sys.stderr.write(f"{why}: the trials that run save and leave.{more}\n")

    def note(number: int, frame: FrameType | None) -> None:
        came.append((number, time.monotonic()))
        if len(came) == 1:
            stop(signal.Signals(number).name, " A second signal leaves at once.")
        elif came[-1][1] - came[0][1] >= SECOND_SIGNAL_AFTER_S:
            leave_at_once(number)
        folder.ask_to_stop()  # again, where a driver elsewhere has only now begun

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    timer = None
    if time_limit_s is not None:
        timer = threading.Timer(min(time_limit_s, threading.TIMEOUT_MAX), stop, ["The time is over"])
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
        folder.forget_stop()
    if came:
        first, _ = came[0]
        resume = f"{command('sweep')} --resume {folder.path}"
        lead = f"{signal.Signals(first).name}: what is done is kept. Resume it with:"
        raise InterruptedBySignalError(with_command(lead, resume), first)
