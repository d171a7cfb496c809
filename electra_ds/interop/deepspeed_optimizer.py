"""The state of a foreign optimizer: its groups, what it kept, its count of steps and its loss scale.

A stage 0 checkpoint of DeepSpeed has the weights by name and the optimizer's tensors by number, group after group. The
parameter of each tensor is found by trying the usual ways to group parameters: one group, or matrices apart from biases
and norms in either order, for the model or for each of the two networks. Within a group parameters are in the
model's order. A way is taken if it is the only one that fits: as many tensors, the same shapes and, if the optimizer
holds fp32 masters, masters that round to the weights.

Parameters that were frozen may be in no group. If the groups hold less than the model has, these may be missing: a
parameter, a module, or the embeddings with the lowest layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from electra_ds.interop.deepspeed_zero import Tensors, moments
from electra_ds.training.optimizer import MOMENTS

_EXEMPT_FROM_DECAY: tuple[Callable[[str], bool], ...] = (
    lambda name: False,  # one group
    lambda name: name.endswith("bias") or "norm" in name.lower(),  # `parameter_groups`
    lambda name: any(part in name for part in ("bias", "LayerNorm.weight")),  # transformers' examples
)
_GENERATOR = re.compile(r"(^|\.)gen")


class OptimizerGroup(NamedTuple):
    """One group of a stage 0 optimizer."""

    slots: list[Tensors]
    """Master and moments of each parameter by kind, as far as the optimizer holds them."""
    is_flat: bool = False
    """True if one slot holds all parameters of the group, one after the other."""
    names: tuple[str, ...] = ()
    """The names of its parameters, if it has them."""

    def size(self) -> int:
        return sum(slot["master"].numel() for slot in self.slots) if self.is_flat else len(self.slots)

    def fits(self, weights: Sequence[torch.Tensor]) -> bool:
        if self.is_flat:
            if sum(weight.numel() for weight in weights) != self.size():
                return False
            weights = [torch.cat([weight.flatten() for weight in weights])]
        return len(weights) == len(self.slots) and all(map(_fits, self.slots, weights))

    def by_name(self, weights: Mapping[str, torch.Tensor]) -> Tensors:
        """Return what the group holds as `KIND/NAME`, in fp32 and in the shapes of its parameters."""
        if self.is_flat:
            sizes = [weight.numel() for weight in weights.values()]
            split = {kind: flat.split(sizes) for kind, flat in self.slots[0].items()}
            slots = [{kind: parts[place] for kind, parts in split.items()} for place in range(len(sizes))]
        else:
            slots = self.slots
        return {
            f"{kind}/{name}": tensor.detach().float().view(weights[name].shape)
            for name, slot in zip(weights, slots, strict=True)
            for kind, tensor in slot.items()
        }


def _fits(slot: Tensors, weight: torch.Tensor) -> bool:
    held = slot.get("master", slot.get("exp_avg"))
    if held is None:  # the parameter never got a gradient
        return True
    return held.shape == weight.shape and ("master" not in slot or torch.equal(held.to(weight.dtype), weight))


def stage_0_groups(wrapper: Mapping[str, Any], own: Any) -> list[OptimizerGroup]:
    """Return the groups of a stage 0 optimizer. wrapper: what DeepSpeed put around it in half precision, or the
    optimizer itself; own: the state of the optimizer."""
    flat, apart = wrapper.get("fp32_groups_flat"), wrapper.get("fp32_groups")
    groups = []
    for index, group in enumerate(param_groups(own)):
        slots = [moments(own["state"].get(number, {})) for number in group["params"]]
        if flat is not None:
            slots = [{"master": flat[index]} | slots[0]]
        elif apart is not None:
            slots = [{"master": master} | slot for master, slot in zip(apart[index], slots, strict=True)]
        groups.append(OptimizerGroup(slots, flat is not None, tuple(group.get("param_names") or ())))
    return groups


def names_of_groups(
    weights: Mapping[str, torch.Tensor], groups: Sequence[OptimizerGroup]
) -> list[tuple[str, ...]] | None:
    """Return the names of each group's parameters in order, or None if no way or several ways to group them fit.

    weights: the model's parameters in its order, each once.
    """
    if all(group.names and all(name in weights for name in group.names) for group in groups):
        return [group.names for group in groups]
    is_flat = any(group.is_flat for group in groups)
    there = sum(weight.numel() for weight in weights.values()) if is_flat else len(weights)
    missing = there - sum(group.size() for group in groups)
    found = []
    for frozen in _possibly_frozen(list(weights)) if missing else [frozenset[str]()]:
        for names in _usual_groups([name for name in weights if name not in frozen]):
            if names in found or len(names) != len(groups):
                continue
            if all(group.fits([weights[name] for name in own]) for group, own in zip(groups, names, strict=True)):
                found.append(names)
    return found[0] if len(found) == 1 else None


def _usual_groups(names: Sequence[str]) -> Iterator[list[tuple[str, ...]]]:
    """Yield groups of names, empty ones left out as DeepSpeed does."""
    generator = [name for name in names if _GENERATOR.search(name)]
    discriminator = [name for name in names if not _GENERATOR.search(name)]
    for networks in ([names], [generator, discriminator], [discriminator, generator]):
        for is_exempt in _EXEMPT_FROM_DECAY:
            for exempt_first in (False, True):
                groups = [
                    tuple(name for name in network if is_exempt(name) is wanted)
                    for network in networks
                    for wanted in (exempt_first, not exempt_first)
                ]
                yield [group for group in groups if group]


def _possibly_frozen(names: Sequence[str]) -> Iterator[frozenset[str]]:
    """Yield what may have been frozen: one parameter or module, or a network's embeddings with its lowest layers."""
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


