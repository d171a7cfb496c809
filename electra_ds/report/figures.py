"""Pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from electra_ds.pretraining.objectives.base import Curve

_SMOOTHING_SHARE = 0.02


def draw_curves(metrics: Sequence[dict[str, Any]], curves: Sequence[Curve], title: str, path: Path) -> None:
    """Draw training and held-out curves of one run, up to four panels, as a PNG."""
    train = [line for line in metrics if line["kind"] == "train"]
    evaluations = [line for line in metrics if line["kind"] == "eval"]
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(2, 2).flatten()
    for panel, curve in zip(panels, curves, strict=False):
        if curve.is_loss:
            (key,) = curve.metrics
            _losses(panel, train, evaluations, key, curve.label)
        else:
            _held_out(panel, evaluations, curve.metrics, curve.label)
        if curve.baseline is not None:
            panel.axhline(curve.baseline, color="grey", linewidth=0.8)
    for panel in panels[len(curves) :]:
        panel.remove()
    figure.savefig(path, dpi=110)


def _losses(axes: Any, train: list[dict[str, Any]], evaluations: list[dict[str, Any]], key: str, label: str) -> None:
    points = [(line["step"], line[key]) for line in train if line.get(key) is not None]
    if points:
        steps, values = np.array(points).T
        axes.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.6)
        width = max(1, int(len(values) * _SMOOTHING_SHARE))
        kernel = np.ones(width)
        smooth = np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
        axes.plot(steps, smooth, color="tab:blue", label="training (smoothed)")
        low, high = np.percentile(values, [0.5, 99.5])
        axes.set_ylim(low - 0.05 * (high - low + 1e-3), high + 0.05 * (high - low + 1e-3))
    axes.plot(
        [line["step"] for line in evaluations], [line[key] for line in evaluations],
        color="tab:orange", marker="o", markersize=3, label="held out",
    )  # fmt: skip
    axes.set(xlabel="step", ylabel=label)
    axes.legend()
    axes.grid(alpha=0.3)


def _held_out(axes: Any, evaluations: list[dict[str, Any]], keys: Mapping[str, str], label: str) -> None:
    for key, name in keys.items():
        points = [(line["step"], line[key]) for line in evaluations if line.get(key) is not None]
        axes.plot(*np.array(points).reshape(-1, 2).T, marker="o", markersize=3, label=name)
    axes.set(xlabel="step", ylabel=label)
    axes.legend()
    axes.grid(alpha=0.3)
