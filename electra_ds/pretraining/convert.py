"""Our tensors under transformers' names and back: what parity tests compare, exports write and a run may begin with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from electra_ds.model.encoder import EncoderConfig
from electra_ds.pretraining.electra import Electra

_LAYER_NAMES = {
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
_GENERATOR_HEAD_NAMES = {
    "dense": "generator_predictions.dense",
    "LayerNorm": "generator_predictions.LayerNorm",
    "decoder": "generator_lm_head",
}
_OUR_LAYER_NAMES = {theirs: ours for ours, theirs in _LAYER_NAMES.items()}
_OUR_GENERATOR_HEAD_NAMES = {theirs: ours for ours, theirs in _GENERATOR_HEAD_NAMES.items()}
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


def generator_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of `Electra.state_dict` (or gradients by the same names) under `ElectraForMaskedLM`'s names."""
    renamed = dict(_encoder_tensors(tensors, "generator."))
    for name, tensor in _under(tensors, "generator_head."):
        module, _, kind = name.rpartition(".")
        renamed[f"{_GENERATOR_HEAD_NAMES[module]}.{kind}"] = tensor
    return renamed


def discriminator_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the same for `ElectraForPreTraining`."""
    renamed = dict(_encoder_tensors(tensors, "discriminator."))
    for name, tensor in _under(tensors, "discriminator_head."):
        renamed[f"discriminator_predictions.{name}"] = tensor
    return renamed


def _under(tensors: Mapping[str, torch.Tensor], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name.removeprefix(prefix), tensor) for name, tensor in tensors.items() if name.startswith(prefix))


def _encoder_tensors(tensors: Mapping[str, torch.Tensor], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in _under(tensors, prefix):
        if not name.startswith("layers."):
            yield f"electra.{name}", tensor
            continue
        _, index, module, kind = name.split(".")
        layer = f"electra.encoder.layer.{index}"
        if module == "query_key_value":
            for part, piece in zip(_ATTENTION_PARTS, tensor.chunk(3), strict=True):
                yield f"{layer}.attention.self.{part}.{kind}", piece
        else:
            yield f"{layer}.{_LAYER_NAMES[module]}.{kind}", tensor


def from_generator_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of `ElectraForMaskedLM` under our names, without the decoder's weight, which is the token table's
    and has no name of its own. Raises KeyError for a name that is none of transformers'."""
    renamed = dict(_our_encoder_tensors(tensors, "generator."))
    for name, tensor in tensors.items():
        if not name.startswith("electra.") and name != _TIED:
            module, _, kind = name.rpartition(".")
            renamed[f"generator_head.{_OUR_GENERATOR_HEAD_NAMES[module]}.{kind}"] = tensor
    return renamed


def from_discriminator_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same for `ElectraForPreTraining`, in full, or for its encoder alone."""
    renamed = dict(_our_encoder_tensors(tensors, "discriminator."))
    for name, tensor in _under(tensors, "discriminator_predictions."):
        renamed[f"discriminator_head.{name}"] = tensor
    return renamed


def _our_encoder_tensors(tensors: Mapping[str, torch.Tensor], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in _under(tensors, "electra."):
        if not name.startswith("encoder.layer."):
            yield f"{prefix}{name}", tensor
            continue
        _, _, index, rest = name.split(".", 3)
        module, _, kind = rest.rpartition(".")
        layer = f"{prefix}layers.{index}"
        if module == "attention.self.query":  # which stands for all three
            parts = [tensors[f"electra.{name}".replace(".query.", f".{part}.")] for part in _ATTENTION_PARTS]
            yield f"{layer}.query_key_value.{kind}", torch.cat(parts)
        elif not module.startswith("attention.self."):
            yield f"{layer}.{_OUR_LAYER_NAMES[module]}.{kind}", tensor


def to_transformers(model: Electra) -> tuple[ElectraForMaskedLM, ElectraForPreTraining]:
    """Return generator and discriminator with copies of the model's weights."""
    tensors = {name: tensor.detach().float().clone() for name, tensor in model.state_dict().items()}
    generator = ElectraForMaskedLM(transformers_config(model.generator.config))
    discriminator = ElectraForPreTraining(transformers_config(model.discriminator.config))
    generator.load_state_dict(generator_tensors(tensors), strict=True)
    discriminator.load_state_dict(discriminator_tensors(tensors), strict=True)
    return generator.eval(), discriminator.eval()
