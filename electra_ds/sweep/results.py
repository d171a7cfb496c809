"""What a sweep has come to, from its folder alone: a row for each trial, and each cell over its seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from electra_ds.config.overrides import dotted_values
from electra_ds.config.run_record import Record
from electra_ds.core.errors import CheckpointError
from electra_ds.core.files import complete_file
from electra_ds.pretraining.objectives.electra import ElectraObjective
from electra_ds.report.score_files import Scores, read_run
from electra_ds.report.statistics import spread
from electra_ds.sweep.folder import ENDED_EARLY, SUCCEEDED, State, SweepFolder
from electra_ds.sweep.follow import as_result
from electra_ds.sweep.options import SCORE
from electra_ds.sweep.trials import Trial
from electra_ds.training.tracking import read_metrics

SEEDS = ("seed", "pretrain.seed")
_HOUR_S = 3600


def results(folder: SweepFolder, trials: Sequence[Trial]) -> pd.DataFrame:
    """A row for each trial, begun or not: what it is, how far, its metrics as `metric.NAME`, hardware, time and cost,
    its options as `option.NAME`, and its resolved recipe as `recipe.KEY`."""
    values = dict.fromkeys(name for trial in trials for name in trial.values)
    rows = [_row(folder, trial) for trial in trials]
    others = dict.fromkeys(name for row in rows for name in row)
    return pd.DataFrame(
        rows, columns=list({"trial": None, "stage": None} | values | {"state": None, "reason": None} | others)
    )


def _row(folder: SweepFolder, trial: Trial) -> dict[str, Any]:
    state, reason = folder.state_of(trial)
    run, record = folder.run(trial.key), folder.record(trial.key)
    row: dict[str, Any] = {"trial": trial.key, "stage": trial.stage} | {
        name: json.dumps(value) if isinstance(value, list | dict) else value for name, value in trial.values.items()
    }
    row |= {"state": state, "reason": reason}
    scores = _scores(run.path) if trial.stage == "finetune" and state != "stopped" else None
    metrics = _metrics(run.path, trial, state, scores)
    row |= {f"metric.{name}": value for name, value in metrics.items()}
    if scores is not None:
        row |= {f"baseline.{name}": value for name, value in scores.dev_baselines().items()}
        row |= {"warning": "; ".join(scores.warnings)} if scores.warnings else {}
    if state == "done" and not metrics:
        row["reason"] = "it is done, but its scores cannot be read"
    if record is not None:
        row |= {
            "seconds": round(record.seconds, 1), "attempts": len(record.attempts), "workers": record.workers,
            "cpu_hours": round(record.seconds * record.workers * record.cpus / _HOUR_S, 4),
            "gpu_hours": round(record.seconds * record.workers * record.gpus / _HOUR_S, 4),
            "command": " ".join(record.command),
        }  # fmt: skip
    try:
        told = run.read_record(Record)
    except CheckpointError:
        told = None
    if (collapsed_at := run.status_details().get("collapsed_at")) is not None:
        row["collapsed_at"] = collapsed_at
    if told is not None:
        row |= {"device": told.device, "world_size": told.world_size, "threads": told.threads}
    row |= {f"option.{key}": _plain(value) for key, value in trial.options.items() if value is not None}
    row |= {f"recipe.{key}": _plain(value) for key, value in dotted_values(trial.recipe.model_dump(mode="json"))}
    return row | {"run": str(run.path)}


def _scores(path: Path) -> Scores | None:
    try:
        return read_run(path).scores
    except CheckpointError:
        return None


def _metrics(path: Path, trial: Trial, state: State, scores: Scores | None) -> dict[str, float]:
    """A finetuning's scores on the development sets and `score`, its first; of a pretraining, and of a finetuning that
    a scheduler has ended, the last evaluation."""
    if trial.stage == "pretrain" or state == "stopped":
        evaluations = evaluations_of(path)
        last = as_result(trial.stage, evaluations[-1]) if evaluations else {}
        return ElectraObjective.complete(last) if "replaced_share" in last else last
    found = {} if scores is None else scores.dev_metrics()
    return {"step": scores.step, SCORE: next(iter(found.values()))} | found if scores is not None and found else {}


def evaluations_of(run: Path) -> list[dict[str, float]]:
    """The numbers of a run's evaluations, each with its step, as far as its metrics.jsonl can be read."""
    try:
        lines = read_metrics(run / "metrics.jsonl")
    except OSError:
        return []
    return [
        {name: float(value) for name, value in line.items() if isinstance(value, int | float) and _is_sound(value)}
        for line in lines if line["kind"] == "eval"
    ]  # fmt: skip


