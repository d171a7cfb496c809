"""Predict what a recipe needs on a card that may not be here, or on this CPU: memory by part, the micro-batch that
fits, and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from electra_ds.config.cards import CARDS, Card, Lack, has_slow_fp16, lacks, slow_fp16_note
from electra_ds.config.deepspeed import DeepSpeedPlan, default_ds_config, resolve
from electra_ds.config.names import recipe_names
from electra_ds.config.overrides import load_recipe
from electra_ds.config.recipe import Recipe
from electra_ds.core.errors import ConfigError
from electra_ds.pretraining.memory import CPU_SHARE, Kernels, PeakMemory, largest_micro_batch, peak_memory
from electra_ds.pretraining.run_time import RunTime, pretraining_time, time_of_steps
from electra_ds.pretraining.step_time import StepTime, step_time
from electra_ds.report.publications import Publication, PublishedMemory, publications

GIB = 2**30
# Cards that benchmarks/results holds a training run of.
CARDS_RUN: frozenset[str] = frozenset()
_MOST_PUBLISHED_ACCUMULATION = 2


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
    """The memory of the device that a program may use."""
    budget_note: str
    memory: PeakMemory
    largest: DeepSpeedPlan | None
    """The plan with the largest micro-batch that fits; None where none does."""
    time: StepTime | None
    """The time of a step on the card; None on a CPU, and if only a card's memory is known."""
    lacks: list[Lack]
    publications: list[Publication]

    @property
    def needed_bytes(self) -> int:
        return self.memory.needed_bytes(self.kernels)

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.budget_bytes

    def published_memory(self) -> list[tuple[Publication, PublishedMemory, int]]:
        """Return (publication, theirs, ours for the same accumulation steps in this precision, in bytes). They had
        one card, so there is nothing to compare for several."""
        rows: list[tuple[Publication, PublishedMemory, int]] = []
        if self.plan.batch.world_size > 1:
            return rows
        for publication in self.publications:
            for theirs in publication.memory:
                size = self.recipe.global_batch_size // theirs.gradient_accumulation_steps
                cut = self.plan.with_micro_batch(size)
                peak = peak_memory(self.recipe, self.vocab_size, cut, self.kernels)
                rows.append((publication, theirs, peak.needed_bytes(self.kernels)))
        return rows

    def run_time(self) -> RunTime | None:
        """Return the time of all steps, or None where only a card's memory is known.

        On a CPU this measures the machine for a fifth of a second. Its cores are shared by all ranks.
        """
        steps = self.recipe.schedule.total_steps
        if self.kernels == "cuda":
            return time_of_steps(self.time, steps)
        threads = max(1, torch.get_num_threads() // self.plan.batch.world_size)
        device = torch.device("cpu")
        return pretraining_time(self.recipe, self.vocab_size, self.plan, device, steps=steps, threads=threads)

    def published_days(self) -> list[tuple[Publication, float]]:
        """Return (where, days) for complete trainings on one card of this kind, if this plan runs a step as they did:
        in one or two micro-batches, and computing nothing twice."""
        batch = self.plan.batch
        if self.card is None or batch.world_size > 1 or self.plan.checkpointed_layers:
            return []
        if batch.gradient_accumulation_steps > _MOST_PUBLISHED_ACCUMULATION:
            return []
        found = ((where, where.days_on(self.card.name)) for where in self.publications)
        return [(where, days) for where, days in found if days is not None]

    @property
    def was_run(self) -> bool:
        return self.card is not None and self.card.name in CARDS_RUN


def forecast(
    recipe: Recipe, values: dict[str, Any], source: str, *, card: Card | None, memory_gib: float | None = None,
    vocab_size: int | None = None, world_size: int = 1,
) -> Forecast:  # fmt: skip
    """Resolve the JSON for such a card and return what to expect.

    memory_gib: the free memory, in place of the card's own. Without either the plan is for this machine's CPU. Raises
    ConfigError if the JSON cannot be used with the recipe, or asks for what the card lacks.
    """
    vocab_size = vocab_size or recipe.tokenizer.vocab_size
    kernels: Kernels = "cuda" if card is not None or memory_gib is not None else "cpu"
    auto_fp16 = kernels == "cuda" and not (card is not None and has_slow_fp16(card.name))
    plan = resolve(values, recipe, world_size=world_size, auto_fp16=auto_fp16, source=source)
    if card is not None and card.bf16_tflops is None and plan.precision.name.endswith("bf16"):
        instead = "fp32, as in cpu" if has_slow_fp16(card.name) else "fp16, as in gtx1060-6gb"
        raise ConfigError(f"{card.name} has no bf16, which {source} asks for. Take {instead}.")
    note = slow_fp16_note(card.name, plan.precision.name) if card is not None else None
    if note is not None:
        plan = replace(plan, notes=(*plan.notes, note))
    budget_bytes, budget_note = device_budget(card, memory_gib)
    largest = largest_micro_batch(recipe, vocab_size, plan, budget_bytes, kernels)
    if plan.is_micro_batch_open and largest is not None:
        plan = largest
    is_as_shipped = (
        recipe.name in recipe_names()
        and recipe == load_recipe(recipe.name, [])
        and vocab_size == recipe.tokenizer.vocab_size
    )
    return Forecast(
        recipe=recipe,
        vocab_size=vocab_size,
        ds_config=source,
        plan=plan,
        card=card,
        kernels=kernels,
        budget_bytes=budget_bytes,
        budget_note=budget_note,
        memory=peak_memory(recipe, vocab_size, plan, kernels),
        largest=largest,
        time=step_time(recipe, vocab_size, plan, card) if card is not None else None,
        lacks=[] if card is None else lacks(card.name, card.capability),
        publications=publications(recipe.name) if is_as_shipped else [],
    )


def device_budget(card: Card | None, memory_gib: float | None) -> tuple[float, str]:
    if memory_gib is not None:
        return memory_gib * GIB, "as given"
    if card is None:
        available = psutil.virtual_memory().available
        return CPU_SHARE * available, f"{CPU_SHARE:.0%} of the {available / GIB:.1f} GiB that are free on this machine"
    why = "the display and the driver" if card.has_display else "the driver"
    return card.usable_gib * GIB, f"{card.memory_gib:g} GiB less {card.memory_gib - card.usable_gib:.1f} for {why}"


def forecast_all(recipes: Sequence[Recipe]) -> list[list[Forecast]]:
    """Return a forecast for every card with every recipe, under the card's default JSON."""
    return [[forecast(recipe, *default_ds_config(True, card), card=card) for recipe in recipes] for card in CARDS]
