"""`electra-ds recipes`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from electra_ds.cli.arguments import add_handled
from electra_ds.config.shipped import (
    CPU_RECIPE,
    FINETUNE_RECIPE,
    FINETUNE_RECIPES,
    GPU_RECIPE,
    OWN_RECIPE,
    RECIPES,
    finetune_recipe_names,
    recipe_names,
    shipped_names,
    shipped_text,
)
from electra_ds.config.tool_options import RecipesOptions
from electra_ds.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from electra_ds.cli.arguments import Commands

_EPILOG = """\
examples:
  bin/recipes
      all of them, a line each
  bin/recipes tiny > mine.yaml
      a copy to change; then: bin/pretrain --recipe mine.yaml

A file may also say what it changes in another recipe, by name or by path, and no more:
  extends: rc2020-small
  schedule: {total_steps: 100000, warmup_share: 0.01}
"""
_KINDS = {
    RECIPES: "pretraining, bin/pretrain --recipe NAME",
    FINETUNE_RECIPES: "finetuning, bin/finetune --recipe NAME",
}
_DEFAULTS = {
    GPU_RECIPE: " (default with a GPU)", CPU_RECIPE: " (default without a GPU)",
    FINETUNE_RECIPE: " (default with --task)", OWN_RECIPE: " (default with --train)",
}  # fmt: skip


def add_recipes(commands: Commands) -> None:
    """Add the parser of `recipes`."""
    add_handled(commands, "recipes", RecipesOptions, _EPILOG, _recipes)


def _recipes(options: RecipesOptions) -> None:
    if options.name is not None:
        print(full_text(options.name), end="")
        return

    from rich.console import Console

    from electra_ds.config.recipe import named_values
    from electra_ds.core.program import as_called
    from electra_ds.core.terminal import say

    console = Console()
    for folder, kind in _KINDS.items():
        say(console, as_called(f"{kind}:"))
        for name in shipped_names(folder):
            say(console, f"  {name:14}{named_values(name, folder)['description']}{_DEFAULTS.get(name, '')}")


def full_text(name: str) -> str:
    """A shipped recipe's file, with its comments, and as comments the values that it leaves at their defaults."""
    folder = next((folder for folder in _KINDS if name in shipped_names(folder)), None)
    if folder is None:
        known = [*recipe_names(), *finetune_recipe_names()]
        raise ConfigError(f"There is no recipe '{name}'{did_you_mean(name, known) or '.'} They are {', '.join(known)}.")

    from electra_ds.config.finetune_recipe import FinetuneRecipe
    from electra_ds.config.overrides import dotted_values
    from electra_ds.config.recipe import Recipe, named_values, validate_recipe, values_yaml

    values = named_values(name, folder)
    values.pop("by_task", None)
    kind = Recipe if folder == RECIPES else FinetuneRecipe
    given = {key for key, _ in dotted_values(values)}
    if "schedule.warmup_share" in given:
        given.add("schedule.warmup_steps")  # which are computed from it
    complete = dotted_values(validate_recipe(values, name, kind).model_dump())
    rest = ["#   " + values_yaml({key: value}).strip() for key, value in complete if key not in given]
    return shipped_text(folder, name).rstrip() + "\n" + "\n".join(["# Left at their defaults:", *rest]) + "\n"
