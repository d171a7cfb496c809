"""Find the files of a DeepSpeed checkpoint, read them without running any code in them, and return the tensors of
ZeRO's optimizers by name.

DeepSpeed's `save_checkpoint` writes:

    FOLDER/latest                                          a tag, such as global_step40
    FOLDER/TAG/mp_rank_00_model_states.pt                  stages 0 to 2: weights by name, counters; at stage 0 the
                                                           optimizer too, without names
    FOLDER/TAG/zero_pp_rank_R_mp_rank_00_model_states.pt   stage 3: names and shapes
    FOLDER/TAG/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt   stages 1 to 3: rank R's part of masters and moments,
                                                           flat, group after group

Its script ds_to_universal converts them for any number of ranks:

    FOLDER/latest_universal                                a tag, such as global_step40_universal
    FOLDER/TAG/zero/NAME/fp32.pt exp_avg.pt exp_avg_sq.pt  one parameter, complete
    FOLDER/TAG/zero/optimizer_state.pt                     the state that all parameters share
    FOLDER/TAG/*_model_states.pt                           as above

The layouts are those of DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py, runtime/fp16/,
runtime/bf16_optimizer.py).
"""

from __future__ import annotations

import math
import re
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from electra_ds.core.errors import CheckpointError
from electra_ds.pretraining.convert import refuse_other_frameworks
from electra_ds.training.optimizer import MOMENTS

_MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_00_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_00_optim_states\.pt")
_OTHER_LAYOUTS = re.compile(r"layer_.*|.*expert_.*|expp_rank_.*|.*mp_rank_(?!00_).*_states\.pt")

Tensors = dict[str, torch.Tensor]
"""fp32 tensors on the CPU, by `KIND/NAME`. A kind is `master` or one of Adam's moments, `exp_avg` and `exp_avg_sq`."""
_Shapes = dict[str, tuple[int, ...]]
_FILES = {"master": "fp32.pt"} | {kind: f"{kind}.pt" for kind in MOMENTS}


class DeepSpeedFiles(NamedTuple):
    """The files of one tag, by rank."""

    folder: Path
    model: dict[int, Path]
    """One file at stages 0 to 2."""
    optimizer: dict[int, Path]
    """Empty at stage 0."""
    universal: Path | None = None
    """The folder `zero` of a universal checkpoint."""

    def check_ranks(self, kind: str, ranks: int) -> None:
        """Raise CheckpointError unless there is one file for each of `ranks` ranks. kind: `model` or `optim`."""
        found = sorted(self.model if kind == "model" else self.optimizer)
        if len(found) != ranks or found != list(range(ranks)):
            ranks_found = ", ".join(map(str, found)) or "none"
            raise CheckpointError(
                f"{self.folder} was saved by {ranks} rank(s), but it has a *_{kind}_states.pt of these ranks: "
                f"{ranks_found}. Copy the files of all ranks of this save into the folder, and move others away."
            )


def find_files(path: Path) -> DeepSpeedFiles:
    """Return the files of a checkpoint. path: the folder that holds `latest`, or a tag folder.

    Raises CheckpointError if there is no checkpoint, or if it uses model or pipeline parallelism or experts.
    """
    folder = _tag_folder(path)
    if not folder.is_dir():
        refuse_other_frameworks(folder, str(folder))
        raise CheckpointError(
            f"The folder {folder} does not exist. Give the folder with `latest`, or a tag's folder itself."
        )
    model: dict[int, Path] = {}
    optimizer: dict[int, Path] = {}
    for file in sorted(folder.iterdir()):
        if _OTHER_LAYOUTS.fullmatch(file.name):
            raise CheckpointError(
                f"{file} belongs to tensor or pipeline parallelism or to experts, which electra_ds does not support."
            )
        for pattern, found in ((_MODEL, model), (_OPTIMIZER, optimizer)):
            if match := pattern.fullmatch(file.name):
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
    return DeepSpeedFiles(folder, model, optimizer, universal if universal.is_dir() else None)


def _tag_folder(path: Path) -> Path:
    for name in ("latest", "latest_universal"):
        if (path / name).is_file():
            return path / Path((path / name).read_text("utf8", errors="replace").strip()).name
    return path


# --- reading a file


class Placeholder:
    """Stands in for an object whose class is not loaded, and holds its constructor arguments and attributes."""

    arguments: tuple[Any, ...]
    attributes: dict[str, Any]

    def __new__(cls, *arguments: Any) -> Placeholder:
        made = object.__new__(cls)
        made.arguments = arguments
        made.attributes = {}
        return made

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = state


_FILLED: dict[str, Any] = {"collections.defaultdict": lambda *_: {}, "collections.deque": lambda *_: []}
"""Containers that torch's unpickler does not know, and the known ones that replace them."""


