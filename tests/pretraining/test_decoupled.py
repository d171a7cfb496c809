"""A generator with a learning rate and a clipping norm of its own, against two of torch's optimizers side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from electra_ds.cli import main
from electra_ds.config.recipe import Recipe
from electra_ds.core.errors import ConfigError
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.engine import PretrainingEngine
from electra_ds.training.optimizer import learning_rate_at, pretraining_rates
from tests.helpers import builder_for, cpu_plan, model_for, small_recipe

CPU = torch.device("cpu")
STEPS = 25
OWN = (
    "generator.learning_rate=3e-3", "generator.max_grad_norm=0.05", "generator.beta1=0.8", "generator.beta2=0.95",
    "generator.total_steps=20", "optimizer.max_grad_norm=2.0",
)  # fmt: skip


def recipe_of(*overrides: str) -> Recipe:
    return small_recipe("schedule.total_steps=60", "schedule.warmup_steps=5", *overrides)


def is_of_generator(name: str) -> bool:
    return name.startswith(("generator.", "generator_head."))


def run(store: TokenStore, recipe: Recipe, **values: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    engine = PretrainingEngine(model_for(store, recipe), recipe, cpu_plan(recipe, **values), CPU)
    builder = builder_for(store, recipe)
    try:
        losses = [engine.train_step(builder.build(step), step)["loss"].item() for step in range(STEPS)]
        return losses, {name: each.detach().clone() for name, each in engine.module.named_parameters()}
    finally:
        engine.close()


def two_optimizers(store: TokenStore, recipe: Recipe) -> list[float]:
    """Each network with torch's AdamW, clipping and rate of its own; shared embeddings belong to the discriminator."""
    model = model_for(store, recipe).train()
    builder = builder_for(store, recipe)
    section, schedule = recipe.optimizer, recipe.schedule.model_dump()
    generator: Any = recipe.generator  # type: ignore[attr-defined]
    parts = []
    for own, of_part, end in ((True, generator, generator.total_steps), (False, section, schedule["total_steps"])):
        rate, clip = of_part.learning_rate, of_part.max_grad_norm
        named = [(name, each) for name, each in model.named_parameters() if is_of_generator(name) == own]
        groups = []
        for decays, decay in ((True, section.weight_decay), (False, 0.0)):
            alike = [each for name, each in named if pretraining_rates(name).decays == decays]
            groups.append({"params": alike, "weight_decay": decay})
        betas = (of_part.beta1, of_part.beta2)
        parts.append((torch.optim.AdamW(groups, lr=rate, betas=betas, eps=section.epsilon), named, rate, clip, end))
    losses = []
    for step in range(STEPS):
        batch = builder.build(step)
        output = model(batch.micro_batch(0, recipe.global_batch_size))
        loss = sum(term.weight / term.divisor * output.losses[name] for name, term in batch.loss_terms.items())
        losses.append(float(loss.detach()))
        loss.backward()
        for optimizer, named, rate, clip, end in parts:
            torch.nn.utils.clip_grad_norm_([each for _, each in named], clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, learning_rate=rate, **schedule | {"total_steps": end})
            optimizer.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("sharing", ["embeddings", "none"])
def test_two_networks_train_like_two_optimizers(store: TokenStore, sharing: str) -> None:
    recipe = recipe_of(*OWN, f"generator.sharing={sharing}")
    losses, _ = run(store, recipe)
    np.testing.assert_allclose(losses, two_optimizers(store, recipe), rtol=1e-5)
    joint, _ = run(store, recipe_of("optimizer.max_grad_norm=2.0", f"generator.sharing={sharing}"))
    assert not np.allclose(losses, joint, rtol=1e-3)


@pytest.mark.usefixtures("process_group")
def test_the_weight_of_the_discriminators_loss_does_not_reach_a_generator_that_is_clipped_apart(
    store: TokenStore,
) -> None:
    """Adam's update does not depend on the scale of a gradient, but a norm that is clipped together lets it through."""
    moved = {}
    for clipping in ("own", "joint"):
        own = ("generator.max_grad_norm=0.05",) if clipping == "own" else ("generator.max_grad_norm=null",)
        for weight in (1, 1000):
            recipe = recipe_of("generator.sharing=none", *own, f"discriminator.loss_weight={weight}",
                               "optimizer.epsilon=1e-3", "optimizer.max_grad_norm=0.05")  # fmt: skip
            _, weights = run(store, recipe)
            moved[clipping, weight] = torch.cat([w.flatten() for name, w in weights.items() if is_of_generator(name)])
    assert torch.equal(moved["own", 1], moved["own", 1000])
    assert not torch.allclose(moved["joint", 1], moved["joint", 1000], rtol=1e-3)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [0, 2])
def test_a_generator_whose_schedule_has_ended_stays_as_it_is(store: TokenStore, stage: int) -> None:
    """It would decay too if its rate were not 0."""
    recipe = recipe_of("generator.total_steps=20", "optimizer.weight_decay=0.1", "generator.sharing=none")
    plan = cpu_plan(recipe, zero_optimization={"stage": stage})
    engine = PretrainingEngine(model_for(store, recipe), recipe, plan, CPU, "off")
    builder, seen = builder_for(store, recipe), []
    try:
        for step in range(24):
            if step in (19, 20):
                seen.append({name: each.detach().clone() for name, each in engine.module.named_parameters()})
            engine.train_step(builder.build(step), step)
        last = dict(engine.module.named_parameters())
        for name, after in seen[1].items():
            assert torch.equal(after, last[name]) == is_of_generator(name), name
        assert not all(torch.equal(each, seen[1][name]) for name, each in seen[0].items() if is_of_generator(name))
    finally:
        engine.close()


def test_a_generators_schedule_must_lie_within_the_other() -> None:
    for end in (5, 61):
        with pytest.raises(
            ConfigError, match=r"must be above schedule.warmup_steps 5 and at most schedule.total_steps 60"
        ):
            recipe_of(f"generator.total_steps={end}")


@pytest.mark.usefixtures("process_group")
def test_a_rate_of_its_own_works_at_every_stage_and_a_clipping_norm_at_stage_0(store: TokenStore) -> None:
    recipe = recipe_of("generator.learning_rate=3e-3")
    whole, _ = run(store, recipe)
    sharded, _ = run(store, recipe, zero_optimization={"stage": 2})
    np.testing.assert_allclose(sharded, whole, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"needs ZeRO stage 0, but the DeepSpeed JSON has stage 2"):
        run(store, recipe_of(*OWN), zero_optimization={"stage": 2})


def test_a_dry_run_refuses_a_clipping_norm_for_a_part_at_stage_2(
    store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    with pytest.raises(SystemExit):
        main(["pretrain", "--recipe", "tiny", "--data", str(store.path), "--ds-config", str(tmp_path / "ds.json"),
              "--dry-run", "--set", "generator.max_grad_norm=1"])  # fmt: skip
    assert "generator.max_grad_norm needs ZeRO stage 0, but the DeepSpeed JSON has stage 2" in capsys.readouterr().err
