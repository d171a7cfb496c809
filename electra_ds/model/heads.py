"""The pretraining heads, the same functions as in transformers' ELECTRA, and the loss over the vocabulary.

Loss and samples come from one pass over the logits, which are never all in memory. Rows are processed in pieces:
logits, softmax, loss, sample, and immediately the gradients of the head's inputs, so that nothing of size rows x
vocabulary outlives its piece. The gradients are those of the sum of losses, which backward scales, so that they do not
vanish in fp16, as they would after dividing by the number of rows before the product.

Shape suffixes: M selected positions, B sequences, T positions, H hidden size, E embedding size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from electra_ds.model.encoder import EncoderConfig

# Bytes of fp32 logits in a piece. More pieces cost nothing on a CPU, but a few kernel launches each on a GPU.
CPU_PIECE_BYTES = 8 << 20
GPU_PIECE_BYTES = 128 << 20
CPU_NOISE_BYTES = 1 << 20  # on a CPU samples are drawn in pieces whose noise stays in a core's cache


class Prediction(NamedTuple):
    """The output at the positions where tokens are predicted."""

    loss_sum: torch.Tensor
    """fp32 scalar, sum of the cross-entropies in nats (ELECTRA paper, eq. 2); the only field with a gradient."""
    losses_M: torch.Tensor
    """fp32, the terms of the sum."""
    best_M: torch.Tensor
    """int64, the most probable token."""
    samples_M: torch.Tensor
    """int64, one token drawn by `sample_tokens`; the most probable one if nothing is drawn."""


class Copy(NamedTuple):
    """The copy mechanism: with some probability the input token is copied, and otherwise a token is predicted.

    p(token) = c [token = input] + (1 - c) softmax(token), where c is the probability to copy. ELECTRA paper, section
    3.5, "All-Tokens MLM".
    """

    logits_M: torch.Tensor
    """The logits of the probability to copy."""
    is_original_M: torch.Tensor
    """bool, True if the input token is the target."""


def predict_tokens(
    hidden_ME: torch.Tensor,
    weight_VE: torch.Tensor,
    bias_V: torch.Tensor,
    targets_M: torch.Tensor,
    noise_keys_M: torch.Tensor | None = None,
    column_keys_V: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    counts_M: torch.Tensor | None = None,
    copy: Copy | None = None,
) -> Prediction:
    """Compute loss and samples for logits hidden @ weight.T + bias, which have hidden's dtype (or autocast's).

    Samples are drawn from softmax(logits / temperature). Everything except the logits is fp32. noise_keys_M,
    column_keys_V: keys of the noise, see `sample_tokens`; None to draw nothing. temperature: fp32 scalar; None for 1.
    counts_M: bool, False at rows whose loss counts as 0; None if all rows count. copy: the copy mechanism, whose
    probabilities the losses then have; None for the softmax alone.
    """
    device_type = hidden_ME.device.type
    if torch.is_autocast_enabled(device_type):
        hidden_ME = hidden_ME.to(torch.get_autocast_dtype(device_type))
    found = _Prediction.apply(
        hidden_ME,
        weight_VE,
        bias_V,
        targets_M,
        noise_keys_M,
        column_keys_V,
        temperature,
        counts_M,
        None if copy is None else copy.logits_M,
        None if copy is None else copy.is_original_M,
        torch.is_grad_enabled(),
    )
    return Prediction(*found)


class _Prediction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ME: torch.Tensor,
        weight_VE: torch.Tensor,
        bias_V: torch.Tensor,
        targets_M: torch.Tensor,
        noise_keys_M: torch.Tensor | None,
        column_keys_V: torch.Tensor | None,
        temperature: torch.Tensor | None,
        counts_M: torch.Tensor | None,
        copy_logits_M: torch.Tensor | None,
        is_original_M: torch.Tensor | None,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, ...]:
        dtype = hidden_ME.dtype
        weight, bias = weight_VE.to(dtype), bias_V.to(dtype)
        grad_hidden = torch.empty_like(hidden_ME) if with_gradient else None
        grad_weight = torch.zeros_like(weight_VE, dtype=torch.float32) if with_gradient else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if with_gradient else None
        grads_copy: list[torch.Tensor] = []
        parts = []
        for rows in _pieces(hidden_ME, len(weight_VE)):
            hidden, targets = hidden_ME[rows], targets_M[rows, None]
            logits = functional.linear(hidden, weight, bias).float()
            highest, best = logits.max(dim=-1)
            probabilities = torch.softmax(logits, dim=-1)
            # The highest probability is 1 / sum(exp(logit - highest)).
            normaliser = highest - probabilities.gather(1, best[:, None]).squeeze(1).log()
            losses = normaliser - logits.gather(1, targets).squeeze(1)
            share = None  # of the softmax in the gradient
            if copy_logits_M is not None and is_original_M is not None:
                losses, share, grad_copy = _with_copy(losses, copy_logits_M[rows].float(), is_original_M[rows])
                grads_copy.append(grad_copy if counts_M is None else torch.where(counts_M[rows], grad_copy, 0.0))
            if counts_M is not None:
                losses = torch.where(counts_M[rows], losses, 0.0)
            drawn = best
            if noise_keys_M is not None and column_keys_V is not None:
                weights = probabilities if temperature is None else torch.softmax(logits / temperature, dim=-1)
                drawn = sample_tokens(weights, noise_keys_M[rows], column_keys_V)
            parts.append((losses, best, drawn))
            if grad_hidden is not None and grad_weight is not None and grad_bias is not None:
                ones = torch.ones_like(targets, dtype=torch.float32)
                grad_logits = probabilities.scatter_add_(1, targets, -ones)
                if share is not None:
                    grad_logits *= share[:, None]
                if counts_M is not None:
                    grad_logits = torch.where(counts_M[rows, None], grad_logits, 0.0)
                grad_bias += grad_logits.sum(0)
                grad_logits = grad_logits.to(dtype)
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
                if dtype == torch.float32:
                    grad_weight.addmm_(grad_logits.t(), hidden)
                else:
                    grad_weight += grad_logits.t() @ hidden
        losses_M, best_M, samples_M = (torch.cat(column) for column in zip(*parts, strict=True))
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, torch.cat(grads_copy) if grads_copy else None)
            ctx.dtypes = weight_VE.dtype, bias_V.dtype, None if copy_logits_M is None else copy_logits_M.dtype
        ctx.mark_non_differentiable(losses_M, best_M, samples_M)
        return losses_M.sum(), losses_M, best_M, samples_M

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias, grad_copy = ctx.saved_tensors
        weight_dtype, bias_dtype, copy_dtype = ctx.dtypes
        scale = grads[0]
        return (
            (grad_hidden.float() * scale).to(grad_hidden.dtype),  # in half precision the scale would be rounded too
            (grad_weight * scale).to(weight_dtype),
            (grad_bias * scale).to(bias_dtype),
            *[None] * 5,
            None if grad_copy is None else (grad_copy * scale).to(copy_dtype),
            None,
            None,
        )


def _with_copy(
    losses_M: torch.Tensor, copy_logits_M: torch.Tensor, is_original_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the losses under the copy mechanism, their derivatives by those of the softmax, and by the copy logits.

    With p = c [input = target] + (1 - c) q, -log p is computed from logarithms, so that it is accurate for a c near 0
    or 1. Its derivative by -log q is (1 - c) q / p, and by c's logit it is (1 - c) q / p - (1 - c).
    """
    predicted_M = functional.logsigmoid(-copy_logits_M) - losses_M
    copied_M = torch.where(is_original_M, functional.logsigmoid(copy_logits_M), -torch.inf)
    log_p_M = torch.logaddexp(copied_M, predicted_M)
    share_M = torch.exp(predicted_M - log_p_M)
    return -log_p_M, share_M, share_M - torch.sigmoid(-copy_logits_M)


