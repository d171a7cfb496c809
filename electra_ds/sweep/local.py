"""Trials one after the other on this machine, without Ray: the same commands, folders and results."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence

from electra_ds.core.errors import ElectraError
from electra_ds.sweep import process
from electra_ds.sweep.attempt import arguments_of
from electra_ds.sweep.display import SweepDisplay
from electra_ds.sweep.folder import ENDED, SweepFolder
from electra_ds.sweep.spec import SweepSpec
from electra_ds.sweep.stopping import stoppable
from electra_ds.sweep.trials import Trial

_LOOK_EVERY_S = 0.2


def run_locally(
    trials: Sequence[Trial],
    folder: SweepFolder,
    spec: SweepSpec,
    display: SweepDisplay,
    time_limit_s: float | None = None,
) -> None:
    """Run what is given, in order, until the folder's `stop` file is there; a trial that runs then saves and leaves.

    Raises InterruptedBySignalError at the end where a signal came.
    """
    with stoppable(folder, time_limit_s):
        for trial in trials:
            _run(trial, folder, spec, display)


def _run(trial: Trial, folder: SweepFolder, spec: SweepSpec, display: SweepDisplay) -> None:
    if folder.wants_to_stop():
        return
    if not folder.can_begin(trial):
        display.end(trial, *folder.state_of(trial))
        return
    display.begin(trial)
    for attempt in range(1 + spec.retries):
        status = _attempt(trial, folder, spec, display)
        if folder.state(trial.key)[0] in ENDED or folder.wants_to_stop():
            break
        if attempt == spec.retries:
            how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
            folder.give_up(trial.key, f"after {1 + attempt} attempts: {how}")
    display.end(trial, *folder.state(trial.key))


def _attempt(trial: Trial, folder: SweepFolder, spec: SweepSpec, display: SweepDisplay) -> int:
    """Start the trial's processes and wait for them; returns what `process.status_of` makes of them."""
    try:
        arguments = arguments_of(trial, folder, spec)
    except ElectraError as error:
        folder.refuse(trial, spec, str(error))
        return 2
    folder.begin(trial, ["electra-ds", trial.stage, *arguments], spec)
    processes = _start(trial, arguments, folder, spec)
    try:
        while any(each.poll() is None for each in processes):
            if folder.wants_to_stop():
                process.end(processes, process.TO_SAVE_S)
            elif any(each.returncode for each in processes):
                process.wait(processes, process.TO_NOTICE_S)
                break
            display.look()
            time.sleep(_LOOK_EVERY_S)
    finally:
        process.end(processes)
    status = process.status_of([each.returncode for each in processes])
    folder.end(trial.key, status)
    return status


def _start(
    trial: Trial, arguments: Sequence[str], folder: SweepFolder, spec: SweepSpec
) -> list[subprocess.Popen[bytes]]:
    workers, port = spec.resources.workers, process.free_port()
    cards = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(workers)))).split(",")
    started = []
    for rank in range(workers):
        environment = process.rank_environment(rank, "127.0.0.1", port, spec.resources)
        if workers > 1 and spec.resources.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = cards[rank]
        started.append(process.start(trial.stage, arguments, folder.log(trial.key), environment, folder.start_in))
    return started
