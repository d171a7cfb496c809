"""The command itself: a run that begins under one plan resumes under another, with other ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from electra_ds.data.token_store import TokenStore
from tests.core.test_ranks import BOUNDS
from tests.forks import start
from tests.helpers import SMALL
from tests.launching import rank_environments
from tests.plan_worker import ZERO
from tests.pretrain_runs import train_losses
from tests.rank_worker import PRECISIONS

HALF, STEPS = 8, 16
RECIPE = ("global_batch_size=16", "schedule.total_steps=40", "schedule.warmup_steps=5")
"""With dropout off, whose noise belongs to the plan."""
IN_CI = (0, 3, 8)


class Plan(NamedTuple):
    ranks: int
    zero: str
    precision: str
    micro_batch: int


PAIRS = [
    (Plan(2, "2", "bf16", 8), Plan(1, "0", "fp16", 4)),  # the README's example
    (Plan(1, "0", "fp16", 16), Plan(2, "1", "bf16", 2)),
    (Plan(1, "0", "fp32", 16), Plan(2, "3-offload", "fp32", 4)),
    (Plan(2, "3", "fp32", 8), Plan(1, "0", "fp32", 2)),
    (Plan(1, "1", "fp16", 8), Plan(1, "2", "fp16", 1)),
    (Plan(2, "1", "fp32", 2), Plan(4, "2", "fp32", 4)),
    (Plan(4, "2", "fp16", 4), Plan(1, "0", "bf16", 16)),
    (Plan(1, "2-offload", "bf16", 16), Plan(1, "0", "fp32", 8)),
    (Plan(1, "0", "bf16", 4), Plan(1, "3-offload", "fp16", 8)),
    (Plan(2, "3", "bf16", 2), Plan(2, "0", "bf16", 8)),
    (Plan(2, "0", "fp16", 8), Plan(1, "3", "fp32", 16)),
    (Plan(1, "3-offload", "fp16", 4), Plan(4, "1", "fp32", 1)),
]


def half_on_cpu() -> None:
    """Let DeepSpeed run fp16 on a CPU, which it refuses for speed."""
    from deepspeed.accelerator import get_accelerator

    kind = type(get_accelerator())
    kind.is_fp16_supported = lambda self: True
    kind.supported_dtypes = lambda self: [torch.float, torch.half, torch.bfloat16]


def go(plan: Plan, folder: Path, *arguments: str) -> None:
    # A run that begins in fp16 takes a scale at which no step is skipped; one that comes to it needs none.
    precision = {"fp16": {"enabled": True}} if "--resume" in arguments and plan.precision == "fp16" else None
    values = (precision or PRECISIONS[plan.precision]) | {
        "zero_optimization": ZERO[plan.zero], "train_micro_batch_size_per_gpu": plan.micro_batch,
    }  # fmt: skip
    (folder / "ds.json").write_text(json.dumps(values))
    started = start(
        ["pretrain", "--ds-config", str(folder / "ds.json"), *arguments], folder / "run", folder / "log",
        rank_environments(plan.ranks), prepare=dict.fromkeys(range(plan.ranks), (half_on_cpu,)),
    )  # fmt: skip
    assert started.wait() == [0] * plan.ranks, started.output


def begin(plan: Plan, folder: Path, store: TokenStore, stop_at: int) -> None:
    go(
        plan, folder, "--data", str(store.path), "--run-dir", str(folder / "run"), "--recipe", "tiny", "--threads",
        "1", "--log-every", "1", "--eval-every", "1000", "--eval-windows", "8", "--stop-at", str(stop_at), "--set",
        *SMALL, *RECIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """One rank, stage 0, fp32, the whole batch at once."""
    folder = tmp_path_factory.mktemp("straight")
    begin(Plan(1, "0", "fp32", 16), folder, store, STEPS)
    return np.array([loss for _, loss in train_losses(folder / "run")])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param(*pair, marks=[] if index in IN_CI else [pytest.mark.nightly]) for index, pair in enumerate(PAIRS)],
)
def test_a_run_goes_on_under_another_plan(
    store: TokenStore, straight: np.ndarray, tmp_path: Path, before: Plan, after: Plan
) -> None:
    """Within the rounding of the coarser precision, before the move and after it: see BOUNDS."""
    begin(before, tmp_path, store, HALF)
    go(after, tmp_path, "--resume", str(tmp_path / "run"), "--stop-at", str(STEPS))
    steps, losses = zip(*train_losses(tmp_path / "run"), strict=True)
    assert steps == tuple(range(1, STEPS + 1))
    bound = max(BOUNDS[before.precision], BOUNDS[after.precision])
    np.testing.assert_allclose(losses, straight, rtol=bound)
