"""Finding, listing, verifying and pruning a run's checkpoints, and reading the recipe stored in each."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from electra_ds.config.recipe import Recipe, RecipeT, validate_recipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.config.run_record import FinetuneRecord, Record
from electra_ds.config.sections import Section
from electra_ds.config.values import load_yaml
from electra_ds.core.errors import CheckpointError, ConfigError
from electra_ds.core.program import command
from electra_ds.core.ranks import Ranks
from electra_ds.training.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    load_checkpoint,
    open_checkpoint,
    read_manifest,
    remove,
)
from electra_ds.training.optimizer import MOMENTS

_log = logging.getLogger(__name__)


def folder_of(run: Path) -> CheckpointFolder:
    """Return a run's checkpoints. Raises CheckpointError if there is no run."""
    directory = RunDirectory(run)
    if not directory.checkpoints.is_dir():
        if (run / "latest").is_file():
            raise CheckpointError(
                f"{run} is a native DeepSpeed checkpoint; {command('checkpoint import')} turns it into a run."
            )
        if not directory.exists():
            raise CheckpointError(f"{run} is neither a run directory nor a checkpoint.")
        raise directory.lacks("checkpoint")
    return CheckpointFolder(directory.checkpoints, keep=1)


def newest_checkpoint(run_or_checkpoint: Path, ranks: Ranks | None = None) -> Checkpoint:
    """Return a run's newest complete checkpoint, or the given one. Raises CheckpointError if there is none.

    ranks: pass it if several ranks call this together.
    """
    if (run_or_checkpoint / "manifest.json").is_file():
        return load_checkpoint(run_or_checkpoint)
    newest, damaged = folder_of(run_or_checkpoint).latest_valid(ranks)
    if newest is None:
        raise RunDirectory(run_or_checkpoint).lacks("checkpoint")
    if ranks is None or ranks.is_main:
        for problem in damaged.values():
            _log.warning("%s Using the checkpoint before it.", problem)
    return open_checkpoint(newest)


def kept_checkpoint(run_or_checkpoint: Path) -> Checkpoint:
    """Return the given checkpoint or, for a run, the best evaluation's checkpoint if it keeps that, else the newest."""
    if (run_or_checkpoint / "manifest.json").is_file():
        return load_checkpoint(run_or_checkpoint)
    run = RunDirectory(run_or_checkpoint)
    settings = run.read_record(FinetuneRecord).settings
    best, _ = CheckpointFolder(run.path / "best", keep=1).latest_valid()
    if settings.best and best is not None:
        return open_checkpoint(best)
    if best is None and not any(run.checkpoints.glob("step-*")) and settings.discard_weights:
        raise CheckpointError(
            f"{run.path} no longer has weights: it was run with --discard-weights, which keeps only scores and "
            f"predictions. Train again without it; {run.path / 'run.json'} has the command."
        )
    if settings.best and run.status() == "done":
        raise CheckpointError(
            f"{run.path} should have kept its best evaluation's weights, but {run.path / 'best'} has none. To use the "
            f"last weights, give the checkpoint itself: {run.checkpoints / 'latest'}"
        )
    return newest_checkpoint(run_or_checkpoint)


def default_export_folder(checkpoint: Checkpoint, name: str) -> Path:
    """Return the default folder for exports of a checkpoint. Raises ConfigError if the checkpoint is not in a run."""
    if checkpoint.path.parent.name not in ("checkpoints", "best"):
        raise ConfigError(f"{checkpoint.path} is not in a run's folder; give the folder to write to with --out.")
    return checkpoint.path.parent.parent / name


def check_same_recipe(checkpoint: Checkpoint, recipe: Section, run: RunDirectory) -> None:
    """Raise CheckpointError if the run's recipe is not the one that the checkpoint was trained with."""
    before, now = recorded_recipe(checkpoint, type(recipe)), recipe
    values = {key: (attrgetter(key)(before), attrgetter(key)(now)) for key in recipe.dotted_keys()}
    changed = [f"{key} is {new}, not {old}" for key, (old, new) in values.items() if old != new]
    if changed:
        begins = ", which can start from an export with --init-from" if isinstance(recipe, Recipe) else ""
        raise CheckpointError(
            f"{run.path / 'recipe.yaml'} has changed since {checkpoint.path} was saved: {'; '.join(changed)}. Restore "
            f"it from {checkpoint.path / 'recipe.yaml'}; a different recipe needs a new run{begins}."
        )


def recorded_recipe(checkpoint: Checkpoint, kind: type[RecipeT] = Recipe) -> RecipeT:  # type: ignore[assignment]
    """Return the recipe stored in a checkpoint."""
    path = checkpoint.path / "recipe.yaml"
    try:
        return validate_recipe(load_yaml(path.read_text("utf8"), "It"), str(path), kind)
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error


