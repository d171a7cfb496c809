"""What the model is given: the tensors of one micro-batch.

A row holds one sequence and its padding, or several sequences that do not see each other. Shape suffixes: B rows,
T positions, M selected positions, Q queries: T, or 1 where all of a row's queries see the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch


class MicroBatch(NamedTuple):
    """Tensors of one micro-batch, all on one device."""

    ids_BT: torch.Tensor
    """int64, the original tokens with [CLS], [SEP] and padding."""
    generator_ids_BT: torch.Tensor
    """int64, the same with [MASK] where the generator sees one."""
    selected_M: torch.Tensor
    """int64 indices into the flattened [B * T] of the positions the generator predicts, in the order of the sequences,
    so that samples drawn under one layout of the rows can be replayed under another."""
    replaced_M: torch.Tensor
    """bool, whether the discriminator's input takes the generator's sample there."""
    noise_keys_M: torch.Tensor
    """int32 keys of the sampling noise."""
    counted_BT: torch.Tensor
    """bool, positions that count in the discriminator's loss."""
    sequences_BT: torch.Tensor | None
    """int32, which sequence of the micro-batch a place belongs to, counted from 1, and 0 at padding; None where every
    row is one sequence without padding."""
    segments_BT: torch.Tensor | None = None
    """bool, True in the second segment; None where there is only one."""
    positions_BT: torch.Tensor | None = None
    """int64, each token's position in its own sequence; None where every row is one sequence."""
    counts_M: torch.Tensor | None = None
    """bool, False where a selected position only fills the micro-batch up; None where none does."""
    temperature: torch.Tensor | None = None
    """fp32 scalar, the temperature of the softmax that replacements are drawn from; None for 1."""

    @property
    def device(self) -> torch.device:
        return self.ids_BT.device

    @property
    def is_static(self) -> bool:
        """Whether it has the shape that a compiled forward takes."""
        return self.counts_M is not None

    def filled(self, size: int) -> MicroBatch:
        """The same with `size` selected positions, so that micro-batches have one shape.

        What is added points at the first place, a [CLS], which it neither replaces nor predicts.
        """
        added = size - len(self.selected_M)

        def longer(tensor_M: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor_M, tensor_M.new_zeros(added)])

        return self._replace(
            selected_M=longer(self.selected_M),
            replaced_M=longer(self.replaced_M),
            noise_keys_M=longer(self.noise_keys_M),
            counts_M=longer(torch.ones_like(self.replaced_M)),
        )

    def attention_mask(self) -> torch.Tensor | None:
        """bool [B, 1, Q, T], which places each query sees: those of its own sequence. None where all see all.

        Made where the tensors are, since with several sequences in a row it is T times as large as they. There
        padding sees padding, so that no query sees nothing.
        """
        if self.sequences_BT is None:
            return None
        if self.positions_BT is None:
            return (self.sequences_BT > 0)[:, None, None, :]
        return self.sequences_BT[:, None, :, None] == self.sequences_BT[:, None, None, :]

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        return self._replace(**moved(self._asdict(), device))


def moved(tensors: Mapping[str, torch.Tensor | None], device: torch.device) -> dict[str, torch.Tensor]:
    """Those that are there, on another device; to a GPU from pinned memory, so that the host does not wait for the
    copy."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    return {name: move(tensor) for name, tensor in tensors.items() if tensor is not None}
