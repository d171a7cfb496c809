"""A custom task: a classification of files in fastText's format, one `__label__CLASS text` per line."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from electra_ds.core.errors import ConfigError, DataError
from electra_ds.finetuning.tasks.examples import Examples, Task, task_data
from electra_ds.finetuning.tasks.sequence import SequenceTask

_PREFIX = "__label__"


class LabelledLines(SequenceTask):
    """`--task labelled-lines --train FILE --dev FILE`; all else is as in any classification."""

    takes = ("train", "dev", "test")
    possible_metrics = ("accuracy", "f1_macro")

    @classmethod
    def load(cls, source):
        if source.train is None or source.dev is None:
            raise ConfigError("labelled-lines needs --train FILE and --dev FILE.")
        paths = {name: Path(path) for name in ("train", "dev", "test") if (path := getattr(source, name)) is not None}
        sets = {name: _lines(path) for name, path in paths.items()}
        labels = tuple(sorted({label for label, _ in sets["train"]}))
        examples = {name: _examples(paths[name], rows, labels) for name, rows in sets.items()}
        task = Task(paths["train"].stem, "classification", labels, False, cls.possible_metrics, labels)
        return task_data(task, examples, ", ".join(map(str, paths.values())))


def _lines(path):
    rows = []
    for number, line in enumerate(path.read_text("utf8").splitlines(), 1):
        label, _, text = line.strip().partition(" ")
        if not label.startswith(_PREFIX):
            raise DataError(f"{path}, line {number}: does not begin with {_PREFIX}CLASS.")
        rows.append((label.removeprefix(_PREFIX), text))
    return rows


def _examples(path, rows, labels):
    for number, (label, _) in enumerate(rows, 1):
        if label not in labels:
            raise DataError(f"{path}, line {number}: the training file has no class '{label}'.")
    ids, texts = [str(row) for row in range(len(rows))], [text for _, text in rows]
    return Examples(ids, texts, None, np.array([labels.index(label) for label, _ in rows]))
