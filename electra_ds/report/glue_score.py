"""Compute the two means over GLUE's tasks that papers print, read published scores, and zip submissions.

Metrics are shares in [0, 1] and correlations in [-1, 1]. Published ones are in percent, as printed.

Metrics come as {task: {metric: value}}. MNLI's `accuracy` is that of the matched set, `accuracy_mismatched` the other.
"""

from __future__ import annotations

import importlib.resources
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from electra_ds.config.sections import Section
from electra_ds.config.values import load_yaml
from electra_ds.core.errors import CheckpointError, ConfigError
from electra_ds.core.files import complete_file

TaskMetrics = Mapping[str, Mapping[str, float]]
Wnli = Literal["majority", "own"]

AVERAGE_METRICS = {
    "cola": "matthews",
    "sst-2": "accuracy",
    "mrpc": "accuracy",
    "sts-b": "spearman",
    "qqp": "accuracy",
    "mnli": "accuracy",
    "qnli": "accuracy",
    "rte": "accuracy",
}
"""The metrics of AVG: the README of google-research/electra, "Expected Results"."""

GLUE_METRICS = {
    "cola": ("matthews",),
    "sst-2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "sts-b": ("pearson", "spearman"),
    "qqp": ("accuracy", "f1"),
    "mnli": ("accuracy", "accuracy_mismatched"),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}
"""The metrics of GLUE: a task's score is the mean of its metrics (A. Wang et al., "GLUE", ICLR 2019, and
gluebenchmark.com)."""

WNLI_MAJORITY = (40, 71)
"""(rows of the larger class, rows) on dev. On test it is 95 of 146, the count behind the leaderboard's 65.1 for
answering 0 to all."""


def average(metrics: TaskMetrics) -> float | None:
    """Return AVG, the mean of eight tasks, one metric each, without WNLI, or None if one is missing."""
    return _mean_of_tasks(metrics, {task: (metric,) for task, metric in AVERAGE_METRICS.items()})


def glue(metrics: TaskMetrics, wnli: Wnli = "majority") -> float | None:
    """Return GLUE, the mean of nine tasks, or None if a metric is missing.

    wnli: count WNLI with the model's own score, or with that of always answering the larger class.
    """
    if wnli == "majority":
        rows, of = WNLI_MAJORITY
        metrics = {**metrics, "wnli": {"accuracy": rows / of}}
    return _mean_of_tasks(metrics, GLUE_METRICS)


def missing_metrics(metrics: TaskMetrics, needed: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the needed metrics that are missing, each as `task metric`."""
    pairs = ((task, metric) for task, names in needed.items() for metric in names)
    return [f"{task} {metric}" for task, metric in pairs if metric not in metrics.get(task, {})]


def _mean_of_tasks(metrics: TaskMetrics, needed: Mapping[str, Sequence[str]]) -> float | None:
    if missing_metrics(metrics, needed):
        return None
    return sum(sum(metrics[task][name] for name in names) / len(names) for task, names in needed.items()) / len(needed)


# --- published scores: `electra_ds/report/published/glue/*.yaml`


class PublishedScores(Section):
    """One row of a table. Every number is in percent, as printed."""

    name: str
    """Its name for `--compare`."""
    model: str
    tasks: dict[str, dict[str, float]] = Field(default_factory=dict)
    """{task: {metric: value}}, under the true metric, which is not always the one in the table's head."""
    std: dict[str, float] = Field(default_factory=dict)
    """The standard deviations of `tasks`, by task."""
    average: float | None = None
    """AVG as printed."""
    average_std: float | None = None
    glue: float | None = None
    """GLUE as printed."""
    glue_std: float | None = None
    column_mean: float | None = None
    """The mean of the eight printed columns, if AVG is not printed or not all columns are at hand."""
    implied: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Values of unprinted metrics that the printed means imply. They are inferred and never shown as published."""
    note: str | None = None


class PublishedTable(Section):
    source: str
    split: Literal["dev", "test"]
    statistic: str
    """The statistic over seeds that a number is, and the number of seeds."""
    not_comparable: list[str] = Field(default_factory=list)
    """The reasons why the numbers cannot be compared with ours."""
    rows: list[PublishedScores]


def published_tables() -> list[PublishedTable]:
    """Return the published tables, in the order of their files' names."""
    folder = importlib.resources.files("electra_ds").joinpath("report", "published", "glue")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return [PublishedTable.model_validate(load_yaml(file.read_text("utf8"), file.name)) for file in files]


def find_published(name: str) -> tuple[PublishedTable, PublishedScores]:
    """Return the row with this name, and its table. Raises ConfigError if there is none."""
    rows = {row.name: (table, row) for table in published_tables() for row in table.rows}
    if name not in rows:
        raise ConfigError(f"No published scores are called {name!r}. The names are: {', '.join(rows)}.")
    return rows[name]


# --- predictions for GLUE's test sets as a zip for gluebenchmark.com

_HEADER = "index\tprediction"
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)
"""A fixed date, so that the same predictions make the same zip."""


