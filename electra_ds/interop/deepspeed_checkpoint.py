"""Read what DeepSpeed's `save_checkpoint` wrote, at every stage, precision and number of ranks: tensors by name.

    FOLDER/latest                                          a tag, such as global_step40
    FOLDER/TAG/mp_rank_00_model_states.pt                  stages 0 to 2: weights by name, counters; at stage 0 the
                                                           optimizer too, without names
    FOLDER/TAG/zero_pp_rank_R_mp_rank_00_model_states.pt   stage 3: names and shapes
    FOLDER/TAG/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt   stages 1 to 3: rank R's part of masters and moments,
                                                           flat, group after group

and what DeepSpeed's ds_to_universal made of one, see native_universal:

    FOLDER/latest_universal                                a tag, such as global_step40_universal
    FOLDER/TAG/zero/NAME/fp32.pt exp_avg.pt exp_avg_sq.pt  one parameter's, whole
    FOLDER/TAG/*_model_states.pt                           as above

The layouts are those of DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py, runtime/fp16/, runtime/
bf16_optimizer.py). Nothing is unpickled beyond torch's safe list, see native_pickle.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from electra_ds.core.errors import CheckpointError
from electra_ds.interop.deepspeed_optimizer import (
    adam_step,
    loss_scale,
    other_than_adam,
    param_groups,
    why_no_moments,
)
from electra_ds.interop.deepspeed_order import Flat, Slot, Slots, deal
from electra_ds.interop.deepspeed_pickle import Inert, load_inert
from electra_ds.interop.deepspeed_universal import universal_tensors
from electra_ds.interop.deepspeed_zero import in_fp32, partitioned_tensors, shared_out_tensors, sliced
from electra_ds.model.other_formats import refuse_other_frameworks
from electra_ds.training.optimizer import MOMENTS, STEP_WITHOUT_CORRECTION

_MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<model>\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<model>\d+)_optim_states\.pt")
_OTHER_LAYOUTS = re.compile(r"layer_.*|.*expert_.*|expp_rank_.*")
_HALF = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_LONGEST_TAG = 200
_MOST_SHOWN = 5
_TOO_LARGE = 2**53
"""No count of steps or ranks comes here, and floats hold all below it."""


class NativeFiles(NamedTuple):
    """The files of one tag, by rank."""

    folder: Path
    model: dict[int, Path]
    """One file at stages 0 to 2."""
    optimizer: dict[int, Path]
    """Empty at stage 0."""
    universal: Path | None = None
    """The folder `zero` of a universal checkpoint."""

    def all(self) -> list[Path]:
        universal = sorted(self.universal.rglob("*.pt")) if self.universal else []
        return [*self.model.values(), *self.optimizer.values(), *universal]


class NativeCheckpoint(NamedTuple):
    """A native checkpoint as it was read."""

    folder: Path
    stage: int
    precision: str
    """Of the weights in a step: fp32, bf16 or fp16."""
    ranks: int
    step: int
    """Optimiser steps, skipped ones included."""
    tensors: dict[str, torch.Tensor]
    """fp32 on the CPU, `master/NAME` for every parameter, and `exp_avg/NAME`, `exp_avg_sq/NAME` for those whose moments
    could be read, under the file's names. A tied tensor stands under each of its names."""
    counters: dict[str, float]
    """In the terms of `MasterAdamW.counters`."""
    adam: dict[str, Any]
    """The first parameter group's values, such as betas and eps; empty where there is none."""
    corrects_bias: bool
    """Whether Adam made up for moments that start at 0."""
    notes: tuple[str, ...]
    """What could not be had, and why."""
    frozen: tuple[str, ...] = ()
    """Parameters that the optimizer did not hold, by their names; they have no moments."""
    is_universal: bool = False


class _Content(NamedTuple):
    """The content that differs between the layouts."""

    stage: int
    tensors: dict[str, torch.Tensor]
    own: Any
    """The state of the optimizer that DeepSpeed wraps."""
    scaling: Mapping[str, Any]
    """Attributes of the loss scaler."""
    notes: list[str]
    frozen: list[str]


def find_files(path: Path) -> NativeFiles:
    """The files of the folder that holds `latest`, or of a tag folder.

    Raises CheckpointError if there is no such checkpoint, or it is of model or pipeline parallelism or experts.
    """
    try:
        return _find(_tag_folder(path))
    except OSError as error:
        raise CheckpointError(f"Cannot look for a checkpoint in {path}: {error}.") from error


