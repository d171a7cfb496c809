"""Read a checkpoint that DeepSpeed's `save_checkpoint` or its script ds_to_universal wrote, at every stage, precision
and number of ranks: tensors by name, counters, and notes on what could not be read.

The second half of the module reads the state of a foreign optimizer: its groups, tensors, step count and loss scale.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from electra_ds.core.errors import CheckpointError
from electra_ds.interop.deepspeed_files import (
    DeepSpeedFiles,
    Placeholder,
    Tensors,
    frozen_tensor,
    load_file,
    moments,
    partitioned_tensors,
    sliced_tensors,
    universal_tensors,
)
from electra_ds.training.optimizer import MOMENTS, STEP_WITHOUT_CORRECTION

_HALF = {torch.float16: "fp16", torch.bfloat16: "bf16"}


class DeepSpeedCheckpoint(NamedTuple):
    """The content of a DeepSpeed checkpoint."""

    files: DeepSpeedFiles
    stage: int
    precision: str
    """The precision of the weights in a step: fp32, bf16 or fp16."""
    ranks: int
    step: int
    """The number of optimizer steps, including skipped ones."""
    tensors: Tensors
    """fp32 tensors on the CPU, under the file's names; a tied tensor under each of its names.

    They are `master/NAME` for every parameter, and `exp_avg/NAME` and `exp_avg_sq/NAME` if its moments could be read.
    """
    counters: dict[str, float]
    """The counters of `MasterAdamW.counters`."""
    adam: dict[str, Any]
    """The values of the first parameter group, such as betas and eps; empty if the optimizer was not saved."""
    corrects_bias: bool
    """True if Adam corrected the bias of moments that start at 0."""
    notes: tuple[str, ...]
    """Notes on what could not be read, and why."""
    frozen: tuple[str, ...] = ()
    """The names of parameters that the optimizer did not hold. They have no moments."""


class _Content(NamedTuple):
    """The content that each layout stores differently."""

    stage: int
    tensors: Tensors
    own: Any
    """The state of the optimizer that DeepSpeed wraps."""
    scaling: Mapping[str, Any]
    """The attributes of the loss scaler."""
    notes: list[str]
    frozen: list[str]


def read_deepspeed_checkpoint(files: DeepSpeedFiles, frozen: Sequence[str] = ()) -> DeepSpeedCheckpoint:
    """Read a checkpoint. Raises CheckpointError, which names what is missing, damaged or not understood.

    frozen: name prefixes of parameters that were not trained, for a stage 0 checkpoint, which does not record them.
    """
    try:
        return _read(files, frozen)
    except OSError as error:
        raise CheckpointError(f"{files.folder} cannot be read: {error}.") from error
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{files.folder} does not have the layout of a DeepSpeed 0.19.8 checkpoint "
            f"({type(error).__name__}: {error})."
        ) from error


def _read(files: DeepSpeedFiles, frozen: Sequence[str]) -> DeepSpeedCheckpoint:
    file = files.model[min(files.model)]
    state = load_file(file)
    if not isinstance(state.get("module"), dict):
        raise CheckpointError(f"{file} has no `module`: DeepSpeed's engine did not write it.")
    ranks, step, skipped = (int(state[key]) for key in ("dp_world_size", "global_steps", "skipped_steps"))
    is_partitioned = state.get("param_shapes") is not None
    if files.universal is None:
        files.check_ranks("optim", ranks if is_partitioned else 0)
    content = _read_zero(files, state) if is_partitioned else _read_stage_0(state, frozen)
    for name, tensor in content.tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{files.folder}: {name} is not finite. Take an earlier checkpoint.")
    taken = adam_step(content.own)
    corrects = taken is None or taken < STEP_WITHOUT_CORRECTION
    dtypes = {value.dtype for value in state["module"].values() if torch.is_tensor(value)}
    precision = next((name for dtype, name in _HALF.items() if dtype in dtypes), "fp32")
    counters = loss_scale(content.scaling, precision == "fp16") | {
        "taken_steps": taken if taken is not None and corrects else float(max(0, step - skipped)),
        "skipped_steps": float(skipped),
    }
    has_moments = any(name.startswith("exp_avg/") for name in content.tensors)
    group = next(iter(param_groups(content.own)), {}) if has_moments else {}
    return DeepSpeedCheckpoint(
        files,
        content.stage,
        precision,
        ranks,
        step,
        content.tensors,
        counters,
        group,
        corrects,
        tuple(content.notes),
        tuple(content.frozen),
    )


def _read_zero(files: DeepSpeedFiles, state: Mapping[str, Any]) -> _Content:
    """Read stages 1 to 3, and universal checkpoints."""
    if state.get("frozen_param_shapes") and any(path.name.startswith("zero_pp_rank") for path in files.model.values()):
        files.check_ranks("model", int(state["dp_world_size"]))
    if files.universal is not None:
        own: Any
        common, tensors, own = universal_tensors(files.universal, state)
        stage = _stage(common)
    else:
        parts = [load_file(path)["optimizer_state_dict"] for _, path in sorted(files.optimizer.items())]
        common, stage = parts[0], _stage(parts[0])
        read = sliced_tensors if stage == 3 else partitioned_tensors
        tensors = read(files.folder, state, parts)
        own = common["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
    notes = why_no_moments(own, any(name.startswith("exp_avg/") for name in tensors))
    scaler = common.get("loss_scaler")
    _add_tied(tensors, state.get("shared_params") or {})
    frozen = _add_frozen_slices(tensors, files, state) if stage == 3 else _add_left_out(tensors, state)
    return _Content(stage, tensors, own, scaler.attributes if isinstance(scaler, Placeholder) else {}, notes, frozen)


def _stage(part: Mapping[str, Any]) -> int:
    """Return 1, 2 or 3. The checkpoint of DeepSpeed's BF16_Optimizer, which is that of stage 1, does not say."""
    stage = part.get("zero_stage", 1)
    if isinstance(stage, Placeholder):  # it was an enumeration member
        stage = stage.arguments[0]
    if stage not in (1, 2, 3):
        raise CheckpointError(f"The checkpoint says that its ZeRO stage is {stage!r}, which is unknown.")
    return int(stage)


