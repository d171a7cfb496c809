"""What is shown on a terminal: progress bars that stay readable in 60 columns, and text that breaks between words."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, Progress, ProgressColumn
from rich.text import Text


def say(console: Console, text: str) -> None:
    """Print text as it is. On a terminal its lines break between words only; in a file they do not break."""
    console.print(_wrapped(console, text), highlight=False, markup=False, soft_wrap=True)


def note(console: Console, text: str) -> None:
    """Print a note, which is given without its full stop."""
    _headed(console, "Note:", text)


def warn(console: Console, text: str) -> None:
    """Print a warning, which is given without its full stop."""
    _headed(console, "Warning:", text)


def _headed(console: Console, head: str, text: str) -> None:
    shown = Text(_wrapped(console, f"{head} {text}."))
    shown.stylize("yellow", 0, len(head))
    console.print(shown, highlight=False, soft_wrap=True)


def _wrapped(console: Console, text: str) -> str:
    """Rich would break a word that is longer than a line, such as a path, which then could not be copied."""
    if not console.is_terminal:
        return text
    wrap = textwrap.TextWrapper(
        console.width, break_long_words=False, break_on_hyphens=False, replace_whitespace=False, drop_whitespace=True
    )
    return "\n".join("\n".join(wrap.wrap(line)) for line in text.split("\n"))


def flexible_bar() -> BarColumn:
    """A progress bar that takes the room which the other columns leave."""
    return BarColumn(bar_width=None)


class StatusProgress(Progress):
    """A progress bar over the whole width, and below it the status of each task on a line of its own.

    The status is the task's field `status`: parts that two spaces separate, the most important first. Parts that do
    not fit into the width are left out, the last ones first, so that times and ETA above are always there.
    """

    def __init__(
        self, *columns: ProgressColumn | str, console: Console | None = None, transient: bool = False,
        disable: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(*columns, console=console, transient=transient, disable=disable, expand=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if status := task.fields.get("status"):
                yield _Status(str(status))


class _Status:
    """As many of the parts as fit, from the first one on; the first one is cut where even it does not."""

    def __init__(self, status: str) -> None:
        self.parts = status.split("  ")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = self.parts[0]
        for part in self.parts[1:]:
            longer = f"{shown}  {part}"
            if len(longer) > options.max_width:
                break
            shown = longer
        yield Text(shown, no_wrap=True, overflow="ellipsis")
