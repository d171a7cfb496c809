"""Text with selected tokens to predict, as a global batch and as micro-batches on a device.

All objectives of the family use it: masked language modelling predicts the selected tokens from a text in which they
are masked, and a generator also draws tokens to put in their place.

A row of a micro-batch is one sequence with its padding, or several sequences that cannot attend to each other. Shape
suffixes: B rows, T positions, M selected positions, Q queries (T, or 1 if all of a row's queries attend to the same
positions).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from electra_ds.config.sections import SelectionSection
from electra_ds.data.packing import packed_rows
from electra_ds.pretraining.masking import Masks, before, selected_limit
from electra_ds.pretraining.objectives.base import PretrainingBatch, TextBatch
from electra_ds.training.step import LossTerm, moved

_FULL_ENOUGH = 0.75
"""Rows with a smaller share of tokens are packed, not compiled. Assumed: compiling saves a quarter of the time."""


class WeightedLoss(NamedTuple):
    """One of a step's losses."""

    weight: float
    over: Literal["selected", "counted"]
    """The tokens over which it is a mean."""


class MicroBatch(NamedTuple):
    """Tensors of one micro-batch, all on one device."""

    ids_BT: torch.Tensor
    """int64 [M], the original tokens with [CLS], [SEP] and padding."""
    masked_ids_BT: torch.Tensor
    """int64, the input of the network that predicts the selected tokens: some of them are [MASK] or random tokens."""
    selected_M: torch.Tensor
    """int64 indices into the flattened [B * T] of the positions whose tokens are predicted, in the order of the
    sequences, so that samples drawn with one layout of the rows can be replayed with another."""
    replaced_M: torch.Tensor
    """bool, True if the next network's input has the generator's sample at that position."""
    noise_keys_M: torch.Tensor | None
    """int32 keys of the sampling noise; None if no tokens are drawn."""
    counted_BT: torch.Tensor
    """bool, positions that count in a loss over all tokens, such as the discriminator's."""
    sequences_BT: torch.Tensor | None
    """int32, the number of the sequence in the micro-batch, counted from 1, and 0 at padding; None if every row is one
    sequence without padding."""
    segments_BT: torch.Tensor | None = None
    """bool, True in the second segment; None if there is only one."""
    positions_BT: torch.Tensor | None = None
    """int64, each token's position in its own sequence; None if every row is one sequence."""
    counts_M: torch.Tensor | None = None
    """bool, False for selected positions that `filled` added; None if there are none."""
    temperature: torch.Tensor | None = None
    """fp32 scalar, the temperature of the softmax from which replacements are drawn; None for 1."""
    samples_M: torch.Tensor | None = None
    """int64, tokens that were drawn before; None to draw them."""

    @property
    def device(self) -> torch.device:
        return self.ids_BT.device

    @property
    def is_static(self) -> bool:
        """True if it has the shape that a compiled forward pass accepts."""
        return self.counts_M is not None

    @property
    def targets(self) -> torch.Tensor:
        """int64 [M], the original tokens at the selected positions."""
        return self.ids_BT.flatten().index_select(0, self.selected_M)

    def at_selected(self, values_BTH: torch.Tensor) -> torch.Tensor:
        """Return the rows [M, H] of the selected positions."""
        return values_BTH.flatten(0, 1).index_select(0, self.selected_M)

    def corrupted(self, samples_M: torch.Tensor) -> torch.Tensor:
        """Return int64 [B, T], the text with samples in place of the selected tokens that are to be replaced."""
        tokens_M = torch.where(self.replaced_M, samples_M, self.targets)
        return self.ids_BT.flatten().index_copy(0, self.selected_M, tokens_M).view_as(self.ids_BT)

    def filled(self, size: int) -> MicroBatch:
        """Return the micro-batch padded to `size` selected positions, so that all micro-batches have one shape.

        The added positions point at the first token, a [CLS], which is neither replaced nor predicted.
        """
        added = size - len(self.selected_M)

        def longer(tensor_M: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor_M, tensor_M.new_zeros(added)])

        return self._replace(
            selected_M=longer(self.selected_M),
            replaced_M=longer(self.replaced_M),
            noise_keys_M=None if self.noise_keys_M is None else longer(self.noise_keys_M),
            samples_M=None if self.samples_M is None else longer(self.samples_M),
            counts_M=longer(torch.ones_like(self.replaced_M)),
        )

    def attention_mask(self) -> torch.Tensor | None:
        """Return bool [B, 1, Q, T], True where a query attends, which is in its own sequence; None to mask nothing.

        The mask is created on the device, since with several sequences in a row it is T times as large as the tensors.
        Padding then attends to padding, so that no query attends to nothing.
        """
        if self.sequences_BT is None:
            return None
        if self.positions_BT is None:
            return (self.sequences_BT > 0)[:, None, None, :]
        return self.sequences_BT[:, None, :, None] == self.sequences_BT[:, None, None, :]

    def to(self, device: torch.device) -> MicroBatch:
        """Return the micro-batch on another device."""
        return self._replace(**moved(self._asdict(), device))


