"""Starting `pretrain` as each launcher does, on ranks of this machine.

torchrun and deepspeed are real. A shell and `srun` only start processes with an environment, so forks (tests/forks.py)
take their place.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests import forks
from tests.helpers import REPOSITORY, free_port
from tests.launching import ENVIRONMENT, rank_environments

LAUNCHERS = ("bare", "torchrun", "deepspeed", "srun")
_NUMBERS = ("--nproc_per_node", "--num_gpus", "--ntasks")


def readme_line(launcher: str) -> list[str]:
    """Return the README's command for a launcher, split into words."""
    program = "bin/pretrain" if launcher == "bare" else launcher
    lines = [line.strip() for line in (REPOSITORY / "README.md").read_text("utf8").splitlines()]
    return shlex.split(next(line for line in lines if line.startswith(f"{program} ") and "zero1" in line))


class Rank:
    """A forked rank, with the methods of a `Popen` that the tests use."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still at work after {timeout} s"
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()


def start(
    launcher: str, arguments: Sequence[str], log: Path, *, resume: Path | None = None, ranks: int = 2,
    before_rank_1: Sequence[Any] = (),
) -> Sequence[subprocess.Popen[bytes] | Rank]:  # fmt: skip
    """Start the README's command with more arguments; return one process under torchrun and deepspeed, else one a rank.

    resume: `--resume` with this run replaces the line's own arguments. ranks: in place of its number. before_rank_1:
    a function of a module, and what to call it with in rank 1 of an srun before the command.
    """
    line = readme_line(launcher)
    cut = line.index("bin/pretrain")
    line[:cut] = [str(ranks) if line[max(0, place - 1)] in _NUMBERS else word for place, word in enumerate(line[:cut])]
    before, after = line[:cut], line[cut + 1 :] if resume is None else ["--resume", str(resume)]
    if launcher in ("bare", "srun"):
        environments = rank_environments(1 if launcher == "bare" else ranks, alone=launcher == "bare")
        prepare = {1: before_rank_1} if before_rank_1 else None
        started = forks.start(["pretrain", *after, *arguments], log.parent, log, environments, prepare=prepare)
        return [Rank(process) for process in started.processes]
    words = [*before, "--master_port", str(free_port()), "bin/pretrain", *after, *arguments]
    with log.open("ab") as output:
        return [
            subprocess.Popen(
                words, env=ENVIRONMENT, cwd=REPOSITORY, start_new_session=True, stdout=output, stderr=subprocess.STDOUT
            )
        ]


def finish(processes: Sequence[subprocess.Popen[bytes] | Rank], timeout: float = 400) -> list[int]:
    """Return the exit statuses; kill what is left, and fail after `timeout` seconds."""
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


def processes_of(run_dir: Path) -> list[str]:
    """Return the command lines of the processes that work on a run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode("utf8", "replace").split("\0")
        except OSError:
            continue
        if str(run_dir) in words and entry.name != str(os.getpid()):
            found.append(" ".join(words))
    return found


def wait_until_gone(run_dir: Path, seconds: float) -> list[str]:
    """Wait for a run's processes to end; return those that did not."""
    deadline = time.monotonic() + seconds
    while (left := processes_of(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
