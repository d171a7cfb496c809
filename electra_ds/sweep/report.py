"""What a sweep has come to, printed: how its trials ended, its cells over their seeds, and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from electra_ds.core.program import command
from electra_ds.core.terminal import say, say_command, warn
from electra_ds.pretraining.objectives.electra_evaluation import ALWAYS_ORIGINAL
from electra_ds.report.glue_score import AVERAGE_METRICS, average, glue
from electra_ds.report.score_files import BOUNDED
from electra_ds.report.scores import BASELINE
from electra_ds.report.statistics import spread
from electra_ds.sweep.figures import draw_capacity
from electra_ds.sweep.folder import ENDED_EARLY, STOPPED_AT, SUCCEEDED, SweepFolder
from electra_ds.sweep.follow import MetricsFollower
from electra_ds.sweep.options import SCORE
from electra_ds.sweep.results import axes_of, cells, results, write_results
from electra_ds.sweep.spec import SweepSpec
from electra_ds.sweep.trials import Trial, counted, value_text

_OF_PRETRAINING = ("generator_gain", "generator_accuracy", "discriminator_auc", "discriminator_recall")
_NESTED = (
    "±: sample standard deviation over pretraining seeds, of each the mean over its finetuning seeds; within: the mean "
    "standard deviation over finetuning seeds"
)
_WHAT_STD_IS = {
    "pretrain": "±: sample standard deviation over seeds",
    "finetune": "±: sample standard deviation over finetuning seeds only; that of pretraining is not in it",
}
_LONG_NAME = 12
"""Characters beyond which a column's name is broken at its underscores."""
_WIDE = 100
"""Columns of a terminal from which on medians are shown too; cells.csv has all of it."""