def _add_left_out(tensors: Tensors, state: Mapping[str, Any]) -> list[str]:
    """Add the tensors of `module` that are in no group at stages 1 and 2, and return the names of frozen ones.

    Such a tensor was frozen, or is another name of one in a group.
    """
    weights, aliases = _named_once(state)
    frozen = []
    for name, weight in weights.items():
        names = [name, *(alias for alias, first in aliases.items() if first == name)]
        held = next((one for one in names if f"master/{one}" in tensors), None)
        if held is None:
            frozen.append(name)
            tensors[f"master/{name}"] = weight.detach().float()
        _add_tied(tensors, {other: held or name for other in names if f"master/{other}" not in tensors})
    return frozen


def _add_frozen_slices(tensors: Tensors, files: DeepSpeedFiles, state: Mapping[str, Any]) -> list[str]:
    """Add the frozen parameters of stage 3 and return their names. Every rank's model file has a slice of each."""
    shapes = state.get("frozen_param_shapes") or {}
    if shapes:
        ranks = [load_file(path)["frozen_param_fragments"] for _, path in sorted(files.model.items())]
        for name, shape in shapes.items():
            tensors[f"master/{name}"] = frozen_tensor(files.folder, name, shape, [own[name] for own in ranks])
    return list(shapes)


def _read_stage_0(state: Mapping[str, Any], frozen: Sequence[str]) -> _Content:
    """Read stage 0. The weights have names; masters and moments get theirs from `names_of_groups`."""
    optimizer = state.get("optimizer") or {}
    own = optimizer.get("optimizer_state_dict", optimizer)
    groups = stage_0_groups(optimizer, own)
    weights, aliases = _named_once(state)
    tensors = {f"master/{name}": weight.detach().float() for name, weight in weights.items()}
    left_out: list[str] = []
    slots = [slot for group in groups for slot in group.slots]
    notes = why_no_moments(own, any("exp_avg" in slot for slot in slots))
    if any(slots):
        in_groups = {name: weight for name, weight in weights.items() if not name.startswith(tuple(frozen))}
        names = names_of_groups(in_groups, groups)
        if names is None:
            notes.append(
                "its optimizer does not say which tensor belongs to which parameter, and none or several of the usual "
                "ways to group parameters fit; if parameters were frozen there, name them with --frozen"
            )
        else:
            for group, own_names in zip(groups, names, strict=True):
                tensors |= group.by_name({name: weights[name] for name in own_names})
            left_out = [name for name in weights if not any(name in own_names for own_names in names)]
    _add_tied(tensors, aliases)
    return _Content(0, tensors, own, optimizer, notes, left_out)


def _named_once(state: Mapping[str, Any]) -> tuple[Tensors, dict[str, str]]:
    """Return (parameters of `module` by their first names, first names by the other names)."""
    buffers = state.get("buffer_names") or ()
    weights: Tensors = {}
    first_names: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state["module"].items():
        if name in buffers or not torch.is_tensor(tensor):
            continue
        identity = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        first = first_names.setdefault(identity, name)
        if first == name:
            weights[name] = tensor
        else:
            aliases[name] = first
    return weights, aliases


def _add_tied(tensors: Tensors, first_names: Mapping[str, str]) -> None:
    """Add tied parameters, which DeepSpeed keeps under their first names, under their other names."""
    for alias, name in first_names.items():
        for key in ("master", *MOMENTS):
            if f"{key}/{name}" in tensors:
                tensors[f"{key}/{alias}"] = tensors[f"{key}/{name}"]


