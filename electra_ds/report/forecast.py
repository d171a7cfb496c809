"""Predict what a recipe needs on this CPU or on any card, here or not: memory by part, the micro-batch that fits, and
time, as tables, text and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from rich.console import RenderableType
from rich.markup import escape

from electra_ds.config.cards import (
    CARDS,
    DEFAULT_TORCH_CAPABILITY,
    Card,
    Missing,
    has_slow_fp16,
    missing_features,
    slow_fp16_note,
)
from electra_ds.config.deepspeed import DeepSpeedPlan, default_ds_config, resolve, with_micro_batch
from electra_ds.config.recipe import Recipe
from electra_ds.core.errors import ConfigError
from electra_ds.core.program import command
from electra_ds.pretraining.memory import (
    CONTEXT_BYTES,
    CPU_SHARE,
    FRAGMENTATION,
    Kernels,
    PeakMemory,
    TrainingState,
    training_state,
)
from electra_ds.pretraining.objectives.base import Objective
from electra_ds.pretraining.run_time import (
    BANDWIDTH_EFFICIENCY,
    CPU_SLOWER,
    LAUNCH_S,
    PRODUCT_EFFICIENCY,
    SLOWER,
    RunTime,
    StepTime,
    time_of_steps,
)
from electra_ds.report.tables import Table

GIB = 2**30
_DAY_S = 86_400
_NEEDS_AUTO = "the JSON's micro-batch does not fit; this is the largest that does, with --micro-batch auto"


@dataclass(frozen=True)
class Forecast:
    """One recipe under one DeepSpeed JSON on one kind of card."""

    recipe: Recipe
    vocab_size: int
    ds_config: str
    plan: DeepSpeedPlan
    card: Card | None
    kernels: Kernels
    budget_bytes: float
    """The device memory that a program may use."""
    budget_note: str
    memory: PeakMemory | None
    """None if the objective does not predict it; a step then takes `state_bytes` and its activations."""
    state_bytes: int
    """The bytes of weights, gradients and the optimizer's state."""
    largest: DeepSpeedPlan | None
    """The plan with the largest micro-batch that fits; None if none does, or without a prediction."""
    time: StepTime | None
    """The time of a step on the card; None for a CPU, if only the card's memory is known, or without a prediction."""
    missing: list[Missing]
    first: Forecast | None = None
    """The forecast of the run that pretrains the generator before this one, by `generator.recipe`."""

    @property
    def needed_bytes(self) -> int | None:
        """The bytes that must be free, also before, for the generator's own pretraining; None if an objective does not
        predict them."""
        own = None if self.memory is None else self.memory.needed_bytes(self.kernels)
        if self.first is None or own is None:
            return own
        before = self.first.needed_bytes
        return None if before is None else max(before, own)

    @property
    def fits(self) -> bool | None:
        """True if the plan fits. None if this is unknown: the training state fits, and the rest is not predicted."""
        if self.needed_bytes is None:
            return None if self.state_bytes <= self.budget_bytes else False
        return self.needed_bytes <= self.budget_bytes

    def steps(self, stop_at: int | None = None) -> int:
        """Return the number of steps of `run_time`."""
        return (stop_at or self.recipe.schedule.total_steps) + (0 if self.first is None else self.first.steps())

    def run_time(self, stop_at: int | None = None, threads: int | None = None) -> RunTime | None:
        """Return the time of all steps, with those of the generator's own pretraining.

        None if only a card's memory is known, or without a prediction. On a CPU, all ranks share its cores, and the
        range is measured when it is needed. stop_at: the step at which the run ends, instead of the schedule's end.
        threads: of a CPU, for each rank.
        """
        own = self.own_time(stop_at, threads)
        if self.first is None or own is None:
            return own
        before = self.first.run_time(threads=threads)
        return None if before is None else before + own

    def own_time(self, stop_at: int | None = None, threads: int | None = None) -> RunTime | None:
        """Return what `run_time` does, without the generator's own pretraining."""
        steps = stop_at or self.recipe.schedule.total_steps
        if self.kernels == "cuda":
            return time_of_steps(self.time, steps)
        threads = threads or max(1, torch.get_num_threads() // self.plan.batch.world_size)
        objective: Objective[Any] = Objective.of(self.recipe, self.vocab_size)
        return objective.run_time(self.plan, torch.device("cpu"), steps=steps, threads=threads)


def forecast(
    recipe: Recipe,
    values: dict[str, Any],
    source: str,
    *,
    card: Card | None,
    memory_gib: float | None = None,
    vocab_size: int | None = None,
    world_size: int = 1,
) -> Forecast:
    """Return the forecast for a card, with the JSON resolved for it, and that of the generator's own pretraining.

    memory_gib: the free memory, in place of the card's own. Without card and memory the forecast is for this machine's
    CPU. Raises ConfigError if the JSON does not fit the recipe, or asks for something that the card lacks.
    """
    how: dict[str, Any] = {"card": card, "memory_gib": memory_gib, "vocab_size": vocab_size, "world_size": world_size}
    vocab_size = vocab_size or recipe.tokenizer.vocab_size
    kernels: Kernels = "cuda" if card is not None or memory_gib is not None else "cpu"
    auto_fp16 = kernels == "cuda" and not (card is not None and has_slow_fp16(card.name))
    plan = resolve(values, recipe, world_size=world_size, auto_fp16=auto_fp16, source=source)
    if card is not None and card.bf16_tflops is None and plan.precision.name.endswith("bf16"):
        instead = "fp32, as in cpu" if has_slow_fp16(card.name) else "fp16, as in gtx1060-6gb"
        raise ConfigError(f"{card.name} has no bf16, which {source} asks for. Use {instead}.")
    note = slow_fp16_note(card.name, plan.precision.name) if card is not None else None
    if note is not None:
        plan = replace(plan, notes=(*plan.notes, note))
    budget_bytes, budget_note = device_budget(card, memory_gib)
    objective: Objective[Any] = Objective.of(recipe, vocab_size)
    largest = None
    if objective.needed_bytes(plan, kernels) is not None:
        largest = plan.with_largest_micro_batch(lambda cut: (objective.needed_bytes(cut, kernels) or 0) <= budget_bytes)
    if plan.is_micro_batch_open and largest is not None:
        plan = largest
    return Forecast(
        recipe=recipe,
        vocab_size=vocab_size,
        ds_config=source,
        plan=plan,
        card=card,
        kernels=kernels,
        budget_bytes=budget_bytes,
        budget_note=budget_note,
        memory=objective.peak_memory(plan, kernels),
        state_bytes=_state(objective, plan).total,
        largest=largest,
        time=objective.step_time(plan, card) if card is not None else None,
        missing=[] if card is None else missing_features(card.name, card.capability),
        first=None if (first := recipe.first_recipe()) is None else forecast(first, values, source, **how),
    )


def _state(objective: Objective[Any], plan: DeepSpeedPlan) -> TrainingState:
    shape = objective.shape
    if shape is None:
        return training_state(sum(objective.parameter_counts().values()), plan)
    return training_state(shape.trained_parameters, plan, shape.frozen_parameters)


def device_budget(card: Card | None, memory_gib: float | None) -> tuple[float, str]:
    if memory_gib is not None:
        return memory_gib * GIB, "as given"
    if card is None:
        available = psutil.virtual_memory().available
        return CPU_SHARE * available, f"{CPU_SHARE:.0%} of the {available / GIB:.1f} GiB that are free on this machine"
    why = "the display and the driver" if card.has_display else "the driver"
    return card.usable_gib * GIB, f"{card.memory_gib:g} GiB less {card.memory_gib - card.usable_gib:.1f} for {why}"


def forecast_all(recipes: Sequence[Recipe]) -> list[Forecast]:
    """Return a forecast for every card with every recipe, under the card's default JSON, with the largest micro-batch
    that fits if the JSON's does not."""
    return [_with_any_micro_batch(recipe, card) for card in CARDS for recipe in recipes]


def _with_any_micro_batch(recipe: Recipe, card: Card) -> Forecast:
    values, source = default_ds_config(True, card)
    found = forecast(recipe, values, source, card=card)
    if found.fits is not False or found.largest is None:
        return found
    found = forecast(recipe, with_micro_batch(values, "auto"), source, card=card)
    return replace(found, plan=replace(found.plan, notes=(*found.plan.notes, _NEEDS_AUTO)))


# --- as tables, text and JSON


def forecast_report(found: Forecast) -> list[RenderableType]:
    """Return one forecast for a rich console: the memory, the time, and what the card lacks."""
    device = "a GPU" if found.kernels == "cuda" else "this machine's CPU"
    if found.card is not None:
        device = found.card.name
    recipe = found.recipe
    return [
        f"[bold]{escape(recipe.name)}[/] with {escape(found.ds_config)} on {escape(device)}: "
        f"{found.plan.precision.name}, ZeRO stage {found.plan.stage}, micro-batch x accumulation = {found.plan.batch}, "
        f"{recipe.data.sequence_length} tokens a sequence, {found.vocab_size:,} pieces",
        *(f"[yellow]Note:[/] {escape(note)}." for note in found.plan.notes),
        *_memory_lines(found),
        *_time_lines(found),
        *_lack_lines(found),
    ]


def memory_table(memory: PeakMemory) -> Table:
    """Return a table of the memory of each part at the peaks of a step."""
    phases = memory.phases
    is_small = max(phase.total for phase in phases.values()) < GIB / 4
    unit, shown = ("MiB", _mib) if is_small else ("GiB", _gib)
    table = Table(f"Predicted memory at the peaks of a step, {unit}", ["", *phases])
    for part in next(iter(phases.values()))._fields:
        table.rows.append([part, *(shown(getattr(phase, part)) for phase in phases.values())])
    table.rows += [[], ["at once", *(shown(phase.total) for phase in phases.values())]]
    return table


def _memory_lines(found: Forecast) -> list[RenderableType]:
    memory, batch = found.memory, found.plan.batch
    if memory is None or found.needed_bytes is None:
        return [
            f"Memory: {_gib(found.state_bytes)} GiB of {_gib(found.budget_bytes)} GiB ({found.budget_note}) for "
            f"weights, gradients and the optimizer's state. The objective {escape(found.recipe.objective)} does not "
            f"predict the memory of activations, so "
            f"{'a step does not fit' if found.fits is False else 'whether a step fits is unknown'}."
        ]
    peak = f"{_gib(memory.allocated_bytes)} GiB"
    if found.kernels == "cuda":
        peak += (
            f" + {FRAGMENTATION:.0%} that the allocator cannot use + {_gib(CONTEXT_BYTES)} CUDA context (both assumed)"
            f" = {_gib(memory.needed_bytes(found.kernels))} GiB"
        )
    status = "[green]fits[/]" if found.fits else "[red]does not fit[/]"
    lines: list[RenderableType] = [
        memory_table(memory),
        f"Memory: {peak} of {_gib(found.budget_bytes)} GiB ({found.budget_note}): {status}.",
    ]
    if found.first is not None and found.first.needed_bytes is not None:
        lines.append(f"The generator's own pretraining, which comes first, takes {_gib(found.first.needed_bytes)} GiB.")
    if memory.host_bytes:
        lines.append(f"Offloading takes another {_gib(memory.host_bytes)} GiB of the CPU's memory for each rank.")
    if found.largest is None:
        return [
            *lines,
            "Not even one sequence fits. ZeRO over more cards, or offloading (zero3-offload), shrinks what does not "
            "depend on the micro-batch; activation checkpointing shrinks what does.",
        ]
    largest = (
        f"Largest micro-batch that fits: {found.largest.batch}; give it to {command('pretrain')} with --micro-batch."
    )
    if found.largest.batch.micro_batch_size == batch.micro_batch_size:
        share = ", each rank's full share" if batch.gradient_accumulation_steps == 1 else ""
        largest = f"Largest micro-batch that fits: {batch.micro_batch_size}{share}."
    return [*lines, largest]


def _time_lines(found: Forecast) -> list[str]:
    own, before = found.own_time(), None if found.first is None else found.first.run_time()
    steps = found.recipe.schedule.total_steps
    if own is None or (found.first is not None and before is None):
        if found.kernels == "cuda" and found.card is None:
            return ["Time: not predicted, because only the card's memory is known. Give its name with --card."]
        return [f"Time: not predicted by the objective {escape(found.recipe.objective)}."]
    lines = [f"Time: [bold]{own}[/] for {steps:,} steps."]
    if found.first is not None and before is not None:
        lines = [
            f"Time: [bold]{before + own}[/]: {before} for the {found.first.steps():,} steps of the generator, which is "
            f"pretrained first, and {own} for {steps:,} steps."
        ]
    if found.time is None:
        lines.append(
            f"  This is {CPU_SLOWER[0]} to {CPU_SLOWER[1]} times the sum of two times: the FLOPs at the rate of "
            f"one large matrix product, and its operations at the rate of those in a small layer. Both rates were just "
            f"measured on this CPU."
        )
    else:
        lines += _card_lines(found, found.time)
    left_out = ["communication between ranks"] if found.plan.batch.world_size > 1 else []
    if any(name.startswith("offload") for name in found.plan.document["zero_optimization"]):
        left_out.append("offloading to the CPU")
    return lines + ([f"  Not included: {', '.join(left_out)}."] if left_out else [])


def _card_lines(found: Forecast, time: StepTime) -> list[str]:
    products, rest, host = (f"{1e3 * part:,.3g} ms" for part in time)
    return [
        f"  The roofline of a step is {1e3 * time.roofline_s:,.3g} ms: {products} of matrix products at "
        f"{PRODUCT_EFFICIENCY:.0%} of the peak and {rest} of everything else at {BANDWIDTH_EFFICIENCY:.0%} of the "
        f"bandwidth; meanwhile the host needs {host} at {LAUNCH_S * 1e6:.0f} µs an operation. All three are assumed.",
        f"  The range is {SLOWER[0]} to {SLOWER[1]} times the roofline and contains every published run "
        f"(docs/performance.md). electra_ds has not been timed on this card yet.",
    ]


def _lack_lines(found: Forecast) -> list[str]:
    if found.card is None:
        return []
    if not found.missing:
        return ["It lacks nothing: bf16, tensor cores, flash attention, torch.compile."]
    lines = [f"  {escape(feature.what)}: {escape(feature.consequence)}." for feature in found.missing]
    install = []
    if found.card.capability < DEFAULT_TORCH_CAPABILITY:
        install = ["torch's default builds have no code for this card; make install uses the one for CUDA 12.6."]
    return [*install, "What this card lacks:", *lines]


def forecasts_table(forecasts: Sequence[Forecast]) -> Table:
    """Return a table of every card with every recipe: the largest micro-batch that fits, its memory, and the time."""
    table = Table(
        "Predicted for every card",
        ["card", "recipe", "batch", "GiB", "time"],
        text_columns=5,
        caption="* with --micro-batch auto, since the micro-batch of the card's JSON does not fit. electra_ds has not "
        f"been run on any of these cards. Details: {command('plan')} --recipe R --card NAME",
    )
    for found in forecasts:
        card = found.card
        assert card is not None
        name = card.name.removeprefix("NVIDIA ").removeprefix("GeForce ")
        table.rows.append([name, found.recipe.name, *_cells(found)])
    return table


def _cells(found: Forecast) -> list[str]:
    needed = "?" if found.needed_bytes is None else _gib(found.needed_bytes)
    if found.fits is False:
        return ["does not fit", needed, ""]
    batch = found.plan.batch
    size = f"{batch.micro_batch_size} x {batch.gradient_accumulation_steps}"
    size += " *" if _NEEDS_AUTO in found.plan.notes else ""
    return [size, needed, str(found.run_time() or "")]


def as_json(found: Forecast) -> dict[str, Any]:
    """Return every number of a forecast, in bytes and seconds."""
    time, run_time, memory = found.time, found.run_time(), found.memory
    phases = {} if memory is None else memory.phases
    return {
        "recipe": found.recipe.name,
        "ds_config": found.ds_config,
        "card": found.card.name if found.card is not None else None,
        "precision": found.plan.precision.name,
        "zero_stage": found.plan.stage,
        "micro_batch_size": found.plan.batch.micro_batch_size,
        "gradient_accumulation_steps": found.plan.batch.gradient_accumulation_steps,
        "world_size": found.plan.batch.world_size,
        "memory_bytes": {name: phase._asdict() | {"at_once": phase.total} for name, phase in phases.items()},
        "state_bytes": found.state_bytes,
        "allocated_bytes": None if memory is None else memory.allocated_bytes,
        "needed_bytes": found.needed_bytes,
        "host_bytes": None if memory is None else memory.host_bytes,
        "usable_bytes": round(found.budget_bytes),
        "fits": found.fits,
        "largest_micro_batch_size": found.largest.batch.micro_batch_size if found.largest is not None else None,
        "step_s": time._asdict() | {"roofline_s": time.roofline_s} if time is not None else None,
        "days": None if run_time is None else [seconds / _DAY_S for seconds in run_time.range_s],
        "generator": None if found.first is None else as_json(found.first),
        "lacks": [feature._asdict() for feature in found.missing],
        "notes": list(found.plan.notes),
    }


def _mib(number_bytes: float) -> str:
    return f"{1024 * number_bytes / GIB:.1f}"


def _gib(number_bytes: float) -> str:
    return f"{number_bytes / GIB:.2f}"
