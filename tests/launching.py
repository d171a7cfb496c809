"""The environments that launchers set for ranks on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.helpers import SMALL, free_port

ENVIRONMENT = os.environ | {
    "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
    "CUDA_VISIBLE_DEVICES": "",  # two ranks need no two GPUs here
}


def srun_environment(rank: int, ranks: int) -> dict[str, str]:
    """What `srun` sets in one task of a step on one node."""
    return {
        "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
        "SLURM_NTASKS": str(ranks), "SLURM_STEP_NUM_TASKS": str(ranks), "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NODELIST": "node[007-008]",
    }  # fmt: skip


def rank_environments(ranks: int, *, alone: bool = True) -> list[dict[str, str]]:
    """The environments of the tasks of an `srun`, which meet at a free port.

    alone: a single rank has no launcher.
    """
    if ranks == 1 and alone:
        return [ENVIRONMENT]
    port = {"MASTER_PORT": str(free_port())}
    return [ENVIRONMENT | srun_environment(rank, ranks) | port for rank in range(ranks)]


def run_arguments(store: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [
        "--data", str(store), "--run-dir", str(run_dir), "--threads", "1", "--log-every", "1", "--eval-every", "1000",
        "--save-every", "1000", "--eval-windows", "16", "--set", *SMALL, "schedule.total_steps=3000", *overrides,
    ]  # fmt: skip
