"""Reads what DeepSpeed's `save_checkpoint` wrote, at every stage, precision and number of ranks: tensors by name.

    FOLDER/latest                                          a tag, such as global_step40
    FOLDER/TAG/mp_rank_00_model_states.pt                  stages 0 to 2: weights by name, counters; at stage 0 the
                                                           optimizer too, without names
    FOLDER/TAG/zero_pp_rank_R_mp_rank_00_model_states.pt   stage 3: names and shapes
    FOLDER/TAG/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt   stages 1 to 3: rank R's part of masters and moments,
                                                           flat, group after group

The layouts are those of DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py, runtime/fp16/, runtime/
bf16_optimizer.py). Nothing is unpickled beyond torch's safe list, see native_pickle.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from electra_ds.engine.native_deal import Flat, Slot, Slots, deal
from electra_ds.engine.native_pickle import Inert, load_inert
from electra_ds.engine.native_zero import in_fp32, partitioned_tensors, shared_out_tensors
from electra_ds.engine.optimizer import MOMENTS, STEP_WITHOUT_CORRECTION
from electra_ds.errors import CheckpointError

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

    def all(self) -> list[Path]:
        return [*self.model.values(), *self.optimizer.values()]


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


def find_files(path: Path) -> NativeFiles:
    """The files of the folder that holds `latest`, or of a tag folder.

    Raises CheckpointError where there is no such checkpoint, or it is of model or pipeline parallelism or experts.
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
        raise CheckpointError(
            f"{folder} holds no *_model_states.pt. Give the folder that DeepSpeed's save_checkpoint wrote, with the "
            f"file `latest`, or one of its tag folders such as global_step40."
        )
    return NativeFiles(folder, model, optimizer)


def _tag_folder(path: Path) -> Path:
    latest = path / "latest"
    if latest.is_file():
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
        raise CheckpointError(f"There is no folder {path}.")
    if (path / "latest_universal").is_file() or (path / "zero").is_dir():
        raise CheckpointError(
            f"{path} is a universal checkpoint of DeepSpeed's. Give the one that it was made from, which has `latest`."
        )
    return path


def read_native(files: NativeFiles) -> NativeCheckpoint:
    """Read a whole checkpoint. Raises CheckpointError that names what is missing, damaged or not understood."""
    try:
        return _read(files)
    except OSError as error:
        raise CheckpointError(f"{files.folder} cannot be read: {error}.") from error
    except (
        KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError, OverflowError, RecursionError
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"{files.folder} is not laid out as DeepSpeed 0.19.8 lays out a checkpoint "
            f"({type(error).__name__}: {error})."
        ) from error


def _read(files: NativeFiles) -> NativeCheckpoint:
    state = load_inert(files.model[min(files.model)])
    if not isinstance(state.get("module"), dict):
        raise CheckpointError(f"{files.model[min(files.model)]} has no `module`: DeepSpeed's engine did not write it.")
    ranks = _whole_number(state, "dp_world_size", files)
    is_partitioned = state.get("param_shapes") is not None
    _check_ranks(files, ranks if is_partitioned else 0)
    if is_partitioned:
        parts = {rank: _optimizer_part(path) for rank, path in sorted(files.optimizer.items())}
        stage = _stage(parts[0])
        gather = shared_out_tensors if stage == 3 else partitioned_tensors
        tensors, notes = gather(files.folder, state, list(parts.values()))
        own = parts[0].get("optimizer_state_dict" if stage == 3 else "base_optimizer_state")
        scaler = parts[0].get("loss_scaler")
        scaling = scaler.attributes if isinstance(scaler, Inert) else {}
        _add_tied(tensors, state.get("shared_params"))
    else:
        stage = 0
        optimizer = state.get("optimizer")
        scaling = optimizer if isinstance(optimizer, dict) else {}
        own = scaling.get("optimizer_state_dict", optimizer)
        tensors, notes = _named_by_dealing(state, scaling, own)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{files.folder}: {name} is not finite. Take a checkpoint from before.")
    step, skipped = _whole_number(state, "global_steps", files), _whole_number(state, "skipped_steps", files)
    adam_step = _adam_step(own)
    corrects = adam_step is None or adam_step < STEP_WITHOUT_CORRECTION
    precision = _precision(state["module"])
    counters = _loss_scale(scaling, precision == "fp16") | {
        "taken_steps": adam_step if adam_step is not None and corrects else float(max(0, step - skipped)),
        "skipped_steps": float(skipped),
    }
    group = next(iter(_param_groups(own)), {})
    return NativeCheckpoint(
        files.folder, stage, precision, ranks, step, tensors, counters, group, corrects, tuple(notes)
    )


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


