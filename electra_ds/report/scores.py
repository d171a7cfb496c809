"""The scores of finetuning runs: each task over its seeds, AVG and GLUE, as tables and as CSV. Every number keeps the
unit of what it is made from."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from rich.console import Console
from scipy import stats  # type: ignore[import-untyped]

from electra_ds.core.files import complete_file
from electra_ds.report.glue_score import (
    AVERAGE_METRICS,
    GLUE_METRICS,
    WNLI_MAJORITY,
    PublishedScores,
    PublishedTable,
    TaskMetrics,
    average,
    find_published,
    glue,
    missing_metrics,
    zip_submission,
)
from electra_ds.report.score_files import BOUNDED, Group, ScoredRun, group_runs, read_scores
from electra_ds.report.tables import Line, Table, print_report

PLUS_MINUS = "±: sample standard deviation over finetuning seeds only; that of pretraining is not in it"
BASELINE = (
    "baseline: the score of the same prediction for every row: the set's most frequent class, the mean of its scores, "
    "or, in SQuAD 2.0, no answer"
)
_CONFIDENCE = 0.95
_COLUMNS = (
    "run", "model", "model_fingerprint", "recipe", "recipe_source", "changes", "task", "data_fingerprint", "seed",
    "step", "chosen", "set", "rows", "metric", "value", "baseline",
)  # fmt: skip
_WIDTH = 120
"""The columns of a report as text."""
_ROUNDING = 1e-12
"""Metrics that differ by less are equal."""


@dataclass(frozen=True)
class Spread:
    n: int
    mean: float
    std: float | None
    """Sample standard deviation (n - 1); None for one value, which has none."""
    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return the statistics of a metric over seeds, of which there is at least one."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(len(values), float(np.mean(values)), std, float(np.median(values)), min(values), max(values))


def difference_interval(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95
) -> tuple[float, float | None, float | None]:
    """Return (mean of a - mean of b, low, high), Welch's interval.

    low and high are None where the values tell nothing of their spread: a single value, or only equal ones.
    """
    difference = float(np.mean(a) - np.mean(b))
    if min(len(a), len(b)) < 2 or max(np.ptp(a), np.ptp(b)) < _ROUNDING:
        return difference, None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # one side's values are all equal
        test = stats.ttest_ind(a, b, equal_var=False)
        low, high = (float(bound) for bound in test.confidence_interval(confidence))
    return difference, low, high


@dataclass(frozen=True)
class Report:
    """What runs have come to. `print(report)` shows its tables and the lines between them."""

    parts: list[Table | Line]
    """The tables and lines, in the order in which they are shown."""
    results: pd.DataFrame
    """The numbers that the tables are made from: of a sweep a row for each trial, as in its results.csv; of finetunings
    a row for each metric of each run, as `bin/report --csv` writes it."""

    @property
    def tables(self) -> list[pd.DataFrame]:
        """The tables as they are shown, numbers and their ± as texts."""
        tables = [part for part in self.parts if isinstance(part, Table)]
        return [pd.DataFrame(list(filter(None, each.rows)), columns=each.columns) for each in tables]

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH)
        print_report(self.parts, console)
        return console.file.getvalue()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Mean:
    """AVG or GLUE of a group, as a share."""

    name: str
    by_seed: dict[int, float]
    """Empty unless all its tasks have the same seeds."""
    value: float | None
    """The mean over seeds, or of the tasks' means; None where a metric is missing."""
    baseline: float | None
    """The same mean of the baselines."""
    notes: tuple[str, ...]


def report_scores(
    runs: Sequence[Path], *, compare: Sequence[str] = (), csv: Path | None = None, submission: Path | None = None
) -> Report:
    """Return the tables of finetuning runs' scores.json, a table for each model and recipe in the order of the runs;
    `compare` names published scores to show next to them.

    `csv` is a file that gets every run's metrics, `submission` a zip that gets their predictions of GLUE's test sets.
    Raises ConfigError if the runs do not fit together or nothing is published under that name, and CheckpointError
    where one has no scores, its predictions are broken, or a file cannot be written.
    """
    published = [find_published(name) for name in compare]
    scored, notes = read_scores(runs)
    groups = group_runs(scored)
    parts: list[Table | Line] = []
    for group in groups:
        parts.append(group_table(group, [row for _, row in published]))
        parts += _lines([note for mean in _glue_means(group) for note in mean.notes] + _group_notes(group))
        parts += [Line(text, is_warning=True) for text in _warnings(group)]
    if len(groups) == 2 and (differences := difference_table(*groups)).rows:
        parts.append(differences)
    elif len(groups) > 2:
        notes = [*notes, "Differences are of two tables: give the runs of two models or recipes alone"]
    legend = [PLUS_MINUS, BASELINE] if any(row.baselines for group in groups for row in _rows(group)) else [PLUS_MINUS]
    parts += _lines([*notes, *legend, *(note for found in published for note in _published_notes(*found))])
    results = _every_metric(scored)
    if csv is not None:
        with complete_file(csv) as temporary:
            results.to_csv(temporary, index=False, lineterminator="\n")
        parts += _lines([f"{csv}: every metric of every run"])
    if submission is not None:
        parts += _lines(zip_submission([run.path for run in scored], submission))
    return Report(parts, results)