def _is_sound(value: float) -> bool:
    return not isinstance(value, bool) and abs(value) < 1e300


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value


def cells(table: pd.DataFrame, stage: str, metrics: Sequence[str]) -> pd.DataFrame:
    """Over the seeds of each cell of a stage: n, mean, sample standard deviation, median, lowest and highest of each
    metric, and `baseline`, the score of the same prediction for every row. If a cell has several pretraining seeds,
    `std` is that of their means, `n` their number, and `std_finetuning` the mean standard deviation over finetuning
    seeds within one."""
    ended = table[(table["stage"] == stage) & table["state"].isin(SUCCEEDED) & (table["reason"] != ENDED_EARLY)]
    of_stage = table[table["stage"] == stage]
    is_nested = "pretrain.seed" in of_stage and of_stage["pretrain.seed"].nunique() > 1
    axes = axes_of(table, stage)
    found = []
    for cell, group in ended.groupby(axes, dropna=False, sort=False) if axes else [((), ended)]:
        named = dict(zip(axes, cell if isinstance(cell, tuple) else (cell,), strict=True))
        for metric in metrics:
            column = f"metric.{metric}"
            values = group[column].dropna() if column in group else pd.Series(dtype=float)
            if values.empty:
                continue
            summed = _summed(group.loc[values.index], column, is_nested=is_nested)
            if f"baseline.{metric}" in group:
                summed["baseline"] = float(group[f"baseline.{metric}"].mean())
            found.append(named | {"metric": metric} | summed)
    return pd.DataFrame(found)


def _summed(group: pd.DataFrame, column: str, *, is_nested: bool) -> dict[str, Any]:
    if is_nested:
        by_pretraining = [spread(list(values)) for _, values in group.groupby("pretrain.seed")[column]]
        over = spread([each.mean for each in by_pretraining])
        within = [each.std for each in by_pretraining if each.std is not None]
        inner = sum(within) / len(within) if within else None
        values = list(group[column])
        return {
            "n": over.n, "mean": over.mean, "std": over.std, "median": over.median, "low": min(values),
            "high": max(values), "std_finetuning": inner, "runs": len(values),
        }  # fmt: skip
    over = spread(list(group[column]))
    return {"n": over.n, "mean": over.mean, "std": over.std, "median": over.median, "low": over.low, "high": over.high}


def axes_of(table: pd.DataFrame, stage: str) -> list[str]:
    """What varies over a stage's trials but for the seeds."""
    of_stage = table[table["stage"] == stage]
    columns = list(of_stage.columns)
    names = [name for name in columns[2 : columns.index("state")] if name not in SEEDS]
    return [name for name in names if of_stage[name].notna().any()]


def write_results(table: pd.DataFrame, over_seeds: pd.DataFrame, folder: Path) -> None:
    """results.csv, results.parquet and cells.csv. Raises CheckpointError if they cannot be written."""
    with complete_file(folder / "results.csv") as path:
        table.to_csv(path, index=False)
    mixed = {name: table[name].map(_text, na_action="ignore") for name in table if _is_mixed(table[name])}
    with complete_file(folder / "results.parquet") as path:
        table.assign(**mixed).to_parquet(path, index=False)
    with complete_file(folder / "cells.csv") as path:
        over_seeds.to_csv(path, index=False)


def _is_mixed(column: pd.Series) -> bool:
    """Whether values of several types stand in it, which a column of Parquet cannot hold."""
    return column.dtype == object and len({type(value) for value in column.dropna()}) > 1


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
