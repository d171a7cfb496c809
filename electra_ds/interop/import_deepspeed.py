"""Make a run that continues any DeepSpeed checkpoint of an ELECTRA.

Its tensors have the names of our joint module, or those of a joint module of transformers' two. They are renamed to
those of one `Electra`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from electra_ds.config.run_directory import RunDirectory
from electra_ds.config.sections import OptimizerSection
from electra_ds.core.errors import CheckpointError, ConfigError
from electra_ds.core.program import command
from electra_ds.data.token_store import TokenStore, recorded_store
from electra_ds.interop.deepspeed_checkpoint import DeepSpeedCheckpoint
from electra_ds.interop.deepspeed_files import DeepSpeedFiles
from electra_ds.interop.init_from import write_first_checkpoint
from electra_ds.interop.pretrained import KnownSizes, summary_of_sizes
from electra_ds.pretraining.convert import (
    discriminator_tensors,
    from_discriminator_tensors,
    from_generator_tensors,
    generator_tensors,
)
from electra_ds.pretraining.electra import Electra
from electra_ds.pretraining.pretrain import PretrainJob
from electra_ds.training.optimizer import FRESH_COUNTERS, MOMENTS

_NOTHING = KnownSizes()
_OWN_MARK = "discriminator_head.dense.weight"
_GENERATOR_MARK, _DISCRIMINATOR_MARK = "generator_predictions.dense.weight", "discriminator_predictions.dense.weight"
_TABLE, _DECODER = "electra.embeddings.word_embeddings.weight", "generator_lm_head.weight"
_SHOWN = 5


def folder_of_export(files: DeepSpeedFiles) -> Path | None:
    """Return the folder with the recipe, record and state of our own export, or None if another program wrote it."""
    places = (files.folder, files.folder.parent)
    return next((folder for folder in places if (folder / "recipe.yaml").is_file()), None)


def store_of_export(folder: Path) -> TokenStore:
    """Return the token store of the exported run. Raises DataError if it has changed since."""
    return recorded_store(RunDirectory(folder).read_record(), folder, None, "say where it is now with --data STORE")


def import_deepspeed(
    checkpoint: DeepSpeedCheckpoint, job: PretrainJob, export: Path | None, known: KnownSizes = _NOTHING
) -> str:
    """Write a run whose one checkpoint is the one that was read, and return a summary with the next command.

    Call it in the one process that holds the run. export: the result of `folder_of_export`. known: the result of
    `find_sizes`. Raises CheckpointError if the checkpoint does not fit the job, and ConfigError if the recipe's
    schedule ends before the checkpoint's step.
    """
    folder = checkpoint.files.folder
    if checkpoint.step > job.recipe.schedule.total_steps:
        raise ConfigError(
            f"{folder} is at step {checkpoint.step}, beyond schedule.total_steps {job.recipe.schedule.total_steps}. "
            f"Give the recipe that it was trained with."
        )
    tokenizer = job.store.tokenizer
    model = Electra(job.recipe, tokenizer.vocab_size, tokenizer.pad_id)
    tensors, with_moments, naming = _own(checkpoint, model)
    state = _state_of_export(export, checkpoint.step)
    counters: Mapping[str, float] = checkpoint.counters if state is None else state["optimizer"]
    if not with_moments:
        counters = {**counters, "taken_steps": 0.0}
    if state is None:
        tokens = checkpoint.step * job.recipe.global_batch_size * job.recipe.data.sequence_length
        seen = f"{tokens:,}, estimated as steps x global batch x sequence length"
    else:
        tokens, seen = state["tokens"], f"{state['tokens']:,}"
    job = replace(job, record=replace(job.record, initialised_from=[str(folder.resolve())]))
    names = list(model.named_parameters())
    skipped = f", {int(counters['skipped_steps'])} of them skipped" if counters["skipped_steps"] else ""
    scale = f", loss scale {counters['loss_scale']:g}" if counters["is_scaled"] else ""
    notes = [*checkpoint.notes, *_differences(checkpoint, job.recipe.optimizer)]
    if checkpoint.frozen:
        frozen = f"{len(checkpoint.frozen)} of its tensors were frozen and are trained from now on"
        notes.append(f"{frozen}: {_listed(checkpoint.frozen)}")
    lines = [  # made before anything is written, since nothing may fail once the run exists
        f"read {folder}: {'universal, from ' if checkpoint.files.universal else ''}ZeRO stage {checkpoint.stage}, "
        f"{checkpoint.precision}, {checkpoint.ranks} rank(s)",
        f"  names    those of {naming}",
        f"  step     {checkpoint.step:,}{skipped}{scale}",
        f"  tokens   {seen}",
        f"  weights  {len(names)} tensors, {sum(parameter.numel() for _, parameter in names):,} parameters",
        f"  moments  {_moments(with_moments, len(names))}",
        *summary_of_sizes(job.recipe, known),
        *(f"Note: {note}." for note in notes),
    ]
    path = write_first_checkpoint(job, tensors, step=checkpoint.step, tokens=tokens, counters=counters)
    return "\n".join((*lines, f"wrote {path}", f"Resume it with: {command('pretrain')} --resume {job.run.path}"))


def _moments(found: int, total: int) -> str:
    if not found:
        return "none, so AdamW's start at zero"
    if found == total:
        return "both of AdamW's, complete"
    return f"of {found} tensors; the other {total - found} were frozen or had no gradient yet, and start at zero"


def _differences(checkpoint: DeepSpeedCheckpoint, section: OptimizerSection) -> list[str]:
    """Return notes on how the run's optimizer differs from the checkpoint's. Raises ConfigError for another rule."""
    if section.rule != "adamw":
        raise ConfigError(
            f"The checkpoint has AdamW's moments, but the recipe has optimizer.rule={section.rule}. Import it with "
            f"adamw, or start a new run from its weights with --init-from."
        )
    adam = checkpoint.adam
    if not {"betas", "eps"} <= adam.keys():
        return []
    pairs = {
        "beta1": (float(adam["betas"][0]), section.beta1),
        "beta2": (float(adam["betas"][1]), section.beta2),
        "eps": (float(adam["eps"]), section.epsilon),
    }
    notes = [
        f"its optimizer had {name} {theirs:g}, but the recipe has {ours:g}"
        for name, (theirs, ours) in pairs.items()
        if not math.isclose(theirs, ours, rel_tol=1e-6)  # in fp32
    ]
    if checkpoint.corrects_bias != section.bias_correction:
        did, does = ("did", "does not") if checkpoint.corrects_bias else ("did not", "does")
        notes.append(f"its optimizer {did} correct Adam's bias, but the recipe's {does}")
    return notes


def _state_of_export(folder: Path | None, step: int) -> dict[str, Any] | None:
    """Return the state.json of our export, or None if its checkpoint was trained further in that folder."""
    if folder is None or not (folder / "state.json").is_file():
        return None
    try:
        state = json.loads((folder / "state.json").read_text("utf8"))
        counters = {name: float(state["optimizer"][name]) for name in FRESH_COUNTERS}
        return state | {"tokens": int(state["tokens"]), "optimizer": counters} if state["step"] == step else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'state.json'} is not what our export wrote ({type(error).__name__}: {error}). Delete it to do "
            f"without."
        ) from error


# --- the names of tensors


class Naming(NamedTuple):
    """The names that a file uses for the tensors of the joint model."""

    is_ours: bool
    generator: str
    """The prefix of the generator's names, or of all names if they are ours."""
    discriminator: str

    def __str__(self) -> str:
        if self.is_ours:
            return "electra_ds"
        return f"transformers ({self.generator or 'no prefix'}, {self.discriminator or 'no prefix'})"


