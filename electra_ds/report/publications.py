"""Numbers that others published, each with its source: the files in `electra_ds/report/published/`.

`*.yaml` there hold memory and time of pretrainings, `glue/*.yaml` scores on GLUE and SQuAD.
"""

from __future__ import annotations

import importlib.resources
from typing import Any, Literal, NamedTuple

from pydantic import Field

from electra_ds.config.cards import find_card
from electra_ds.config.deepspeed import DeepSpeedPlan, default_ds_config, resolve
from electra_ds.config.deepspeed_sections import precision_section
from electra_ds.config.overrides import load_recipe
from electra_ds.config.recipe import Recipe, RecipeT, Section, load_yaml
from electra_ds.core.errors import ConfigError
from electra_ds.pretraining.run_time import StepTime, step_time


def _files(kind: type[RecipeT], *folders: str) -> list[RecipeT]:
    folder = importlib.resources.files("electra_ds").joinpath("report", "published", *folders)
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return [kind.model_validate(load_yaml(file.read_text("utf8"), file.name)) for file in files]


# --- memory and time


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
    """Return the publications whose training the shipped recipe of this name reimplements."""
    return [each for each in _files(Publication) if each.recipe == recipe_name and not each.overrides]


def evidence() -> list[Evidence]:
    """Return every published run with the roofline of our step in the run's precision and, where `bin/plan` prints the
    run next to a prediction, in that of the card's default JSON."""
    found = []
    for publication in _files(Publication):
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
                time = step_time(recipe, recipe.tokenizer.vocab_size, plan, card)
                assert time is not None, precision
                found.append(Evidence(publication, run, recipe, precision, step_s, time))
    return found


def _plan(values: dict[str, Any], recipe: Recipe) -> DeepSpeedPlan:
    return resolve(values, recipe, world_size=1, auto_fp16=True, source="a published run")


# --- scores


class PublishedScores(Section):
    """One row of a table. Every number is in percent, as printed."""

    name: str
    """Its name for `--compare`."""
    model: str
    tasks: dict[str, dict[str, float]] = Field(default_factory=dict)
    """{task: {metric: value}}, under the metric that it is, which is not always the one in the table's head."""
    std: dict[str, float] = Field(default_factory=dict)
    """Standard deviations of `tasks`, by task."""
    average: float | None = None
    """AVG as printed."""
    average_std: float | None = None
    glue: float | None = None
    """GLUE as printed."""
    glue_std: float | None = None
    column_mean: float | None = None
    """Mean of the eight columns as printed, where AVG is not given or not all columns are at hand."""
    implied: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Values that the printed means imply of a metric that is not printed: an inference, never shown as published."""
    note: str | None = None


class PublishedTable(Section):
    source: str
    split: Literal["dev", "test"]
    statistic: str
    """The statistic that a number is of several seeds, and their number."""
    not_comparable: list[str] = Field(default_factory=list)
    """The reasons why a number cannot be compared with ours."""
    rows: list[PublishedScores]


def published_tables() -> list[PublishedTable]:
    return _files(PublishedTable, "glue")


def find_published(name: str) -> tuple[PublishedTable, PublishedScores]:
    """Return the row of this name with its table. Raises ConfigError if there is none."""
    rows = {row.name: (table, row) for table in published_tables() for row in table.rows}
    if name not in rows:
        raise ConfigError(f"No published scores are called {name!r}. There are: {', '.join(rows)}.")
    return rows[name]
