"""Tables of examples: GLUE's TSV without quoting, and the user's own CSV, TSV and JSON lines.

`.csv` and `.tsv` are read with the quoting of RFC 4180 (what spreadsheets and pandas write), by comma and by tab,
with a header; `.jsonl`, `.ndjson` and `.json` hold one object a line.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np

from electra_ds.config.shipped import TASKS
from electra_ds.core.errors import DataError, did_you_mean
from electra_ds.data.text_files import kind_of
from electra_ds.finetuning.tasks import Examples, Kind, Task, TaskData, task_data

TEXT_COLUMNS = (
    "text", "text_a", "text1", "question", "question1", "sentence", "sentence1", "premise", "content",
)  # fmt: skip
"""Where no text column is named: the first of these that is there."""
PAIR_COLUMNS = ("text_b", "text2", "text_pair", "question2", "sentence2", "hypothesis")
"""Where neither text nor pair is named: the first of these that is there, if any; so naming the text makes it alone."""
QUESTION_PAIRS = ("sentence", "passage", "context", "answer")
"""These too where the text is `question`."""
LABEL_COLUMNS = ("label", "labels", "score", "target", "class", "gold_label")
"""Where no label column is named: the first of these that is there and holds no text."""
ID_COLUMNS = ("id", "idx", "index")
"""What rows are called; otherwise their number from 0."""
_LARGEST_SCORE = 1e18  # whose square fp32 still holds
_USES = ("train", "training", "data")
MOST_NUMBERED_CLASSES = 20
"""Whole numbers as labels are classes up to so many different ones, and scores beyond."""
NO_LABELS = ({""}, {"-1"}, {"?"})
"""What may stand in all of a test file's label column instead of labels."""

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_KNOWN = ", ".join((*_DELIMITERS, *_JSON_SUFFIXES))
_BOM = b"\xef\xbb\xbf"


@dataclass
class Table:
    """The wanted columns of N rows."""

    path: Path
    names: list[str]
    """Of all the columns that are there."""
    columns: dict[str, list[str]]
    lines: list[int]
    """The line that each row begins at, from 1."""
    numbers: list[int]
    """The number of each row among those of the file, from 0, those that were left out counted too."""
    num_short: int = 0
    """Rows left out since they lack a column."""
    num_long: int = 0
    """Rows with more columns than the header, of which the rest is passed over."""
    unusable: dict[str, str] = field(default_factory=dict)
    """Columns that some row lacks or has a list in, and where: they are not among `columns`."""

    def __len__(self) -> int:
        return len(self.lines)


def read_tsv(
    path: Path,
    columns: Sequence[str],
    *,
    optional: Sequence[str] = (),
    header: Sequence[str] | None = None,
    skip_short: bool = False,
) -> Table:
    """Columns of a TSV in which quotes are characters like any other.

    As for the loader of the Hub, a CR alone ends a line too, empty lines are no rows, and a row may have more columns
    than the header.

    header: the columns' names where the file has no line of them.
    skip_short: leave rows out that lack a column.

    Raises DataError for a file that cannot be read, that lacks a column, or that has a row with too few.
    """
    with _opened(path, None) as file:
        lines = _numbered(path, file)
        if header is None:
            _, first = next(lines, (0, ""))
            header = first.rstrip("\n").split("\t")
        _check_columns(Table(path, list(header), {}, [], []), columns)
        wanted = [(name, header.index(name)) for name in (*columns, *optional) if name in header]
        table = Table(path, list(header), {name: [] for name, _ in wanted}, [], [])
        count = -1
        for number, line in lines:
            row = line.rstrip("\n").split("\t")
            if row == [""]:
                continue
            count += 1
            if len(row) < len(header):
                if not skip_short:
                    raise DataError(_wrong_width(path, number, len(row), len(header)))
                table.num_short += 1
                continue
            table.num_long += len(row) > len(header)
            table.lines.append(number)
            table.numbers.append(count)
            for name, index in wanted:
                table.columns[name].append(row[index])
    return table


def read_jsonl(path: Path) -> Table:
    """Every key as a column. Values that are no strings are as in JSON; null is empty.

    Raises DataError for a line that is no JSON object.
    """
    table = Table(path, [], {}, [], [])
    records: list[dict[str, object]] = []
    with _opened(path, "\n") as file:
        for line, content in _numbered(path, file):
            if not content.strip():
                continue
            try:
                record = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {line}: not JSON ({error}); {_one_a_line(path, content)}") from error
            if not isinstance(record, dict):
                problem = 'not an object such as {"text": …, "label": …}'
                raise DataError(f"{path}, line {line}: {problem}; {_one_a_line(path, content)}")
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


