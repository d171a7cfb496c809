"""Renaming our tensors to transformers' names and back, and advice on converting weights of other frameworks.

Parity tests, exports and initial weights use these names. Weights of other frameworks are recognised by their file
names, without reading them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from electra_ds.core.errors import DataError
from electra_ds.core.files import is_hub_model
from electra_ds.core.program import command
from electra_ds.model.encoder import EncoderConfig
from electra_ds.pretraining.electra import Electra

_LAYERS = {
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
_HEADS = {
    "generator_head.dense": "generator_predictions.dense",
    "generator_head.LayerNorm": "generator_predictions.LayerNorm",
    "generator_head.decoder": "generator_lm_head",
    "discriminator_head.dense": "discriminator_predictions.dense",
    "discriminator_head.dense_prediction": "discriminator_predictions.dense_prediction",
}
_OUR_LAYERS = {theirs: ours for ours, theirs in _LAYERS.items()}
_OUR_HEADS = {theirs: ours for ours, theirs in _HEADS.items()}
_ATTENTION_PARTS = ("query", "key", "value")
_TIED = "generator_lm_head.weight"


def transformers_config(config: EncoderConfig) -> ElectraConfig:
    """Return the `ElectraConfig` of one of our encoders."""
    return ElectraConfig(
        vocab_size=config.vocab_size,
        embedding_size=config.embedding_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        type_vocab_size=config.type_vocab_size,
        hidden_dropout_prob=config.hidden_dropout_prob,
        attention_probs_dropout_prob=config.attention_probs_dropout_prob,
        initializer_range=config.initializer_range,
        layer_norm_eps=config.layer_norm_eps,
        pad_token_id=config.pad_token_id,
    )


def generator_tensors(tensors: Mapping[str, torch.Tensor], network: str = "generator") -> dict[str, torch.Tensor]:
    """Return tensors of a model's `state_dict` (or gradients by the same names) under `ElectraForMaskedLM`'s names.

    network: the attribute with the encoder; its head is NETWORK_head.
    """
    return dict(_under_their_names(tensors, network, "generator"))


def discriminator_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of `Electra.state_dict` under `ElectraForPreTraining`'s names."""
    return dict(_under_their_names(tensors, "discriminator", "discriminator"))


