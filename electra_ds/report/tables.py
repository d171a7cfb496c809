"""Tables, lines and reports as data, for a rich console to render."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import pandas as pd  # type: ignore[import-untyped]
import rich.table
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.text import Text

from electra_ds.core.terminal import say, say_command, warn

_NARROWEST = 8
"""The maximum width of folded text."""
_WIDTH = 120
"""The columns of a report as text."""


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
            title=escape(self.title),
            title_justify="left",
            caption=escape(self.caption) or None,
            caption_justify="left",
            box=box.SIMPLE,
            padding=(0, 1),
        )
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


Part: TypeAlias = Table | Line | Text


def print_report(parts: Iterable[Part], console: Console) -> None:
    """Print the parts of a report in their order."""
    for part in parts:
        if not isinstance(part, Line):
            console.print(part)
        elif part.command:
            say_command(console, part.text, part.command)
        elif part.is_warning:
            warn(console, part.text)
        else:
            say(console, part.text)


@dataclass(frozen=True, repr=False)
class Report:
    """The results of runs. `print(report)` shows its tables and the lines between them."""

    parts: Sequence[Part]
    """The tables, lines and styled text, in display order."""
    results: pd.DataFrame
    """The numbers behind the tables: for a sweep one row per trial, as in its results.csv; for finetunings one row per
    metric and run, as `bin/report --csv` writes them; for a pretraining one row per evaluation."""

    @property
    def tables(self) -> list[pd.DataFrame]:
        """The tables as displayed, with numbers and ± as text."""
        tables = [part for part in self.parts if isinstance(part, Table)]
        return [pd.DataFrame(list(filter(None, each.rows)), columns=each.columns) for each in tables]

    def __repr__(self) -> str:
        return as_text(self.parts)

    def print_on(self, console: Console) -> None:
        """Print the report. The log's display calls this for a report that is logged."""
        print_report(self.parts, console)


def as_text(parts: Iterable[Part]) -> str:
    """Return the parts of a report as plain text."""
    file = io.StringIO()
    print_report(parts, Console(file=file, width=_WIDTH, force_jupyter=False))
    return file.getvalue()
