"""Tensors by name from the files of ZeRO's optimizers: the parts of all ranks at stages 1 to 3, and universal ones.

Tensors are in fp32 on the CPU, by `KIND/NAME`, where a kind is `master` or one of Adam's moments, `exp_avg` and
`exp_avg_sq`. Functions raise CheckpointError if the ranks' files do not hold as many elements as the shapes need.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from electra_ds.core.errors import CheckpointError
from electra_ds.interop.deepspeed_files import load_dictionary, load_file
from electra_ds.training.optimizer import MOMENTS

Tensors = dict[str, torch.Tensor]
_Shapes = dict[str, tuple[int, ...]]
_FILES = {"master": "fp32.pt"} | {kind: f"{kind}.pt" for kind in MOMENTS}


def partitioned_tensors(folder: Path, state: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> Tensors:
    """Return the tensors of stages 1 and 2; moments of those groups that have both of Adam's.

    A group is one flat tensor, cut into a part for each rank. A rank's `param_slice_mappings` say which piece of its
    part belongs to which parameter, and pieces follow each other in the order of the ranks. Without them, as in files
    of older versions, parameters lie in the order of `param_shapes`.

    state: the content of the model's file. parts: the optimizer of each rank.
    """
    ranks = [_flat_groups(part, "single_partition_of_fp32_groups", "base_optimizer_state") for part in parts]
    pieces: dict[str, list[torch.Tensor]] = defaultdict(list)
    if all(part.get("param_slice_mappings") is None for part in parts):
        _add_in_order(pieces, state["param_shapes"], ranks, parts[0].get("param_alignment_paddings"))
    else:
        for part, groups in zip(parts, ranks, strict=True):
            for group, mapping in zip(groups, part["param_slice_mappings"], strict=True):
                for name, address in mapping.items():
                    start, size = address.attributes["start"], address.attributes["numel"]
                    for kind, flat in group.items():
                        pieces[f"{kind}/{name}"].append(flat[start : start + size])
    return _in_shape(folder, _shapes(state), {key: torch.cat(own) for key, own in pieces.items()})


def _add_in_order(
    pieces: dict[str, list[torch.Tensor]], shapes: Sequence[_Shapes], ranks: Sequence[Sequence[Tensors]], paddings: Any
) -> None:
    for index, group_shapes in enumerate(shapes):
        for kind in ranks[0][index]:
            flat = torch.cat([groups[index][kind] for groups in ranks])
            offset = 0
            for place, (name, shape) in enumerate(group_shapes.items()):
                size = math.prod(shape)
                pieces[f"{kind}/{name}"].append(flat[offset : offset + size])
                offset += size + (paddings[index][place] if paddings is not None else 0)


def sliced_tensors(folder: Path, state: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> Tensors:
    """Return the tensors of stage 3, at which every parameter is cut into equal slices, one for each rank, the last
    padded.

    The slices of a rank lie one after the other in the order of `param_shapes`, through all of its groups; moments lie
    as masters do.
    """
    ranks = []
    for part in parts:
        groups = _flat_groups(part, "fp32_flat_groups", "optimizer_state_dict")
        kinds = set.intersection(*map(set, groups)) if groups else set()
        ranks.append({kind: torch.cat([group[kind] for group in groups]) for kind in kinds})
    shapes = _shapes(state)
    found: Tensors = {}
    offset = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        slice_size = -(-size // len(ranks))
        for kind in ranks[0]:
            slices = [own[kind][offset : offset + slice_size] for own in ranks]
            found[f"{kind}/{name}"] = torch.cat(slices)[:size]
        offset += slice_size
    if any(own["master"].numel() != offset for own in ranks):
        raise CheckpointError(
            f"{folder}: the shapes need {offset} elements on each rank, and the ranks hold "
            f"{', '.join(str(own['master'].numel()) for own in ranks)}. Are all files of one save?"
        )
    return _in_shape(folder, shapes, found)


def frozen_tensor(folder: Path, name: str, shape: Sequence[int], slices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a parameter of which the model's file of every rank has a slice at stage 3, the last padded."""
    flat = torch.cat([part.detach().float().flatten() for part in slices])[: math.prod(shape)]
    return _in_shape(folder, {name: tuple(shape)}, {f"master/{name}": flat})[f"master/{name}"]


