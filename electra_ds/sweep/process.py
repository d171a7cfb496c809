"""The processes of one trial on one machine: the project's own command, which ends with whoever started it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import electra_ds
from electra_ds.sweep.spec import Resources

TO_SAVE_S = 120.0
"""In which a trial that is asked to leave saves its checkpoint and closes its trackers."""
TO_NOTICE_S = 30.0
"""In which the ranks of a trial that has lost one leave by themselves."""
_PR_SET_PDEATHSIG = 1
_LAUNCHERS = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
    "SLURM_STEP_ID",
)  # fmt: skip
"""By which a process takes itself for one of several: those of the sweep's own start are not its trials'."""
_libc = ctypes.CDLL(None, use_errno=True)


def start(
    stage: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str], folder: Path
) -> subprocess.Popen[bytes]:
    """`electra-ds STAGE ARGUMENTS` in a folder, if it is there on this node; the output goes to the end of `log`."""
    inherited = {name: value for name, value in os.environ.items() if name not in _LAUNCHERS}
    inherited["PYTHONPATH"] = python_path()
    parent = os.getpid()

    def die_with_parent() -> None:
        """A parent that is killed takes it along, so that nothing trains on unseen and no GPU stays taken."""
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has died already
            os._exit(1)

    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "electra_ds", stage, *arguments],
            env=inherited | dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            cwd=folder if folder.is_dir() else None, preexec_fn=die_with_parent,
        )  # fmt: skip


def python_path() -> str:
    """PYTHONPATH by which this very package is found, wherever Python is started."""
    own = str(Path(electra_ds.__file__).resolve().parent.parent)
    return os.pathsep.join(dict.fromkeys([own, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])).rstrip(os.pathsep)


def rank_environment(rank: int, address: str, port: int, resources: Resources) -> dict[str, str]:
    """What tells a process that it is one of several. Each sees its own GPU alone, so that is its first; a trial that
    gets none trains on the CPU."""
    own = {"OMP_NUM_THREADS": str(resources.cpus)} | ({} if resources.gpus else {"CUDA_VISIBLE_DEVICES": ""})
    if resources.workers == 1:
        return own
    return own | {
        "RANK": str(rank), "WORLD_SIZE": str(resources.workers), "LOCAL_RANK": "0", "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }  # fmt: skip


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def status_of(statuses: Sequence[int | None]) -> int:
    """Of a trial's ranks: -N where one was killed by signal N, whatever the others then left with; else the first that
    is not 0; else 0."""
    found = [status or 0 for status in statuses]
    return min(found) if min(found) < 0 else next(filter(None, found), 0)


def wait(processes: Sequence[subprocess.Popen[bytes]], patience_s: float) -> None:
    """Until all have ended, at most `patience_s`."""
    deadline = time.monotonic() + patience_s
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))


def end(processes: Sequence[subprocess.Popen[bytes]], patience_s: float = 0.0) -> None:
    """Ask them to save and leave, and after `patience_s` end them."""
    if patience_s > 0:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        wait(processes, patience_s)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
