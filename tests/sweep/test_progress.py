"""What a sweep says while it runs."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from electra_ds.api.reports import SweepBar
from electra_ds.sweep import progress
from electra_ds.sweep.folder import SweepFolder
from electra_ds.sweep.trials import Trial
from tests.sweep.test_spec import pretraining, trials_of

STEPS = 4000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Seconds that pass when the test says so."""
    found = SimpleNamespace(now=0.0, monotonic=lambda: found.now)
    monkeypatch.setattr(progress, "time", found)
    return found


class Shown:
    """A monitor of pretrainings of STEPS steps, and what it has logged."""

    def __init__(self, folder: Path, caplog: pytest.LogCaptureFixture, seeds: int, at_once: int) -> None:
        stage = {"set": {"schedule.total_steps": STEPS, "schedule.warmup_steps": 10}, "seeds": list(range(seeds))}
        self.trials, self.folder = trials_of(pretraining(**stage)), SweepFolder(folder / "sweep")
        caplog.set_level(logging.INFO, "electra_ds")
        self._log = caplog
        self.progress = progress.SweepProgress()
        self.monitor = self.monitor_of(self.progress, at_once)
        self.progress.start(seeds)

    def monitor_of(self, shown: progress.SweepProgress, at_once: int) -> progress.SweepMonitor:
        return progress.SweepMonitor(self.folder, shown, [trial.stage for trial in self.trials], at_once)

    def at(self, trial: Trial, step: int) -> None:
        path = self.folder.trial(trial.key).run.metrics
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({"kind": "train", "step": step}) + "\n")

    def eta(self, line: str) -> int:
        """In seconds, of the only line that begins so."""
        (found,) = (each for each in self.lines() if each.startswith(line))
        hours, minutes, seconds = re.search(r"ETA (\d+):(\d\d):(\d\d)$", found).groups()  # type: ignore[union-attr]
        return 3600 * int(hours) + 60 * int(minutes) + int(seconds)

    def lines(self) -> list[str]:
        return [record.getMessage() for record in self._log.records]


@pytest.fixture
def shown_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Callable[..., Shown]:
    return partial(Shown, tmp_path, caplog)


def test_the_time_that_is_left_is_told_by_the_steps_of_what_runs(clock: Any, shown_of: Callable[..., Shown]) -> None:
    """A run that goes on has made its first steps before."""
    shown = shown_of(seeds=1, at_once=2)
    (trial,) = shown.trials
    shown.at(trial, 3000)
    shown.monitor.begin(trial)
    assert "ETA" not in "".join(shown.lines())
    clock.now = 30.0  # its start
    shown.at(trial, 3010)
    shown.monitor.update()
    shown.at(trial, 3210)
    clock.now = 90.0
    shown.monitor.update()
    assert shown.eta("running: ") == 60 * (STEPS - 3210) / 200  # for all that a second one would have room


def test_a_trial_without_a_step_yet_is_said_to_prepare(clock: Any, shown_of: Callable[..., Shown]) -> None:
    shown = shown_of(seeds=1, at_once=1)
    shown.monitor.begin(shown.trials[0])
    clock.now = 70.0
    shown.monitor.update()
    assert shown.lines()[-1].rstrip().endswith("prepares data and model")
    of_generator = shown.folder.trial(shown.trials[0].key).run.generator.metrics
    of_generator.parent.mkdir(parents=True)
    of_generator.write_text('{"kind": "train", "step": 40}\n')
    clock.now = 140.0
    shown.monitor.update()
    shown.at(shown.trials[0], 12)
    clock.now = 210.0
    shown.monitor.update()
    assert shown.lines()[-2].rstrip().endswith("s0: step 40 of its generator")
    assert "prepares" not in shown.lines()[-1]
    assert "step 12" in shown.lines()[-1]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_each_running_trial_has_a_line_with_the_stage_in_its_log(
    clock: Any, shown_of: Callable[..., Shown], width: int
) -> None:
    shown = shown_of(seeds=3, at_once=3)
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    bar = SweepBar(console)
    bar._bar.start = lambda: None  # type: ignore[method-assign]  # one picture of it is enough
    bar.start(3)
    shown.monitor = shown.monitor_of(bar, at_once=3)
    for trial, line in zip(
        shown.trials, ("tokenising, 45%", "waiting for another process to build stores/x", "x"), strict=True
    ):
        shown.folder.trial(trial.key).log.parent.mkdir(parents=True, exist_ok=True)
        shown.folder.trial(trial.key).log.write_text(f"preparing: training the tokenizer\npreparing: {line}\n")
        shown.monitor.begin(trial)
    clock.now = 3.0
    shown.monitor.update()
    console.print(bar._bar.get_renderable())
    first, second, third = (line.strip() for line in console.file.getvalue().splitlines()[-3:])  # type: ignore[attr-defined]
    assert first.endswith("s0: tokenising, 45%")
    assert "s1: waiting for another process" in second
    assert third == "and 1 more"
    assert max(map(len, (first, second))) <= width
    with shown.folder.trial(shown.trials[0].key).log.open("a") as log:
        log.write("run directory: runs/x\n")  # what comes after the preparation
    clock.now = 6.0
    shown.monitor.update()
    console.print(bar._bar.get_renderable())
    assert "s0: prepares data and model" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_trial_that_has_saved_has_not_ended(clock: Any, shown_of: Callable[..., Shown]) -> None:
    shown = shown_of(seeds=2, at_once=1)
    shown.monitor.begin(shown.trials[0])
    clock.now = 5.0
    shown.monitor.end(shown.trials[0], "unfinished", "")
    shown.monitor.begin(shown.trials[1])
    shown.monitor.end(shown.trials[1], "done", "")
    assert shown.lines()[0].startswith("saved  ")
    assert shown.lines()[1].startswith("1/2  ")


def test_trials_that_wait_take_what_others_took(clock: Any, shown_of: Callable[..., Shown]) -> None:
    shown = shown_of(seeds=4, at_once=2)
    for trial in shown.trials[:2]:
        shown.monitor.begin(trial)
    clock.now = 100.0
    shown.monitor.end(shown.trials[0], "done", "")
    assert shown.eta("1/4") == (2 * 100) / 2  # two wait, and the one that runs has as good as ended
    shown.monitor.end(shown.trials[1], "failed", "it broke")
    shown.monitor.end(shown.trials[2], "waiting", "its encoder is not pretrained")
    assert shown.lines()[1].startswith("2/4")
    assert "failed: it broke  0:01:40" in shown.lines()[1]
    assert "waiting: its encoder is not pretrained" in shown.lines()[2]