def _pieces(hidden_ME: torch.Tensor, vocab_size: int) -> list[slice]:
    piece_bytes = CPU_PIECE_BYTES if hidden_ME.device.type == "cpu" else GPU_PIECE_BYTES
    size = max(1, piece_bytes // (4 * vocab_size))
    return [slice(first, first + size) for first in range(0, max(1, len(hidden_ME)), size)]


def sample_tokens(weights_MV: torch.Tensor, noise_keys_M: torch.Tensor, column_keys_V: torch.Tensor) -> torch.Tensor:
    """Return int64 [M], one token per row, drawn with probability proportional to its weight (fp32, such as a softmax).

    This is an exponential race: with Exp(1) variates E keyed by `noise_keys_M` (int32) the largest weight / E wins. It
    equals Gumbel-argmax, log(weight) - log(E), without the logarithm. A draw does not depend on how the batch is split,
    and rounding almost never changes it. ELECTRA paper, section 2; google-research/electra samples by Gumbel-argmax.
    """
    rows = len(weights_MV)
    if weights_MV.device.type == "cpu":
        rows = max(1, CPU_NOISE_BYTES // (4 * weights_MV.shape[1]))
    samples = []
    for weights, noise_keys in zip(weights_MV.split(rows or 1), noise_keys_M.split(rows or 1), strict=True):
        noise = exponential_noise(noise_keys, column_keys_V)
        samples.append(torch.div(weights, noise, out=noise).max(dim=-1).indices)  # faster than argmax on a CPU
    return torch.cat(samples)


class TokenHead(nn.Module):
    """Predicts tokens: dense, GELU, LayerNorm, then logits from the token table and a bias."""

    def __init__(self, config: EncoderConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.embedding_size, config.vocab_size)
        self.decoder.weight = word_embeddings.weight

    def forward(
        self,
        hidden_MH: torch.Tensor,
        targets_M: torch.Tensor,
        noise_keys_M: torch.Tensor | None = None,
        column_keys_V: torch.Tensor | None = None,
        temperature: torch.Tensor | None = None,
        counts_M: torch.Tensor | None = None,
        copy: Copy | None = None,
    ) -> Prediction:
        """Return loss and samples for the hidden states of some positions. The arguments are as in `predict_tokens`."""
        return predict_tokens(
            self.transform(hidden_MH),
            self.decoder.weight,
            self.decoder.bias,
            targets_M,
            noise_keys_M,
            column_keys_V,
            temperature,
            counts_M,
            copy,
        )

    def transform(self, hidden_MH: torch.Tensor) -> torch.Tensor:
        """Return the vectors to multiply with the token table, [M, H] -> [M, E]."""
        return self.LayerNorm(functional.gelu(self.dense(hidden_MH)))


class DiscriminatorHead(nn.Module):
    """One logit per position, positive if the token looks replaced: [B, T, H] -> [B, T]."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense_prediction = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        return self.dense_prediction(functional.gelu(self.dense(hidden_BTH))).squeeze(-1)


# --- the noise of a sample


def column_keys(columns: int) -> torch.Tensor:
    """Return int32 [columns], the fixed hash of each column, such as a vocabulary id. Compute it once and keep it.

    The 32-bit finaliser of MurmurHash3, which is a bijection: two columns with one key would share their noise
    in every row, and the less likely of the two could never be drawn.
    """
    bits = np.arange(columns, dtype=np.uint32)
    with np.errstate(over="ignore"):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    return torch.from_numpy((bits ^ (bits >> np.uint32(16))).view(np.int32))


def exponential_noise(row_keys: torch.Tensor, column_keys: torch.Tensor) -> torch.Tensor:
    """Return float32 [rows, columns] of Exp(1) variates, each a function of only its row's and column's key.

    row_keys, column_keys: int32 hashes on one device. The two are combined and mixed by two rounds of
    multiplying and shifting; 31 bits become a uniform v, never 0, whose resolution near 0 is 2^-30, and -log1p(-v)
    keeps that resolution in the small values, which are the ones that win a race.
    """
    bits = row_keys[:, None] ^ column_keys[None, :]
    bits.mul_(-2048144789)  # 0x85EBCA6B
    bits.bitwise_xor_((bits >> 13).bitwise_and_(0x7FFFF))  # clears the sign bits that torch shifts in
    bits.mul_(-1028477387)  # 0xC2B2AE35
    bits.bitwise_xor_(bits >> 16)  # with the sign shifted in, the result is never negative
    return bits.bitwise_or_(1).mul(-(2.0**-31)).log1p_().neg_()