def _flat_groups(part: Mapping[str, Any], masters_key: str, state_key: str) -> list[Tensors]:
    """Return one rank's part of each group, by kind."""
    masters = [part[masters_key]] if torch.is_tensor(part[masters_key]) else part[masters_key]
    own = part[state_key]
    states = dict(enumerate(own)) if isinstance(own, list) else own["state"]  # a list in elastic checkpoints
    groups = []
    for index, master in enumerate(masters):
        size = master.numel()
        group = {"master": master} | moments(states.get(index, {}))
        groups.append({kind: tensor.detach().float().flatten()[:size] for kind, tensor in group.items()})
    return groups


def moments(state: Mapping[str, Any]) -> Tensors:
    """Return both of Adam's moments or none: other optimizers use one of the names for something else."""
    return {key: state[key] for key in MOMENTS} if all(torch.is_tensor(state.get(key)) for key in MOMENTS) else {}


def _shapes(state: Mapping[str, Any]) -> _Shapes:
    return {name: tuple(shape) for group in state["param_shapes"] for name, shape in group.items()}


def _in_shape(folder: Path, shapes: _Shapes, found: Tensors) -> Tensors:
    tensors: Tensors = {}
    for name, shape in shapes.items():
        for key in (f"master/{name}", *(f"{kind}/{name}" for kind in MOMENTS)):
            if key not in found and not key.startswith("master/"):
                continue
            size = found[key].numel() if key in found else 0
            if size != math.prod(shape):
                raise CheckpointError(
                    f"{folder}: {key} has {math.prod(shape)} elements, and the ranks' files hold {size} of them. Are "
                    f"all files of one save?"
                )
            tensors[key] = found[key].view(shape)
    return tensors


def universal_tensors(zero: Path, state: Mapping[str, Any]) -> tuple[dict[str, Any], Tensors, dict[str, Any]]:
    """Return (what all parameters have in common, the tensors, the optimizer's state without its tensors) of a
    universal checkpoint.

    Parameters that were frozen, buffers and second names of tied parameters are there in the precision of the weights
    and without moments. `param_shapes` in the model's file say which those are, as in the original.

    state: the content of the model's file. Raises CheckpointError if a parameter's file is missing or of another size.
    """
    common = load_dictionary(zero / "optimizer_state.pt")
    tensors: Tensors = {}
    states: dict[str, dict[str, Any]] = {}
    for name, shape in _shapes(state).items():
        folder = zero / name
        has_moments = all((folder / _FILES[kind]).is_file() for kind in MOMENTS)
        for kind in ("master", *(MOMENTS if has_moments else ())):
            tensors[f"{kind}/{name}"] = _complete_tensor(folder / _FILES[kind], name, shape)
        states[name] = {kind: tensors[f"{kind}/{name}"] for kind in MOMENTS if has_moments}
        if (folder / "step.pt").is_file():
            states[name]["step"] = load_file(folder / "step.pt")
    own = common.get("optimizer_state_dict")  # at stage 3 it has the count of steps
    if isinstance(own, dict):
        states |= {f"group {number}": {"step": one.get("step")} for number, one in own["state"].items()}
    return common, tensors, {"state": states, "param_groups": common.get("param_groups")}


def _complete_tensor(path: Path, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing. Convert the checkpoint again, or copy all of it.")
    content = load_file(path)
    tensor = content.get("param") if isinstance(content, dict) else content
    if not torch.is_tensor(tensor) or tensor.numel() != math.prod(shape):
        raise CheckpointError(f"{path} does not hold {name} of shape {list(shape)}. Convert the checkpoint again.")
    return tensor.detach().float().view(shape)
