"""Compute the results of a sweep from its folder: a row for each trial, cells over seeds, tables and pictures."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from matplotlib import colormaps
from matplotlib.figure import Figure

from electra_ds.config.plugins import find_objective
from electra_ds.config.run_record import Record
from electra_ds.config.values import dotted_values
from electra_ds.core.errors import CheckpointError
from electra_ds.core.files import complete_file
from electra_ds.core.program import command
from electra_ds.report.glue_score import AVERAGE_METRICS, average, glue
from electra_ds.report.score_files import BOUNDED, Scores, read_run
from electra_ds.report.scores import BASELINE, PLUS_MINUS, spread
from electra_ds.report.tables import Line, Report, Table
from electra_ds.sweep.folder import (
    ENDED_EARLY,
    STOPPED_AT,
    SUCCEEDED,
    MetricsTail,
    State,
    SweepFolder,
    as_result,
    evaluations_of,
)
from electra_ds.sweep.options import SCORE
from electra_ds.sweep.spec import SweepSpec
from electra_ds.sweep.trials import Trial, trials_text, value_text

SEEDS = ("seed", "pretrain.seed")
_NESTED = (
    "±: sample standard deviation over pretraining seeds of the means over their finetuning seeds; within: the mean "
    "standard deviation over finetuning seeds"
)
_LONG_NAME = 12
"""The length above which the name of a column is broken at its underscores."""


# --- a row for each trial


def results(folder: SweepFolder, trials: Sequence[Trial]) -> pd.DataFrame:
    """Return a row for each trial, started or not.

    It has the trial's values, state, hardware, time and cost, its metrics as `metric.NAME`, its options as
    `option.NAME`, and its resolved recipe as `recipe.KEY`.
    """
    values = dict.fromkeys(name for trial in trials for name in trial.values)
    rows = [_row(folder, trial) for trial in trials]
    others = dict.fromkeys(name for row in rows for name in row)
    return pd.DataFrame(
        rows, columns=list({"trial": None, "stage": None} | values | {"state": None, "reason": None} | others)
    )


def _row(folder: SweepFolder, trial: Trial) -> dict[str, Any]:
    files, (state, reason) = folder.trial(trial.key), folder.state_of(trial)
    run, record = files.run, files.record()
    row: dict[str, Any] = {"trial": trial.key, "stage": trial.stage}
    row |= {name: _plain(value) for name, value in trial.values.items()} | {"state": state, "reason": reason}
    scores: Scores | None = None
    with contextlib.suppress(CheckpointError):
        scores = read_run(run.path).scores if trial.stage == "finetune" and state != "stopped" else None
    metrics = _metrics(run.path, trial, state, scores)
    row |= {f"metric.{name}": value for name, value in metrics.items()}
    if scores is not None:
        row |= {f"baseline.{name}": value for name, value in scores.dev_baselines().items()}
        row |= {"warning": "; ".join(scores.warnings)} if scores.warnings else {}
    if state == "done" and not metrics:
        row["reason"] = "it is done, but its scores cannot be read"
    if record is not None:
        worker_hours = record.seconds * record.workers / 3600
        row |= {
            "seconds": round(record.seconds, 1),
            "attempts": len(record.attempts),
            "workers": record.workers,
            "cpu_hours": round(worker_hours * record.cpus, 4),
            "gpu_hours": round(worker_hours * record.gpus, 4),
            "command": " ".join(record.command),
        }
    row |= {name: value for name, value in run.status_details().items() if name == "collapsed_at"}
    with contextlib.suppress(CheckpointError):
        own = run.read_record(Record)
        row |= {"device": own.device, "world_size": own.world_size, "threads": own.threads}
    row |= {f"option.{key}": _plain(value) for key, value in trial.options.items() if value is not None}
    row |= {f"recipe.{key}": _plain(value) for key, value in dotted_values(trial.recipe.model_dump(mode="json"))}
    return row | {"run": str(run.path)}


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _metrics(path: Path, trial: Trial, state: State, scores: Scores | None) -> dict[str, float]:
    """Return a finetuning's scores on the development sets, with the first as `score`.

    For a pretraining, or a finetuning that a scheduler has ended, return the last evaluation.
    """
    if trial.stage == "pretrain" or state == "stopped":
        evaluations = evaluations_of(path / "metrics.jsonl")
        last = as_result(trial.stage, evaluations[-1]) if evaluations else {}
        objective = getattr(trial.recipe, "objective", None)  # a finetuning has none
        return last if objective is None else dict(find_objective(objective).complete(last))
    found = {} if scores is None else scores.dev_metrics()
    return {"step": scores.step, SCORE: next(iter(found.values()))} | found if scores is not None and found else {}


# --- cells over their seeds


def cells(table: pd.DataFrame, stage: str, metrics: Sequence[str]) -> pd.DataFrame:
    """Return the statistics of each metric over the seeds of each cell of a stage.

    They are n, mean, sample standard deviation, median, lowest, highest, and `baseline`, the score of one prediction
    for every row. If a cell has several pretraining seeds, `std` is that of their means, `n` their number, and
    `std_finetuning` the mean standard deviation over the finetuning seeds of one pretraining.
    """
    of_stage = table[table["stage"] == stage]
    ended = of_stage[of_stage["state"].isin(SUCCEEDED) & (of_stage["reason"] != ENDED_EARLY)]
    is_nested = "pretrain.seed" in of_stage and of_stage["pretrain.seed"].nunique() > 1
    axes = axes_of(table, stage)
    found = []
    for cell, group in ended.groupby(axes, dropna=False, sort=False) if axes else [((), ended)]:
        named = dict(zip(axes, cell if isinstance(cell, tuple) else (cell,), strict=True))
        for metric in metrics:
            column = f"metric.{metric}"
            known = group.dropna(subset=column) if column in group else group[:0]
            if known.empty:
                continue
            row = named | {"metric": metric} | _over_seeds(known, column, is_nested=is_nested)
            if f"baseline.{metric}" in group:
                row["baseline"] = float(group[f"baseline.{metric}"].mean())
            found.append(row)
    return pd.DataFrame(found)


def _over_seeds(group: pd.DataFrame, column: str, *, is_nested: bool) -> dict[str, Any]:
    values, more = list(group[column]), {}
    over = spread(values)
    if is_nested:
        by_pretraining = [spread(list(each)) for _, each in group.groupby("pretrain.seed")[column]]
        within = [each.std for each in by_pretraining if each.std is not None]
        over = spread([each.mean for each in by_pretraining])
        more = {"std_finetuning": sum(within) / len(within) if within else None, "runs": len(values)}
    return {
        "n": over.n,
        "mean": over.mean,
        "std": over.std,
        "median": over.median,
        "low": min(values),
        "high": max(values),
    } | more


def axes_of(table: pd.DataFrame, stage: str) -> list[str]:
    """Return the columns that vary over a stage's trials, except the seeds."""
    of_stage = table[table["stage"] == stage]
    columns = list(of_stage.columns)
    names = [name for name in columns[2 : columns.index("state")] if name not in SEEDS]
    return [name for name in names if of_stage[name].notna().any()]


