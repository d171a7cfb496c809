"""The discriminator's loss as a sum, so that a batch may be cut anywhere and normalised once.

Shape suffixes: B sequences, T positions.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def discriminator_loss_sum(
    logits_BT: torch.Tensor, is_replaced_BT: torch.Tensor, counted_BT: torch.Tensor
) -> torch.Tensor:
    """Sum over the counted positions of the binary cross-entropies in nats, in fp32. ELECTRA paper, eq. 3."""
    losses = functional.binary_cross_entropy_with_logits(logits_BT.float(), is_replaced_BT.float(), reduction="none")
    return torch.where(counted_BT, losses, 0.0).sum()
