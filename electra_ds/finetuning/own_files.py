"""Read a classification or a regression from the user's own CSV, TSV or JSON lines."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from electra_ds.config.names import TASKS
from electra_ds.config.run_record import TaskSource
from electra_ds.core.errors import DataError, did_you_mean
from electra_ds.finetuning.tables import Table, listed, read_csv, read_jsonl
from electra_ds.finetuning.tasks.examples import Examples, Task, TaskData, task_data

TEXT_COLUMNS = (
    "text", "text_a", "text1", "question", "question1", "sentence", "sentence1", "premise", "content",
)  # fmt: skip
"""If no text column is named, the first of these that the file has."""
PAIR_COLUMNS = ("text_b", "text2", "text_pair", "question2", "sentence2", "hypothesis")
"""If neither text nor pair is named, the first of these that the file has. A named text has no pair by default."""
QUESTION_PAIRS = ("sentence", "passage", "context", "answer")
"""More names for the pair if the text is `question`."""
LABEL_COLUMNS = ("label", "labels", "score", "target", "class", "gold_label")
"""If no label column is named, the first of these that the file has and that is not the text or pair."""
ID_COLUMNS = ("id", "idx", "index")
"""The column that names the rows. Without it, rows are numbered from 0."""
MOST_NUMBERED_CLASSES = 20
"""The largest number of different integer labels that are classes. If there are more, they are scores."""
NO_LABELS = ({""}, {"-1"}, {"?"})
"""Values that mean a missing label, if the label column of a test file has no others."""
_PLAIN_NAMES = ("train", "training", "data")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


def load_own_source(source: TaskSource) -> TaskData:
    """Read the user's own task from the files and columns that a source names."""
    assert source.train is not None
    dev, test = (None if path is None else Path(path) for path in (source.dev, source.test))
    columns = {"text": source.text, "pair": source.pair, "label": source.label}
    return load_own(Path(source.train), dev, test, **columns, kind=source.label_kind)


def load_own(
    train: Path,
    dev: Path | None,
    test: Path | None,
    *,
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    kind: str = "auto",
) -> TaskData:
    """Read the user's own task. The training file decides the columns, see TEXT_COLUMNS and LABEL_COLUMNS.

    The task is a regression if every label of the training file is a number and either some are not integers or more
    than MOST_NUMBERED_CLASSES differ. Otherwise the classes are the labels of the training file, in numerical order if
    all are integers, else in alphabetical order. A test file may lack labels.

    Raises DataError, with file and row, for anything that cannot be learned from or scored.
    """
    paths = {name: path for name, path in (("train", train), ("dev", dev), ("test", test)) if path is not None}
    tables = {name: read_own(path) for name, path in paths.items()}
    columns = _chosen_columns(tables["train"], text, pair, label)
    labels: dict[str, list[str]] = {}
    for name, table in tables.items():
        table.check_columns(columns if name != "test" else columns[:2])
        _check_texts(table, columns)
        seen = {label for found in labels.values() for label in found}
        if name == "test" and _lacks_labels(table, columns.label, seen):
            continue
        labels[name] = [label.strip() for label in table.column(columns.label)]
        if "" in labels[name]:
            where = f"{table.source}, row {labels[name].index('') + 1}"
            raise DataError(f"{where}: the label '{columns.label}' is empty. Fill it in or drop the row.")
    task = _own_task(own_name(train), labels["train"], columns, kind)
    indices = {name: _indices(tables[name].source, found, task) for name, found in labels.items()}
    sets: dict[str, Examples] = {
        name: _own_examples(table, columns, indices.get(name)) for name, table in tables.items()
    }
    if len(np.unique(indices["train"])) == 1:
        raise DataError(
            f"{train}: every row has the label '{labels['train'][0]}', so there is nothing to learn. "
            f"Is '{columns.label}' the right column?"
        )
    texts = f"text '{columns.text}'" + (f" and pair '{columns.pair}'" if columns.pair else "")
    source = f"{', '.join(f'{name} {path}' for name, path in paths.items())} ({texts}, label '{columns.label}')"
    return task_data(task, sets, source)


class _Columns(NamedTuple):
    text: str
    pair: str | None
    label: str


def read_own(path: Path) -> Table:
    """Read a file of examples. Raises DataError."""
    suffix = path.suffix.lower()
    if suffix in _DELIMITERS:
        return read_csv(path, _DELIMITERS[suffix])
    if suffix in _JSON_SUFFIXES:
        return read_jsonl(path)
    if suffix in (".conll", ".conllu", ".iob", ".bio"):
        raise DataError(f"{path}: for words with tags, add --task token-classification.")
    raise DataError(
        f"{path}: the name of a file of examples must end in {', '.join((*_DELIMITERS, *_JSON_SUFFIXES))}. Convert it "
        f"with pandas or datasets: to_json(FILE, orient='records', lines=True)."
    )


