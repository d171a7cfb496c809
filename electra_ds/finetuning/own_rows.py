"""The user's own examples as rows of any layout, from files or from a dataset on the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from electra_ds.config.run_record import TaskSource
from electra_ds.core.errors import ConfigError, DataError
from electra_ds.data.hub import HUB, dataset_path, explain_errors, parse_hub_name
from electra_ds.finetuning.own_files import ID_COLUMNS, own_name, read_own
from electra_ds.finetuning.tables import Table

RowT = TypeVar("RowT")
_SPLITS = {"train": "train", "validation": "dev", "dev": "dev", "valid": "dev", "val": "dev", "test": "test"}


class OwnRows(NamedTuple):
    """The tables of a task of the user's own."""

    name: str
    tables: dict[str, Table]
    """By set, in this order: train, dev and, if there is one, test."""
    source: str
    """For messages."""


def own_rows(source: TaskSource, task: str, read: Callable[[Path], Table] = read_own) -> OwnRows:
    """Read --train, --dev and --test, or the splits of --hub NAME#CONFIG.

    task: the value of --task, for messages. read: reads one file. Raises ConfigError if neither was given, and
    DataError if they cannot be read.
    """
    if source.hub is not None:
        return _hub_rows(source.hub, source.revision)
    if source.train is None:
        raise ConfigError(f"--task {task} needs examples: --train FILE and --dev FILE, or --hub NAME.")
    files = {"train": source.train, "dev": source.dev, "test": source.test}
    paths = {name: Path(path) for name, path in files.items() if path is not None}
    tables = {name: read(path) for name, path in paths.items()}
    for table in tables.values():
        if not len(table.frame):
            raise DataError(f"{table.source} has no examples. Give a file with examples, or leave it out.")
    return OwnRows(own_name(paths["train"]), tables, ", ".join(f"{name} {path}" for name, path in paths.items()))


def _hub_rows(hub: str, revision: str | None) -> OwnRows:
    parts = parse_hub_name(hub)
    path = dataset_path(parts.name, revision)
    source = f"{HUB}{parts.name}" + (f"#{parts.config}" if parts.config else "")
    source += f", revision {revision}" if revision else ""
    with explain_errors(source):
        import datasets

        splits = datasets.load_dataset(path, parts.config, revision=revision)
    tables: dict[str, Table] = {}
    for split, rows in splits.items():
        name = _SPLITS.get(str(split))
        if name is None or name in tables:
            continue
        frame = rows.to_pandas()
        for column, feature in rows.features.items():
            frame[column] = [_as_text(value, feature) for value in frame[column]]
        tables[name] = Table(f"{source}@{split}", frame)
    if missing := {"train", "dev"} - tables.keys():
        raise DataError(
            f"{source} has no split for {' and '.join(sorted(missing))}; its splits are {', '.join(map(str, splits))}."
        )
    order: dict[str, Table] = {name: tables[name] for name in ("train", "dev", "test") if name in tables}
    return OwnRows(parts.name.rstrip("/").rpartition("/")[2], order, source)


def _as_text(value: Any, feature: Any) -> Any:
    """Return a value of a dataset as `read_jsonl` would: text, or a list of texts; classes by their names."""
    names, inner = getattr(feature, "names", None), getattr(feature, "feature", None)
    if inner is not None and not isinstance(feature, dict):
        return [] if value is None else [_as_text(each, inner) for each in value]
    if names is not None:
        return names[int(value)] if value is not None and int(value) >= 0 else ""
    if value is None:
        return ""
    return value if isinstance(value, str | list | dict) else json.dumps(getattr(value, "item", lambda: value)())


def chosen_column(table: Table, given: str | None, usual: Sequence[str], what: str) -> str:
    """Return the given column, or the first of the usual ones that the table has. Raises DataError.

    what: the option that names it, without its dashes.
    """
    found = given or next((name for name in usual if name in table.frame), None)
    if found is None:
        table.check_columns(
            [], [f"no {what} column"], f" Name it with --{what} COLUMN, or rename it to one of {', '.join(usual)}."
        )
    table.check_columns([found])
    assert found is not None
    return found


def row_ids(table: Table) -> list[str]:
    """Return the names of the rows: those in the file, or their numbers from 0."""
    column = next((name for name in ID_COLUMNS if name in table.frame), None)
    return [str(row) for row in range(len(table.frame))] if column is None else table.column(column)


def texts_of(table: Table, row: int, column: str, value: Any) -> tuple[str, ...]:
    """Return a list of texts. row: its number from 0. Raises DataError if the value is none."""
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise DataError(f"{table.source}, row {row + 1}: '{column}' is not a list of texts, but {str(value)[:60]!r}.")
    return tuple(value)


@dataclass(frozen=True, eq=False)
class RowData(Generic[RowT]):
    """The examples of a task. `row_data` makes it."""

    name: str
    sets: Mapping[str, Sequence[RowT]]
    source: str
    fingerprint: str
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sizes(self) -> Mapping[str, int]:
        return {name: len(rows) for name, rows in self.sets.items()}


def row_data(
    name: str, sets: Mapping[str, Sequence[RowT]], source: str, labels: Iterable[str] = (), notes: Iterable[str] = ()
) -> RowData[RowT]:
    """Return the examples with their fingerprint. sets: rows that are tuples of texts, numbers and such tuples."""
    classes = tuple(labels)
    text = json.dumps([classes, list(sets.items())], ensure_ascii=True)
    return RowData(name, sets, source, hashlib.sha256(text.encode()).hexdigest(), classes, tuple(notes))
