"""The same steps at every ZeRO stage and precision, and engines that take over, for tests/core/test_ranks.py.

`main` takes `follow`, a token store and a file of samples to replay, or `take_over` and a token store;
and where rank 0 writes what it found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

from electra_ds.core.ranks import Ranks, join_ranks
from electra_ds.data.token_store import TokenStore, split_holdout
from electra_ds.pretraining.engine import PretrainingEngine
from electra_ds.pretraining.evaluation import Evaluator
from electra_ds.pretraining.masked_batch import MaskedBatch
from tests.helpers import builder_for, cpu_plan, model_for, small_recipe

STEPS = 50
STEPS_IN_HALF = 20
RECIPE = ("global_batch_size=16", "schedule.total_steps=60", "schedule.warmup_steps=10")
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
}


def own_samples(batch: MaskedBatch, samples: np.ndarray, micro: int, accumulation: int, rank: int) -> list[Any]:
    """This rank's micro-batches' share of the samples of a whole global batch."""
    ends = np.concatenate([[0], np.cumsum(batch.masks.selected.sum(axis=1))])
    firsts = [(rank * accumulation + index) * micro for index in range(accumulation)]
    return [torch.from_numpy(samples[ends[first] : ends[first + micro]]) for first in firsts]


def straight_and_resumed(store: TokenStore, stage: int, ranks: Ranks, **values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Losses of the last six of twelve steps with dropout, at one go and in an engine that took over half-way."""
    recipe = small_recipe(*RECIPE, "model.hidden_dropout_prob=0.1", "model.attention_probs_dropout_prob=0.1")
    builder = builder_for(store, recipe)

    def engine() -> PretrainingEngine:
        plan = cpu_plan(recipe, train_micro_batch_size_per_gpu=4, zero_optimization={"stage": stage}, **values)
        return PretrainingEngine(model_for(store, recipe), recipe, plan, torch.device("cpu"))

    def run(engine: PretrainingEngine, steps: range) -> np.ndarray:
        results = [engine.train_step(builder.build(step), step) for step in steps]
        return np.array([ranks.sum(result["loss"].clone()).item() for result in results])

    first = engine()
    run(first, range(6))
    tensors, counters = ranks.broadcast(first.optimizer.snapshot()), first.optimizer.counters()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # at stage 0 they are the engine's own
    straight = run(first, range(6, 12))
    first.close()
    second = engine()
    second.optimizer.load(tensors, counters)
    resumed = run(second, range(6, 12))
    second.close()
    return straight, resumed


def evaluation(store: TokenStore, ranks: Ranks) -> dict[str, float]:
    """Of a fresh model at stage 3, on windows that do not share out evenly."""
    recipe = small_recipe(*RECIPE, "model.initializer_range=0.2")
    plan = cpu_plan(recipe, train_micro_batch_size_per_gpu=1, zero_optimization={"stage": 3})
    engine = PretrainingEngine(model_for(store, recipe), recipe, plan, torch.device("cpu"))
    split = split_holdout(store.documents, recipe.data, recipe.seed)
    found = Evaluator(store, split, recipe, 21, ranks)(engine.evaluate, torch.device("cpu"), 3)
    engine.close()
    return found


def follow(store: TokenStore, ranks: Ranks, samples_path: str) -> dict[str, np.ndarray]:
    """Losses at every stage and precision."""
    recipe = small_recipe(*RECIPE)
    replayed = np.load(samples_path)
    builder = builder_for(store, recipe)
    found = {}
    for name, section in PRECISIONS.items():
        for stage in (0, 1, 2, 3):
            zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
            plan = cpu_plan(recipe, train_micro_batch_size_per_gpu=2, zero_optimization=zero, **section)
            engine = PretrainingEngine(model_for(store, recipe), recipe, plan, torch.device("cpu"))
            losses = []
            steps = STEPS if name == "fp32" else STEPS_IN_HALF
            for step in range(steps):
                batch = builder.build(step)
                accumulation = plan.batch.gradient_accumulation_steps
                replay = own_samples(batch, replayed[f"step{step}"], 2, accumulation, ranks.rank)
                result = engine.train_step(batch, step, None if name == "fp32" else replay)
                losses.append(ranks.sum(result["loss"].detach().float().clone()).item())
            counters = engine.optimizer.counters()
            assert (counters["taken_steps"], counters["skipped_steps"]) == (steps, 0)
            found[f"{name}-{stage}"] = np.array(losses)
            engine.close()
    return found


def take_over(store: TokenStore, ranks: Ranks) -> dict[str, np.ndarray]:
    """Losses at one go and of an engine that took over, and an evaluation."""
    found = {}
    for stage in (0, 1, 2, 3):
        found[f"straight-{stage}"], found[f"resumed-{stage}"] = straight_and_resumed(store, stage, ranks)
    checkpointing = {"activation_checkpointing": {"number_checkpoints": 1}}
    found["checkpointed"], _ = straight_and_resumed(store, 3, ranks, **checkpointing)
    return found | {"evaluation": np.array([*evaluation(store, ranks).values()])}


def main(what: str, store_path: str, *more: str) -> None:
    *samples, out = more
    torch.set_num_threads(1)
    kind = type(get_accelerator())
    kind.is_fp16_supported = lambda self: True
    kind.supported_dtypes = lambda self: [torch.float, torch.half, torch.bfloat16]
    with join_ranks() as ranks:
        found = {"follow": follow, "take_over": take_over}[what](TokenStore(Path(store_path)), ranks, *samples)
        if ranks.is_main:
            np.savez(out, **found)
