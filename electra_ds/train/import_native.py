"""A run that goes on from a native DeepSpeed checkpoint, whoever wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from electra_ds.config.manifest import RunDirectory
from electra_ds.config.recipe import OptimizerSection
from electra_ds.data.token_store import TokenStore
from electra_ds.engine.native import MOMENTS, NativeCheckpoint, NativeFiles
from electra_ds.errors import CheckpointError, ConfigError
from electra_ds.model.electra import Electra
from electra_ds.model.names import find_naming, own_tensors
from electra_ds.train.adopt import begin_with
from electra_ds.train.launch import recorded_store
from electra_ds.train.pretrain import PretrainJob


def folder_of_export(files: NativeFiles) -> Path | None:
    """Where our own export put recipe, record and state beside the checkpoint, if it did."""
    places = (files.folder, files.folder.parent)
    return next((folder for folder in places if (folder / "recipe.yaml").is_file()), None)


def store_of_export(folder: Path) -> TokenStore:
    """The token store of the run that was exported. Raises DataError where it is another by now."""
    return recorded_store(RunDirectory(folder).read_record(), folder)


def import_native(native: NativeCheckpoint, job: PretrainJob, export: Path | None) -> str:
    """Write the run with one checkpoint of what was read; returns what came in, and the next command.

    For the one process that holds the run. export: what `folder_of_export` found. Raises CheckpointError where the
    checkpoint does not fit the job, ConfigError where the recipe's schedule has ended by then.
    """
    if native.step > job.recipe.schedule.total_steps:
        raise ConfigError(
            f"{native.folder} is of step {native.step}, beyond schedule.total_steps "
            f"{job.recipe.schedule.total_steps}. Give the recipe that it was trained by."
        )
    tokenizer = job.store.tokenizer
    model = Electra(job.recipe, tokenizer.vocab_size, tokenizer.pad_id)
    tensors, found_moments, naming = _own(native, model)
    state = _state_of_export(export, native.step)
    counters: Mapping[str, float] = native.counters if state is None else state["optimizer"]
    if not found_moments:
        counters = {**counters, "taken_steps": 0.0}
    if state is None:
        tokens = native.step * job.recipe.global_batch_size * job.recipe.data.sequence_length
        seen = f"{tokens:,}, estimated as steps x global batch x sequence length"
    else:
        tokens, seen = state["tokens"], f"{state['tokens']:,}"
    job = replace(job, record=replace(job.record, initialised_from=[str(native.folder.resolve())]))
    path = begin_with(job, tensors, step=native.step, tokens=tokens, counters=counters)
    names = list(model.named_parameters())
    if not found_moments:
        moments = "none, so AdamW's begin at zero"
    elif found_moments == len(names):
        moments = "both of AdamW's, whole"
    else:
        moments = f"of {found_moments} tensors; the others' begin at zero, as no gradient had reached them"
    skipped = f", {int(counters['skipped_steps'])} of them skipped" if counters["skipped_steps"] else ""
    scale = f", loss scale {counters['loss_scale']:g}" if counters["is_scaled"] else ""
    lines = [
        f"read {native.folder}: ZeRO stage {native.stage}, {native.precision}, {native.ranks} rank(s)",
        f"  names    those of {naming}",
        f"  step     {native.step:,}{skipped}{scale}",
        f"  tokens   {seen}",
        f"  weights  {len(names)} tensors, {sum(parameter.numel() for _, parameter in names):,} parameters",
        f"  moments  {moments}",
        *(f"Note: {note}." for note in (*native.notes, *_differences(native, job.recipe.optimizer))),
        f"wrote {path}",
        f"Go on with: bin/pretrain --resume {job.run.path}",
    ]
    return "\n".join(lines)


def _own(native: NativeCheckpoint, model: Electra) -> tuple[dict[str, torch.Tensor], int, str]:
    """(tensors of a portable checkpoint, how many parameters have moments, whose names the file has)."""
    weights = {name.removeprefix("master/"): t for name, t in native.tensors.items() if name.startswith("master/")}
    naming = find_naming(weights)
    tensors = {f"master/{name}": tensor for name, tensor in own_tensors(naming, weights, model).items()}
    has_moments = {
        name: torch.full_like(weight, all(f"{key}/{name}" in native.tensors for key in MOMENTS))
        for name, weight in weights.items()
    }
    found = sum(bool(mask.any()) for mask in own_tensors(naming, has_moments, model).values())
    for key in MOMENTS:
        moments = {
            name: native.tensors.get(f"{key}/{name}", torch.zeros_like(weight)) for name, weight in weights.items()
        }
        for name, tensor in own_tensors(naming, moments, model).items():
            if key == "exp_avg_sq" and (tensor < 0).any():
                raise CheckpointError(f"{native.folder}: exp_avg_sq of {name} is below 0. The file is damaged.")
            tensors[f"{key}/{name}"] = tensor
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, found, str(naming)


def _state_of_export(folder: Path | None, step: int) -> dict[str, Any] | None:
    """state.json of our export, as long as nobody has trained on in its folder."""
    if folder is None or not (folder / "state.json").is_file():
        return None
    try:
        state = json.loads((folder / "state.json").read_text("utf8"))
        is_of_step = state["step"] == step
        int(state["tokens"]), dict(state["optimizer"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'state.json'} cannot be read: {error!r}. Delete it to do without.") from error
    return state if is_of_step else None


def _differences(native: NativeCheckpoint, section: OptimizerSection) -> list[str]:
    """Where the run will go on otherwise than the checkpoint's optimizer would."""
    notes = []
    for key, ours in (("betas", (section.beta1, section.beta2)), ("eps", section.epsilon)):
        theirs = native.adam.get(key)
        theirs = tuple(theirs) if isinstance(theirs, list) else theirs
        if theirs is not None and theirs != ours:
            notes.append(f"its optimizer had {key} {theirs}, and the recipe has {ours}")
    if native.adam and native.corrects_bias != section.bias_correction:
        did, does = ("did", "does not") if native.corrects_bias else ("did not", "does")
        notes.append(f"its optimizer {did} correct Adam's bias, and the recipe's {does}")
    return notes
