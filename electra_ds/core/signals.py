"""The signals by which a run and a sweep save and leave, and leaving at once by a second one."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# The deepspeed launcher sends SIGINT and SIGTERM together: what comes within this time is the same wish.
SECOND_SIGNAL_AFTER_S = 5.0


def leave_at_once(number: int) -> NoReturn:
    """End this process with the exit status of the signal, whatever it is at."""
    with contextlib.suppress(OSError, ValueError):  # whoever read it may be gone
        if sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h")  # the progress bar had hidden the cursor
        os.write(2, f"\n{signal.Signals(number).name} again: leaving at once.\n".encode())
    os._exit(128 + number)