@dataclass(frozen=True)
class MaskedBatch(TextBatch, PretrainingBatch):
    """The text of one optimizer step, with the tokens to predict, and noise to draw tokens."""

    masks: Masks
    counted_BT: np.ndarray
    """bool, True where a loss over all tokens counts, such as the discriminator's."""
    noise_keys_BT: np.ndarray | None
    """int32, keys of the noise with which tokens are drawn; None if none are drawn."""
    masking: SelectionSection
    losses: Mapping[str, WeightedLoss]
    temperature: float = 1.0
    random_ids_BT: np.ndarray | None = None
    """int64, the tokens to show in place of some selected ones, and -1 elsewhere; None if there are none."""
    drawn_BT: np.ndarray | None = None
    """int64, at the selected positions the tokens that were drawn before; None to draw them."""

    @property
    def num_selected(self) -> int:
        """The number of selected tokens."""
        return max(1, int(np.count_nonzero(self.masks.selected)))

    @property
    def num_counted(self) -> int:
        """The number of tokens that count in a loss over all tokens."""
        return max(1, int(np.count_nonzero(self.counted_BT)))

    @property
    def loss_terms(self) -> Mapping[str, LossTerm]:
        counts = {"selected": self.num_selected, "counted": self.num_counted}
        return {name: LossTerm(loss.weight, counts[loss.over]) for name, loss in self.losses.items()}

    def micro_batch(self, first: int, size: int, *, packed: bool = True) -> MicroBatch:
        """Return sequences `first` to `first + size` as tensors in ordinary memory.

        packed: put several short sequences into one row if that saves rows; otherwise each has its own row.
        """
        taken = slice(first, first + size)
        ids, lengths, second = self.ids_BT[taken], self.lengths_B[taken], self.second_segment_BT
        width = ids.shape[1]
        selected_M = np.flatnonzero(self.masks.selected[taken])
        masked_M, replaced_M, noise_keys_M, random_M, samples_M = (
            None if array_BT is None else array_BT[taken].reshape(-1)[selected_M]
            for array_BT in (
                self.masks.masked,
                self.masks.replaced,
                self.noise_keys_BT,
                self.random_ids_BT,
                self.drawn_BT,
            )
        )
        counted, second = self.counted_BT[taken], None if second is None else second[taken]
        sequences = positions = None
        if lengths.min() < width:
            sequences = np.arange(1, len(ids) + 1, dtype=np.int32)[:, None] * before(lengths, width)
            rows = packed_rows(lengths, width) if packed else None
            if rows is not None:
                ids, counted, sequences = rows.pack(ids), rows.pack(counted), rows.pack(sequences)
                second = None if second is None else rows.pack(second)
                positions, selected_M = rows.positions(width), rows.moved(selected_M, width)
        masked_ids = ids.copy()
        masked_ids.reshape(-1)[selected_M[masked_M]] = self.mask_token_id
        if random_M is not None:
            masked_ids.reshape(-1)[selected_M[random_M >= 0]] = random_M[random_M >= 0]
        return MicroBatch(
            ids_BT=torch.from_numpy(ids),
            masked_ids_BT=torch.from_numpy(masked_ids),
            selected_M=torch.from_numpy(selected_M),
            replaced_M=torch.from_numpy(replaced_M),
            noise_keys_M=None if noise_keys_M is None else torch.from_numpy(noise_keys_M),
            counted_BT=torch.from_numpy(counted),
            sequences_BT=None if sequences is None else torch.from_numpy(sequences),
            segments_BT=None if second is None else torch.from_numpy(second),
            positions_BT=None if positions is None else torch.from_numpy(positions),
            temperature=None if self.temperature == 1.0 else torch.tensor(self.temperature, dtype=torch.float32),
            samples_M=None if samples_M is None else torch.from_numpy(samples_M),
        )

    def static_micro_batch(self, first: int, size: int) -> MicroBatch | None:
        """Return full or nearly full rows, with the selected positions padded to a number that practically no
        micro-batch exceeds; None for shorter rows, or for more selected positions."""
        if self.lengths_B[first : first + size].mean() / self.ids_BT.shape[1] < _FULL_ENOUGH:
            return None
        micro_batch = self.micro_batch(first, size, packed=False)
        most = selected_limit(self.masking, size, self.ids_BT.shape[1])
        return micro_batch.filled(most) if len(micro_batch.selected_M) <= most else None
