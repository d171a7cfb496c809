"""A run that begins with published weights: what its sources hold, whether they fit, and the tensors that come of them.

Imported only where a run begins so, since transformers takes seconds to import.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from electra_ds.config.recipe import Recipe, electra_recipe
from electra_ds.core.errors import ConfigError, DataError
from electra_ds.core.hub_names import is_hub_model
from electra_ds.core.program import command
from electra_ds.data.hub import fetch_model
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.interop.fit import Wanted, check_fit, most_shared
from electra_ds.interop.pretrained import Pretrained, read_pretrained
from electra_ds.model.other_formats import refuse_other_frameworks
from electra_ds.pretraining.electra import Electra

_PARTS = ("generator", "discriminator")
_COMES_ALONG = {
    "none": "",
    "tokens": ", but for the token table, which the discriminator's is",
    "embeddings": ", but for the embeddings, which the discriminator's are",
    "all": ", but for the encoder, which the discriminator's is",
}


@dataclass(frozen=True)
class InitialWeights:
    """The weights that a run begins with, which fit its recipe."""

    discriminator: Pretrained
    generator: Pretrained | None

    @property
    def names(self) -> list[str]:
        """For the run's record: Hub names, and folders in full."""
        return [
            part.name if is_hub_model(part.name) else str(Path(part.name).resolve()) for part in self._parts()
        ]  # fmt: skip

    def _parts(self) -> list[Pretrained]:
        return [part for part in (self.generator, self.discriminator) if part is not None]

    def _own_tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer that came with the weights, the discriminator's first."""
        return next((part.tokenizer for part in reversed(self._parts()) if part.tokenizer is not None), None)

    def own_tokenizer(self) -> str:
        """Return the argument of --tokenizer for the weights' own. Raises ConfigError if none came with them."""
        for part in reversed(self._parts()):
            if part.tokenizer is not None or is_hub_model(part.name):
                return part.name
        raise ConfigError(
            f"{self.discriminator.name} holds no tokenizer.json and no vocab.txt. Give the one that it was trained "
            f"with: --tokenizer PATH."
        )

    def check_vocabulary(self, tokenizer: Tokenizer) -> None:
        """Raises DataError unless every id means the piece that its row of the token table was trained for.

        Where no tokenizer came with the weights, there must be as many pieces as rows.
        """
        rows, size = self.discriminator.vocab_size, tokenizer.vocab_size
        known = self._own_tokenizer()
        if known is not None:
            problem = _difference(known, tokenizer)
        else:
            problem = "" if size == rows else f"it has {size:,} pieces"
        if not problem and size > rows:
            problem = f"it has {size:,} pieces with those that ELECTRA needs"
        if problem:
            advice = "Give the tokenizer that they were trained with."
            if known is not None:
                advice = (
                    f"Leave --tokenizer out to take the weights' own; a store for --data is made with it by "
                    f"{command('build-data')} --tokenizer {self.own_tokenizer()}."
                )
            raise DataError(
                f"The tokenizer does not fit the weights of {self.discriminator.name}, whose token table has {rows:,} "
                f"rows: {problem}. Rows would stand for other pieces than they were trained for. {advice}"
            )

    def notes(self, recipe: Recipe, tokenizer: Tokenizer) -> list[str]:
        """What of the model begins otherwise than with the weights."""
        notes = []
        if self.generator is None:
            notes.append(
                f"the generator begins with random weights{_COMES_ALONG[electra_recipe(recipe).generator.sharing]}"
            )
        if not self.discriminator.has_head:
            notes.append(
                f"{self.discriminator.name} is an encoder alone: the discriminator's head begins with random weights"
            )
        own = self._own_tokenizer()
        if own is not None and (differing := _differing_steps(own, tokenizer)):
            notes.append(
                f"the tokenizer has the weights' pieces but splits text differently from theirs: {differing}. Unless "
                f"you intend that, use theirs: leave out --tokenizer and --data, or build the store with "
                f"{command('build-data')} --tokenizer {self.own_tokenizer()}"
            )
        spare = self.discriminator.vocab_size - tokenizer.vocab_size
        if spare:
            notes.append(f"the last {spare:,} rows of the token table have no piece and are left out")
        return notes

    def tensors(self, recipe: Recipe, tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
        """The tensors of a first checkpoint: the weights, the recipe's random ones where there are none, and moments
        of 0."""
        model = Electra(recipe, tokenizer.vocab_size, tokenizer.pad_id)
        own = model.state_dict()
        given = {name: tensor for part in self._parts() for name, tensor in part.tensors.items()}
        spare_rows_left_out = {name: tensor[: len(own[name])] for name, tensor in given.items()}
        model.load_state_dict(spare_rows_left_out, strict=False)
        result = {}
        for name, parameter in model.named_parameters():
            result[f"master/{name}"] = parameter.detach()
            result[f"exp_avg/{name}"] = torch.zeros_like(parameter)
            result[f"exp_avg_sq/{name}"] = torch.zeros_like(parameter)
        return result


def read_initial_weights(sources: Sequence[str], recipe: Recipe) -> InitialWeights:
    """The weights in one or two folders of transformers' or names on the Hub, in any order.

    A folder may be one that bin/export made. Raises DataError if a model cannot be had or used, ConfigError where
    they are no discriminator with or without a generator, or do not fit the recipe.
    """
    for source in sources:
        _check_word(source)
    parts = [
        read_pretrained(name, fetch_model(name) if is_hub_model(name) else Path(name))
        for source in sources
        for name in _expanded(source)
    ]  # fmt: skip
    of_kind = {kind: [part for part in parts if part.kind == kind] for kind in _PARTS}
    found = ", ".join(f"{part.name} ({part.kind})" for part in parts)
    if len(of_kind["generator"]) > 1 or len(of_kind["discriminator"]) > 1:
        raise ConfigError(f"--init-from takes one discriminator, and one generator or none; these are {found}.")
    if not of_kind["discriminator"]:
        raise ConfigError(
            f"--init-from needs a discriminator, and this is {found}. Give the discriminator that was trained with it "
            f"too, or alone."
        )
    beginning = InitialWeights(of_kind["discriminator"][0], of_kind["generator"][0] if of_kind["generator"] else None)
    discriminator, generator = beginning.discriminator, beginning.generator
    if generator is not None:
        _check_one_vocabulary(generator, discriminator)
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    check_fit(
        recipe,
        Wanted(discriminator.name, discriminator.sizes),
        None if generator is None else Wanted(generator.name, generator.sizes),
        most_shared(tensors),
    )
    return beginning


def _check_word(source: str) -> None:
    """Raise ConfigError for what can name neither a folder nor a model, DataError for another framework's weights."""
    if not source.strip():
        raise ConfigError("--init-from is given an empty name. Give a folder, or OWNER/NAME of a model on the Hub.")
    try:
        (Path(source) / "config.json").exists()
    except OSError as error:  # too long a name, above all
        raise ConfigError(f"--init-from {source[:40]}… cannot be looked up: {error.strerror}.") from error
    refuse_other_frameworks(Path(source), source)


def _expanded(source: str) -> list[str]:
    """The two models in a folder of bin/export's, or the source itself."""
    folder = Path(source)
    inside = [folder / part for part in _PARTS if (folder / part / "config.json").is_file()]
    return [str(path) for path in inside] if inside and not (folder / "config.json").is_file() else [source]


def _check_one_vocabulary(generator: Pretrained, discriminator: Pretrained) -> None:
    problem = ""
    if generator.vocab_size != discriminator.vocab_size:
        problem = (
            f"{generator.vocab_size:,} rows in the one's token table and {discriminator.vocab_size:,} in the other's"
        )
    elif generator.tokenizer is not None and discriminator.tokenizer is not None:
        problem = _difference(discriminator.tokenizer, generator.tokenizer)
    if problem:
        raise ConfigError(
            f"{generator.name} and {discriminator.name} do not read the same vocabulary: {problem}. Give a pair that "
            f"was trained together, or the discriminator alone."
        )


def _differing_steps(theirs: Tokenizer, ours: Tokenizer) -> str:
    """Return how two tokenizers differ in what they do to text before they look up pieces; empty if they do not."""
    found = []
    for step in ("normalizer", "pre_tokenizer"):
        one, other = (json.loads(tokenizer.backend.to_str())[step] for tokenizer in (theirs, ours))
        if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
            found += [f"{key} {one[key]} there and {other[key]} here" for key in one if one[key] != other[key]]
        elif one != other:
            found.append(f"a different {step}")
    return ", ".join(found)


def _difference(expected: Tokenizer, found: Tokenizer) -> str:
    """In which pieces two tokenizers differ; empty where in none."""
    theirs = expected.backend.get_vocab(with_added_tokens=True)
    ours = found.backend.get_vocab(with_added_tokens=True)
    differing = sorted(
        (min(theirs.get(piece, len(theirs)), ours.get(piece, len(ours))), piece)
        for piece in theirs.keys() | ours.keys()
        if theirs.get(piece) != ours.get(piece)
    )
    if not differing:
        return ""
    piece = differing[0][1]
    ids = [f"id {vocabulary[piece]}" if piece in vocabulary else "no id" for vocabulary in (theirs, ours)]
    return f"{len(differing):,} pieces have other ids, such as {piece!r} with {ids[0]} there and {ids[1]} here"
