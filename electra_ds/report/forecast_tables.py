"""Forecasts as tables, text and JSON."""

from __future__ import annotations

import itertools
from typing import Any

from rich.console import Console
from rich.markup import escape

from electra_ds.config.cards import DEFAULT_TORCH_CAPABILITY
from electra_ds.core.program import command
from electra_ds.pretraining.memory import CONTEXT_BYTES, FRAGMENTATION
from electra_ds.pretraining.run_time import (
    BANDWIDTH_EFFICIENCY,
    CPU_SLOWER,
    LAUNCH_S,
    PRODUCT_EFFICIENCY,
    SLOWER,
    StepTime,
)
from electra_ds.report.forecast import GIB, Forecast
from electra_ds.report.publications import Evidence, evidence
from electra_ds.report.tables import Table, print_table

_DAY_S = 86_400


def print_forecast(found: Forecast, console: Console) -> None:
    """Print memory, time, what the card lacks, and what others published, for one forecast."""
    device = "a GPU" if found.kernels == "cuda" else "this machine's CPU"
    if found.card is not None:
        device = f"{found.card.name} ({'run' if found.was_run else 'never run'})"
    recipe = found.recipe
    console.print(
        f"[bold]{escape(recipe.name)}[/] with {escape(found.ds_config)} on {escape(device)}: "
        f"{found.plan.precision.name}, ZeRO stage {found.plan.stage}, micro-batch x accumulation = {found.plan.batch}, "
        f"{recipe.data.sequence_length} tokens a sequence, {found.vocab_size:,} pieces",
        highlight=False,
    )  # fmt: skip
    for note in found.plan.notes:
        console.print(f"[yellow]Note:[/] {escape(note)}.", highlight=False)
    print_table(memory_table(found), console)
    for line in [*_fit_lines(found), *_time_lines(found), *_lack_lines(found), *_published_lines(found)]:
        console.print(line, highlight=False)


def memory_table(found: Forecast) -> Table:
    """Return the memory of each part at a step's fullest moments."""
    phases = found.memory.phases
    is_small = max(phase.total for phase in phases.values()) < GIB / 4
    unit, shown = ("MiB", _mib) if is_small else ("GiB", _gib)
    table = Table(f"Predicted memory at a step's fullest moments, {unit}", ["", *phases])
    for part in next(iter(phases.values()))._fields:
        table.rows.append([part, *(shown(getattr(phase, part)) for phase in phases.values())])
    table.rows += [[], ["at once", *(shown(phase.total) for phase in phases.values())]]
    return table


def _fit_lines(found: Forecast) -> list[str]:
    memory, batch = found.memory, found.plan.batch
    peak = f"{_gib(memory.allocated_bytes)} GiB"
    if found.kernels == "cuda":
        peak += (
            f" + {FRAGMENTATION:.0%} that the allocator cannot use + {_gib(CONTEXT_BYTES)} CUDA context (both assumed)"
            f" = {_gib(found.needed_bytes)} GiB"
        )
    status = "[green]fits[/]" if found.fits else "[red]does not fit[/]"
    lines = [f"Memory: {peak} of {_gib(found.budget_bytes)} GiB ({found.budget_note}): {status}."]
    if memory.host_bytes:
        lines.append(f"Offloading takes another {_gib(memory.host_bytes)} GiB of the CPU's memory for each rank.")
    if found.largest is None:
        return [
            *lines,
            "Not even one sequence fits. ZeRO over more cards, or offloading (zero3-offload), shrinks what does not "
            "depend on the micro-batch; activation checkpointing what does.",
        ]
    largest = f"Largest micro-batch that fits: {found.largest.batch}; say --micro-batch to {command('pretrain')}."
    if found.largest.batch.micro_batch_size == batch.micro_batch_size:
        share = ", each rank's whole share" if batch.gradient_accumulation_steps == 1 else ""
        largest = f"Largest micro-batch that fits: {batch.micro_batch_size}{share}."
    return [*lines, largest]


def _time_lines(found: Forecast) -> list[str]:
    run_time, steps = found.run_time(), found.recipe.schedule.total_steps
    if run_time is None:
        return ["Time: not predicted, because only the card's memory is known. Give its name with --card."]
    lines = [f"Time: [bold]{run_time}[/] for {steps:,} steps."]
    if found.time is None:
        lines.append(
            f"  This is {CPU_SLOWER[0]} to {CPU_SLOWER[1]} times what the recipe's FLOPs take at the rate of one large "
            f"matrix product, which was measured on this CPU just now."
        )
    else:
        lines += _card_lines(found, found.time)
    left_out = ["communication between ranks"] if found.plan.batch.world_size > 1 else []
    if any(name.startswith("offload") for name in found.plan.document["zero_optimization"]):
        left_out.append("offloading to the CPU")
    return lines + ([f"  Not included: {', '.join(left_out)}."] if left_out else [])


