"""The user's own examples as rows of any layout, from files or from a dataset on the Hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from electra_ds.config.run_record import TaskSource
from electra_ds.core.errors import ConfigError, DataError
from electra_ds.data.hub import HUB, dataset_path, explain_errors, parse_hub_name
from electra_ds.finetuning.own_files import ID_COLUMNS, own_name, read_own, unpublished
from electra_ds.finetuning.tables import Table, as_text

RowT = TypeVar("RowT")
NO_LABELS = ("", "-1", "-1.0", "?", "_")
"""Values that mean an unknown label in published test sets and in CoNLL-U."""
_SPLITS = {"train": "train", "validation": "dev", "dev": "dev", "valid": "dev", "val": "dev", "test": "test"}


@dataclass(frozen=True, eq=False)
class OwnRows:
    """The tables of a task of the user's own. The columns of the training examples are those of all sets."""

    name: str
    tables: dict[str, Table]
    """By set, in this order: train, dev and, if there is one, test."""
    source: str
    """For messages."""

    def column(self, given: str | None, usual: Sequence[str], what: str, *, is_label: bool = False) -> str:
        """Return the given column, or the first of the usual ones that the training examples have.

        what: the option that names it, without its dashes. is_label: the test set may lack it. Raises DataError if it
        is missing.
        """
        train = self.tables["train"]
        found = given or next((name for name in usual if name in train.frame), None)
        if found is None:
            train.check_columns(
                [], [f"no {what} column"], f" Name it with --{what} COLUMN, or rename it to one of {', '.join(usual)}."
            )
        for name, table in self.tables.items():
            if not (is_label and name == "test"):
                table.check_columns([found])
        assert found is not None
        return found

    def is_labelled(self, name: str, *columns: str, unknown: Sequence[str] = NO_LABELS) -> bool:
        """Return whether a set has labels, which only the test set may lack: no such columns, or no value in them.

        unknown: the values that stand for an unknown label.
        """
        frame = self.tables[name].frame
        there = [column for column in columns if column in frame]
        return name != "test" or any(not all(_is_missing(each, unknown) for each in frame[column]) for column in there)

    def texts(self, name: str, column: str) -> list[str]:
        """Return a column of texts. Raises DataError if it has none, or is empty in every row."""
        found = self.tables[name].column(column)
        if not any(text.strip() for text in found):
            raise DataError(
                f"{self.tables[name].source}: the column '{column}' is empty in every row. Choose one by --text or "
                f"--pair."
            )
        return found

    def read_as(self, **columns: str | None) -> str:
        """Return the source with the columns that were chosen, for messages. Raises DataError if two are the same."""
        chosen = {what: column for what, column in columns.items() if column is not None}
        if len(set(chosen.values())) < len(chosen):
            raise DataError(
                f"{self.tables['train'].source}: {', '.join(f'{what} {column!r}' for what, column in chosen.items())} "
                f"must be different columns. Name each with --text, --pair or --label."
            )
        return f"{self.source} ({', '.join(f'{what} {column!r}' for what, column in chosen.items())})"


def own_rows(source: TaskSource, task: str, read: Callable[[Path], Table] = read_own) -> OwnRows:
    """Read --train, --dev and --test, or the splits of --hub NAME#CONFIG.

    task: the value of --task, for messages. read: reads one file. Raises ConfigError if neither was given, and
    DataError if they cannot be read.
    """
    if source.hub is not None:
        return _hub_rows(source.hub, source.revision)
    if source.revision is not None:
        raise ConfigError("--revision is for --hub NAME. Leave it out.")
    if source.train is None:
        raise ConfigError(f"--task {task} needs examples: --train FILE and --dev FILE, or --hub NAME.")
    files = {"train": source.train, "dev": source.dev, "test": source.test}
    paths = {name: Path(path) for name, path in files.items() if path is not None}
    tables = {name: read(path) for name, path in paths.items()}
    for table in tables.values():
        if not len(table.frame):
            raise DataError(f"{table.source} has no examples. Give a file with examples; only --test may be left out.")
    return OwnRows(
        f"{task}-{own_name(paths['train'])}", tables, ", ".join(f"{name} {path}" for name, path in paths.items())
    )


def _hub_rows(hub: str, revision: str | None) -> OwnRows:
    parts = parse_hub_name(hub)
    if "@" in hub:
        raise ConfigError(f"--hub {hub}: the splits train, validation and test are read, so leave out @{parts.split}.")
    path = dataset_path(parts.name, revision)
    source = f"{HUB}{parts.name}" + (f"#{parts.config}" if parts.config else "")
    source += f", revision {revision}" if revision else ""
    with explain_errors(source):
        import datasets
        import pandas as pd  # type: ignore[import-untyped]

        splits = datasets.load_dataset(path, parts.config, revision=revision)
    tables: dict[str, Table] = {}
    for split, rows in splits.items():
        name = _SPLITS.get(str(split))
        if name is not None and name not in tables:
            columns = {key: [_decoded(value, feature) for value in rows[key]] for key, feature in rows.features.items()}
            tables[name] = Table(f"{source}@{split}", pd.DataFrame(columns, dtype=object))
    if missing := {"train", "dev"} - tables.keys():
        raise DataError(
            f"{source} has no split for {' and '.join(sorted(missing))}; its splits are {', '.join(map(str, splits))}. "
            f"Rename them to train and validation, or save them as files for --train and --dev."
        )
    order: dict[str, Table] = {name: tables[name] for name in ("train", "dev", "test") if name in tables}
    name = unpublished(parts.name.rstrip("/").rpartition("/")[2])
    return OwnRows(name + (f"-{parts.config}" if parts.config else ""), order, source)


def _decoded(value: Any, feature: Any) -> Any:
    """Return a value of a data set as `read_jsonl` would, with classes by their names."""
    names, inner = getattr(feature, "names", None), getattr(feature, "feature", None)
    if inner is not None and not isinstance(feature, dict):
        return [] if value is None else [_decoded(each, inner) for each in value]
    if names is not None:
        return names[value] if value is not None and value >= 0 else ""
    return as_text(value)


def _is_missing(value: Any, unknown: Sequence[str]) -> bool:
    """Return whether a value marks an unknown label; lists of such values do, too."""
    if isinstance(value, list | tuple):
        return all(_is_missing(each, unknown) for each in value)
    return not isinstance(value, str) or value.strip() in unknown


def row_ids(table: Table) -> list[str]:
    """Return the names of the rows: those in the file, or their numbers from 0."""
    column = next((name for name in ID_COLUMNS if name in table.frame), None)
    return [str(row) for row in range(len(table.frame))] if column is None else table.column(column)


def texts_of(table: Table, row: int, column: str, value: Any) -> tuple[str, ...]:
    """Return a list of texts; in a CSV file it is written as in JSON. row: its number from 0.

    Raises DataError if the value is no list.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            value = as_text(json.loads(value))
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        found = "is missing" if not isinstance(value, str | list | dict) else f"is {str(value)[:60]!r}"
        raise DataError(
            f'{table.source}, row {row + 1}: \'{column}\' {found}. It must be a list of texts, such as ["one", "two"].'
        )
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