def _find(folder: Path) -> NativeFiles:
    model: dict[int, Path] = {}
    optimizer: dict[int, Path] = {}
    for file in sorted(folder.iterdir()):
        if _OTHER_LAYOUTS.fullmatch(file.name):
            raise CheckpointError(f"{file} belongs to pipeline parallelism or experts, which ELECTRA here never has.")
        for pattern, found in ((_MODEL, model), (_OPTIMIZER, optimizer)):
            if match := pattern.fullmatch(file.name):
                if int(match["model"]):
                    raise CheckpointError(f"{file} is of tensor parallelism, which ELECTRA here never has.")
                rank = int(match["rank"] or 0)
                if rank in found:
                    raise CheckpointError(
                        f"{folder} holds two saves: {found[rank].name} and {file.name}. Move the older one away."
                    )
                found[rank] = file
    if not model:
        refuse_other_frameworks(folder, str(folder))
        raise CheckpointError(
            f"{folder} holds no *_model_states.pt. Give the folder that DeepSpeed's save_checkpoint wrote, with the "
            f"file `latest`, or one of its tag folders such as global_step40."
        )
    universal = folder / "zero"
    return NativeFiles(folder, model, optimizer, universal if universal.is_dir() else None)


def _tag_folder(path: Path) -> Path:
    latest = next((path / name for name in ("latest", "latest_universal") if (path / name).is_file()), None)
    if latest is not None:
        with latest.open(encoding="utf8", errors="replace") as file:
            tag = file.read(_LONGEST_TAG + 2).strip()
        if len(tag) > _LONGEST_TAG or ".." in tag or any(separator in tag for separator in "/\\\0"):
            raise CheckpointError(
                f"{latest} does not name a folder beside it: {tag[:40]!r}. It is damaged; give the tag's own folder."
            )
        folder = path / tag
        if not tag or not folder.is_dir():
            raise CheckpointError(f"{latest} names the tag {tag!r}, and there is no folder {folder}.")
        return folder
    if not path.is_dir():
        refuse_other_frameworks(path, str(path))
        raise CheckpointError(f"There is no folder {path}.")
    return path


def read_deepspeed_checkpoint(files: NativeFiles, frozen: Sequence[str] = ()) -> NativeCheckpoint:
    """Read a complete checkpoint. Raises CheckpointError that names what is missing, damaged or not understood.

    frozen: how the names of parameters begin that were not trained, for a stage 0 checkpoint that does not say so.
    """
    try:
        return _read(files, frozen)
    except OSError as error:
        raise CheckpointError(f"{files.folder} cannot be read: {error}.") from error
    except (
        KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError, OverflowError, RecursionError
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"{files.folder} is not laid out as DeepSpeed 0.19.8 lays out a checkpoint "
            f"({type(error).__name__}: {error})."
        ) from error


def _read(files: NativeFiles, frozen: Sequence[str]) -> NativeCheckpoint:
    state = load_inert(files.model[min(files.model)])
    if not isinstance(state.get("module"), dict):
        raise CheckpointError(f"{files.model[min(files.model)]} has no `module`: DeepSpeed's engine did not write it.")
    ranks = _whole_number(state, "dp_world_size", files)
    is_partitioned = state.get("param_shapes") is not None
    if files.universal is None:
        _check_ranks(files, ranks if is_partitioned else 0)
    content = _read_partitioned(files, state) if is_partitioned else _read_whole(state, frozen)
    for name, tensor in content.tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{files.folder}: {name} is not finite. Take a checkpoint from before.")
    step, skipped = _whole_number(state, "global_steps", files), _whole_number(state, "skipped_steps", files)
    taken = adam_step(content.own)
    corrects = taken is None or taken < STEP_WITHOUT_CORRECTION
    precision = _precision(state["module"])
    counters = loss_scale(content.scaling, precision == "fp16") | {
        "taken_steps": taken if taken is not None and corrects else float(max(0, step - skipped)),
        "skipped_steps": float(skipped),
    }
    group = {} if other_than_adam(content.own) else next(iter(param_groups(content.own)), {})
    return NativeCheckpoint(
        files.folder, content.stage, precision, ranks, step, content.tensors, counters, group, corrects,
        tuple(content.notes), tuple(content.frozen), files.universal is not None,
    )  # fmt: skip


def _read_partitioned(files: NativeFiles, state: Mapping[str, Any]) -> _Content:
    """Read stages 1 to 3, and universal checkpoints."""
    if state.get("frozen_param_shapes") and any(path.name.startswith("zero_pp_rank") for path in files.model.values()):
        _check_ranks_of_model(files, _whole_number(state, "dp_world_size", files))
    if files.universal is not None:
        own: Any
        common, tensors, own = universal_tensors(files.universal, state)
        stage = _stage(common)
    else:
        parts = [_optimizer_part(path) for _, path in sorted(files.optimizer.items())]
        common, stage = parts[0], _stage(parts[0])
        gather = shared_out_tensors if stage == 3 else partitioned_tensors
        tensors = gather(files.folder, state, parts)
        own = common.get("optimizer_state_dict" if stage == 3 else "base_optimizer_state")
    notes = why_no_moments(own, any(name.startswith("exp_avg/") for name in tensors))
    scaler = common.get("loss_scaler")
    _add_tied(tensors, state.get("shared_params"))
    frozen = _add_frozen_slices(tensors, files, state) if stage == 3 else _add_left_out(tensors, state)
    return _Content(stage, tensors, own, scaler.attributes if isinstance(scaler, Inert) else {}, notes, frozen)


