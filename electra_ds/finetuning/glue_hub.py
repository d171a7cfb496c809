"""GLUE from the Hugging Face Hub, or from a folder laid out as its repository. Imported only when it is used."""

from __future__ import annotations

from typing import Any

import datasets  # type: ignore[import-untyped]
import numpy as np

from electra_ds.core.errors import DataError
from electra_ds.data.hub import HUB, dataset_path, explained
from electra_ds.finetuning.glue import glue_task
from electra_ds.finetuning.tasks import Examples, Task, TaskData, task_data

REPOSITORY = "nyu-mll/glue"

_TEXTS = {
    "cola": ("sentence",), "sst-2": ("sentence",), "mrpc": ("sentence1", "sentence2"),
    "sts-b": ("sentence1", "sentence2"), "qqp": ("question1", "question2"), "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"), "rte": ("sentence1", "sentence2"), "wnli": ("sentence1", "sentence2"),
}  # fmt: skip


def load_glue_hub(name: str, repository: str = REPOSITORY, revision: str | None = None) -> TaskData:
    """Read a task by its configuration there: "sst2", "stsb", otherwise the name that it has here.

    Test sets come without labels, as from the files. Scores are the decimal numbers that the Hub's float32 stand for,
    so that the same data has the same fingerprint from either source.

    Raises DataError for an unknown task, and for a dataset that cannot be fetched or is not laid out as GLUE's.
    """
    task = glue_task(name)
    path = dataset_path(repository, revision)
    config = name.replace("-", "")
    description = f"{HUB}{repository}#{config}{f', revision {revision}' if revision else ''}"
    with explained(description):
        splits = dict(datasets.load_dataset(path, config, revision=revision))
        if name == "mnli" and "ax" in datasets.get_dataset_config_names(path, revision=revision):
            splits["ax"] = datasets.load_dataset(path, "ax", revision=revision)["test"]
    sets = {
        split.replace("validation", "dev"): _examples(task, rows, description, split) for split, rows in splits.items()
    }
    dev = {key: sets[key] for key in ("dev", "dev_matched", "dev_mismatched") if key in sets}
    test = {key: sets[key] for key in ("test", "test_matched", "test_mismatched", "ax") if key in sets}
    if not (dev or test or "train" in sets):
        raise DataError(f"{description} has no split of GLUE's; its splits are {', '.join(splits)}.")
    return task_data(task, sets.get("train"), dev, test, description)


def _examples(task: Task, rows: Any, description: str, split: str) -> Examples:
    where = f"{description}@{split}"
    is_test = split.startswith("test") or split == "ax"
    columns = _TEXTS[task.name]
    for column in (*columns, *(() if is_test else ("label",))):
        if column not in rows.column_names:
            raise DataError(f"{where}: no column '{column}'; its columns are {', '.join(rows.column_names)}.")
    texts = [list(rows[column]) for column in columns]
    for column, values in zip(columns, texts, strict=True):
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise DataError(f"{where}, row {row}: the column '{column}' holds no text.")
    ids = [str(number) for number in (rows["idx"] if "idx" in rows.column_names else range(len(rows)))]
    labels = None if is_test else _labels(task, rows, where)
    return Examples(ids, texts[0], texts[1] if len(texts) == 2 else None, labels)


def _labels(task: Task, rows: Any, where: str) -> np.ndarray:
    names = getattr(rows.features["label"], "names", None)
    if task.kind == "classification" and names is not None and tuple(names) != task.labels:
        raise DataError(f"{where}: its classes are {', '.join(names)}, not GLUE's {', '.join(task.labels)}.")
    values = list(rows["label"])
    low, high = (0, len(task.labels) - 1) if task.score_range is None else task.score_range
    for row, value in enumerate(values):
        if not isinstance(value, int if task.labels else float) or not low <= value <= high:
            raise DataError(f"{where}, row {row}: the label {value} is not one from {low:g} to {high:g}.")
    if task.kind == "classification":
        return np.array(values, np.int64)
    return np.array([float(str(np.float32(value))) for value in values], np.float64)
