"""Sweeps: the trials of a file, run one by one or by Ray Tune, and their results.

`run_sweep` runs a sweep. `trainable` makes a trial for your own `tune.Tuner`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from electra_ds.sweep.run import run_sweep
    from electra_ds.sweep.tune_trial import trainable

__all__ = ["run_sweep", "trainable"]
_MODULES = {"run_sweep": "electra_ds.sweep.run", "trainable": "electra_ds.sweep.tune_trial"}


def __getattr__(name: str) -> Any:
    """Import torch, pandas and Ray only when a name that needs them is used."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
