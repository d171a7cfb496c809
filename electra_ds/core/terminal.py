"""Terminal output: progress bars that are readable in 60 columns, text that wraps only between words, and the log.

Nothing below the command line prints. The package says what it does through standard logging, under the logger
`electra_ds`; from Python, `logging.basicConfig(level=logging.INFO)` shows everything.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PREPARING = "preparing: "
"""The prefix of the lines that report preparations before training if there is no terminal."""
_PLAIN_LINE_EVERY_S = 10.0


def say(console: Console, text: str) -> None:
    """Print text without markup. A terminal wraps it only between words; in a file lines are not wrapped."""
    console.print(_wrapped(console, text), highlight=False, markup=False, soft_wrap=True)


def say_command(console: Console, lead: str, command: str) -> None:
    """Print a command for copying, unbroken, on its own line if it does not fit after `lead`."""
    fits = not console.is_terminal or len(lead) + 1 + len(command) <= console.width
    for line in [f"{lead} {command}"] if fits else [lead, command]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def with_command(lead: str, command: str) -> str:
    """Return a message for stderr that ends in a command for copying, on its own line if a terminal would wrap it."""
    fits = not sys.stderr.isatty() or len(lead) + 1 + len(command) <= shutil.get_terminal_size().columns
    return f"{lead}{' ' if fits else chr(10)}{command}"


def note(console: Console, text: str) -> None:
    """Print a note. `text` has no full stop at the end."""
    _labelled(console, "Note:", f"{text}.")


def warn(console: Console, text: str) -> None:
    """Print a warning."""
    _labelled(console, "Warning:", text)


def _labelled(console: Console, label: str, text: str) -> None:
    shown = Text(_wrapped(console, f"{label} {text}"))
    shown.stylize("yellow", 0, len(label))
    console.print(shown, highlight=False, soft_wrap=True)


def _wrapped(console: Console, text: str) -> str:
    """Return the text wrapped to the terminal's width, without breaking long words such as paths, as Rich would."""
    if not console.is_terminal:
        return text
    wrap = textwrap.TextWrapper(
        console.width, break_long_words=False, break_on_hyphens=False, replace_whitespace=False, drop_whitespace=True
    )
    return "\n".join("\n".join(wrap.wrap(line)) for line in text.split("\n"))


class StatusProgress(Progress):
    """A full-width progress bar for each task, with the task's status on the lines below it.

    The status is the task's field `status`. Each of its lines consists of parts separated by two spaces, the most
    important first. Parts that do not fit are left out, starting from the last, so that the times and the ETA above
    always stay visible.
    """

    def __init__(self, *columns: ProgressColumn | str, **more: Any) -> None:
        super().__init__(*columns, expand=True, **more)

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            for line in str(task.fields.get("status", "")).splitlines():
                yield _fitting(line, self.console.width)


def counting_bar(console: Console, unit: str, *eta: ProgressColumn | str) -> StatusProgress:
    """Return a progress bar that counts steps or trials. eta: the columns with the remaining time."""
    return StatusProgress(
        unit,
        MofNCompleteColumn(),
        _flexible_bar(),
        TimeElapsedColumn(),
        *eta,
        console=console,
        disable=not console.is_terminal,
    )


def _flexible_bar() -> BarColumn:
    """Return a progress bar that fills the width that the other columns leave."""
    return BarColumn(bar_width=None)


def _fitting(status: str, width: int) -> Text:
    """Return as many leading parts of a status as fit the width; the first one is cut if it does not fit."""
    shown, *rest = status.split("  ")
    for part in rest:
        if len(f"{shown}  {part}") > width:
            break
        shown = f"{shown}  {part}"
    return Text(shown, no_wrap=True, overflow="ellipsis")


class _Eta(TimeRemainingColumn):
    """The remaining time of a stage, or nothing if its total is unknown."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else Text("ETA ").append_text(super().render(task))


class StageProgress(StatusProgress):
    """The progress of preparations, stage by stage.

    A terminal shows a bar for each stage. Elsewhere, such as in a log file, a line is printed when a stage begins, and
    more from time to time. A sweep reads these lines in the logs of its trials.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            _flexible_bar(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            _Eta(),
            console=console,
        )
        self.disable = not self.console.is_terminal
        self._last_line = 0.0

    def begin(self, stage: str, total: float | None = None, status: str = "") -> None:
        """Begin a new stage, which later calls update. total: the amount of work; None if unknown."""
        self._stage = self.add_task(stage, total=total, status=status)
        self._say()

    def add(self, done: float) -> None:
        """Add to the amount of work done."""
        self.advance(self._stage, done)
        self._say_now_and_then()

    def set_status(self, status: str) -> None:
        """Set the status of the stage."""
        self.update(self._stage, status=status)
        self._say_now_and_then()

    def end(self, status: str = "") -> None:
        """End the stage. status: its result."""
        self.update(self._stage, total=1, completed=1, status=status)
        self._say()

    def _say_now_and_then(self) -> None:
        if time.monotonic() - self._last_line > _PLAIN_LINE_EVERY_S:
            self._say()

    def _say(self) -> None:
        if self.disable:
            self._last_line = time.monotonic()
            task = self.tasks[-1]
            share = [] if task.total is None else [f"{task.percentage:.0f}%"]
            status = [task.fields["status"]] if task.fields["status"] else []
            say(self.console, f"{PREPARING}{', '.join([task.description, *share, *status])}")


# --- the log

NOTE = 25
"""Between INFO and WARNING: worth knowing, but nothing is wrong."""
logging.addLevelName(NOTE, "NOTE")


def log_command(log: logging.Logger, lead: str, command: str) -> None:
    """Log a command for copying, introduced by `lead`."""
    log.info("%s %s", lead, command, extra={"command": (lead, command)})


class ConsoleHandler(logging.Handler):
    """Shows log messages as a command's output: notes and warnings with their label, commands unbroken.

    A logged object with the method `print_on(console)`, such as a report, prints itself.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        command = getattr(record, "command", None)
        if command is not None:
            say_command(self.console, *command)
        elif hasattr(record.msg, "print_on"):
            record.msg.print_on(self.console)
        elif record.levelno >= logging.WARNING:
            warn(self.console, record.getMessage())
        elif record.levelno >= NOTE:
            note(self.console, record.getMessage())
        else:
            say(self.console, record.getMessage())


@contextmanager
def log_shown_on(console: Console) -> Iterator[None]:
    """Show what the package logs on a console, and on no other, for as long as the context lasts. Handlers of the
    caller's own get it too."""
    log = logging.getLogger("electra_ds")
    handlers, level = log.handlers[:], log.level
    log.handlers = [*(each for each in handlers if not isinstance(each, ConsoleHandler)), ConsoleHandler(console)]
    log.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        log.handlers = handlers
        log.setLevel(level)


@contextmanager
def display(quiet: bool = False) -> Iterator[Console]:
    """Show the log on the terminal, unless `quiet`, and yield the console, on which progress is shown too.

    A notebook shows a bar only with ipywidgets; without them it gets plain lines.
    """
    console = Console(quiet=quiet)
    if console.is_jupyter and importlib.util.find_spec("ipywidgets") is None:
        console = Console(quiet=quiet, force_jupyter=False, force_terminal=False)
    with log_shown_on(console):
        yield console
