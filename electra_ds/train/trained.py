"""A run's model as it was last saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from electra_ds.config.recipe import Recipe, validate_recipe
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer
from electra_ds.engine.checkpoint import Checkpoint, CheckpointFolder, load_checkpoint, open_checkpoint
from electra_ds.errors import CheckpointError
from electra_ds.model.electra import Electra


def newest_checkpoint(run_or_checkpoint: Path) -> Checkpoint:
    """A run's newest whole checkpoint, or the given one. Raises CheckpointError where there is none."""
    if (run_or_checkpoint / "manifest.json").is_file():
        return load_checkpoint(run_or_checkpoint)
    if not (run_or_checkpoint / "run.json").is_file():
        raise CheckpointError(f"{run_or_checkpoint} is neither a run directory nor a checkpoint.")
    newest, damaged = CheckpointFolder(run_or_checkpoint / "checkpoints", keep=1).newest_whole()
    if newest is None:
        raise CheckpointError(f"The run {run_or_checkpoint} has no checkpoint yet.")
    for problem in damaged.values():
        print(f"Warning: {problem} Taking the one before.")
    return open_checkpoint(newest)


def recorded_recipe(checkpoint: Checkpoint) -> Recipe:
    """The recipe that travels in a checkpoint."""
    path = checkpoint.path / "recipe.yaml"
    return validate_recipe(yaml.safe_load(path.read_text("utf8")), str(path))


def load_trained(run_or_checkpoint: Path) -> tuple[Electra, Tokenizer, Recipe, dict[str, Any]]:
    """(model in fp32, tokenizer, recipe, checkpoint state) of a run's newest checkpoint, or of a given one.

    Needs nothing but the folder itself. Raises CheckpointError where there is no whole checkpoint.
    """
    checkpoint = newest_checkpoint(run_or_checkpoint)
    recipe = recorded_recipe(checkpoint)
    tokenizer = load_tokenizer(checkpoint.path / "tokenizer.json")
    model = Electra(recipe, tokenizer.vocab_size, tokenizer.pad_id)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.tensors[f"master/{name}"])
    return model.eval(), tokenizer, recipe, checkpoint.state
