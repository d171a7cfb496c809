"""Which of a model's parameters is which in an optimizer's state that holds no names.

A stage 0 checkpoint of DeepSpeed has the weights by name, and the optimizer's tensors by number, group after group.
Every usual way of grouping walks through the model's parameters in order and puts each at the end of some group, so
within a group they stand in the model's order. Under that assumption the parameters are dealt out to the groups as
cards are, each only where its shape fits and, where the optimizer holds fp32 masters, where rounding the master gives
the weight. A dealing is taken where it is the only one. That covers one group, matrices apart from biases and norms
in either order, and with masters practically every grouping. Where there are several, as without masters where
tensors of one shape are in different groups, a known convention decides, if exactly one of them fits.

Parameters that were frozen are in no group: where the groups hold less than there is, the rest is dealt out like one
more group, and a convention then also says what is frozen: one module, or the embeddings with the lowest layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

_MOST_STATES = 20_000
"""Of a dealing that is under way; beyond it there is nothing unambiguous to be found."""

_EXEMPT_FROM_DECAY: tuple[Callable[[str], bool], ...] = (
    lambda name: False,  # one group
    lambda name: name.endswith("bias") or "norm" in name.lower(),  # `parameter_groups`
    lambda name: any(part in name for part in ("bias", "LayerNorm.weight")),  # transformers' examples
)


class Slot(NamedTuple):
    """One tensor of an optimizer's group."""

    shape: tuple[int, ...] | None
    """None where the state does not tell it: the parameter never got a gradient."""
    master: torch.Tensor | None
    """fp32, where the optimizer holds one."""


class Slots(NamedTuple):
    """A group whose tensors stand apart. A position in it counts tensors."""

    slots: tuple[Slot, ...]

    @property
    def end(self) -> int:
        return len(self.slots)

    def after(self, position: int, weight: torch.Tensor) -> int | None:
        """The position behind the weight, if it fits at this one."""
        if position == self.end:
            return None
        shape, master = self.slots[position]
        if shape is not None and shape != tuple(weight.shape):
            return None
        return position + 1 if master is None or torch.equal(master.to(weight.dtype), weight) else None


class Flat(NamedTuple):
    """A group whose fp32 masters stand in one row. A position in it counts elements."""

    masters: torch.Tensor

    @property
    def end(self) -> int:
        return self.masters.numel()

    def after(self, position: int, weight: torch.Tensor) -> int | None:
        """The position behind the weight, if it fits at this one."""
        own = self.masters[position : position + weight.numel()]
        fits = own.numel() == weight.numel() and torch.equal(own.to(weight.dtype), weight.flatten())
        return position + weight.numel() if fits else None


class Rest(NamedTuple):
    """The parameters that the groups do not hold. A position counts what theirs count."""

    end: int
    counts_elements: bool

    def after(self, position: int, weight: torch.Tensor) -> int | None:
        """Return the position behind the weight, if there is room for it."""
        position += weight.numel() if self.counts_elements else 1
        return position if position <= self.end else None


_Group = Slots | Flat | Rest


def deal(weights: Mapping[str, torch.Tensor], groups: Sequence[Slots | Flat]) -> list[list[str]] | None:
    """Return the names of each group's parameters in order, or None if that is not certain.

    weights: the model's parameters in its order, each once.
    """
    by_elements = any(isinstance(group, Flat) for group in groups)
    there = sum(weight.numel() for weight in weights.values()) if by_elements else len(weights)
    rest = Rest(there - sum(group.end for group in groups), by_elements)
    only, ways = _dealings(weights, [*groups, rest] if rest.end else groups)
    if ways < 2:
        return None if only is None else only[: len(groups)]
    conventional = [
        names
        for frozen in _frozen_by_convention(list(weights), rest)
        for names in _conventions([name for name in weights if name not in frozen])
        if _fits_whole(weights, groups, names)
    ]
    distinct = [names for index, names in enumerate(conventional) if names not in conventional[:index]]
    return distinct[0] if len(distinct) == 1 else None


def _frozen_by_convention(names: Sequence[str], rest: Rest) -> Iterator[frozenset[str]]:
    """Yield what may be in `rest`: nothing if it is empty; else any one parameter or module, or a network's embeddings
    with its lowest layers. Candidates that are too large or too small do not fit later."""
    if not rest.end:
        yield frozenset()
        return
    prefixes = {name[: match.end()] for name in names for match in re.finditer(r"\.|$", name)}
    for prefix in sorted(prefixes):
        yield frozenset(name for name in names if name.startswith(prefix))
    for component in sorted({part for name in names for part in name.split(".")}):
        yield frozenset(name for name in names if component in name.split("."))
    for network in sorted({match[1] for name in names if (match := re.match(r"(.*?)embeddings\.", name))}):
        numbered = {
            name: int(match[1])
            for name in names
            if (match := re.match(rf"{re.escape(network)}(?:encoder\.)?layers?\.(\d+)\.", name))
        }
        embeddings = {name for name in names if name.startswith(f"{network}embeddings.")}
        for depth in range(1, len(set(numbered.values())) + 1):
            yield frozenset(embeddings | {name for name, layer in numbered.items() if layer < depth})


def _dealings(weights: Mapping[str, torch.Tensor], groups: Sequence[_Group]) -> tuple[list[list[str]] | None, int]:
    """(a dealing where there is one, the number of them: 0, 1 or 2 for several)."""
    ways = {(0,) * len(groups): 1}
    last: list[dict[tuple[int, ...], tuple[int, tuple[int, ...]]]] = []
    for weight in weights.values():
        found: dict[tuple[int, ...], int] = {}
        came: dict[tuple[int, ...], tuple[int, tuple[int, ...]]] = {}
        for filled, count in ways.items():
            for index, group in enumerate(groups):
                position = group.after(filled[index], weight)
                if position is not None:
                    state = (*filled[:index], position, *filled[index + 1 :])
                    found[state] = min(2, found.get(state, 0) + count)
                    came[state] = index, filled
        if len(found) > _MOST_STATES:
            return None, 2
        ways = found
        last.append(came)
    state = tuple(group.end for group in groups)
    if state not in ways:
        return None, 0
    count = ways[state]
    names: list[list[str]] = [[] for _ in groups]
    for name, came in zip(reversed(list(weights)), reversed(last), strict=True):
        index, state = came[state]
        names[index].insert(0, name)
    return names, count


def _conventions(names: Sequence[str]) -> list[list[list[str]]]:
    """Groups of names, empty ones left out as DeepSpeed does."""
    found = []
    for is_exempt in _EXEMPT_FROM_DECAY:
        exempt = [name for name in names if is_exempt(name)]
        decaying = [name for name in names if not is_exempt(name)]
        for groups in ([decaying, exempt], [exempt, decaying]):
            found.append([group for group in groups if group])
    return found


def _fits_whole(
    weights: Mapping[str, torch.Tensor], groups: Sequence[Slots | Flat], names: Sequence[Sequence[str]]
) -> bool:
    if len(groups) != len(names):
        return False
    for group, own in zip(groups, names, strict=True):
        position: int | None = 0
        for name in own:
            position = None if position is None else group.after(position, weights[name])
        if position != group.end:
            return False
    return True
