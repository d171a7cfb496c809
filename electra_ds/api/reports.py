"""Sweeps, and the results of runs and sweeps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from electra_ds.config.commands import SweepOptions
from electra_ds.config.recipe import given_options
from electra_ds.config.run_directory import RunDirectory
from electra_ds.core.errors import ConfigError
from electra_ds.core.terminal import counting_bar, display
from electra_ds.report.scores import report_scores
from electra_ds.report.tables import Line, Report, Table
from electra_ds.sweep import run as sweeps
from electra_ds.sweep.folder import SweepFolder
from electra_ds.sweep.progress import SweepProgress
from electra_ds.sweep.results import report_sweep
from electra_ds.sweep.run import SweepOutcome
from electra_ds.sweep.sweep_file import Sweep
from electra_ds.sweep.trials import expand

if TYPE_CHECKING:
    from rich.console import Console


class SweepBar(SweepProgress):
    """A sweep's progress bar with ETA, and a line for each running trial below it."""

    def __init__(self, console: Console) -> None:
        self._bar = counting_bar(console, "trials", "{task.fields[eta]}")

    def start(self, trials: int) -> None:
        self._task = self._bar.add_task("", total=trials, status="", eta="")
        self._bar.start()

    def update(self, done: int, running: Sequence[str], eta: str) -> None:
        self._bar.update(self._task, completed=done, status="\n".join(running), eta=eta)

    def stop(self) -> None:
        self._bar.update(self._task, status="", eta="")
        self._bar.stop()


def run_sweep(
    sweep: Sweep | None,
    folder: str | Path | None = None,
    *,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    retry_failed: bool = False,
    local: bool = False,
    address: str | None = None,
    time_limit_s: float | None = None,
    quiet: bool = False,
) -> SweepOutcome:
    """Run a sweep's missing trials, write its tables, and return its results; `print(outcome.report)` shows the tables.

    Args:
        sweep: a shipped name such as `smoke`, a path, or the content of a sweep's file. None resumes the sweep in
            `folder`.
        folder: the sweep's folder. By default runs/sweep-NAME.
        overrides: changes to the file, `{"finetune.seeds": [0, 1]}`.
        retry_failed: run the failed trials of a resumed sweep again.
        local: run trials one after the other, without Ray.
        address: the address of a Ray cluster. By default Ray is started on this machine.
        time_limit_s: the time after which trials save and exit.
        quiet: print nothing.

    Raises:
        ConfigError: the sweep is not valid or cannot run here; nothing was run.
        InterruptedBySignalError: a signal stopped the sweep; finished work is kept.
    """
    if sweep is not None or folder is not None:
        place = {"resume": folder} if sweep is None else {"what": ["sweep"], "out": folder}
        flags = {"retry_failed": retry_failed or None, "local": local or None, "address": address}
        given_options(SweepOptions, None, place | flags)
    with display(quiet) as console:
        return sweeps.run_sweep(
            sweep,
            folder,
            overrides=overrides,
            retry_failed=retry_failed,
            local=local,
            address=address,
            time_limit_s=time_limit_s,
            progress=SweepBar(console) if console.is_terminal else None,
        )


def plan_sweep(sweep: Sweep | None, folder: str | Path | None = None, **how: Any) -> list[Table | Line]:
    """Return a table of a sweep's trials and their cost, and run nothing. how: `overrides`, `local` and `address` as in
    `run_sweep`."""
    from electra_ds.sweep import forecast  # imports torch

    return forecast.plan_sweep(sweep, folder, **how)


def report_runs(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    compare: Sequence[str] = (),
    csv: str | Path | None = None,
    submission: str | Path | None = None,
) -> Report:
    """Return the scores of finetunings over seeds and tasks, or the tables of a sweep, without printing anything.

    Args:
        paths: run directories of finetunings, or a sweep's folder, whose tables and plots are written too.
        compare: names of published rows to show next to the scores, such as `mercier2021`.
        csv: the file to write every run's scores to.
        submission: the zip to write the predictions for GLUE's test sets to.

    Raises:
        ConfigError: the runs do not fit together.
        CheckpointError: there is no such run, it has no scores yet, it is a pretraining (see `Run.report`), or a file
            cannot be written.
    """
    given = [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    if len(given) == 1 and (given[0] / "sweep.yaml").is_file():
        if compare or csv or submission:
            raise ConfigError(f"{given[0]} is a sweep; to compare its runs, give {given[0]}/runs/*.")
        return report_of_sweep(given[0])
    for path in given:
        RunDirectory(path).check_kind("finetune")
    return report_scores(
        given,
        compare=compare,
        csv=None if csv is None else Path(csv),
        submission=None if submission is None else Path(submission),
    )


def report_of_sweep(path: Path) -> Report:
    """Return a sweep's results so far. Its inputs need not exist any more."""
    folder = SweepFolder(path)
    spec = folder.read()
    trials = [*expand(spec, check=False), *folder.suggested_before(spec)]
    return report_sweep(folder, trials, spec, is_running=folder.is_being_run())
