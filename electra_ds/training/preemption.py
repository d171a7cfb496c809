"""Stopping a run early: all ranks agree to stop after a signal, the time limit or the launcher's death."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from typing import Any, NamedTuple

from electra_ds.core.launcher import SECOND_SIGNAL_AFTER_S, STOP_SIGNALS, exit_immediately
from electra_ds.core.ranks import Ranks


class StopRequest(NamedTuple):
    """The reason why all ranks stop."""

    reason: str
    signum: int | None
    """The signal's number; None without a signal."""
    is_to_be_resumed: bool = True
    """True if a job script should start the run again."""


_TIME_LIMIT, _LAUNCHER_DIED, _SAVE_FAILED, _CALLBACK = 1000, 1001, 1002, 1003  # above the numbers of signals
_REQUESTS = {
    _TIME_LIMIT: StopRequest("time limit", None),
    _LAUNCHER_DIED: StopRequest("the launcher died", signal.SIGTERM),
    _SAVE_FAILED: StopRequest("a checkpoint could not be written", None),
}


class Preemption:
    """Makes all ranks stop together after a signal on any rank, the time limit, a callback's request or the launcher's
    death.

    A thread reads signals, so that a second one, at least 5 s after the first, ends the process immediately, even while
    the main thread waits for another rank.
    """

    def __init__(self, ranks: Ranks, time_limit_s: float | None = None) -> None:
        """time_limit_s: seconds from now."""
        self._ranks = ranks
        self._deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._signal = 0
        self._asked: Any = None
        self._reason = ""
        self._handles_signals = threading.current_thread() is threading.main_thread()  # only there Python handles them

    def __enter__(self) -> Preemption:
        if not self._handles_signals:
            return self
        self._reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._writer = writer
        self._previous_descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _ignore) for number in STOP_SIGNALS}
        self._thread = threading.Thread(target=self._read, name="signals", daemon=True)
        self._thread.start()
        return self

    def _read(self) -> None:
        first: float | None = None
        while numbers := self._reader.recv(1):
            if numbers[0] not in STOP_SIGNALS:
                continue
            now = time.monotonic()
            if first is None:
                first, self._signal = now, numbers[0]
            elif now - first >= SECOND_SIGNAL_AFTER_S:
                exit_immediately(numbers[0])

    def ask(self, reason: str) -> None:
        """Request that all ranks stop. reason: for status.json."""
        self._reason = reason

    def decide(self, *, save_failed: bool = False) -> StopRequest | None:
        """Return the request to stop, if any, the same on all ranks. Every rank must call it after every step.

        save_failed: True if this rank must stop because a checkpoint could not be written. With several ranks a request
        takes effect one step later, so that no rank waits for the communication.
        """
        wish = self._signal
        if not wish and self._deadline is not None and time.monotonic() > self._deadline:
            wish = _TIME_LIMIT
        if not wish and self._ranks.launcher_watch.died():
            wish = _LAUNCHER_DIED
        if not wish and self._reason:
            wish = _CALLBACK
        if save_failed:
            wish = _SAVE_FAILED
        if self._ranks.world_size > 1:
            before, self._asked = self._asked, self._ranks.start_maximum(wish)
            wish = 0 if before is None else self._ranks.finish_maximum(before)
        if not wish:
            return None
        if wish == _CALLBACK:
            return StopRequest(self._ranks.broadcast(self._reason), None, is_to_be_resumed=False)
        return _REQUESTS.get(wish) or StopRequest(signal.Signals(wish).name, wish)

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None and self._asked is not None:
            with contextlib.suppress(RuntimeError):  # the other ranks may have exited already
                self._ranks.finish_maximum(self._asked)
        if not self._handles_signals:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_descriptor)
        self._writer.close()
        self._thread.join()
        self._reader.close()


def _ignore(number: int, frame: Any) -> None:
    """Do nothing: Python needs a handler, but the thread reads the signal's number."""