def load_file(path: Path) -> Any:
    """Return the content of a file, with tensors on the CPU, mapped from the file.

    A `Placeholder` replaces every object whose class is not on torch's list of safe ones. DeepSpeed's files are
    pickles, which can call anything. torch's restricted unpickler calls only what is on that list, and placeholders for
    the rest, so the file cannot choose code to run: DeepSpeed's loss scaler and the objects that a script saved with
    its state (argparse.Namespace, NumPy scalars, paths) do no harm. Raises CheckpointError if the file is damaged, or
    if it names functions of os or sys, which torch always refuses.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (changed := archive.testzip()) is not None:  # torch does not verify checksums
                raise zipfile.BadZipFile(f"{changed} in it has changed since it was saved")
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        # A separate class for each name: torch's unpickler looks objects up by their class.
        classes: list[Any] = [(_FILLED.get(name) or type("Placeholder", (Placeholder,), {}), name) for name in names]
        with torch.serialization.safe_globals(classes):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a pickle can raise anything
        reason = str(error)
        if reason.startswith("Weights only load failed"):  # the rest advises loading the file without restriction
            reason = reason.partition("\n\n")[2].strip()
        reason = (reason.splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CheckpointError(
            f"{path} cannot be read: {reason}. It is missing, damaged, or was not "
            f"written only by DeepSpeed 0.19.8. Copy it again from where it was saved."
        ) from error


# --- the tensors of ZeRO's optimizers
#
# These functions raise CheckpointError if the ranks' files hold fewer or more elements than the shapes need.


def partitioned_tensors(folder: Path, state: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> Tensors:
    """Return the tensors of stages 1 and 2, with moments for the groups that have both of Adam's.

    A group is one flat tensor, cut into one part per rank. A rank's `param_slice_mappings` say which piece of its part
    belongs to which parameter. Pieces follow each other in the order of the ranks.

    state: the content of the model's file. parts: the optimizer of each rank.
    """
    ranks = [_flat_groups(part, "single_partition_of_fp32_groups", "base_optimizer_state") for part in parts]
    pieces: dict[str, list[torch.Tensor]] = defaultdict(list)
    for part, groups in zip(parts, ranks, strict=True):
        for group, mapping in zip(groups, part["param_slice_mappings"], strict=True):
            for name, address in mapping.items():
                start, size = address.attributes["start"], address.attributes["numel"]
                for kind, flat in group.items():
                    pieces[f"{kind}/{name}"].append(flat[start : start + size])
    return _in_shape(folder, _shapes(state), {key: torch.cat(own) for key, own in pieces.items()})


def sliced_tensors(folder: Path, state: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> Tensors:
    """Return the tensors of stage 3, which cuts every parameter into equal slices, one per rank, the last padded.

    A rank's slices follow each other in the order of `param_shapes`, through all of its groups. Moments are stored like
    masters.
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
            f"{folder}: the shapes need {offset} elements on each rank, but the ranks hold "
            f"{', '.join(str(own['master'].numel()) for own in ranks)}. Are all files of one save?"
        )
    return _in_shape(folder, shapes, found)


def frozen_tensor(folder: Path, name: str, shape: Sequence[int], slices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a parameter of stage 3 from its slices in the model files of all ranks, the last of which is padded."""
    flat = torch.cat([part.detach().float().flatten() for part in slices])[: math.prod(shape)]
    return _in_shape(folder, {name: tuple(shape)}, {f"master/{name}": flat})[f"master/{name}"]


def _flat_groups(part: Mapping[str, Any], masters_key: str, state_key: str) -> list[Tensors]:
    """Return one rank's part of each group, by kind."""
    masters = [part[masters_key]] if torch.is_tensor(part[masters_key]) else part[masters_key]
    states = part[state_key]["state"]
    groups = []
    for index, master in enumerate(masters):
        size = master.numel()
        group = {"master": master} | moments(states.get(index, {}))
        groups.append({kind: tensor.detach().float().flatten()[:size] for kind, tensor in group.items()})
    return groups


def moments(state: Mapping[str, Any]) -> Tensors:
    """Return both of Adam's moments or neither, since other optimizers use one of the names for something else."""
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
                    f"{folder}: {key} has {math.prod(shape)} elements, but the ranks' files hold {size} of them. Are "
                    f"all files of one save?"
                )
            tensors[key] = found[key].view(shape)
    return tensors


def universal_tensors(zero: Path, state: Mapping[str, Any]) -> tuple[dict[str, Any], Tensors, dict[str, Any]]:
    """Return (the state that all parameters share, the tensors, the optimizer's state without its tensors) of a
    universal checkpoint.

    Frozen parameters, buffers and second names of tied parameters are stored in the precision of the weights, without
    moments. `param_shapes` in the model's file shows which they are, as in the original.

    state: the content of the model's file. Raises CheckpointError if a parameter's file is missing or of another size.
    """
    common = load_file(zero / "optimizer_state.pt")
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
    own = common.get("optimizer_state_dict")  # at stage 3 it has the step count
    if isinstance(own, dict):
        states |= {f"group {number}": {"step": one.get("step")} for number, one in own["state"].items()}
    return common, tensors, {"state": states, "param_groups": common.get("param_groups")}


def _complete_tensor(path: Path, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    content = load_file(path)
    tensor = content.get("param") if isinstance(content, dict) else content
    if not torch.is_tensor(tensor) or tensor.numel() != math.prod(shape):
        raise CheckpointError(f"{path} does not hold {name} with shape {list(shape)}. Convert the checkpoint again.")
    return tensor.detach().float().view(shape)
