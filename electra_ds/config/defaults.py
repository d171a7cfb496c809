"""The DeepSpeed JSON that a run has where none is given."""

from __future__ import annotations

from typing import Any

from electra_ds.config.cards import Card
from electra_ds.config.deepspeed import read_deepspeed_json

_ANY_GPU = {"fp16": {"enabled": "auto"}, "zero_optimization": {"stage": 0}}


def default_ds_config(has_gpu: bool, card: Card | None) -> tuple[dict[str, Any], str]:
    """Return its values and what to call it. card: None for a GPU that is not known."""
    if not has_gpu:
        return read_deepspeed_json("cpu"), "cpu"
    if card is not None and card.ds_config is not None:
        return read_deepspeed_json(card.ds_config), card.ds_config
    return _ANY_GPU, "the default JSON for any GPU"