def _add_left_out(tensors: dict[str, torch.Tensor], state: Mapping[str, Any]) -> list[str]:
    """Add what is in `module` and in no group at stages 1 and 2: it was frozen, or is another name of what is in a
    group. Return the names of the frozen ones."""
    weights, aliases = _named_once(state)
    frozen = []
    for name, weight in weights.items():
        names = [name, *(alias for alias, first in aliases.items() if first == name)]
        held = next((one for one in names if f"master/{one}" in tensors), None)
        if held is None:
            frozen.append(name)
            tensors[f"master/{name}"] = in_fp32(weight, name)
        _add_tied(tensors, {other: held or name for other in names if f"master/{other}" not in tensors})
    return frozen


def _add_frozen_slices(tensors: dict[str, torch.Tensor], files: NativeFiles, state: Mapping[str, Any]) -> list[str]:
    """Add the frozen parameters of stage 3, of which every rank's model file has a slice; return their names."""
    shapes = state.get("frozen_param_shapes") or {}
    if not shapes:
        return []
    ranks = [load_inert(path)["frozen_param_fragments"] for _, path in sorted(files.model.items())]
    for name, shape in shapes.items():
        tensors[f"master/{name}"] = sliced(files.folder, name, shape, [in_fp32(own[name], name) for own in ranks])
    return list(shapes)


def _read_whole(state: Mapping[str, Any], frozen: Sequence[str]) -> _Content:
    """Read stage 0: the weights have names; masters and moments get them from native_deal or from the groups."""
    optimizer = state.get("optimizer")
    wrapper = optimizer if isinstance(optimizer, dict) else {}
    own: Any = wrapper.get("optimizer_state_dict", optimizer)
    weights, aliases = _named_once(state)
    tensors = {f"master/{name}": in_fp32(weight, name) for name, weight in weights.items()}
    groups, left_out = param_groups(own), []
    has_moments = any(_moments(one) for one in own.get("state", {}).values()) if groups else False
    notes = why_no_moments(own, has_moments)
    has_masters = any(isinstance(wrapper.get(key), list) for key in ("fp32_groups_flat", "fp32_groups"))
    if has_moments or (groups and has_masters):
        in_groups = {name: one for name, one in weights.items() if not name.startswith(tuple(frozen))}
        names = _names_in_groups(in_groups, wrapper, own, groups)
        if names is None:
            notes.append(
                "its optimizer does not say which of its tensors belongs to which parameter, and the shapes fit in "
                "several ways or none; if parameters were frozen there, name them with --frozen"
            )
        else:
            _take(tensors, weights, wrapper, own, groups, names)
            left_out = [name for name in weights if not any(name in group for group in names)]
            if len(in_groups) > sum(map(len, names)):
                notes.append("which parameters were frozen is inferred from what fits; to be certain, give --frozen")
    _add_tied(tensors, aliases)
    return _Content(0, tensors, own, wrapper, notes, left_out)


