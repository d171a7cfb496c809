"""Dotted overrides: `optimizer.learning_rate=5e-4` on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from electra_ds.config.recipe import Recipe, for_objective, load_yaml, merge, named_values, recipe_type, validate_recipe
from electra_ds.core.errors import ConfigError

_SHORT = {"lr": "learning_rate", "wd": "weight_decay", "batch_size": "global_batch_size", "eps": "epsilon"}
"""Names that people give to ours."""


def parse_value(text: str) -> Any:
    """A scalar as a recipe file would read it. Raises ConfigError."""
    return load_yaml(text, f"The value {text!r}")


def apply_overrides(values: dict[str, Any], overrides: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    """A copy of a recipe's raw mapping with `key=value` overrides applied. Raises ConfigError for a key not known."""
    given: dict[str, Any] = {}
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            problems.append(f"  {override!r}: an override is written key=value, e.g. optimizer.learning_rate=1e-3")
        elif key not in known:
            problems.append(f"  {key}: unknown key{_nearest(key, known)}")
        else:
            put_value(given, key, parse_value(text))
    if problems:
        raise ConfigError("These overrides cannot be applied:\n" + "\n".join(problems))
    return merge(values, given)


def put_value(values: dict[str, Any], key: str, value: Any) -> None:
    """Put a value at its dotted key into a recipe's raw mapping."""
    section, _, name = key.rpartition(".")
    target = values.setdefault(section, {}) if section else values
    if isinstance(target, dict):  # if not, the recipe's validation says so
        target[name] = value


def dotted_values(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of everything in a nested mapping."""
    result = []
    for key, value in values.items():
        if isinstance(value, dict):
            result += dotted_values(value, f"{prefix}{key}.")
        else:
            result.append((prefix + key, value))
    return result


def _nearest(key: str, known: Sequence[str]) -> str:
    if meant := [name for name in known if name.rpartition(".")[2] == _SHORT.get(key.rpartition(".")[2])]:
        return f"; did you mean '{meant[0]}'?"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:  # the right name without its section
        near = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return f"; did you mean '{near[0]}'?" if near else ""


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return a shipped recipe or one from a YAML file, with overrides applied and everything validated.

    Its type is that of the objective it names. Raises ConfigError.
    """
    values = named_values(name_or_path)
    for override in overrides:
        if override.startswith("objective="):
            values = for_objective(values, parse_value(override.partition("=")[2]))
    return validate_recipe(apply_overrides(values, overrides, recipe_type(values).dotted_keys()), name_or_path)