def means(group: Group) -> list[Mean]:
    """Return AVG, GLUE, and if WNLI was finetuned, GLUE with the model's own."""
    of_average = {task: (metric,) for task, metric in AVERAGE_METRICS.items()}
    without_wnli = {task: names for task, names in GLUE_METRICS.items() if task != "wnli"}
    rows, of = WNLI_MAJORITY
    counted = f"majority class, {rows} of {of} on dev = {100 * rows / of:.2f}"
    found = [
        _mean(group, "AVG", of_average, average),
        _mean(group, "GLUE", without_wnli, glue, f"GLUE on dev counts WNLI as {counted}"),
    ]
    if "wnli" in group.tasks:
        own = partial(glue, wnli="own")
        note = "GLUE, own WNLI on dev counts WNLI as the model's own"
        found.append(_mean(group, "GLUE, own WNLI", GLUE_METRICS, own, note))
    return found


def _mean(
    group: Group,
    name: str,
    needed: Mapping[str, Sequence[str]],
    score: Callable[[TaskMetrics], float | None],
    *notes: str,
) -> Mean:
    baseline = score(group.baselines())
    if missing := missing_metrics(group.means(), needed):
        return Mean(name, {}, None, baseline, (f"{name} lacks {', '.join(missing)}",))
    seeds = group.seeds(next(iter(needed)))
    if all(group.seeds(task) == seeds for task in needed):
        by_seed = {seed: value for seed in sorted(seeds) if (value := score(group.of_seed(seed))) is not None}
        return Mean(name, by_seed, sum(by_seed.values()) / len(by_seed), baseline, notes)
    note = f"{name} is made from the tasks' means, and has no ±: their seeds differ"
    return Mean(name, {}, score(group.means()), baseline, (*notes, note))


def group_table(group: Group, published: Sequence[PublishedScores]) -> Table:
    """Return a row for each metric of each set, and AVG and GLUE below, next to published scores."""
    rows = _rows(group)
    has_baselines = any(row.baselines for row in rows)
    columns = ["mean ± std", *(["baseline"] if has_baselines else []), "n", "median", "min–max"]
    columns = ["task", "metric", *columns, *(row.name for row in published)]
    table = Table(f"{group.name}, recipe {group.recipe}", columns, text_columns=2)
    for task, name, metric, values, baselines in rows:
        scale = 100 if metric in BOUNDED else 1
        first, *cells = _spread_cells(spread(values), scale)
        if has_baselines:
            cells = [_scaled(float(np.mean(baselines)) if baselines else None, scale), *cells]
        label = task if name == "dev" else f"{task} ({name.removeprefix('dev_')})"
        theirs = [_their_cell(row, task, name, metric) for row in published]
        table.rows.append([label, metric, first, *cells, *theirs])
    table.rows.append([])
    for mean in _glue_means(group):
        first, *cells = _mean_cells(mean)
        if has_baselines:
            cells = [_scaled(mean.baseline, 100), *cells]
        table.rows.append([mean.name, "", first, *cells, *(_their_mean(row, mean.name) for row in published)])
    return table


def _glue_means(group: Group) -> list[Mean]:
    """Return the means of a group that has tasks of GLUE."""
    return means(group) if set(group.tasks) & set(GLUE_METRICS) else []


class _Row(NamedTuple):
    """One metric of one set over seeds."""

    task: str
    set: str
    metric: str
    values: list[float]
    baselines: list[float]
    """Of the same seeds; empty where they are not recorded."""


def _rows(group: Group) -> list[_Row]:
    """Return the metrics of a group, GLUE's tasks first and in its order."""
    order = list(GLUE_METRICS)
    found: dict[tuple[str, str, str], _Row] = {}
    for task in sorted(group.tasks, key=lambda task: (order.index(task) if task in order else len(order), task)):
        for run in group.tasks[task].values():
            for name, scored in run.scores.sets.items():
                for metric, value in scored.metrics.items():
                    row = found.setdefault((task, name, metric), _Row(task, name, metric, [], []))
                    row.values.append(value)
                    row.baselines.extend([scored.baseline[metric]] if metric in scored.baseline else [])
    return list(found.values())


def _warnings(group: Group) -> list[str]:
    """Return the warnings of a group's runs, each once, with its task and seeds."""
    seeds: dict[tuple[str, str], list[int]] = {}
    for task, runs in group.tasks.items():
        for seed, run in runs.items():
            for text in run.scores.warnings:
                seeds.setdefault((task, text), []).append(seed)
    return [
        f"{task}, seed{'s' if len(those) > 1 else ''} {', '.join(map(str, those))}: {text}"
        for (task, text), those in seeds.items()
    ]


