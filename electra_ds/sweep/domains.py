"""The values that a key of a stage's `space` takes, under Ray Tune's words: `{loguniform: [1e-5, 1e-3]}`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import model_serializer, model_validator

from electra_ds.config.recipe import Section
from electra_ds.core.errors import did_you_mean

Value = Any
"""A scalar or a list, as YAML has it."""
_LISTS = ("grid", "choice")
_BOUNDS = {
    "uniform": "[0.0, 0.3]", "loguniform": "[1e-5, 1e-3]", "quniform": "[0.0, 0.3, 0.1]", "randint": "[8, 33]",
}  # fmt: skip
KINDS = (*_LISTS, *_BOUNDS)


class Domain(Section):
    """The values of one key; in a file, a mapping from the kind to its values."""

    kind: str
    values: list[Value]
    """The values to choose from, or the bounds of a range."""

    @model_validator(mode="before")
    @classmethod
    def _of_mapping(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            raise ValueError(f"{given!r} does not vary; write it under set, next to space, or as {{grid: [...]}}")
        kind = str(next(iter(given), ""))
        if kind == "sample":
            raise ValueError("sample, an expression of other values, was removed; write the combinations as variants")
        if len(given) != 1 or kind not in KINDS:
            names = ", ".join(map(str, given)) or "nothing"
            known = did_you_mean(kind, KINDS) or "."
            raise ValueError(f"{names} is no domain{known} Write one of {', '.join(KINDS)}, such as grid: [1, 2]")
        if not isinstance(given[kind], list):
            example = _BOUNDS.get(kind, "[1, 2]")
            raise ValueError(f"{kind} takes a list, such as {kind}: {example}, and not {given[kind]!r}")
        return {"kind": kind, "values": given[kind]}

    @model_serializer
    def _as_mapping(self) -> dict[str, list[Value]]:
        return {self.kind: list(self.values)}

    @model_validator(mode="after")
    def _is_sound(self) -> Domain:
        check = _check_list if self.kind in _LISTS else _check_bounds
        check(self.kind, self.values)
        return self

    @property
    def is_random(self) -> bool:
        return self.kind != "grid"

    def at(self, share: float) -> Value:
        """Return the value of a random domain below which `share`, from 0 to below 1, of its values lie.

        Numbers have six digits, which are what a command line shows of them. `randint` leaves its upper bound out.
        """
        if self.kind == "choice":
            return self.values[int(share * len(self.values))]
        low, high = self.values[:2]
        if self.kind == "randint":
            return low + min(int(share * (high - low)), high - low - 1)
        if self.kind == "quniform":
            quantum = self.values[2]
            value = float(f"{round((low + share * (high - low)) / quantum) * quantum:.12g}")
        elif self.kind == "loguniform":
            value = float(f"{math.exp(math.log(low) + share * (math.log(high) - math.log(low))):.6g}")
        else:
            value = float(f"{low + share * (high - low):.6g}")
        return float(min(max(low, value), high))

    def ends(self) -> list[Value]:
        """Return values that stand for all: what can be validated before anything is drawn."""
        if self.kind == "randint":
            return [self.values[0], self.values[1] - 1]
        return self.values if self.kind in _LISTS else self.values[:2]


def _check_list(kind: str, given: list[Value]) -> None:
    if not given:
        raise ValueError(f"the {kind} is empty, so there is nothing to run; write values into it")
    if twice := [each for index, each in enumerate(given) if each in given[:index]]:
        raise ValueError(f"{twice[0]!r} is listed twice in the {kind}; leave one out")
    if any(isinstance(each, Mapping) for each in given):
        raise ValueError(f"a {kind} holds plain values; write settings that go together under variants")


def _check_bounds(kind: str, given: list[Value]) -> None:
    count = 3 if kind == "quniform" else 2
    kinds = (int,) if kind == "randint" else (int, float)
    if len(given) != count or not all(type(each) in kinds and math.isfinite(each) for each in given):
        what = "whole numbers" if kind == "randint" else "numbers"
        raise ValueError(f"{kind} takes {count} {what}, such as {kind}: {_BOUNDS[kind]}, and not {given}")
    low, high, *quantum = given
    if not low < high:
        raise ValueError(f"{kind} goes from {low} to {high}, and the second must be greater")
    if kind == "loguniform" and low <= 0:
        raise ValueError(f"loguniform begins at {low}, and only numbers above 0 have a logarithm")
    if quantum and not 0 < quantum[0] <= high - low:
        raise ValueError(f"quniform's steps of {quantum[0]} do not lie between 0 and {high - low:g}")
    if quantum and not all(math.isclose(bound / quantum[0], round(bound / quantum[0])) for bound in (low, high)):
        raise ValueError(f"quniform's bounds {low} and {high} are no multiples of its steps of {quantum[0]}")
