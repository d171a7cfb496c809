"""A run's model as it was last saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from electra_ds.config.recipe import Recipe
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer
from electra_ds.pretraining.electra import Electra
from electra_ds.training.checkpoint import Checkpoint
from electra_ds.training.recorded import newest_checkpoint, recorded_recipe


def load_trained(run_or_checkpoint: Path) -> tuple[Electra, Tokenizer, Recipe, dict[str, Any]]:
    """(model in fp32, tokenizer, recipe, checkpoint state) of a run's newest checkpoint, or of a given one.

    Needs nothing but the folder itself. Raises CheckpointError if there is no whole checkpoint.
    """
    checkpoint = newest_checkpoint(run_or_checkpoint)
    return (*load_model(checkpoint), checkpoint.state)


def load_model(checkpoint: Checkpoint) -> tuple[Electra, Tokenizer, Recipe]:
    """(model in fp32, tokenizer, recipe)."""
    recipe = recorded_recipe(checkpoint)
    tokenizer = load_tokenizer(checkpoint.path / "tokenizer.json")
    model = Electra(recipe, tokenizer.vocab_size, tokenizer.pad_id)
    checkpoint.check_weights({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.tensors[f"master/{name}"])
    return model.eval(), tokenizer, recipe
