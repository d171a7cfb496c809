"""Results of `bin/bench` as a picture."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure, SubFigure

_SPEED = ("step_vs_transformers", "compiled_vs_transformers", "parts")


def draw(results: dict[str, Any], path: Path) -> None:
    """Speed and memory beside transformers with the parts of a step, and loss curves by precision, as a PNG."""
    has_curves = "precisions" in results
    has_speed = not has_curves or any(section in results for section in _SPEED)
    rows = has_speed + has_curves
    figure = Figure(figsize=(12, 4.5 * rows), layout="constrained")
    hardware = results["hardware"]
    figure.suptitle(f"{results['recipe']} on {hardware['device']}, {hardware['cpu']}, {hardware['threads']} thread(s)")
    pieces = list(figure.subfigures(rows, squeeze=False).flat)
    if has_speed:
        _draw_speed(pieces[0], results)
    if has_curves:
        _draw_curves(pieces[-1], results["precisions"])
    figure.savefig(path, dpi=110)


def _draw_speed(figure: SubFigure, results: dict[str, Any]) -> None:
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


def _draw_curves(figure: SubFigure, precisions: dict[str, Any]) -> None:
    """What is not finite is left out."""
    for axes, name in zip(figure.subplots(1, 2), ("generator", "discriminator"), strict=True):
        for style, (precision, curve) in zip(cycle(("-", "--", ":")), precisions["curves"].items()):
            losses = np.array(curve[f"{name}_loss"], dtype=float)
            ends = np.minimum((np.arange(len(losses)) + 1) * precisions["window_steps"], precisions["steps"])
            skipped = f", {curve['skipped_steps']} steps skipped" if curve["skipped_steps"] else ""
            axes.plot(ends, losses, style, label=precision + skipped)
        axes.set_xlabel("step")
        axes.set_ylabel(f"{name}'s loss, mean of {precisions['window_steps']} steps")
        axes.legend()