def _named_once(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return (parameters of `module` by their first names, first names by the others)."""
    buffers = state.get("buffer_names") or ()
    weights: dict[str, torch.Tensor] = {}
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


def _check_ranks(files: NativeFiles, ranks: int) -> None:
    """Raises CheckpointError unless there is one optimizer file for each of so many ranks, 0 for none."""
    missing = ranks - sum(rank < ranks for rank in files.optimizer)
    if missing:
        # Not all of them: the number is the file's, and may be anything.
        gone = itertools.islice((rank for rank in range(ranks) if rank not in files.optimizer), _MOST_SHOWN)
        more = f" and {missing - _MOST_SHOWN} more" if missing > _MOST_SHOWN else ""
        raise CheckpointError(
            f"{files.folder} was saved by {ranks} rank(s), and the *_optim_states.pt of rank "
            f"{', '.join(map(str, gone))}{more} is missing. Copy every rank's file into the folder."
        )
    surplus = sorted(rank for rank in files.optimizer if rank >= ranks)
    if surplus:
        raise CheckpointError(
            f"{files.folder} was saved by {ranks or 'no'} rank(s) with ZeRO, and {files.optimizer[surplus[0]].name} is "
            f"from another save. Move such files away."
        )


def _check_ranks_of_model(files: NativeFiles, ranks: int) -> None:
    """Raise CheckpointError unless there is a file of the model for each of so many ranks."""
    gone = [rank for rank in range(ranks) if rank not in files.model]
    if gone:
        raise CheckpointError(
            f"{files.folder} holds a slice of every frozen parameter for each of {ranks} rank(s), but the "
            f"*_model_states.pt of rank {', '.join(map(str, gone[:_MOST_SHOWN]))} is missing. Copy every rank's file "
            f"into the folder."
        )


def _optimizer_part(path: Path) -> dict[str, Any]:
    part = load_inert(path).get("optimizer_state_dict")
    if not isinstance(part, dict):
        raise CheckpointError(f"{path} has no `optimizer_state_dict`: a ZeRO optimizer did not write it.")
    return part


def _stage(part: Mapping[str, Any]) -> int:
    """1, 2 or 3. DeepSpeed's BF16_Optimizer, which serves stage 1, does not say."""
    stage = part.get("zero_stage", 1)
    if isinstance(stage, Inert) and stage.arguments:
        stage = stage.arguments[0]
    if stage not in (1, 2, 3):
        raise CheckpointError(f"The checkpoint says that it is of ZeRO stage {stage!r}, which is not known.")
    return int(stage)


def _precision(module: Mapping[str, Any]) -> str:
    dtypes = {value.dtype for value in module.values() if torch.is_tensor(value)}
    return next((name for dtype, name in _HALF.items() if dtype in dtypes), "fp32")


def _whole_number(state: Mapping[str, Any], key: str, files: NativeFiles) -> int:
    value = state.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _TOO_LARGE:
        shown = repr(value)[:40]
        raise CheckpointError(f"{files.folder}: {key} is {shown}, which counts nothing. DeepSpeed did not write this.")
    return value


def _add_tied(tensors: dict[str, torch.Tensor], shared: Any) -> None:
    """Under ZeRO a tied parameter is kept under its first name; `shared` has the others."""
    for alias, name in shared.items() if isinstance(shared, dict) else ():
        for key in ("master", *MOMENTS):
            if f"{key}/{name}" in tensors:
                tensors[f"{key}/{alias}"] = tensors[f"{key}/{name}"]


def _names_in_groups(
    weights: Mapping[str, torch.Tensor], wrapper: Mapping[str, Any], own: Any, groups: list[dict[str, Any]]
) -> list[list[str]] | None:
    given = [list(group.get("param_names") or ()) for group in groups]
    if all(given) and all(name in weights for names in given for name in names):
        return given
    flats, apart = wrapper.get("fp32_groups_flat"), wrapper.get("fp32_groups")
    if isinstance(flats, list) and all(map(torch.is_tensor, flats)):
        return deal(weights, [Flat(flat) for flat in flats])
    slots = []
    for index, group in enumerate(groups):
        members = []
        for place, number in enumerate(group["params"]):
            master = apart[index][place] if isinstance(apart, list) else None
            moment = master if master is not None else own["state"].get(number, {}).get("exp_avg")
            members.append(Slot(None if moment is None else tuple(moment.shape), master))
        slots.append(Slots(tuple(members)))
    return deal(weights, slots)


def _take(
    tensors: dict[str, torch.Tensor], weights: Mapping[str, torch.Tensor], wrapper: Mapping[str, Any], own: Any,
    groups: list[dict[str, Any]], names: list[list[str]],
) -> None:  # fmt: skip
    """Masters and moments under their names, those of a fused optimizer cut out of its flat groups."""
    flats, apart = wrapper.get("fp32_groups_flat"), wrapper.get("fp32_groups")
    for index, (group, own_names) in enumerate(zip(groups, names, strict=True)):
        states = [own["state"].get(number, {}) for number in group["params"]]
        if isinstance(flats, list):
            sizes = [weights[name].numel() for name in own_names]
            whole = {"master": flats[index]} | _moments(states[0])
            pieces = {key: tensor[: sum(sizes)].split(sizes) for key, tensor in whole.items()}
        else:
            pieces = {}
        for place, name in enumerate(own_names):
            values = {key: split[place] for key, split in pieces.items()}
            if isinstance(apart, list):
                values["master"] = apart[index][place]
            if not isinstance(flats, list):
                values |= _moments(states[place])
            for key, value in values.items():
                tensors[f"{key}/{name}"] = in_fp32(value, f"{key}/{name}").view(weights[name].shape)


def _moments(own: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return both of Adam's moments or none: other optimizers use one of the names for something else."""
    return {key: own[key] for key in MOMENTS} if all(torch.is_tensor(own.get(key)) for key in MOMENTS) else {}
