"""GLUE from its official files, as https://gluebenchmark.com/tasks and its download script lay them out.

The formats are those that the loader of the Hub's dataset reads (huggingface/datasets 1.x, datasets/glue/glue.py):
tab-separated, no quoting, with a header except in CoLA's train and dev. Columns are found by the header's names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from electra_ds.core.errors import DataError, did_you_mean
from electra_ds.finetuning.tasks import Examples, Table, Task, TaskData, read_jsonl, read_table, task_data

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
            "mnli", "classification", _NLI, True, ("accuracy",), _NLI,
            {"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv", "ax": "AX.tsv"},
        ),
        _classes("qnli", "QNLI.tsv", _ENTAILED, _ENTAILED),
        _classes("rte", "RTE.tsv", _ENTAILED, _ENTAILED),
        _classes("wnli", "WNLI.tsv", ("not_entailment", "entailment"), _BINARY),
    )
}  # fmt: skip
"""The tasks by name. Classes are in the order of the Hub's dataset, metrics are GLUE's (Wang et al. 2019, table 1)."""

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
"""Sizes of the sets, from the card of the Hub's dataset nyu-mll/glue; QNLI is its second version."""


class _Columns(NamedTuple):
    text: str
    pair: str | None
    label: str
    ids: str = "index"
    """The names of a test set's rows; without such a column they are numbered from 0."""

    @property
    def texts(self) -> list[str]:
        return [self.text, self.pair] if self.pair else [self.text]


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
    "ax": _Columns("sentence1", "sentence2", ""),
}
_COLA_HEADER = ("source", "label", "original_label", "sentence")
_MNLI_JSON = _Columns("premise", "hypothesis", "label")
_AX_FULL = _Columns("Premise", "Hypothesis", "Label")
_FOLDERS = {name: (name.upper(),) for name in GLUE} | {"cola": ("CoLA",)}
_AX_FOLDERS = ("AX", "diagnostic", "diagnostics")
_MNLI_SETS = ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched")
_AX_FILES = ("AX.tsv", "diagnostic.tsv", "diagnostic-full.tsv")
_MRPC_ORIGINAL = {"train": "msr_paraphrase_train.txt", "dev": "msr_paraphrase_train.txt"}
_MRPC_TEST = "msr_paraphrase_test.txt"
_MRPC_IDS = ("#1 ID", "#2 ID")
_MRPC_DEV_IDS = ("dev_ids.tsv", "mrpc_dev_ids.tsv")


def glue_task(name: str) -> Task:
    """Return a task. Raises DataError for an unknown one."""
    if name not in GLUE:
        raise DataError(f"There is no GLUE task '{name}'{did_you_mean(name, GLUE)}. They are {', '.join(GLUE)}.")
    return GLUE[name]


def load_glue(name: str, folder: Path) -> TaskData:
    """Read a task from its own folder, or from the folder that holds the tasks' folders in their official names.

    Each set comes from the first of its files that is there: SET.tsv; for MNLI then SET.jsonl (premise, hypothesis and
    label, or the names of the TSV); for MRPC then the original msr_paraphrase_train.txt, split by dev_ids.tsv, and
    msr_paraphrase_test.txt. The diagnostic set is looked for in AX or diagnostic, in MNLI's folder and next to it. Sets
    without a file are left out. Test sets have no labels here, even if a file has them (MRPC): only GLUE's site scores
    them. The labels of the diagnostic set are public, and read from diagnostic-full.tsv.

    Raises DataError for an unknown task, a folder with none of its files, and files that break their format.
    """
    task = glue_task(name)
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder} with the files of {name}.")
    own = _task_folder(name, folder)
    reading = _Reading(task, own)
    for set_name in _MNLI_SETS if name == "mnli" else ("train", "dev", "test"):
        _read_set(reading, set_name)
    if name == "mnli" and reading.sets:
        parent = own.absolute().parent
        _read_ax(reading, [own, *_children(parent, _AX_FOLDERS), parent])
    if not reading.sets:
        looked_for = ", ".join(dict.fromkeys(reading.looked_for))
        raise DataError(
            f"{folder} holds no files of {name}. Looked for {looked_for}, there and in a folder "
            f"{' or '.join(_FOLDERS[name])} in it."
        )
    dev = {key: value for key, value in reading.sets.items() if key.startswith("dev")}
    test = {key: value for key, value in reading.sets.items() if key.startswith("test") or key == "ax"}
    source = ", ".join(dict.fromkeys(map(str, reading.read)))
    return task_data(task, reading.sets.get("train"), dev, test, source, reading.remarks)


