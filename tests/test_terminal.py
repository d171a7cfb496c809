"""What is shown stays readable on terminals of 60, 80 and 120 columns."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from electra_ds.data import build
from electra_ds.sweep.display import SweepDisplay
from electra_ds.sweep.folder import SweepFolder
from electra_ds.terminal import note, say
from electra_ds.train.tracking import TrainingDisplay

NUMBERS = "generator 3.6912  discriminator 0.3512  123,456 tokens/s  MFU 35.1%  skipped 3"
DESCRIPTION = "training the tokenizer"


def console_of(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)


def shown(console: Console) -> list[str]:
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]  # type: ignore[attr-defined]


def training(console: Console) -> None:
    display = TrainingDisplay(console, 1_000_000, 0)
    display.update(123_456, NUMBERS)
    console.print(display._progress.get_renderable())


def sweep(console: Console) -> None:
    display = SweepDisplay(console, SweepFolder(Path("nowhere")), 40, 2)
    now = "mrpc, recipe rc2020, seed 3 step 1,234  sts-b, recipe rc2020, seed 0 step 12 and 3 more"
    display._progress.update(display._task, completed=7, status=now, eta="ETA 1:02:03")
    console.print(display._progress.get_renderable())


def building(console: Console) -> None:
    progress = build._progress()
    task = progress.add_task(DESCRIPTION, total=100, status="1,234,000 documents")
    progress.update(task, completed=40)
    console.print(progress.get_renderable())


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize(
    ("show", "first", "status"),
    [
        (training, ["step", "123456/1000000", "0:00:0", "ETA", "-:--:--"], NUMBERS.split("  ")),
        (sweep, ["trials", "7/40", "0:00:0", "ETA 1:02:03"], ["mrpc, recipe rc2020, seed 3 step 1,234"]),
        (building, [DESCRIPTION, "40%", "0:00:0", "ETA"], ["1,234,000 documents"]),
    ],
)
def test_times_are_shown_at_every_width_and_the_status_is_cut_between_its_parts(
    show: Callable[[Console], None], first: list[str], status: list[str], width: int
) -> None:
    console = console_of(width)
    show(console)
    bar, below = shown(console)
    assert max(len(bar), len(below)) <= width
    assert all(part in bar for part in first), bar
    parts = below.split("  ")
    assert parts[: len(status)] == status[: len(parts)]
    assert len(parts) == len(status) or width < 80 or show is sweep


def test_text_breaks_between_words_on_a_terminal_and_nowhere_in_a_file() -> None:
    text = "data: 12,345 tokens in 60 documents (/a/long/path/" + "x" * 70 + "/store), 360 of them held out [by] span"
    console = console_of(60)
    say(console, text)
    lines = shown(console)
    assert len(lines) > 2
    assert " ".join(lines) == text
    note(console, "the tokenizer is the store's")
    assert shown(console)[-1] == "Note: the tokenizer is the store's."
    file = Console(file=io.StringIO(), width=60)
    say(file, text)
    assert shown(file) == [text]