def _find_naming(names: Iterable[str]) -> Naming:
    """Return the naming: ours under any prefix, or transformers' `ElectraForMaskedLM` and `ElectraForPreTraining` under
    any two.

    Raises CheckpointError if the names are neither of them.
    """
    names = list(names)
    own, generator, discriminator = (_prefix(names, mark) for mark in (_OWN_MARK, _GENERATOR_MARK, _DISCRIMINATOR_MARK))
    if own is not None:
        return Naming(True, own, own)
    if generator is not None and discriminator is not None:
        return Naming(False, generator, discriminator)
    if generator is not None or discriminator is not None:
        there, gone = ("generator", "discriminator") if discriminator is None else ("discriminator", "generator")
        raise CheckpointError(f"The checkpoint holds only a {there}. Continuing the training needs its {gone} too.")
    raise CheckpointError(
        f"The checkpoint's names ({_listed(names)}) are neither those of electra_ds's joint module nor those of one "
        f"of transformers' ElectraForMaskedLM and ElectraForPreTraining."
    )


def _prefix(names: Iterable[str], mark: str) -> str | None:
    return next((name.removesuffix(mark) for name in names if ("." + name).endswith("." + mark)), None)


def _own(checkpoint: DeepSpeedCheckpoint, model: Electra) -> tuple[dict[str, torch.Tensor], int, Naming]:
    """Return (tensors as in one of our checkpoints, the number of parameters with moments, the file's naming)."""
    given = checkpoint.tensors
    weights = {name.removeprefix("master/"): tensor for name, tensor in given.items() if name.startswith("master/")}
    naming = _find_naming(weights)
    tensors = {f"master/{name}": tensor for name, tensor in _renamed(naming, weights, model).items()}
    has_moments = {
        name: torch.full_like(weight, all(f"{key}/{name}" in given for key in MOMENTS))
        for name, weight in weights.items()
    }
    with_moments = sum(bool(mask.any()) for mask in _renamed(naming, has_moments, model).values())
    for key in MOMENTS:
        moments = {name: given.get(f"{key}/{name}", torch.zeros_like(weight)) for name, weight in weights.items()}
        tensors |= {f"{key}/{name}": tensor for name, tensor in _renamed(naming, moments, model).items()}
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, with_moments, naming


