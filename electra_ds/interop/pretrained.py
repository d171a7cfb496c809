"""ELECTRA weights in a folder of transformers: which of the two models they are, their sizes, and their tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining, PreTrainedModel

from electra_ds.core.errors import DataError
from electra_ds.core.program import command
from electra_ds.data.given_tokenizer import load_given_tokenizer
from electra_ds.data.hub import explained
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.finetuning.encoder_source import check_complete, load_weights, silent_transformers
from electra_ds.model.other_formats import refuse_other_frameworks
from electra_ds.pretraining.convert import from_discriminator_tensors, from_generator_tensors

Kind = Literal["generator", "discriminator"]
SIZES = (
    "embedding_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size", "layer_norm_eps",
)  # fmt: skip
_CLASSES: dict[Kind, type[PreTrainedModel]] = {
    "generator": ElectraForMaskedLM, "discriminator": ElectraForPreTraining,
}  # fmt: skip
_HEADS: dict[Kind, tuple[str, ...]] = {
    "generator": ("generator_predictions.", "generator_lm_head."), "discriminator": ("discriminator_predictions.",),
}  # fmt: skip
_TABLE, _DECODER = "electra.embeddings.word_embeddings.weight", "generator_lm_head.weight"


@dataclass(frozen=True)
class Pretrained:
    """A generator or a discriminator."""

    name: str
    """Its name as the user gave it."""
    kind: Kind
    has_head: bool
    """False for an encoder alone, which is taken for a discriminator's."""
    sizes: dict[str, Any]
    """The values of SIZES and `hidden_act`."""
    vocab_size: int
    """Rows of the token table."""
    tensors: dict[str, torch.Tensor]
    """fp32, under the names of `Electra.state_dict`."""
    tokenizer: Tokenizer | None
    """None if the folder has neither tokenizer.json nor vocab.txt."""


def read_pretrained(name: str, folder: Path) -> Pretrained:
    """Read the model in a folder that transformers wrote; the names of its weights say which of the two it is.

    Raises DataError, with its name, if it is no ELECTRA, is damaged or incomplete, or if a pickle holds anything but
    tensors.
    """
    refuse_other_frameworks(folder, name)
    values = _read_config(name, folder)
    config = _config_of(values, name)
    is_generator = _kind_of(values) == "generator"
    kind: Kind = "generator" if is_generator else "discriminator"
    other: Kind = "discriminator" if is_generator else "generator"
    model, problems = load_weights(_CLASSES[kind], folder, config, name)
    has_other_head = any(key.startswith(_HEADS[other]) for key in problems["unknown are"])
    if has_other_head or (is_generator and _lacks_head(model, problems)):
        kind = other
        model, problems = load_weights(_CLASSES[kind], folder, config, name)
    has_head = not _lacks_head(model, problems)
    if not has_head:
        problems["missing are"] -= _head(model)
    check_complete(
        f"{name} does not hold the weights of an ELECTRA {kind} as it was pretrained",
        problems,
        "Give a pretrained model, not a finetuned one; if files were lost or damaged, fetch it again.",
    )
    tensors = {key: tensor for key, tensor in model.state_dict().items() if has_head or key.startswith("electra.")}
    if kind == "generator" and not torch.equal(tensors[_DECODER], tensors[_TABLE]):
        raise DataError(
            f"The generator {name} predicts tokens by another table than the one that it reads them by; here both are "
            f"one. Give the discriminator alone."
        )
    convert = from_generator_tensors if kind == "generator" else from_discriminator_tensors
    has_tokenizer = (folder / "tokenizer.json").is_file() or (folder / "vocab.txt").is_file()
    return Pretrained(
        name, kind, has_head, _sizes(config), config.vocab_size,
        convert(tensors), load_given_tokenizer(str(folder))[0] if has_tokenizer else None,
    )  # fmt: skip


def read_sizes(file: Path) -> tuple[Kind | None, dict[str, Any]]:
    """Return (which of the two models it is, or None if its architecture does not say; the values of SIZES and
    `hidden_act`) from a config.json. Raises DataError if it is not an ELECTRA's."""
    values = _parsed(file, str(file))
    return _kind_of(values), _sizes(_config_of(values, str(file)))


def _kind_of(values: Mapping[str, Any]) -> Kind | None:
    architectures = str(values.get("architectures"))
    return next((kind for kind, own in _CLASSES.items() if own.__name__ in architectures), None)


def _config_of(values: Mapping[str, Any], name: str) -> ElectraConfig:
    """Return a config made only of what is named here, so that nothing else in the file affects how weights are
    loaded."""
    known = {key: values[key] for key in (*SIZES, "vocab_size", "pad_token_id", "hidden_act") if key in values}
    with explained(f"the model {name}"), silent_transformers():
        return ElectraConfig(**known)


def _sizes(config: ElectraConfig) -> dict[str, Any]:
    return {key: getattr(config, key) for key in (*SIZES, "hidden_act")}


def _read_config(name: str, folder: Path) -> dict[str, Any]:
    """Return the values of the config.json in a folder."""
    file = folder / "config.json"
    if not file.is_file():
        there = "There is no folder" if not folder.is_dir() else "There is no config.json in"
        advice = f"Give a folder that transformers or {command('export')} wrote, or OWNER/NAME of a model on the Hub."
        if (folder / "run.json").is_file():
            advice = f"It is a run: export it with {command('export')} {name}, and give the folder that this makes."
        raise DataError(f"{there} {name}. {advice}")
    return _parsed(file, name)


def _parsed(file: Path, name: str) -> dict[str, Any]:
    """Return the values of an ELECTRA's config.json."""
    try:
        values = json.loads(file.read_text("utf8"))
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {file}: {error}. Fetch the model again.") from error
    found = values.get("model_type") if isinstance(values, dict) else None
    if found != "electra":
        raise DataError(f"{name} is a model of type {found}, not electra (model_type in its config.json).")
    if values.get("position_embedding_type", "absolute") != "absolute":
        raise DataError(
            f"{name} has {values['position_embedding_type']} positions; the model here has absolute ones only."
        )
    return dict(values)


def _head(model: PreTrainedModel) -> set[str]:
    """Return the names of the head's own tensors; a decoder that is the token table is none of them."""
    return {name for name, _ in model.named_parameters() if not name.startswith("electra.")}


def _lacks_head(model: PreTrainedModel, problems: Mapping[str, set[str]]) -> bool:
    return not problems["unknown are"] and _head(model) <= problems["missing are"]
