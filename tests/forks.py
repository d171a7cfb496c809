"""Start the real commands without the wait for imports: each is a fork of one process that has imported everything.

That process runs no torch operation, so a fork of it has what a fresh interpreter has. `run` waits for a command and
returns what it printed, `start` returns while it runs, and `on_ranks` calls a function on several ranks. A start may
carry a `Moment` at which processes are killed, and a function that makes its surroundings worse, such as a disk without
room. The trials of a sweep without Ray are forks too. Tests of an interpreter's start, of launchers and of a process's
own end start real processes instead.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from electra_ds.core.launcher import STOP_SIGNALS
from tests.helpers import REPOSITORY
from tests.launching import ENVIRONMENT, rank_environments

_IMPORTED = [
    "electra_ds.cli", "electra_ds.api.pretrain", "electra_ds.api.finetune", "electra_ds.api.export",
    "electra_ds.report.run_report", "electra_ds.api.reports", "electra_ds.data.build", "deepspeed", "torch._dynamo",
    "sklearn.metrics", "scipy.stats",
    "matplotlib.pyplot", "matplotlib.backends.backend_agg", "PIL.PngImagePlugin",
    "transformers.models.electra.modeling_electra", "tests.forks",
]  # fmt: skip
_CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree"}
_SERVER = multiprocessing.get_context("forkserver")

# What a run does to its directory, in the order in which it comes first. `entry` is the start of the process.
PHASES = (
    "entry", "lock", "reading", "tidy", "metrics", "record", "step", "save", "publish", "link", "prune", "status",
    "report",
)  # fmt: skip


@dataclass(frozen=True)
class Moment:
    """When to kill: `delay_s` after the process is about to do the `nth` thing of a phase in its run directory.

    Without a delay it is killed before it does it.
    """

    phase: str
    nth: int = 1
    delay_s: float = 0.0
    victims: tuple[int, ...] = (0,)
    """Ranks."""
    trigger: int = 0
    """The rank whose events are counted."""


class _Watch:
    """An audit hook that tells what is about to happen in a run directory, by phase."""

    def __init__(self, run: Path, then: Callable[[str, int], None]) -> None:
        self._run = str(run)
        self._then = then
        self._is_training = False
        self.counts: Counter[str] = Counter()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _CHANGES:
            return
        folder = arguments[1] if event in ("os.remove", "os.rmdir") else -1  # rmtree names files within a descriptor
        paths = [_full(path, folder) for path in arguments[: 2 if event in ("os.rename", "os.symlink") else 1]]
        inside = [path.removeprefix(self._run).lstrip("/") for path in paths if path.startswith(self._run)]
        if not inside:
            return
        phase = self._phase(event, inside, is_read=event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR))
        self._tell(phase)
        if event == "os.rename" and inside[-1] == "run.json":
            self._is_training = True
            self._tell("step")

    def _tell(self, phase: str) -> None:
        self.counts[phase] += 1
        self._then(phase, self.counts[phase])

    def _phase(self, event: str, inside: list[str], *, is_read: bool) -> str:
        first, *rest = inside[0].split("/")
        if first != "checkpoints":
            names = {".lock": "lock", "": "lock", "metrics.jsonl": "metrics", "metrics.tmp": "metrics"}
            name = first.removeprefix(".").removesuffix(".tmp")
            if name in ("recipe.yaml", "deepspeed.json", "run.json"):
                return "reading" if is_read and not first.startswith(".") else "record"
            return "status" if name in ("status.json", "requeue") else names.get(first, "report")
        name = rest[0] if rest else ""
        if not self._is_training:
            return "reading" if is_read else "tidy"
        if ".latest-" in " ".join(inside):
            return "link"
        if ".pruning-" in " ".join(inside):
            return "prune"
        if name.startswith(".writing-") and event in ("os.mkdir", "open") and not (is_read and len(rest) == 1):
            return "save"
        return "publish" if name == "" or name.startswith(".writing-") else "report"


def _full(path: Any, folder: int) -> str:
    text = os.fsdecode(path) if not isinstance(path, int) else os.readlink(f"/proc/self/fd/{path}")
    if folder >= 0 and not text.startswith("/"):
        text = f"{os.readlink(f'/proc/self/fd/{folder}')}/{text}"
    return os.path.join(os.getcwd(), text)  # no resolving of links, no dots


def _arm(moment: Moment, victims: Sequence[int], run: Path) -> None:
    """victims: process ids, this one's last."""
    reached = threading.Event()

    def kill() -> None:
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):  # rank 1 has nothing to do with the report
                os.kill(victim, signal.SIGKILL)

    def kill_later() -> None:
        reached.wait()
        time.sleep(moment.delay_s)
        kill()

    threading.Thread(target=kill_later, daemon=True).start()

    def then(phase: str, count: int) -> None:
        if (phase, count) != (moment.phase, moment.nth):
            return
        if moment.delay_s == 0:
            kill()
        reached.set()

    if moment.phase == "entry":
        reached.set()
    else:
        sys.addaudithook(_Watch(run, then))


@dataclass(frozen=True)
class _Surroundings:
    """What a fork gets in place of what it has from the process that it was forked from."""

    stdout: Path
    stderr: Path
    environment: Mapping[str, str]
    folder: Path

    def enter(self) -> None:
        """Make this process one as a shell would start it, in a session of its own."""
        os.setsid()
        for descriptor, path in ((1, self.stdout), (2, self.stderr)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.folder)