def _named_by_dealing(
    state: Mapping[str, Any], wrapper: Mapping[str, Any], own: Any
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Stage 0: the weights have names, masters and moments get them from native_deal, or from the groups."""
    buffers = state.get("buffer_names") or ()
    module = {name: tensor for name, tensor in state["module"].items() if torch.is_tensor(tensor)}
    weights: dict[str, torch.Tensor] = {}
    first_names: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in module.items():
        if name in buffers:
            continue
        identity = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        first = first_names.setdefault(identity, name)
        if first == name:
            weights[name] = tensor
        else:
            aliases[name] = first
    tensors = {f"master/{name}": in_fp32(weight, name) for name, weight in weights.items()}
    groups = _param_groups(own)
    notes = []
    if not groups:
        notes.append("it holds no optimizer")
    else:
        names = _names_in_groups(weights, wrapper, own, groups)
        if names is None:
            notes.append(
                "its optimizer does not say which of its tensors belongs to which parameter, and the shapes allow "
                "several ways or none"
            )
        else:
            _take(tensors, weights, wrapper, own, groups, names)
    _add_tied(tensors, aliases)
    return tensors, notes


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
            whole = {"master": flats[index]} | {key: states[0][key] for key in MOMENTS if key in states[0]}
            pieces = {key: tensor[: sum(sizes)].split(sizes) for key, tensor in whole.items()}
        else:
            pieces = {}
        for place, name in enumerate(own_names):
            values = {key: split[place] for key, split in pieces.items()}
            if isinstance(apart, list):
                values["master"] = apart[index][place]
            if not isinstance(flats, list):
                values |= {key: states[place][key] for key in MOMENTS if key in states[place]}
            for key, value in values.items():
                tensors[f"{key}/{name}"] = in_fp32(value, f"{key}/{name}").view(weights[name].shape)


def _param_groups(own: Any) -> list[dict[str, Any]]:
    groups = own.get("param_groups") if isinstance(own, dict) else None
    return [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []


def _adam_step(own: Any) -> float | None:
    """Adam's own count of updates, the largest of those that its state and groups hold."""
    states = own if isinstance(own, list) else list(own.get("state", {}).values()) if isinstance(own, dict) else []
    found = [state.get("step") for state in (*states, *_param_groups(own)) if isinstance(state, dict)]
    counts = [float(step) for step in found if isinstance(step, (int, float, torch.Tensor))]
    for count in counts:
        if not math.isfinite(count) or count < 0:
            raise CheckpointError(f"Adam's own count of steps is {count}. The checkpoint is damaged.")
    return max(counts, default=None)


def _loss_scale(scaling: Mapping[str, Any], is_scaled: bool) -> dict[str, float]:
    """From a loss scaler's attributes, or what stage 0 has of them.

    DeepSpeed counts iterations from 0, and -1 stands for an overflow that never was.
    """

    def number(key: str, default: float) -> float:
        value = scaling.get(key, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if is_number and abs(value) < 2.0**127 else default

    good = number("cur_iter", 0) - number("last_overflow_iter", -1) - 1
    return {
        "consecutive_skips": 0.0,
        "is_scaled": float(is_scaled),
        "loss_scale": max(number("cur_scale", 1.0), 2.0**-24) if is_scaled else 1.0,
        "good_steps": max(0.0, good) if is_scaled else 0.0,
        "hysteresis_left": max(1.0, number("cur_hysteresis", 1.0)),
    }
