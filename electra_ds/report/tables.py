"""A table as data, for a rich console to render."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import rich.table
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape

from electra_ds.core.terminal import say, say_command, warn

_NARROWEST = 8
"""The maximum width of folded text."""


@dataclass
class Table:
    """The rows and columns of a report, ready to render."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    """The cells of each row. An empty row is a gap between two sections."""
    text_columns: int = 1
    """The number of leading columns that hold text. The others hold numbers."""
    caption: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the table without cutting anything off.

        Text is aligned left and folded if it is too long. Numbers are aligned right and folded only if the console is
        too narrow for them.
        """
        shown = rich.table.Table(
            title=escape(self.title), title_justify="left", caption=escape(self.caption) or None,
            caption_justify="left", box=box.SIMPLE, padding=(0, 1),
        )  # fmt: skip
        columns = zip(self.columns, *filter(None, self.rows), strict=True)
        longest = [max(cell_len(line) for cell in column for line in cell.split("\n")) for column in columns]
        least = [min(_NARROWEST, width) for width in longest[: self.text_columns]]
        fits = sum(2 + width for width in [*least, *longest[self.text_columns :]]) + 2 <= options.max_width
        for index, name in enumerate(self.columns):
            if index < self.text_columns:
                shown.add_column(escape(name), overflow="fold", min_width=least[index] if fits else None)
            else:
                shown.add_column(escape(name), justify="right", no_wrap=fits, overflow="fold")
        for row in self.rows:
            shown.add_row(*map(escape, row)) if row else shown.add_section()
        yield shown


@dataclass(frozen=True)
class Line:
    """A line of a report."""

    text: str
    is_warning: bool = False
    command: str = ""
    """A command to copy, shown after the text."""


def print_report(parts: Iterable[Table | Line], console: Console) -> None:
    """Print tables and lines in their order."""
    for part in parts:
        if isinstance(part, Table):
            console.print(part)
        elif part.command:
            say_command(console, part.text, part.command)
        elif part.is_warning:
            warn(console, part.text)
        else:
            say(console, part.text)
