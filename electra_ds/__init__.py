"""ELECTRA pretraining with DeepSpeed, and the sweeps that a study needs.

The functions below are the Python API, one per command; docs/python.md shows how to use them. Each is imported on first
use, so that `import electra_ds` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from electra_ds.api.corrupt import corrupt_data as corrupt_data
    from electra_ds.api.export import export as export
    from electra_ds.api.export import import_checkpoint as import_checkpoint
    from electra_ds.api.finetune import finetune as finetune
    from electra_ds.api.initialize import initialize as initialize
    from electra_ds.api.pieces import batches as batches
    from electra_ds.api.pieces import build_model as build_model
    from electra_ds.api.pieces import evaluate as evaluate
    from electra_ds.api.pieces import open_engine as open_engine
    from electra_ds.api.pieces import open_store as open_store
    from electra_ds.api.plan import plan as plan
    from electra_ds.api.pretrain import pretrain as pretrain
    from electra_ds.api.reports import report_runs as report_runs
    from electra_ds.api.reports import run_sweep as run_sweep
    from electra_ds.api.run import Run as Run
    from electra_ds.api.stores import build_data as build_data
    from electra_ds.api.trainer_json import trainer_json as trainer_json
    from electra_ds.api.transformers_model import ElectraForJointPreTraining as ElectraForJointPreTraining
    from electra_ds.api.transformers_model import NamedLosses as NamedLosses
    from electra_ds.api.transformers_model import StoreRows as StoreRows
    from electra_ds.config.finetune_recipe import FinetuneRecipe as FinetuneRecipe
    from electra_ds.config.options import FinetuneOptions as FinetuneOptions
    from electra_ds.config.options import PretrainOptions as PretrainOptions
    from electra_ds.config.recipe import Recipe as Recipe
    from electra_ds.config.recipe import load_recipe as load_recipe
    from electra_ds.data.corpus import Source as Source
    from electra_ds.data.token_store import TokenStore as TokenStore
    from electra_ds.finetuning.metrics import Metric as Metric
    from electra_ds.finetuning.tasks.base import FinetuneTask as FinetuneTask
    from electra_ds.pretraining.objectives.base import Objective as Objective
    from electra_ds.training.callbacks import Callback as Callback
    from electra_ds.training.optimizer import UpdateRule as UpdateRule

__version__ = "0.2.0"
_MODULES = {
    "pretrain": "api.pretrain", "finetune": "api.finetune", "build_data": "api.stores", "corrupt_data": "api.corrupt",
    "export": "api.export", "initialize": "api.initialize",
    "import_checkpoint": "api.export", "plan": "api.plan", "Run": "api.run", "load_recipe": "config.recipe",
    "Recipe": "config.recipe", "FinetuneRecipe": "config.finetune_recipe", "PretrainOptions": "config.options",
    "FinetuneOptions": "config.options", "TokenStore": "data.token_store", "batches": "api.pieces",
    "build_model": "api.pieces", "open_engine": "api.pieces", "open_store": "api.pieces", "evaluate": "api.pieces",
    "report_runs": "api.reports", "run_sweep": "api.reports", "Callback": "training.callbacks",
    "UpdateRule": "training.optimizer", "trainer_json": "api.trainer_json",
    "FinetuneTask": "finetuning.tasks.base", "Metric": "finetuning.metrics", "Source": "data.corpus",
    "Objective": "pretraining.objectives.base", "ElectraForJointPreTraining": "api.transformers_model",
    "NamedLosses": "api.transformers_model", "StoreRows": "api.transformers_model",
}  # fmt: skip
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
