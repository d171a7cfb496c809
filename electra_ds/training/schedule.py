"""The learning rate as a function of the global step."""

from __future__ import annotations

from typing import Literal


def learning_rate_at(
    step: int, *, learning_rate: float, kind: Literal["linear", "product"], warmup_steps: int, total_steps: int
) -> float:
    """Learning rate of optimiser step `step` (0 for the first one).

    `linear`: rises linearly from 0 over `warmup_steps`, then falls linearly to 0 at `total_steps`
    (transformers' `get_linear_schedule_with_warmup`, which the reproduction study used). `product`: the rise
    times a linear decay that begins at step 0, so that the peak lies below `learning_rate`
    (google-research/electra, model/optimization.py).
    """
    rise = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    if kind == "product":
        return learning_rate * rise * max(0.0, 1.0 - step / total_steps)
    if step < warmup_steps:
        return learning_rate * rise
    return learning_rate * max(0.0, (total_steps - step) / (total_steps - warmup_steps))
