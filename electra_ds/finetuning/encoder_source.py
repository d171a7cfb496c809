"""Read the encoder that a finetuning begins with: from one of our runs, a transformers folder, or the Hub.

No code that comes with it is run, and pickles are read by torch's tensor-only loader.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from electra_ds.config.run_directory import RunDirectory
from electra_ds.core.errors import CheckpointError, ConfigError, DataError
from electra_ds.core.files import is_hub_model, path_hint
from electra_ds.data.given_tokenizer import read_folder
from electra_ds.data.hub import explain_errors, fetch_model
from electra_ds.pretraining.convert import refuse_other_frameworks
from electra_ds.pretraining.evaluation import load_model
from electra_ds.training.checkpoint import Checkpoint
from electra_ds.training.checkpoints import kept_checkpoint, newest_checkpoint

_MISSING, _UNKNOWN = "missing are", "unknown are"
_POOLER = "pooler."
_LAYER = re.compile(r"\.layers?\.\d+\.")
_ABSOLUTE = ("electra", "bert", "roberta", "xlm-roberta", "camembert")
"""Model types that transformers 5 no longer supports with relative positions."""
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "longformer", "mpnet")
"""Model types whose positions start at the padding id plus one."""
_SHOWN_NAMES = 4
_KEPT = ("discriminator", "encoder")
"""The folders of our objectives' exports whose encoders are finetuned, next to a generator's."""


@dataclass(frozen=True)
class EncoderSource:
    """An encoder with its own tokenizer."""

    name: str
    """The name that the user gave, or the full path of a folder."""
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    tensors: dict[str, torch.Tensor]
    """In fp32, under the names of `AutoModel`, without a pooler."""
    fingerprint: str
    """The SHA-256 of names, shapes and values."""
    trained_length: int | None = None
    """The sequence length in pretraining, in tokens; None if it is not known."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how the tokenizer was read."""

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def has_segments(self) -> bool:
        """True if segment ids distinguish a second text from a first."""
        return int(getattr(self.config, "type_vocab_size", 0) or 0) >= 2

    @property
    def max_length(self) -> int:
        """The maximum number of tokens of an input, practically unlimited for a model without a position table."""
        longest = int(getattr(self.config, "max_position_embeddings", 0) or 0)
        offset = 2 if self.config.model_type in _OFFSET_POSITIONS else 0
        return longest - offset if longest > 0 else 10**6

    def files(self) -> dict[str, str]:
        """The configuration and the tokenizer, as files that transformers opens."""
        with tempfile.TemporaryDirectory() as folder:
            self.config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            names = ("config.json", "tokenizer.json", "tokenizer_config.json")
            return {name: (Path(folder) / name).read_text("utf8") for name in names}


def read_encoder(name: str) -> EncoderSource:
    """Read the encoder `name`: one of our run directories or checkpoints, a folder that `bin/export` or transformers
    wrote, or a model on the Hub.

    Raises DataError if the model does not exist, if it is damaged or incomplete, or if it lacks its tokenizer, and
    CheckpointError if a run has no checkpoint.
    """
    path = Path(name)
    refuse_other_frameworks(path, name)
    if (path / "run.json").is_file() or (path / "manifest.json").is_file():
        return _of_run(path)
    if path.is_dir():
        folder = _network(path).resolve()
        return _of_folder(folder, str(folder))
    if is_hub_model(name):
        return _of_folder(fetch_model(name), name)
    raise DataError(
        f"The model {name} does not exist. Give a run directory, a folder that transformers' save_pretrained wrote, or "
        f"OWNER/NAME on the Hub{path_hint(name)}."
    )


def _network(path: Path) -> Path:
    """Return the folder of the network to finetune: `path`, or one of the networks of an export."""
    networks = {config.parent.name: config.parent for config in path.glob("*/config.json")}
    if (path / "config.json").is_file() or not networks:
        return path
    kept = next((name for name in _KEPT if name in networks), None)
    if len(networks) > 1 and kept is None:
        names = sorted(networks)
        raise DataError(
            f"The folder {path} has several models: {', '.join(names)}. Give the folder of one of them, such as "
            f"{path / names[0]}."
        )
    return networks[kept] if kept is not None else next(iter(networks.values()))


def _of_run(path: Path) -> EncoderSource:
    name = str(path.resolve())
    if RunDirectory(path).kind() == "finetune":
        checkpoint = kept_checkpoint(path)
        keys = [key for key in checkpoint.tensors if key.startswith("master/encoder.")]
        tensors = {key.removeprefix("master/encoder."): checkpoint.tensors[key] for key in keys}
        config, tokenizer, _ = read_config_and_tokenizer(checkpoint.path, name)
        return EncoderSource(name, config, tokenizer, tensors, fingerprint(tensors))
    model, objective, own_tokenizer, recipe = load_model(newest_checkpoint(path))
    exports = objective.exports(model)
    if objective.encoder not in exports:
        raise ConfigError(
            f"The objective {recipe.objective} says that the encoder is {objective.encoder!r}, but exports only "
            f"{', '.join(exports)}."
        )
    exported = exports[objective.encoder].model
    tensors = {key: tensor.contiguous() for key, tensor in exported.base_model.state_dict().items()}
    config = exported.config
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        own_tokenizer.save(Path(folder), recipe.model.max_position_embeddings)
        config, tokenizer, _ = read_config_and_tokenizer(Path(folder), name)
    return EncoderSource(name, config, tokenizer, tensors, fingerprint(tensors), recipe.data.sequence_length)


