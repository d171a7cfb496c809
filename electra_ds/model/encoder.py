"""The transformer encoder of ELECTRA, the same function as transformers' `ElectraModel`.

It differs only in how it runs: query, key and value are one matrix product, attention is
`scaled_dot_product_attention`, and there is no attention mask if nothing is padded.
Shape suffixes: B sequences, T positions, E embedding size, H hidden size, N heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from electra_ds.model.kernels import attention, dropout, dropout_add, feed_forward


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of one encoder, with the names of transformers' `ElectraConfig`."""

    vocab_size: int
    embedding_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    initializer_range: float
    layer_norm_eps: float
    pad_token_id: int
    type_vocab_size: int = 2


class Embeddings(nn.Module):
    """Token, position and segment tables, LayerNorm, dropout: ids [B, T] -> [B, T, E]."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size = config.embedding_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.hidden_dropout = config.hidden_dropout_prob

    def forward(
        self, ids_BT: torch.Tensor, segments_BT: torch.Tensor | None, positions_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        # Read the weight in both cases: at ZeRO stage 3 all ranks must gather parameters in the same order, but perhaps
        # only some ranks have several sequences in a row.
        table = self.position_embeddings.weight
        if positions_BT is None:
            positions = table[: ids_BT.shape[1]]
        else:
            positions = functional.embedding(positions_BT, table)
        if segments_BT is None:
            places = positions + self.token_type_embeddings.weight[0]
        else:
            places = positions + self.token_type_embeddings(segments_BT.long())
        normed_BTE = self.LayerNorm(self.word_embeddings(ids_BT) + places)
        return dropout(normed_BTE, self.hidden_dropout if self.training else 0.0)


class Layer(nn.Module):
    """One post-LayerNorm transformer layer: [B, T, H] -> [B, T, H]."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.hidden_dropout = config.hidden_dropout_prob
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.attention_output = nn.Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(hidden, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, hidden)
        self.output_norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)

    def forward(
        self, hidden_BTH: torch.Tensor, attend_B1QT: torch.Tensor | None, *, is_checkpointed: bool = False
    ) -> torch.Tensor:
        """is_checkpointed: keep only the input for the backward pass, which recomputes the layer with the same dropout
        and autocast."""
        if is_checkpointed:
            # Checkpoint inside the module, not around its call: the hooks in which ZeRO stage 3 gathers and releases
            # weights must not run again in the middle of the layer's backward pass.
            output_BTH: torch.Tensor = checkpoint(self._run, hidden_BTH, attend_B1QT, use_reentrant=False)
            return output_BTH
        return self._run(hidden_BTH, attend_B1QT)

    def _run(self, hidden_BTH: torch.Tensor, attend_B1QT: torch.Tensor | None) -> torch.Tensor:
        attention_dropout, hidden_dropout = (self.attention_dropout, self.hidden_dropout) if self.training else (0, 0)
        context_BTH = attention(self.query_key_value(hidden_BTH), attend_B1QT, self.num_heads, attention_dropout)
        hidden_BTH = self.attention_norm(dropout_add(self.attention_output(context_BTH), hidden_BTH, hidden_dropout))
        inner_BTH = feed_forward(hidden_BTH, self.intermediate, self.output)
        summed_BTH = dropout_add(inner_BTH, hidden_BTH, hidden_dropout)
        # Do not call the module itself: torch ends the recomputation of a layer with an exception in its last
        # operation, so the module's hook, in which ZeRO stage 3 removes it from a list, would not run.
        norm = self.output_norm
        return functional.layer_norm(summed_BTH, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class Encoder(nn.Module):
    """Embeddings, a projection if embedding and hidden size differ, and the layers."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointed_layers = 0
        """The number of layers, from the first, that keep only their input and are recomputed in the backward pass. An
        engine sets it."""
        self.embeddings = Embeddings(config)
        self.embeddings_project = (
            nn.Linear(config.embedding_size, config.hidden_size)
            if config.embedding_size != config.hidden_size
            else nn.Identity()
        )
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self,
        ids_BT: torch.Tensor,
        attend_B1QT: torch.Tensor | None,
        segments_BT: torch.Tensor | None = None,
        positions_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return hidden states [B, T, H].

        attend_B1QT: a mask from `kernels.shared_mask`, with Q = T queries, or 1 for an entire row; None to mask
        nothing. segments_BT: True in the second segment; None if there is only one. positions_BT: positions in rows
        with several sequences.
        """
        hidden_BTH = self.embeddings_project(self.embeddings(ids_BT, segments_BT, positions_BT))
        num_checkpointed = self.checkpointed_layers if self.training and torch.is_grad_enabled() else 0
        for index, layer in enumerate(self.layers):
            hidden_BTH = layer(hidden_BTH, attend_B1QT, is_checkpointed=index < num_checkpointed)
        return hidden_BTH
