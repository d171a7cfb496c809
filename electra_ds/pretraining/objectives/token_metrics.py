"""Metrics of a network that predicts selected tokens, such as a generator, on held-out text.

Shape suffixes: M selected positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from electra_ds.pretraining.masked_batch import MaskedBatch, MicroBatch


class PredictedTokens(NamedTuple):
    """Results of one micro-batch at its selected positions."""

    loss_sum: float
    nats: np.ndarray
    targets: np.ndarray
    shown: np.ndarray
    """The tokens that the network saw."""
    best_hits: np.ndarray
    """True where the most probable token is the original."""
    drawn_hits: np.ndarray
    """True where the drawn token is the original."""


def predicted_tokens(
    micro_batch: MicroBatch,
    loss_sum: torch.Tensor,
    losses_M: torch.Tensor,
    best_M: torch.Tensor,
    drawn_M: torch.Tensor,
) -> PredictedTokens:
    """Return the results of a held-out micro-batch, in CPU memory."""
    targets = micro_batch.targets
    shown = micro_batch.masked_ids_BT.flatten()[micro_batch.selected_M]
    return PredictedTokens(
        loss_sum=loss_sum.item(),
        nats=losses_M.cpu().numpy(),
        targets=targets.cpu().numpy(),
        shown=shown.cpu().numpy(),
        best_hits=(best_M == targets).cpu().numpy(),
        drawn_hits=(drawn_M == targets).cpu().numpy(),
    )


def token_labels(name: str) -> dict[str, str]:
    """Return the labels of `token_metrics`, for a network of this name."""
    return {
        f"{name}_loss": f"{name} loss at all selected tokens (nats)",
        f"{name}_masked_loss": f"{name} loss at [MASK] (nats)",
        "unigram_loss": "  loss of the training unigram there (nats)",
        f"{name}_gain": f"  gain of the {name} over it (nats)",
        f"{name}_accuracy": f"{name} accuracy at [MASK], argmax",
    }


def token_metrics(
    name: str, batch: MaskedBatch, chunks: Sequence[PredictedTokens], unigram_nats_V: np.ndarray
) -> dict[str, float]:
    """Return the metrics of all micro-batches together; losses in nats, shares in [0, 1].

    `NAME_loss` is the mean over the selected positions, as in training, and everything else is a mean over those that
    the network saw as [MASK]. `unigram_loss` is the cross-entropy of the tokens there under the training text's unigram
    distribution, and `NAME_gain` what the network gains over it from context.
    """
    masked = np.concatenate([chunk.shown for chunk in chunks]) == batch.mask_token_id
    nats = _mean(masked, (chunk.nats for chunk in chunks))
    unigram = _mean(masked, (unigram_nats_V[chunk.targets] for chunk in chunks))
    return {
        f"{name}_loss": sum(chunk.loss_sum for chunk in chunks) / batch.num_selected,
        f"{name}_masked_loss": nats,
        "unigram_loss": unigram,
        f"{name}_gain": unigram - nats,
        f"{name}_accuracy": _mean(masked, (chunk.best_hits for chunk in chunks)),
        f"{name}_sampled_accuracy": _mean(masked, (chunk.drawn_hits for chunk in chunks)),
    }


def describe_tokens(name: str, metrics: Mapping[str, float]) -> str:
    """Return the part of a line about an evaluation that is about the predicted tokens."""
    return (
        f"{name} loss {metrics[f'{name}_loss']:.3f} ({metrics[f'{name}_masked_loss']:.3f} at [MASK], a gain of "
        f"{metrics[f'{name}_gain']:+.3f} nats over the unigram)"
    )


def _mean(masked: np.ndarray, parts: Iterable[np.ndarray]) -> float:
    return float(np.concatenate(list(parts))[masked].mean(dtype=np.float64))
