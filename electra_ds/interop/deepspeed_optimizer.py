"""The state of a foreign optimizer: its groups, its count of steps and loss scale, and what it kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from electra_ds.core.errors import CheckpointError
from electra_ds.training.optimizer import MOMENTS


def why_no_moments(own: Any, has_moments: bool) -> list[str]:
    """Return notes on what AdamW cannot take from the state, and why."""
    kept = _kept(own)
    if has_moments:
        others = [key for key in kept if key not in MOMENTS]
        return [f"its optimizer also kept {', '.join(others)}, which AdamW does not have"] if others else []
    if not kept and not param_groups(own):
        return ["it holds no optimizer"]
    return [other_than_adam(own) or "its optimizer holds none of Adam's moments, as before the first step"]


def other_than_adam(own: Any) -> str:
    """Return what shows that the optimizer is not of Adam's kind; empty if it may be one."""
    kept, groups = _kept(own), param_groups(own)
    if kept and not set(MOMENTS) <= set(kept):
        return f"its optimizer was not Adam: it kept {', '.join(kept)}, not exp_avg and exp_avg_sq"
    if not kept and groups and not any("betas" in group for group in groups):
        return "its optimizer was not Adam, but one such as SGD without momentum: it has no betas and kept nothing"
    return ""


def _kept(own: Any) -> list[str]:
    """Return the names of the tensors that the state holds for parameters."""
    found = {key for state in _states(own) for key, value in state.items() if torch.is_tensor(value)}
    return sorted(map(str, found - {"step"}))


def _states(own: Any) -> list[dict[str, Any]]:
    """Return the state of each tensor; elastic checkpoints hold it as a list."""
    states = own if isinstance(own, list) else list(own.get("state", {}).values()) if isinstance(own, dict) else []
    return [state for state in states if isinstance(state, dict)]


def param_groups(own: Any) -> list[dict[str, Any]]:
    groups = own.get("param_groups") if isinstance(own, dict) else None
    return [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []


def adam_step(own: Any) -> float | None:
    """Return Adam's own count of updates, the largest of those in its state and groups."""
    found = [state.get("step") for state in (*_states(own), *param_groups(own))]
    counts = [float(step) for step in found if isinstance(step, (int, float, torch.Tensor))]
    for count in counts:
        if not math.isfinite(count) or count < 0:
            raise CheckpointError(f"Adam's own count of steps is {count}. The checkpoint is damaged.")
    return max(counts, default=None)


def loss_scale(scaling: Mapping[str, Any], is_scaled: bool) -> dict[str, float]:
    """Return the counters of the loss scale from a loss scaler's attributes, or what stage 0 has of them.

    DeepSpeed counts iterations from 0, and -1 stands for an overflow that never was.
    """

    def number(key: str, default: float) -> float:
        value = scaling.get(key, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if is_number and abs(value) < 2.0**127 else default

    good = number("cur_iter", 0) - number("last_overflow_iter", -1) - 1
    return {
        "consecutive_skips": 0.0,
        "is_scaled": float(is_scaled),
        "loss_scale": max(number("cur_scale", 1.0), 2.0**-24) if is_scaled else 1.0,
        "good_steps": max(0.0, good) if is_scaled else 0.0,
        "hysteresis_left": max(1.0, number("cur_hysteresis", 1.0)),
    }
