"""The user's own task from CSV, TSV and JSON lines.

`.csv` and `.tsv` are read with the quoting of RFC 4180 (what spreadsheets and pandas write), by comma and by tab,
with a header; `.jsonl`, `.ndjson` and `.json` hold one object a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from electra_ds.config.names import TASKS
from electra_ds.core.errors import DataError, did_you_mean
from electra_ds.data.text_files import kind_of
from electra_ds.finetuning.tasks import Examples, Kind, Table, Task, TaskData, read_jsonl, read_table, task_data

TEXT_COLUMNS = (
    "text", "text_a", "text1", "question", "question1", "sentence", "sentence1", "premise", "content",
)  # fmt: skip
"""If no text column is named, the first of these that is there."""
PAIR_COLUMNS = ("text_b", "text2", "text_pair", "question2", "sentence2", "hypothesis")
"""If neither text nor pair is named, the first of these that is there; a text that is named has no pair."""
QUESTION_PAIRS = ("sentence", "passage", "context", "answer")
"""Further names of the pair if the text is `question`."""
LABEL_COLUMNS = ("label", "labels", "score", "target", "class", "gold_label")
"""If no label column is named, the first of these that is there and is no text."""
ID_COLUMNS = ("id", "idx", "index")
"""Names of rows; without such a column they are numbered from 0."""
MOST_NUMBERED_CLASSES = 20
"""Integers as labels are classes if there are at most so many different ones, and scores otherwise."""
NO_LABELS = ({""}, {"-1"}, {"?"})
"""Values that stand for missing labels if the label column of a test file has nothing else."""
_LARGEST_SCORE = 1e18  # whose square fp32 still holds
_PLAIN_NAMES = ("train", "training", "data")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_KNOWN = ", ".join((*_DELIMITERS, *_JSON_SUFFIXES))


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
    """Read the user's own task. Columns are chosen by the first of the files, see TEXT_COLUMNS and LABEL_COLUMNS.

    The kind is regression if every label of the first file is a number and some are not integers, or more than
    MOST_NUMBERED_CLASSES differ. Classes are the labels of the training file, in the order of their numbers if all are
    integers, otherwise of the alphabet. A test file may lack labels.

    Raises DataError for what cannot be learnt from or scored, with its file and line.
    """
    paths = {name: path for name, path in (("train", train), ("dev", dev), ("test", test)) if path is not None}
    if not paths:
        raise DataError("No file of examples is given.")
    tables = {name: _read_own(path) for name, path in paths.items()}
    columns = _chosen_columns(next(iter(tables.values())), text, pair, label)
    labels: dict[str, list[str]] = {}
    for name, table in tables.items():
        _check_own(table, columns, needs_label=name != "test")
        seen = {label for found in labels.values() for label in found} if name == "test" else None
        if (found := _labels(table, columns, seen)) is not None:
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
    """Return what a user should know and is no error: what was left out in reading, and classes that a set lacks."""
    sentences = list(data.remarks)
    sets = ({"train": data.train} if data.train is not None else {}) | data.dev
    for name, examples in sets.items() if data.task.kind == "classification" else ():
        found = np.arange(0) if examples.labels is None else examples.labels
        if len(missing := np.setdiff1d(np.arange(len(data.task.labels)), found)):
            these = _listed([data.task.labels[index] for index in missing])
            so = "it will not be predicted" if name == "train" else "its scores say nothing about it"
            sentences.append(f"No example of {name} has the label {these}: {so}.")
    return sentences


class _Columns(NamedTuple):
    text: str
    pair: str | None
    label: str | None

    def __str__(self) -> str:
        texts = f"text '{self.text}'{f' and pair {self.pair!r}' if self.pair else ''}"
        return f"{texts}, {f'label {self.label!r}' if self.label else 'no label'}"


def _read_own(path: Path) -> Table:
    is_dict = (path / "dataset_dict.json").is_file()
    if is_dict or (path / "dataset_info.json").is_file():
        split = "['train']" if is_dict else ""
        raise DataError(
            f"{path} is a dataset that save_to_disk wrote. Write what you want of it as JSON lines, and give that:\n"
            f"  python -c \"import datasets; datasets.load_from_disk('{path}'){split}.to_json('{path.name}.jsonl')\""
        )
    if path.is_file():
        with path.open("rb") as file:
            kind = kind_of(file.read(512))
        if kind:
            raise DataError(
                f"{path} is {kind.what}, not a table in plain text. Examples are read from {_KNOWN}, in UTF-8 and not "
                f"compressed."
            )
    suffix = path.suffix.lower()
    if suffix in _DELIMITERS:
        table = read_table(path, _DELIMITERS[suffix], is_quoted=True)
        if not table.names:
            raise DataError(f"{path} is empty. Its first line must name the columns.")
        if repeated := sorted({name for name in table.names if table.names.count(name) > 1}):
            raise DataError(f"{path}, line 1: more than one column is called {_listed(repeated)}. Rename them.")
        return table
    if suffix in _JSON_SUFFIXES:
        return read_jsonl(path)
    raise DataError(f"{path}: its name does not say what it is. Files of examples end in one of {_KNOWN}.")


def _chosen_columns(table: Table, text: str | None, pair: str | None, label: str | None) -> _Columns:
    there = table.names
    for name in filter(None, (text, pair, label)):
        table.column(name)  # raises DataError if there is no such column
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
    if needs_label and columns.label:
        table.column(columns.label)  # raises DataError if there is no such column
    for name in filter(None, (columns.text, columns.pair)):
        if not any(value.strip() for value in table.column(name)):
            raise DataError(
                f"{table.path}: the column '{name}' is empty in every row. Name the one with the text: --text COLUMN"
            )


def _labels(table: Table, columns: _Columns, seen: set[str] | None) -> list[str] | None:
    """Return labels without the space around them, or None if a test file has none. seen: for a test file, the labels
    of the other files."""
    if columns.label is None or columns.label not in table.names:
        return None
    labels = [label.strip() for label in table.column(columns.label)]
    if seen is not None and set(labels) in NO_LABELS and labels[0] not in seen:
        return None
    if "" in labels:
        line = table.lines[labels.index("")]
        raise DataError(f"{table.path}, line {line}: the label '{columns.label}' is empty. Fill it in or drop the row.")
    return labels


def _own_name(path: Path) -> str:
    """Return the file's name, or that of its folder if the file is called `train`; never that of a published task."""
    name = path.absolute().parent.name if path.stem.lower() in _PLAIN_NAMES else path.stem
    return f"own-{name}" if name.lower() in (*TASKS, "ax") else name


