"""Report the scores of finetuning runs as tables and CSV: each task over its seeds, AVG and GLUE. Every number keeps
the unit of its inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

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
from electra_ds.report.tables import Line, Report, Table

PLUS_MINUS = "±: sample standard deviation over finetuning seeds only, without the spread of pretraining"
BASELINE = (
    "baseline: the score of one prediction for every row: the set's most frequent class (for F1 the positive one), the "
    "mean of its scores, the set of classes with the highest micro F1 (multi-label), no answer (SQuAD 2.0), or a "
    "random ranking (retrieval)"
)
_CONFIDENCE = 0.95
_COLUMNS = (
    "run", "model", "model_fingerprint", "recipe", "recipe_source", "changes", "task", "data_fingerprint", "seed",
    "step", "chosen", "set", "rows", "metric", "value", "baseline",
)  # fmt: skip
_ROUNDING = 1e-12
"""Metrics that differ by less than this are equal."""


@dataclass(frozen=True)
class Spread:
    n: int
    mean: float
    std: float | None
    """The sample standard deviation (n - 1); None for a single value."""
    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return the statistics of a metric over one or more seeds."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(len(values), float(np.mean(values)), std, float(np.median(values)), min(values), max(values))


def difference_interval(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95
) -> tuple[float, float | None, float | None]:
    """Return (mean of a - mean of b, low, high) with Welch's interval.

    low and high are None if the spread is unknown, because a sample has one value or only equal ones.
    """
    # Importing it takes half a second, and few reports compare two samples.
    from scipy import stats  # type: ignore[import-untyped]

    difference = float(np.mean(a) - np.mean(b))
    if min(len(a), len(b)) < 2 or max(np.ptp(a), np.ptp(b)) < _ROUNDING:
        return difference, None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # if all values of one side are equal
        test = stats.ttest_ind(a, b, equal_var=False)
        low, high = (float(bound) for bound in test.confidence_interval(confidence))
    return difference, low, high


@dataclass(frozen=True)
class Mean:
    """AVG or GLUE of a group, as a share."""

    name: str
    by_seed: dict[int, float]
    """The mean for each seed, empty unless all tasks have the same seeds."""
    value: float | None
    """The mean over seeds, or over the tasks' means; None if a metric is missing."""
    baseline: float | None
    """The same mean of the baselines."""
    notes: tuple[str, ...]


def report_scores(
    runs: Sequence[Path], *, compare: Sequence[str] = (), csv: Path | None = None, submission: Path | None = None
) -> Report:
    """Return tables of finetuning runs' scores.json, one for each model and recipe, in the order of the runs.

    compare: names of published scores to show next to them. csv: a file to write every run's metrics to. submission: a
    zip to write their predictions for GLUE's test sets to. Raises ConfigError if the runs do not fit together or no
    published scores have such a name, and CheckpointError if a run has no scores or broken predictions, or if a file
    cannot be written.
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
        notes = [*notes, "Differences need exactly two tables: give the runs of only two models or recipes"]
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
    """Return AVG, GLUE and, if WNLI was finetuned, GLUE with the model's own WNLI."""
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
    note = f"{name} is the mean of the tasks' means and has no ±, because their seeds differ"
    return Mean(name, {}, score(group.means()), baseline, (*notes, note))


def group_table(group: Group, published: Sequence[PublishedScores]) -> Table:
    """Return a table with a row for each metric of each set, then AVG and GLUE, next to published scores."""
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
    """Return the means of a group that has GLUE tasks."""
    return means(group) if set(group.tasks) & set(GLUE_METRICS) else []


class _Row(NamedTuple):
    """One metric of one set over the seeds."""

    task: str
    set: str
    metric: str
    values: list[float]
    baselines: list[float]
    """The baselines of the same seeds, empty if they are not recorded."""


def _rows(group: Group) -> list[_Row]:
    """Return the metrics of a group, GLUE's tasks first and in GLUE's order."""
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
    """Return each warning of a group's runs once, with its task and seeds."""
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
        f"{scale * found.mean:.2f}{std}",
        str(found.n),
        f"{scale * found.median:.2f}",
        f"{scale * found.low:.2f}–{scale * found.high:.2f}",
    )


def _mean_cells(mean: Mean) -> tuple[str, str, str, str]:
    if mean.by_seed:
        return _spread_cells(spread(list(mean.by_seed.values())), 100)
    return f"{100 * mean.value:.2f}" if mean.value is not None else "–", "–", "–", "–"


def _their_cell(theirs: PublishedScores, task: str, name: str, metric: str) -> str:
    """Return the published value of exactly the same metric on the development set."""
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
        lacks.append(f"{row.name} prints no AVG; the mean of its eight columns is {row.column_mean:g}")
    return [head, *lacks, *([f"{row.name}: {row.note}"] if row.note is not None else [])]


def _group_notes(group: Group) -> list[str]:
    """Return notes on differences between a task's seeds that make them more than repetitions of one experiment."""
    notes = []
    for task, runs in group.tasks.items():
        scores = [run.scores for run in runs.values()]
        chosen = sorted({found.chosen for found in scores})
        if chosen != ["last"]:
            notes.append(
                f"{task} is scored at: {', '.join(chosen)}; the best of several evaluations is above the last one"
            )
        if len({found.data_fingerprint for found in scores}) > 1:
            notes.append(f"{task} was finetuned on data that differ between seeds")
        if chosen == ["last"] and len({found.step for found in scores}) > 1:
            notes.append(f"{task} ended at steps that differ between seeds")
        measured = {tuple((name, *part.metrics) for name, part in each.sets.items() if part.metrics) for each in scores}
        if len(measured) > 1:
            notes.append(f"{task} has sets or metrics that some seeds lack; n counts the seeds that have them")
    return notes


def difference_table(first: Group, second: Group) -> Table:
    """Return a table of differences, in percentage points, of each development metric and of the means."""
    table = Table(
        "Difference, percentage points",
        ["", "difference", "interval"],
        caption=f"First minus second table, with Welch's interval ({_CONFIDENCE:.0%}) over finetuning seeds if each "
        f"has two.",
    )
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
            scale = 1.0 if metric in BOUNDED else 0.01  # percentage points, or the metric's own unit
            part = name.removeprefix("dev").replace("_", " ")
            found[f"{task}{part} {metric}"] = [scale * value for value in values]
    return found | {mean.name: list(mean.by_seed.values()) for mean in means(group)[:2]}


def _every_metric(runs: Sequence[ScoredRun]) -> pd.DataFrame:
    """Return a row for each metric of each run, with values as in scores.json."""
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
