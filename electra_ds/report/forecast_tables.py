"""Forecasts as tables, text and JSON."""

from __future__ import annotations

import itertools
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from electra_ds.config.cards import DEFAULT_TORCH_CAPABILITY
from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.recipe import Recipe
from electra_ds.engine.memory import CONTEXT_BYTES, FRAGMENTATION
from electra_ds.engine.step_time import BANDWIDTH_EFFICIENCY, LAUNCH_S, PRODUCT_EFFICIENCY, SLOWER, StepTime
from electra_ds.program import command
from electra_ds.report.forecast import GIB, Forecast

_DAY_S = 86_400


def print_forecast(found: Forecast, console: Console) -> None:
    """Everything there is to say of one."""
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
    console.print(_memory_table(found))
    lines = [*_fit_lines(found), *_time_lines(found), *_lack_lines(found), *_published_lines(found)]
    for line in lines:
        console.print(line, highlight=False)


def _memory_table(found: Forecast) -> Table:
    phases = found.memory.phases
    table = Table(title="Predicted memory at a step's fullest moments, GiB", title_justify="left", box=box.SIMPLE)
    for column in ("", *phases):
        table.add_column(column, justify="right" if column else "left")
    for part in next(iter(phases.values()))._fields:
        table.add_row(part, *(_gib(getattr(phase, part)) for phase in phases.values()))
    table.add_section()
    table.add_row("at once", *(_gib(phase.total) for phase in phases.values()))
    return table


def _fit_lines(found: Forecast) -> list[str]:
    memory, batch = found.memory, found.plan.batch
    peak = f"{_gib(memory.allocated_bytes)} GiB"
    if found.kernels == "cuda":
        peak += (
            f" + {FRAGMENTATION:.0%} that the allocator cannot use + {_gib(CONTEXT_BYTES)} CUDA context (both assumed)"
        )
        peak += f" = {_gib(found.needed_bytes)} GiB"
    verdict = "[green]fits[/]" if found.fits else "[red]does not fit[/]"
    lines = [f"Memory: {peak} of {_gib(found.budget_bytes)} GiB ({found.budget_note}): {verdict}."]
    if memory.host_bytes:
        lines.append(f"Beside it {_gib(memory.host_bytes)} GiB of the CPU's memory for each rank, by offloading.")
    if found.largest is None:
        lines.append(
            "Not even one sequence fits. ZeRO over more cards, or offloading (zero3-offload), shrinks what does not "
            "depend on the micro-batch; activation checkpointing what does."
        )
    elif found.largest.batch.micro_batch_size != batch.micro_batch_size:
        lines.append(
            f"Largest micro-batch that fits: {found.largest.batch}; say --micro-batch to {command('pretrain')}."
        )
    else:
        lines.append(
            f"Largest micro-batch that fits: {batch.micro_batch_size}"
            + (", each rank's whole share." if batch.gradient_accumulation_steps == 1 else ".")
        )
    return lines


def _time_lines(found: Forecast) -> list[str]:
    time, card, recipe = found.time, found.card, found.recipe
    if time is None or card is None:
        return ["Time: not predicted; give a card."]
    products, rest, host = (f"{1e3 * part:,.3g} ms" for part in time)
    lines = [
        f"Time: [bold]{_span(time, recipe)}[/] for {recipe.schedule.total_steps:,} steps.",
        f"  It rests on a roofline of {1e3 * time.roofline_s:,.3g} ms a step: {products} of matrix products at "
        f"{PRODUCT_EFFICIENCY:.0%} of the peak and {rest} of everything else at {BANDWIDTH_EFFICIENCY:.0%} of the "
        f"bandwidth; meanwhile the host needs {host} at {LAUNCH_S * 1e6:.0f} µs an operation. All of that is assumed, "
        f"and multiplied by {SLOWER[0]} to {SLOWER[1]}: so much longer published runs took than rooflines of their own "
        f"steps. " + ("" if found.was_run else "No step of ours has been timed on this card."),
    ]
    if left_out := _left_out(found.plan):
        lines.append(f"  Not in it, and to be added: {', '.join(left_out)}.")
    return lines + [
        f"  Others took {days:g} days on this card ({where.short})." for where, days in found.published_days()
    ]