def _one_a_line(path: Path, line: str) -> str:
    is_list = line.startswith("[")
    return "one object per line" + (f"; convert a list with: jq -c '.[]' {path} > NEW.jsonl" if is_list else ".")


def load_own(
    train: Path | None,
    dev: Path | None,
    test: Path | None,
    *,
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    kind: Literal["auto"] | Kind = "auto",
) -> TaskData:
    """The user's own task. Columns are chosen by the first of the files, see TEXT_COLUMNS and LABEL_COLUMNS.

    The kind is regression where every label of the first file is a number and some are not whole, or more than
    MOST_NUMBERED_CLASSES differ. Classes are the labels that the training file has, in the order of their numbers if
    all are whole numbers, otherwise of the alphabet. A test file may lack labels.

    Raises DataError for what cannot be learnt from or scored, with its file and line.
    """
    paths = {name: path for name, path in (("train", train), ("dev", dev), ("test", test)) if path is not None}
    if not paths:
        raise DataError("No file of examples is given.")
    tables = {name: _read_own(path) for name, path in paths.items()}
    first = next(iter(tables.values()))
    columns = _chosen_columns(first, text, pair, label)
    for name, table in tables.items():
        _check_own(table, columns, needs_label=name != "test")
    labels: dict[str, list[str]] = {}
    for name, table in tables.items():
        seen = {label for found in labels.values() for label in found}
        if (found := _labels(table, columns, None if name != "test" else seen)) is not None:
            labels[name] = found
    task = _own_task(tables, labels, columns, kind)
    indices = {name: _indices(tables[name], found, task) for name, found in labels.items()}
    sets = {name: _examples(table, columns, indices.get(name)) for name, table in tables.items()}
    if "train" in indices and len(np.unique(indices["train"])) == 1:
        raise DataError(
            f"{train}: every row has the label '{labels['train'][0]}', so there is nothing to learn. "
            f"Is '{columns.label}' the right column?"
        )
    source = f"{', '.join(f'{name} {path}' for name, path in paths.items())} ({columns})"
    return task_data(
        task,
        sets.get("train"),
        {"dev": sets["dev"]} if "dev" in sets else {},
        {"test": sets["test"]} if "test" in sets else {},
        source,
    )


def notes(data: TaskData) -> list[str]:
    """What is no error but should be known: what reading passed over, and classes that a set lacks."""
    sentences = list(data.remarks)
    sets = ({"train": data.train} if data.train is not None else {}) | data.dev
    for name, examples in sets.items() if data.task.kind == "classification" else ():
        found = np.arange(0) if examples.labels is None else examples.labels
        if len(missing := np.setdiff1d(np.arange(len(data.task.labels)), found)):
            these = _listed([data.task.labels[index] for index in missing])
            so = "it will not be predicted" if name == "train" else "its scores say nothing of that"
            sentences.append(f"No example of {name} has the label {these}: {so}.")
    return sentences


class _Columns(NamedTuple):
    text: str
    pair: str | None
    label: str | None

    def __str__(self) -> str:
        texts = f"text '{self.text}'{f' and pair {self.pair!r}' if self.pair else ''}"
        return f"{texts}, {f'label {self.label!r}' if self.label else 'no label'}"

    @property
    def of_text(self) -> list[str]:
        return [self.text, self.pair] if self.pair else [self.text]


def _own_name(path: Path) -> str:
    """The file's, or its folder's where that says only what it is for; never that of a published task."""
    name = path.absolute().parent.name if path.stem.lower() in _USES else path.stem
    return f"own-{name}" if name.lower() in (*TASKS, "ax") else name


