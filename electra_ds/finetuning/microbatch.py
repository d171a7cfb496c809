"""What a model that is being finetuned is given: the tensors of one micro-batch.

Shape suffixes: B inputs, T positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from electra_ds.pretraining.microbatch import moved


class TaskMicroBatch(NamedTuple):
    """Tensors of one micro-batch, all on one device; what the task or the model does not have is None."""

    ids_BT: torch.Tensor
    """int64, with special tokens and padding."""
    attended_BT: torch.Tensor
    """bool, False at padding."""
    segments_BT: torch.Tensor | None = None
    """int64, 0 or 1."""
    labels_B: torch.Tensor | None = None
    """int64 classes, or float32 scores."""
    starts_B: torch.Tensor | None = None
    """int64, the answer's first position; 0, the first token's, where there is none."""
    ends_B: torch.Tensor | None = None
    """int64, its last position."""
    is_impossible_B: torch.Tensor | None = None
    """float32, 1 where there is no answer."""
    answerable_BT: torch.Tensor | None = None
    """bool, the context's positions, the special token after them, and the first one (the original's choice)."""

    def to(self, device: torch.device) -> TaskMicroBatch:
        """The same on another device."""
        return self._replace(**moved(self._asdict(), device))
