"""Dotted overrides: `optimizer.learning_rate=5e-4` on the command line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from electra_ds.config.recipe import (
    Recipe,
    RecipeSource,
    for_objective,
    load_yaml,
    merge,
    named_values,
    recipe_type,
    shown_source,
    validate_recipe,
)
from electra_ds.core.errors import ConfigError

_MEANT = {
    "lr": "learning_rate", "wd": "weight_decay", "batch_size": "global_batch_size", "eps": "epsilon",
    "total_steps": "epochs", "max_steps": "epochs", "sequence_length": "max_length", "max_seq_length": "max_length",
}  # fmt: skip
"""Common short names of recipe values, names of pretraining's values that finetuning lacks, and what is meant here."""


def parse_value(text: str) -> Any:
    """Parse a value as in a recipe file. Raises ConfigError."""
    return load_yaml(text, f"The value {text!r}")


def apply_overrides(values: dict[str, Any], overrides: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    """Return a recipe's raw mapping with `key=value` overrides applied. Raises ConfigError for an unknown key."""
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
    """Set the value of a dotted key in a recipe's raw mapping."""
    section, _, name = key.rpartition(".")
    target = values.setdefault(section, {}) if section else values
    if isinstance(target, dict):  # if not, the recipe's validation says so
        target[name] = value


def dotted_values(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return (dotted key, value) for every value in a nested mapping."""
    result = []
    for key, value in values.items():
        if isinstance(value, dict):
            result += dotted_values(value, f"{prefix}{key}.")
        else:
            result.append((prefix + key, value))
    return result


def _nearest(key: str, known: Sequence[str]) -> str:
    if meant := [name for name in known if name.rpartition(".")[2] == _MEANT.get(key.rpartition(".")[2])]:
        return f"; did you mean '{meant[0]}'?"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:  # the right name without its section
        near = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return f"; did you mean '{near[0]}'?" if near else ""


def as_overrides(given: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Return overrides as `key=value` texts, with values that `parse_value` can read back."""
    if isinstance(given, Mapping):
        return [f"{key}={_as_text(value)}" for key, value in given.items()]
    return [given] if isinstance(given, str) else list(given)


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        try:
            if parse_value(value) == value:
                return value
        except ConfigError:
            pass
    return json.dumps(value, ensure_ascii=False)


def load_recipe(source: RecipeSource, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Load and check a pretraining recipe.

    source: a shipped name such as `tiny`, the path of a YAML file, or a mapping of sections, which may say
    `extends: tiny`.
    overrides: changed values by dotted key, as a mapping or as `key=value` texts.
    The recipe's type depends on the objective that it names. Raises ConfigError, which lists every problem with its
    key.

        >>> from electra_ds import load_recipe
        >>> load_recipe("tiny", {"schedule.total_steps": 400}).schedule.total_steps
        400
    """
    values, texts = named_values(source), as_overrides(overrides)
    for text in texts:
        if text.startswith("objective="):
            values = for_objective(values, parse_value(text.partition("=")[2]))
    return validate_recipe(apply_overrides(values, texts, recipe_type(values).dotted_keys()), shown_source(source))