def write_results(table: pd.DataFrame, over_seeds: pd.DataFrame, folder: Path) -> None:
    """Write results.csv, results.parquet and cells.csv. Raises CheckpointError if they cannot be written."""
    with complete_file(folder / "results.csv") as path:
        table.to_csv(path, index=False)
    with complete_file(folder / "results.parquet") as path:
        table.assign(**dict(_unmixed(table))).to_parquet(path, index=False)
    with complete_file(folder / "cells.csv") as path:
        over_seeds.to_csv(path, index=False)


def _unmixed(table: pd.DataFrame) -> Iterator[tuple[str, pd.Series]]:
    """Yield the columns with values of several types, which Parquet cannot hold, as text."""
    for name in table:
        if table[name].dtype == object and len({type(value) for value in table[name].dropna()}) > 1:
            texts = [value if isinstance(value, str) or pd.isna(value) else json.dumps(value) for value in table[name]]
            yield name, pd.Series(texts, table.index, object)


# --- the report


def report_sweep(
    folder: SweepFolder, trials: Sequence[Trial], spec: SweepSpec, *, is_running: bool = False, has_more: bool = False
) -> Report:
    """Write results.csv, results.parquet, cells.csv and the pictures, and return the tables and how to resume.

    has_more: True if more remains to run than these trials.
    """
    table = results(folder, trials)
    parts: list[Table | Line] = list(_states(table))
    found = {}
    for stage in spec.stages:
        found[stage] = _ordered(cells(table, stage, _shown_metrics(table, stage, spec)), table, stage, spec)
        parts += _of_stage(found[stage], table, stage, spec)
    rows = [row | {"stage": stage} for stage, each in found.items() for row in each.to_dict("records")]
    write_results(table, pd.DataFrame(rows), folder.path)
    pictures = ""
    if spec.pretrain is not None:
        pictures = ", curves.png"
        draw_capacity(table, folder.path / "curves.png")
    if others := {record.key for record in folder.records()} - {trial.key for trial in trials}:
        parts.append(Line(f"{len(others)} more trials in this folder have other settings and are not in these tables."))
    parts.append(Line(f"{folder.path}: results.csv, results.parquet, cells.csv{pictures}."))
    if is_running:
        for trial in trials:
            if folder.state_of(trial)[0] == "unfinished":
                lines = MetricsTail(folder.trial(trial.key).run.metrics).lines()
                step = f", at step {lines[-1]['step']:,}" if lines else ""
                parts.append(Line(f"begun: {trial.label}{step}."))
        parts.append(Line("The sweep is running."))
    else:
        parts += _how_to_resume(folder, table, has_more=has_more)
    return Report(parts, table)


