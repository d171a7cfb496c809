"""The recipes and DeepSpeed JSON files that come with the package, known by name."""

from __future__ import annotations

import importlib.resources

_ENDINGS = {"recipes": ".yaml", "ds_configs": ".json"}


def recipe_names() -> list[str]:
    return _names("recipes")


def ds_config_names() -> list[str]:
    return _names("ds_configs")


def recipe_text(name: str) -> str:
    """One of `recipe_names` as YAML."""
    return _text("recipes", name)


def ds_config_text(name: str) -> str:
    """One of `ds_config_names` as JSON."""
    return _text("ds_configs", name)


def _names(folder: str) -> list[str]:
    ending = _ENDINGS[folder]
    files = (importlib.resources.files("electra_ds") / folder).iterdir()
    return sorted(file.name.removesuffix(ending) for file in files if file.name.endswith(ending))


def _text(folder: str, name: str) -> str:
    return (importlib.resources.files("electra_ds") / folder / f"{name}{_ENDINGS[folder]}").read_text("utf8")
