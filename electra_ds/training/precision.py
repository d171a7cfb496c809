"""What a plan says of the model itself, before any engine takes it."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from electra_ds.config.deepspeed import DeepSpeedPlan

_WEIGHTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
_AUTOCAST = {"autocast-fp16": torch.float16, "autocast-bf16": torch.bfloat16}


class TrainableModel(Protocol):
    """What any engine can train: a `torch.nn.Module` that lets itself be set up."""

    def set_up(self, autocast_dtype: torch.dtype | None, checkpointed_layers: int) -> None:
        """autocast_dtype: for its forward pass, None for none. checkpointed_layers: how many of each encoder, from the
        first, keep their input alone for the backward pass."""

    def named_parameters(self) -> Any: ...

    def to(self, *args: Any, **kwargs: Any) -> Any: ...


def set_up_model(model: TrainableModel, plan: DeepSpeedPlan) -> torch.dtype:
    """Autocast and activation checkpointing as planned; returns the dtype that the weights are to have in a step."""
    model.set_up(_AUTOCAST.get(plan.precision.name), plan.checkpointed_layers)
    return _WEIGHTS.get(plan.precision.name, torch.float32)
