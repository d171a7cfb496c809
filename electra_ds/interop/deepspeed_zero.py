"""The flat groups of ZeRO's optimizers, put together from every rank's part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from electra_ds.core.errors import CheckpointError
from electra_ds.interop.deepspeed_pickle import Inert
from electra_ds.training.optimizer import MOMENTS

_Shapes = dict[str, tuple[int, ...]]
_Group = dict[str, torch.Tensor]
"""One rank's part of a group: flat tensors by kind, `master` and perhaps `exp_avg`, `exp_avg_sq`."""


def partitioned_tensors(
    folder: Path, state: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]
) -> dict[str, torch.Tensor]:
    """Return tensors by `KIND/NAME` of stages 1 and 2; moments of those groups alone that have both of Adam's.

    state: the model's file; parts: each rank's optimizer. A group is one flat tensor, cut into a part for each rank;
    a rank's `param_slice_mappings` says where in its part which parameter's piece lies, and pieces follow each other
    in the order of ranks. Without them, as older versions write, parameters lie in the order of `param_shapes`.
    Raises CheckpointError if a part is missing or the sizes contradict each other.
    """
    shapes = [_shapes(folder, group) for group in state["param_shapes"]]
    groups = _all_groups(folder, parts, "single_partition_of_fp32_groups", "base_optimizer_state")
    if any(len(own) != len(shapes) for own in groups):
        raise _unknown(folder, f"{len(shapes)} groups of parameters, but {[len(own) for own in groups]} of masters")
    pieces: dict[str, dict[str, list[torch.Tensor]]] = {}
    for part, own in zip(parts, groups, strict=True):
        mappings = part.get("param_slice_mappings")
        if mappings is None:
            return _in_order(folder, shapes, groups, parts[0].get("param_alignment_paddings"))
        for group, mapping in zip(own, mappings, strict=True):
            for name, address in mapping.items():
                start, size = _address(folder, name, address)
                for kind, flat in group.items():
                    if start + size > flat.numel():
                        raise _unknown(folder, f"{name} ends at {start + size} in a {kind} part of {flat.numel()}")
                    pieces.setdefault(name, {}).setdefault(kind, []).append(flat[start : start + size])
    flat_pieces = {name: {kind: torch.cat(cut) for kind, cut in kinds.items()} for name, kinds in pieces.items()}
    return _shaped(folder, {name: shape for group in shapes for name, shape in group.items()}, flat_pieces)


def _in_order(
    folder: Path, shapes: Sequence[_Shapes], ranks: Sequence[Sequence[_Group]], paddings: Any
) -> dict[str, torch.Tensor]:
    """The same where nothing says where which parameter lies: one after the other, as `param_shapes` lists them."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for index, group_shapes in enumerate(shapes):
        kinds = ranks[0][index]
        whole = {kind: torch.cat([own[index][kind] for own in ranks]) for kind in kinds}
        offset = 0
        for place, (name, shape) in enumerate(group_shapes.items()):
            size = math.prod(shape)
            found[name] = {kind: flat[offset : offset + size] for kind, flat in whole.items()}
            offset += size + (paddings[index][place] if paddings is not None else 0)
    return _shaped(folder, {name: shape for group in shapes for name, shape in group.items()}, found)


def shared_out_tensors(
    folder: Path, state: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]
) -> dict[str, torch.Tensor]:
    """The same of stage 3: every parameter is cut into equal slices, one for each rank, the last padded.

    A rank's slices lie one after the other in the order of `param_shapes`, through all its groups; the moments lie as
    the masters do. Raises CheckpointError as above.
    """
    shapes = {name: shape for group in state["param_shapes"] for name, shape in _shapes(folder, group).items()}
    ranks = []
    for groups in _all_groups(folder, parts, "fp32_flat_groups", "optimizer_state_dict"):
        kinds = set.intersection(*map(set, groups)) if groups else set()
        ranks.append({kind: torch.cat([group[kind] for group in groups]) for kind in kinds})
    found: dict[str, dict[str, torch.Tensor]] = {}
    offset = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        slice_size = -(-size // len(parts))
        found[name] = {
            kind: torch.cat([own[kind][offset : offset + slice_size] for own in ranks])[:size] for kind in ranks[0]
        }
        offset += slice_size
    for rank, own in enumerate(ranks):
        if own["master"].numel() != offset:
            raise _unknown(folder, f"rank {rank} holds {own['master'].numel()} elements, and the shapes need {offset}")
    return _shaped(folder, shapes, found)


def sliced(folder: Path, name: str, shape: Any, slices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the parameter of which every rank has a slice at stage 3, the last padded. Raises CheckpointError as
    above."""
    shape = tuple(shape)
    flat = torch.cat([own.flatten() for own in slices])[: math.prod(shape)]
    return _shaped(folder, {name: shape}, {name: {"master": flat}})[f"master/{name}"]


