"""Numbers that others published, each with its source: the files in `electra_ds/report/published/`."""

from __future__ import annotations

import importlib.resources
from typing import Any, NamedTuple

from electra_ds.config.cards import find_card
from electra_ds.config.deepspeed import DeepSpeedPlan, default_ds_config, resolve
from electra_ds.config.deepspeed_sections import precision_section
from electra_ds.config.overrides import load_recipe
from electra_ds.config.recipe import Recipe, Section, load_yaml
from electra_ds.pretraining.step_time import StepTime, step_time


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

    def days_on(self, card: str) -> float | None:
        """Return how long a complete pretraining took on this card, or None."""
        return next((run.days for run in self.runs if run.card == card), None)


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


def publications(recipe_name: str) -> list[Publication]:
    """Those whose training the shipped recipe of this name reimplements."""
    return [publication for publication in _all() if publication.recipe == recipe_name and not publication.overrides]


def evidence() -> list[Evidence]:
    """Return every published run with the roofline of our step in the run's precision and, where `bin/plan` prints the
    run next to a prediction, in that of the card's default JSON."""
    found = []
    for publication in _all():
        for run in publication.runs:
            length = [] if run.sequence_length is None else [f"data.sequence_length={run.sequence_length}"]
            recipe = load_recipe(publication.recipe, [*publication.overrides, *length])
            card = find_card(run.card)
            assert card is not None, run.card
            plans = [_plan(precision_section(run.precision), recipe)]
            if run.days is not None:
                plans.append(_plan(default_ds_config(True, card)[0], recipe))
            for precision, plan in {plan.precision.name: plan for plan in reversed(plans)}.items():
                time = step_time(recipe, recipe.tokenizer.vocab_size, plan, card)
                assert time is not None, precision
                found.append(Evidence(publication, run, recipe, precision, _step_s(run, recipe), time))
    return found


def _plan(values: dict[str, Any], recipe: Recipe) -> DeepSpeedPlan:
    return resolve(values, recipe, world_size=1, auto_fp16=True, source="a published run")


def _step_s(run: PublishedRun, recipe: Recipe) -> float:
    if run.days is not None:
        return run.days * 86_400 / recipe.schedule.total_steps
    assert run.sequences_per_s is not None
    return recipe.global_batch_size / run.sequences_per_s


def _all() -> list[Publication]:
    folder = importlib.resources.files("electra_ds") / "report" / "published"
    return [
        Publication.model_validate(load_yaml(file.read_text("utf8"), file.name))
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".yaml")
    ]
