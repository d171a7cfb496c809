"""What the model is given: the tensors of one micro-batch.

Shape suffixes: B sequences, T positions, M selected positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class MicroBatch(NamedTuple):
    """Tensors of one micro-batch, all on one device."""

    ids_BT: torch.Tensor
    """int64, the original tokens with [CLS], [SEP] and padding."""
    generator_ids_BT: torch.Tensor
    """int64, the same with [MASK] where the generator sees one."""
    selected_M: torch.Tensor
    """int64 indices into the flattened [B * T] of the positions the generator predicts, ascending."""
    replaced_M: torch.Tensor
    """bool, whether the discriminator's input takes the generator's sample there."""
    noise_keys_M: torch.Tensor
    """int32 keys of the sampling noise."""
    counted_BT: torch.Tensor
    """bool, positions that count in the discriminator's loss."""
    attend_B11T: torch.Tensor | None
    """bool, True at real tokens; None where nothing is padded."""
    segments_BT: torch.Tensor | None = None
    """bool, True in the second segment; None where there is only one."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device, copied while the host goes on."""

        moved = {
            name: tensor.to(device, non_blocking=True) for name, tensor in self._asdict().items() if tensor is not None
        }
        return self._replace(**moved)