def _left_out(plan: DeepSpeedPlan) -> list[str]:
    """What takes time and the roofline does not know of."""
    left_out = []
    if plan.batch.world_size > 1:
        left_out.append("talk between cards")
    if any(name.startswith("offload") for name in plan.document["zero_optimization"]):
        left_out.append("offloading to the CPU")
    return left_out


def _lack_lines(found: Forecast) -> list[str]:
    if found.card is None:
        return []
    install = []
    if found.card.capability < DEFAULT_TORCH_CAPABILITY:
        install = ["torch's default builds have no code for this card; make install takes the one for CUDA 12.6."]
    if not found.lacks:
        return ["It lacks nothing: bf16, tensor cores, flash attention, torch.compile."]
    return [
        *install,
        "What this card lacks:",
        *(f"  {escape(lack.what)}: {escape(lack.consequence)}." for lack in found.lacks),
    ]


def _published_lines(found: Forecast) -> list[str]:
    rows = found.published_memory()
    if not rows:
        return []
    here = found.plan.precision.name + (", context and all" if found.kernels == "cuda" else " on a CPU")
    lines = [f"Beside what others needed for this recipe (here {here}):"]
    for where, theirs, ours in rows:
        steps = theirs.gradient_accumulation_steps
        lines.append(
            f"  {steps} accumulation step{'s' if steps > 1 else ''}: {theirs.memory_gb:g} GB ({where.short}), "
            f"predicted here {ours / 1e9:.1f} GB."
        )
    return lines


def print_forecasts(forecasts: list[list[Forecast]], console: Console) -> None:
    """Every card with every recipe: the largest micro-batch that fits, its memory, and the time."""
    table = Table(
        title="Predicted for every card and every recipe", title_justify="left", box=box.SIMPLE, caption_justify="left",
        caption="* No step has been run on this card. "
        f"{command('plan')} --recipe R --ds-config C --card NAME says more.",
    )  # fmt: skip
    for column in ("card; usable GiB, JSON", "recipe", "batch", "GiB", "time"):
        table.add_column(column)
    for of_card in forecasts:
        first = of_card[0]
        assert first.card is not None
        name = f"{first.card.name.split('GeForce ')[-1]}{'' if first.was_run else ' *'}"
        titles = [name, f"  {first.card.usable_gib:.1f}; {first.ds_config}"]
        rows = [(found.recipe.name, *_cells(found)) for found in of_card]
        for title, row in itertools.zip_longest(titles, rows, fillvalue=()):
            table.add_row(title or "", *row)
        table.add_section()
    console.print(table)


def _cells(found: Forecast) -> list[str]:
    if not found.fits:
        return ["does not fit", _gib(found.needed_bytes), ""]
    batch = found.plan.batch
    span = "" if found.time is None else _span(found.time, found.recipe)
    return [f"{batch.micro_batch_size} x {batch.gradient_accumulation_steps}", _gib(found.needed_bytes), span]


def as_json(found: Forecast) -> dict[str, Any]:
    """Every number, bytes and seconds."""
    time, steps = found.time, found.recipe.schedule.total_steps
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
        "days": list(time.days(steps)) if time is not None else None,
        "lacks": [lack._asdict() for lack in found.lacks],
        "published_memory": [
            {"source": where.source, "theirs_gb": theirs.memory_gb, "ours_bytes": ours}
            | {"gradient_accumulation_steps": theirs.gradient_accumulation_steps}
            for where, theirs, ours in found.published_memory()
        ],
        "published_days": [{"source": where.source, "days": days} for where, days in found.published_days()],
        "notes": list(found.plan.notes),
    }


def _gib(number_bytes: float) -> str:
    return f"{number_bytes / GIB:.2f}"


def _span(time: StepTime, recipe: Recipe) -> str:
    """Of the whole schedule, `9 to 19 days`, in the unit that suits the longer one."""
    low_s, high_s = (days * _DAY_S for days in time.days(recipe.schedule.total_steps))
    for unit, seconds in (("days", _DAY_S), ("hours", 3600), ("min", 60)):
        if high_s >= 2 * seconds:
            return f"{_two_digits(low_s / seconds)} to {_two_digits(high_s / seconds)} {unit}"
    return f"{_two_digits(low_s)} to {_two_digits(high_s)} s"


def _two_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