def _of_stage(found: pd.DataFrame, table: pd.DataFrame, stage: str, spec: SweepSpec) -> Iterator[Table | Line]:
    """Yield a stage's table, and lines that explain its columns."""
    if found.empty:
        return
    shown = found[found["metric"] != SCORE]  # it repeats the first of the others
    axes, title = axes_of(table, stage), _title(stage, spec)
    if stage == "finetune" and "task" in axes:
        yield task_table(shown, table, [axis for axis in axes if axis != "task"], title)
    else:
        yield cell_table(shown, axes, title)
    if shown["std"].notna().any():
        of_finetuning = _NESTED if "std_finetuning" in shown else PLUS_MINUS
        yield Line(f"{of_finetuning if stage == 'finetune' else '±: sample standard deviation over seeds'}.")
    if "baseline" in shown:
        yield Line(f"{BASELINE}.")


def _states(table: pd.DataFrame) -> Iterator[Line]:
    """Yield the number of trials in each state, and the reason of each failure."""
    named = table["state"].mask(table["reason"].str.startswith(STOPPED_AT, na=False), "stopped as planned")
    named = named.mask(table["reason"] == ENDED_EARLY, ENDED_EARLY)
    counts = [f"{count} {state}" for state, count in named.value_counts().items()]
    yield Line(f"{', '.join(counts)} of {trials_text(len(table))}." if counts else "0 trials.")
    for _, row in table[table["state"].isin(["failed", "collapsed", "done"]) & (table["reason"] != "")].iterrows():
        yield Line(f"{row['trial']} {row['state']}: {row['reason'].rstrip('.')}.")
    for _, row in (table.dropna(subset="warning") if "warning" in table else table[:0]).iterrows():
        yield Line(f"{row['trial']}: {row['warning']}", is_warning=True)


def _how_to_resume(folder: SweepFolder, table: pd.DataFrame, *, has_more: bool) -> Iterator[Line]:
    is_waiting, has_failed = table["state"] == "waiting", (table["state"] == "failed").any()
    can_begin = (table["state"] == "unfinished") | (is_waiting & (table["reason"] == ""))
    resume = f"{command('sweep')} --resume {folder.path}"
    if has_more or can_begin.any() or (is_waiting.any() and not has_failed):
        yield Line("Resume it with:", command=resume)
    if has_failed:
        yield Line("Run what failed again:", command=f"{resume} --retry-failed")


def _shown_metrics(table: pd.DataFrame, stage: str, spec: SweepSpec) -> list[str]:
    """Return the metrics to show: a pretraining's key metrics by its objective, or all of a finetuning's.

    The sweep's own metric comes first, with the one that it is compared with.
    """
    of_stage = table[table["stage"] == stage].dropna(axis=1, how="all")
    there = [name.removeprefix("metric.") for name in of_stage.columns if name.startswith("metric.")]
    objectives = _objectives(of_stage)
    shown = [name for name in there if any(name in objective.key_metrics for objective in objectives)]
    if stage == "finetune":
        shown = [name for name in there if name not in ("step", SCORE)]
    first = [spec.metric.name] if spec.metric is not None and spec.metric.name in there else []
    first += [objective.baselines[name] for objective in objectives for name in first if name in objective.baselines]
    return first + [name for name in shown if name not in first]


