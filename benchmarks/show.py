"""Results of `bin/bench` as tables."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

_LOSSES = ("generator_loss", "discriminator_loss")


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
            f"({values['copy_tokens_per_s'] / values['tokens_per_s']:.0f} times as long as a copy of the ids)"
        )
    if "start_up" in results:
        start = results["start_up"]
        times = f"--help {start['help_s']:.2f} s, imports of a run {start['imports_s']:.1f} s"
        console.print(f"Start-up: {times}; Python alone {start['python_s']:.2f} s")
    if "memory" in results:
        _print_memory(results["memory"], console)
    if "checkpoints" in results:
        _print_checkpoints(results["checkpoints"], console)
    if "precisions" in results:
        _print_precisions(results["precisions"], console)


def _print_steps(results: dict[str, Any], console: Console) -> None:
    table = Table(title="One optimiser step; speed and memory against transformers in the same dtype", box=box.SIMPLE)
    for column in ("rows", "step"):
        table.add_column(column, no_wrap=True)
    columns = ("ms", "tokens/s") if results["hardware"]["clock"] == "wall" else ("CPU ms", "tokens/CPU s")
    for column in (*columns, "speed", "peak MB", "memory", "MFU"):
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
                count = f"{values['operations']:,}" if "operations" in values else "own kernels"
                operations.append(f"{size} x {who} {dtype} {count} ({values['host_syncs']})")
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


def _print_memory(memory: dict[str, Any], console: Console) -> None:
    table = Table(title=f"Peak of what tensors take in {memory['steps']} steps, from the start", box=box.SIMPLE)
    for column in ("JSON", "precision"):
        table.add_column(column, no_wrap=True)
    for column in ("rows", "predicted\nMB", "measured\nMB", "ratio", "held\nmore", "context\nMB"):
        table.add_column(column, justify="right", no_wrap=True)
    for ds_config, precisions in memory["measured"].items():
        for precision, sizes in precisions.items():
            for size, values in sizes.items():
                on_gpu = "context_bytes" in values
                table.add_row(
                    ds_config, precision, size, f"{values['predicted_bytes'] / 1e6:,.0f}",
                    f"{values['measured_bytes'] / 1e6:,.0f}", f"{values['predicted_vs_measured']:.3f}",
                    f"{values['fragmentation']:.1%}" if on_gpu else "",
                    f"{values['context_bytes'] / 1e6:,.0f}" if on_gpu else "",
                )  # fmt: skip
    console.print(table)
    for name, reason in memory["not_measured"].items():
        console.print(f"not measured: {name}: {reason}", highlight=False, markup=False)


def _print_checkpoints(checkpoints: dict[str, Any], console: Console) -> None:
    table = Table(title="Checkpoints in fp32 with AdamW's moments, seconds", box=box.SIMPLE)
    table.add_column("model", no_wrap=True)
    for column in ("GB", "training\nwaits", "saved", "loaded"):
        table.add_column(column, justify="right", no_wrap=True)
    for model, found in checkpoints.items():
        seconds = {name: f"{value:.2f}" for name, value in found["seconds"].items()}
        theirs = seconds["deepspeed_save"]
        table.add_row(
            f"{model}, {found['parameters'] / 1e6:.1f} M parameters", f"{found['bytes'] / 1e9:.2f}", seconds["stall"],
            seconds["save"], seconds["load"],
        )  # fmt: skip
        table.add_row(
            "  DeepSpeed's own", f"{found['deepspeed_bytes'] / 1e9:.2f}", theirs, theirs, seconds["deepspeed_load"]
        )
    console.print(table)
    for model, found in checkpoints.items():
        ratios = (f"{name} {_ratio(found[f'{name}_vs_deepspeed'])}" for name in ("stall", "save", "load"))
        console.print(f"{model}, against DeepSpeed's: {', '.join(ratios)}", highlight=False)


def _print_precisions(precisions: dict[str, Any], console: Console) -> None:
    title = f"Losses over {precisions['steps']} steps on the same data, means of {precisions['window_steps']}"
    table = Table(title=title, box=box.SIMPLE)
    table.add_column("precision", no_wrap=True)
    for column in ("generator\nfirst", "\nlast", "discriminator\nfirst", "\nlast", "steps\nskipped"):
        table.add_column(column, justify="right", no_wrap=True)
    for precision, curve in precisions["curves"].items():
        ends = (curve[name][place] for name in _LOSSES for place in (0, -1) if curve[name])
        table.add_row(precision, *map(_loss, ends), *([str(curve["skipped_steps"])] if curve[_LOSSES[0]] else []))
    console.print(table)
    for precision, apart in precisions["difference_from_fp32"].items():
        found = "; ".join(f"{name.removesuffix('_loss')} {_difference(values)}" for name, values in apart.items())
        console.print(f"{precision} from fp32, over the last half of the steps: {found}", highlight=False)


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _difference(values: dict[str, Any]) -> str:
    if values["largest"] is None:
        return "not finite"
    return f"at most {values['largest']:.2%}, on average {values['mean']:+.2%}"


def _ratio(values: dict[str, Any]) -> str:
    low, high = values["speed_quartiles"]
    return f"{values['speed']:.2f}x" + (f" ({low:.2f} to {high:.2f})" if low < high else "")
