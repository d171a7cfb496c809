"""Begin a run with published weights: check that they fit the recipe, and write the first checkpoint.

Only such runs import this module, since transformers takes seconds to import.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from electra_ds.config.recipe import FastElectraRecipe, JointRecipe, Recipe, joint_recipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.core.errors import ConfigError, DataError
from electra_ds.core.files import is_hub_model
from electra_ds.core.program import command
from electra_ds.data.hub import fetch_model
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.interop.pretrained import (
    PARTS,
    KnownSizes,
    NetworkSizes,
    Pretrained,
    check_fit,
    most_shared,
    read_pretrained,
    read_run,
)
from electra_ds.pretraining.batches import objective_of
from electra_ds.pretraining.convert import refuse_other_frameworks
from electra_ds.pretraining.pretrain import PretrainJob
from electra_ds.training.checkpoint import CheckpointFolder
from electra_ds.training.optimizer import FRESH_COUNTERS, MOMENTS

_SHARED_PARTS = {
    "none": "",
    "tokens": ", except for the token table, which it shares with the discriminator",
    "embeddings": ", except for the embeddings, which it shares with the discriminator",
    "all": ", except for the encoder, which it shares with the discriminator",
}


@dataclass(frozen=True)
class InitialWeights:
    """The weights that a run begins with, of at least one network. They fit its recipe."""

    discriminator: Pretrained | None
    generator: Pretrained | None

    @property
    def _main(self) -> Pretrained:
        """The network whose vocabulary counts, which is that of both."""
        return self._parts()[-1]

    @property
    def names(self) -> list[str]:
        """The names for the run's record: Hub names, or full paths of folders."""
        names = (part.name if is_hub_model(part.name) else str(Path(part.name).resolve()) for part in self._parts())
        return list(dict.fromkeys(names))

    def _parts(self) -> list[Pretrained]:
        return [part for part in (self.generator, self.discriminator) if part is not None]

    def _own_tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer that came with the weights, the discriminator's first."""
        return next((part.tokenizer for part in reversed(self._parts()) if part.tokenizer is not None), None)

    def own_tokenizer(self) -> str:
        """Return the --tokenizer argument for the weights' own tokenizer. Raises ConfigError if they lack one."""
        for part in reversed(self._parts()):
            if part.tokenizer is not None or is_hub_model(part.name):
                return part.tokenizer_source
        raise ConfigError(
            f"{self._main.name} holds neither tokenizer.json nor vocab.txt. Give the tokenizer that it was "
            f"trained with: --tokenizer PATH."
        )

    def check_vocabulary(self, tokenizer: Tokenizer) -> None:
        """Raise DataError unless every id stands for the piece that its row of the token table was trained for.

        If the weights came without a tokenizer, there must be as many pieces as rows.
        """
        rows, size = self._main.vocab_size, tokenizer.vocab_size
        known = self._own_tokenizer()
        if known is not None:
            problem = _difference(known, tokenizer)
            advice = (
                f"Leave --tokenizer out to use the weights' own; to build a store for --data with it, run "
                f"{command('build-data')} --tokenizer {self.own_tokenizer()}."
            )
        else:
            problem = "" if size == rows else f"it has {size:,} pieces"
            advice = "Give the tokenizer that they were trained with."
        if not problem and size > rows:
            problem = f"it has {size:,} pieces, including those that ELECTRA needs"
        if problem:
            raise DataError(
                f"The tokenizer does not fit the weights of {self._main.name}, whose token table has {rows:,} "
                f"rows: {problem}. Rows would stand for pieces that they were not trained for. {advice}"
            )

    def notes(self, recipe: Recipe, tokenizer: Tokenizer) -> list[str]:
        """Return notes on the parts of the model that do not start from the weights."""
        notes, sharing = [], joint_recipe(recipe).sharing
        if self.generator is None:
            notes.append(f"the generator begins with random weights{_SHARED_PARTS[sharing]}")
        if self.discriminator is None and not isinstance(recipe, FastElectraRecipe):
            shared = _SHARED_PARTS[sharing].replace("discriminator", "generator")
            main = "discriminator" if _has_discriminator(recipe) else "encoder"
            notes.append(f"the {main} begins with random weights{shared}")
        if self.discriminator is not None and not self.discriminator.has_head:
            notes.append(
                f"{self.discriminator.name} is only an encoder: the discriminator's head begins with random weights"
            )
        own = self._own_tokenizer()
        if own is not None and (differing := _differing_steps(own, tokenizer)):
            notes.append(
                f"the tokenizer has the weights' pieces but another {differing}, which changes how text is split. "
                f"Unless you intend that, use theirs: leave out --tokenizer and --data, or build the store with "
                f"{command('build-data')} --tokenizer {self.own_tokenizer()}"
            )
        spare = self._main.vocab_size - tokenizer.vocab_size
        if spare:
            notes.append(f"the last {spare:,} rows of the token table have no piece and are left out")
        return notes

    def load(self, recipe: Recipe, tokenizer: Tokenizer) -> Any:
        """Return the model of the recipe's objective with these weights, and random ones for the rest."""
        objective = objective_of(recipe, tokenizer)
        model = objective.build_model()
        own = model.state_dict()
        given = {name: tensor for part in self._parts() for name, tensor in part.tensors.items()}
        taken = {name: tensor[: len(own[name])] for name, tensor in given.items() if name in own}  # no spare rows
        model.load_state_dict(taken, strict=False)
        objective.begin(model, given)
        return model

    def tensors(self, recipe: Recipe, tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
        """Return the tensors of a first checkpoint: the weights, random ones for the rest, and moments of 0."""
        tensors, model = {}, self.load(recipe, tokenizer)
        for name, parameter in model.named_parameters():
            tensors[f"master/{name}"] = parameter.detach()
            if parameter.requires_grad:
                tensors |= {f"{moment}/{name}": torch.zeros_like(parameter) for moment in MOMENTS}
        return tensors


def read_initial_weights(sources: Sequence[str], recipe: Recipe) -> InitialWeights:
    """Read the weights in one or two sources, in any order: transformers folders, runs, or models on the Hub.

    A folder may be one that bin/export made. Raises DataError if a model cannot be downloaded or used, and ConfigError
    if they are not at most one generator and one discriminator, or do not fit the recipe.
    """
    if not isinstance(recipe, JointRecipe):
        raise ConfigError(
            f"--init-from needs an objective with a generator, but the recipe {recipe.name} has the objective "
            f"{recipe.objective}."
        )
    required = recipe.required_weights
    for source in sources:
        refuse_other_frameworks(Path(source), source)
    parts = []
    for source in sources:
        is_run = RunDirectory(Path(source)).exists()
        inside = read_run(source) if is_run else [_read(name) for name in _expanded(source)]
        if required is not None and len(inside) > 1:  # what was trained with it is not meant
            inside = [part for part in inside if part.kind == required]
        parts += inside
    of_kind = {kind: [part for part in parts if part.kind == kind] for kind in PARTS}
    found = ", ".join(f"{part.name} ({part.kind})" for part in parts)
    if len(of_kind["generator"]) > 1 or len(of_kind["discriminator"]) > 1:
        raise ConfigError(f"--init-from takes at most one generator and one discriminator, but these are {found}.")
    if of_kind["discriminator"] and not _has_discriminator(recipe):
        raise ConfigError(
            f"The objective {recipe.objective} has no discriminator, but --init-from gives {found}. Give the generator "
            f"alone."
        )
    if required is not None and not of_kind[required]:
        raise ConfigError(
            f"The objective {recipe.objective} needs a {required}, a masked language model, but --init-from gives "
            f"{found}."
        )
    found_weights = InitialWeights(*(next(iter(of_kind[kind]), None) for kind in ("discriminator", "generator")))
    discriminator, generator = found_weights.discriminator, found_weights.generator
    if generator is not None and discriminator is not None:
        _check_one_vocabulary(generator, discriminator)
    known = KnownSizes(**{part.kind: NetworkSizes(part.name, part.sizes) for part in parts})
    check_fit(recipe, known, most_shared({name: tensor for part in parts for name, tensor in part.tensors.items()}))
    return found_weights


def _has_discriminator(recipe: Recipe) -> bool:
    return "discriminator" in type(recipe).model_fields


def _read(name: str) -> Pretrained:
    return read_pretrained(name, fetch_model(name) if is_hub_model(name) else Path(name))


def _expanded(source: str) -> list[str]:
    """Return the models in a folder that bin/export made, or else the source itself."""
    folder = Path(source)
    inside = [folder / part for part in (*PARTS, "masked_lm") if (folder / part / "config.json").is_file()]
    return [str(path) for path in inside] if inside and not (folder / "config.json").is_file() else [source]


def _check_one_vocabulary(generator: Pretrained, discriminator: Pretrained) -> None:
    problem = ""
    if generator.vocab_size != discriminator.vocab_size:
        problem = (
            f"{generator.vocab_size:,} rows in the first token table and {discriminator.vocab_size:,} in the second"
        )
    elif generator.tokenizer is not None and discriminator.tokenizer is not None:
        problem = _difference(discriminator.tokenizer, generator.tokenizer)
    if problem:
        raise ConfigError(
            f"{generator.name} and {discriminator.name} do not have the same vocabulary: {problem}. Give a pair that "
            f"was trained together, or the discriminator alone."
        )


def _differing_steps(theirs: Tokenizer, ours: Tokenizer) -> str:
    """Return the differing steps before the look-up of pieces, or an empty text if the tokenizers agree."""
    one, other = (json.loads(tokenizer.backend.to_str()) for tokenizer in (theirs, ours))
    return " and ".join(step for step in ("normalizer", "pre_tokenizer") if one[step] != other[step])


def _difference(expected: Tokenizer, found: Tokenizer) -> str:
    """Return the pieces in which two tokenizers differ, or an empty text if they agree."""
    theirs = expected.backend.get_vocab(with_added_tokens=True)
    ours = found.backend.get_vocab(with_added_tokens=True)
    differing = dict(theirs.items() ^ ours.items())
    if not differing:
        return ""
    piece = min(differing, key=lambda each: (differing[each], each))
    ids = [vocabulary.get(piece, "none") for vocabulary in (theirs, ours)]
    return f"{len(differing):,} pieces have other ids, such as {piece!r} with id {ids[0]} there and {ids[1]} here"


def write_first_checkpoint(
    job: PretrainJob,
    tensors: Mapping[str, torch.Tensor],
    *,
    step: int = 0,
    tokens: int = 0,
    counters: Mapping[str, float] = FRESH_COUNTERS,
) -> Path:
    """Write a run's initial weights as its first checkpoint, then its record, and return the checkpoint's path.

    Call it on the main rank, which holds the run. tensors: fp32, `master/NAME`, `exp_avg/NAME` and
    `exp_avg_sq/NAME` for every trained parameter. counters: as in `MasterAdamW.counters`. Raises CheckpointError if the
    folder cannot be written or already holds a checkpoint.
    """
    state = {"step": step, "tokens": tokens, "precision": "fp32", "optimizer": dict(counters)}
    path = CheckpointFolder(job.run.checkpoints, job.record.settings.keep).save(
        tensors, state, job.record_files(job.plan)
    )
    # Written last, so that a run exists only once it has its initial weights, or a run that makes them.
    job.run.write_record(job.recipe, job.plan, job.record)
    return path
