"""Load a task's examples: GLUE and SQuAD from files or the Hub, the user's own from CSV, TSV or JSON lines, or those
that a finetuning's record names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol

from electra_ds.config.names import TASKS
from electra_ds.config.plugins import TASK, find
from electra_ds.config.run_directory import places_of
from electra_ds.config.run_record import FinetuneRecord, TaskSource
from electra_ds.core.errors import ConfigError, DataError
from electra_ds.data.hub import HUB, dataset_path, explain_errors
from electra_ds.finetuning.glue import (
    HUB_COLUMNS,
    OFFICIAL_ROWS,
    glue_data,
    glue_examples,
    glue_task,
    load_glue,
)
from electra_ds.finetuning.own_files import load_own_source
from electra_ds.finetuning.squad import load_squad, load_squad_hub
from electra_ds.finetuning.tables import Table
from electra_ds.finetuning.tasks.examples import TaskData, kind_of_set

_GLUE_REPOSITORY = "nyu-mll/glue"
_SQUAD_REPOSITORIES = {"squad1": "rajpurkar/squad", "squad2": "rajpurkar/squad_v2"}
_PATHS = ("folder", "hub", "train", "dev", "test")
"""The fields of TaskSource that are or may be paths."""


class LoadedTask(Protocol):
    """The examples of a task, before they are tokenised."""

    @property
    def name(self) -> str:
        """The task's name in reports."""

    @property
    def source(self) -> str:
        """The files or the data set that was read, for messages."""

    @property
    def fingerprint(self) -> str:
        """A hash of all examples, by which a resumed run sees whether they have changed."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user that are not errors, one sentence each."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """The number of examples of each set; it has at least "train", and "dev" or a name that starts with it."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes in order; empty for tasks without classes."""


def load_task(name: str | None, source: TaskSource) -> LoadedTask:
    """Return a task's examples. Raises DataError if they cannot be trained on or scored.

    name: the value of --task, or None for a classification or regression of the user's own.
    """
    folder = None if source.folder is None else Path(source.folder)
    data: LoadedTask
    if name is None:
        data = load_own_source(source)
    elif name not in TASKS:
        kind = find(TASK, name)
        _check_options(name, source, kind.takes)
        data = kind.load(source)
    elif name in _SQUAD_REPOSITORIES and folder is not None:
        data = load_squad(name, folder)  # type: ignore[arg-type]
    elif name in _SQUAD_REPOSITORIES:
        data = load_squad_hub(name, source.hub or _SQUAD_REPOSITORIES[name], source.revision)  # type: ignore[arg-type]
    elif folder is not None:
        data = load_glue(name, folder)
    else:
        data = load_glue_hub(name, source.hub or _GLUE_REPOSITORY, source.revision)
    sizes = {name.partition("_")[0]: size for name, size in data.sizes.items()}
    for part, size in (("training", sizes.get("train")), ("development", sizes.get("dev"))):
        if not size:
            of = "" if name is None else f" of {name}"
            raise DataError(f"{data.source} has no {part} examples{of}, which are needed.")
    return data


def _check_options(task: str, source: TaskSource, takes: Collection[str]) -> None:
    """Raise ConfigError if a source has something that a kind of task does not take."""
    given = [field.name for field in fields(source) if getattr(source, field.name) not in (None, "auto")]
    if wrong := [name for name in given if name not in takes]:
        raise ConfigError(f"--task {task} does not take --{_flag(wrong[0])}. Leave it out.")
    if source.hub is not None and source.test is not None:
        raise ConfigError("--test is for files; with --hub the split 'test' is predicted. Leave it out.")


def _flag(name: str) -> str:
    return "data-dir" if name == "folder" else name.replace("_", "-")


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
) -> tuple[LoadedTask, TaskSource]:
    """Return the examples that a finetuning's record names, and their current place.

    folder: the folder with the record; inputs that moved together with it are found next to it, see `places_of`. given:
    the record's source, with the places that the user gave. Raises DataError if the examples are missing or have
    changed.
    """
    name = record.loaded_as
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
