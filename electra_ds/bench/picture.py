"""Results of `bin/bench` as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def draw(results: dict[str, Any], path: Path) -> None:
    """Speed and memory beside transformers, and the parts of a step, as a PNG."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    hardware = results["hardware"]
    figure.suptitle(f"{results['recipe']} on {hardware['device']}, {hardware['cpu']}, {hardware['threads']} thread(s)")
    speed, memory, parts = figure.subplots(1, 3)
    lines = [
        (f"{dtype}\n{size} rows{more}", values)
        for section, more in (("step_vs_transformers", ""), ("compiled_vs_transformers", ",\ncompiled"))
        for dtype, sizes in results.get(section, {}).items()
        for size, values in sizes.items()
    ]
    places = np.arange(len(lines))
    names = [name for name, _ in lines]
    speeds = np.array([values["speed"] for _, values in lines])
    bounds = np.array([values["speed_quartiles"] for _, values in lines]).reshape(-1, 2)
    errors = np.abs(bounds.T - speeds)
    for axes, heights, label in (
        (speed, speeds, "times as fast as transformers"),
        (memory, np.array([values["peak_step_memory"] for _, values in lines]), "of its peak step memory"),
    ):
        bars = axes.bar(places, heights, yerr=errors if axes is speed else None, capsize=3, color="tab:blue")
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_xticks(places, names)
        axes.set_ylabel(label)
        axes.margins(y=0.15)
    _draw_parts(parts, results.get("parts"))
    figure.savefig(path, dpi=110)


def _draw_parts(axes: Any, parts: dict[str, Any] | None) -> None:
    if parts is None:
        axes.set_axis_off()
        return
    columns = [
        (f"{who}\n{dtype}", found[who])
        for dtype, found in parts["seconds"].items()
        for who in ("transformers", "deepspeed")
    ]
    bottom = np.zeros(len(columns))
    for part in columns[0][1]:
        heights = np.array([seconds[part] * 1e3 for _, seconds in columns])
        axes.bar(range(len(columns)), heights, bottom=bottom, label=part)
        bottom += heights
    axes.set_xticks(range(len(columns)), [name for name, _ in columns], fontsize=8)
    axes.set_ylabel(f"ms of a step of {parts['micro_batch']} rows, by part")
    axes.legend(fontsize=8)
