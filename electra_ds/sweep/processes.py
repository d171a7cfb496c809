"""Start and end the processes of trials, count how many fit a machine, and run a sweep without Ray.

A trial is the project's own command, in one process per worker. The processes die with the one that started them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import electra_ds
from electra_ds.config.cards import driver_gpus
from electra_ds.core.errors import ConfigError, ElectraError, InterruptedBySignalError
from electra_ds.core.launcher import SECOND_SIGNAL_AFTER_S, STOP_SIGNALS, exit_immediately
from electra_ds.core.program import command
from electra_ds.core.terminal import with_command
from electra_ds.sweep.folder import SweepFolder, ending
from electra_ds.sweep.options import words
from electra_ds.sweep.progress import SweepMonitor
from electra_ds.sweep.spec import Resources, SweepSpec
from electra_ds.sweep.trials import Trial

TO_SAVE_S = 120.0
"""The time in which a trial that is asked to stop saves its checkpoint and closes its trackers."""
TO_NOTICE_S = 30.0
"""The time in which the ranks of a trial that has lost one exit by themselves."""
_LOOK_EVERY_S = 0.2
_ANSWERS_WITHIN_S = 5.0
_PR_SET_PDEATHSIG = 1
_LAUNCHERS = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
    "SLURM_STEP_ID",
)  # fmt: skip
"""Variables that make a process one of several ranks. Trials must not inherit them from the sweep."""
_RESUMED = ("ds_config", "micro_batch", "log_every", "keep")
"""Options that are passed to a resumed run again, since they do not affect its mathematics."""
_libc = ctypes.CDLL(None, use_errno=True)


# --- how many fit


@dataclass(frozen=True)
class Node:
    cpus: int
    gpus: int

    def slots(self, resources: Resources) -> int:
        """Return the number of workers that fit at once. A share of a GPU is a share of one card."""
        slots = self.cpus // resources.cpus
        return min(slots, self.gpus * int(1 / resources.gpus + 1e-9)) if resources.gpus else slots


def this_machine() -> Node:
    """Return the resources that the system and the GPU driver report. CUDA_VISIBLE_DEVICES hides cards."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = len(driver_gpus()) if visible is None else len([each for each in visible.split(",") if each.strip()])
    return Node(len(os.sched_getaffinity(0)), gpus)


def trials_at_once(resources: Resources, nodes: Sequence[Node]) -> int:
    """Return the number of trials that fit at once. Raises ConfigError if it is 0."""
    slots = sum(node.slots(resources) for node in nodes)
    if slots >= resources.workers:
        return slots // resources.workers
    cpus, gpus = max(node.cpus for node in nodes), max(node.gpus for node in nodes)
    change = "cpus=1" if resources.cpus > 1 else "workers=1"
    if resources.gpus and not gpus:
        change = "gpus=0, to train on CPUs"
    raise ConfigError(
        f"A trial takes {resources.workers} worker(s) of {resources.cpus} CPU(s) and {resources.gpus:g} GPU(s) each, "
        f"and the largest of {len(nodes)} node(s) has {cpus} CPU(s) and {gpus} GPU(s). Lower it: --set "
        f"resources.{change}"
    )


def check_reachable(address: str) -> None:
    """Raise ConfigError if an address is not valid for a Ray cluster, or if no cluster answers there."""
    if address == "auto":
        noted = Path(tempfile.gettempdir()) / "ray" / "ray_current_cluster"  # written by `ray start`
        try:
            address = os.environ.get("RAY_ADDRESS") or noted.read_text("utf8").strip()
        except OSError:
            raise ConfigError("No Ray cluster runs on this machine. Start one: ray start --head") from None
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ConfigError(
            f"--address {address} is not a valid Ray address. Write auto or HOST:6379; from outside the cluster, use "
            f"ray job submit --address http://HOST:8265 -- electra-ds sweep NAME --out DIR --address auto"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWERS_WITHIN_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"No Ray cluster answers at {address}: {error}. Is one running there?") from error


# --- one trial's processes


def arguments_of(trial: Trial, folder: SweepFolder, spec: SweepSpec) -> list[str]:
    """Return the arguments of the trial's command, for a new run or to resume an existing one.

    Raises CheckpointError if the encoder that it finetunes does not exist.
    """
    run, threads = folder.trial(trial.key).run, spec.resources.cpus
    if run.exists():
        flags = [word for name in _RESUMED for word in words(trial.stage, name, trial.options.get(name))]
        return ["--resume", str(run.path), *flags, *trial.ending(), "--threads", str(threads)]
    arguments = replace(trial, options=folder.relocated(trial.stage, trial.options)).arguments(threads)
    if trial.options.get("wandb") not in (None, False, "off") and trial.options.get("wandb_group") is None:
        arguments += ["--wandb-group", spec.name]
    if trial.pretraining is not None:
        arguments = ["--model", str(folder.encoder_of(trial)), *arguments]
    return [*arguments, "--run-dir", str(run.path)]


def begin(trial: Trial, folder: SweepFolder, spec: SweepSpec) -> list[str] | None:
    """Record a new attempt at a trial and return its arguments, or None if the trial is refused."""
    try:
        arguments = arguments_of(trial, folder, spec)
    except ElectraError as error:
        folder.trial(trial.key).refuse(trial, spec.resources, str(error))
        return None
    folder.trial(trial.key).begin(trial, ["electra-ds", trial.stage, *arguments], spec.resources)
    return arguments


