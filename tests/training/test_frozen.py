"""Parameters with requires_grad=False stay as they are, and cost neither gradients nor moments, at every ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from electra_ds.config.recipe import Recipe
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.electra import Electra
from electra_ds.pretraining.engine import PretrainingEngine
from electra_ds.pretraining.plain import PlainEngine
from electra_ds.training.checkpoint import CheckpointFolder, CheckpointSaver, open_checkpoint
from tests.helpers import builder_for, cpu_plan, model_for, small_recipe
from tests.plan_worker import take_over

CPU = torch.device("cpu")
STEPS = 3
RECIPE = small_recipe(
    "global_batch_size=8", "optimizer.learning_rate=0.01", "optimizer.weight_decay=0.1", "schedule.total_steps=60",
    "schedule.warmup_steps=1",
)  # fmt: skip
STAGE_3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
PLANS: dict[str, dict[str, Any]] = {
    "0/fp32": {},
    "0/bf16": {"bf16": {"enabled": True}},
    "1/fp32": {"zero_optimization": {"stage": 1}},
    "2/bf16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "3/fp32": {"zero_optimization": STAGE_3},
    "3/bf16": {"zero_optimization": STAGE_3, "bf16": {"enabled": True}},
}


def is_frozen(name: str) -> bool:
    """Whether it is in a first layer, which has matrices, biases and norms."""
    return ".layers.0." in name


def partly_frozen(store: TokenStore, recipe: Recipe) -> Electra:
    model = model_for(store, recipe)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_frozen(name))
    return model


def engine_of(store: TokenStore, plan: str) -> PretrainingEngine:
    values = PLANS[plan] | {"train_micro_batch_size_per_gpu": 4}
    return PretrainingEngine(partly_frozen(store, RECIPE), RECIPE, cpu_plan(RECIPE, **values), CPU)


def losses_of(engine: PretrainingEngine, store: TokenStore, steps: range) -> list[float]:
    builder = builder_for(store, RECIPE)
    return [engine.train_step(builder.build(step), step)["loss"].item() for step in steps]


def name_of(key: str) -> str:
    return key.split("/")[1]


@pytest.mark.parametrize("plan", PLANS)
def test_frozen_parameters_are_neither_updated_nor_decayed_nor_given_moments(
    plan: str, store: TokenStore, process_group: Ranks
) -> None:
    engine = engine_of(store, plan)
    try:
        before = engine.optimizer.snapshot()
        losses_of(engine, store, range(STEPS))
        after = engine.optimizer.snapshot()
        frozen = {name for name in engine.optimizer.shapes() if is_frozen(name)}
        assert len(frozen) > 10
        assert engine.optimizer.trained() == engine.optimizer.shapes().keys() - frozen
        assert {key for key in after if name_of(key) in frozen} == {f"master/{name}" for name in frozen}
        changed = {
            name_of(key) for key in after if key.startswith("master/") and not torch.equal(after[key], before[key])
        }
        assert changed == engine.optimizer.trained()
        parameters = dict(engine.module.named_parameters())
        assert all(parameters[name].grad is None for name in frozen)
    finally:
        engine.close()


def test_the_engine_with_frozen_parameters_has_the_losses_of_the_plain_one(
    store: TokenStore, process_group: Ranks
) -> None:
    recipe = RECIPE.model_copy(deep=True)
    plain = PlainEngine(partly_frozen(store, recipe), recipe, 4, CPU)
    builder = builder_for(store, recipe)
    expected = [plain.train_step(builder.build(step), step)[0]["loss"].item() for step in range(STEPS)]
    engine = engine_of(store, "0/fp32")
    try:
        assert losses_of(engine, store, range(STEPS)) == pytest.approx(expected, rel=1e-5)
    finally:
        engine.close()


@pytest.mark.parametrize("plan", PLANS)
def test_a_run_with_frozen_parameters_resumes_bit_for_bit(
    plan: str, store: TokenStore, process_group: Ranks, tmp_path: Any
) -> None:
    straight = engine_of(store, plan)
    try:
        losses_of(straight, store, range(STEPS))
        saver = CheckpointSaver(CheckpointFolder(tmp_path, keep=1), process_group)
        saver.save(straight.optimizer, {"step": STEPS, "tokens": 0, "precision": plan}, {"recipe.yaml": ""})
        saver.finish()
        expected = losses_of(straight, store, range(STEPS, 2 * STEPS))
    finally:
        straight.close()
    resumed = engine_of(store, plan)
    try:
        take_over(resumed, open_checkpoint(next(tmp_path.glob("step-*"))))
        assert losses_of(resumed, store, range(STEPS, 2 * STEPS)) == expected
    finally:
        resumed.close()
