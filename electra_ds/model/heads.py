"""The two pretraining heads, the same functions as in transformers' ELECTRA.

Shape suffixes: M masked positions, B sequences, T positions, H hidden size, E embedding size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from electra_ds.model.encoder import EncoderConfig
from electra_ds.model.prediction import Prediction, predict_tokens


class GeneratorHead(nn.Module):
    """Token predictions: dense, GELU, LayerNorm, then logits from the token table and a bias."""

    def __init__(self, config: EncoderConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.embedding_size, config.vocab_size)
        self.decoder.weight = word_embeddings.weight

    def forward(
        self, hidden_MH: torch.Tensor, targets_M: torch.Tensor, noise_keys_M: torch.Tensor,
        column_keys_V: torch.Tensor, temperature: torch.Tensor | None, counts_M: torch.Tensor | None = None,
    ) -> Prediction:  # fmt: skip
        """Return loss and samples for the hidden states at the masked positions."""
        return predict_tokens(
            self.transform(hidden_MH), self.decoder.weight, self.decoder.bias, targets_M, noise_keys_M, column_keys_V,
            temperature, counts_M,
        )  # fmt: skip

    def transform(self, hidden_MH: torch.Tensor) -> torch.Tensor:
        """Return the vectors that the token table is multiplied with, [M, H] -> [M, E]."""
        return self.LayerNorm(functional.gelu(self.dense(hidden_MH)))


class DiscriminatorHead(nn.Module):
    """One logit per position, positive if the token looks replaced: [B, T, H] -> [B, T]."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense_prediction = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        return self.dense_prediction(functional.gelu(self.dense(hidden_BTH))).squeeze(-1)