def _renamed(naming: Naming, tensors: Mapping[str, torch.Tensor], model: Electra) -> dict[str, torch.Tensor]:
    """Return tensors (weights, or one kind of moments) under all names of `model.named_parameters()`.

    If weights are shared in the model, the copies in the file must agree. Raises CheckpointError if a tensor is
    missing, has another size, or is not in this model.
    """
    state = model.state_dict(keep_vars=True)
    renamed, foreign = _under_our_names(naming, tensors, state)
    foreign += [name for name in renamed if name not in state]
    if foreign:
        raise CheckpointError(
            f"The checkpoint has tensors that the recipe's model lacks: {_listed(foreign)}. Is it the right recipe?"
        )
    aliases: dict[int, list[str]] = {}
    for name, parameter in state.items():
        aliases.setdefault(id(parameter), []).append(name)
    found: dict[str, torch.Tensor] = {}
    problems = []
    for name, parameter in model.named_parameters():
        copies = [renamed[alias] for alias in aliases[id(parameter)] if alias in renamed]
        if not copies:
            problems.append(f"{name} is missing")
        elif copies[0].shape != parameter.shape:
            problems.append(f"{name} is {list(copies[0].shape)}, but the recipe's is {list(parameter.shape)}")
        elif any(not torch.equal(copies[0], copy) for copy in copies[1:]):
            raise CheckpointError(
                f"The recipe shares {' and '.join(aliases[id(parameter)])}, but in the checkpoint they differ. Set the "
                f"sharing it was trained with: --set generator.sharing=none (or tokens, if it shares the token table)."
            )
        else:
            found[name] = copies[0]
    if problems:
        raise CheckpointError(
            f"The checkpoint does not fit the recipe and the tokenizer ({len(problems)} tensors): {_listed(problems)}."
        )
    return found


def _under_our_names(
    naming: Naming, tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return (tensors under our names, with aliases; names that match nothing)."""
    if naming.is_ours:
        outside = [name for name in tensors if not name.startswith(naming.generator)]
        return {name.removeprefix(naming.generator): t for name, t in tensors.items() if name not in outside}, outside
    renamed: dict[str, torch.Tensor] = {}
    known: set[str] = set()
    for prefix, theirs, convert in (
        (naming.generator, generator_tensors(state), from_generator_tensors),
        (naming.discriminator, discriminator_tensors(state), from_discriminator_tensors),
    ):
        part = {name: tensors[prefix + name] for name in theirs if prefix + name in tensors}
        if _DECODER in part and _TABLE in part and not torch.equal(part[_DECODER], part[_TABLE]):
            raise CheckpointError(
                f"{prefix}{_DECODER} and {prefix}{_TABLE} differ: the generator was trained without tied weights, "
                f"but ELECTRA's are tied."
            )
        known.update(prefix + name for name in part)
        try:
            renamed |= convert(part)
        except KeyError as error:
            raise CheckpointError(f"The checkpoint lacks {prefix}{error.args[0]}.") from error
    return renamed, [name for name in tensors if name not in known]


def _listed(words: Iterable[str]) -> str:
    words = list(words)
    rest = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + rest