def read_config_and_tokenizer(folder: Path, name: str) -> tuple[PretrainedConfig, PreTrainedTokenizerFast, list[str]]:
    """Return the config and tokenizer that `EncoderSource.files` or transformers wrote, and notes on the tokenizer."""
    if not (folder / "config.json").is_file():
        raise DataError(
            f"{name} has no config.json, so it is not a transformers model. Give a run directory, a folder that "
            f"transformers' save_pretrained wrote, or OWNER/NAME on the Hub."
        )
    advice = "Choose a folder that transformers' save_pretrained wrote; code that comes with a model is not run."
    with explain_errors(f"the model {name}", advice):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.chunk_size_feed_forward = 0  # chunking changes no number and accepts only some input lengths
    kind = getattr(config, "position_embedding_type", None)
    if config.model_type in _ABSOLUTE and kind not in (None, "absolute"):
        raise DataError(f"{name} has {kind} positions, which transformers no longer supports.")
    if getattr(config, "is_encoder_decoder", False) or _is_decoder(config):
        raise DataError(f"{name} is or has a decoder ({config.model_type}), but finetuning needs an encoder alone.")
    tokenizer, notes = read_folder(folder, name, config)
    ids = tokenizer("a")["input_ids"]
    if tokenizer.pad_token_id is None or tokenizer.cls_token_id is None or ids[0] != tokenizer.cls_token_id:
        raise DataError(
            f"The tokenizer of {name} has no [PAD], or does not begin a text with a token such as [CLS]; is the model "
            f"an encoder?"
        )
    rows = int(config.vocab_size)
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > rows:
        raise DataError(
            f"The tokenizer of {name} has ids up to {needed - 1:,}, but its token table has {rows:,} rows. Put the "
            f"tokenizer that it was pretrained with next to its config.json."
        )
    return config, tokenizer, notes


def _is_decoder(config: PretrainedConfig) -> bool:
    """Return True if transformers has a model of this type for text generation and none for masked tokens."""
    if getattr(config, "is_decoder", False):
        return True
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING


def _of_folder(folder: Path, name: str) -> EncoderSource:
    refuse_other_frameworks(folder, name)
    config, tokenizer, notes = read_config_and_tokenizer(folder, name)
    model, problems = load_weights(AutoModel, folder, config, name)
    unknown = problems.pop(_UNKNOWN)
    check_complete(
        f"{name} does not hold a complete encoder",
        {"more than config.json says are": {key for key in unknown if _LAYER.search(f".{key}")}}
        | {what: {key for key in keys if not key.startswith(_POOLER)} for what, keys in problems.items()},
        "Download or export it again.",
    )
    tensors = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(_POOLER)}
    return EncoderSource(name, config, tokenizer, tensors, fingerprint(tensors), notes=tuple(notes))


def load_weights(
    kind: Any, folder: Path, config: PretrainedConfig, name: str
) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    """Return (transformers model in fp32, names of tensors by what is wrong with them) for the model in a folder.

    name: the user's name of the model. kind: the model's class, or `AutoModel`. Raises DataError if the weights cannot
    be read, or are in a pickle that holds more than tensors.
    """
    advice = (
        "config.json or the weights may be damaged. Download or export it again, with weights in model.safetensors."
    )
    with explain_errors(f"the weights of {name}", advice), silent_transformers():
        try:
            model, info = kind.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                weights_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except pickle.UnpicklingError as error:  # whose text advises to run what is in it
            raise DataError(
                f"The weights of {name} are damaged, or their pickle holds more than tensors: it could run any "
                f"program and is not opened. Download them again, or take a copy with model.safetensors."
            ) from error
    return model, {
        _MISSING: set(info["missing_keys"]),
        # Pickles of transformers 4 hold the positions 0, 1, 2 and so on, which not every release of 5 leaves out.
        _UNKNOWN: {key for key in info["unexpected_keys"] if not key.endswith(".position_ids")},
        "of other sizes than config.json says are": {key for key, *_ in info["mismatched_keys"]},
        "not finite are": {key for key, tensor in model.state_dict().items() if not tensor.isfinite().all()},
    }


@contextmanager
def silent_transformers() -> Iterator[None]:
    """Keep transformers from drawing progress bars and from reporting on tensors, which we do ourselves."""
    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()


def check_complete(problem: str, tensors: Mapping[str, Collection[str]], advice: str) -> None:
    """Raise DataError if anything is wrong with a tensor. tensors: their names, by what is wrong with them."""
    found = []
    for what, names in tensors.items():
        if names:
            rest = len(names) - _SHOWN_NAMES
            found.append(f"{what} {', '.join(sorted(names)[:_SHOWN_NAMES])}{f' and {rest} more' if rest > 0 else ''}")
    if found:
        raise DataError(f"{problem}: {'; '.join(found)}. {advice}")


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """The SHA-256 of names, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def finetuned_encoder(checkpoint: Checkpoint) -> tuple[PretrainedConfig, PreTrainedTokenizerFast]:
    """Return the configuration and the tokenizer in the checkpoint of a finetuning."""
    try:
        return read_config_and_tokenizer(checkpoint.path, str(checkpoint.path))[:2]
    except DataError as error:
        raise CheckpointError(f"{checkpoint.path} cannot be used: {error}") from error
