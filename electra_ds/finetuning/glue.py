"""GLUE from its official files, as https://gluebenchmark.com/tasks and its download script lay them out.

The formats are those that the loader of the Hub's dataset reads (huggingface/datasets 1.x, datasets/glue/glue.py):
tab-separated, no quoting, a header everywhere but in CoLA's train and dev. Columns are found by the header's names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from electra_ds.core.errors import DataError, did_you_mean
from electra_ds.finetuning.own_files import Table, read_jsonl, read_tsv
from electra_ds.finetuning.tasks import Examples, Task, TaskData, task_data

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
"""By name. Classes are in the order of the Hub's dataset, metrics are GLUE's (Wang et al. 2019, table 1)."""

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
    """What a test's rows are called; where there is no such column, their number from 0."""


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
_MRPC_DEV_IDS = ("dev_ids.tsv", "mrpc_dev_ids.tsv")


def load_glue(name: str, folder: Path) -> TaskData:
    """A task from its own folder, or from the folder that holds the tasks' folders in their official names.

    Each set comes from the first of its files that is there: SET.tsv; for MNLI then SET.jsonl (premise, hypothesis and
    label, or the names of the TSV); for MRPC then the original msr_paraphrase_train.txt, split by dev_ids.tsv, and
    msr_paraphrase_test.txt. The diagnostic set is looked for in AX or diagnostic, in MNLI's folder and beside it. Sets
    without a file are left out. Test sets have no labels here, even where a file has them (MRPC): they are GLUE's to
    score. The diagnostic set's are public, and read from diagnostic-full.tsv.

    Raises DataError for an unknown task, a folder with none of its files, and files that break their format.
    """
    task = GLUE.get(name)
    if task is None:
        raise DataError(f"There is no GLUE task '{name}'{did_you_mean(name, GLUE)}. They are {', '.join(GLUE)}.")
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder} with the files of {name}.")
    own = _task_folder(name, folder)
    reading = _Reading(task, own)
    for set_name in _MNLI_SETS if name == "mnli" else ("train", "dev", "test"):
        _read_set(reading, set_name)
    if name == "mnli" and reading.sets:
        beside = own.absolute().parent
        _read_ax(reading, [own, *_children(beside, _AX_FOLDERS), beside])
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
    """A sentence for each set of a GLUE task that has not the official number of rows, or is missing and scored by."""
    name, sets = data.task.name, data.sets()
    said = []
    for each, rows in OFFICIAL_ROWS.get(name, {}).items():
        if each in sets and len(sets[each]) != rows:
            said.append(f"{name}: {each} has {len(sets[each]):,} rows, officially {rows:,}.")
        elif each not in sets and each.startswith("dev"):
            said.append(f"{name}: there is no {each}, so nothing is scored by it.")
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
        """Rows of QQP without a label and MNLI's without a gold label ("-") are left out and counted."""
        self.read.append(table.path)
        kept, labels = list(range(len(table))), None
        num_unlabelled = 0
        if has_labels:
            words = table.columns[columns.label]
            missing = {"qqp": "", "mnli": "-"}.get(self.task.name)
            kept = [index for index in kept if words[index] != missing]
            num_unlabelled = len(words) - len(kept)
            labels = _labels(self.task, table, words, kept)
        for count, problem in (
            (table.num_short, "left out since they lack a column"),
            (num_unlabelled, "left out since they have no label"),
            (table.num_long, "with more columns than the header, which are passed over"),
        ):
            if count:
                self.remarks.append(f"{table.path}: rows {problem}: {count}.")
        numbers = list(map(str, table.numbers))
        if columns.ids in table.columns:
            if table.columns[columns.ids] != numbers and not has_labels:
                self.remarks.append(f"{table.path}: '{columns.ids}' does not count from 0, as GLUE's site wants it.")
            numbers = table.columns[columns.ids]
        texts = table.columns[columns.text]
        pairs = table.columns[columns.pair] if columns.pair else None
        self.sets[set_name] = Examples(
            [numbers[index] for index in kept],
            [texts[index] for index in kept],
            None if pairs is None else [pairs[index] for index in kept],
            labels,
        )


