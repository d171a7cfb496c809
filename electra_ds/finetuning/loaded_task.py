"""A task's examples, from wherever they are, checked to be trainable and scorable."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from electra_ds.config.run_record import TaskSource
from electra_ds.core.errors import DataError
from electra_ds.finetuning import glue, own_files, squad
from electra_ds.finetuning.glue_hub import REPOSITORY, load_glue_hub
from electra_ds.finetuning.squad import SquadData
from electra_ds.finetuning.tasks import TaskData

_SQUAD = {"squad1": "rajpurkar/squad", "squad2": "rajpurkar/squad_v2"}


class LoadedTask(NamedTuple):
    data: TaskData | SquadData
    notes: list[str]


def load_task(name: str | None, source: TaskSource) -> LoadedTask:
    """A task's examples, checked to be trainable and scorable. Raises DataError, or ConfigError for no such task.

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
