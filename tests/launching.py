"""Starting `pretrain` as each launcher does, on two ranks of this machine."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.helpers import REPOSITORY, SMALL, free_port

LAUNCHERS = ("bare", "torchrun", "deepspeed", "srun")
_NUMBERS = ("--nproc_per_node", "--num_gpus", "--ntasks")
ENVIRONMENT = os.environ | {
    "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
    "CUDA_VISIBLE_DEVICES": "",  # two ranks need no two GPUs here
}


def readme_line(launcher: str) -> list[str]:
    """The README's own line for a launcher, in words."""
    program = "bin/pretrain" if launcher == "bare" else launcher
    lines = [line.strip() for line in (REPOSITORY / "README.md").read_text("utf8").splitlines()]
    return shlex.split(next(line for line in lines if line.startswith(f"{program} ") and "zero1" in line))


def start(
    launcher: str,
    arguments: Sequence[str],
    log: Path,
    *,
    resume: Path | None = None,
    ranks: int = 2,
    environment_of_rank_1: Mapping[str, str] | None = None,
) -> list[subprocess.Popen[str]]:
    """The README's line with more arguments; one process under a launcher, both ranks under a simulated `srun`.

    To resume, the line's own arguments give way to `--resume`; ranks: in place of the line's own number.
    """
    line = readme_line(launcher)
    cut = line.index("bin/pretrain")
    line[:cut] = [str(ranks) if line[max(0, place - 1)] in _NUMBERS else word for place, word in enumerate(line[:cut])]
    before, after = line[:cut], line[cut:] if resume is None else ["bin/pretrain", "--resume", str(resume)]
    if launcher in ("torchrun", "deepspeed"):
        before += ["--master_port", str(free_port())]
    environments = [ENVIRONMENT]
    if launcher == "bare":
        before = [sys.executable]
    if launcher == "srun":
        before, port = [sys.executable], str(free_port())
        environments = [ENVIRONMENT | srun_environment(rank, ranks) | {"MASTER_PORT": port} for rank in range(ranks)]
        environments[-1] |= environment_of_rank_1 or {}
    with log.open("a") as output:
        return [
            subprocess.Popen(
                [*before, *after, *arguments], env=environment, cwd=REPOSITORY, text=True, start_new_session=True,
                stdout=output, stderr=subprocess.STDOUT,
            )
            for environment in environments
        ]  # fmt: skip


def srun_environment(rank: int, ranks: int) -> dict[str, str]:
    """What `srun` sets in one task of a step on one node."""
    return {
        "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
        "SLURM_NTASKS": str(ranks), "SLURM_STEP_NUM_TASKS": str(ranks), "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NODELIST": "node[007-008]",
    }  # fmt: skip


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """The environment of a process alone, or those of the tasks of an `srun`, which meet at a free port."""
    if ranks == 1:
        return [ENVIRONMENT]
    port = {"MASTER_PORT": str(free_port())}
    return [ENVIRONMENT | srun_environment(rank, ranks) | port for rank in range(ranks)]


def run_arguments(store: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [
        "--data", str(store), "--run-dir", str(run_dir), "--threads", "1", "--log-every", "1", "--eval-every", "1000",
        "--save-every", "1000", "--eval-windows", "16", "--set", *SMALL, "schedule.total_steps=3000", *overrides,
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]], timeout: float = 120) -> list[int]:
    """Exit statuses; kills what is left and fails after `timeout` seconds."""
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


def processes_of(run_dir: Path) -> list[str]:
    """Command lines of the processes that work on a run."""
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
    """Waits for a run's processes to end; returns those that did not."""
    deadline = time.monotonic() + seconds
    while (left := processes_of(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