def _scaled(value: float | None, scale: int) -> str:
    return "–" if value is None else f"{scale * value:.2f}"


def _spread_cells(found: Spread, scale: int) -> tuple[str, str, str, str]:
    std = f" ± {scale * found.std:.2f}" if found.std is not None else ""
    return (
        f"{scale * found.mean:.2f}{std}", str(found.n), f"{scale * found.median:.2f}",
        f"{scale * found.low:.2f}–{scale * found.high:.2f}",
    )  # fmt: skip


def _mean_cells(mean: Mean) -> tuple[str, str, str, str]:
    if mean.by_seed:
        return _spread_cells(spread(list(mean.by_seed.values())), 100)
    return f"{100 * mean.value:.2f}" if mean.value is not None else "–", "–", "–", "–"


def _their_cell(theirs: PublishedScores, task: str, name: str, metric: str) -> str:
    """Return the published value of the very same metric on the development set."""
    value = theirs.tasks.get(task, {}).get(metric) if name in ("dev", "dev_matched") else None
    return _published_cell(value, theirs.std.get(task))


def _their_mean(theirs: PublishedScores, name: str) -> str:
    printed = {"AVG": (theirs.average, theirs.average_std), "GLUE": (theirs.glue, theirs.glue_std)}
    return _published_cell(*printed.get(name, (None, None)))


def _published_cell(value: float | None, std: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:g}" + (f" ± {std:g}" if std is not None else "")


def _published_notes(table: PublishedTable, row: PublishedScores) -> list[str]:
    head = f"{row.name}: {row.model}. {table.source}. On {table.split}; {table.statistic}"
    lacks = [f"not comparable in {row.name}: {what}" for what in table.not_comparable]
    if row.average is None and row.column_mean is not None:
        lacks.append(f"{row.name} prints no AVG; its eight columns have the mean {row.column_mean:g}")
    return [head, *lacks, *([f"{row.name}: {row.note}"] if row.note is not None else [])]


def _group_notes(group: Group) -> list[str]:
    """Return notes on what keeps the seeds of a task from being repetitions of one experiment."""
    notes = []
    for task, runs in group.tasks.items():
        scores = [run.scores for run in runs.values()]
        chosen = sorted({found.chosen for found in scores})
        if chosen != ["last"]:
            notes.append(
                f"{task} is scored at: {', '.join(chosen)}; the best of several is above what the last one has"
            )
        if len({found.data_fingerprint for found in scores}) > 1:
            notes.append(f"{task} was finetuned on data that differ between seeds")
        if chosen == ["last"] and len({found.step for found in scores}) > 1:
            notes.append(f"{task} ended at steps that differ between seeds")
        measured = {tuple((name, *part.metrics) for name, part in each.sets.items() if part.metrics) for each in scores}
        if len(measured) > 1:
            notes.append(f"{task} has sets or metrics that some seeds lack; n counts those that have one")
    return notes


def difference_table(first: Group, second: Group) -> Table:
    """Return the difference of each metric of a development set, and of the means, in points of percent."""
    table = Table(
        "Difference, points of percent", ["", "difference", "interval"],
        caption=f"First minus second table, with Welch's interval ({_CONFIDENCE:.0%}) over finetuning seeds where each "
        f"has two.",
    )  # fmt: skip
    others = _compared(second)
    for name, ours in _compared(first).items():
        if ours and (theirs := others.get(name)):
            points = [100 * value for value in ours], [100 * value for value in theirs]
            difference, low, high = difference_interval(*points, _CONFIDENCE)
            interval = f"{low:+.2f} to {high:+.2f}" if low is not None and high is not None else "–"
            table.rows.append([name, f"{difference:+.2f}", interval])
    return table


def _compared(group: Group) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for task, name, metric, values, _ in _rows(group):
        if name.startswith("dev"):
            scale = 1.0 if metric in BOUNDED else 0.01  # points of percent, or the metric's own unit
            part = name.removeprefix("dev").replace("_", " ")
            found[f"{task}{part} {metric}"] = [scale * value for value in values]
    return found | {mean.name: list(mean.by_seed.values()) for mean in means(group)[:2]}


def _every_metric(runs: Sequence[ScoredRun]) -> pd.DataFrame:
    """Return a row for each metric of each run, values as in scores.json."""
    records = [
        {"run": run.path, "set": name, "rows": part.rows, "metric": metric, "value": value}
        | {"baseline": part.baseline.get(metric), "changes": ", ".join(run.scores.changes)}
        | run.scores.model_dump(exclude={"format", "sets", "changes"})
        for run in runs
        for name, part in run.scores.sets.items()
        for metric, value in part.metrics.items()
    ]
    return pd.DataFrame(records, columns=_COLUMNS)


def _lines(texts: Sequence[str]) -> list[Line]:
    return [Line(f"{text}.") for text in texts]