def report_sweep(
    folder: SweepFolder, trials: Sequence[Trial], spec: SweepSpec, console: Console, *,
    is_running: bool = False, has_more: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """Print the tables and how to resume, and write results.csv, results.parquet, cells.csv and the pictures. Returns
    the results. has_more: whether there is more to be run than the trials."""
    table = results(folder, trials)
    others = {record.key for record in folder.records()} - {trial.key for trial in trials}
    print_states(table, console)
    found = {stage: _ordered(cells(table, stage, _metrics(table, stage, spec)), table, stage, spec)
             for stage in spec.stages}  # fmt: skip
    for stage, with_score in found.items():
        if with_score.empty:
            continue
        of_stage = with_score[with_score["metric"] != SCORE]  # which is the first of the others
        if stage == "finetune" and "task" in axes_of(table, stage):
            axes = [axis for axis in axes_of(table, stage) if axis != "task"]
            _print_tasks(of_stage, table, axes, _title(stage, spec), console)
        else:
            _print_cells(of_stage, axes_of(table, stage), _title(stage, spec), console)
        if of_stage["std"].notna().any():
            _say(console, _WHAT_STD_IS[stage] if "std_finetuning" not in of_stage else _NESTED)
        if "baseline" in of_stage:
            _say(console, BASELINE)
    write_results(table, pd.concat([each.assign(stage=stage) for stage, each in found.items()]), folder.path)
    if spec.pretrain is not None:
        draw_capacity(table, folder.path / "curves.png")
    if others:
        _say(console, f"{len(others)} more trials in this folder are of other settings, and not in these tables")
    _say(console, f"{folder.path}: results.csv, results.parquet, cells.csv" + (", curves.png" if spec.pretrain else ""))
    if is_running:
        _say_what_runs(folder, trials, table, console)
    else:
        _say_how_to_resume(folder, table, console, has_more=has_more)
    return table


def print_states(table: pd.DataFrame, console: Console) -> None:
    """How many trials are how far, and each that failed with its reason."""
    named = table["state"].mask(table["reason"].str.startswith(STOPPED_AT, na=False), "stopped as planned")
    named = named.mask(table["reason"] == ENDED_EARLY, ENDED_EARLY)
    counts = [f"{count} {state}" for state, count in named.value_counts().items()]
    _say(console, f"{', '.join(counts)} of {counted(len(table))}" if counts else "0 trials")
    for _, row in table[table["state"].isin(["failed", "collapsed", "done"]) & (table["reason"] != "")].iterrows():
        _say(console, f"{row['trial']} {row['state']}: {row['reason']}")
    for _, row in (table.dropna(subset="warning") if "warning" in table else table[:0]).iterrows():
        warn(console, f"{row['trial']}: {row['warning']}")


def _say_what_runs(folder: SweepFolder, trials: Sequence[Trial], table: pd.DataFrame, console: Console) -> None:
    for trial, state in zip(trials, table["state"], strict=True):
        if state == "unfinished":
            lines = MetricsFollower(folder.run(trial.key).metrics).lines()
            _say(console, f"begun: {trial.label}" + (f", at step {lines[-1]['step']:,}" if lines else ""))
    _say(console, "The sweep is being run")


def _say_how_to_resume(folder: SweepFolder, table: pd.DataFrame, console: Console, *, has_more: bool) -> None:
    """As commands, which no full stop follows."""
    can_begin = (table["state"] == "unfinished") | ((table["state"] == "waiting") & (table["reason"] == ""))
    has_failed = (table["state"] == "failed").any()
    if has_more or can_begin.any() or ((table["state"] == "waiting").any() and not has_failed):
        say_command(console, "Resume it with:", f"{command('sweep')} --resume {folder.path}")
    if has_failed:
        say_command(console, "Run what failed again:", f"{command('sweep')} --resume {folder.path} --retry-failed")


def _metrics(table: pd.DataFrame, stage: str, spec: SweepSpec) -> list[str]:
    """Those to be shown: of a pretraining four, of a finetuning all; what the sweep goes by first."""
    of_stage = table[table["stage"] == stage].dropna(axis=1, how="all")
    there = [name.removeprefix("metric.") for name in of_stage.columns if name.startswith("metric.")]
    shown = [name for name in there if name in _OF_PRETRAINING]
    if stage == "finetune":
        shown = [name for name in there if name not in ("step", SCORE)]
    first = [spec.metric.name] if spec.metric is not None and spec.metric.name in there else []
    first += [ALWAYS_ORIGINAL] if first == ["discriminator_accuracy"] else []
    return first + [name for name in shown if name not in first]


def _ordered(found: pd.DataFrame, table: pd.DataFrame, stage: str, spec: SweepSpec) -> pd.DataFrame:
    """The cells of the last stage from best to worst, where the sweep goes by a metric and nothing by tasks."""
    axes = axes_of(table, stage)
    if spec.metric is None or found.empty or not axes or "task" in axes or stage != list(spec.stages)[-1]:
        return found
    own = found[found["metric"] == spec.metric.name].set_index(axes)["mean"]
    place = own.rank(ascending=spec.metric.mode == "min", method="first")
    keys = found.set_index(axes).index.map(place)
    return found.assign(place=keys).sort_values("place", kind="stable").drop(columns="place")


def _title(stage: str, spec: SweepSpec) -> str:
    """The stage, its recipe, and on how many examples where it is not on all of them."""
    options = spec.stages[stage].options
    recipe, most = options.get("recipe"), options.get("max_train_examples")
    return ", ".join(
        [stage, *([f"recipe {Path(recipe).stem}"] if isinstance(recipe, str) else []),
         *([f"{most} training examples"] if most is not None else [])]
    )  # fmt: skip


def _print_cells(found: pd.DataFrame, axes: list[str], title: str, console: Console) -> None:
    has_inner, has_baseline, is_wide = "std_finetuning" in found, "baseline" in found, console.width >= _WIDE
    shown = _table(title, axes)
    inner = ["within"] if has_inner else []
    trivial, median_too = ["baseline"] if has_baseline else [], ["median"] if is_wide else []
    columns = ["mean ± std", *inner, *trivial, "n", *median_too, "min–max"]
    shown.add_column("metric", no_wrap=True)
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for _, row in found.iterrows():
        low, high, median = (_number(row, name) for name in ("low", "high", "median"))
        values = {
            "mean ± std": _mean(row), "within": _number(row, "std_finetuning"), "n": str(row["n"]), "median": median,
            "baseline": _number(row, "baseline"), "min–max": f"{low}–{high}",
        }  # fmt: skip
        shown.add_row(*_axes_cells(row, axes), row["metric"], *(values[column] for column in columns))
    console.print(shown)


def _print_tasks(found: pd.DataFrame, table: pd.DataFrame, axes: list[str], title: str, console: Console) -> None:
    """A row for each cell and a column for each task, as papers have it, with GLUE's means where all of it is there."""
    firsts = {
        task: AVERAGE_METRICS.get(task, of_task["metric"].iloc[0])
        for task, of_task in found.groupby("task", sort=False)
    }
    groups = [group for _, group in found.groupby(axes, sort=False, dropna=False)] if axes else [found]
    means = [_glue_means(_runs_of(group.iloc[0], table, axes)) for group in groups]
    names = [name for name in ("AVG", "GLUE") if any(name in each for each in means)]
    has_baseline = "baseline" in found
    shown = _table(title, axes)
    if has_baseline and not axes:
        shown.add_column("")
    for task, metric in firsts.items():
        shown.add_column(f"{task}\n{metric}", justify="right", no_wrap=True)
    for column in (*names, "n"):
        shown.add_column(column, justify="right", no_wrap=True)
    for group, mean in zip(groups, means, strict=True):
        first = group[group["metric"] == group["task"].map(firsts)].set_index("task")
        scores = [_mean(first.loc[task]) if task in first.index else "" for task in firsts]
        number = "–".join(dict.fromkeys(map(str, (first["n"].min(), first["n"].max()))))
        head = _axes_cells(group.iloc[0], axes) or (["mean"] if has_baseline else [])
        shown.add_row(*head, *scores, *(mean.get(name, "") for name in names), number)
    if has_baseline:
        by_task = found[found["metric"] == found["task"].map(firsts)].drop_duplicates("task").set_index("task")
        scores = [_number(by_task.loc[task], "baseline") for task in firsts]
        mean = _baseline_means(_runs_of(groups[0].iloc[0], table, axes))
        shown.add_section()
        shown.add_row("baseline", *[""] * (len(axes) - 1), *scores, *(mean.get(name, "") for name in names), "")
    console.print(shown)


def _runs_of(cell: pd.Series, table: pd.DataFrame, axes: list[str]) -> pd.DataFrame:
    runs = table[(table["stage"] == "finetune") & table["state"].isin(SUCCEEDED)]
    for axis in axes:
        runs = runs[runs[axis].isna() if pd.isna(cell[axis]) else runs[axis] == cell[axis]]
    return runs


def _glue_means(runs: pd.DataFrame) -> dict[str, str]:
    """The original's mean of eight tasks and GLUE's of nine, over the seeds that have all of them."""
    found: dict[str, list[float]] = {"AVG": [], "GLUE": []}
    by_encoder = [runs] if "pretrain.seed" not in runs else [each for _, each in runs.groupby("pretrain.seed")]
    is_nested = len(by_encoder) > 1
    for of_encoder in by_encoder:
        of_its_seeds: dict[str, list[float]] = {"AVG": [], "GLUE": []}
        for _, of_seed in of_encoder.groupby("seed"):
            for name, value in _avg_and_glue(of_seed, "metric.").items():
                of_its_seeds[name].append(value)
        for name, values in of_its_seeds.items():
            found[name] += [sum(values) / len(values)] if is_nested and values else values
    spreads = {name: spread(values) for name, values in found.items() if values}
    return {
        name: f"{over.mean:.2f}" + (f" ± {over.std:.2f}" if over.std is not None else "")
        for name, over in spreads.items()
    }


def _baseline_means(runs: pd.DataFrame) -> dict[str, str]:
    of_tasks = runs.drop_duplicates("task")
    return {name: f"{value:.2f}" for name, value in _avg_and_glue(of_tasks, "baseline.").items()}


def _avg_and_glue(of_tasks: pd.DataFrame, prefix: str) -> dict[str, float]:
    """Return AVG and GLUE in percent, as far as the columns with this prefix give them. of_tasks: a row per task."""
    scores = {row["task"]: _values(row, prefix) for _, row in of_tasks.iterrows()}
    means = {"AVG": average(scores), "GLUE": glue(scores).value}
    return {name: 100 * value for name, value in means.items() if value is not None}


def _values(row: pd.Series, prefix: str) -> dict[str, float]:
    names = [name for name in row.index if name.startswith(prefix) and pd.notna(row[name])]
    return {name.removeprefix(prefix): float(row[name]) for name in names}


def _table(title: str, axes: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1))
    for axis in axes:
        name = axis.rpartition(".")[2]
        header = name.replace("_", "_\n") if len(name) > _LONG_NAME else name
        table.add_column(escape(header), overflow="fold", min_width=8)
    return table


def _axes_cells(row: pd.Series, axes: list[str]) -> list[str]:
    return [escape(_cell(row[axis])) for axis in axes]


def _mean(row: pd.Series) -> str:
    std = f" ± {_number(row, 'std')}" if pd.notna(row["std"]) else ""
    return f"{_number(row, 'mean')}{std}"


def _number(row: pd.Series, name: str) -> str:
    scale, digits = (100, 2) if row["metric"] in BOUNDED else (1, 4)
    return f"{scale * row[name]:.{digits}f}" if name in row and pd.notna(row[name]) else ""


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return ""
    text = value_text(value)
    return Path(text).name if "/" in text and Path(text).exists() else text


def _say(console: Console, line: str) -> None:
    say(console, f"{line.rstrip('.')}.")
