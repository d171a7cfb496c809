"""Every plan takes over one state, trains on, and saves what every other plan reads.

Called by tests/training/test_plans.py, in its own process for one rank and in forks for several. The folder
that it gets holds `common/` (a checkpoint), `samples.npz` (what the straight run drew, to be replayed) and `states/`,
where each plan's checkpoint goes under RANKS-NAME.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from electra_ds.core.ranks import Ranks, join_ranks
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.engine import PretrainingEngine
from electra_ds.training.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    CheckpointSaver,
    open_checkpoint,
    verify_checkpoint,
)
from tests.helpers import builder_for, cpu_plan, model_for, small_recipe
from tests.rank_worker import PRECISIONS, own_samples

RECIPE = ("global_batch_size=8", "schedule.total_steps=60", "schedule.warmup_steps=5")
FIRST, STEPS = 10, 4
"""The step of the common state, and how many every plan trains from there."""
_CPU = {"device": "cpu"}
ZERO: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "2-offload": {"stage": 2, "offload_optimizer": _CPU},
    "3-offload": {"stage": 3, "offload_optimizer": _CPU, "offload_param": _CPU},
}
PLANS = [f"{zero}/{precision}" for zero, precision in itertools.product(ZERO, PRECISIONS)]


def micro_batch_of(plan: str, world_size: int) -> int:
    """Some divisor of a rank's share of 8 rows, another for most plans."""
    sizes = [size for size in (1, 2, 4, 8) if size * world_size <= 8]
    return random.Random(f"{plan} {world_size}").choice(sizes)


@contextmanager
def engine_of(plan: str, store: TokenStore, world_size: int) -> Iterator[PretrainingEngine]:
    """A fresh engine under a plan, closed at the end."""
    zero, precision = plan.split("/")
    recipe = small_recipe(*RECIPE)
    values = PRECISIONS[precision] | {
        "zero_optimization": ZERO[zero],
        "train_micro_batch_size_per_gpu": micro_batch_of(plan, world_size),
        "zero_force_ds_cpu_optimizer": False,
    }
    engine = PretrainingEngine(model_for(store, recipe), recipe, cpu_plan(recipe, **values), torch.device("cpu"))
    try:
        yield engine
    finally:
        engine.close()


def folder_of(folder: Path, world_size: int, plan: str) -> CheckpointFolder:
    return CheckpointFolder(folder / "states" / f"{world_size}-{plan.replace('/', '-')}", keep=1)


def take_over(engine: PretrainingEngine, checkpoint: Checkpoint) -> None:
    """Load, and see that what the engine would save is to the bit what it was given."""
    checkpoint.check(engine.optimizer.shapes(), engine.optimizer.trained())
    counters = checkpoint.state["optimizer"]
    engine.optimizer.load(checkpoint.tensors, counters)
    found, now = engine.optimizer.snapshot(), engine.optimizer.counters()
    assert found.keys() == checkpoint.tensors.keys()
    wrong = [name for name, tensor in found.items() if not torch.equal(tensor, checkpoint.tensors[name])]
    assert not wrong, wrong
    kept = {"taken_steps", "skipped_steps", "consecutive_skips"}
    if counters["is_scaled"] and now["is_scaled"]:
        kept |= {"loss_scale", "good_steps", "hysteresis_left"}
    elif now["is_scaled"]:
        assert now["loss_scale"] == 256  # what the plan begins with
    assert {name: now[name] for name in kept} == {name: counters[name] for name in kept}


def trained_plans(world_size: int, every: int) -> list[str]:
    """All plans, or, with `every` above 1, the half that other numbers of ranks leave out, as on a chessboard."""
    width = len(PRECISIONS)
    return [plan for i, plan in enumerate(PLANS) if every == 1 or (i + i // width + world_size) % 2 == 0]


def train(folder: Path, store: TokenStore, ranks: Ranks, every: int) -> dict[str, list[float]]:
    """Losses of the steps after the common state under each of `trained_plans`, whose end is saved."""
    builder = builder_for(store, small_recipe(*RECIPE))
    replayed = np.load(folder / "samples.npz")
    common = open_checkpoint(next((folder / "common").glob("step-*")))
    losses: dict[str, list[float]] = {}
    for plan in trained_plans(ranks.world_size, every):
        size = micro_batch_of(plan, ranks.world_size)
        with engine_of(plan, store, ranks.world_size) as engine:
            take_over(engine, common)
            losses[plan] = []
            for step in range(FIRST, FIRST + STEPS):
                batch = builder.build(step)
                accumulation = engine.plan.batch.gradient_accumulation_steps
                replay = own_samples(batch, replayed[f"step{step}"], size, accumulation, ranks.rank)
                result = engine.train_step(batch, step, replay)
                losses[plan].append(ranks.sum(result["loss"].detach().float().clone()).item())
            saver = CheckpointSaver(folder_of(folder, ranks.world_size, plan), ranks)
            saver.save(engine.optimizer, {"step": FIRST + STEPS, "tokens": 0, "precision": plan}, {"recipe.yaml": ""})
            saver.finish()
    return losses


def read(folder: Path, store: TokenStore, ranks: Ranks, writers: Sequence[str], every: int = 1) -> int:
    """Every plan takes over every state that these numbers of ranks saved; returns how many pairs.

    every: 1 for all pairs. With a larger number, only every third plan takes over states, each a different part of
    them, so that the number of pairs is divided by `every`.
    """
    paths = [path for count in writers for path in sorted((folder / "states").glob(f"{count}-*/step-*"))]
    for path in paths:
        verify_checkpoint(path)
    pairs, share = 0, 1 if every == 1 else 3
    for index, plan in enumerate(PLANS[ranks.world_size % share :: share]):
        with engine_of(plan, store, ranks.world_size) as engine:
            for path in paths[index % max(1, every // share) :: max(1, every // share)]:
                take_over(engine, open_checkpoint(path))
                pairs += 1
    return pairs


def main(store_path: str, folder: str, every: str, *writers: str) -> None:
    from deepspeed.accelerator import get_accelerator

    torch.set_num_threads(1)
    kind = type(get_accelerator())
    kind.is_fp16_supported = lambda self: True
    kind.supported_dtypes = lambda self: [torch.float, torch.half, torch.bfloat16]
    with join_ranks() as ranks:
        store = TokenStore(Path(store_path))
        losses = train(Path(folder), store, ranks, int(every))
        pairs = read(Path(folder), store, ranks, [*writers, str(ranks.world_size)], int(every))
        if ranks.is_main:
            (Path(folder) / f"{ranks.world_size}.json").write_text(json.dumps({"losses": losses, "pairs": pairs}))
