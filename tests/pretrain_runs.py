"""Short runs of `bin/pretrain` on a small store: their command line, and what they leave."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from electra_ds.config.run_directory import read_metrics
from electra_ds.data.token_store import TokenStore
from electra_ds.training.checkpoint import CheckpointFolder
from tests import forks
from tests.helpers import REPOSITORY, SMALL

CPU_JSON = str(REPOSITORY / "ds_configs" / "cpu.json")
SETTINGS = ["--threads", "1", "--log-every", "1", "--eval-every", "20", "--save-every", "5", "--eval-windows", "32"]
DROPOUT = ("model.hidden_dropout_prob=0.1", "model.attention_probs_dropout_prob=0.1")


def command(name: str, *arguments: str) -> list[str]:
    """A script of bin/ in an interpreter of its own, for tests of how a process starts or ends."""
    return [sys.executable, str(REPOSITORY / "bin" / name), *arguments]


def run(name: str, *arguments: str, status: int = 0, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, see `forks.run`, and check its exit status."""
    result = forks.run(name, *arguments, **how)
    assert result.returncode == status, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def kill_when(is_so: Callable[[], bool], run_dir: Path, *arguments: str) -> None:
    """Start `pretrain` and kill it as soon as something is so."""
    started = forks.start(["pretrain", *arguments], run_dir, run_dir.with_suffix(".log"))
    while not is_so():
        assert started.statuses == [None], started.output
        time.sleep(0.005)
    started.kill()


def start_arguments(store: TokenStore, run_dir: Path, *overrides: str) -> list[str]:
    return [
        "--ds-config", CPU_JSON, "--recipe", "tiny", "--data", str(store.path), "--run-dir", str(run_dir),
        *SETTINGS, "--set", *SMALL, "schedule.total_steps=40", "schedule.warmup_steps=4", *overrides,
    ]  # fmt: skip


def train_losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "train"]


def has_trained(run_dir: Path, steps: int) -> bool:
    return (run_dir / "metrics.jsonl").exists() and len(train_losses(run_dir)) >= steps


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    last = CheckpointFolder(run_dir / "checkpoints", keep=1).paths()[-1]
    return load_file(last / "weights.safetensors") | load_file(last / "optimizer.safetensors")
