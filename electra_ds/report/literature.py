"""Numbers that others published, each with its source: the files in `electra_ds/report/published/`."""

from __future__ import annotations

import importlib.resources

from electra_ds.config.recipe import Section, load_yaml


class PublishedMemory(Section):
    gradient_accumulation_steps: int
    memory_gb: float


class Publication(Section):
    source: str
    short: str
    recipe: str
    """The shipped recipe that reimplements it."""
    memory: list[PublishedMemory]
    days: dict[str, float]
    """Days of a whole pretraining by the card's name in `config.cards`."""


def publications(recipe_name: str) -> list[Publication]:
    """Those whose training the shipped recipe of this name reimplements."""
    folder = importlib.resources.files("electra_ds") / "report" / "published"
    found = [
        Publication.model_validate(load_yaml(file.read_text("utf8"), file.name))
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".yaml")
    ]
    return [publication for publication in found if publication.recipe == recipe_name]
