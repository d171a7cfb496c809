"""Load a task's examples: GLUE and SQuAD from files or the Hub, the user's own from CSV, TSV or JSON lines, or those
that a finetuning's record names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from electra_ds.config.run_directory import places_of
from electra_ds.config.run_record import FinetuneRecord, TaskSource
from electra_ds.core.errors import DataError
from electra_ds.data.hub import HUB, dataset_path, explain_errors
from electra_ds.finetuning.glue import (
    HUB_COLUMNS,
    OFFICIAL_ROWS,
    glue_data,
    glue_examples,
    glue_task,
    load_glue,
)
from electra_ds.finetuning.own_files import load_own
from electra_ds.finetuning.squad import SquadData, load_squad, load_squad_hub
from electra_ds.finetuning.tables import Table
from electra_ds.finetuning.tasks.examples import TaskData, kind_of_set

_GLUE_REPOSITORY = "nyu-mll/glue"
_SQUAD_REPOSITORIES = {"squad1": "rajpurkar/squad", "squad2": "rajpurkar/squad_v2"}
_PATHS = ("folder", "hub", "train", "dev", "test")
"""The fields of TaskSource that are or may be paths."""


def load_task(name: str | None, source: TaskSource) -> TaskData | SquadData:
    """Return a task's examples. Raises DataError if they cannot be trained on or scored.

    name: one of config.tasks.TASKS, or None for the user's own files.
    """
    folder = None if source.folder is None else Path(source.folder)
    data: TaskData | SquadData
    if name is None:
        assert source.train is not None
        dev_file, test_file = (None if path is None else Path(path) for path in (source.dev, source.test))
        data = load_own(
            Path(source.train),
            dev_file,
            test_file,
            text=source.text,
            pair=source.pair,
            label=source.label,
            kind=source.label_kind,
        )
    elif name in _SQUAD_REPOSITORIES and folder is not None:
        data = load_squad(name, folder)  # type: ignore[arg-type]
    elif name in _SQUAD_REPOSITORIES:
        data = load_squad_hub(name, source.hub or _SQUAD_REPOSITORIES[name], source.revision)  # type: ignore[arg-type]
    elif folder is not None:
        data = load_glue(name, folder)
    else:
        data = load_glue_hub(name, source.hub or _GLUE_REPOSITORY, source.revision)
    dev = data.dev if isinstance(data, SquadData) else next(iter(data.dev.values()), None)
    for part, examples in (("training", data.train), ("development", dev)):
        if not examples:
            of = "" if name is None else f" of {name}"
            raise DataError(f"{data.source} has no {part} examples{of}, which are needed.")
    return data


def load_glue_hub(name: str, repository: str = _GLUE_REPOSITORY, revision: str | None = None) -> TaskData:
    """Read a task from a Hub dataset. Its configuration is "sst2" or "stsb" there, otherwise the name used here.

    Test sets come without labels, as from the files. Scores are the decimal numbers that the Hub's float32 stand for,
    so the same data has the same fingerprint from either source.

    Raises DataError if the task is unknown, or if the dataset cannot be downloaded or does not have GLUE's layout.
    """
    task = glue_task(name)
    path = dataset_path(repository, revision)
    config = name.replace("-", "")
    source = f"{HUB}{repository}#{config}{f', revision {revision}' if revision else ''}"
    with explain_errors(source):
        import datasets

        splits = dict(datasets.load_dataset(path, config, revision=revision))
        if name == "mnli" and "ax" in datasets.get_dataset_config_names(path, revision=revision):
            splits["ax"] = datasets.load_dataset(path, "ax", revision=revision)["test"]
    sets = {}
    for split, rows in splits.items():
        set_name = split.replace("validation", "dev")
        names = getattr(rows.features.get("label"), "names", None)
        if names is not None and tuple(names) != task.labels:
            raise DataError(f"{source}: its classes are {', '.join(names)}, not GLUE's {', '.join(task.labels)}.")
        frame = rows.to_pandas()
        if "label" in frame:
            frame["label"] = frame["label"].astype(str)
        table = Table(f"{source}@{split}", frame.astype({"idx": str}) if "idx" in frame else frame)
        written = [str(index) for index in range(len(task.labels))]
        sets[set_name] = glue_examples(
            task, table, HUB_COLUMNS[name], written, has_labels=kind_of_set(set_name) != "test"
        )
    if not sets.keys() & OFFICIAL_ROWS[name].keys():
        raise DataError(f"{source} has none of GLUE's splits; its splits are {', '.join(splits)}.")
    return glue_data(task, sets, source, [])


def recorded_task(
    record: FinetuneRecord, folder: Path, given: TaskSource, remedy: str
) -> tuple[TaskData | SquadData, TaskSource]:
    """Return the examples that a finetuning's record names, and their current place.

    folder: the folder with the record; inputs that moved together with it are found next to it, see `places_of`. given:
    the record's source, with the places that the user gave. Raises DataError if the examples are missing or have
    changed.
    """
    name = record.task if given.train is None else None
    problem: DataError | None = None
    for source in dict.fromkeys((_relocated(given, record.source, folder), given)):
        try:
            data = load_task(name, source)
        except DataError as error:
            problem = DataError(f"{error} If the examples have moved, {remedy}.")
            continue
        if data.fingerprint == record.data_fingerprint:
            return data, source
        problem = DataError(
            f"{data.source} has changed since {folder} began, so the run cannot be resumed with it. Put the "
            f"files back, or start a new run. If the examples have moved, {remedy}."
        )
    assert problem is not None
    raise problem


def _relocated(given: TaskSource, recorded: TaskSource, folder: Path) -> TaskSource:
    """Return the source with each recorded path replaced by the first of its possible places that exists."""
    paths = {name: path for name in _PATHS if (path := getattr(given, name)) and path == getattr(recorded, name)}
    found: dict[str, Any] = {
        name: str(next(places_of(path, folder), path)) for name, path in paths.items() if Path(path).is_absolute()
    }
    return replace(given, **found)