def differing_rows(data: TaskData) -> list[str]:
    """Return a sentence for each set of a GLUE task that does not have the official number of rows, or that is missing
    and needed for its scores."""
    name, sets = data.task.name, data.sets()
    said = []
    for each, rows in OFFICIAL_ROWS.get(name, {}).items():
        if each in sets and len(sets[each]) != rows:
            said.append(f"{name}: {each} has {len(sets[each]):,} rows, officially {rows:,}.")
        elif each not in sets and each.startswith("dev"):
            said.append(f"{name}: there is no {each}, so it is not scored.")
    return said


class _Reading:
    """The sets of a task as they are found."""

    def __init__(self, task: Task, folder: Path) -> None:
        self.task = task
        self.folder = folder
        self.sets: dict[str, Examples] = {}
        self.read: list[Path] = []
        self.remarks: list[str] = []
        self.looked_for: list[str] = []

    def find(self, *names: str, folder: Path | None = None) -> Path | None:
        self.looked_for += names
        return next(iter(_children(folder or self.folder, names)), None)

    def add(self, set_name: str, table: Table, columns: _Columns, *, has_labels: bool) -> None:
        """Add a set. Rows of QQP without a label and MNLI's without a gold label ("-") are left out and counted."""
        self.read.append(table.path)
        labels, num_unlabelled = None, 0
        if has_labels:
            missing = {"qqp": "", "mnli": "-"}.get(self.task.name)
            kept = [index for index, word in enumerate(table.column(columns.label)) if word != missing]
            num_unlabelled = len(table) - len(kept)
            table = table.select(kept)
            labels = _labels(self.task, table, table.column(columns.label))
        for count, problem in (
            (table.num_short, "left out because they lack a column"),
            (num_unlabelled, "left out because they have no label"),
            (table.num_long, "with more columns than the header, the rest of which is ignored"),
        ):
            if count:
                self.remarks.append(f"{table.path}: rows {problem}: {count}.")
        ids = list(map(str, table.numbers))
        if columns.ids in table.columns:
            if table.column(columns.ids) != ids and not has_labels:
                self.remarks.append(f"{table.path}: '{columns.ids}' does not count from 0, as GLUE's site wants it.")
            ids = table.column(columns.ids)
        pairs = table.column(columns.pair) if columns.pair else None
        self.sets[set_name] = Examples(ids, table.column(columns.text), pairs, labels)


def _read_set(reading: _Reading, name: str) -> None:
    task, columns = reading.task.name, _COLUMNS[reading.task.name]
    is_test = name.startswith("test")
    if path := reading.find(f"{name}.tsv"):
        header = _COLA_HEADER if task == "cola" and not is_test else None
        table = _read(path, columns, is_test, header=header, skip_short=task == "qqp")
    elif task == "mnli" and (path := reading.find(f"{name}.jsonl")):
        table = read_jsonl(path)
        columns = _MNLI_JSON if "premise" in table.names else columns
        for column in (*columns.texts, *([] if is_test else [columns.label])):
            table.column(column)  # raises DataError if not every line has it
    elif task == "mrpc" and (path := reading.find(_MRPC_TEST if is_test else _MRPC_ORIGINAL[name])):
        table = _read(path, columns, is_test) if is_test else _original_mrpc(reading, path, name)
    else:
        return
    reading.add(name, table, columns, has_labels=not is_test)


