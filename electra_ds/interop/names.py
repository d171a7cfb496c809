"""Tensors under the names of our joint module, or of a joint module of transformers' two, as those of one `Electra`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from electra_ds.core.errors import CheckpointError
from electra_ds.pretraining.convert import (
    discriminator_tensors,
    from_discriminator_tensors,
    from_generator_tensors,
    generator_tensors,
)
from electra_ds.pretraining.electra import Electra

_OWN_MARK = "discriminator_head.dense.weight"
_GENERATOR_MARK, _DISCRIMINATOR_MARK = "generator_predictions.dense.weight", "discriminator_predictions.dense.weight"
_TABLE, _DECODER = "electra.embeddings.word_embeddings.weight", "generator_lm_head.weight"
_SHOWN = 5


class Naming(NamedTuple):
    """How a file names the joint model's tensors."""

    is_ours: bool
    generator: str
    """Prefix of the generator's names, or of all where the names are ours."""
    discriminator: str

    def __str__(self) -> str:
        if self.is_ours:
            return "electra_ds"
        return f"transformers ({self.generator or 'no prefix'}, {self.discriminator or 'no prefix'})"


def find_naming(names: Iterable[str]) -> Naming:
    """Ours under any prefix, or transformers' `ElectraForMaskedLM` and `ElectraForPreTraining` under any two.

    Raises CheckpointError if the names are neither's.
    """
    names = list(names)
    prefixes = [_prefix(names, mark) for mark in (_OWN_MARK, _GENERATOR_MARK, _DISCRIMINATOR_MARK)]
    own, generator, discriminator = prefixes
    if own is not None:
        return Naming(True, own, own)
    if generator is not None and discriminator is not None:
        return Naming(False, generator, discriminator)
    if generator is not None or discriminator is not None:
        there, gone = ("generator", "discriminator") if discriminator is None else ("discriminator", "generator")
        raise CheckpointError(f"The checkpoint holds only a {there}. Its {gone} is needed too to continue training.")
    raise CheckpointError(
        f"The checkpoint's names ({_listed(names)}) are neither those of electra_ds's joint module nor those of one "
        f"of transformers' ElectraForMaskedLM and ElectraForPreTraining."
    )


def _prefix(names: Iterable[str], mark: str) -> str | None:
    return next((name.removesuffix(mark) for name in names if ("." + name).endswith("." + mark)), None)


def own_tensors(naming: Naming, tensors: Mapping[str, torch.Tensor], model: Electra) -> dict[str, torch.Tensor]:
    """The tensors (weights, or one kind of moments) by the names of `model.named_parameters()`, every one of them.

    Where weights are shared in the model, the file's several copies must agree. Raises CheckpointError if a tensor
    is missing, of another size, or one that this model does not have.
    """
    state = model.state_dict(keep_vars=True)
    renamed, foreign = _renamed(naming, tensors, state)
    by_parameter: dict[int, list[str]] = {}
    for name, parameter in state.items():
        by_parameter.setdefault(id(parameter), []).append(name)
    foreign += [name for name in renamed if name not in state]
    if foreign:
        raise CheckpointError(
            f"The checkpoint holds what the recipe's model does not have: {_listed(foreign)}. Is it the right recipe?"
        )
    found: dict[str, torch.Tensor] = {}
    problems = []
    for name, parameter in model.named_parameters():
        copies = [renamed[alias] for alias in by_parameter[id(parameter)] if alias in renamed]
        if not copies:
            problems.append(f"{name} is missing")
        elif copies[0].shape != parameter.shape:
            problems.append(f"{name} is {list(copies[0].shape)}, and the recipe's is {list(parameter.shape)}")
        elif any(not torch.equal(copies[0], copy) for copy in copies[1:]):
            raise CheckpointError(
                f"The recipe shares {' and '.join(by_parameter[id(parameter)])}, and in the checkpoint they differ. "
                f"Say how it was trained by --set generator.sharing=none (or tokens, where the token table is shared)."
            )
        else:
            found[name] = copies[0]
    if problems:
        raise CheckpointError(
            f"The checkpoint does not fit the recipe and the tokenizer ({len(problems)} tensors): {_listed(problems)}."
        )
    return found


def _renamed(
    naming: Naming, tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(tensors under our names, with aliases; names that belong to nothing)."""
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
                f"which ELECTRA has."
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
