"""Read GLUE from its official files, in the layout of its download script.

The formats are those that the loader of the Hub dataset reads (huggingface/datasets 1.x, datasets/glue/glue.py):
tab-separated, without quoting, with a header except in CoLA's train and dev. The header names the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from electra_ds.core.errors import DataError, did_you_mean
from electra_ds.finetuning.tables import Table, read_jsonl, read_tsv
from electra_ds.finetuning.tasks.examples import Examples, Task, TaskData, kind_of_set, task_data

_NLI = ("entailment", "neutral", "contradiction")
_ENTAILED = ("entailment", "not_entailment")
_BINARY = ("0", "1")


def _classes(
    name: str,
    file: str,
    labels: tuple[str, ...],
    written: tuple[str, ...],
    *metrics: str,
    is_pair: bool = True,
) -> Task:
    return Task(name, "classification", labels, is_pair, metrics or ("accuracy",), written, {"test": file})


GLUE: dict[str, Task] = {
    task.name: task
    for task in (
        _classes("cola", "CoLA.tsv", ("unacceptable", "acceptable"), _BINARY, "matthews", is_pair=False),
        _classes("sst-2", "SST-2.tsv", ("negative", "positive"), _BINARY, is_pair=False),
        _classes("mrpc", "MRPC.tsv", ("not_equivalent", "equivalent"), _BINARY, "accuracy", "f1"),
        Task("sts-b", "regression", (), True, ("spearman", "pearson"), (), {"test": "STS-B.tsv"}, (0.0, 5.0)),
        _classes("qqp", "QQP.tsv", ("not_duplicate", "duplicate"), _BINARY, "accuracy", "f1"),
        Task(
            "mnli",
            "classification",
            _NLI,
            True,
            ("accuracy",),
            _NLI,
            {"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv", "ax": "AX.tsv"},
        ),
        _classes("qnli", "QNLI.tsv", _ENTAILED, _ENTAILED),
        _classes("rte", "RTE.tsv", _ENTAILED, _ENTAILED),
        _classes("wnli", "WNLI.tsv", ("not_entailment", "entailment"), _BINARY),
    )
}
"""The tasks by name, with classes in the order of the Hub dataset and GLUE's metrics (Wang et al. 2019, table 1)."""

OFFICIAL_ROWS: dict[str, dict[str, int]] = {
    "cola": {"train": 8551, "dev": 1043, "test": 1063},
    "sst-2": {"train": 67349, "dev": 872, "test": 1821},
    "mrpc": {"train": 3668, "dev": 408, "test": 1725},
    "sts-b": {"train": 5749, "dev": 1500, "test": 1379},
    "qqp": {"train": 363846, "dev": 40430, "test": 390965},
    "mnli": {
        "train": 392702, "dev_matched": 9815, "dev_mismatched": 9832,
        "test_matched": 9796, "test_mismatched": 9847, "ax": 1104,
    },
    "qnli": {"train": 104743, "dev": 5463, "test": 5463},
    "rte": {"train": 2490, "dev": 277, "test": 3000},
    "wnli": {"train": 635, "dev": 71, "test": 146},
}  # fmt: skip
"""The sizes of the sets, from the card of the Hub dataset nyu-mll/glue. QNLI is its second version."""


class _Columns(NamedTuple):
    text: str
    pair: str | None
    label: str
    ids: str = "index"
    """The column that names the rows of a test set. Without it, rows are numbered from 0."""


_COLUMNS = {
    "cola": _Columns("sentence", None, "label"),
    "sst-2": _Columns("sentence", None, "label"),
    "mrpc": _Columns("#1 String", "#2 String", "Quality"),
    "sts-b": _Columns("sentence1", "sentence2", "score"),
    "qqp": _Columns("question1", "question2", "is_duplicate", "id"),
    "mnli": _Columns("sentence1", "sentence2", "gold_label"),
    "qnli": _Columns("question", "sentence", "label"),
    "rte": _Columns("sentence1", "sentence2", "label"),
    "wnli": _Columns("sentence1", "sentence2", "label"),
}
"""The columns of the official files."""
HUB_COLUMNS = {
    name: columns._replace(label="label", ids="idx")
    for name, columns in (
        _COLUMNS | {"mrpc": _COLUMNS["rte"], "mnli": _Columns("premise", "hypothesis", "label")}
    ).items()
}
"""The columns of the Hub dataset."""
_COLA_HEADER = ("source", "label", "original_label", "sentence")
_MNLI_JSON = _Columns("premise", "hypothesis", "label")
_AX_FULL = _Columns("Premise", "Hypothesis", "Label")
_FOLDERS = {name: name.upper() for name in GLUE} | {"cola": "CoLA"}
_AX_FOLDERS = ("AX", "diagnostic", "diagnostics")
_AX_FILES = ("diagnostic-full.tsv", "AX.tsv", "diagnostic.tsv")
_UNLABELLED = {"qqp": "", "mnli": "-"}
"""The text that marks a missing label in train and dev."""


def glue_task(name: str) -> Task:
    """Return the task with this name. Raises DataError if it is unknown."""
    if name not in GLUE:
        raise DataError(f"There is no GLUE task '{name}'{did_you_mean(name, GLUE)}. The tasks are {', '.join(GLUE)}.")
    return GLUE[name]


