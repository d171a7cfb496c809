"""Recipes and sweeps as nested mappings: their YAML, their dotted keys, and `key=value` overrides.

Every value has a dotted key, such as `optimizer.learning_rate`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from electra_ds.core.errors import ConfigError


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml's, where there is one
    """A YAML loader that reads 5e-4 as a number; YAML 1.1 reads it as a string, because it has no dot."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    twice = sorted({str(key) for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"the key {', '.join(twice)} appears twice (line {node.start_mark.line + 1})")
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(text: str, what: str) -> Any:
    """Return the values in a YAML text. Raises ConfigError, which names the text as `what`."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is not valid YAML: {error}") from error


def values_yaml(values: dict[str, Any]) -> str:
    """Return a recipe's raw mapping as YAML."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


RECIPE_KEYS = ("generator.recipe",)
"""The keys whose value is itself a recipe."""
_INSTEAD = {"warmup_steps": "warmup_share", "warmup_share": "warmup_steps", "min_steps": "epochs"}
"""A section's keys that are not inherited if the other key is given: a recipe has only one of the two warm-ups, and
explicit epochs are not raised to `min_steps`."""


def merge(base: dict[str, Any], own: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Merge a recipe's raw mapping over the one it extends: sections are merged key by key, other values replaced.

    A recipe within it is a value. prefix: the dotted key of both mappings, with a dot at its end.
    """
    result = {key: value for key, value in base.items() if _INSTEAD.get(key) not in own}
    for key, value in own.items():
        below, dotted = result.get(key), f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(below, dict) and dotted not in RECIPE_KEYS:
            result[key] = merge(below, value, f"{dotted}.")
        else:
            result[key] = value
    return result


_MEANT = {
    "lr": "learning_rate", "wd": "weight_decay", "batch_size": "global_batch_size", "eps": "epsilon",
    "total_steps": "epochs", "max_steps": "epochs", "sequence_length": "max_length", "max_seq_length": "max_length",
}  # fmt: skip
"""The values of a recipe that are meant by common short names, and by names that only pretraining has."""


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
            problems.append(f"  {key}: {inner_key_problem(key) or f'unknown key{_nearest(key, known)}'}")
        else:
            put_value(given, key, parse_value(text))
    if problems:
        raise ConfigError("These overrides cannot be applied:\n" + "\n".join(problems))
    return merge(values, given)


def inner_key_problem(key: str) -> str:
    """Return how to change a value of a recipe within a recipe, whose own keys are no keys; else an empty text."""
    for outer in RECIPE_KEYS:
        if key.startswith(f"{outer}."):
            *sections, name = key.removeprefix(f"{outer}.").split(".")
            shown = f"{name}: ..."
            for section in reversed(sections):
                shown = f"{section}: {{{shown}}}"
            return f"{outer} takes a whole recipe, such as {{extends: tiny-mlm, {shown}}}"
    return ""


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
