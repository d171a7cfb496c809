"""A table as data, and its rendering on a console."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import rich.table
from rich import box
from rich.console import Console
from rich.markup import escape


@dataclass
class Table:
    """Rows and columns of a report, ready to be rendered."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    """The cells of each row. An empty row is a gap between two sections."""
    text_columns: int = 1
    """How many columns, the first ones, hold text. The others hold numbers."""
    caption: str = ""


def print_table(table: Table, console: Console) -> None:
    """Print a table. Text is aligned left and folded where it is too long; numbers are aligned right."""
    shown = rich.table.Table(
        title=escape(table.title), title_justify="left", caption=escape(table.caption) or None, caption_justify="left",
        box=box.SIMPLE, padding=(0, 1),
    )  # fmt: skip
    for index, name in enumerate(table.columns):
        if index < table.text_columns:
            shown.add_column(escape(name), overflow="fold", min_width=min(8, len(name)))
        else:
            shown.add_column(escape(name), justify="right", no_wrap=True)
    for row in table.rows:
        shown.add_row(*map(escape, row)) if row else shown.add_section()
    console.print(shown)
