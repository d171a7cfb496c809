"""Pictures of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from matplotlib import colormaps
from matplotlib.figure import Figure

from electra_ds.config.run_directory import RunDirectory
from electra_ds.core.files import complete_file
from electra_ds.sweep.results import axes_of, evaluations_of

_PANELS = {
    "generator_accuracy": "generator accuracy at [MASK]", "discriminator_auc": "discriminator AUC",
    "discriminator_recall": "discriminator recall",
}  # fmt: skip


def draw_capacity(table: pd.DataFrame, path: Path) -> None:
    """Generator and discriminator of every pretraining on held-out text over its steps, as figure 2 of the reproduction
    study; a cross where a discriminator has collapsed. Seeds of one cell share a colour."""
    pretrained = table[table["stage"] == "pretrain"]
    axes = axes_of(table, "pretrain")
    cells = list(dict.fromkeys(_label(row, axes) for _, row in pretrained.iterrows()))
    colours = dict(zip(cells, colormaps["viridis"](np.linspace(0, 0.9, len(cells))), strict=True))
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    panels = figure.subplots(1, len(_PANELS))
    for _, row in pretrained.iterrows():
        _draw_run(panels, Path(row["run"]), colours[_label(row, axes)], _label(row, axes))
    for panel, label in zip(panels, _PANELS.values(), strict=True):
        panel.set(xlabel="step", ylabel=label)
        panel.grid(alpha=0.3)
    panels[1].axhline(0.5, color="grey", linewidth=0.8)
    handles = dict(zip(*panels[0].get_legend_handles_labels()[::-1], strict=True))
    if handles:
        panels[0].legend(handles.values(), handles.keys(), fontsize=8)
    with complete_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _draw_run(panels: Any, run: Path, colour: Any, label: str) -> None:
    lines = evaluations_of(run)
    collapsed = _collapsed_at(run)
    for panel, name in zip(panels, _PANELS, strict=True):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if not points:
            continue
        steps, values = np.array(points, float).T
        panel.plot(steps, values, color=colour, marker="o", markersize=2.5, linewidth=1.2, label=label)
        if collapsed is not None:
            panel.plot([collapsed], [np.interp(collapsed, steps, values)], color=colour, marker="X", markersize=11)


def _collapsed_at(run: Path) -> int | None:
    found = RunDirectory(run).status_details().get("collapsed_at")
    return found if isinstance(found, int) else None


def _label(row: pd.Series, axes: list[str]) -> str:
    return ", ".join(f"{axis.rpartition('.')[2]} {row[axis]:g}" if isinstance(row[axis], float) else f"{row[axis]}"
                     for axis in axes) or "pretraining"  # fmt: skip
