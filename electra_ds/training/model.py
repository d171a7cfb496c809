"""What any engine needs of a model: precision and activation checkpointing, set up before the engine takes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import nn

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


class AutocastModel(nn.Module, ABC):
    """A model that runs its own forward pass under torch.autocast, since DeepSpeed's engine switches off an autocast
    that it was called under."""

    autocast_dtype: torch.dtype | None = None
    """The dtype of the forward pass; None for that of the weights."""
    checkpointed_layers: int = 0
    """Layers of each encoder, from the first, that keep only their input for the backward pass."""

    def set_up(self, autocast_dtype: torch.dtype | None, checkpointed_layers: int) -> None:
        """Take what an engine's plan says of the model itself."""
        self.autocast_dtype, self.checkpointed_layers = autocast_dtype, checkpointed_layers

    def forward(self, batch: Any, replayed: Any = None) -> Any:
        """Return the losses of one micro-batch, as a `training.step.StepOutput`.

        replayed: what another run drew at random, to be taken in place of own draws; None to draw.
        """
        with torch.autocast(batch.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            return self.run(batch, replayed)

    @abstractmethod
    def run(self, batch: Any, replayed: Any) -> Any:
        """Do what `forward` says, under its autocast. An engine may put a compiled form in the place of this method."""


def set_up_model(model: TrainableModel, plan: DeepSpeedPlan) -> torch.dtype:
    """Autocast and activation checkpointing as planned; returns the dtype that the weights are to have in a step."""
    model.set_up(_AUTOCAST.get(plan.precision.name), plan.checkpointed_layers)
    return _WEIGHTS.get(plan.precision.name, torch.float32)
