"""Load a task's examples from wherever they are, or again from where a finetuning's record says they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from electra_ds.config.moved import places_of
from electra_ds.config.run_record import FinetuneRecord, TaskSource
from electra_ds.core.errors import DataError
from electra_ds.finetuning import glue, own_files, squad
from electra_ds.finetuning.glue_hub import REPOSITORY, load_glue_hub
from electra_ds.finetuning.squad import SquadData
from electra_ds.finetuning.tasks import TaskData

_PATHS = ("folder", "hub", "train", "dev", "test")
"""The fields of TaskSource that are, or may be, paths."""
_SQUAD: dict[str, str] = {"squad1": "rajpurkar/squad", "squad2": "rajpurkar/squad_v2"}


class LoadedTask(NamedTuple):
    data: TaskData | SquadData
    notes: list[str]


def load_task(name: str | None, source: TaskSource) -> LoadedTask:
    """Return a task's examples, checked to be trainable and scorable. Raises DataError if they are not.

    name: one of config.tasks.TASKS, or None for the user's own files.
    """
    if name is None:
        own = own_files.load_own(
            _path(source.train), _path(source.dev), _path(source.test),
            text=source.text, pair=source.pair, label=source.label, kind=source.label_kind,
        )  # fmt: skip
        return LoadedTask(_complete(own), own_files.notes(own))
    if name in _SQUAD:
        questions = (
            squad.load_squad(name, Path(source.folder))  # type: ignore[arg-type]
            if source.folder is not None
            else squad.load_squad_hub(name, source.hub or _SQUAD[name], source.revision)  # type: ignore[arg-type]
        )
        for part, rows in (("training", questions.train), ("development", questions.dev)):
            if not rows:
                raise DataError(f"{questions.source} has no {part} questions of {name}.")
        return LoadedTask(questions, [*squad.notes(questions), *squad.differing_rows(questions)])
    data = (
        glue.load_glue(name, Path(source.folder))
        if source.folder is not None
        else load_glue_hub(name, source.hub or REPOSITORY, source.revision)
    )
    return LoadedTask(_complete(data), [*own_files.notes(data), *glue.differing_rows(data)])


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _complete(data: TaskData) -> TaskData:
    for what, examples in (("training", data.train), ("development", next(iter(data.dev.values()), None))):
        if examples is None or not len(examples):
            raise DataError(f"There are no {what} examples of {data.task.name} in {data.source}, and they are needed.")
    return data


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
