"""A task that a model is finetuned on, its sets of examples, and the tables in files that they are read from."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from electra_ds.core.errors import DataError, did_you_mean

Kind = Literal["classification", "regression"]
_UNDECODED = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class Task:
    """The definition of a task: what is predicted, and how it is scored and written down."""

    name: str
    """One of GLUE's in lower case, with its hyphens ("sst-2"), or the stem of the user's own file."""
    kind: Kind
    labels: tuple[str, ...]
    """The classes' names in the order of their index; empty for regression."""
    is_pair: bool
    metrics: tuple[str, ...]
    """Names from `finetuning.metrics`; choices are made by the first."""
    written: tuple[str, ...] = ()
    """How each class is written in the official files and in a submission: its name, or 0 and 1."""
    submission: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The official file of predictions by the test set's name; empty for the user's own tasks."""
    score_range: tuple[float, float] | None = None
    """The lowest and highest score of a regression: the official ones, or those of the training labels."""

    def written_prediction(self, prediction: float) -> str:
        """Return a class index or a score as it is written in a file of predictions.

        Official scores are clipped to their range and have 3 decimals, as in STS-B's own files.
        """
        if self.kind == "classification":
            return self.written[int(prediction)]
        if self.submission and self.score_range:
            low, high = self.score_range
            return f"{min(max(float(prediction), low), high):.3f}"
        return f"{float(prediction):.6g}"


@dataclass(frozen=True, eq=False)
class Examples:
    """N examples of one set, in the order of the file."""

    ids: list[str]
    """The name of each row in the file of predictions: its number from 0, or the id in the file."""
    texts: list[str]
    pairs: list[str] | None
    """The second text of each; None if the task has one text."""
    labels: np.ndarray | None
    """int64 class indices or float64 scores, [N]; None if they are not known."""

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Iterable[int] | np.ndarray) -> Examples:
        """Return these examples in this order."""
        chosen = [int(index) for index in indices]
        return Examples(
            [self.ids[index] for index in chosen],
            [self.texts[index] for index in chosen],
            None if self.pairs is None else [self.pairs[index] for index in chosen],
            None if self.labels is None else self.labels[np.array(chosen, np.int64)],
        )


@dataclass(frozen=True, eq=False)
class TaskData:
    """A task and the sets of it that were found. Made by `task_data`."""

    task: Task
    train: Examples | None
    dev: dict[str, Examples]
    """Labelled: "dev", or MNLI's "dev_matched" and "dev_mismatched"; choices are made by the first."""
    test: dict[str, Examples]
    """"test", or MNLI's "test_matched", "test_mismatched" and "ax"."""
    source: str
    """The files or the data set that were read, for messages."""
    fingerprint: str
    """SHA-256 of the classes and of every set's texts and labels: the same wherever the files are."""
    remarks: tuple[str, ...] = ()
    """Notes on what was left out in reading, a sentence each."""

    def sets(self) -> dict[str, Examples]:
        """Return every set by its name, the training set first."""
        return ({"train": self.train} if self.train is not None else {}) | self.dev | self.test


