"""A run's checkpoints on the disk: found, listed, verified and pruned, and the recipe that travels in each."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

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


class Listed(NamedTuple):
    """One checkpoint, by what its files say; None where they do not."""

    name: str
    step: int | None
    tokens: int | None
    saved: str | None
    """UTC, ISO 8601."""
    bytes: int
    precision: str | None
    """Of the run that saved it; the weights are fp32 in each."""
    stage: int | None
    ranks: int | None
    problem: str | None
    """What is wrong with it, as far as sizes tell."""


def folder_of(run: Path) -> CheckpointFolder:
    """A run's checkpoints. Raises CheckpointError if there is no run."""
    directory = RunDirectory(run)
    if not directory.checkpoints.is_dir():
        if (run / "latest").is_file():
            raise CheckpointError(
                f"{run} is DeepSpeed's own checkpoint; {command('checkpoint import')} makes a run of it."
            )
        if not directory.exists():
            raise CheckpointError(f"{run} is not a run directory: it has neither run.json nor checkpoints/.")
        raise CheckpointError(f"The run {run} has no checkpoint yet.")
    return CheckpointFolder(directory.checkpoints, keep=1)


def listed(run: Path) -> list[Listed]:
    """Oldest first. Raises CheckpointError if there is no run."""
    found = []
    for path in folder_of(run).paths():
        try:
            found.append(_describe(path))
        except OSError:
            if path.exists():  # otherwise the run has pruned it meanwhile
                raise
    return found


def _describe(path: Path) -> Listed:
    state, plan, record = (_json(path / name) for name in ("state.json", "deepspeed.json", "run.json"))
    zero = plan.get("zero_optimization", {}) if plan else None
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return Listed(
        name=path.name,
        step=_number(state, "step"),
        tokens=_number(state, "tokens"),
        saved=_time(state.get("saved")),
        bytes=size,
        precision=str(state["precision"]) if "precision" in state else None,
        stage=stage if isinstance(stage, int) else None,
        ranks=_number(record, "world_size"),
        problem=_problem(path),
    )


def _number(values: dict[str, Any], key: str) -> int | None:
    value = values.get(key)
    return value if type(value) is int else None


def _time(value: Any) -> str | None:
    try:
        return datetime.fromisoformat(value).isoformat()
    except (TypeError, ValueError):
        return None


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


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def set_aside(run: Path) -> list[Path]:
    """Checkpoints that a resumed run found damaged."""
    return sorted(folder_of(run).folder.glob("damaged-step-*"))


def to_verify(run_or_checkpoint: Path) -> list[Path]:
    """All checkpoints of a run, newest first, or the one that is named. Raises CheckpointError if there is none."""
    if (run_or_checkpoint / "manifest.json").is_file() or run_or_checkpoint.parent.name == "checkpoints":
        return [run_or_checkpoint]
    paths = folder_of(run_or_checkpoint).paths()
    if not paths:
        raise CheckpointError(f"The run {run_or_checkpoint} has no checkpoint.")
    return paths[::-1]


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, every byte read: hashes, names and shapes.

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
    dry: say it only. The newest whole one always stays. Raises CheckpointError if the run is in use, where none of
    those that would stay is whole, and where the folder cannot be written.
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
