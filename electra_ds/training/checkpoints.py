"""A run's checkpoints on the disk: found, listed, verified and pruned, and the recipe that travels in each."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from electra_ds.config.recipe import Recipe, RecipeT, Section, load_yaml, validate_recipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.config.run_record import FinetuneRecord, Record
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
                f"{run} is DeepSpeed's own checkpoint; {command('checkpoint import')} makes a run of it."
            )
        if not directory.exists():
            raise CheckpointError(f"{run} is neither a run directory nor a checkpoint.")
        raise CheckpointError(f"The run {run} has no checkpoint yet.")
    return CheckpointFolder(directory.checkpoints, keep=1)


def newest_checkpoint(run_or_checkpoint: Path, ranks: Ranks | None = None) -> Checkpoint:
    """Return a run's newest complete checkpoint, or the given one. Raises CheckpointError if there is none.

    ranks: of several, which all call it.
    """
    if (run_or_checkpoint / "manifest.json").is_file():
        return load_checkpoint(run_or_checkpoint)
    newest, damaged = folder_of(run_or_checkpoint).latest_valid(ranks)
    if newest is None:
        raise CheckpointError(f"The run {run_or_checkpoint} has no checkpoint yet.")
    if ranks is None or ranks.is_main:
        for problem in damaged.values():
            _log.warning("%s Taking the one before.", problem)
    return open_checkpoint(newest)


def kept_checkpoint(run_or_checkpoint: Path) -> Checkpoint:
    """Return the given checkpoint, or of a run that of the best evaluation if it keeps that, or else the newest."""
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
    """Return where an export of a run's checkpoint goes by default. Raises ConfigError for a copy kept elsewhere."""
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
    """Return the recipe that travels in a checkpoint."""
    path = checkpoint.path / "recipe.yaml"
    try:
        return validate_recipe(load_yaml(path.read_text("utf8"), "It"), str(path), kind)
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error


class Listed(NamedTuple):
    """One checkpoint, by what its files say; None where one of them cannot be read."""

    name: str
    bytes: int
    problem: str | None
    """What is wrong with it, as far as sizes tell."""
    step: int | None = None
    tokens: int | None = None
    saved: str | None = None
    """UTC, ISO 8601."""
    precision: str | None = None
    """Of the run that saved it; the weights are fp32 in each."""
    stage: int | None = None
    ranks: int | None = None


def listed(run: Path) -> list[Listed]:
    """Describe a run's checkpoints, oldest first. Raises CheckpointError if there is no run."""
    found = []
    for path in folder_of(run).paths():
        try:
            found.append(_describe(path))
        except OSError:
            if path.exists():  # otherwise the run has pruned it meanwhile
                raise
    return found


def _describe(path: Path) -> Listed:
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    found = Listed(path.name, size, _problem(path))
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


def set_aside(run: Path) -> list[Path]:
    """Return the checkpoints that a resumed run found damaged."""
    return sorted(folder_of(run).folder.glob("damaged-step-*"))


def to_verify(run_or_checkpoint: Path) -> list[Path]:
    """Return all checkpoints of a run, newest first, or the named one. Raises CheckpointError if there is none."""
    if (run_or_checkpoint / "manifest.json").is_file() or run_or_checkpoint.parent.name == "checkpoints":
        return [run_or_checkpoint]
    paths = folder_of(run_or_checkpoint).paths()
    if not paths:
        raise CheckpointError(f"The run {run_or_checkpoint} has no checkpoint.")
    return paths[::-1]


def verify(path: Path) -> str | None:
    """Return what is wrong with a checkpoint after reading every byte: hashes, names and shapes.

    Raises FileNotFoundError if the run has pruned it meanwhile.
    """
    try:
        checkpoint = load_checkpoint(path)
        tensors = checkpoint.tensors
        spoilt = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if spoilt:
            return f"The checkpoint {path} holds {len(spoilt)} tensors that are not finite, such as {spoilt[0]}."
        weights = [name.removeprefix("master/") for name in tensors if name.startswith("master/")]
        trained = [name for name in weights if any(f"{kind}/{name}" in tensors for kind in MOMENTS)]
        checkpoint.check({name: tensors.shape(f"master/{name}") for name in weights}, trained)
    except CheckpointError as error:
        if not path.exists():
            raise FileNotFoundError(path) from error
        return str(error)
    return None


def prune(run: Path, keep: int | None, *, damaged: bool, dry: bool) -> Iterator[tuple[Path, str]]:
    """Remove all but the newest checkpoints and what killed saves left; gives each path and why, before it goes.

    keep: how many stay, as many as the run keeps where it is None; damaged: also those that were set aside as damaged;
    dry: say it only. The newest complete one always stays. Raises CheckpointError if the run is in use, if none of
    those that would stay is complete, or if the folder cannot be written.
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
        doomed = [(path, "older") for path in folder.paths()[:-keep]]
        doomed += [(path, "left by a killed save") for path in folder.leftovers()]
        if damaged:
            doomed += [(path, "damaged") for path in set_aside(run)]
        if newest is not None and not dry:
            folder.point_to(newest)
        for path, why in doomed:
            yield path, why
            if dry:
                continue
            try:
                remove(path)
            except OSError as error:
                raise CheckpointError(f"Cannot remove {path}: {error}.") from error
