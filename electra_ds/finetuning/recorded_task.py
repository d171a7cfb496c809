"""Find the examples that a finetuning's record names, and check that they are still the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from electra_ds.config.run_directory import places_of
from electra_ds.config.run_record import FinetuneRecord, TaskSource
from electra_ds.core.errors import DataError
from electra_ds.finetuning.loaded_task import LoadedTask, load_task

_PATHS = ("folder", "hub", "train", "dev", "test")
"""The fields of TaskSource that are, or may be, paths."""


def recorded_task(
    record: FinetuneRecord, folder: Path, given: TaskSource, remedy: str
) -> tuple[LoadedTask, TaskSource]:
    """Return the examples that a finetuning's record names, and where they are.

    folder: the folder with the record; what moved together with it is found next to it, see `places_of`. given: the
    record's source, with the places that the user gave. Raises DataError if there are no such examples any more, or if
    they are others.
    """
    name = record.task if given.train is None else None
    problem: DataError | None = None
    for source in dict.fromkeys((_relocated(given, record.source, folder), given)):
        try:
            loaded = load_task(name, source)
        except DataError as error:
            problem = DataError(f"{error} If the examples have moved, {remedy}.")
            continue
        if loaded.data.fingerprint == record.data_fingerprint:
            return loaded, source
        problem = DataError(
            f"{loaded.data.source} has changed since {folder} began, so the run cannot be resumed with it. Put the "
            f"files back, or start a new run. If the examples have moved, {remedy}."
        )
    assert problem is not None
    raise problem


def _relocated(given: TaskSource, recorded: TaskSource, folder: Path) -> TaskSource:
    """Return the source with each recorded path replaced by the first place where something is."""
    paths = {name: path for name in _PATHS if (path := getattr(given, name)) and path == getattr(recorded, name)}
    found: dict[str, Any] = {
        name: str(next(places_of(path, folder), path)) for name, path in paths.items() if Path(path).is_absolute()
    }
    return replace(given, **found)