def _own_task(tables: dict[str, Table], labels: dict[str, list[str]], columns: _Columns, kind: str) -> Task:
    """The classes are the first labelled file's."""
    if not labels:
        raise DataError(f"{next(iter(tables.values())).path} has no labels: they say what is to be predicted.")
    of, found = next(iter(labels.items()))
    distinct = sorted(set(found))
    numbers = [_number(name) for name in distinct]
    if kind == "auto":
        fractional = any(number is None or not number.is_integer() for number in numbers)
        is_score = None not in numbers and (fractional or len(distinct) > MOST_NUMBERED_CLASSES)
        kind = "regression" if is_score else "classification"
    name, is_pair = _own_name(next(iter(tables.values())).path), columns.pair is not None
    if kind == "regression":
        scores = _indices(tables[of], found, Task(name, "regression", (), is_pair, ()))
        span = (float(scores.min()), float(scores.max()))
        return Task(name, "regression", (), is_pair, ("spearman", "pearson", "mse"), score_range=span)
    if all(number is not None and number.is_integer() for number in numbers):
        distinct.sort(key=lambda label: (float(label), label))
    more = ("f1", "matthews") if len(distinct) == 2 else ()
    classes = tuple(distinct)
    return Task(name, "classification", classes, is_pair, ("accuracy", "f1_macro", *more), classes)


def _chosen_columns(table: Table, text: str | None, pair: str | None, label: str | None) -> _Columns:
    there = table.names
    _check_columns(table, [name for name in (text, pair, label) if name is not None])
    if text is None:
        text = next((name for name in TEXT_COLUMNS if name in there and name not in (pair, label)), None)
        if text is None:
            raise DataError(
                f"{table.path}: no text column; its columns are {', '.join(there) or 'none'}. Name the one that holds "
                f"the text with --text COLUMN, or call it one of {', '.join(TEXT_COLUMNS)}."
            )
        seconds = PAIR_COLUMNS + (QUESTION_PAIRS if text == "question" else ())
        pair = pair or next((name for name in seconds if name in there and name != label), None)
    if label is None:
        label = next((name for name in LABEL_COLUMNS if name in there and name not in (text, pair)), None)
    if text in (pair, label) or (pair is not None and pair == label):
        raise DataError(f"{table.path}: text '{text}', pair '{pair}' and label '{label}' must be different columns.")
    return _Columns(text, pair, label)


def _check_own(table: Table, columns: _Columns, needs_label: bool) -> None:
    if not len(table):
        raise DataError(f"{table.path} has no rows. Give a file with examples in it, or leave it out.")
    if needs_label and columns.label is None:
        raise DataError(
            f"{table.path}: no label column; its columns are {', '.join(table.names)}. Name the one that holds the "
            f"label with --label COLUMN, or call it one of {', '.join(LABEL_COLUMNS)}."
        )
    _check_columns(table, [*columns.of_text, *([columns.label] if needs_label and columns.label else [])])
    for name in columns.of_text:
        if not any(value.strip() for value in table.columns[name]):
            raise DataError(
                f"{table.path}: the column '{name}' is empty in every row. Name the one with the text: --text COLUMN"
            )


def _labels(table: Table, columns: _Columns, seen: set[str] | None) -> list[str] | None:
    """Without the space around them; None where a test has none. seen: for a test, the labels of other files."""
    if columns.label is None or columns.label not in table.names:
        return None
    _check_columns(table, [columns.label])
    labels = [label.strip() for label in table.columns[columns.label]]
    if seen is not None and set(labels) in NO_LABELS and labels[0] not in seen:
        return None
    if "" in labels:
        line = table.lines[labels.index("")]
        raise DataError(f"{table.path}, line {line}: the label '{columns.label}' is empty. Fill it in or drop the row.")
    return labels


def _indices(table: Table, labels: list[str], task: Task) -> np.ndarray:
    """int64 indices of classes or float64 scores."""
    if task.kind == "classification":
        known = {word: index for words in (task.written, task.labels) for index, word in enumerate(words)}
        for label, line in zip(labels, table.lines, strict=True):
            if label not in known:
                raise DataError(
                    f"{table.path}, line {line}: the label '{label}' is not one of those trained on, "
                    f"{_listed(task.labels)}{did_you_mean(label, known)}."
                )
        return np.array([known[label] for label in labels], np.int64)
    scores = []
    for label, line in zip(labels, table.lines, strict=True):
        number = _number(label)
        if number is None or not abs(number) < _LARGEST_SCORE:
            problem = "no number" if number is None else "not finite, or too large"
            raise DataError(f"{table.path}, line {line}: the score '{label}' is {problem}. Correct or drop the row.")
        scores.append(number)
    return np.array(scores, np.float64)


