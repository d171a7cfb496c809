"""What a plan says of the model itself, before any engine takes it."""

from __future__ import annotations

import torch

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.model.electra import Electra

_WEIGHTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
_AUTOCAST = {"autocast-fp16": torch.float16, "autocast-bf16": torch.bfloat16}


def set_up_model(model: Electra, plan: DeepSpeedPlan) -> torch.dtype:
    """Autocast and activation checkpointing as planned; returns the dtype that the weights are to have in a step."""
    model.autocast_dtype = _AUTOCAST.get(plan.precision.name)
    for encoder in (model.generator, model.discriminator):
        encoder.checkpointed_layers = plan.checkpointed_layers
    return _WEIGHTS.get(plan.precision.name, torch.float32)
