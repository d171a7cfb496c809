"""The names of tasks, of objectives, and of the recipes, sweeps and DeepSpeed JSON files that come with the package.

A package registers an objective with an entry point in the group `electra_ds.objectives`:

    [project.entry-points."electra_ds.objectives"]
    my-objective = "my_package.objective:MyObjective"

A recipe may also name an objective that is not registered: `objective: my_package.objective:MyObjective`.
"""

from __future__ import annotations

import importlib
import importlib.resources
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from electra_ds.core.errors import ObjectiveError, did_you_mean

RECIPES, FINETUNE_RECIPES, SWEEPS, DS_CONFIGS = "recipes", "finetune_recipes", "sweeps", "ds_configs"
_ENDINGS = {RECIPES: ".yaml", FINETUNE_RECIPES: ".yaml", SWEEPS: ".yaml", DS_CONFIGS: ".json"}

GPU_RECIPE, CPU_RECIPE, FINETUNE_RECIPE, OWN_RECIPE = "rc2020-small", "tiny", "rc2020", "own"
"""The default recipes: for pretraining with and without a GPU, and for finetuning on a published task and on your own
examples."""
RECIPE_NOTE = f"default: {GPU_RECIPE} with a GPU, {CPU_RECIPE} without"
DS_CONFIG_NOTE = "default: the one made for this GPU, or one for any GPU; without a GPU, cpu"

GLUE_TASKS = ("cola", "sst-2", "mrpc", "sts-b", "qqp", "mnli", "qnli", "rte", "wnli")
SQUAD_TASKS = ("squad1", "squad2")
TASKS = (*GLUE_TASKS, *SQUAD_TASKS)
"""The tasks that `--task` accepts. GLUE's diagnostic set, ax, has no training examples: mnli predicts it."""

OBJECTIVE_GROUP = "electra_ds.objectives"
_OUR_OBJECTIVES = {
    "electra": "electra_ds.pretraining.objectives.electra:ElectraObjective",
    "electra-15": "electra_ds.pretraining.objectives.electra_15:Electra15Objective",
    "mlm": "electra_ds.pretraining.objectives.mlm:MlmObjective",
    "replace-mlm": "electra_ds.pretraining.objectives.replace_mlm:ReplaceMlmObjective",
    "all-tokens-mlm": "electra_ds.pretraining.objectives.all_tokens_mlm:AllTokensMlmObjective",
    "fast-electra": "electra_ds.pretraining.objectives.fast_electra:FastElectraObjective",
    "fast-electra-offline": "electra_ds.pretraining.objectives.fast_electra_offline:FastElectraOfflineObjective",
}
"""Our objectives in the form of entry points, so that a checkout finds them even if it is not installed."""


def shipped_names(folder: str) -> list[str]:
    """Return the names of the files in one of the folders."""
    ending = _ENDINGS[folder]
    files = (importlib.resources.files("electra_ds") / folder).iterdir()
    return sorted(file.name.removesuffix(ending) for file in files if file.name.endswith(ending))


def recipe_names() -> list[str]:
    return shipped_names(RECIPES)


def finetune_recipe_names() -> list[str]:
    return shipped_names(FINETUNE_RECIPES)


def ds_config_names() -> list[str]:
    return shipped_names(DS_CONFIGS)


def shipped_text(folder: str, name: str) -> str:
    """Return the text of one of `shipped_names`."""
    return (importlib.resources.files("electra_ds") / folder / f"{name}{_ENDINGS[folder]}").read_text("utf8")


@cache
def find_objective(name: str) -> Any:
    """Return the class of an objective, a subclass of `pretraining.objectives.base.Objective`.

    name: a registered name, or `module:Class`. Raises ObjectiveError if no package or several packages register the
    name, or if its module cannot be imported.
    """
    if ":" in name:
        return _load(name, name)
    registered = _registered()
    if name not in registered:
        raise ObjectiveError(
            f"There is no objective {name!r}{did_you_mean(name, registered) or '.'} The registered ones are "
            f"{', '.join(sorted(registered))}; write any other as package.module:Class."
        )
    found = registered[name]
    if len(found) > 1:
        raise ObjectiveError(
            f"Two packages register an objective {name!r}: {' and '.join(sorted(found))}. Uninstall one of them, or "
            f"write the one you want as package.module:Class."
        )
    return _load(next(iter(found)), name)


def _registered() -> dict[str, set[str]]:
    """Return the places that register each name; a package that is installed twice counts once."""
    found = {name: {value} for name, value in _OUR_OBJECTIVES.items()}
    for entry in entry_points(group=OBJECTIVE_GROUP):
        found.setdefault(entry.name, set()).add(entry.value)
    return found


def _load(value: str, name: str) -> Any:
    module_name, _, attribute = value.partition(":")
    source = "" if value == name else f" from {value}"
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ObjectiveError(
            f"The objective {name!r} cannot be loaded{source}: {error}. Install its package, or put its folder on "
            f"PYTHONPATH."
        ) from error
    found = getattr(module, attribute, None)
    if found is None:
        hint = did_you_mean(attribute, dir(module)) or "."
        raise ObjectiveError(f"The objective {name!r} cannot be loaded{source}: {module_name} has no {attribute}{hint}")
    if not isinstance(found, type) or not hasattr(found, "recipe_type"):
        raise ObjectiveError(f"The objective {name!r} is not a subclass of electra_ds.Objective (docs/objectives.md).")
    if missing := getattr(found, "__abstractmethods__", ()):
        raise ObjectiveError(f"The objective {name!r} lacks {', '.join(sorted(missing))} (docs/objectives.md).")
    return found
