"""Read a checkpoint that DeepSpeed's `save_checkpoint` or its script ds_to_universal wrote, at every stage, precision
and number of ranks: tensors by name, counters, and notes on what could not be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from electra_ds.core.errors import CheckpointError
from electra_ds.interop.deepspeed_files import DeepSpeedFiles, StandIn, load_dictionary
from electra_ds.interop.deepspeed_optimizer import (
    adam_step,
    loss_scale,
    names_of_groups,
    other_than_adam,
    param_groups,
    stage_0_groups,
    why_no_moments,
)
from electra_ds.interop.deepspeed_zero import (
    Tensors,
    frozen_tensor,
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
    """Optimizer steps, skipped ones included."""
    tensors: Tensors
    """fp32 on the CPU, `master/NAME` for every parameter, and `exp_avg/NAME`, `exp_avg_sq/NAME` for those whose moments
    could be read, under the file's names. A tied tensor is there under each of its names."""
    counters: dict[str, float]
    """The counters of `MasterAdamW.counters`."""
    adam: dict[str, Any]
    """The values of the first parameter group, such as betas and eps; empty if there is none."""
    corrects_bias: bool
    """True if Adam corrected the bias of moments that start at 0."""
    notes: tuple[str, ...]
    """Notes on what could not be read, and why."""
    frozen: tuple[str, ...] = ()
    """Names of parameters that the optimizer did not hold; they have no moments."""


class _Content(NamedTuple):
    """The content that differs between the layouts."""

    stage: int
    tensors: Tensors
    own: Any
    """The state of the optimizer that DeepSpeed wraps."""
    scaling: Mapping[str, Any]
    """Attributes of the loss scaler."""
    notes: list[str]
    frozen: list[str]


def read_deepspeed_checkpoint(files: DeepSpeedFiles, frozen: Sequence[str] = ()) -> DeepSpeedCheckpoint:
    """Read a complete checkpoint. Raises CheckpointError that names what is missing, damaged or not understood.

    frozen: prefixes of the names of parameters that were not trained, for a stage 0 checkpoint that does not say so.
    """
    try:
        return _read(files, frozen)
    except OSError as error:
        raise CheckpointError(f"{files.folder} cannot be read: {error}.") from error
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{files.folder} is not laid out as DeepSpeed 0.19.8 lays out a checkpoint "
            f"({type(error).__name__}: {error})."
        ) from error


def _read(files: DeepSpeedFiles, frozen: Sequence[str]) -> DeepSpeedCheckpoint:
    file = files.model[min(files.model)]
    state = load_dictionary(file)
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
    group = {} if other_than_adam(content.own) else next(iter(param_groups(content.own)), {})
    return DeepSpeedCheckpoint(
        files, content.stage, precision, ranks, step, content.tensors, counters, group, corrects,
        tuple(content.notes), tuple(content.frozen),
    )  # fmt: skip


def _read_zero(files: DeepSpeedFiles, state: Mapping[str, Any]) -> _Content:
    """Read stages 1 to 3, and universal checkpoints."""
    if state.get("frozen_param_shapes") and any(path.name.startswith("zero_pp_rank") for path in files.model.values()):
        files.check_ranks("model", int(state["dp_world_size"]))
    if files.universal is not None:
        own: Any
        common, tensors, own = universal_tensors(files.universal, state)
        stage = _stage(common)
    else:
        parts = [load_dictionary(path)["optimizer_state_dict"] for _, path in sorted(files.optimizer.items())]
        common, stage = parts[0], _stage(parts[0])
        read = sliced_tensors if stage == 3 else partitioned_tensors
        tensors = read(files.folder, state, parts)
        own = common["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
    notes = why_no_moments(own, any(name.startswith("exp_avg/") for name in tensors))
    scaler = common.get("loss_scaler")
    _add_tied(tensors, state.get("shared_params") or {})
    frozen = _add_frozen_slices(tensors, files, state) if stage == 3 else _add_left_out(tensors, state)
    return _Content(stage, tensors, own, scaler.attributes if isinstance(scaler, StandIn) else {}, notes, frozen)


def _stage(part: Mapping[str, Any]) -> int:
    """Return 1, 2 or 3. DeepSpeed's BF16_Optimizer, which is that of stage 1, does not say."""
    stage = part.get("zero_stage", 1)
    if isinstance(stage, StandIn):  # of an enumeration
        stage = stage.arguments[0]
    if stage not in (1, 2, 3):
        raise CheckpointError(f"The checkpoint says that it is of ZeRO stage {stage!r}, which is not known.")
    return int(stage)


def _add_left_out(tensors: Tensors, state: Mapping[str, Any]) -> list[str]:
    """Add what is in `module` and in no group at stages 1 and 2: it was frozen, or is another name of what is in a
    group. Return the names of the frozen ones."""
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
    """Add the frozen parameters of stage 3, of which every rank's model file has a slice; return their names."""
    shapes = state.get("frozen_param_shapes") or {}
    if shapes:
        ranks = [load_dictionary(path)["frozen_param_fragments"] for _, path in sorted(files.model.items())]
        for name, shape in shapes.items():
            tensors[f"master/{name}"] = frozen_tensor(files.folder, name, shape, [own[name] for own in ranks])
    return list(shapes)


def _read_stage_0(state: Mapping[str, Any], frozen: Sequence[str]) -> _Content:
    """Read stage 0: the weights have names, and masters and moments get theirs from `names_of_groups`."""
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
                "its optimizer does not say which of its tensors belongs to which parameter, and none of the usual "
                "ways to group parameters fits, or several do; if parameters were frozen there, name them with --frozen"
            )
        else:
            for group, own_names in zip(groups, names, strict=True):
                tensors |= group.by_name({name: weights[name] for name in own_names})
            left_out = [name for name in weights if not any(name in own_names for own_names in names)]
            if len(in_groups) > sum(map(len, names)):
                notes.append("which parameters were frozen is inferred from what fits; to be certain, give --frozen")
    _add_tied(tensors, aliases)
    return _Content(0, tensors, own, optimizer, notes, left_out)


def _named_once(state: Mapping[str, Any]) -> tuple[Tensors, dict[str, str]]:
    """Return (parameters of `module` by their first names, first names by the others)."""
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
    """Add tied parameters under their other names, which DeepSpeed keeps under the first."""
    for alias, name in first_names.items():
        for key in ("master", *MOMENTS):
            if f"{key}/{name}" in tensors:
                tensors[f"{key}/{alias}"] = tensors[f"{key}/{name}"]
