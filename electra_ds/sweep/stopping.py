"""The wish to stop a sweep: a signal or the end of its time."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from electra_ds.errors import InterruptedBySignalError
from electra_ds.sweep.folder import SweepFolder


@contextmanager
def stoppable(folder: SweepFolder, time_limit_s: float | None) -> Iterator[None]:
    """While it lasts, SIGINT, SIGTERM and SIGUSR1 and the end of the time ask the sweep's trials to save and leave.

    Raises InterruptedBySignalError at its end where a signal came.
    """
    came: list[int] = []

    def stop(why: str) -> None:
        sys.stderr.write(f"{why}: the trials that run save and leave.\n")
        folder.ask_to_stop()

    def note(number: int, frame: FrameType | None) -> None:
        if not came:
            stop(signal.Signals(number).name)
        folder.ask_to_stop()  # again, where a driver elsewhere has only now begun
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
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
        name = signal.Signals(came[0]).name
        raise InterruptedBySignalError(
            f"{name}: what is done is kept. Go on with: bin/sweep --resume {folder.path}", came[0]
        )