def load_glue(name: str, folder: Path) -> TaskData:
    """Read a task from its own folder, or from the folder that holds all tasks' folders under their official names.

    Each set is read from SET.tsv, or for MNLI from SET.jsonl (premise, hypothesis and label, or the names of the TSV).
    The diagnostic set is searched for in MNLI's folder, next to it, and in AX or diagnostic there. Sets without a file
    are left out. Labels of test sets are not read, even if a file has them (MRPC): only GLUE's site scores them. The
    labels of the diagnostic set are public and are read from diagnostic-full.tsv.

    Raises DataError if the task is unknown, if the folder has none of its files, or if a file has the wrong format.
    """
    task = glue_task(name)
    if not folder.is_dir():
        raise DataError(f"The folder {folder} with the files of {name} does not exist.")
    own = _task_folder(name, folder)
    suffixes = (".tsv", ".jsonl") if name == "mnli" else (".tsv",)
    wanted = {each: [each + suffix for suffix in suffixes] for each in OFFICIAL_ROWS[name] if each != "ax"}
    files = {each: path for each, names in wanted.items() if (path := _child(own, *names))}
    if not files:
        looked_for = ", ".join(each for names in wanted.values() for each in names)
        raise DataError(
            f"{folder} holds no files of {name}. It needs {looked_for}, in it or in its subfolder {_FOLDERS[name]}."
        )
    if name == "mnli":
        parent = own.absolute().parent
        folders = filter(None, [own, _child(parent, *_AX_FOLDERS), parent])
        if found := next((path for each in folders if (path := _child(each, *_AX_FILES))), None):
            files["ax"] = found
    notes: list[str] = []
    sets = {set_name: _read_set(task, set_name, path, notes) for set_name, path in files.items()}
    return glue_data(task, sets, ", ".join(map(str, files.values())), notes)


def glue_data(task: Task, sets: dict[str, Examples], source: str, notes: list[str]) -> TaskData:
    """Return the sets, with notes on sets that lack the official number of rows, or that are missing but needed for the
    task's scores."""
    ordered = {name: sets[name] for name in OFFICIAL_ROWS[task.name] if name in sets}
    for name, rows in OFFICIAL_ROWS[task.name].items():
        if name in ordered and len(ordered[name]) != rows:
            notes.append(f"{task.name}: {name} has {len(ordered[name]):,} rows, officially {rows:,}.")
        elif name not in ordered and name.startswith("dev"):
            notes.append(f"{task.name}: there is no {name} set, so it is not scored.")
    return task_data(task, ordered, source, notes)


def _read_set(task: Task, set_name: str, path: Path, notes: list[str]) -> Examples:
    columns, has_labels = _COLUMNS[task.name], kind_of_set(set_name) != "test"
    if _plain(path.name) == _plain(_AX_FILES[0]):
        columns, has_labels = _AX_FULL, True
    if path.suffix.lower() == ".jsonl":
        table = read_jsonl(path)
        columns = _MNLI_JSON if "premise" in table.frame else columns
    else:
        header = _COLA_HEADER if task.name == "cola" and has_labels else None
        table = read_tsv(path, header=header, wanted=columns)
    if has_labels and task.name in _UNLABELLED and columns.label in table.frame:
        has_label = [label != _UNLABELLED[task.name] for label in table.column(columns.label)]
        if missing := has_label.count(False):
            notes.append(f"{path}: rows left out because they have no label: {missing}.")
            table = Table(table.source, table.frame[has_label])
    return glue_examples(task, table, columns, task.written, has_labels=has_labels)


def glue_examples(task: Task, table: Table, columns: _Columns, written: Sequence[str], *, has_labels: bool) -> Examples:
    """Return the examples of a table. written: the classes as the table writes them."""
    table.check_columns([columns.text, columns.pair, columns.label if has_labels else None])
    # The `id` in QQP's train and dev is that of the pair in Quora's data.
    is_named = columns.ids in table.frame and not has_labels
    ids = table.column(columns.ids) if is_named else [str(row) for row in table.frame.index]
    texts = table.column(columns.text)
    pairs = table.column(columns.pair) if columns.pair else None
    return Examples(ids, texts, pairs, _labels(task, table, columns.label, written) if has_labels else None)


def _labels(task: Task, table: Table, column: str, written: Sequence[str]) -> np.ndarray:
    """Return int64 class indices or float64 scores."""
    known = {word: index for index, word in enumerate(written)}
    low, high = task.score_range or (0.0, 0.0)
    found: list[float] = []
    for row, word in zip(table.frame.index, table.column(column), strict=True):
        try:
            value = known[word] if known else float(word)
            is_label = bool(known) or low <= value <= high
        except (KeyError, ValueError):
            is_label = False
        if not is_label:
            expected = f"one of {', '.join(written)}" if known else f"a score from {low:g} to {high:g}"
            raise DataError(f"{table.source}, row {row + 1}: the label '{word}' is not {expected}.")
        found.append(value)
    return np.array(found, np.int64 if known else np.float64)


def _task_folder(name: str, folder: Path) -> Path:
    """Return the subfolder of `folder` with the task's official name, or else `folder` itself.

    Raises DataError if the folder is another task's, since some tasks have the same columns.
    """
    inner = _child(folder, _FOLDERS[name])
    if inner is not None and inner.is_dir():
        return inner
    own_name = _plain(folder.absolute().name)
    of = next((task for task, official in _FOLDERS.items() if _plain(official) == own_name), name)
    if of != name:
        raise DataError(
            f"{folder} is the folder of {of}, not of {name}. Give that of {name}, or the one that holds all tasks."
        )
    return folder


def _child(folder: Path, *names: str) -> Path | None:
    """Return the first of these names that is in the folder; None if no name is. Case and hyphens do not matter."""
    try:
        there = {_plain(path.name): path for path in sorted(folder.iterdir())} if folder.is_dir() else {}
    except OSError as error:
        raise DataError(f"Cannot read {folder}: {error.strerror}.") from error
    return next((there[_plain(name)] for name in names if _plain(name) in there), None)


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