# --- the state of the optimizer
#
# A stage 0 checkpoint of DeepSpeed has the weights by name and the optimizer's tensors by number, group after group.
# To find the parameter of each tensor, the usual ways to group parameters are tried: one group, or matrices apart from
# biases and norms, for the model or for each of the two networks. Within a group, parameters are in the model's order.
# A way is used if it is the only one that fits: as many tensors, the same shapes and, if the optimizer holds fp32
# masters, masters that round to the weights.

_EXEMPT_FROM_DECAY: tuple[Callable[[str], bool], ...] = (
    lambda name: False,  # one group
    lambda name: name.endswith("bias") or "norm" in name.lower(),  # `parameter_groups`
    lambda name: any(part in name for part in ("bias", "LayerNorm.weight")),  # transformers' examples
)
_GENERATOR = re.compile(r"(^|\.)gen")


class OptimizerGroup(NamedTuple):
    """One group of a stage 0 optimizer."""

    slots: list[Tensors]
    """The master and moments of each parameter, by kind, as far as the optimizer holds them."""
    is_flat: bool = False
    """True if one slot holds all parameters of the group, end to end."""
    names: tuple[str, ...] = ()
    """The names of the group's parameters, if it records them."""

    def fits(self, weights: Sequence[torch.Tensor]) -> bool:
        if self.is_flat:
            weights = [torch.cat([weight.flatten() for weight in weights])]
        return len(weights) == len(self.slots) and all(map(_fits, self.slots, weights))

    def by_name(self, weights: Mapping[str, torch.Tensor]) -> Tensors:
        """Return the group's tensors as `KIND/NAME`, in fp32 and in the shapes of its parameters."""
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
    """Return the groups of a stage 0 optimizer.

    wrapper: DeepSpeed's half-precision wrapper, or the optimizer itself. own: the optimizer's state.
    """
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
    """Return the names of each group's parameters in order, or None unless exactly one way to group them fits.

    weights: the model's parameters in its order, each once.
    """
    if all(group.names and all(name in weights for name in group.names) for group in groups):
        return [group.names for group in groups]
    found = []
    for names in _usual_groups(list(weights)):
        pairs = list(zip(groups, names, strict=False))
        fits = len(names) == len(groups) and all(group.fits([weights[name] for name in own]) for group, own in pairs)
        if fits and names not in found:
            found.append(names)
    return found[0] if len(found) == 1 else None


def _usual_groups(names: Sequence[str]) -> Iterator[list[tuple[str, ...]]]:
    """Yield groups of names, without empty groups, which DeepSpeed leaves out too."""
    generator = [name for name in names if _GENERATOR.search(name)]
    discriminator = [name for name in names if not _GENERATOR.search(name)]
    for networks in ([names], [generator, discriminator], [discriminator, generator]):
        for is_exempt in _EXEMPT_FROM_DECAY:
            groups = [
                tuple(name for name in network if is_exempt(name) is wanted)
                for network in networks
                for wanted in (False, True)
            ]
            yield [group for group in groups if group]


def why_no_moments(own: Any, has_moments: bool) -> list[str]:
    """Return a note with the reason if AdamW cannot take moments from the state."""
    if has_moments:
        return []
    if not own:
        return ["it holds no optimizer"]
    kept = {str(key) for state in own["state"].values() for key, value in state.items() if torch.is_tensor(value)}
    return [f"its optimizer kept {', '.join(sorted(kept - {'step'})) or 'nothing'}, not Adam's exp_avg and exp_avg_sq"]


def param_groups(own: Any) -> list[dict[str, Any]]:
    return list(own.get("param_groups") or ()) if isinstance(own, dict) else []


def adam_step(own: Any) -> float | None:
    """Return Adam's own step count, the largest in its state and groups."""
    states = own["state"].values() if own else ()
    found = [state.get("step") for state in (*states, *param_groups(own))]
    return max((float(step) for step in found if isinstance(step, (int, float, torch.Tensor))), default=None)


def loss_scale(scaling: Mapping[str, Any], is_scaled: bool) -> dict[str, float]:
    """Return the counters of the loss scale from a loss scaler's attributes, or from those that stage 0 has.

    DeepSpeed counts iterations from 0, and -1 means that no overflow has occurred.
    """
    good = float(scaling.get("cur_iter", 0) - scaling.get("last_overflow_iter", -1) - 1)
    return {
        "consecutive_skips": 0.0,
        "is_scaled": float(is_scaled),
        "loss_scale": float(scaling.get("cur_scale", 1.0)) if is_scaled else 1.0,
        "good_steps": max(0.0, good) if is_scaled else 0.0,
        "hysteresis_left": max(1.0, float(scaling.get("cur_hysteresis", 1.0))),
    }