def in_fp32(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Raises CheckpointError for complex numbers, of which torch would take the real parts with no more than a
    warning."""
    if tensor.is_complex():
        raise CheckpointError(f"{name} is of {tensor.dtype}, and ELECTRA has no complex numbers.")
    return tensor.detach().float()


def _all_groups(
    folder: Path, parts: Sequence[Mapping[str, Any]], masters_key: str, state_key: str
) -> list[list[_Group]]:
    """Every rank's groups."""
    ranks = [_rank_groups(folder, part, masters_key, state_key) for part in parts]
    if len({tuple(frozenset(group) for group in own) for own in ranks}) > 1:
        raise _unknown(folder, "moments on some ranks only")
    return ranks


def _rank_groups(folder: Path, part: Mapping[str, Any], masters_key: str, state_key: str) -> list[_Group]:
    """Return the groups of one rank, with moments if a group has both of Adam's."""
    masters = part.get(masters_key)
    masters = [masters] if torch.is_tensor(masters) else masters
    if not isinstance(masters, list) or not all(map(torch.is_tensor, masters)):
        raise _unknown(folder, f"an optimizer without {masters_key}")
    own = part.get(state_key)
    states = own if isinstance(own, list) else own.get("state", {}) if isinstance(own, dict) else {}
    by_number = dict(enumerate(states)) if isinstance(states, list) else states  # a list in elastic checkpoints
    groups: list[_Group] = [{"master": in_fp32(flat, f"{folder}: {masters_key}")} for flat in masters]
    for index, group in enumerate(groups):
        moments = by_number.get(index, {})
        for kind in MOMENTS if all(torch.is_tensor(moments.get(kind)) for kind in MOMENTS) else ():
            if moments[kind].numel() < group["master"].numel():
                raise _unknown(folder, f"{kind} of {moments[kind].numel()} for {group['master'].numel()} masters")
            group[kind] = in_fp32(moments[kind], f"{folder}: {kind}").flatten()[: group["master"].numel()]
    return groups


def _shapes(folder: Path, group: Any) -> _Shapes:
    if not isinstance(group, dict):
        raise _unknown(folder, "param_shapes that are not by name")
    return {str(name): tuple(shape) for name, shape in group.items()}


def _address(folder: Path, name: str, address: Any) -> tuple[int, int]:
    """(start, size) of a piece, of DeepSpeed's `fragment_address`."""
    values = address.attributes if isinstance(address, Inert) else {}
    start, size = values.get("start"), values.get("numel")
    if not isinstance(start, int) or not isinstance(size, int) or start < 0 or size < 0:
        raise _unknown(folder, f"no place for {name} in param_slice_mappings")
    return start, size


def _shaped(folder: Path, shapes: _Shapes, found: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        kinds = found.get(name, {})
        for kind in ("master", *kinds):
            size = kinds[kind].numel() if kind in kinds else 0
            if size != math.prod(shape):
                raise CheckpointError(
                    f"{folder}: of {kind}/{name}, which has {math.prod(shape)} elements, the ranks' files hold {size}. "
                    f"Are they all of one save?"
                )
            tensors[f"{kind}/{name}"] = kinds[kind].view(shape)
    return tensors


def _unknown(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{folder} has {what}. This layout is not known; DeepSpeed 0.19.8's is.")
