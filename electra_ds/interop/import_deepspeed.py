"""A run that continues a native DeepSpeed checkpoint, whoever wrote it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from electra_ds.config.recipe import OptimizerSection
from electra_ds.config.run_directory import RunDirectory
from electra_ds.core.errors import CheckpointError, ConfigError
from electra_ds.core.program import command
from electra_ds.data.token_store import TokenStore, recorded_store
from electra_ds.interop.deepspeed_checkpoint import NativeCheckpoint, NativeFiles
from electra_ds.interop.import_known import Known, told
from electra_ds.interop.initial_weights import write_first_checkpoint
from electra_ds.interop.names import find_naming, own_tensors
from electra_ds.pretraining.electra import Electra
from electra_ds.pretraining.pretrain import PretrainJob
from electra_ds.training.optimizer import FRESH_COUNTERS, MOMENTS

_NOTHING = Known()
_SHOWN = 3
_LARGEST = 2.0**127
"""Of the counters, which fp32 holds."""
_LEAST = {
    "taken_steps": 0.0, "skipped_steps": 0.0, "consecutive_skips": 0.0, "good_steps": 0.0, "hysteresis_left": 1.0,
}  # fmt: skip


def folder_of_export(files: NativeFiles) -> Path | None:
    """Where our own export put recipe, record and state beside the checkpoint, if it did."""
    places = (files.folder, files.folder.parent)
    return next((folder for folder in places if (folder / "recipe.yaml").is_file()), None)


def store_of_export(folder: Path) -> TokenStore:
    """The token store of the run that was exported. Raises DataError if it is another by now."""
    return recorded_store(RunDirectory(folder).read_record(), folder, None, "say where it is now with --data STORE")


def import_deepspeed(native: NativeCheckpoint, job: PretrainJob, export: Path | None, known: Known = _NOTHING) -> str:
    """Write the run with one checkpoint of what was read; returns what came in, and the next command.

    To be called by the one process that holds the run. export: what `folder_of_export` found; known: what `find_known`
    found. Raises CheckpointError if the checkpoint does not fit the job, ConfigError if the recipe's schedule
    has ended by then.
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
    names = list(model.named_parameters())
    skipped = f", {int(counters['skipped_steps'])} of them skipped" if counters["skipped_steps"] else ""
    scale = f", loss scale {counters['loss_scale']:g}" if counters["is_scaled"] else ""
    lines = [  # made before anything is written: nothing may fail once the run is there
        f"read {native.folder}: {'universal, from ' if native.is_universal else ''}ZeRO stage {native.stage}, "
        f"{native.precision}, {native.ranks} rank(s)",
        f"  names    those of {naming}",
        f"  step     {native.step:,}{skipped}{scale}",
        f"  tokens   {seen}",
        f"  weights  {len(names)} tensors, {sum(parameter.numel() for _, parameter in names):,} parameters",
        f"  moments  {_moments(found_moments, len(names))}",
        *told(job.recipe, known),
        *(f"Note: {note}." for note in (*native.notes, *_frozen(native), *_differences(native, job.recipe.optimizer))),
    ]
    path = write_first_checkpoint(job, tensors, step=native.step, tokens=tokens, counters=counters)
    return "\n".join((*lines, f"wrote {path}", f"Resume it with: {command('pretrain')} --resume {job.run.path}"))


def _moments(found: int, total: int) -> str:
    if not found:
        return "none, so AdamW's begin at zero"
    if found == total:
        return "both of AdamW's, complete"
    why = "because they were frozen or no gradient had reached them"
    return f"of {found} tensors; those of the other {total - found} begin at zero, {why}"


def _frozen(native: NativeCheckpoint) -> list[str]:
    if not native.frozen:
        return []
    names, more = native.frozen[:_SHOWN], len(native.frozen) - _SHOWN
    return [
        f"{len(native.frozen)} of its tensors were not trained and are trained from here on: {', '.join(names)}"
        f"{f' and {more} more' if more > 0 else ''}"
    ]


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
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / 'state.json'} cannot be read: {error}. Delete it to do without.") from error
    problem = _problem_of_state(state)
    if problem:
        raise CheckpointError(
            f"{folder / 'state.json'} is not what an export of ours holds: {problem}. Delete it to do without."
        )
    if state["step"] != step:
        return None
    return dict(state, optimizer={name: float(value) for name, value in state["optimizer"].items()})


def _problem_of_state(state: Any) -> str:
    """Return what keeps a run from continuing with it; empty where nothing does."""
    if not isinstance(state, dict):
        return "it is no object"
    for key in ("step", "tokens"):
        value = state.get(key)
        if type(value) is not int or not 0 <= value < 2**63:  # True is an int too
            return f"{key} is {repr(value)[:40]}"
    counters = state.get("optimizer")
    if not isinstance(counters, dict):
        return "optimizer is no object"
    if counters.keys() != FRESH_COUNTERS.keys():
        wrong = sorted(map(repr, counters.keys() ^ FRESH_COUNTERS.keys()))
        return f"optimizer lacks or knows not {', '.join(wrong)[:80]}"
    for name, value in counters.items():
        # The bound holds off infinities and NaN, with which every comparison is false.
        is_number = type(value) in (int, float) and abs(value) < _LARGEST
        if not is_number or value < _LEAST.get(name, value) or (name == "loss_scale" and value <= 0):
            return f"optimizer's {name} is {repr(value)[:40]}"
    return ""


def _differences(native: NativeCheckpoint, section: OptimizerSection) -> list[str]:
    """Return where the run will continue otherwise than the checkpoint's optimizer would."""
    notes = []
    for key, ours in (("betas", (section.beta1, section.beta2)), ("eps", section.epsilon)):
        theirs = _numbers(native.adam.get(key))
        own = _numbers(ours)
        if theirs is None and native.adam.get(key) is not None:
            notes.append(f"its optimizer had {key} that are not known, and the recipe has {ours}")
        elif theirs and own and (len(theirs) != len(own) or not all(map(_is_same, theirs, own))):
            shown = theirs[0] if isinstance(ours, float) and len(theirs) == 1 else theirs
            notes.append(f"its optimizer had {key} {shown}, and the recipe has {ours}")
    if native.adam and native.corrects_bias != section.bias_correction:
        did, does = ("did", "does not") if native.corrects_bias else ("did not", "does")
        notes.append(f"its optimizer {did} correct Adam's bias, and the recipe's {does}")
    return notes


def _numbers(value: Any) -> tuple[float, ...] | None:
    """One number or two, in Python's or torch's form; None for anything else."""
    if torch.is_tensor(value):
        value = value.tolist() if value.numel() <= 2 else None
    values = value if isinstance(value, (list, tuple)) else [value]
    values = [one.item() if torch.is_tensor(one) and one.numel() == 1 else one for one in values]
    is_plain = 0 < len(values) <= 2 and all(type(one) in (int, float) and abs(one) < _LARGEST for one in values)
    return tuple(map(float, values)) if is_plain else None


def _is_same(theirs: float, ours: float) -> bool:
    """Whether they agree as far as fp32 tells, in which a tensor may have them."""
    return math.isclose(theirs, ours, rel_tol=1e-6)
