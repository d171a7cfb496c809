"""A run's model as it was last saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from electra_ds.config.recipe import Recipe
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer
from electra_ds.pretraining.batches import objective_of
from electra_ds.pretraining.objectives.base import Objective
from electra_ds.training.checkpoint import Checkpoint
from electra_ds.training.model import AutocastModel
from electra_ds.training.recorded import newest_checkpoint, recorded_recipe


class TrainedModel(NamedTuple):
    """A model as a checkpoint holds it."""

    model: AutocastModel
    """fp32, in evaluation mode."""
    objective: Objective[Any]
    tokenizer: Tokenizer
    recipe: Recipe


def load_trained(run_or_checkpoint: Path) -> TrainedModel:
    """Return the model of a run's newest checkpoint, or of a given checkpoint.

    Needs nothing but the folder itself. Raises CheckpointError if there is no complete checkpoint.
    """
    return load_model(newest_checkpoint(run_or_checkpoint))


def load_model(checkpoint: Checkpoint) -> TrainedModel:
    """Return the model of a checkpoint. Raises CheckpointError if its weights are not those of its recipe."""
    recipe = recorded_recipe(checkpoint)
    tokenizer = load_tokenizer(checkpoint.path / "tokenizer.json")
    objective = objective_of(recipe, tokenizer)
    model = objective.build_model()
    checkpoint.check_weights({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.tensors[f"master/{name}"])
    return TrainedModel(model.eval(), objective, tokenizer, recipe)
