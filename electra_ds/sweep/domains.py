"""What a value of a sweep may be drawn from. The words are Tune's: `{loguniform: [1e-5, 1e-3]}`."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from electra_ds.core.errors import ConfigError, did_you_mean

Value = Any
"""A scalar or a list, as YAML has it."""

_BOUNDS = {"uniform": 2, "loguniform": 2, "quniform": 3, "randint": 2}
_LISTS = ("grid", "choice")
KINDS = (*_LISTS, *_BOUNDS, "sample")
_EXAMPLES = {
    "uniform": "uniform: [0.0, 0.3]", "loguniform": "loguniform: [1e-5, 1e-3]", "quniform": "quniform: [0.0, 0.3, 0.1]",
    "randint": "randint: [8, 33]",
}  # fmt: skip
_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Pow: math.pow, ast.Mod: operator.mod, ast.USub: operator.neg,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min, "max": max, "int": int, "sqrt": math.sqrt, "log2": math.log2,
    "round": lambda number, digits=None: round(float(number), digits),  # whole numbers to -10**9 digits take forever
}  # fmt: skip
_LONGEST_EXPRESSION = 200


@dataclass(frozen=True)
class Domain:
    """One of Tune's, by its name there; `sample` stands for its `sample_from`."""

    kind: str
    values: tuple[Value, ...]
    """Of `grid` and `choice` what they choose from, of `sample` the expression, of the others the bounds."""

    @property
    def is_random(self) -> bool:
        return self.kind not in ("grid", "sample")

    def at(self, share: float) -> Value:
        """The value of a random domain below which `share`, from 0 to below 1, of its values lie.

        Numbers have six digits, which are what a command line shows of them. `randint` leaves its upper bound out.
        """
        if self.kind == "choice":
            return self.values[int(share * len(self.values))]
        low, high = self.values[:2]
        if self.kind == "randint":
            return low + min(int(share * (high - low)), high - low - 1)
        if self.kind == "loguniform":
            value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        elif self.kind == "quniform":
            quantum = self.values[2]
            return _between(low, float(f"{round((low + share * (high - low)) / quantum) * quantum:.12g}"), high)
        else:
            value = low + share * (high - low)
        return _between(low, float(f"{value:.6g}"), high)

    def ends(self) -> tuple[Value, ...]:
        """Values that stand for all: what can be validated before anything is drawn."""
        if self.kind == "randint":
            return self.values[0], self.values[1] - 1
        return self.values[:2] if self.kind in _BOUNDS else self.values


def _between(low: float, value: float, high: float) -> float:
    return float(min(max(low, value), high))


def parse_domain(value: Value) -> Domain | None:
    """None for a constant. Raises ConfigError for a domain that is none."""
    if not isinstance(value, Mapping):
        return None
    if len(value) != 1 or (kind := str(next(iter(value)))) not in KINDS:
        names = ", ".join(map(str, value)) or "nothing"
        known = did_you_mean(str(next(iter(value), "")), KINDS)
        raise ConfigError(f"{names} is no domain{known or '.'} Write one of {', '.join(KINDS)}, such as grid: [1, 2]")
    given = value[kind]
    if kind == "sample":
        if not isinstance(given, str):
            raise ConfigError(f"sample takes an expression such as 2 * optimizer.learning_rate, and not {given!r}")
        _parsed(given)
        return Domain(kind, (given,))
    if not isinstance(given, list):
        raise ConfigError(f"{kind} takes a list, such as {_EXAMPLES.get(kind, f'{kind}: [1, 2]')}, and not {given!r}")
    if kind in _LISTS:
        _check_list(kind, given)
    else:
        _check_bounds(kind, given)
    return Domain(kind, tuple(given))


def _check_list(kind: str, given: list[Value]) -> None:
    if not given:
        raise ConfigError(f"the {kind} is empty, so there is nothing to run; write values into it")
    if twice := [each for index, each in enumerate(given) if each in given[:index]]:
        raise ConfigError(f"{twice[0]!r} stands twice in the {kind}; leave one out")
    if any(isinstance(each, Mapping) for each in given):
        raise ConfigError(f"a {kind} holds plain values; write settings that go together under variants")


def _check_bounds(kind: str, given: list[Value]) -> None:
    is_number = all(isinstance(each, int | float) and not isinstance(each, bool) for each in given)
    if len(given) != _BOUNDS[kind] or not is_number or not all(abs(each) < 1e300 for each in given):
        raise ConfigError(f"{kind} takes {_BOUNDS[kind]} numbers, such as {_EXAMPLES[kind]}, and not {given}")
    low, high, *quantum = given
    if not low < high:
        raise ConfigError(f"{kind} goes from {low} to {high}, and the second must be greater")
    if kind == "loguniform" and low <= 0:
        raise ConfigError(f"loguniform begins at {low}, and only numbers above 0 have a logarithm")
    if kind == "randint" and not all(isinstance(each, int) for each in given):
        raise ConfigError(f"randint takes whole numbers, and not {given}")
    if quantum and not (0 < quantum[0] <= high - low and (high - low) / quantum[0] < 1e15):
        raise ConfigError(f"quniform's steps of {quantum[0]} do not lie between 0 and {high - low:g}")
    if quantum and not all(math.isclose(bound / quantum[0], round(bound / quantum[0])) for bound in (low, high)):
        raise ConfigError(f"quniform's bounds {low} and {high} are no multiples of its steps of {quantum[0]}")


# --- expressions of other values


def computed(expression: str, values: Mapping[str, Value]) -> float:
    """An expression such as `generator.width_multiplier * 256` over the other values of a trial. Raises ConfigError."""
    try:
        result = _evaluated(_parsed(expression), values)
        if not math.isfinite(result):
            raise ValueError(f"the result is {result}")
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ConfigError(f"sample: {expression} cannot be computed: {error}") from error
    return result


def _parsed(expression: str) -> ast.expr:
    """Raises ConfigError for anything but arithmetic."""
    try:
        if len(expression) > _LONGEST_EXPRESSION:
            raise ValueError
        root = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(
            f"sample: {expression[:_LONGEST_EXPRESSION]!r} is no expression of other keys, such as "
            f"2 * optimizer.learning_rate"
        ) from error
    if not _is_arithmetic(root):
        raise ConfigError(
            f"sample: {expression!r} holds more than numbers, other keys, + - * / // % ** and {', '.join(_FUNCTIONS)}"
        )
    return root


def _is_arithmetic(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float)
    if isinstance(node, ast.BinOp):
        return type(node.op) in _OPERATORS and _is_arithmetic(node.left) and _is_arithmetic(node.right)
    if isinstance(node, ast.UnaryOp):
        return type(node.op) in _OPERATORS and _is_arithmetic(node.operand)
    if isinstance(node, ast.Call):
        is_known = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
        return is_known and not node.keywords and all(map(_is_arithmetic, node.args))
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def _evaluated(node: ast.expr, values: Mapping[str, Value]) -> float:
    if isinstance(node, ast.Constant):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_evaluated(node.left, values), _evaluated(node.right, values))
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_evaluated(node.operand, values))
    if isinstance(node, ast.Call):
        assert isinstance(node.func, ast.Name)
        return _FUNCTIONS[node.func.id](*(_evaluated(argument, values) for argument in node.args))
    key = ast.unparse(node)
    if key not in values:
        raise ValueError(f"the trial does not set {key}{did_you_mean(key, values)}")
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} is {value!r}, and no number")
    return value