def start(
    stage: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str], folder: Path
) -> subprocess.Popen[bytes]:
    """Start `electra-ds STAGE ARGUMENTS`, in a folder if it exists on this node, and append the output to `log`."""
    inherited = {name: value for name, value in os.environ.items() if name not in _LAUNCHERS}
    inherited["PYTHONPATH"] = python_path()
    parent = os.getpid()

    def die_with_parent() -> None:
        """Die when the parent is killed, so that no forgotten process keeps training on a GPU."""
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent has already died
            os._exit(1)

    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "electra_ds", stage, *arguments],
            env=inherited | dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder if folder.is_dir() else None,
            preexec_fn=die_with_parent,
        )


def python_path() -> str:
    """Return a PYTHONPATH with which this package is found, wherever Python is started."""
    own = str(Path(electra_ds.__file__).resolve().parent.parent)
    return os.pathsep.join(dict.fromkeys([own, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])).rstrip(os.pathsep)


def rank_environment(rank: int, address: str, port: int, resources: Resources) -> dict[str, str]:
    """Return the environment variables of a trial's rank.

    Each rank sees only its own GPU, as its first one. A trial without GPUs trains on the CPU.
    """
    own = {"OMP_NUM_THREADS": str(resources.cpus)} | ({} if resources.gpus else {"CUDA_VISIBLE_DEVICES": ""})
    if resources.workers == 1:
        return own
    return own | {
        "RANK": str(rank),
        "WORLD_SIZE": str(resources.workers),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def status_of(statuses: Sequence[int | None]) -> int:
    """Return the status of a trial's ranks.

    It is -N if signal N killed a rank, whatever the others then exited with, else the first nonzero status, else 0.
    """
    found = [status or 0 for status in statuses]
    return min(found) if min(found) < 0 else next(filter(None, found), 0)


def wait(processes: Sequence[subprocess.Popen[bytes]], patience_s: float) -> None:
    """Wait until all processes have ended, at most `patience_s` seconds."""
    deadline = time.monotonic() + patience_s
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))


def end(processes: Sequence[subprocess.Popen[bytes]], patience_s: float = 0.0) -> None:
    """Ask the processes to save and stop, and kill them after `patience_s` seconds."""
    if patience_s > 0:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        wait(processes, patience_s)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


# --- a sweep's trials on this machine, without Ray


@contextmanager
def stoppable(folder: SweepFolder, time_limit_s: float | None) -> Iterator[None]:
    """Within this context, SIGINT, SIGTERM, SIGUSR1 and the time limit ask the sweep's trials to save and stop.

    A second signal, at least 5 s after the first, ends this process and its trials at once. Raises
    InterruptedBySignalError at the end if a signal arrived.
    """
    came: list[tuple[int, float]] = []

    def stop(why: str, more: str = "") -> None:
        folder.ask_to_stop()
        # Written without the log: a signal may interrupt a thread that holds the log's lock.
        with contextlib.suppress(OSError, ValueError):  # the reader may be gone
            sys.stderr.write(f"{why}: running trials save and stop.{more}\n")

    def note(number: int, frame: FrameType | None) -> None:
        came.append((number, time.monotonic()))
        if len(came) == 1:
            stop(signal.Signals(number).name, " A second signal stops at once.")
        elif came[-1][1] - came[0][1] >= SECOND_SIGNAL_AFTER_S:
            exit_immediately(number)
        folder.ask_to_stop()  # again, in case a driver elsewhere has only just started

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    limit = threading.TIMEOUT_MAX if time_limit_s is None else min(time_limit_s, threading.TIMEOUT_MAX)
    timer = threading.Timer(limit, stop, ["The time limit is reached"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
        folder.clear_stop()
    if came:
        first, _ = came[0]
        resume = f"{command('sweep')} --resume {folder.path}"
        lead = f"{signal.Signals(first).name}: finished work is kept. Resume it with:"
        raise InterruptedBySignalError(with_command(lead, resume), first)


def run_locally(
    trials: Sequence[Trial], folder: SweepFolder, spec: SweepSpec, monitor: SweepMonitor, time_limit_s: float | None
) -> None:
    """Run the trials in order, until the folder's `stop` file appears. The running trial then saves and stops.

    Raises InterruptedBySignalError at the end if a signal arrived.
    """
    with stoppable(folder, time_limit_s):
        for trial in trials:
            if folder.wants_to_stop():
                return
            if folder.can_begin(trial):
                _run(trial, folder, spec, monitor)
            monitor.end(trial, *folder.state_of(trial))


def _run(trial: Trial, folder: SweepFolder, spec: SweepSpec, monitor: SweepMonitor) -> None:
    files = folder.trial(trial.key)
    monitor.begin(trial)
    for _ in range(1 + spec.retries):
        arguments = begin(trial, folder, spec)
        status = 2 if arguments is None else _attempt(trial, arguments, folder, spec, monitor)
        if files.has_ended or folder.wants_to_stop():
            return
    files.give_up(f"after {1 + spec.retries} attempts: {ending(status)}")


def _attempt(trial: Trial, arguments: list[str], folder: SweepFolder, spec: SweepSpec, monitor: SweepMonitor) -> int:
    """Start the trial's processes, wait for them, and return their `status_of`."""
    workers, port, files = spec.resources.workers, free_port(), folder.trial(trial.key)
    cards = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(workers)))).split(",")
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(workers):
            environment = rank_environment(rank, "127.0.0.1", port, spec.resources)
            if workers > 1 and spec.resources.gpus:
                environment["CUDA_VISIBLE_DEVICES"] = cards[rank]
            processes.append(start(trial.stage, arguments, files.log, environment, folder.start_in))
        while any(each.poll() is None for each in processes):
            if folder.wants_to_stop():
                end(processes, TO_SAVE_S)
            elif any(each.returncode for each in processes):
                wait(processes, TO_NOTICE_S)
                break
            monitor.update()
            time.sleep(_LOOK_EVERY_S)
    finally:
        end(processes)
    status = status_of([each.returncode for each in processes])
    files.end(status)
    return status