def _own_task(tables: dict[str, Table], labels: dict[str, list[str]], columns: _Columns, kind: str) -> Task:
    """Return the task whose classes are those of the first labelled file."""
    if not labels:
        raise DataError(f"{next(iter(tables.values())).path} has no labels: they say what is to be predicted.")
    first, found = next(iter(labels.items()))
    distinct = sorted(set(found))
    numbers = [_number(name) for name in distinct]
    if kind == "auto":
        fractional = any(number is None or not number.is_integer() for number in numbers)
        is_score = None not in numbers and (fractional or len(distinct) > MOST_NUMBERED_CLASSES)
        kind = "regression" if is_score else "classification"
    name, is_pair = _own_name(next(iter(tables.values())).path), columns.pair is not None
    if kind == "regression":
        scores = _indices(tables[first], found, Task(name, "regression", (), is_pair, ()))
        span = (float(scores.min()), float(scores.max()))
        return Task(name, "regression", (), is_pair, ("spearman", "pearson", "mse"), score_range=span)
    if all(number is not None and number.is_integer() for number in numbers):
        distinct.sort(key=lambda label: (float(label), label))
    more = ("f1", "matthews") if len(distinct) == 2 else ()
    classes = tuple(distinct)
    return Task(name, "classification", classes, is_pair, ("accuracy", "f1_macro", *more), classes)


def _indices(table: Table, labels: list[str], task: Task) -> np.ndarray:
    """Return int64 indices of classes or float64 scores."""
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
    ids = table.column(id_column) if id_column else [str(number) for number in table.numbers]
    pairs = table.column(columns.pair) if columns.pair else None
    return Examples(ids, table.column(columns.text), pairs, labels)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _listed(names: Sequence[str], most: int = 10) -> str:
    quoted = [f"'{name}'" for name in names[:most]]
    return ", ".join(quoted) + (f" and {len(names) - most} more" if len(names) > most else "")