def _read(
    path: Path, columns: _Columns, is_test: bool, *, header: Sequence[str] | None = None, skip_short: bool = False
) -> Table:
    needed = columns.texts if is_test else [*columns.texts, columns.label]
    # An `id` of QQP's train and dev is the pair's in Quora's data.
    ids = [columns.ids] if is_test or columns.ids == "index" else []
    wanted = [*needed, *ids, *_MRPC_IDS]
    table = read_table(path, "\t", is_quoted=False, header=header, wanted=wanted, skip_short=skip_short)
    for column in needed:
        table.column(column)  # raises DataError if it is not there
    return table


def _original_mrpc(reading: _Reading, path: Path, name: str) -> Table:
    """Return the rows of the original training file that dev_ids.tsv makes dev, or the others."""
    ids = reading.find(*_MRPC_DEV_IDS)
    if ids is None:
        raise DataError(
            f"{path} holds MRPC's train and dev in one; {_MRPC_DEV_IDS[0]} says which is which. Put it next to it: "
            f"https://dl.fbaipublicfiles.com/glue/data/mrpc_dev_ids.tsv"
        )

    def pairs(table: Table) -> list[tuple[str, str]]:
        return list(zip(*(table.column(column) for column in _MRPC_IDS), strict=True))

    dev = set(pairs(read_table(ids, "\t", is_quoted=False, header=_MRPC_IDS)))
    table = _read(path, _COLUMNS["mrpc"], is_test=False)
    return table.select([index for index, pair in enumerate(pairs(table)) if (pair in dev) == (name == "dev")])


def _read_ax(reading: _Reading, folders: Iterable[Path]) -> None:
    """Read MNLI's test set "ax", with labels if a file has them: they are public."""
    for folder in folders:
        *plain, full = _AX_FILES
        if path := reading.find(full, folder=folder):
            reading.add("ax", _read(path, _AX_FULL, is_test=False), _AX_FULL, has_labels=True)
            return
        if path := reading.find(*plain, folder=folder):
            reading.add("ax", _read(path, _COLUMNS["ax"], is_test=True), _COLUMNS["ax"], has_labels=False)
            return


def _labels(task: Task, table: Table, words: list[str]) -> np.ndarray:
    """Return int64 class indices or float64 scores."""
    known = {word: index for index, word in enumerate(task.written)}
    low, high = task.score_range or (0.0, 0.0)
    found: list[float] = []
    for word, line in zip(words, table.lines, strict=True):
        try:
            value = known[word] if known else float(word)
        except (KeyError, ValueError):
            value = np.nan
        if not (known and value == value) and not low <= value <= high:
            expected = f"one of {', '.join(task.written)}" if known else f"a score from {low:g} to {high:g}"
            raise DataError(f"{table.path}, line {line}: the label '{word}' is not {expected}.")
        found.append(value)
    return np.array(found, np.int64 if known else np.float64)


def _task_folder(name: str, folder: Path) -> Path:
    """Return the folder in `folder` with the task's official name, or else `folder` itself.

    Raises DataError if it is another task's: some have the same columns.
    """
    if inner := next((path for path in _children(folder, _FOLDERS[name]) if path.is_dir()), None):
        return inner
    of = next((task for task, names in _FOLDERS.items() if _plain(folder.absolute().name) in map(_plain, names)), name)
    if of != name:
        raise DataError(f"{folder} is the folder of {of}, not of {name}. Give that, or the folder that holds them all.")
    return folder


def _children(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the entries of the folder with one of these names, in their order; case and hyphens do not matter."""
    try:
        there = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise DataError(f"Cannot read {folder}: {error.strerror}.") from error
    return [path for name in names for path in there if _plain(path.name) == _plain(name)]


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