def task_data(
    task: Task,
    train: Examples | None,
    dev: dict[str, Examples],
    test: dict[str, Examples],
    source: str,
    remarks: Iterable[str] = (),
) -> TaskData:
    """Return the data with its fingerprint. The name of the task and the rows' ids are not part of it."""
    digest = hashlib.sha256()

    def add(*texts: str) -> None:
        for text in texts:
            encoded = text.encode("utf8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)

    add(task.kind, str(len(task.labels)), *task.labels)
    for kind, sets in (("train", {"train": train} if train is not None else {}), ("dev", dev), ("test", test)):
        for name, examples in sets.items():
            add(kind, name, str(len(examples)), *examples.texts)
            add("one text" if examples.pairs is None else "pairs", *(examples.pairs or ()))
            add("no labels" if examples.labels is None else "labels")
            if examples.labels is not None:
                digest.update(examples.labels.astype("<i8" if task.kind == "classification" else "<f8").tobytes())
    return TaskData(task, train, dev, test, source, digest.hexdigest(), tuple(remarks))


# --- tables in files


@dataclass
class Table:
    """The wanted columns of N rows."""

    path: Path
    names: list[str]
    """The names of all columns that are there."""
    columns: dict[str, list[str]] = field(default_factory=dict)
    lines: list[int] = field(default_factory=list)
    """The line at which each row begins, from 1."""
    numbers: list[int] = field(default_factory=list)
    """The number of each row in the file, from 0, counting those that were left out."""
    num_short: int = 0
    """Rows left out because they lack a column."""
    num_long: int = 0
    """Rows with more columns than the header, the rest of which is ignored."""
    unusable: dict[str, str] = field(default_factory=dict)
    """Columns that some row lacks or has a list in, and the reason: they are not among `columns`."""

    def __len__(self) -> int:
        return len(self.lines)

    def column(self, name: str) -> list[str]:
        """Return a column. Raises DataError if it is not there or unusable."""
        if name in self.unusable:
            raise DataError(f"{self.path}: {self.unusable[name]}. Every line needs one value of it.")
        if name not in self.names:
            raise DataError(
                f"{self.path}: no column '{name}'{did_you_mean(name, self.names)}; its columns are "
                f"{', '.join(self.names) or 'none'}."
            )
        return self.columns[name]

    def select(self, indices: Sequence[int]) -> Table:
        """Return the table with these rows only."""
        columns = {name: [values[index] for index in indices] for name, values in self.columns.items()}
        lines, numbers = ([values[index] for index in indices] for values in (self.lines, self.numbers))
        return Table(self.path, self.names, columns, lines, numbers, self.num_short, self.num_long, self.unusable)


def read_table(
    path: Path,
    delimiter: str,
    *,
    is_quoted: bool,
    header: Sequence[str] | None = None,
    wanted: Collection[str] | None = None,
    skip_short: bool = False,
) -> Table:
    """Read a table of text.

    is_quoted: whether fields are quoted as in RFC 4180, which spreadsheets and pandas write, and rows must have as many
    fields as the header. Otherwise, as in the loader of GLUE on the Hub, quotes are characters like any other, a CR
    ends a line too, and rows may have more fields. header: the columns' names if the file has no line of them. wanted:
    the columns to keep. skip_short: leave out rows that lack a column.

    Raises DataError for a file that cannot be read, or that has a row of another length.

    The standard library's reader serves here and not pandas', which fills rows that are too short, takes the first
    column as an index if rows are too long, and accepts quotes that do not match.
    """
    rows = _rows(path, delimiter, is_quoted=is_quoted)
    names = list(header or next(rows, (0, []))[1])
    places = {name: names.index(name) for name in names if wanted is None or name in wanted}
    table = Table(path, names, {name: [] for name in places})
    for number, (line, row) in enumerate(rows):
        if len(row) < len(names) and skip_short:
            table.num_short += 1
            continue
        if len(row) < len(names) or (is_quoted and len(row) > len(names)):
            raise DataError(
                f"{path}, line {line}: {len(row)} columns instead of {len(names)}. Correct or drop the row."
            )
        table.num_long += len(row) > len(names)
        table.lines.append(line)
        table.numbers.append(number)
        for name, place in places.items():
            table.columns[name].append(row[place])
    return table


def read_jsonl(path: Path) -> Table:
    """Read every key as a column. Values other than strings are as in JSON; null is empty.

    Raises DataError for a line that is no JSON object.
    """
    table = Table(path, [])
    records: list[dict[str, object]] = []
    for line, content in _lines(path, "\n"):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
            problem = 'not an object such as {"text": …, "label": …}'
        except (ValueError, RecursionError) as error:
            record, problem = None, f"not JSON ({error})"
        if not isinstance(record, dict):
            convert = f"; convert a list with: jq -c '.[]' {path} > NEW.jsonl" if content.startswith("[") else "."
            raise DataError(f"{path}, line {line}: {problem}; one object per line{convert}")
        table.numbers.append(len(records))
        table.lines.append(line)
        records.append(record)
    table.names = list(dict.fromkeys(name for record in records for name in record))
    for name in table.names:
        for line, record in zip(table.lines, records, strict=True):
            if name not in record or isinstance(record[name], (dict, list)):
                problem = f"has a {type(record[name]).__name__} as '{name}'" if name in record else f"lacks '{name}'"
                table.unusable[name] = f"line {line} {problem}"
                break
        else:
            table.columns[name] = [_as_text(record[name]) for record in records]
    return table


def _as_text(value: object) -> str:
    if isinstance(value, str):
        return value.encode("utf8", "replace").decode("utf8")  # a lone surrogate is no text
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _rows(path: Path, delimiter: str, *, is_quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield (line at which it begins, fields) of each row that is not empty."""
    lines = (content for _, content in _lines(path, "" if is_quoted else None))
    reader = csv.reader(
        lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE, strict=True
    )
    limit = csv.field_size_limit(sys.maxsize)  # which is 131,072 characters otherwise
    end = 0
    try:
        for row in reader:
            line, end = end + 1, reader.line_num
            if row:
                yield line, row
    except csv.Error as error:
        raise DataError(
            f"{path}, line {end + 1}: the quotes do not match ({error}). A field that begins with a quote ends with "
            f"one, and quotes in it are doubled; or write JSON lines."
        ) from error
    finally:
        csv.field_size_limit(limit)


def _lines(path: Path, newline: str | None) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a file. Raises DataError if it cannot be read or is not UTF-8."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    raise DataError(
                        f"{path}, line {number}: NUL bytes, so it is UTF-16 or no text. Convert it to UTF-8 first."
                    )
                if _UNDECODED.search(line):
                    raise DataError(
                        f"{path}, line {number}: not UTF-8. Convert it from the encoding that it has: "
                        f"iconv -f ENCODING -t utf-8"
                    )
                yield number, line
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
