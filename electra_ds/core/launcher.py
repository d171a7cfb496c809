"""The processes of a job: the launcher that started this one, the signals that stop it, and its worker processes.

Rank, world size and the address of rank 0 are read from the environment variables of `torchrun`, `deepspeed` and
`srun`. Without a launcher the process is the only rank. This module does not import torch.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from electra_ds.core.errors import ConfigError

# Slurm reserves step numbers from here on: the batch script, an interactive shell, the extern step.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""The signals that make a run or a sweep save and exit."""
# The deepspeed launcher sends SIGINT and SIGTERM together, so signals within this time count as one request.
SECOND_SIGNAL_AFTER_S = 5.0


class Launch(NamedTuple):
    """The place of this process among the ranks of its job."""

    launcher: Literal["none", "torchrun", "deepspeed", "srun"]
    rank: int
    world_size: int
    local_rank: int
    address: str
    """Host of rank 0."""
    port: int
    local_size: int = 1
    """Ranks on this node; 1 if the launcher does not set it."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def detect(environ: Mapping[str, str]) -> Launch:
    """Return the launch that the environment variables describe.

    Raises ConfigError if they are incomplete or contradict each other.
    """
    if "WORLD_SIZE" in environ or "RANK" in environ:
        launcher: Literal["torchrun", "deepspeed"] = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed"
        world_size = _number(environ, "WORLD_SIZE")
        local_rank = _number(environ, "LOCAL_RANK") if "LOCAL_RANK" in environ else 0
        launch = Launch(launcher, _number(environ, "RANK"), world_size, local_rank, "", 0)
    elif 0 <= _number(environ, "SLURM_STEP_ID", default=-1) < _FIRST_SPECIAL_STEP:
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
        launch = Launch(
            "srun", _number(environ, "SLURM_PROCID"), _number(environ, size), _number(environ, "SLURM_LOCALID"), "", 0
        )
    else:
        return Launch("none", 0, 1, 0, "127.0.0.1", 0)
    if not 0 <= launch.rank < launch.world_size:
        raise ConfigError(f"The launcher set rank {launch.rank} for a world size of {launch.world_size}.")
    if launch.world_size == 1:
        return launch._replace(address="127.0.0.1")
    return launch._replace(
        address=_address(environ, launch), port=_port(environ, launch), local_size=_local_size(environ, launch)
    )


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        found = f"is {text!r}" if text else "is missing"
        raise ConfigError(
            f"The environment variable {name} {found}, but a launcher sets it to a whole number. Start with torchrun, "
            f"deepspeed or srun, or unset RANK and WORLD_SIZE to start a single process."
        ) from None


def _address(environ: Mapping[str, str], launch: Launch) -> str:
    if "MASTER_ADDR" in environ:
        return environ["MASTER_ADDR"]
    if launch.launcher != "srun":
        raise ConfigError("WORLD_SIZE is above 1, but MASTER_ADDR, the host of rank 0, is not set.")
    if environ.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    return first_host(environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "")))


def _port(environ: Mapping[str, str], launch: Launch) -> int:
    if "MASTER_PORT" in environ:
        return _number(environ, "MASTER_PORT")
    if launch.launcher != "srun":
        raise ConfigError("WORLD_SIZE is above 1, but MASTER_PORT, the port of rank 0, is not set.")
    # The same port on every task of a step, and another one for other jobs and steps that may share the node.
    return 20000 + (_number(environ, "SLURM_JOB_ID") * 31 + _number(environ, "SLURM_STEP_ID")) % 20000


def _local_size(environ: Mapping[str, str], launch: Launch) -> int:
    names = {"torchrun": "LOCAL_WORLD_SIZE", "deepspeed": "LOCAL_SIZE", "srun": "SLURM_STEP_TASKS_PER_NODE"}
    match = re.match(r"\d+", environ.get(names[launch.launcher], ""))  # Slurm writes 4(x2) for 4 on each of 2 nodes
    return int(match[0]) if match else 1


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list such as `gpu[003-007,012],login1`. Raises ConfigError."""
    match = re.match(r"([^\[,\s]+)(?:\[(\d+)[^\]]*\]([^,\s]*))?", nodes)
    if not match:
        raise ConfigError(f"Cannot find the first host in the Slurm node list {nodes!r}. Set MASTER_ADDR.")
    return "".join(part for part in match.groups() if part)


class LauncherWatch:
    """Detects that the launcher died without stopping its workers, so that orphaned workers do not keep training.

    SIGUSR1 ends `torchrun`, and SIGTERM ends the `deepspeed` runner, without a signal to the workers. The `deepspeed`
    command starts a second process, which starts the workers, so both are watched. Other parent processes, such as a
    shell, may exit.
    """

    def __init__(self, launch: Launch) -> None:
        programs = {
            "torchrun": (("torchrun", "torch.distributed.run"),),
            "deepspeed": (("deepspeed.launcher.launch",), ("deepspeed",)),
        }.get(launch.launcher, ())
        self._expected = []
        for words, process in zip(programs, _ancestors(len(programs)), strict=True):
            if not any(word in _command_line(process) for word in words):
                break
            self._expected.append(process)

    def died(self) -> bool:
        return _ancestors(len(self._expected)) != self._expected


def _command_line(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode("utf8", "replace").replace("\0", " ")
    except OSError:
        return ""


def _ancestors(generations: int) -> list[int]:
    found: list[int] = []
    process = os.getpid()
    for _ in range(generations):
        try:
            # The name, in parentheses, may hold spaces; the state and the parent follow it.
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):  # it died in between, or this is not Linux
            process = 0
        found.append(process)
    return found


def exit_immediately(number: int) -> NoReturn:
    """End this process immediately with the exit status of the signal."""
    # Written without the log: a signal may interrupt a thread that holds the log's lock.
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed
        if sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h")  # the progress bar had hidden the cursor
        os.write(2, f"\n{signal.Signals(number).name} again: leaving at once.\n".encode())
    os._exit(128 + number)


def worker_pool(workers: int, initializer: Callable[..., None] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """Return a pool of fresh processes, each of which first calls `initializer(*arguments)`.

    The workers exit with their parent, however it ends, and ignore Ctrl-C, which the parent handles.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, _start, (initializer, arguments))


def _start(initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*arguments)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
