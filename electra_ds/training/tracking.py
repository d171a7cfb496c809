"""metrics.jsonl, where all of a run's numbers go."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from electra_ds.core.errors import CheckpointError


class MetricsFile:
    """metrics.jsonl: one JSON object a line, with `step` and `kind` ("train" or "eval")."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Lines after `resume_step`, which a killed run wrote beyond its last checkpoint, are dropped.

        `reached` is the last step that they told of, `evaluated` the last one that is kept of an evaluation.
        """
        try:
            lines = read_metrics(path) if path.exists() else []
            self.reached = max((line["step"] for line in lines), default=0)
            kept = [line for line in lines if line["step"] <= resume_step]
            self.evaluated = max((line["step"] for line in kept if line["kind"] == "eval"), default=0)
            if path.exists():
                temporary = path.with_suffix(".tmp")
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf8")
                temporary.replace(path)
            self._file = path.open("a", encoding="utf8", buffering=1)
        except OSError as error:
            raise CheckpointError(f"Cannot write {path}: {error.strerror}.") from error

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Raises CheckpointError if the disk is full."""
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        except OSError as error:
            raise CheckpointError(f"Cannot write {self._file.name}: {error.strerror}.") from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the line that did not fit was reported when it was written
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line; one may have been cut by a kill."""
    return metrics_lines(path.read_text("utf8", errors="replace"))


def metrics_lines(text: str) -> list[dict[str, Any]]:
    lines = []
    for line in text.splitlines():
        try:
            values = json.loads(line)
            lines.append(values | {"step": int(values["step"]), "kind": str(values["kind"])})
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
    return lines