class CheckpointInfo(NamedTuple):
    """A description of one checkpoint from its files; None for a value whose file cannot be read."""

    name: str
    bytes: int
    problem: str | None
    """The problem that the manifest and the sizes of its files reveal, if any."""
    step: int | None = None
    tokens: int | None = None
    saved: str | None = None
    """UTC, ISO 8601."""
    precision: str | None = None
    """The precision of the run that saved it; the weights are always fp32."""
    stage: int | None = None
    ranks: int | None = None


def list_checkpoints(run: Path) -> list[CheckpointInfo]:
    """Describe a run's checkpoints, oldest first. Raises CheckpointError if there is no run."""
    found = []
    for path in folder_of(run).paths():
        try:
            found.append(_describe(path))
        except OSError:
            if path.exists():  # otherwise the run has pruned it in the meantime
                raise
    return found


def _describe(path: Path) -> CheckpointInfo:
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    found = CheckpointInfo(path.name, size, _problem(path))
    try:
        state, plan, record = (
            json.loads((path / name).read_text("utf8")) for name in ("state.json", "deepspeed.json", "run.json")
        )
        return found._replace(
            step=state["step"],
            tokens=state["tokens"],
            saved=datetime.fromisoformat(state["saved"]).isoformat(),
            precision=state["precision"],
            stage=plan.get("zero_optimization", {}).get("stage", 0),
            ranks=record["world_size"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged
        return found


def _problem(path: Path) -> str | None:
    try:
        files = read_manifest(path)
    except CheckpointError:
        return "manifest.json cannot be read"
    for name, entry in sorted(files.items()):
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry.bytes:
            return f"{name} has {file.stat().st_size} bytes, not {entry.bytes}"
    return None


def damaged_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints that a resumed run found damaged."""
    return sorted(folder_of(run).folder.glob("damaged-step-*"))


def checkpoints_to_verify(run_or_checkpoint: Path) -> list[Path]:
    """Return all checkpoints of a run, newest first, or the given one. Raises CheckpointError if there is none."""
    if (run_or_checkpoint / "manifest.json").is_file() or run_or_checkpoint.parent.name == "checkpoints":
        return [run_or_checkpoint]
    paths = folder_of(run_or_checkpoint).paths()
    if not paths:
        raise RunDirectory(run_or_checkpoint).lacks("checkpoint")
    return paths[::-1]


def verify(path: Path) -> str | None:
    """Read every byte of a checkpoint, check hashes, names and shapes, and return the problem, or None.

    Raises FileNotFoundError if the run has pruned it in the meantime.
    """
    try:
        checkpoint = load_checkpoint(path)
        tensors = checkpoint.tensors
        non_finite = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if non_finite:
            return f"The checkpoint {path} has {len(non_finite)} tensors that are not finite, such as {non_finite[0]}."
        weights = [name.removeprefix("master/") for name in tensors if name.startswith("master/")]
        trained = [name for name in weights if any(f"{kind}/{name}" in tensors for kind in MOMENTS)]
        checkpoint.check({name: tensors.shape(f"master/{name}") for name in weights}, trained)
    except CheckpointError as error:
        if not path.exists():
            raise FileNotFoundError(path) from error
        return str(error)
    return None


def prune(run: Path, keep: int | None, *, damaged: bool, dry: bool) -> Iterator[tuple[Path, str]]:
    """Remove old checkpoints and the leftovers of interrupted saves; yield each path and the reason before removing it.

    keep: the number of newest checkpoints to retain; None for the run's setting. damaged: also remove checkpoints that
    were set aside as damaged. dry: remove nothing. Raises CheckpointError if the run is in use, if none of the retained
    checkpoints would be complete, or if the folder is not writable.
    """
    directory, folder = RunDirectory(run), folder_of(run)
    with directory.locked():
        keep = keep or directory.read_record(Record).settings.keep
        newest, wrong = folder.latest_valid()
        staying = folder.paths()[-keep:]
        if newest is not None and newest not in staying:
            raise CheckpointError(
                f"The {keep} newest checkpoints of {run} are damaged, and {newest.name} is the newest complete one: "
                f"{next(iter(wrong.values()))} Resume the run first, which sets them aside, or give a larger "
                f"--keep."
            )
        to_remove = [(path, "older") for path in folder.paths()[:-keep]]
        to_remove += [(path, "left by an interrupted save") for path in folder.leftovers()]
        if damaged:
            to_remove += [(path, "damaged") for path in damaged_checkpoints(run)]
        if newest is not None and not dry:
            folder.point_to(newest)
        for path, why in to_remove:
            yield path, why
            if dry:
                continue
            try:
                remove(path)
            except OSError as error:
                raise CheckpointError(f"Cannot remove {path}: {error}.") from error
