"""The two pretraining heads, the same functions as in transformers' ELECTRA.

Shape suffixes: M masked positions, B sequences, T positions, H hidden size, E embedding size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from electra_ds.model.encoder import EncoderConfig


class GeneratorHead(nn.Module):
    """Vocabulary logits: dense, GELU, LayerNorm, then the token table with a bias of its own."""

    def __init__(self, config: EncoderConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.embedding_size, config.vocab_size)
        self.decoder.weight = word_embeddings.weight

    def forward(self, hidden_MH: torch.Tensor) -> torch.Tensor:
        """Logits [M, V] of hidden states already gathered at the masked positions."""
        return self.decoder(self.LayerNorm(functional.gelu(self.dense(hidden_MH))))


class DiscriminatorHead(nn.Module):
    """One logit per position, positive where the token looks replaced: [B, T, H] -> [B, T]."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense_prediction = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        return self.dense_prediction(functional.gelu(self.dense(hidden_BTH))).squeeze(-1)
