"""Tokens a second and MFU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from electra_ds.core import devices
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.masked_batch import MaskedBatch
from electra_ds.pretraining.run_time import step_flops
from electra_ds.pretraining.step_shape import StepShape
from electra_ds.report.run_report import speed_line
from electra_ds.training import step_log
from electra_ds.training.step_log import Throughput, joint_peak_flops
from tests.helpers import builder_for, shape_of, small_recipe

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Clock:
    """Time that passes when a test says so."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(step_log, "time", clock)
    return clock


def flops_by(shape: StepShape) -> Callable[[MaskedBatch], float]:
    return lambda batch: step_flops(shape, batch.lengths_B, batch.num_selected).forward_and_backward


def test_mfu_is_the_flops_of_the_steps_over_their_time_over_the_peak(store: TokenStore, clock: Clock) -> None:
    recipe = small_recipe()
    shape = shape_of(recipe, store.info.vocab_size)
    batches = [builder_for(store, recipe).build(step) for step in range(3)]
    peak = 1e9
    speed = Throughput(CPU, peak, flops_by(shape))
    for batch in batches[:2]:
        speed.count(batch)
    clock.now += 2.0
    with speed.paused():
        clock.now += 50.0  # an evaluation
    tokens = sum(batch.num_tokens for batch in batches[:2])
    flops = sum(map(flops_by(shape), batches[:2]))
    assert speed.read() == {"tokens_per_s": round(tokens / 2), "mfu": round(flops / 2 / peak, 4)}

    speed.count(batches[2])
    clock.now += 4.0
    flops = flops_by(shape)(batches[2])
    assert speed.read() == {"tokens_per_s": round(batches[2].num_tokens / 4), "mfu": round(flops / 4 / peak, 4)}


def test_where_the_peak_is_not_known_there_is_no_mfu(store: TokenStore, clock: Clock) -> None:
    recipe = small_recipe()
    shape = shape_of(recipe, store.info.vocab_size)
    speed = Throughput(CPU, joint_peak_flops(CPU, "fp32", 1), flops_by(shape))
    speed.count(builder_for(store, recipe).build(0))
    clock.now += 1.0
    assert set(speed.read()) == {"tokens_per_s"}


@pytest.mark.parametrize(
    ("name", "precision", "world_size", "expected"),
    [
        ("NVIDIA GeForce GTX 1060 6GB", "fp16", 1, 4.4e12),
        ("NVIDIA GeForce RTX 3090", "fp16", 2, 2 * 71.2e12),
        ("Tesla V100-SXM2-16GB", "autocast-bf16", 1, None),
        ("NVIDIA Something New", "fp32", 1, None),
    ],
)
def test_the_peak_is_that_of_all_ranks_in_the_plans_precision(
    monkeypatch: pytest.MonkeyPatch, name: str, precision: str, world_size: int, expected: float | None
) -> None:
    monkeypatch.setattr(devices, "device_name", lambda device: name)
    assert joint_peak_flops(GPU, precision, world_size) == expected


def test_the_summary_tells_the_mfu_where_it_is_known() -> None:
    lines = [{"mfu": share, "tokens_per_s": 100_000 * share} for share in (0.01, 0.25, 0.24, 0.26)]
    assert speed_line([{"tokens_per_s": 5}], "CPU") is None
    assert speed_line([*lines, {"loss": 1.0}], "X") == "24,500 tokens/s, 24.5% of the peak of X (MFU)"