def _read_set(reading: _Reading, name: str) -> None:
    task, columns = reading.task.name, _COLUMNS[reading.task.name]
    is_test = name.startswith("test")
    if path := reading.find(f"{name}.tsv"):
        header = _COLA_HEADER if task == "cola" and not is_test else None
        table = _read(path, columns, is_test, header=header, skip_short=task == "qqp")
    elif task == "mnli" and (path := reading.find(f"{name}.jsonl")):
        table = read_jsonl(path)
        columns = _MNLI_JSON if "premise" in table.names else columns
        for column in columns[: 2 if is_test else 3]:
            if column not in table.columns:
                there = table.unusable.get(str(column), f"its keys are {', '.join(table.names)}")
                raise DataError(f"{path}: not every line has a text '{column}'; {there}.")
    elif task == "mrpc" and (path := reading.find(_MRPC_TEST if is_test else _MRPC_ORIGINAL[name])):
        table = _read(path, columns, is_test) if is_test else _original_mrpc(reading, path, name)
    else:
        return
    reading.add(name, table, columns, has_labels=not is_test)


def _read(
    path: Path, columns: _Columns, is_test: bool, *, header: Sequence[str] | None = None, skip_short: bool = False
) -> Table:
    texts = [columns.text, *([columns.pair] if columns.pair else [])]
    wanted = texts if is_test else [*texts, columns.label]
    # An `id` of QQP's train and dev is the pair's in Quora's data.
    ids = [columns.ids] if is_test or columns.ids == "index" else []
    return read_tsv(path, wanted, optional=ids, header=header, skip_short=skip_short)


def _original_mrpc(reading: _Reading, path: Path, name: str) -> Table:
    """The rows of the original training file that dev_ids.tsv makes dev, or the others."""
    ids = reading.find(*_MRPC_DEV_IDS)
    if ids is None:
        raise DataError(
            f"{path} holds MRPC's train and dev in one; {_MRPC_DEV_IDS[0]} says which is which. Put it beside it: "
            f"https://dl.fbaipublicfiles.com/glue/data/mrpc_dev_ids.tsv"
        )
    listed = read_tsv(ids, ("#1 ID", "#2 ID"), header=("#1 ID", "#2 ID"))
    dev = set(zip(listed.columns["#1 ID"], listed.columns["#2 ID"], strict=True))
    columns = _COLUMNS["mrpc"]
    table = read_tsv(path, ["#1 ID", "#2 ID", columns.text, columns.pair or "", columns.label])
    pairs = zip(table.columns["#1 ID"], table.columns["#2 ID"], strict=True)
    chosen = [index for index, pair in enumerate(pairs) if (pair in dev) == (name == "dev")]
    picked = {key: [values[index] for index in chosen] for key, values in table.columns.items()}
    numbers, lines = ([values[index] for index in chosen] for values in (table.numbers, table.lines))
    return Table(path, table.names, picked, lines, numbers, num_long=table.num_long)


def _read_ax(reading: _Reading, folders: Iterable[Path]) -> None:
    """MNLI's test set "ax", with labels where a file has them: they are public."""
    for folder in folders:
        *plain, full = _AX_FILES
        if path := reading.find(full, folder=folder):
            reading.add("ax", _read(path, _AX_FULL, is_test=False), _AX_FULL, has_labels=True)
            return
        if path := reading.find(*plain, folder=folder):
            reading.add("ax", _read(path, _COLUMNS["ax"], is_test=True), _COLUMNS["ax"], has_labels=False)
            return


def _labels(task: Task, table: Table, words: list[str], kept: list[int]) -> np.ndarray:
    """int64 class indices or float64 scores of the rows kept."""
    known = {word: index for index, word in enumerate(task.written)}
    low, high = task.score_range or (0.0, 0.0)
    found: list[float] = []
    for index in kept:
        word = words[index]
        try:
            value = known[word] if known else float(word)
        except (KeyError, ValueError):
            value = np.nan
        if not (known and value == value) and not low <= value <= high:
            expected = f"one of {', '.join(task.written)}" if known else f"a score from {low:g} to {high:g}"
            raise DataError(f"{table.path}, line {table.lines[index]}: the label '{word}' is not {expected}.")
        found.append(value)
    return np.array(found, np.int64 if known else np.float64)


def _task_folder(name: str, folder: Path) -> Path:
    """The folder in it in the task's official name, or else it itself.

    Raises DataError if it is another task's: some have the same columns.
    """
    if inner := next((path for path in _children(folder, _FOLDERS[name]) if path.is_dir()), None):
        return inner
    of = next((task for task, names in _FOLDERS.items() if _plain(folder.absolute().name) in map(_plain, names)), name)
    if of != name:
        raise DataError(f"{folder} is the folder of {of}, not of {name}. Give that, or the folder that holds them all.")
    return folder


def _children(folder: Path, names: Sequence[str]) -> list[Path]:
    """What is in the folder in one of these names, in their order; case and hyphens do not matter."""
    try:
        there = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise DataError(f"Cannot read {folder}: {error.strerror}.") from error
    return [path for name in names for path in there if _plain(path.name) == _plain(name)]


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