def _chosen_columns(table: Table, text: str | None, pair: str | None, label: str | None) -> _Columns:
    there = list(table.frame.columns)
    named = (text, pair, label)
    if text is None:
        text = next((name for name in TEXT_COLUMNS if name in there and name not in (pair, label)), None)
        seconds = PAIR_COLUMNS + (QUESTION_PAIRS if text == "question" else ())
        pair = pair or next((name for name in seconds if name in there and name != label), None)
    if label is None:
        label = next((name for name in LABEL_COLUMNS if name in there and name not in (text, pair)), None)
    roles = (("text", text, TEXT_COLUMNS), ("label", label, LABEL_COLUMNS))
    unknown = {what: usual for what, found, usual in roles if found is None}
    advice = (
        f" Name the one that holds the {what} with --{what} COLUMN, or rename it to one of {', '.join(usual)}."
        for what, usual in unknown.items()
    )
    table.check_columns(named, [f"no {what} column" for what in unknown], "".join(advice))
    assert text is not None
    assert label is not None
    if text in (pair, label) or pair == label:
        raise DataError(f"{table.source}: text '{text}', pair '{pair}' and label '{label}' must be different columns.")
    return _Columns(text, pair, label)


def _check_texts(table: Table, columns: _Columns) -> None:
    if not len(table.frame):
        raise DataError(f"{table.source} has no rows. Give a file with examples, or leave it out.")
    for name in filter(None, (columns.text, columns.pair)):
        if not any(value.strip() for value in table.column(name)):
            raise DataError(
                f"{table.source}: the column '{name}' is empty in every row. Name the one with the text: --text COLUMN"
            )


def _lacks_labels(table: Table, column: str, seen: set[str]) -> bool:
    """Return True if a test file has no labels. seen: the labels of the other files."""
    if column not in table.frame:
        return True
    found = {label.strip() for label in table.column(column)}
    return found in NO_LABELS and not found & seen


def own_name(path: Path) -> str:
    """Return the file's name, or its folder's if the file is called `train`, but never that of a published task."""
    return unpublished(Path(os.path.abspath(path)).parent.name if path.stem.lower() in _PLAIN_NAMES else path.stem)


def unpublished(name: str) -> str:
    """Return a name that is not a published task's."""
    return f"own-{name}" if name.lower() in (*TASKS, "ax") else name


def _own_task(name: str, labels: list[str], columns: _Columns, kind: str) -> Task:
    distinct = sorted(set(labels))
    numbers = [_number(label) for label in distinct]
    are_integers = all(number is not None and number.is_integer() for number in numbers)
    if kind == "auto":
        is_score = None not in numbers and (not are_integers or len(distinct) > MOST_NUMBERED_CLASSES)
        kind = "regression" if is_score else "classification"
    is_pair = columns.pair is not None
    if kind == "regression":
        scores = [number for number in numbers if number is not None]
        span = (min(scores, default=0.0), max(scores, default=0.0))
        return Task(name, "regression", (), is_pair, ("spearman", "pearson", "mse"), score_range=span)
    if are_integers:
        distinct.sort(key=lambda label: (float(label), label))
    more = ("f1", "matthews") if len(distinct) == 2 else ()
    classes = tuple(distinct)
    return Task(name, "classification", classes, is_pair, ("accuracy", "f1_macro", *more), classes)


def _indices(source: str, labels: list[str], task: Task) -> np.ndarray:
    """Return int64 class indices or float64 scores."""
    if task.kind == "classification":
        known: dict[str, float] = {label: index for index, label in enumerate(task.labels)}
        expected = f"not one of the training labels, {listed(task.labels)}"
    else:
        numbers = {label: _number(label) for label in set(labels)}
        known = {label: number for label, number in numbers.items() if number is not None and math.isfinite(number)}
        expected = "not a finite number"
    for row, label in enumerate(labels, 1):
        if label not in known:
            hint = did_you_mean(label, task.labels)
            raise DataError(f"{source}, row {row}: the label '{label}' is {expected}{hint}. Correct or drop the row.")
    return np.array([known[label] for label in labels], np.int64 if task.labels else np.float64)


def _own_examples(table: Table, columns: _Columns, labels: np.ndarray | None) -> Examples:
    id_column = next((name for name in ID_COLUMNS if name in table.frame and name not in columns), None)
    ids = table.column(id_column) if id_column else [str(row) for row in range(len(table.frame))]
    pairs = table.column(columns.pair) if columns.pair else None
    return Examples(ids, table.column(columns.text), pairs, labels)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