def _objectives(table: pd.DataFrame) -> list[Any]:
    """Return the objective classes of the pretrainings in a table."""
    names = table["recipe.objective"].dropna().unique() if "recipe.objective" in table else []
    return [find_objective(name) for name in names]


def _ordered(found: pd.DataFrame, table: pd.DataFrame, stage: str, spec: SweepSpec) -> pd.DataFrame:
    """Return the last stage's cells from best to worst, if the sweep has a metric and does not vary tasks."""
    axes = axes_of(table, stage)
    if spec.metric is None or found.empty or not axes or "task" in axes or stage != spec.last_stage:
        return found
    own = found[found["metric"] == spec.metric.name].set_index(axes)["mean"]
    place = own.rank(ascending=spec.metric.mode == "min", method="first")
    keys = found.set_index(axes).index.map(place)
    return found.assign(place=keys).sort_values("place", kind="stable").drop(columns="place")


def _title(stage: str, spec: SweepSpec) -> str:
    """Return a title: the stage, its recipe, and the number of examples if it is limited."""
    options = spec.stages[stage].options
    recipe, most = options.get("recipe"), options.get("max_train_examples")
    parts = [stage, f"recipe {Path(recipe).stem}" if isinstance(recipe, str) else ""]
    return ", ".join(filter(None, [*parts, f"{most} training examples" if most is not None else ""]))


def cell_table(found: pd.DataFrame, axes: Sequence[str], title: str) -> Table:
    """Return a table with a row for each metric of each cell."""
    optional = {"within": "std_finetuning", "baseline": "baseline"}
    columns = ["mean ± std", "within", "baseline", "n", "min–max"]
    columns = [column for column in columns if optional.get(column, "mean") in found]
    shown = Table(title, [*map(_header, axes), "metric", *columns], text_columns=len(axes) + 1)
    for _, row in found.iterrows():
        values = {
            "mean ± std": _mean(row),
            "within": _number(row, "std_finetuning"),
            "n": str(row["n"]),
            "baseline": _number(row, "baseline"),
            "min–max": f"{_number(row, 'low')}–{_number(row, 'high')}",
        }
        shown.rows.append([*(_text(row[axis]) for axis in axes), row["metric"], *(values[name] for name in columns)])
    return shown


def task_table(found: pd.DataFrame, table: pd.DataFrame, axes: list[str], title: str) -> Table:
    """Return a table with a row per cell and a column per task, as in papers, with GLUE's means if it has all tasks."""
    firsts = {
        task: AVERAGE_METRICS.get(task, of_task["metric"].iloc[0])
        for task, of_task in found.groupby("task", sort=False)
    }
    groups = [group for _, group in found.groupby(axes, sort=False, dropna=False)] if axes else [found]
    runs = [_runs_of(group.iloc[0], table, axes) for group in groups]
    means = [_glue_means(of_cell) for of_cell in runs]
    names = [name for name in ("AVG", "GLUE") if any(name in each for each in means)]
    has_baseline = "baseline" in found
    labels = [*map(_header, axes)] or ([""] if has_baseline else [])
    tasks = [f"{task}\n{metric}" for task, metric in firsts.items()]
    shown = Table(title, [*labels, *tasks, *names, "n"], text_columns=len(labels))
    for group, mean in zip(groups, means, strict=True):
        first = group[group["metric"] == group["task"].map(firsts)].set_index("task")
        scores = [_mean(first.loc[task]) if task in first.index else "" for task in firsts]
        number = "–".join(dict.fromkeys(map(str, (first["n"].min(), first["n"].max()))))
        head = [_text(group.iloc[0][axis]) for axis in axes] or ["mean"] * len(labels)
        shown.rows.append([*head, *scores, *(mean.get(name, "") for name in names), number])
    if has_baseline:
        by_task = found[found["metric"] == found["task"].map(firsts)].drop_duplicates("task").set_index("task")
        scores = [_number(by_task.loc[task], "baseline") for task in firsts]
        baseline = _avg_and_glue(runs[0].drop_duplicates("task"), "baseline.")
        cells_of_means = [f"{baseline[name]:.2f}" if name in baseline else "" for name in names]
        shown.rows += [[], ["baseline", *[""] * (len(labels) - 1), *scores, *cells_of_means, ""]]
    return shown


