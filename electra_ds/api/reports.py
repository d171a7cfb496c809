"""Sweeps, and what runs and sweeps have come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn, TimeElapsedColumn

from electra_ds.config.run_directory import RunDirectory
from electra_ds.core.errors import ConfigError
from electra_ds.core.terminal import StatusProgress, flexible_bar, log_shown_on
from electra_ds.report.scores import Report, report_scores
from electra_ds.report.tables import Line, Table, print_report
from electra_ds.sweep import run as sweeps
from electra_ds.sweep.folder import SweepFolder
from electra_ds.sweep.progress import SweepProgress
from electra_ds.sweep.results import report_sweep
from electra_ds.sweep.run import SweepOutcome
from electra_ds.sweep.sweep_file import Sweep
from electra_ds.sweep.trials import expand


class SweepBar(SweepProgress):
    """A progress bar of a sweep with ETA, and a line for each running trial below it."""

    def __init__(self, console: Console) -> None:
        self._bar = StatusProgress(
            TextColumn("trials"), MofNCompleteColumn(), flexible_bar(), TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            console=console,
        )  # fmt: skip

    def start(self, trials: int) -> None:
        self._task = self._bar.add_task("", total=trials, status="", eta="")
        self._bar.start()

    def update(self, done: int, running: Sequence[str], eta: str) -> None:
        self._bar.update(self._task, completed=done, status="\n".join(running), eta=eta)

    def stop(self) -> None:
        self._bar.update(self._task, status="", eta="")
        self._bar.stop()


def run_sweep(
    sweep: Sweep | None, folder: str | Path | None = None, *, overrides: Sequence[str] | Mapping[str, Any] = (),
    retry_failed: bool = False, local: bool = False, address: str | None = None, time_limit_s: float | None = None,
    console: Console | None = None, quiet: bool = False,
) -> SweepOutcome:  # fmt: skip
    """Run what is missing of a sweep, print and write its tables, and return its results.

    Args:
        sweep: a shipped name such as `smoke`, a path, or the content of a sweep's file. None resumes the sweep in
            `folder`.
        folder: the sweep's folder. By default runs/sweep-NAME.
        overrides: changes of the file, `{"finetune.seeds": [0, 1]}`.
        retry_failed: whether trials that failed are run again.
        local: whether trials run one after the other, without Ray.
        address: a Ray cluster. By default Ray is started on this machine.
        time_limit_s: the time after which trials save and leave.
        console: where it is shown. By default the terminal.
        quiet: whether nothing is printed.

    Raises:
        ConfigError: the sweep is not valid or cannot run here; nothing was run.
        InterruptedBySignalError: a signal came; what is done is kept.
    """
    console = console or Console(quiet=quiet)
    with log_shown_on(console):
        outcome = sweeps.run_sweep(
            sweep, folder, overrides=overrides, retry_failed=retry_failed, local=local, address=address,
            time_limit_s=time_limit_s, progress=SweepBar(console) if console.is_terminal else None,
        )  # fmt: skip
    print_report(outcome.report.parts, console)
    return outcome


def plan_sweep(sweep: Sweep | None, folder: str | Path | None = None, **how: Any) -> list[Table | Line]:
    """Return a table of a sweep's trials and what they cost, and run nothing. The arguments are those of `run_sweep`
    that say what is run and where: overrides, local and address."""
    from electra_ds.sweep import forecast  # imports torch

    return forecast.plan_sweep(sweep, folder, **how)


def report_runs(
    paths: str | Path | Sequence[str | Path], *, compare: Sequence[str] = (), csv: str | Path | None = None,
    submission: str | Path | None = None,
) -> Report:  # fmt: skip
    """Return the scores of finetunings over their seeds and tasks, or the tables of a sweep. Nothing is printed.

    Args:
        paths: run directories of finetunings, or the folder of a sweep, whose tables and pictures are written too.
        compare: names of published rows to show next to the scores, such as `mercier2021`.
        csv: a file that gets every run's scores.
        submission: a zip that gets the predictions of GLUE's test sets.

    Raises:
        ConfigError: the runs do not fit together.
        CheckpointError: there is no such run, it has no scores yet, it is a pretraining, which `Run.report` shows, or a
            file cannot be written.
    """
    given = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if len(given) == 1 and (given[0] / "sweep.yaml").is_file():
        if compare or csv or submission:
            raise ConfigError(f"{given[0]} is a sweep; to compare its runs, give {given[0]}/runs/*.")
        return report_of_sweep(given[0])
    for path in given:
        RunDirectory(path).check_kind("finetune")
    return report_scores(
        given, compare=compare, csv=None if csv is None else Path(csv),
        submission=None if submission is None else Path(submission),
    )  # fmt: skip


def report_of_sweep(path: Path) -> Report:
    """Return what a sweep has come to so far; its inputs may be gone by now."""
    folder = SweepFolder(path)
    spec = folder.read()
    trials = [*expand(spec, check=False), *folder.suggested_before(spec)]
    return report_sweep(folder, trials, spec, is_running=folder.is_being_run())
