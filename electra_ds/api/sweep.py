"""Run a study: one command over seeds, tasks and hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from electra_ds.config.overrides import as_overrides
from electra_ds.sweep.options import check_arguments
from electra_ds.sweep.run import SweepOutcome
from electra_ds.sweep.run import run_sweep as run


def run_sweep(
    sweep: str | Path | Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    *,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    retry_failed: bool = False,
    local: bool = False,
    address: str | None = None,
    storage: str | None = None,
    time_limit_s: float | None = None,
    quiet: bool = False,
) -> SweepOutcome:
    """Run what is missing of a sweep, write its tables, and return its results.

    Args:
        sweep: a shipped name such as `smoke`, a path, or the content of a sweep's file. None resumes the sweep in
            `folder`.
        folder: the sweep's folder. By default runs/sweep-NAME.
        overrides: changes of the file, `{"finetune.seeds": [0, 1]}`.
        retry_failed: whether trials that failed are run again.
        local: whether trials run one after the other, without Ray.
        address: a Ray cluster. By default Ray is started on this machine.
        storage: the place of Tune's own records. By default they are removed.
        time_limit_s: the time after which trials save and leave.
        quiet: whether nothing is printed.

    Returns:
        Whether all trials ended as planned (`is_complete`), and a DataFrame with a row for each (`results`).

    Raises:
        ConfigError: the sweep is not valid or cannot run here; nothing was run.
        InterruptedBySignalError: a signal came; what is done is kept.
    """
    return run(
        dict(sweep) if isinstance(sweep, Mapping) else sweep, folder, overrides=as_overrides(overrides),
        retry_failed=retry_failed, local=local, address=address, storage=storage, time_limit_s=time_limit_s,
        check=check_arguments, console=Console(quiet=quiet),
    )  # fmt: skip
