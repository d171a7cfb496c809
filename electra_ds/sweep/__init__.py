"""Studies: a file's trials, run one by one or by Ray Tune, and what they came to.

`electra_ds.sweep.trainable` is a trial for a `tune.Tuner` of one's own; what else is here does without Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from electra_ds.sweep.tune_trial import trainable

__all__ = ["trainable"]


def __getattr__(name: str) -> Any:
    """Ray is imported by whoever asks for it."""
    if name in __all__:
        return getattr(importlib.import_module("electra_ds.sweep.tune_trial"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