def _card_lines(found: Forecast, time: StepTime) -> list[str]:
    products, rest, host = (f"{1e3 * part:,.3g} ms" for part in time)
    ends = sorted(evidence(), key=lambda each: each.factor)
    lines = [
        f"  The roofline of a step is {1e3 * time.roofline_s:,.3g} ms: {products} of matrix products at "
        f"{PRODUCT_EFFICIENCY:.0%} of the peak and {rest} of everything else at {BANDWIDTH_EFFICIENCY:.0%} of the "
        f"bandwidth; meanwhile the host needs {host} at {LAUNCH_S * 1e6:.0f} µs an operation. All three are assumed.",
        f"  The range is {SLOWER[0]} to {SLOWER[1]} times the roofline and contains every published run, from "
        f"{_run(ends[0])} to {_run(ends[-1])}.",
    ]  # fmt: skip
    if not found.was_run:
        lines.append("  None of our steps has been timed on this card.")
    return lines + [
        f"  Others took {days:g} days on this card ({where.short})." for where, days in found.published_days()
    ]


def _run(found: Evidence) -> str:
    """Return a description of a published run for `_card_lines`."""
    compared = "" if found.precision == found.run.precision else f", compared with a roofline in {found.precision}"
    return f"{found.factor:.2f} ({found.publication.short} in {found.run.precision} on a {found.run.card}{compared})"


def _lack_lines(found: Forecast) -> list[str]:
    if found.card is None:
        return []
    if not found.lacks:
        return ["It lacks nothing: bf16, tensor cores, flash attention, torch.compile."]
    lines = [f"  {escape(lack.what)}: {escape(lack.consequence)}." for lack in found.lacks]
    install = []
    if found.card.capability < DEFAULT_TORCH_CAPABILITY:
        install = ["torch's default builds have no code for this card; make install takes the one for CUDA 12.6."]
    return [*install, "What this card lacks:", *lines]


def _published_lines(found: Forecast) -> list[str]:
    here = found.plan.precision.name + (", context and all" if found.kernels == "cuda" else " on a CPU")
    lines = []
    for where, theirs, ours in found.published_memory():
        steps = theirs.gradient_accumulation_steps
        lines.append(
            f"  {steps} accumulation step{'s' if steps > 1 else ''}: {theirs.memory_gb:g} GB ({where.short}), "
            f"predicted here {ours / 1e9:.1f} GB."
        )
    return [f"Memory that others needed for this recipe (here {here}):", *lines] if lines else []


def print_forecasts(forecasts: list[list[Forecast]], console: Console) -> None:
    """Print a table of every card with every recipe: the largest micro-batch that fits, its memory, and the time."""
    table = Table(
        "Predicted for every card and every recipe",
        ["card; usable GiB, JSON", "recipe", "batch", "GiB", "time"],
        text_columns=5,
        caption="* No step has been run on this card. any GPU: the default JSON. "
        f"For details: {command('plan')} --recipe R --card NAME",
    )
    for of_card in forecasts:
        first = of_card[0]
        assert first.card is not None
        name = f"{first.card.name.removeprefix('NVIDIA ').removeprefix('GeForce ')}{'' if first.was_run else ' *'}"
        titles = [name, f"  {first.card.usable_gib:.1f}; {first.card.ds_config or 'any GPU'}"]
        rows = [[found.recipe.name, *_cells(found)] for found in of_card]
        for title, row in itertools.zip_longest(titles, rows, fillvalue=""):
            table.rows.append([str(title), *(row or [""] * 4)])
        table.rows.append([])
    print_table(table, console)


def _cells(found: Forecast) -> list[str]:
    if not found.fits:
        return ["does not fit", _gib(found.needed_bytes), ""]
    batch = found.plan.batch
    size = f"{batch.micro_batch_size} x {batch.gradient_accumulation_steps}"
    return [size, _gib(found.needed_bytes), str(found.run_time() or "")]


def as_json(found: Forecast) -> dict[str, Any]:
    """Return every number of a forecast, in bytes and seconds."""
    time, run_time = found.time, found.run_time()
    return {
        "recipe": found.recipe.name,
        "ds_config": found.ds_config,
        "card": found.card.name if found.card is not None else None,
        "was_run_on_this_card": found.was_run,
        "precision": found.plan.precision.name,
        "zero_stage": found.plan.stage,
        "micro_batch_size": found.plan.batch.micro_batch_size,
        "gradient_accumulation_steps": found.plan.batch.gradient_accumulation_steps,
        "world_size": found.plan.batch.world_size,
        "memory_bytes": {
            name: phase._asdict() | {"at_once": phase.total} for name, phase in found.memory.phases.items()
        },
        "allocated_bytes": found.memory.allocated_bytes,
        "needed_bytes": found.needed_bytes,
        "host_bytes": found.memory.host_bytes,
        "usable_bytes": round(found.budget_bytes),
        "fits": found.fits,
        "largest_micro_batch_size": found.largest.batch.micro_batch_size if found.largest is not None else None,
        "step_s": time._asdict() | {"roofline_s": time.roofline_s} if time is not None else None,
        "days": None if run_time is None else [seconds / _DAY_S for seconds in run_time],
        "lacks": [lack._asdict() for lack in found.lacks],
        "published_memory": [
            {"source": where.source, "theirs_gb": theirs.memory_gb, "ours_bytes": ours}
            | {"gradient_accumulation_steps": theirs.gradient_accumulation_steps}
            for where, theirs, ours in found.published_memory()
        ],
        "published_days": [{"source": where.source, "days": days} for where, days in found.published_days()],
        "notes": list(found.plan.notes),
    }


def _mib(number_bytes: float) -> str:
    return f"{1024 * number_bytes / GIB:.1f}"


def _gib(number_bytes: float) -> str:
    return f"{number_bytes / GIB:.2f}"
