"""Tables on a console."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from electra_ds.report.tables import Table

NUMBERS = ["60.00 ± 10.00", "12.50", "50.00–70.00", "1 234.5678"]


def printed(width: int) -> str:
    columns = ["task", "mean ± std", "baseline", "min–max", "[a-long-name]"]
    table = Table("scores of [one] run", columns, [["mnli", *NUMBERS], [], ["AVG", *NUMBERS]])
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def test_a_wide_console_keeps_each_row_on_a_line() -> None:
    lines = [line.split() for line in printed(100).splitlines()]
    assert lines.count(["AVG", *" ".join(NUMBERS).split()]) == 1
    assert ["scores", "of", "[one]", "run"] in lines


@pytest.mark.parametrize("width", [40, 60, 100])
def test_nothing_is_cut_off_on_a_narrow_console(width: int) -> None:
    text = printed(width)
    assert "…" not in text
    digits = sorted(char for char in "".join(NUMBERS * 2) if char.isdigit())
    assert sorted(char for char in text if char.isdigit()) == digits
