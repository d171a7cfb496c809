"""How long a run will take on this machine, before it starts.

A known card's step is a roofline (`step_time.py`). A CPU's is the model's FLOPs at the rate of one large product, which
is measured here in a fifth of a second. Both are ranges.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from electra_ds.config.cards import find_card, peak_flops
from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.recipe import ElectraRecipe, Recipe
from electra_ds.core import devices
from electra_ds.pretraining.objectives.base import Objective
from electra_ds.pretraining.step_time import LAUNCH_S, OPERATIONS, PRODUCT_EFFICIENCY, StepTime, step_time

CPU_SLOWER = (1.5, 6.0)
"""A step on a CPU over its products alone at the rate of one large product."""
YEAR_S = 365 * 86_400
_CALIBRATION, _CALIBRATION_S = 768, 0.2


class RunTime(NamedTuple):
    """Seconds of a run, from the fastest to the slowest that is likely."""

    low_s: float
    high_s: float

    def __str__(self) -> str:
        return span(self.low_s, self.high_s)

    @property
    def may_take_years(self) -> bool:
        """Whether nobody starts such a run without having thought about it; weeks and months on a GPU are normal."""
        return self.high_s > YEAR_S


def cpu_rate(threads: int) -> float:
    """FLOPs a second of a large product in fp32 on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        left, right = torch.ones(_CALIBRATION, _CALIBRATION), torch.ones(_CALIBRATION, _CALIBRATION)
        left @ right
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < _CALIBRATION_S:
            left @ right
            count += 1
        return 2.0 * _CALIBRATION**3 * count / (time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)


def cpu_time(flops: float, threads: int, world_size: int = 1) -> RunTime:
    """Return the time of so many model FLOPs on this machine's CPU. threads: of each rank."""
    seconds = flops / (cpu_rate(threads) * world_size)
    return RunTime(seconds * CPU_SLOWER[0], seconds * CPU_SLOWER[1])


def pretraining_flops(recipe: Recipe, vocab_size: int) -> float:
    """Return the model FLOPs of one step over full rows; 0 if the objective does not say."""
    return Objective.of(recipe, vocab_size).usual_flops() or 0.0


def pretraining_time(
    recipe: Recipe,
    vocab_size: int,
    plan: DeepSpeedPlan,
    device: torch.device,
    *,
    steps: int,
    threads: int | None,
) -> RunTime | None:
    """Return how long so many steps take on this rank's device; None for a GPU whose rates are not known, and for
    an objective that does not say what it costs.

    threads: of a rank on a CPU, None for torch's choice.
    """
    if device.type == "cpu":
        flops = pretraining_flops(recipe, vocab_size)
        if not flops:
            return None
        return cpu_time(steps * flops, threads or torch.get_num_threads(), plan.batch.world_size)
    card = find_card(devices.device_name(device)) if isinstance(recipe, ElectraRecipe) else None
    return time_of_steps(None if card is None else step_time(recipe, vocab_size, plan, card), steps)


def finetuning_time(
    weights: int, num_layers: int, tokens: float, plan: DeepSpeedPlan, device: torch.device, *, steps: int, threads: int
) -> RunTime | None:
    """Return the same for a finetuning.

    weights: of the encoder, token table apart, each of which is multiplied with each token of the batch, in the forward
    pass once and in the backward pass twice. tokens: of a step, over all ranks.
    """
    flops = 6 * weights * tokens
    if device.type == "cpu":
        return cpu_time(steps * flops, threads, plan.batch.world_size)
    card = find_card(devices.device_name(device))
    peak = None if card is None else peak_flops(card, plan.precision.name)
    if peak is None:
        return None
    host_s = (OPERATIONS[0] * num_layers + OPERATIONS[2]) * plan.batch.gradient_accumulation_steps * LAUNCH_S
    return time_of_steps(StepTime(flops / plan.batch.world_size / (peak * PRODUCT_EFFICIENCY), 0.0, host_s), steps)


def time_of_steps(step: StepTime | None, steps: int) -> RunTime | None:
    """Return the time of so many steps on a card."""
    if step is None:
        return None
    low, high = step.days(steps)
    return RunTime(low * 86_400, high * 86_400)


def span(low_s: float, high_s: float) -> str:
    """Both in the unit that suits them, such as 2–8 min."""
    units = (("years", YEAR_S), ("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))
    unit, size = next((each for each in units if high_s >= 1.5 * each[1]), units[-1])
    first, last = (f"{value / size:.2g}" if value / size < 10 else f"{value / size:.0f}" for value in (low_s, high_s))
    return f"{first} {unit}" if first == last else f"{first}–{last} {unit}"