def _examples(table: Table, columns: _Columns, labels: np.ndarray | None) -> Examples:
    taken = set(columns)
    id_column = next((name for name in ID_COLUMNS if name in table.names and name not in taken), None)
    ids = table.columns[id_column] if id_column else [str(number) for number in table.numbers]
    pairs = table.columns[columns.pair] if columns.pair else None
    return Examples(ids, table.columns[columns.text], pairs, labels)


def _read_own(path: Path) -> Table:
    _check_content(path)
    suffix = path.suffix.lower()
    if suffix in _DELIMITERS:
        return _read_quoted(path, _DELIMITERS[suffix])
    if suffix in _JSON_SUFFIXES:
        return read_jsonl(path)
    raise DataError(f"{path}: its name does not say what it is. Files of examples end in one of {_KNOWN}.")


def _check_content(path: Path) -> None:
    """Raises DataError for a dataset or a file that holds no table in text, with what makes one of it."""
    is_dict = (path / "dataset_dict.json").is_file()
    if is_dict or (path / "dataset_info.json").is_file():
        split = "['train']" if is_dict else ""
        raise DataError(
            f"{path} is a dataset that save_to_disk wrote. Write what you want of it as JSON lines, and give that:\n"
            f"  python -c \"import datasets; datasets.load_from_disk('{path}'){split}.to_json('{path.name}.jsonl')\""
        )
    try:
        with path.open("rb") as file:
            kind = kind_of(file.read(512))
    except OSError:  # who reads it says what is wrong
        return
    if kind:
        raise DataError(
            f"{path} is {kind.what}, not a table in plain text. Examples are read from {_KNOWN}, in UTF-8 and not "
            f"compressed."
        )


def _read_quoted(path: Path, delimiter: str) -> Table:
    """Every column of a file with a header."""
    with _opened(path, "") as file, _long_fields():
        rows = _quoted_rows(path, file, delimiter)
        _, header = next(rows, (0, []))
        if not header:
            raise DataError(f"{path} is empty. Its first line is to name the columns.")
        if repeated := sorted({name for name in header if header.count(name) > 1}):
            raise DataError(f"{path}, line 1: more than one column is called {_listed(repeated)}. Rename them.")
        table = Table(path, header, {name: [] for name in header}, [], [])
        for line, row in rows:
            if len(row) != len(header):
                raise DataError(_wrong_width(path, line, len(row), len(header)))
            table.numbers.append(len(table))
            table.lines.append(line)
            for name, value in zip(header, row, strict=True):
                table.columns[name].append(value)
    return table


def _quoted_rows(path: Path, file: IO[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line that it begins at, fields) of each row that is not empty."""
    reader = csv.reader((content for _, content in _numbered(path, file)), delimiter=delimiter, strict=True)
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


@contextmanager
def _long_fields() -> Iterator[None]:
    """The csv module refuses fields of more than 131,072 characters unless told otherwise."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


@contextmanager
def _opened(path: Path, newline: str | None) -> Iterator[IO[str]]:
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(path)) from error
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error


def _not_utf8(path: Path) -> str:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                raw.decode("utf8")
            except UnicodeDecodeError as error:
                return (
                    f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start}). "
                    f"Convert it from the encoding that it has: iconv -f ENCODING -t utf-8"
                )
    return f"{path} is not UTF-8."


def _numbered(path: Path, file: IO[str]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, 1):
        if "\0" in line:
            raise DataError(f"{path}, line {number}: NUL bytes, so it is UTF-16 or no text. Convert it to UTF-8 first.")
        yield number, line


def _check_columns(table: Table, wanted: Sequence[str]) -> None:
    for name in wanted:
        if name in table.unusable:
            raise DataError(f"{table.path}: {table.unusable[name]}. Every line needs one value of it.")
        if name not in table.names:
            raise DataError(
                f"{table.path}: no column '{name}'{did_you_mean(name, table.names)}; its columns are "
                f"{', '.join(table.names) or 'none'}."
            )


def _wrong_width(path: Path, line: int, found: int, expected: int) -> str:
    return f"{path}, line {line}: {found} columns instead of {expected}. Correct or drop the row."


def _as_text(value: object) -> str:
    if isinstance(value, str):
        return value.encode("utf8", "replace").decode("utf8")  # a lone surrogate is no text
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _listed(names: Sequence[str], most: int = 10) -> str:
    quoted = [f"'{name}'" for name in names[:most]]
    return ", ".join(quoted) + (f" and {len(names) - most} more" if len(names) > most else "")
