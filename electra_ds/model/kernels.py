"""Parts of a layer with their own backward pass, which needs less memory or time than autograd's.

On a CPU torch draws dropout one Bernoulli number at a time (some 5 ns per element, a tenth of a step), keeps the mask
in fp32, and runs attention with dropout as a chain of operations. Here each element of a mask uses 16 bits of a random
word and is stored as one byte. On other devices torch's own kernels are equally good and are used instead.

Shape suffixes: B rows, T positions, Q queries, N heads, D head size, H hidden size, F feed-forward size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

# Attention scores to compute at a time, so that they stay in a core's cache together with their temporaries.
_SCORES_AT_ONCE = 1 << 18


def dropout(hidden: torch.Tensor, probability: float) -> torch.Tensor:
    """Zero each element with the given probability and scale up the others, using torch's random numbers."""
    if not probability:
        return hidden
    if not _is_eager_cpu(hidden):
        return functional.dropout(hidden, probability)
    return _DropoutAdd.apply(hidden, torch.zeros((), dtype=hidden.dtype), probability)


def dropout_add(hidden: torch.Tensor, residual: torch.Tensor, probability: float) -> torch.Tensor:
    """Return residual + dropout(hidden), in the wider of the two dtypes."""
    if not probability:
        return residual + hidden
    if not _is_eager_cpu(hidden):
        return residual + functional.dropout(hidden, probability)
    return _DropoutAdd.apply(hidden, residual, probability)


