"""Run a sweep from beginning to end, or the trials that are missing."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from electra_ds.config.values import as_overrides
from electra_ds.core.errors import ConfigError
from electra_ds.report.tables import Report
from electra_ds.sweep.folder import AS_PLANNED, ENDED, SweepFolder
from electra_ds.sweep.processes import check_reachable, run_locally, this_machine, trials_at_once
from electra_ds.sweep.progress import SweepMonitor, SweepProgress
from electra_ds.sweep.results import report_sweep
from electra_ds.sweep.spec import SweepSpec
from electra_ds.sweep.sweep_file import Sweep, as_spec
from electra_ds.sweep.trials import Trial, expand, suggested, trials_text

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepOutcome:
    """The results of a sweep."""

    is_complete: bool
    """True if every trial has ended as planned."""
    report: Report

    @property
    def results(self) -> pd.DataFrame:
        """A row for each trial, as in results.csv."""
        return self.report.results


def open_sweep(
    sweep: Sweep | None, folder: str | Path | None, overrides: Sequence[str] = ()
) -> tuple[SweepSpec, SweepFolder]:
    """Return a sweep and its folder. If `sweep` is None, read the one in the folder."""
    if sweep is None:
        if folder is None:
            raise ConfigError("Give a sweep to run, or the folder of one to resume.")
        found = SweepFolder(Path(folder))
        return found.read(overrides), found
    spec = as_spec(sweep, overrides)
    return spec, SweepFolder(Path(folder) if folder is not None else Path("runs") / f"sweep-{spec.name}")


def run_sweep(
    sweep: Sweep | None,
    folder: str | Path | None = None,
    *,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    retry_failed: bool = False,
    local: bool = False,
    address: str | None = None,
    time_limit_s: float | None = None,
    progress: SweepProgress | None = None,
) -> SweepOutcome:
    """Run the missing trials of a sweep, write its tables, and return its results. It logs and prints nothing.

    Args:
        sweep: a shipped name such as `smoke`, a path, or the content of a sweep's file. None resumes the sweep in
            `folder`.
        folder: the sweep's folder. By default runs/sweep-NAME.
        overrides: changes to the file, such as `{"finetune.seeds": [0, 1]}`.
        retry_failed: run failed trials again.
        local: run trials one after the other, without Ray.
        address: the address of a Ray cluster. By default Ray is started on this machine.
        time_limit_s: the time after which trials save and stop.
        progress: shows what the sweep is doing. By default one line a minute is logged.

    Raises:
        ConfigError: the sweep is not valid or cannot run here; nothing was run.
        InterruptedBySignalError: a signal arrived; finished work is kept.
    """
    overrides = as_overrides(overrides)
    spec, found = open_sweep(sweep, folder, overrides)
    if sweep is None and not overrides:
        todo = _todo(expand(spec, check=False), spec, found, retry_failed=False)
        if not (todo.missing or todo.more or todo.failed):
            finished = "The sweep is finished: nothing is left to run. Use --set to add seeds or values."
            _log.info("%s. %s", todo.headline(spec, found), finished)
            return SweepOutcome(True, report_sweep(found, todo.trials, spec))
    if local and spec.is_suggested:
        raise ConfigError("Ray runs Optuna's suggestions, so leave out --local.")
    trials = expand(spec, found.relocated if sweep is None else None)
    if address is None:
        trials_at_once(spec.resources, [this_machine()])
    else:
        check_reachable(address)
    with found.locked():
        if sweep is not None and found.exists():
            raise ConfigError(f"{found.path} holds a sweep already. Resume it with --resume, or choose another --out.")
        own = found.with_own_inputs(spec)
        if own != spec:
            spec, trials = own, expand(own, check=False)
        todo = _todo(trials, spec, found, retry_failed=retry_failed)
        _log.info("%s", todo.headline(spec, found))
        if todo.missing or todo.more:
            for line in filter(None, (spec.description, corpus_note(spec))):
                _log.info("%s", line)
        found.clear_stop()
        stages = [trial.stage for trial in todo.missing] + [spec.last_stage] * todo.more
        monitor = SweepMonitor(found, progress or SweepProgress(), stages)
        cut = _run(todo, spec, found, monitor, local=local, address=address, limit_s=time_limit_s)
        report = report_sweep(found, [*trials, *found.suggested_before(spec)], spec, has_more=cut)
        return SweepOutcome(not cut and bool(report.results["state"].isin(AS_PLANNED).all()), report)


@dataclass(frozen=True)
class _Todo:
    """The part of a sweep that is left to run."""

    trials: list[Trial]
    """All known trials, including those that Optuna suggested earlier."""
    suggested: list[Trial]
    missing: list[Trial]
    more: int
    """The number of trials that Optuna has yet to suggest."""
    failed: int
    """The number of trials that failed and are not run again."""

    def headline(self, spec: SweepSpec, folder: SweepFolder) -> str:
        done = len(self.trials) - len(self.missing) - self.failed
        failed = f", {self.failed} that failed" if self.failed else ""
        return f"{spec.name}: {trials_text(len(self.trials) + self.more)}, {done} done before{failed}; in {folder.path}"


def _todo(trials: Sequence[Trial], spec: SweepSpec, folder: SweepFolder, *, retry_failed: bool) -> _Todo:
    before = folder.suggested_before(spec)
    known = [*trials, *before]
    states = [folder.state_of(trial)[0] for trial in known]
    again = ("failed",) if retry_failed else ()
    missing = [trial for trial, state in zip(known, states, strict=True) if state not in ENDED or state in again]
    more = max(0, spec.search.samples - len(before)) if spec.is_suggested else 0
    return _Todo(known, before, missing, more, 0 if retry_failed else states.count("failed"))


def _run(
    todo: _Todo,
    spec: SweepSpec,
    folder: SweepFolder,
    monitor: SweepMonitor,
    *,
    local: bool,
    address: str | None,
    limit_s: float | None,
) -> bool:
    """Run the missing trials. Return True if Optuna would have suggested more."""

    def begin() -> None:
        """Write the sweep once every check has passed."""
        folder.write(spec)
        for trial in todo.missing:
            folder.trial(trial.key).clear_failure()

    if local or not (todo.missing or todo.more):
        if local and spec.scheduler is not None:
            _log.info("Without Ray there is no %s: every trial is run to its end.", spec.scheduler.kind)
        begin()
        with monitor:
            run_locally(todo.missing, folder, spec, monitor, limit_s)
        return False

    from electra_ds.sweep.tune import ray_runner

    with ray_runner(folder, spec, monitor, address=address, time_limit_s=limit_s) as runner, monitor:
        begin()
        runner.run(todo.missing)
        if todo.more:
            runner.suggest(todo.suggested, lambda config: suggested(spec, config, folder.relocated))
            return folder.wants_to_stop()
    return False


def corpus_note(spec: SweepSpec) -> str:
    """Return a note if a pretraining reads the built-in corpus, which nobody should find out after a day."""
    stage, keys = spec.pretrain, {"corpus", "data"}
    if stage is None or keys & {*stage.options, *stage.space, *itertools.chain(*stage.variants.values())}:
        return ""
    return "The text is the built-in corpus of some 6 M tokens. To use your own, set pretrain.corpus or pretrain.data."
