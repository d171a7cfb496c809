"""The two losses of ELECTRA as sums, so that a batch may be cut anywhere and normalised once.

Shape suffixes: M masked positions, V vocabulary, B sequences, T positions.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def generator_loss_sum(logits_MV: torch.Tensor, targets_M: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies in nats, in fp32. ELECTRA paper, eq. 2."""
    return functional.cross_entropy(logits_MV.float(), targets_M, reduction="sum")


def discriminator_loss_sum(
    logits_BT: torch.Tensor, is_replaced_BT: torch.Tensor, counted_BT: torch.Tensor
) -> torch.Tensor:
    """Sum over the counted positions of the binary cross-entropies in nats, in fp32. ELECTRA paper, eq. 3."""
    losses = functional.binary_cross_entropy_with_logits(logits_BT.float(), is_replaced_BT.float(), reduction="none")
    return torch.where(counted_BT, losses, 0.0).sum()
