"""What a run writes into its metrics.jsonl, read as it grows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from electra_ds.sweep.options import SCORE
from electra_ds.training.tracking import metrics_lines


class MetricsFollower:
    """Each line once, however long the file becomes. A run that goes on cuts its file back, by another in its place,
    which is read from its beginning."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = 0
        """The inode of what was read last."""
        self._read = 0
        """Bytes of it."""

    def lines(self) -> list[dict[str, Any]]:
        """Those that are new and whole."""
        try:
            with self._path.open("rb") as file:
                if (inode := os.fstat(file.fileno()).st_ino) != self._file:
                    self._file, self._read = inode, 0
                file.seek(self._read)
                text = file.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        return metrics_lines(whole.decode("utf8", "replace"))


def as_result(stage: str, line: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation in a line of metrics.jsonl, under the names of the results table."""
    numbers = {_plain(name): value for name, value in line.items() if name not in ("kind", "step")}
    score = {SCORE: next(iter(numbers.values()))} if stage == "finetune" and numbers else {}
    return {"step": line["step"]} | score | numbers


def _plain(name: str) -> str:
    """`accuracy` and `accuracy_mismatched` of MNLI's two development sets."""
    where, _, metric = name.rpartition("/")
    return f"{metric}_mismatched" if where == "dev_mismatched" else metric
