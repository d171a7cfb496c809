"""GLUE and SQuAD scores that others published, with their sources: the files in `electra_ds/report/published/glue/`."""

from __future__ import annotations

import importlib.resources
from typing import Literal

from pydantic import Field

from electra_ds.config.recipe import Section, load_yaml
from electra_ds.core.errors import ConfigError


class PublishedScores(Section):
    """One row of a table. Every number is in percent, as printed."""

    name: str
    """What `--compare` calls it."""
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
    """Mean of the eight columns as printed, where AVG is not told or not all columns are at hand."""
    implied: dict[str, dict[str, float]] = Field(default_factory=dict)
    """What the printed means imply of a metric that is not printed: an inference, never shown as published."""
    note: str | None = None


class PublishedTable(Section):
    source: str
    split: Literal["dev", "test"]
    statistic: str
    """What a number is of several seeds, and of how many."""
    not_comparable: list[str] = Field(default_factory=list)
    """What keeps a number from being compared with ours."""
    rows: list[PublishedScores]


def published_tables() -> list[PublishedTable]:
    folder = importlib.resources.files("electra_ds") / "report" / "published" / "glue"
    return [
        PublishedTable.model_validate(load_yaml(file.read_text("utf8"), file.name))
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".yaml")
    ]


def find_published(name: str) -> tuple[PublishedTable, PublishedScores]:
    """Raises ConfigError if there is none of this name."""
    tables = published_tables()
    for table in tables:
        for row in table.rows:
            if row.name == name:
                return table, row
    known = ", ".join(row.name for table in tables for row in table.rows)
    raise ConfigError(f"No published scores are called {name!r}. There are: {known}.")
