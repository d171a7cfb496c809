"""What is shown stays readable on terminals of 60, 80 and 120 columns."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path

import pandas as pd  # type: ignore[import-untyped]
import pytest
from rich.console import Console

from electra_ds.api.launch import ConsoleDisplay
from electra_ds.api.reports import SweepBar
from electra_ds.config.sections import TokenizerSection
from electra_ds.core.terminal import StageProgress, log_shown_on, note, say, say_command
from electra_ds.data.build import build_store
from electra_ds.data.corpus import Corpus, open_source
from electra_ds.report.tables import Line, Report, Table
from electra_ds.training.callbacks import Progress
from tests.helpers import REPOSITORY

NUMBERS = "generator 3.6912  discriminator 0.3512  123,456 tokens/s  MFU 35.1%  skipped 3"
DESCRIPTION = "training the tokenizer"


def console_of(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)


def shown(console: Console) -> list[str]:
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]  # type: ignore[attr-defined]


def training(console: Console) -> None:
    display, progress = ConsoleDisplay(console), Progress(Path("run"), 0, 1_000_000, 1_000_000)
    display._bar.start = lambda: None  # type: ignore[method-assign]  # one picture of it is enough
    display.on_start(progress)
    progress.step = 123_456
    display.on_report(progress, NUMBERS)
    console.print(display._bar.get_renderable())


def sweep(console: Console) -> None:
    display = SweepBar(console)
    display._bar.start = lambda: None  # type: ignore[method-assign]
    display.start(40)
    display.update(7, ["mrpc, recipe rc2020, seed 3: step 1,234"], "ETA 1:02:03")
    console.print(display._bar.get_renderable())


def building(console: Console) -> None:
    progress = StageProgress(console)
    progress.begin(DESCRIPTION, total=100, status="1,234,000 documents")
    progress.add(40)
    console.print(progress.get_renderable())


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize(
    ("show", "first", "status"),
    [
        (training, ["step", "123456/1000000", "0:00:0", "ETA", "-:--:--"], NUMBERS.split("  ")),
        (sweep, ["trials", "7/40", "0:00:0", "ETA 1:02:03"], ["mrpc, recipe rc2020, seed 3: step 1,234"]),
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
    assert len(parts) == len(status) or width < 80


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


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_command_to_be_copied_is_never_broken(width: int) -> None:
    command = "bin/sweep --resume /home/somebody/experiments/runs/sweep-glue-seeds --retry-failed"
    console = console_of(width)
    say_command(console, "Run what failed again:", command)
    lines = shown(console)
    assert lines == ([f"Run what failed again: {command}"] if width == 120 else ["Run what failed again:", command])
    file = Console(file=io.StringIO(), width=60)
    say_command(file, "Run what failed again:", command)
    assert shown(file) == [f"Run what failed again: {command}"]


def test_running_text_is_printed_by_one_module_only() -> None:
    """What is printed in any other way breaks inside words. A JSON document is no running text."""
    own = {REPOSITORY / "electra_ds" / "core" / "terminal.py"}
    found = {
        path.name: [line.strip() for line in path.read_text("utf8").splitlines() if "soft_wrap" in line]
        for path in set((REPOSITORY / "electra_ds").rglob("*.py")) - own
    }
    assert {name: lines for name, lines in found.items() if lines and "json.dumps" not in lines[0]} == {}


def test_without_a_terminal_the_stages_of_building_a_store_are_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the {n} lamps of the house had gone out" for n in range(200)))
    section = TokenizerSection(kind="wordpiece", vocab_size=400, lowercase=True)
    corpus = Corpus((open_source([str(text)], "file", "text"),))
    build_store(corpus, section, tmp_path / "store", workers=1, show_progress=StageProgress)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert all(line.startswith("preparing: ") for line in lines), lines
    stages = list(dict.fromkeys(line.removeprefix("preparing: ").split(",")[0] for line in lines))
    assert stages == ["reading text", "training the tokenizer", "tokenising"]
    assert lines[-1].endswith("100%, 1 documents")


def test_a_stage_whose_extent_is_unknown_shows_no_share() -> None:
    """A share of 0 for minutes looks as if nothing happened."""
    console = console_of(80)
    progress = StageProgress(console)
    progress.begin("reading text")
    console.print(progress.get_renderable())
    assert "%" not in shown(console)[0]
    assert "ETA" not in shown(console)[0]


def test_the_log_is_shown_on_one_console_and_reaches_handlers_of_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("electra_ds.anything")
    outer, inner = console_of(80), console_of(80)
    with log_shown_on(outer), log_shown_on(inner):
        log.info("a step is done")
    log.info("nobody listens")
    assert inner.file.getvalue() == "a step is done\n"  # type: ignore[attr-defined]
    assert outer.file.getvalue() == ""  # type: ignore[attr-defined]
    assert "a step is done" in caplog.messages


def test_a_report_in_the_log_fits_the_console_and_is_text_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    line = "words " * 15 + "end"
    report = Report([Table("scores", ["task", "value"], [["mrpc", "0.9"]]), Line(line)], pd.DataFrame())
    console = console_of(60)
    with log_shown_on(console):
        logging.getLogger("electra_ds.anything").info(report)
    lines = shown(console)
    assert ["mrpc", "0.9"] in [each.split() for each in lines]
    assert " ".join(lines[-2:]) == line
    assert caplog.messages == [str(report)]
    assert str(report).endswith(f"{line}\n")