def why_no_moments(own: Any, has_moments: bool) -> list[str]:
    """Return notes on what AdamW cannot take from the state, and why."""
    kept = _kept(own)
    if has_moments:
        others = [key for key in kept if key not in MOMENTS]
        return [f"its optimizer also kept {', '.join(others)}, which AdamW does not have"] if others else []
    if not kept and not param_groups(own):
        return ["it holds no optimizer"]
    return [other_than_adam(own) or "its optimizer holds none of Adam's moments, as before the first step"]


def other_than_adam(own: Any) -> str:
    """Return what shows that the optimizer is not of Adam's kind; empty if it may be one."""
    kept, groups = _kept(own), param_groups(own)
    if kept and not set(MOMENTS) <= set(kept):
        return f"its optimizer was not Adam: it kept {', '.join(kept)}, not exp_avg and exp_avg_sq"
    if not kept and groups and not any("betas" in group for group in groups):
        return "its optimizer was not Adam, but one such as SGD without momentum: it has no betas and kept nothing"
    return ""


def _kept(own: Any) -> list[str]:
    """Return the names of the tensors that the state holds for parameters."""
    found = {key for state in _states(own) for key, value in state.items() if torch.is_tensor(value)}
    return sorted(map(str, found - {"step"}))


def _states(own: Any) -> list[dict[str, Any]]:
    """Return the state of each tensor; elastic checkpoints hold it as a list."""
    return own if isinstance(own, list) else list(own["state"].values()) if own else []


def param_groups(own: Any) -> list[dict[str, Any]]:
    return list(own.get("param_groups") or ()) if isinstance(own, dict) else []


def adam_step(own: Any) -> float | None:
    """Return Adam's own count of updates, the largest of those in its state and groups."""
    found = [state.get("step") for state in (*_states(own), *param_groups(own))]
    return max((float(step) for step in found if isinstance(step, (int, float, torch.Tensor))), default=None)


def loss_scale(scaling: Mapping[str, Any], is_scaled: bool) -> dict[str, float]:
    """Return the counters of the loss scale from a loss scaler's attributes, or what stage 0 has of them.

    DeepSpeed counts iterations from 0; -1 means that there was no overflow.
    """
    good = float(scaling.get("cur_iter", 0) - scaling.get("last_overflow_iter", -1) - 1)
    return {
        "consecutive_skips": 0.0,
        "is_scaled": float(is_scaled),
        "loss_scale": float(scaling.get("cur_scale", 1.0)) if is_scaled else 1.0,
        "good_steps": max(0.0, good) if is_scaled else 0.0,
        "hysteresis_left": max(1.0, float(scaling.get("cur_hysteresis", 1.0))),
    }
