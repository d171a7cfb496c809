"""Model FLOPs of one training step: 2 m n k for each product of an m x k and a k x n matrix, and nothing else.

What is recomputed (activation checkpointing, the backward pass of fused attention) is not counted, so that the number
says how much is learned from and not how it is run. Look-ups, norms, GELU and dropout are left out: below 2 % in
ELECTRA-Small. google-research/electra's flops_computation.py counts other things (look-ups as products with one-hot
matrices, and a backward pass as one forward pass), so its figures are not these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from electra_ds.model.encoder import EncoderConfig

# The backward pass of a product is two: one for each factor's gradient. Neither can be left out anywhere, since even
# the first product's input, the embeddings, is trained.
_PASSES = 3


class StepFlops(NamedTuple):
    """FLOPs of the forward pass, by part."""

    generator_encoder: int
    """The products with the layers' weights."""
    generator_attention: int
    """Queries with keys, and weights with values."""
    generator_head: int
    discriminator_encoder: int
    discriminator_attention: int
    discriminator_head: int
    embedding_projections: int
    """From the embedding size to the hidden size, in both networks; 0 where they are equal."""

    @property
    def forward(self) -> int:
        return sum(self)

    @property
    def forward_and_backward(self) -> int:
        return _PASSES * self.forward


def step_flops(
    generator: EncoderConfig, discriminator: EncoderConfig, lengths_B: Sequence[int] | np.ndarray, selected: int
) -> StepFlops:
    """One step over B sequences of so many tokens, `selected` of which the generator predicts.

    Padding is not in it, computed or not. The cut into micro-batches, rows and ranks changes nothing.
    """
    tokens, pairs = int(np.sum(lengths_B)), int(np.square(lengths_B, dtype=np.int64).sum())
    embedding, hidden = generator.embedding_size, generator.hidden_size
    return StepFlops(
        generator_encoder=_encoder(generator, tokens),
        generator_attention=_attention(generator, pairs),
        generator_head=2 * selected * embedding * (hidden + generator.vocab_size),
        discriminator_encoder=_encoder(discriminator, tokens),
        discriminator_attention=_attention(discriminator, pairs),
        discriminator_head=2 * tokens * discriminator.hidden_size * (discriminator.hidden_size + 1),
        embedding_projections=_projection(generator, tokens) + _projection(discriminator, tokens),
    )


def transformers_step_flops(
    generator: EncoderConfig, discriminator: EncoderConfig, lengths_B: Sequence[int] | np.ndarray
) -> StepFlops:
    """The same step as `ElectraForMaskedLM` and `ElectraForPreTraining` do it: vocabulary logits at every position."""
    return step_flops(generator, discriminator, lengths_B, selected=int(np.sum(lengths_B)))


def encoder_flops(config: EncoderConfig, lengths_B: Sequence[int] | np.ndarray) -> int:
    """Forward and backward pass of an encoder alone, as finetuning has it."""
    tokens, pairs = int(np.sum(lengths_B)), int(np.square(lengths_B, dtype=np.int64).sum())
    return _PASSES * (_encoder(config, tokens) + _attention(config, pairs) + _projection(config, tokens))


def _encoder(config: EncoderConfig, tokens: int) -> int:
    """Query, key, value and output, then the feed-forward's two."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return config.num_hidden_layers * 2 * tokens * (4 * hidden * hidden + 2 * hidden * inner)


def _attention(config: EncoderConfig, pairs: int) -> int:
    """Over all heads a product is as wide as the hidden size. `pairs` are of a query and a key."""
    return config.num_hidden_layers * 2 * (2 * pairs * config.hidden_size)


def _projection(config: EncoderConfig, tokens: int) -> int:
    if config.embedding_size == config.hidden_size:
        return 0
    return 2 * tokens * config.embedding_size * config.hidden_size