SUBMISSION_ROWS = {
    "CoLA.tsv": 1_063, "SST-2.tsv": 1_821, "MRPC.tsv": 1_725, "STS-B.tsv": 1_379, "QQP.tsv": 390_965,
    "MNLI-m.tsv": 9_796, "MNLI-mm.tsv": 9_847, "QNLI.tsv": 5_463, "RTE.tsv": 3_000, "WNLI.tsv": 146, "AX.tsv": 1_104,
}  # fmt: skip
"""The files of a submission, and the number of rows of their test sets."""


def zip_submission(runs: Sequence[Path], out: Path) -> list[str]:
    """Write RUN/submission/*.tsv of all runs into one zip, and return notes on what it holds and what is missing.

    A missing WNLI.tsv is replaced by one that answers 0, the larger class, to all rows. The zip appears complete or not
    at all. Raises ConfigError if two runs have the same file or no run has any, and CheckpointError if a file does not
    have one prediction for each row of its test set, or if the zip cannot be written.
    """
    found, ignored = _find(runs)
    if not found:
        raise ConfigError(
            f"None of {', '.join(map(str, runs)) or 'no runs'} has predictions for a GLUE test set in submission/. "
            f"Predict the test sets when finetuning."
        )
    contents = {name: _checked(path) for name, path in found.items()}
    notes = [f"{path} is not one of GLUE's files and is left out" for path in ignored]
    if "WNLI.tsv" not in contents:
        rows = SUBMISSION_ROWS["WNLI.tsv"]
        contents["WNLI.tsv"] = "\n".join([_HEADER, *(f"{row}\t0" for row in range(rows)), ""]).encode()
        notes.append(f"WNLI.tsv answers 0, the larger class, to all {rows}: no run predicted it")
    _write(out, contents)
    missing = [name for name in SUBMISSION_ROWS if name not in contents]
    status = f"; the site refuses it without {', '.join(missing)}" if missing else "; none is missing"
    return [*notes, f"{out} has {len(contents)} of {len(SUBMISSION_ROWS)} files{status}"]


def _find(runs: Sequence[Path]) -> tuple[dict[str, Path], list[Path]]:
    """Return (GLUE's files by name, other files)."""
    found: dict[str, Path] = {}
    ignored = []
    for run in {path.resolve(): path for path in runs}.values():
        for path in sorted((run / "submission").glob("*.tsv")):
            if path.name not in SUBMISSION_ROWS:
                ignored.append(path)
            elif path.name in found:
                raise ConfigError(
                    f"{found[path.name]} and {path} are the same file of a submission. Give one run for each task."
                )
            else:
                found[path.name] = path
    return found, ignored


def _checked(path: Path) -> bytes:
    """Return the file's content. Raises CheckpointError unless it has a prediction for each row of the test set."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    header, *lines = content.decode("utf8", "replace").removesuffix("\n").split("\n")
    indices, rows = [line.partition("\t")[0] for line in lines], SUBMISSION_ROWS[path.name]
    if header != _HEADER or indices != [str(row) for row in range(rows)]:
        raise CheckpointError(
            f"{path} does not have one prediction for each of the test set's {rows:,} rows, in their order. Predict "
            f"the official test set again."
        )
    return content


def _write(out: Path, contents: dict[str, bytes]) -> None:
    with complete_file(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as file:
        for name in SUBMISSION_ROWS:
            if name in contents:
                entry = zipfile.ZipInfo(name, _ZIP_DATE)
                file.writestr(entry, contents[name], zipfile.ZIP_DEFLATED)
