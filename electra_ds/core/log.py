"""What the package says while it works: standard logging, under the logger `electra_ds`, and how a terminal shows it.

Nothing below the command line prints. From Python, `logging.basicConfig(level=logging.INFO)` shows everything.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from electra_ds.core.terminal import note, say, say_command, warn

NOTE = 25
"""Between INFO and WARNING: worth knowing, and nothing is wrong."""
logging.addLevelName(NOTE, "NOTE")


def log_command(log: logging.Logger, lead: str, command: str) -> None:
    """Log a command to be copied, after some words."""
    log.info("%s %s", lead, command, extra={"command": (lead, command)})


class ConsoleHandler(logging.Handler):
    """Shows log messages as a command's output: notes and warnings with their label, commands unbroken."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        command = getattr(record, "command", None)
        if command is not None:
            say_command(self.console, *command)
        elif record.levelno >= logging.WARNING:
            warn(self.console, record.getMessage())
        elif record.levelno >= NOTE:
            note(self.console, record.getMessage())
        else:
            say(self.console, record.getMessage())


@contextmanager
def log_shown_on(console: Console) -> Iterator[None]:
    """Show what the package logs on a console, for as long as the context lasts."""
    log = logging.getLogger("electra_ds")
    before = log.handlers[:], log.level, log.propagate
    log.handlers, log.propagate = [ConsoleHandler(console)], False
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.handlers, log.level, log.propagate = before[0], before[1], before[2]
