"""A checkpoint moves between ZeRO stages, precisions, offload, micro-batches and numbers of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.plain import PlainEngine
from electra_ds.training.checkpoint import CheckpointFolder
from tests import forks, plan_worker
from tests.core.test_ranks import BOUNDS
from tests.helpers import builder_for, model_for, small_recipe
from tests.plan_worker import FIRST, PLANS, RECIPE, STEPS, engine_of, trained_plans


@pytest.fixture(scope="module")
def straight(store: TokenStore, process_group: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with the common state and the samples drawn after it, and the straight run's losses.

    The state is that of the engine at stage 0 in fp32; the samples are those of the plain engine, which runs along.
    """
    folder = tmp_path_factory.mktemp("plans")
    recipe = small_recipe(*RECIPE)
    builder = builder_for(store, recipe)
    plain = PlainEngine(model_for(store, recipe), recipe, recipe.global_batch_size, torch.device("cpu"))
    losses, samples = [], {}
    with engine_of("0/fp32", store, 1) as engine:
        for step in range(FIRST + STEPS):
            if step == FIRST:
                state = {"step": FIRST, "tokens": 0, "precision": "fp32", "optimizer": engine.optimizer.counters()}
                CheckpointFolder(folder / "common", keep=1).save(engine.optimizer.snapshot(), state, {})
            batch = builder.build(step)
            _, drawn = plain.train_step(batch, step)
            samples[f"step{step}"] = torch.cat(drawn).numpy()
            losses.append(engine.train_step(batch, step)["loss"].item())
    np.savez(folder / "samples.npz", **samples)  # type: ignore[arg-type]
    return folder, np.array(losses[FIRST:])


def check(losses: dict[str, list[float]], expected: np.ndarray, plans: list[str]) -> None:
    """To the rounding of the coarser precision, for whose size see BOUNDS. The first of them comes from the very
    weights that were saved, so a jump would show in it."""
    assert losses.keys() == set(plans)
    for plan, found in losses.items():
        np.testing.assert_allclose(found, expected, rtol=BOUNDS[plan.split("/")[1]], err_msg=plan)


def on_ranks(world_size: int, store: TokenStore, folder: Path, every: int, *writers: str) -> dict[str, Any]:
    """What the worker found on this many ranks."""
    forks.on_ranks(plan_worker.main, world_size, str(store.path), str(folder), str(every), *writers, timeout_s=3600)
    return json.loads((folder / f"{world_size}.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(3600)  # four ranks on two cores take their time
@pytest.mark.usefixtures("half_on_cpu")
@pytest.mark.parametrize(
    ("world_sizes", "every"), [((2,), 24), pytest.param((2, 4), 1, marks=pytest.mark.nightly)], ids=str
)
def test_every_plan_goes_on_from_one_state_and_reads_what_others_save(
    store: TokenStore, straight: tuple[Path, Any], process_group: Ranks, world_sizes: tuple[int, ...], every: int
) -> None:
    """Nightly every plan trains on every number of ranks and reads what every other saves; otherwise half of them train
    on one rank and the others on two, and a twenty-fourth of the pairs is tried."""
    folder, expected = straight
    check(plan_worker.train(folder, store, process_group, every), expected, trained_plans(1, every))
    pairs = plan_worker.read(folder, store, process_group, ["1"], every)
    before = ["1"]
    for world_size in world_sizes:
        found = on_ranks(world_size, store, folder, every, *before)
        check(found["losses"], expected, trained_plans(world_size, every))
        before.append(str(world_size))
        pairs += found["pairs"]
    pairs += plan_worker.read(folder, store, process_group, before[1:], every)
    if every == 1:
        sizes = range(1, 2 + len(world_sizes))
        # Every number of ranks has read what it, and fewer, have saved; and one rank what all have.
        assert pairs == len(PLANS) ** 2 * (sum(sizes) + len(world_sizes))