def _runs_of(cell: pd.Series, table: pd.DataFrame, axes: list[str]) -> pd.DataFrame:
    runs = table[(table["stage"] == "finetune") & table["state"].isin(SUCCEEDED)]
    for axis in axes:
        runs = runs[runs[axis].isna() if pd.isna(cell[axis]) else runs[axis] == cell[axis]]
    return runs


def _glue_means(runs: pd.DataFrame) -> dict[str, str]:
    """Return the original's mean of eight tasks and GLUE's of nine, over the seeds that have all of them.

    With several pretraining seeds, they are taken over the means of each.
    """
    keys = [name for name in ("pretrain.seed", "seed") if name in runs]
    by_seed = pd.DataFrame(
        [
            dict(zip(keys, seeds, strict=True)) | _avg_and_glue(of_seed, "metric.")
            for seeds, of_seed in runs.groupby(keys)
        ]
    )
    if "pretrain.seed" in by_seed and by_seed["pretrain.seed"].nunique() > 1:
        by_seed = by_seed.groupby("pretrain.seed").mean()
    found = {}
    for name in ("AVG", "GLUE"):
        if name in by_seed and (values := list(by_seed[name].dropna())):
            over = spread(values)
            found[name] = f"{over.mean:.2f}" + (f" ± {over.std:.2f}" if over.std is not None else "")
    return found


def _avg_and_glue(of_tasks: pd.DataFrame, prefix: str) -> dict[str, float]:
    """Return AVG and GLUE in percent, if the columns with this prefix have all tasks. of_tasks: a row per task."""
    names = [name for name in of_tasks if name.startswith(prefix)]
    scores = {
        row["task"]: {name.removeprefix(prefix): float(row[name]) for name in names if pd.notna(row[name])}
        for _, row in of_tasks.iterrows()
    }
    means = {"AVG": average(scores), "GLUE": glue(scores)}
    return {name: 100 * value for name, value in means.items() if value is not None}


def _header(axis: str) -> str:
    name = axis.rpartition(".")[2]
    return name.replace("_", "_\n") if len(name) > _LONG_NAME else name


def _mean(row: pd.Series) -> str:
    return _number(row, "mean") + (f" ± {_number(row, 'std')}" if pd.notna(row["std"]) else "")


def _number(row: pd.Series, name: str) -> str:
    scale, digits = (100, 2) if row["metric"] in BOUNDED else (1, 4)
    return f"{scale * row[name]:.{digits}f}" if name in row and pd.notna(row[name]) else ""


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return ""
    text = value_text(value)
    return Path(text).name if "/" in text and Path(text).exists() else text


# --- pictures


def draw_capacity(table: pd.DataFrame, path: Path) -> None:
    """Draw the key metrics of every pretraining on held-out text over its steps, as in the study's figure 2.

    A cross marks where training has collapsed. Seeds of one cell share a colour.
    """
    pretrained, axes = table[table["stage"] == "pretrain"], axes_of(table, "pretrain")
    labels = [
        ", ".join(f"{axis.rpartition('.')[2]} {_text(row[axis])}" for axis in axes) or "pretraining"
        for _, row in pretrained.iterrows()
    ]
    known = list(dict.fromkeys(labels))
    colours = dict(zip(known, colormaps["viridis"](np.linspace(0, 0.9, len(known))), strict=True))
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    titles = {
        name: objective.metric_labels[name] for objective in _objectives(pretrained) for name in objective.key_metrics
    }
    panels = figure.subplots(1, max(1, len(titles)), squeeze=False)[
        0
    ]  # a single empty one before any trial has started
    for label, (_, row) in zip(labels, pretrained.iterrows(), strict=True):
        lines = evaluations_of(Path(row["run"]) / "metrics.jsonl")
        for panel, name in zip(panels, titles, strict=False):
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                steps, values = np.array(points).T
                panel.plot(steps, values, color=colours[label], marker="o", markersize=2.5, linewidth=1.2, label=label)
            if points and pd.notna(at := row.get("collapsed_at")):
                height = np.interp(at, steps, values)
                panel.plot([at], [height], color=colours[label], marker="X", markersize=11)
    for panel, title in zip(panels, titles.values(), strict=False):
        panel.set(xlabel="step", ylabel=title.strip())
        panel.grid(alpha=0.3)
    handles = dict(zip(*panels[0].get_legend_handles_labels()[::-1], strict=True))
    if handles:
        panels[0].legend(handles.values(), handles.keys(), fontsize=8)
    with complete_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
