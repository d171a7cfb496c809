"""The checkpoint of a run to work with, and the recipe that travels in it."""

from __future__ import annotations

import logging
from operator import attrgetter
from pathlib import Path

from electra_ds.config.recipe import Recipe, RecipeT, Section, load_yaml, validate_recipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.config.run_record import FinetuneRecord
from electra_ds.core.errors import CheckpointError, ConfigError
from electra_ds.core.ranks import Ranks
from electra_ds.training.checkpoint import Checkpoint, CheckpointFolder, load_checkpoint, open_checkpoint

_log = logging.getLogger(__name__)


def newest_checkpoint(run_or_checkpoint: Path, ranks: Ranks | None = None) -> Checkpoint:
    """A run's newest whole checkpoint, or the given one. Raises CheckpointError if there is none.

    ranks: of several, which all call it.
    """
    if (run_or_checkpoint / "manifest.json").is_file():
        return load_checkpoint(run_or_checkpoint)
    run = RunDirectory(run_or_checkpoint)
    if not run.exists():
        raise CheckpointError(f"{run_or_checkpoint} is neither a run directory nor a checkpoint.")
    newest, damaged = CheckpointFolder(run.checkpoints, keep=1).latest_valid(ranks)
    if newest is None:
        raise CheckpointError(f"The run {run_or_checkpoint} has no checkpoint yet.")
    if ranks is None or ranks.is_main:
        for problem in damaged.values():
            _log.warning("%s Taking the one before.", problem)
    return open_checkpoint(newest)


def kept_checkpoint(run_or_checkpoint: Path) -> Checkpoint:
    """The given checkpoint, or of a run the best evaluation's where that was asked for, or else the newest."""
    if (run_or_checkpoint / "manifest.json").is_file():
        return load_checkpoint(run_or_checkpoint)
    run = RunDirectory(run_or_checkpoint)
    settings = run.read_record(FinetuneRecord).settings
    best, _ = CheckpointFolder(run.path / "best", keep=1).latest_valid()
    if settings.best and best is not None:
        return open_checkpoint(best)
    if best is None and not any(run.checkpoints.glob("step-*")) and settings.discard_weights:
        raise CheckpointError(
            f"{run.path} has no weights any more: it was run with --discard-weights, which keeps scores and "
            f"predictions alone. Train again without it; {run.path / 'run.json'} has the command."
        )
    if settings.best and run.status() == "done":
        raise CheckpointError(
            f"{run.path} was to keep its best evaluation's weights, and {run.path / 'best'} has none. For the last "
            f"ones give the checkpoint itself: {run.checkpoints / 'latest'}"
        )
    return newest_checkpoint(run_or_checkpoint)


def beside(checkpoint: Checkpoint, name: str) -> Path:
    """Where what is made of a run's checkpoint goes, if nobody says. Raises ConfigError for a copy kept elsewhere."""
    if checkpoint.path.parent.name not in ("checkpoints", "best"):
        raise ConfigError(f"{checkpoint.path} is not in a run's folder; say with --out where to write.")
    return checkpoint.path.parent.parent / name


def check_same_recipe(checkpoint: Checkpoint, recipe: Section, run: RunDirectory) -> None:
    """Raises CheckpointError if the run's recipe is not the one that the checkpoint was trained by."""
    before, now = recorded_recipe(checkpoint, type(recipe)), recipe
    values = {key: (attrgetter(key)(before), attrgetter(key)(now)) for key in recipe.dotted_keys()}
    changed = [f"{key} is {new}, not {old}" for key, (old, new) in values.items() if old != new]
    if changed:
        begins = ", for which --init-from takes an export" if isinstance(recipe, Recipe) else ""
        raise CheckpointError(
            f"{run.path / 'recipe.yaml'} has changed since {checkpoint.path} was saved: {'; '.join(changed)}. Put back "
            f"{checkpoint.path / 'recipe.yaml'}; another recipe is another run{begins}."
        )


def recorded_recipe(checkpoint: Checkpoint, kind: type[RecipeT] = Recipe) -> RecipeT:  # type: ignore[assignment]
    """The recipe that travels in a checkpoint."""
    path = checkpoint.path / "recipe.yaml"
    try:
        return validate_recipe(load_yaml(path.read_text("utf8"), "It"), str(path), kind)
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
