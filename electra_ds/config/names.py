"""The names of tasks, and of the recipes, sweeps and DeepSpeed JSON files that come with the package."""

from __future__ import annotations

import importlib.resources

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
