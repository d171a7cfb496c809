"""Universal checkpoints: DeepSpeed's ds_to_universal makes them from ZeRO checkpoints, for any number of ranks.

A folder for each parameter, `zero/NAME/`, holds its whole master and moments; `zero/optimizer_state.pt` has what is
common to all. Parameters that were frozen, buffers and second names of tied parameters are there in the precision of
the weights and without moments; which those are, `param_shapes` in the model's file says, as in the original.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from electra_ds.core.errors import CheckpointError
from electra_ds.interop.deepspeed_pickle import load_inert, load_inert_content
from electra_ds.interop.deepspeed_zero import in_fp32
from electra_ds.training.optimizer import MOMENTS

_FILES = {"master": "fp32.pt"} | {kind: f"{kind}.pt" for kind in MOMENTS}
_PARAMETER = "param"
"""The key of the tensor in a file that holds more than it."""


def universal_tensors(
    zero: Path, state: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    """Return (what is common to all parameters, tensors by `KIND/NAME`, the optimizer's state without its tensors).

    state: the model's file. Raises CheckpointError if a parameter's file is missing or of another size.
    """
    common = load_inert(zero / "optimizer_state.pt")
    tensors: dict[str, torch.Tensor] = {}
    states: dict[str, dict[str, Any]] = {}
    for group in state["param_shapes"]:
        for name, shape in group.items():
            folder = zero / name
            if not (folder / _FILES["master"]).is_file():
                raise CheckpointError(
                    f"{folder / _FILES['master']} is missing. Convert the checkpoint again, or copy all of it."
                )
            has_moments = all((folder / _FILES[kind]).is_file() for kind in MOMENTS)
            for kind in ("master", *(MOMENTS if has_moments else ())):
                tensors[f"{kind}/{name}"] = _tensor(folder / _FILES[kind], name, tuple(shape))
            states[name] = {kind: tensors[f"{kind}/{name}"] for kind in MOMENTS if has_moments}
            if (folder / "step.pt").is_file():
                states[name]["step"] = load_inert_content(folder / "step.pt")
    own = common.get("optimizer_state_dict")  # at stage 3 it has the count of steps
    if isinstance(own, dict):
        states |= {f"group {number}": {"step": one.get("step")} for number, one in own["state"].items()}
    return common, tensors, {"state": states, "param_groups": common.get("param_groups")}


def _tensor(path: Path, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    content = load_inert_content(path)
    tensor = content.get(_PARAMETER) if isinstance(content, dict) else content
    if not torch.is_tensor(tensor) or tensor.numel() != torch.Size(shape).numel():
        raise CheckpointError(f"{path} does not hold {name} of shape {list(shape)}. Convert the checkpoint again.")
    return in_fp32(tensor, str(path)).view(shape)
