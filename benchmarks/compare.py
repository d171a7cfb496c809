"""What became slower between two results of `bin/bench`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from electra_ds.core.errors import ConfigError

# Ratios of one run move by a few per cent from run to run; memory and operations do not.
_SLOWER = 0.05
_MORE = 0.02


class Comparison(NamedTuple):
    """What became of older results."""

    slower: list[str]
    """Ratios that fell, memory and operations that rose, beyond noise."""
    missing: list[str]
    """Names of figures that are not there any more."""
    differences: list[str]
    """Of what the two were measured on."""


class Figure(NamedTuple):
    """Something worth comparing over machines and days."""

    value: float
    low: float
    high: float
    """Quartiles, or the value again."""
    is_ratio: bool
    """Of speeds, more is better; otherwise memory or a count, where less is."""

    def is_worse_than(self, before: Figure) -> bool:
        """Beyond noise."""
        if self.is_ratio:
            return self.value < before.value * (1 - _SLOWER) and self.high < before.low
        return self.value > before.value * (1 + _MORE)


def compare(old: dict[str, Any], new: dict[str, Any]) -> Comparison:
    """Raises ConfigError if the two measured different things."""
    check_recipe(old, new["recipe"])
    before, after = figures(old), figures(new)
    common = [name for name in after if name in before]
    if not common:
        raise ConfigError("The two results have no figure in common: other sections, dtypes or micro-batches.")
    worse = []
    for name in common:
        was, now = before[name], after[name]
        if now.is_worse_than(was):
            change = f"{now.value / was.value - 1:+.1%}" if was.value else "from none"
            worse.append(f"{name}: {was.value:.4g} before, {now.value:.4g} now ({change})")
    hardware = old["hardware"], new["hardware"]
    differences = [
        f"{key}: {hardware[0].get(key)} before, {hardware[1].get(key)} now"
        for key in ("device", "cpu", "threads")
        if hardware[0].get(key) != hardware[1].get(key)
    ]
    return Comparison(worse, [name for name in before if name not in after], differences)


def check_recipe(old: dict[str, Any], recipe: str) -> None:
    """Raise ConfigError if older results are for another recipe."""
    if old["recipe"] != recipe:
        raise ConfigError(f"The older results are for the recipe {old['recipe']}, these for {recipe}.")


def figures(results: dict[str, Any]) -> dict[str, Figure]:
    """By dotted name: every ratio of speeds, and our memory and operations, but no absolute time.

    Raises ConfigError for a value that is not a finite number.
    """
    return {name: figure for name, figure in _walk("", results) if ".transformers." not in name}


def _walk(name: str, values: Any) -> Iterator[tuple[str, Figure]]:
    if not isinstance(values, dict):
        return
    if "speed_quartiles" in values:
        low, high = values["speed_quartiles"]
        yield f"{name}.speed", _figure(name, values["speed"], low, high, is_ratio=True)
    for key, value in values.items():
        if key in ("peak_step_memory", "measured_bytes", "operations", "host_syncs"):
            yield f"{name}.{key}", _figure(name, value, value, value, is_ratio=False)
        yield from _walk(f"{name}.{key}" if name else key, value)


def _figure(name: str, value: Any, low: Any, high: Any, *, is_ratio: bool) -> Figure:
    for number in (value, low, high):
        if not isinstance(number, int | float) or not math.isfinite(number):
            raise ConfigError(f"{name} has the value {number!r}, which is no finite number")
    return Figure(value, low, high, is_ratio)
