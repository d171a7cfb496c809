"""Load a task's examples from wherever they are, GLUE's also from the Hugging Face Hub, or again those that a
finetuning's record names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets  # type: ignore[import-untyped]
import numpy as np

from electra_ds.config.run_directory import places_of
from electra_ds.config.run_record import FinetuneRecord, TaskSource
from electra_ds.core.errors import DataError
from electra_ds.data.hub import HUB, dataset_path, explained
from electra_ds.finetuning import glue, own_files, squad
from electra_ds.finetuning.squad import SquadData
from electra_ds.finetuning.tasks import Examples, Task, TaskData, task_data

GLUE_REPOSITORY = "nyu-mll/glue"
_PATHS = ("folder", "hub", "train", "dev", "test")
"""The fields of TaskSource that are, or may be, paths."""
_SQUAD: dict[str, str] = {"squad1": "rajpurkar/squad", "squad2": "rajpurkar/squad_v2"}
_HUB_TEXTS = {
    "cola": ("sentence",), "sst-2": ("sentence",), "mrpc": ("sentence1", "sentence2"),
    "sts-b": ("sentence1", "sentence2"), "qqp": ("question1", "question2"), "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"), "rte": ("sentence1", "sentence2"), "wnli": ("sentence1", "sentence2"),
}  # fmt: skip


class LoadedTask(NamedTuple):
    """A task's examples, and notes about them for the user."""

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
        else load_glue_hub(name, source.hub or GLUE_REPOSITORY, source.revision)
    )
    return LoadedTask(_complete(data), [*own_files.notes(data), *glue.differing_rows(data)])


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _complete(data: TaskData) -> TaskData:
    for what, examples in (("training", data.train), ("development", next(iter(data.dev.values()), None))):
        if examples is None or not len(examples):
            raise DataError(f"There are no {what} examples of {data.task.name} in {data.source}, and they are needed.")
    return data


def load_glue_hub(name: str, repository: str = GLUE_REPOSITORY, revision: str | None = None) -> TaskData:
    """Read a task by its configuration there: "sst2", "stsb", otherwise the name that it has here.

    Test sets come without labels, as from the files. Scores are the decimal numbers that the Hub's float32 stand for,
    so that the same data has the same fingerprint from either source.

    Raises DataError for an unknown task, and for a dataset that cannot be fetched or is not laid out as GLUE's.
    """
    task = glue.glue_task(name)
    path = dataset_path(repository, revision)
    config = name.replace("-", "")
    description = f"{HUB}{repository}#{config}{f', revision {revision}' if revision else ''}"
    with explained(description):
        splits = dict(datasets.load_dataset(path, config, revision=revision))
        if name == "mnli" and "ax" in datasets.get_dataset_config_names(path, revision=revision):
            splits["ax"] = datasets.load_dataset(path, "ax", revision=revision)["test"]
    sets = {
        split.replace("validation", "dev"): _hub_examples(task, rows, description, split)
        for split, rows in splits.items()
    }
    dev = {key: sets[key] for key in ("dev", "dev_matched", "dev_mismatched") if key in sets}
    test = {key: sets[key] for key in ("test", "test_matched", "test_mismatched", "ax") if key in sets}
    if not (dev or test or "train" in sets):
        raise DataError(f"{description} has no split of GLUE's; its splits are {', '.join(splits)}.")
    return task_data(task, sets.get("train"), dev, test, description)


def _hub_examples(task: Task, rows: Any, description: str, split: str) -> Examples:
    where = f"{description}@{split}"
    is_test = split.startswith("test") or split == "ax"
    columns = _HUB_TEXTS[task.name]
    for column in (*columns, *(() if is_test else ("label",))):
        if column not in rows.column_names:
            raise DataError(f"{where}: no column '{column}'; its columns are {', '.join(rows.column_names)}.")
    texts = [list(rows[column]) for column in columns]
    for column, values in zip(columns, texts, strict=True):
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise DataError(f"{where}, row {row}: the column '{column}' holds no text.")
    ids = [str(number) for number in (rows["idx"] if "idx" in rows.column_names else range(len(rows)))]
    labels = None if is_test else _hub_labels(task, rows, where)
    return Examples(ids, texts[0], texts[1] if len(texts) == 2 else None, labels)


def _hub_labels(task: Task, rows: Any, where: str) -> np.ndarray:
    names = getattr(rows.features["label"], "names", None)
    if task.kind == "classification" and names is not None and tuple(names) != task.labels:
        raise DataError(f"{where}: its classes are {', '.join(names)}, not GLUE's {', '.join(task.labels)}.")
    values = list(rows["label"])
    low, high = (0, len(task.labels) - 1) if task.score_range is None else task.score_range
    for row, value in enumerate(values):
        if not isinstance(value, int if task.labels else float) or not low <= value <= high:
            raise DataError(f"{where}, row {row}: the label {value} is not one from {low:g} to {high:g}.")
    if task.kind == "classification":
        return np.array(values, np.int64)
    return np.array([float(str(np.float32(value))) for value in values], np.float64)


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
