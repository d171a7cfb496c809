"""Results of `bin/bench` as a table and a picture, and what became slower since older ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from electra_ds.errors import ConfigError

# Ratios of one run move by a few per cent from run to run; memory and operations do not.
_SLOWER = 0.05
_MORE = 0.02


def print_results(results: dict[str, Any], console: Console) -> None:
    """Tables of whatever sections there are."""
    if "step" in results:
        _print_steps(results, console)
    if "parts" in results:
        _print_parts(results["parts"], console)
    if "unpadded" in results:
        unpadded = results["unpadded"]["packed_vs_padded_to_row"]
        console.print(f"Text without padding, packed against padded: {_ratio(unpadded)}")
    if "mixed_lengths" in results:
        mixed = results["mixed_lengths"]
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in mixed["real_tokens_per_s"].items())
        console.print(f"Sequences of mixed length (mean {mixed['mean_tokens']:.1f} tokens), real tokens/s: {rates}")
        for name in ("padded_to_row", "padded_to_longest", "transformers"):
            console.print(f"  packed against {name}: {_ratio(mixed[f'packed_vs_{name}'])}")
    for name, values in results.get("data_path", {}).items():
        console.print(
            f"Data path, {name}: {values['tokens_per_s'] / 1e6:.1f} M tokens/s on one core "
            f"({values['batch_times_copy']:.1f} times as long as a copy of the ids)"
        )
    if "start_up" in results:
        start = results["start_up"]
        console.print(f"Start-up: --help {start['help_s']:.2f} s, imports of a run {start['imports_s']:.1f} s")


def _print_steps(results: dict[str, Any], console: Console) -> None:
    table = Table(title="One optimiser step; speed and memory against transformers in the same dtype", box=box.SIMPLE)
    for column in ("rows", "step"):
        table.add_column(column, no_wrap=True)
    for column in ("ms", "tokens/s", "speed", "peak MB", "memory", "MFU"):
        table.add_column(column, justify="right", no_wrap=True)
    notes = []
    operations: list[str] = []
    ratios = {"deepspeed": results["step_vs_transformers"], "compiled": results["compiled_vs_transformers"]}
    for dtype, sizes in results["step"].items():
        for size, contestants in sizes.items():
            for who, values in contestants.items():
                against = ratios.get(who, {}).get(dtype, {}).get(size)
                table.add_row(
                    size, f"{who} {dtype}", f"{values['seconds'] * 1e3:,.0f}", f"{values['tokens_per_s']:,.0f}",
                    "" if against is None else f"{against['speed']:.2f}x", f"{values['peak_step_bytes'] / 1e6:,.0f}",
                    "" if against is None else f"{against['peak_step_memory']:.2f}",
                    f"{values['mfu_of_measured_peak']:.0%}",
                )  # fmt: skip
                operations.append(f"{size} x {who} {dtype} {values['operations']:,} ({values['host_syncs']})")
                if against is not None:
                    notes.append(f"{size} rows, {dtype}, {who} against transformers: {_ratio(against)}")
    console.print(table)
    for dtype, sizes in results["deepspeed_vs_plain"].items():
        for size, values in sizes.items():
            notes.append(f"{size} rows, {dtype}, DeepSpeed engine against the plain one: {_ratio(values)}")
    notes.append(f"Operations a step (of them waiting for a GPU): {', '.join(dict.fromkeys(operations))}")
    for note in notes:
        console.print(note, highlight=False)


def _print_parts(parts: dict[str, Any], console: Console) -> None:
    table = Table(title=f"Parts of a step of {parts['micro_batch']} rows, each alone, ms", box=box.SIMPLE)
    table.add_column("part", no_wrap=True)
    columns = [(dtype, who) for dtype, found in parts["seconds"].items() for who in ("transformers", "deepspeed")]
    for dtype, who in columns:
        table.add_column(f"{who}\n{dtype}", justify="right", no_wrap=True)
    first = next(iter(parts["seconds"].values()))
    for part in first["deepspeed"]:
        cells = (f"{parts['seconds'][dtype][who][part] * 1e3:,.1f}" for dtype, who in columns)
        table.add_row(part, *cells)
    batch = {dtype: f"{found['data']['batch'] * 1e3:,.2f}" for dtype, found in parts["seconds"].items()}
    table.add_row("data", *(batch[dtype] if who == "deepspeed" else "" for dtype, who in columns))
    drawn = {dtype: f"{found['sampling']['alone'] * 1e3:,.1f}" for dtype, found in parts["seconds"].items()}
    table.add_row("of the head: sampling", *(drawn[dtype] if who == "deepspeed" else "" for dtype, who in columns))
    console.print(table)


def _ratio(values: dict[str, Any]) -> str:
    low, high = values["speed_quartiles"]
    return f"{values['speed']:.2f}x ({low:.2f} to {high:.2f})"


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


def slower(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What `new` does worse than `old`: ratios, memory, operations. Empty where nothing does.

    Raises ConfigError where the two have nothing in common.
    """
    before, after = dict(_figures(old)), dict(_figures(new))
    common = [name for name in after if name in before]
    if not common:
        raise ConfigError("The two results have no figure in common: other sections, dtypes or micro-batches.")
    found = []
    for name in common:
        (was, higher_is_better), (now, _) = before[name], after[name]
        change = now / was - 1 if was else float(now > was)
        if (change < -_SLOWER) if higher_is_better else (change > _MORE):
            found.append(f"{name}: {was:.4g} before, {now:.4g} now ({change:+.1%})")
    return found


def _figures(results: dict[str, Any]) -> Iterator[tuple[str, tuple[float, bool]]]:
    """(name, (value, whether more is better)) of what is worth comparing over machines and days."""
    for section in ("step_vs_transformers", "compiled_vs_transformers", "deepspeed_vs_plain"):
        for dtype, sizes in results.get(section, {}).items():
            for size, values in sizes.items():
                name = f"{section}.{dtype}.{size}"
                for key in ("speed", "speed_vs_fp32"):
                    if key in values:
                        yield f"{name}.{key}", (values[key], True)
                if "peak_step_memory" in values:
                    yield f"{name}.peak_step_memory", (values["peak_step_memory"], False)
    for dtype, sizes in results.get("step", {}).items():
        for size, contestants in sizes.items():
            for key in ("operations", "host_syncs"):
                yield f"step.{dtype}.{size}.deepspeed.{key}", (contestants["deepspeed"][key], False)
    for key, values in results.get("mixed_lengths", {}).items():
        if key.startswith("packed_vs"):
            yield f"mixed_lengths.{key}.speed", (values["speed"], True)
    for name, values in results.get("data_path", {}).items():
        yield f"data_path.{name}.speed_beside_copy", (1 / values["batch_times_copy"], True)
