"""Several ranks are one run: the same losses at every number of ranks, ZeRO stage and precision."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from electra_ds.core import devices
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.plain import PlainEngine
from tests import forks, rank_worker
from tests.helpers import builder_for, model_for, small_recipe
from tests.rank_worker import PRECISIONS, RECIPE, STEPS, STEPS_IN_HALF, evaluation

# fp32 differs by the order of sums alone. bf16 has 8 significant bits (2^-9 = 0.2 % a rounding) and fp16 11; a loss is
# a mean over some hundred positions, whose roundings partly cancel, so one rounding's size bounds its relative error,
# and the weights drift apart over the 20 steps by the same kind of error: twice that for bf16.
BOUNDS = {"fp32": 1e-5, "bf16": 4e-3, "fp16": 1e-3}


@pytest.fixture(scope="module")
def control(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, Path]:
    """Losses of the plain engine on one rank, and a file with the samples that it drew."""
    recipe = small_recipe(*RECIPE)
    engine = PlainEngine(model_for(store, recipe), recipe, recipe.global_batch_size, torch.device("cpu"))
    builder = builder_for(store, recipe)
    losses, samples = [], {}
    for step in range(STEPS):
        result, drawn = engine.train_step(builder.build(step), step)
        losses.append(result["loss"].item())
        samples[f"step{step}"] = torch.cat(drawn).numpy()
    path = tmp_path_factory.mktemp("samples") / "samples.npz"
    np.savez(path, **samples)  # type: ignore[arg-type]
    return np.array(losses), path


def found_on(world_size: int, out: Path, *arguments: object) -> Any:
    forks.on_ranks(rank_worker.main, world_size, *map(str, arguments), str(out))
    return np.load(out)


@pytest.mark.nightly
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_world_size_stage_and_precision_follows_the_plain_engine_on_one_rank(
    store: TokenStore, control: tuple[np.ndarray, Path], tmp_path: Path, world_size: int
) -> None:
    """Of fewer steps CI sees the same in test_plans.py."""
    expected, samples = control
    assert expected[-1] < 0.9 * expected[0]
    with found_on(world_size, tmp_path / "losses.npz", "follow", store.path, samples) as found:
        for stage, precision in itertools.product((0, 1, 2, 3), PRECISIONS):
            name = f"{precision}-{stage}"
            assert len(found[name]) == (STEPS if precision == "fp32" else STEPS_IN_HALF)
            np.testing.assert_allclose(found[name], expected[: len(found[name])], rtol=BOUNDS[precision], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.nightly), 2, pytest.param(4, marks=pytest.mark.nightly)]
)
def test_at_every_world_size_engines_take_over_recompute_and_evaluate_alike(
    store: TokenStore, tmp_path: Path, process_group: Ranks, world_size: int
) -> None:
    """An engine that takes over half-way goes on as the first one does, one that computes layers again in the backward
    pass has the losses of one that does not, and evaluation gives the same numbers as on one rank."""
    with found_on(world_size, tmp_path / "found.npz", "take_over", store.path) as found:
        for stage in (0, 1, 2, 3):
            straight, resumed = found[f"straight-{stage}"], found[f"resumed-{stage}"]
            np.testing.assert_array_equal(resumed, straight)
            assert len(straight) == 6
        np.testing.assert_allclose(found["checkpointed"], found["straight-3"], rtol=1e-5)
        np.testing.assert_array_equal(found["evaluation"], np.array([*evaluation(store, process_group).values()]))


@pytest.mark.parametrize(("share", "threads", "device", "is_noted"), [
    (100.0, 2, "CPU (2 cores)", True), (0.0, 2, "CPU (2 cores)", False), (100.0, 1, "CPU (2 cores)", False),
    (100.0, 2, "Tesla T4", False),
])  # fmt: skip
def test_a_busy_machine_is_noted_if_several_threads_need_its_cores(
    monkeypatch: pytest.MonkeyPatch, share: float, threads: int, device: str, is_noted: bool
) -> None:
    monkeypatch.setattr(devices.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(devices.psutil, "cpu_percent", lambda interval: share)
    said = devices.busy_note(device, threads)
    assert (said is not None) == is_noted
    assert said is None or "other programs keep 2.0 of the 2 cores busy" in said
