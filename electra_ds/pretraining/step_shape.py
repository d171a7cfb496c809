"""The sizes of a training step, from which its FLOPs, its memory and its time follow (`run_time.py`, `memory.py`).

An objective describes its step once, as the networks that the step runs and the heads that each of them has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from electra_ds.config.sections import SelectionSection
from electra_ds.model.encoder import EncoderConfig
from electra_ds.pretraining.masking import selected_limit


@dataclass(frozen=True)
class Network:
    """One encoder with its heads."""

    name: str
    config: EncoderConfig
    parameters: int
    """The number of parameters; those that it shares with another network count for only one of the two."""
    predicts_at: Literal["selected", "all", "none"] = "none"
    """The positions at which it computes logits over the vocabulary."""
    draws: bool = False
    """True if it draws tokens from these logits."""
    judges: bool = False
    """True if it computes one logit for every position."""
    copies: bool = False
    """True if it computes the probability to copy the input token at every position."""
    is_trained: bool = True
    has_own_encoder: bool = True
    """False if all weights of its encoder are those of another network."""


@dataclass(frozen=True)
class StepShape:
    """The sizes of a step of any objective."""

    networks: tuple[Network, ...]
    """In the order of their forward passes."""
    global_batch_size: int
    length: int
    """Tokens of a full row."""
    masking: SelectionSection
    has_temperature: bool = False
    """True if tokens are drawn at another temperature than 1."""

    def positions(self, network: Network, tokens: int, selected: int) -> int:
        """Return the number of positions at which a network computes logits over the vocabulary."""
        return {"selected": selected, "all": tokens, "none": 0}[network.predicts_at]

    def selected(self, rows: int) -> int:
        """Return the number of selected positions that practically no batch of this many full rows exceeds."""
        return selected_limit(self.masking, rows, self.length)

    @property
    def trained_parameters(self) -> int:
        return sum(network.parameters for network in self.networks if network.is_trained)

    @property
    def frozen_parameters(self) -> int:
        return sum(network.parameters for network in self.networks if not network.is_trained)


def encoder_parameters(config: EncoderConfig) -> int:
    """Return the number of parameters of an encoder's projection and layers."""
    hidden, inner = config.hidden_size, config.intermediate_size
    projection = (config.embedding_size + 1) * hidden if config.embedding_size != hidden else 0
    attention = 4 * (hidden + 1) * hidden
    feed_forward = (hidden + 1) * inner + (inner + 1) * hidden
    return projection + config.num_hidden_layers * (attention + feed_forward + 4 * hidden)


def embedding_parameters(config: EncoderConfig) -> int:
    """Return the number of parameters of an encoder's embedding tables and their LayerNorm."""
    rows = config.vocab_size + config.max_position_embeddings + config.type_vocab_size + 2
    return rows * config.embedding_size


def token_head_parameters(config: EncoderConfig) -> int:
    """Return the number of parameters of a head that predicts tokens, without the token table."""
    return (config.hidden_size + 1) * config.embedding_size + 2 * config.embedding_size + config.vocab_size


def detection_head_parameters(config: EncoderConfig) -> int:
    """Return the number of parameters of a head with one logit for each position."""
    hidden = config.hidden_size
    return (hidden + 1) * hidden + hidden + 1
