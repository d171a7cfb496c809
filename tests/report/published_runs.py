"""How long published pretrainings took, from `published/`, next to the roofline of our step at their size."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from electra_ds.config.cards import find_card
from electra_ds.config.deepspeed import DeepSpeedPlan, default_ds_config, resolve
from electra_ds.config.deepspeed_sections import precision_section
from electra_ds.config.recipe import Recipe, load_recipe
from electra_ds.config.sections import Section
from electra_ds.config.values import load_yaml
from electra_ds.pretraining.run_time import StepTime, step_time
from tests.helpers import shape_of


class PublishedMemory(Section):
    gradient_accumulation_steps: int
    memory_gb: float


class PublishedRun(Section):
    """How long a pretraining took on one card: either `days` for all its steps or `sequences_per_s`."""

    card: str
    """The name in `config.cards`."""
    precision: str
    """The precision of its products."""
    days: float | None = None
    sequences_per_s: float | None = None
    sequence_length: int | None = None
    """None for the recipe's."""


class Publication(Section):
    source: str
    short: str
    recipe: str
    """The shipped recipe that reimplements it."""
    overrides: list[str]
    """Changes to the recipe if the published model was of another size."""
    memory: list[PublishedMemory]
    runs: list[PublishedRun]


class Evidence(NamedTuple):
    """A published run and the roofline of our step at its size."""

    publication: Publication
    run: PublishedRun
    recipe: Recipe
    """The shipped recipe at the size of the run."""
    precision: str
    """The precision of the roofline."""
    step_s: float
    """The time that a step of the run took."""
    time: StepTime

    @property
    def factor(self) -> float:
        """How many times as long as the roofline the run took."""
        return self.step_s / self.time.roofline_s


def publications() -> list[Publication]:
    files = sorted((Path(__file__).parent / "published").glob("*.yaml"))
    return [Publication.model_validate(load_yaml(file.read_text("utf8"), file.name)) for file in files]


def evidence() -> list[Evidence]:
    """Return every published run with the roofline of our step in the run's precision and, for a complete training, in
    that of the card's default JSON."""
    found = []
    for publication in publications():
        for run in publication.runs:
            length = [] if run.sequence_length is None else [f"data.sequence_length={run.sequence_length}"]
            recipe = load_recipe(publication.recipe, [*publication.overrides, *length])
            card = find_card(run.card)
            assert card is not None, run.card
            plans = [_plan(precision_section(run.precision), recipe)]
            if run.days is not None:
                plans.append(_plan(default_ds_config(True, card)[0], recipe))
                step_s = run.days * 86_400 / recipe.schedule.total_steps
            else:
                assert run.sequences_per_s is not None
                step_s = recipe.global_batch_size / run.sequences_per_s
            for precision, plan in {plan.precision.name: plan for plan in reversed(plans)}.items():
                time = step_time(shape_of(recipe, recipe.tokenizer.vocab_size), plan, card)
                assert time is not None, precision
                found.append(Evidence(publication, run, recipe, precision, step_s, time))
    return found


def _plan(values: dict[str, Any], recipe: Recipe) -> DeepSpeedPlan:
    return resolve(values, recipe, world_size=1, auto_fp16=True, source="a published run")
