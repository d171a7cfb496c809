"""Print the summary of a run (table, curves and sample sentences) and write it into the run's directory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from electra_ds.config.run_directory import RunDirectory
from electra_ds.core.errors import CheckpointError
from electra_ds.core.program import command
from electra_ds.core.terminal import say, say_command
from electra_ds.data.token_store import recorded_store, split_holdout
from electra_ds.pretraining.evaluation import held_out_batch, load_trained
from electra_ds.pretraining.objectives.base import Curve, Objective
from electra_ds.training.tracking import read_metrics

_SENTENCES = 4
_SENTENCE_BATCH = 64
_SMOOTHING_SHARE = 0.02


def report_run(run: RunDirectory, console: Console, data: Path | None = None) -> None:
    """Print a summary, and write summary.txt, curves.png and samples.txt.

    data: the current place of the run's token store, if it has moved. Raises CheckpointError if there is no evaluation
    yet, and DataError, after printing the rest, if the store for the samples is missing.
    """
    metrics = read_metrics(run.metrics)
    evaluations = [line for line in metrics if line["kind"] == "eval"]
    if not evaluations:
        raise CheckpointError(f"The run {run.path} has no evaluation to report yet.")
    recipe, record = run.read_recipe(), run.read_record()
    trained = load_trained(run.path)
    objective = trained.objective
    table = _summary(evaluations, recipe.name, objective)
    table.caption = speed_line(metrics, record.device)
    console.print(table)
    title = f"{recipe.name}: {evaluations[-1]['step']:,} steps, {record.device}"
    draw_curves(metrics, objective.curves, title, run.path / "curves.png")

    _write(run.path / "summary.txt", table)
    remedy = f"say where it is now: {command('report')} {run.path} --data STORE"
    store = recorded_store(record, run.path, data, remedy)
    split = split_holdout(store.documents, recipe.data, recipe.seed)
    batch = held_out_batch(store, split, recipe, _SENTENCE_BATCH)
    samples = objective.samples(trained.model, trained.tokenizer, batch, _SENTENCES)
    for index, sample in enumerate(samples):
        if index > 0:
            console.print()
        console.print(sample)
    _write(run.path / "samples.txt", *samples)
    say(console, f"\nThe run is in {run.path}: curves.png, samples.txt, summary.txt, metrics.jsonl, checkpoints/.")
    if run.status() == "stopped":
        say_command(console, "To resume:", f"{command('pretrain')} --resume {run.path}")
    say_command(console, "As transformers models:", f"{command('export')} {run.path}")


def _summary(evaluations: list[dict[str, Any]], name: str, objective: Objective[Any]) -> Table:
    first, last = evaluations[0], evaluations[-1]
    table = Table(title=f"{name} on held-out text")
    table.add_column("")
    columns = [objective.complete(line) for line in ([first, last] if first is not last else [last])]
    for line in columns:
        table.add_column(f"step {line['step']:,}", justify="right")
    for key, label in objective.metric_labels.items():
        table.add_row(label, *("–" if line.get(key) is None else f"{line[key]:.4f}" for line in columns))
    return table


def speed_line(metrics: list[dict[str, Any]], device: str) -> str | None:
    """Return a line with the median throughput (the first steps are slow), or None if the device's peak is unknown."""
    lines = [line for line in metrics if line.get("mfu") is not None]
    if not lines:
        return None
    mfu, tokens_per_s = (statistics.median(line[key] for line in lines) for key in ("mfu", "tokens_per_s"))
    return f"{tokens_per_s:,.0f} tokens/s, {mfu:.1%} of the peak of {device} (MFU)"


def _write(path: Path, *parts: Any) -> None:
    with path.open("w", encoding="utf8") as file:
        plain = Console(file=file, width=100)
        for part in parts:
            plain.print(part)
            plain.print()


# --- curves


def draw_curves(metrics: Sequence[dict[str, Any]], curves: Sequence[Curve], title: str, path: Path) -> None:
    """Draw training and held-out curves of one run, up to four panels, as a PNG."""
    train = [line for line in metrics if line["kind"] == "train"]
    evaluations = [line for line in metrics if line["kind"] == "eval"]
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(2, 2).flatten()
    for panel, curve in zip(panels, curves, strict=False):
        names = curve.metrics
        if curve.is_loss:
            (key,) = names
            _training_losses(panel, _points(train, key))
            names = {key: "held out"}
        for key, name in names.items():
            color = "tab:orange" if curve.is_loss else None
            panel.plot(*_points(evaluations, key).T, color=color, marker="o", markersize=3, label=name)
        if curve.baseline is not None:
            panel.axhline(curve.baseline, color="grey", linewidth=0.8)
        panel.set(xlabel="step", ylabel=curve.label)
        panel.legend()
        panel.grid(alpha=0.3)
    for panel in panels[len(curves) :]:
        panel.remove()
    figure.savefig(path, dpi=110)


def _points(lines: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    """Return the steps and values of a metric, [N, 2]."""
    return np.array([(line["step"], line[key]) for line in lines if line.get(key) is not None]).reshape(-1, 2)


def _training_losses(axes: Any, points: np.ndarray) -> None:
    if not len(points):
        return
    steps, values = points.T
    axes.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.6)
    width = max(1, int(len(values) * _SMOOTHING_SHARE))
    smooth = pd.Series(values).rolling(width, center=True, min_periods=1).mean()
    axes.plot(steps, smooth, color="tab:blue", label="training (smoothed)")
    low, high = np.percentile(values, [0.5, 99.5])
    axes.set_ylim(low - 0.05 * (high - low + 1e-3), high + 0.05 * (high - low + 1e-3))
