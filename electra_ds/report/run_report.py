"""The summary of a pretraining (table, curves and sample sentences), which is also written into its directory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from matplotlib.figure import Figure
from rich.text import Text

from electra_ds.config.run_directory import RunDirectory, read_metrics
from electra_ds.core.errors import DataError
from electra_ds.core.program import command
from electra_ds.data.token_store import recorded_store, split_holdout
from electra_ds.pretraining.evaluation import SAMPLE_WINDOWS, TrainedModel, held_out_batch, load_trained
from electra_ds.pretraining.objectives.base import Curve, Objective
from electra_ds.report.tables import Line, Part, Report, Table, as_text

_SENTENCES = 4
_SMOOTHING_SHARE = 0.02


def report_run(run: RunDirectory, data: Path | None = None) -> Report:
    """Return a summary, and write summary.txt, curves.png and samples.txt.

    data: the current place of the run's token store, if it has moved. Without it, a summary of a run whose store is
    missing has a warning in place of the samples. Raises CheckpointError if there is no evaluation yet, and DataError
    if `data` is not the run's store.
    """
    metrics = read_metrics(run.metrics)
    evaluations = [line for line in metrics if line["kind"] == "eval"]
    if not evaluations:
        raise run.lacks("evaluation to report")
    recipe, record = run.read_recipe(), run.read_record()
    trained = load_trained(run.path)
    table = _summary(evaluations, recipe.name, trained.objective)
    table.caption = speed_line(metrics, record.device) or ""
    parts: list[Part] = [table]
    title = f"{recipe.name}: {evaluations[-1]['step']:,} steps, {record.device}"
    draw_curves(metrics, trained.objective.curves, title, run.path / "curves.png")
    (run.path / "summary.txt").write_text(as_text([table]), "utf8")
    files = ["curves.png", "summary.txt", "metrics.jsonl", "checkpoints/"]
    try:
        samples = _samples(run, trained, data)
    except DataError as error:
        if data is not None:
            raise
        parts.append(Line(str(error), is_warning=True))
    else:
        if samples:
            parts.append(samples)
            files.insert(1, "samples.txt")
            (run.path / "samples.txt").write_text(as_text([samples]), "utf8")
    parts.append(Line(f"\nThe run is in {run.path}: {', '.join(files)}."))
    parts.append(Line("As transformers models:", command=f"{command('export')} {run.path}"))
    return Report(parts, pd.DataFrame(evaluations))


def _samples(run: RunDirectory, trained: TrainedModel, data: Path | None) -> Text:
    recipe = run.read_recipe()
    remedy = f"say where it is now: {command('report')} {run.path} --data STORE"
    store = recorded_store(run.read_record(), run.path, data, remedy)
    split = split_holdout(store.documents, recipe.data, recipe.seed)
    batch = held_out_batch(store, split, recipe, SAMPLE_WINDOWS)
    return Text("\n\n").join(trained.objective.samples(trained.model, trained.tokenizer, batch, _SENTENCES))


def _summary(evaluations: list[dict[str, Any]], name: str, objective: Objective[Any]) -> Table:
    first, last = evaluations[0], evaluations[-1]
    lines = [objective.complete(line) for line in ([first, last] if first is not last else [last])]
    table = Table(f"{name} on held-out text", ["", *(f"step {line['step']:,}" for line in lines)])
    for key, label in objective.metric_labels.items():
        table.rows.append([label, *("–" if line.get(key) is None else f"{line[key]:.4f}" for line in lines)])
    return table


def speed_line(metrics: list[dict[str, Any]], device: str) -> str | None:
    """Return a line with the median throughput (the first steps are slow), or None if the device's peak is unknown."""
    lines = [line for line in metrics if line.get("mfu") is not None]
    if not lines:
        return None
    mfu, tokens_per_s = (statistics.median(line[key] for line in lines) for key in ("mfu", "tokens_per_s"))
    return f"{tokens_per_s:,.0f} tokens/s, {mfu:.1%} of the peak of {device} (MFU)"


# --- curves


def draw_curves(metrics: Sequence[dict[str, Any]], curves: Sequence[Curve], title: str, path: Path) -> None:
    """Draw training and held-out curves of one run, up to four panels, as a PNG."""
    train = [line for line in metrics if line["kind"] == "train"]
    evaluations = [line for line in metrics if line["kind"] == "eval"]
    figure = Figure(figsize=(11, 7))  # a layout fitted to the labels would draw everything twice
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.08, top=0.92, hspace=0.26, wspace=0.24)
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
        panel.locator_params(nbins=6)
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
