"""Objectives by name: ours, those that other packages register, and those that a recipe names by a dotted path.

A package registers an objective under an entry point of the group `electra_ds.objectives`:

    [project.entry-points."electra_ds.objectives"]
    my-objective = "my_package.objective:MyObjective"

A recipe may also name one that is not registered: `objective: my_package.objective:MyObjective`.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from electra_ds.core.errors import ConfigError, did_you_mean

GROUP = "electra_ds.objectives"
_OURS = {"electra": "electra_ds.pretraining.objectives.electra:ElectraObjective"}
"""Ours by name, in the form of an entry point, so that they are found in a checkout that is not installed too."""


def objective_names() -> list[str]:
    """Return the names of all registered objectives."""
    return sorted(_registered())


@cache
def find_objective(name: str) -> Any:
    """Return the class of an objective, a subclass of `pretraining.objectives.base.Objective`.

    name: a registered name, or `module:Class`. Raises ConfigError if there is none, if two packages register the name,
    or if its module cannot be imported.
    """
    if ":" in name:
        return _load(name, name)
    registered = _registered()
    if name not in registered:
        hint = did_you_mean(name, registered).removeprefix("; ").capitalize()
        names = ", ".join(sorted(registered))
        raise ConfigError(
            f"There is no objective {name!r}. {hint}{' ' if hint else ''}Registered are {names}; write one that is not "
            f"registered as package.module:Class."
        )
    found = registered[name]
    if len(found) > 1:
        raise ConfigError(
            f"Two packages register an objective {name!r}: {' and '.join(sorted(found))}. Uninstall one of them, or "
            f"write the one you want as package.module:Class."
        )
    return _load(next(iter(found)), name)


def _registered() -> dict[str, set[str]]:
    """Return the places of each name; a package that is installed twice has one."""
    found = {name: {value} for name, value in _OURS.items()}
    for entry in entry_points(group=GROUP):
        found.setdefault(entry.name, set()).add(entry.value)
    return found


def _load(value: str, name: str) -> Any:
    module, _, attribute = value.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"The objective {name!r} cannot be loaded from {value}: {error}.") from error
