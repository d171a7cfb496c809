"""Transformers' ELECTRA weights as a folder holds them: which of the two models they are, of which sizes, and whole.

Nothing that comes with them is run: no code of theirs, and no pickle but by torch's loader of tensors alone.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining, PreTrainedModel
from transformers.utils import logging

from electra_ds.core.errors import DataError
from electra_ds.core.program import command
from electra_ds.data.given_tokenizer import load_given_tokenizer
from electra_ds.data.hub import explained
from electra_ds.data.tokenizer import Tokenizer
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
_SHOWN_NAMES = 4


@dataclass(frozen=True)
class Pretrained:
    """A generator or a discriminator."""

    name: str
    """As the user gave it."""
    kind: Kind
    has_head: bool
    """False for an encoder alone, which is taken for a discriminator's."""
    sizes: dict[str, Any]
    """What SIZES names, and `hidden_act`."""
    vocab_size: int
    """Rows of the token table."""
    tensors: dict[str, torch.Tensor]
    """fp32, under the names of `Electra.state_dict`."""
    tokenizer: Tokenizer | None
    """None where the folder has neither tokenizer.json nor vocab.txt."""


def read_pretrained(name: str, folder: Path) -> Pretrained:
    """The model in a folder that transformers wrote.

    Which one it is, its weights' names say. Raises DataError, with its name, where it is no ELECTRA, damaged or not
    whole, or where a pickle holds anything but tensors.
    """
    refuse_other_frameworks(folder, name)
    values = _read_config(name, folder)
    config = _config_of(values, name)
    is_generator = "ElectraForMaskedLM" in (values.get("architectures") or ())
    kind: Kind = "generator" if is_generator else "discriminator"
    other: Kind = "discriminator" if is_generator else "generator"
    model, info = _load(name, folder, config, kind)
    if any(key.startswith(_HEADS[other]) for key in info["unexpected_keys"]) or (
        is_generator and _lacks_head(model, info)
    ):
        kind = other
        model, info = _load(name, folder, config, kind)
    has_head = not _lacks_head(model, info)
    _check_whole(name, model, info, kind, has_head)
    tensors = {key: tensor for key, tensor in model.state_dict().items() if has_head or key.startswith("electra.")}
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
    architectures = values.get("architectures") or ()
    kind = next((kind for kind, own in _CLASSES.items() if own.__name__ in architectures), None)
    return kind, _sizes(_config_of(values, str(file)))


def _config_of(values: Mapping[str, Any], name: str) -> ElectraConfig:
    """Return a config made only of what is named here, so that nothing else in the file affects how weights are
    loaded."""
    known = {key: values[key] for key in (*SIZES, "vocab_size", "pad_token_id", "hidden_act") if key in values}
    with explained(f"the model {name}"), _in_silence():
        return ElectraConfig(**known)


def _sizes(config: ElectraConfig) -> dict[str, Any]:
    return {key: getattr(config, key) for key in (*SIZES, "hidden_act")}


def _read_config(name: str, folder: Path) -> dict[str, Any]:
    """config.json of an ELECTRA."""
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
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"Cannot read {file}: {error}. Fetch the model again.") from error
    found = values.get("model_type") if isinstance(values, dict) else None
    if found != "electra":
        raise DataError(f"{name} is a model of type {found}, not electra (model_type in its config.json).")
    if values.get("position_embedding_type", "absolute") != "absolute":
        raise DataError(
            f"{name} has {values['position_embedding_type']} positions; this model has absolute ones alone."
        )
    architectures = values.get("architectures")
    if architectures is not None and not isinstance(architectures, list):
        raise DataError(f"{file}: architectures is {repr(architectures)[:40]}, not a list. Fetch the model again.")
    return dict(values)


def _load(name: str, folder: Path, config: ElectraConfig, kind: Kind) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """(model, what transformers says about missing, unexpected and mismatched tensors)."""
    with explained(f"the model {name}", "Fetch it again."), _in_silence():
        try:
            loaded: Any = _CLASSES[kind].from_pretrained(
                folder, config=config, dtype=torch.float32, local_files_only=True, weights_only=True,
                ignore_mismatched_sizes=True, output_loading_info=True, attn_implementation="eager",
            )  # fmt: skip
            return loaded[0], loaded[1]
        except pickle.UnpicklingError as error:
            raise DataError(
                f"The weights of {name} are damaged, or their pickle holds more than tensors: it could run any program "
                f"and is not opened. Fetch them again, or ask for a copy as model.safetensors."
            ) from error


@contextmanager
def _in_silence() -> Iterator[None]:
    """What transformers reports of the tensors is looked at and told by us."""
    before, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if shows_progress:
            logging.enable_progress_bar()


def _head(model: PreTrainedModel) -> set[str]:
    """Names of the head's own tensors; a decoder that is the token table is none."""
    return {name for name, _ in model.named_parameters() if not name.startswith("electra.")}


def _lacks_head(model: PreTrainedModel, info: Mapping[str, Any]) -> bool:
    return not info["unexpected_keys"] and _head(model) <= set(info["missing_keys"])


def _check_whole(name: str, model: PreTrainedModel, info: Mapping[str, Any], kind: Kind, has_head: bool) -> None:
    """Raises DataError unless every tensor of the model was there, finite, of the size that config.json says, and no
    other."""
    missing = set(info["missing_keys"]) - (set() if has_head else _head(model))
    problems = [
        f"{what} {_some(keys)}"
        for what, keys in {
            "missing are": missing,
            "unknown are": info["unexpected_keys"],
            "of other sizes than config.json says are": {key for key, *_ in info["mismatched_keys"]},
            "not finite are": {key for key, tensor in model.state_dict().items() if not tensor.isfinite().all()},
        }.items()
        if keys
    ]
    if problems:
        raise DataError(
            f"{name} does not hold the weights of an ELECTRA {kind} as it was pretrained: {'; '.join(problems)}. "
            f"Give a pretrained model, not a finetuned one; where files were lost or damaged, fetch it again."
        )
    if kind == "generator":
        tensors = model.state_dict()
        if not torch.equal(tensors["generator_lm_head.weight"], tensors["electra.embeddings.word_embeddings.weight"]):
            raise DataError(
                f"The generator {name} predicts tokens by another table than the one that it reads them by; here both "
                f"are one. Give the discriminator alone."
            )


def _some(keys: set[str]) -> str:
    shown = sorted(keys)[:_SHOWN_NAMES]
    return ", ".join(shown) + (f" and {len(keys) - len(shown)} more" if len(keys) > len(shown) else "")