def attention(
    query_key_value_BTH: torch.Tensor, attend_B1QT: torch.Tensor | None, num_heads: int, dropout_probability: float
) -> torch.Tensor:
    """Compute self-attention from concatenated queries, keys and values, [B, T, 3 * H] -> [B, T, H].

    attend_B1QT: a mask from `shared_mask`, with Q = T queries, or 1 for all of them; None to mask nothing.
    """
    batch, length, width = query_key_value_BTH.shape
    if _is_eager_cpu(query_key_value_BTH) and dropout_probability:
        return _AttentionWithDropout.apply(query_key_value_BTH, attend_B1QT, num_heads, dropout_probability)
    query, key, value = query_key_value_BTH.view(batch, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    context_BNTD = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attend_B1QT, dropout_p=dropout_probability
    )
    return context_BNTD.transpose(1, 2).reshape(batch, length, width // 3)


def shared_mask(attend_B1QT: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the mask in the form that the device's attention needs, so that all layers can share it.

    On a GPU it is additive, since torch would convert a boolean mask in every layer, and each would keep a copy.
    dtype: the dtype of queries and keys.
    """
    if attend_B1QT is None or attend_B1QT.device.type == "cpu":
        return attend_B1QT
    return torch.zeros_like(attend_B1QT, dtype=dtype).masked_fill_(~attend_B1QT, float("-inf"))


def feed_forward(hidden_BTH: torch.Tensor, intermediate: nn.Linear, output: nn.Linear) -> torch.Tensor:
    """Return output(gelu(intermediate(hidden))).

    The backward pass recomputes GELU, so that its result, the largest tensor of a layer, need not be kept.
    """
    device_type = hidden_BTH.device.type
    if torch.is_autocast_enabled(device_type):
        hidden_BTH = hidden_BTH.to(torch.get_autocast_dtype(device_type))
    return _FeedForward.apply(hidden_BTH, intermediate.weight, intermediate.bias, output.weight, output.bias)


def _is_eager_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _kept(shape: torch.Size, probability: float) -> tuple[torch.Tensor, float]:
    """Return an int8 mask, 1 for kept elements, and their scale factor. The share is exact to 2^-16."""
    size = shape.numel()
    threshold = min(max(round((1.0 - probability) * 65536), 1), 65535)
    words = torch.empty((size + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return (words.view(torch.int16)[:size] < threshold - 32768).view(torch.int8).view(shape), 65536 / threshold


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, residual: torch.Tensor, probability: float) -> torch.Tensor:
        mask, ctx.scale = _kept(hidden.shape, probability)
        ctx.save_for_backward(mask)
        ctx.dtypes = hidden.dtype, residual.dtype
        return torch.addcmul(residual, hidden, mask, value=ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), (mask,) = grads, ctx.saved_tensors
        hidden_dtype, residual_dtype = ctx.dtypes
        grad_hidden = torch.mul(grad, mask).mul_(ctx.scale).to(hidden_dtype)
        return grad_hidden, grad.to(residual_dtype) if ctx.needs_input_grad[1] else None, None


class _AttentionWithDropout(torch.autograd.Function):
    """Attention in pieces of a few sequences, which keeps the probabilities and a one-byte mask per element."""

    @staticmethod
    def forward(
        ctx: Any, query_key_value: torch.Tensor, attend_B1QT: torch.Tensor | None, num_heads: int, probability: float
    ) -> torch.Tensor:
        batch, length, _ = query_key_value.shape
        heads = query_key_value.view(batch, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
        context_BTND = query_key_value.new_empty(batch, length, num_heads, heads.shape[-1])
        kept = []
        for rows in _pieces(batch, num_heads * length * length):
            query, key, value = (part[rows].reshape(-1, length, part.shape[-1]) for part in heads)
            scores = _product(query, key.transpose(1, 2), heads.shape[-1] ** -0.5)
            if attend_B1QT is not None:
                by_head = scores.view(-1, num_heads, length, length)
                by_head.masked_fill_(~attend_B1QT[rows], float("-inf"))
            probabilities = torch.softmax(scores, dim=-1)
            mask, ctx.scale = _kept(scores.shape, probability)
            context = _product(probabilities * mask, value, ctx.scale)
            context_BTND[rows] = context.view(-1, num_heads, *context.shape[1:]).transpose(1, 2)
            kept += [probabilities, mask]
        ctx.save_for_backward(query_key_value, *kept)
        ctx.num_heads = num_heads
        return context_BTND.view(batch, length, -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_key_value, *kept = ctx.saved_tensors
        batch, length, _ = query_key_value.shape
        heads = query_key_value.view(batch, length, 3, ctx.num_heads, -1).permute(2, 0, 3, 1, 4)
        result = torch.empty_like(query_key_value)
        targets = result.view(batch, length, 3, ctx.num_heads, -1).permute(2, 0, 3, 1, 4)
        grad_BNTD = grads[0].view(batch, length, ctx.num_heads, -1).transpose(1, 2)
        root = heads.shape[-1] ** -0.5
        for piece, rows in enumerate(_pieces(batch, ctx.num_heads * length * length)):
            query, key, value, grad = (part[rows].reshape(-1, length, part.shape[-1]) for part in (*heads, grad_BNTD))
            probabilities, mask = kept[2 * piece : 2 * piece + 2]
            grad_value = _product((probabilities * mask).transpose(1, 2), grad, ctx.scale)
            grad_probabilities = _product(grad, value.transpose(1, 2), ctx.scale).mul_(mask)
            grad_scores = torch.ops.aten._softmax_backward_data(
                grad_probabilities, probabilities, -1, probabilities.dtype
            )
            grad_query = _product(grad_scores, key, root)
            grad_key = _product(grad_scores.transpose(1, 2), query, root)
            for target, part in zip(targets, (grad_query, grad_key, grad_value), strict=True):
                target[rows] = part.view(-1, ctx.num_heads, *part.shape[1:])
        return result, None, None, None


def _pieces(batch: int, scores_of_one: int) -> list[slice]:
    size = max(1, _SCORES_AT_ONCE // scores_of_one)
    return [slice(first, first + size) for first in range(0, batch, size)]


def _product(left: torch.Tensor, right: torch.Tensor, factor: float) -> torch.Tensor:
    """Return factor * left @ right, batched."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=factor)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight_FH: torch.Tensor,
        bias_F: torch.Tensor,
        out_HF: torch.Tensor,
        out_bias_H: torch.Tensor,
    ) -> torch.Tensor:
        inner = functional.linear(hidden, weight_FH.to(hidden.dtype), bias_F.to(hidden.dtype))
        ctx.save_for_backward(hidden, inner, weight_FH, out_HF)
        return functional.linear(functional.gelu(inner), out_HF.to(hidden.dtype), out_bias_H.to(hidden.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden, inner, weight_FH, out_HF = ctx.saved_tensors
        grad, inner, rows = grads[0].flatten(0, -2), inner.flatten(0, -2), hidden.flatten(0, -2)
        grad_out = grad.t() @ functional.gelu(inner)
        grad_inner = torch.ops.aten.gelu_backward(grad @ out_HF.to(grad.dtype), inner)
        return (
            (grad_inner @ weight_FH.to(grad.dtype)).view_as(hidden),
            (grad_inner.t() @ rows).to(weight_FH.dtype),
            grad_inner.sum(0).to(weight_FH.dtype),
            grad_out.to(out_HF.dtype),
            grad.sum(0).to(out_HF.dtype),
        )