def _under_their_names(
    tensors: Mapping[str, torch.Tensor], network: str, role: Literal["generator", "discriminator"]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if module.startswith(f"{network}_head."):
            yield f"{_HEADS[f'{role}{module.removeprefix(network)}']}.{kind}", tensor
        elif module.startswith(f"{network}.layers."):
            _, _, index, part = module.split(".")
            layer = f"electra.encoder.layer.{index}"
            if part == "query_key_value":
                for each, piece in zip(_ATTENTION_PARTS, tensor.chunk(3), strict=True):
                    yield f"{layer}.attention.self.{each}.{kind}", piece
            else:
                yield f"{layer}.{_LAYERS[part]}.{kind}", tensor
        elif module.startswith(f"{network}."):
            yield f"electra.{name.removeprefix(f'{network}.')}", tensor


def from_generator_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of `ElectraForMaskedLM` under our names, without the decoder's weight, which is the token table,
    and without other heads."""
    return dict(_under_our_names(tensors, "generator"))


def from_discriminator_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of `ElectraForPreTraining`, or of only its encoder, under our names. Other heads are left out."""
    return dict(_under_our_names(tensors, "discriminator"))


def _under_our_names(tensors: Mapping[str, torch.Tensor], network: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if module.startswith("electra.encoder.layer."):
            _, _, _, index, part = module.split(".", 4)
            layer = f"{network}.layers.{index}"
            if part == "attention.self.query":  # handles all three
                parts = [tensors[name.replace(".query.", f".{each}.")] for each in _ATTENTION_PARTS]
                yield f"{layer}.query_key_value.{kind}", torch.cat(parts)
            elif not part.startswith("attention.self."):
                yield f"{layer}.{_OUR_LAYERS[part]}.{kind}", tensor
        elif module.startswith("electra."):
            yield f"{network}.{name.removeprefix('electra.')}", tensor
        elif name != _TIED and _OUR_HEADS.get(module, "").startswith(f"{network}_head"):
            yield f"{_OUR_HEADS[module]}.{kind}", tensor


def masked_lm(model: nn.Module, network: str) -> ElectraForMaskedLM:
    """Return one of a model's networks that predict tokens, with copies of its weights. network: its attribute."""
    exported = ElectraForMaskedLM(transformers_config(getattr(model, network).config))
    exported.load_state_dict(generator_tensors(_copies(model), network), strict=True)
    return exported.eval()


def discriminator(model: Electra) -> ElectraForPreTraining:
    """Return the discriminator, with copies of its weights."""
    exported = ElectraForPreTraining(transformers_config(model.discriminator.config))
    exported.load_state_dict(discriminator_tensors(_copies(model)), strict=True)
    return exported.eval()


def _copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().float().clone() for name, tensor in model.state_dict().items()}


_OURS = ("*.safetensors", "pytorch_model*.bin")
_BY_TRANSFORMERS = {
    "tf_model*.h5": ("TensorFlow", "tensorflow", "from_tf"),
    "flax_model*.msgpack": ("Flax", "flax", "from_flax"),
}
_GRAPHS = {"saved_model.pb": "a TensorFlow SavedModel", "*.onnx": "an ONNX model", "*.gguf": "a GGUF model"}


def refuse_other_frameworks(path: Path, name: str) -> None:
    """Raise DataError if a file or folder has only weights of another framework. The message says how to convert them.

    name: how messages refer to it.
    """
    found = _other_framework(path, name)
    if found is not None:
        raise DataError(
            f"{name} is {found} Give the converted folder NEW to {command('pretrain')} --init-from or "
            f"{command('finetune')} --model."
        )


def _other_framework(path: Path, name: str) -> str | None:
    """Return a description of another framework's weights and how to convert them, or None for anything else."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        prefix = _tensorflow_prefix(path)
    except OSError:  # the error is reported when the file is read
        return None
    if any(file.match(pattern) for file in files for pattern in _OURS):
        return None
    if prefix:
        return (
            f"a TensorFlow checkpoint, as google-research/electra writes it; PyTorch weights are needed. In another "
            f"environment: pip install 'transformers<5' torch tensorflow, then\n"
            f"  python -m transformers.models.electra.convert_electra_original_tf_checkpoint_to_pytorch \\\n"
            f"    --tf_checkpoint_path {prefix} --config_file NEW/config.json \\\n"
            f"    --pytorch_dump_path NEW/pytorch_model.bin --discriminator_or_generator discriminator\n"
            f"Write NEW/config.json first: copy that of google/electra-small-discriminator on the Hub and set this "
            f"model's sizes. Put the model's vocab.txt into NEW too."
        )
    for pattern, (framework, package, switch) in _BY_TRANSFORMERS.items():
        if any(file.match(pattern) and file.is_file() for file in files):
            source = path if path.is_dir() else path.parent
            return f"a model with {framework} weights only. {_by_older_transformers(str(source), package, switch)}"
    for pattern, kind in _GRAPHS.items():
        if any(file.match(pattern) for file in files):
            return f"{kind}, which is a graph and not just weights. Convert the checkpoint that it was made from."
    if is_hub_model(name) and any(file.name == "config.json" for file in files):  # such weights are never downloaded
        advice = _by_older_transformers(name, "tensorflow", "from_tf")
        return f"a model without PyTorch weights. If its page lists tf_model.h5, convert that: {advice}"
    return None


def _tensorflow_prefix(path: Path) -> Path | None:
    """Return the prefix of a TensorFlow checkpoint (PREFIX.index, PREFIX.data-00000-of-00001), or None.

    path: the prefix, one of the files, or a folder, whose newest checkpoint is meant.
    """
    if path.is_dir():
        indices = sorted(path.glob("*.index"), key=lambda file: file.stat().st_mtime, reverse=True)
        prefixes = [index.with_suffix("") for index in indices]
    else:
        prefixes = [path, path.with_suffix("")]
    for prefix in prefixes:
        if prefix.with_name(f"{prefix.name}.index").is_file() and any(prefix.parent.glob(f"{prefix.name}.data-*")):
            return prefix
    return None


def _by_older_transformers(source: str, package: str, switch: str) -> str:
    return (
        f"transformers 5 reads only PyTorch weights. In another environment: pip install 'transformers<5' torch "
        f"{package}, then\n"
        f'  python -c "from transformers import AutoModelForPreTraining as M; '
        f"M.from_pretrained('{source}', {switch}=True).save_pretrained('NEW')\"\n"
        f"(AutoModelForMaskedLM for a generator), and copy the tokenizer's files to NEW."
    )