def _command(
    words: Sequence[str], surroundings: _Surroundings, run: Path, moment: Moment | None, victims: Sequence[int],
    counts: Path | None, prepare: Sequence[Any],
) -> None:  # fmt: skip
    """What a fork does."""
    surroundings.enter()
    sys.argv = [f"{REPOSITORY}/bin/{words[0]}", *words[1:]]
    if prepare:
        prepare[0](*prepare[1:])
    watch = _Watch(run, lambda phase, count: None)
    if counts is not None:
        sys.addaudithook(watch)
    if moment is not None:
        _arm(moment, [*victims, os.getpid()] if moment.trigger in moment.victims else victims, run)
    from electra_ds.cli import main
    from electra_ds.sweep import processes

    processes.start = _start_trial  # type: ignore[assignment]
    try:
        main(words)
    except KeyboardInterrupt:  # as Python ends a program; multiprocessing would exit with 1
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        if counts is not None:
            counts.write_text("\n".join(f"{phase} {count}" for phase, count in watch.counts.items()))


class _Trial:
    """A forked trial, with the methods of `Popen` that a sweep uses."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = 100.0) -> None:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("trial", timeout)
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        os.kill(self._pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _start_trial(
    stage: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str], folder: Path
) -> _Trial:
    """Start a trial as a fork of its sweep, in place of `electra_ds.sweep.processes.start`."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return _Trial(pid)
    status = 1
    try:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        _Surroundings(log, log, {**os.environ, **environment}, folder).enter()
        sys.argv = ["electra_ds", stage, *arguments]
        own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = own
        for changes in (Path(path, "sitecustomize.py") for path in own):
            if changes.is_file():
                runpy.run_path(str(changes))  # as a new interpreter would
        from electra_ds.cli import main

        main([stage, *arguments])
        status = 0
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _call(function: Callable[..., None], arguments: Sequence[Any], surroundings: _Surroundings) -> None:
    surroundings.enter()
    function(*arguments)


def _process(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    _SERVER.set_forkserver_preload(_IMPORTED)
    made = _SERVER.Process(target=target, args=arguments)
    made.start()
    return made


class Started:
    """A started run: one process for each rank."""

    def __init__(self, processes: list[BaseProcess], log: Path, log_start: int) -> None:
        """log_start: where in the log this start's lines begin."""
        self.processes = processes
        self._log = log
        self._log_start = log_start

    @property
    def statuses(self) -> list[int | None]:
        """Exit statuses by rank, -9 for a killed one, None for one that lives."""
        return [process.exitcode for process in self.processes]

    def wait(self, timeout_s: float = 400) -> list[int | None]:
        """Statuses, once all have ended or the time is over."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return self.statuses

    def signal(self, number: signal.Signals, rank: int = 0) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def output(self) -> str:
        return self._log.read_bytes()[self._log_start :].decode("utf8", "replace")


def start(
    words: Sequence[str], run: Path, log: Path, environments: Sequence[Mapping[str, str]] = (ENVIRONMENT,), *,
    moment: Moment | None = None, counts: Path | None = None, prepare: Mapping[int, Sequence[Any]] | None = None,
) -> Started:  # fmt: skip
    """Start a command of ours, one process for each environment, and return at once.

    words: the command and its arguments. counts: where to write how many events of each phase rank 0 saw. prepare: by
    rank, a function of a module, and what to call it with, before the command.
    """
    log_start = log.stat().st_size if log.exists() else 0
    processes: list[BaseProcess] = []
    for rank in reversed(range(len(environments))):  # rank 0 last: it is to know whom to kill
        mine = moment if moment is not None and moment.trigger == rank else None
        others = [process.pid for process in processes] if mine and set(mine.victims) - {rank} else []
        surroundings = _Surroundings(log, log, dict(environments[rank]), REPOSITORY)
        its_own = (counts if rank == 0 else None, (prepare or {}).get(rank, ()))
        processes.insert(0, _process(_command, [*words], surroundings, run, mine, others, *its_own))
    return Started(processes, log, log_start)


def run(
    *words: object, ranks: int = 1, environment: Mapping[str, str] | None = None, folder: Path = REPOSITORY,
    timeout_s: float = 900,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run a command of ours to its end. environment: variables beside those of this process.

    With several ranks the output is that of all of them, and the status that of the first one that failed.
    """
    return _finish(_command, ([*map(str, words)],), (folder, None, (), None, ()), ranks, environment, folder, timeout_s)


def on_ranks(function: Callable[..., None], ranks: int, *arguments: object, timeout_s: float = 1500) -> str:
    """Call a module's function on ranks that find what a launcher sets, and return what they printed."""
    done = _finish(_call, (function, arguments), (), ranks, None, REPOSITORY, timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _finish(
    target: Callable[..., None], first: Sequence[Any], last: Sequence[Any], ranks: int,
    environment: Mapping[str, str] | None, folder: Path, timeout_s: float,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    place = Path(tempfile.mkdtemp())
    out, err = place / "out", place / "err"
    processes = [
        _process(target, *first, _Surroundings(out, err, its_own | dict(environment or {}), folder), *last)
        for its_own in rank_environments(ranks)
    ]
    statuses = Started(processes, out, 0).wait(timeout_s)
    for process in processes:
        process.kill()
    printed = [path.read_bytes().decode("utf8", "replace") if path.exists() else "" for path in (out, err)]
    shutil.rmtree(place)
    assert None not in statuses, f"still at work after {timeout_s} s\n{printed}"
    status = next((status for status in statuses if status), 0)
    return subprocess.CompletedProcess([*map(str, first)], status, *printed)
