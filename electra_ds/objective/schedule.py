"""The learning rate as a function of the global step."""

from __future__ import annotations


def linear_warmup_decay(step: int, *, learning_rate: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of optimiser step `step` (0 for the first one).

    Rises linearly from 0 over `warmup_steps`, then falls linearly to 0 at `total_steps`
    (transformers' `get_linear_schedule_with_warmup`, which the reproduction study used).
    """
    if step < warmup_steps:
        return learning_rate * step / warmup_steps
    return learning_rate * max(0.0, (total_steps - step) / (total_steps - warmup_steps))
