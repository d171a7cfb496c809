"""From (seed, step) to the global batch, and from there to one rank's micro-batches.

Every rank builds the whole global batch: it is cheap (some 10 ns a token, 50 with two segments), and so every rank
knows the counts that losses are divided by without asking the others. Shape suffixes: B sequences of the global batch,
S of a micro-batch, T positions, M selected positions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from electra_ds.config.recipe import Recipe
from electra_ds.core.errors import DataError
from electra_ds.core.keyed_random import generator, random_bits
from electra_ds.data.packing import packed_rows
from electra_ds.data.sampling import Rows, Sampler
from electra_ds.data.segments import Ranges
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.masking import Masks, choose_masks
from electra_ds.pretraining.microbatch import MicroBatch

_MASKS_AND_NOISE = 0x50


class GlobalBatch(NamedTuple):
    """numpy arrays of one optimiser step."""

    ids_BT: np.ndarray
    lengths_B: np.ndarray
    second_segment_BT: np.ndarray | None
    """bool, True in the second segment; None where rows have only one."""
    masks: Masks
    counted_BT: np.ndarray
    noise_keys_BT: np.ndarray
    mask_token_id: int

    @property
    def num_selected(self) -> int:
        """What the generator's loss is divided by."""
        return max(1, int(np.count_nonzero(self.masks.selected)))

    @property
    def num_counted(self) -> int:
        """What the discriminator's loss is divided by."""
        return max(1, int(np.count_nonzero(self.counted_BT)))

    @property
    def num_tokens(self) -> int:
        return int(self.lengths_B.sum())

    def micro_batch(self, first: int, size: int, *, packed: bool = True) -> MicroBatch:
        """Sequences `first` to `first + size` as tensors in ordinary memory.

        packed: lay short sequences side by side where that saves rows; otherwise each is a row of its own.
        """
        taken = slice(first, first + size)
        ids, lengths, second = self.ids_BT[taken], self.lengths_B[taken], self.second_segment_BT
        width = ids.shape[1]
        selected_M = np.flatnonzero(self.masks.selected[taken])
        masked_M, replaced_M, noise_keys_M = (
            array_BT[taken].reshape(-1)[selected_M]
            for array_BT in (self.masks.masked, self.masks.replaced, self.noise_keys_BT)
        )
        counted, second = self.counted_BT[taken], None if second is None else second[taken]
        sequences = positions = None
        if lengths.min() < width:
            sequences = np.arange(1, len(ids) + 1, dtype=np.int32)[:, None] * _before(lengths, width)
            rows = packed_rows(lengths, width) if packed else None
            if rows is not None:
                ids, counted, sequences = rows.laid(ids), rows.laid(counted), rows.laid(sequences)
                second = None if second is None else rows.laid(second)
                positions, selected_M = rows.positions(width), rows.moved(selected_M, width)
        generator_ids = ids.copy()
        generator_ids.reshape(-1)[selected_M[masked_M]] = self.mask_token_id
        return MicroBatch(
            ids_BT=torch.from_numpy(ids),
            generator_ids_BT=torch.from_numpy(generator_ids),
            selected_M=torch.from_numpy(selected_M),
            replaced_M=torch.from_numpy(replaced_M),
            noise_keys_M=torch.from_numpy(noise_keys_M),
            counted_BT=torch.from_numpy(counted),
            sequences_BT=None if sequences is None else torch.from_numpy(sequences),
            segments_BT=None if second is None else torch.from_numpy(second),
            positions_BT=None if positions is None else torch.from_numpy(positions),
        )


class BatchBuilder:
    """Builds the global batch of any step."""

    def __init__(self, store: TokenStore, ranges: Ranges, recipe: Recipe, seed: int) -> None:
        self.store = store
        self.recipe = recipe
        self.seed = seed
        self.sampler = Sampler(store, ranges, recipe.data, seed)
        self._tokens = np.asarray(store.tokens)  # a memory map's own indexing takes several times as long
        self._windows: np.ndarray | None = None
        if len(self._tokens) >= recipe.data.sequence_length - 2:
            self._windows = sliding_window_view(self._tokens, recipe.data.sequence_length - 2)
        self._special = np.flatnonzero(store.tokenizer.is_special).tolist()

    def build(self, step: int, batch_size: int | None = None) -> GlobalBatch:
        """The batch of optimiser step `step`. Raises DataError if the store holds ids outside its vocabulary."""
        batch_size = batch_size or self.recipe.global_batch_size
        tokenizer, masking = self.store.tokenizer, self.recipe.masking
        rows = self.sampler.rows(step, batch_size)
        ids, lengths, maskable = self._laid_out(rows, self._text(rows))
        rng = generator(self.seed, _MASKS_AND_NOISE, step)
        noise = random_bits(rng, *ids.shape).view(np.int32)
        masks = choose_masks(
            maskable,
            lengths,
            rng,
            mlm_probability=masking.mlm_probability,
            mask_token_share=masking.mask_token_share,
            count=masking.count,
            replace_at=masking.replace_at,
        )
        width, counted, second = ids.shape[1], maskable, None
        if self.recipe.discriminator.loss_on_special:
            counted = _before(lengths, width)
        if self.recipe.data.segments == "two":
            second = _before(lengths, width) & ~_before(rows.first_B + 2, width)
        return GlobalBatch(ids, lengths, second, masks, counted, noise, tokenizer.mask_id)

    def _text(self, rows: Rows) -> np.ndarray:
        """[B, T - 2] in the store's type: each row's text; beyond its length, whatever follows."""
        positions = rows.positions_BC
        if positions is None:
            if self._windows is not None and rows.starts_B.max() < len(self._windows):
                text: np.ndarray = self._windows[rows.starts_B]  # copies row by row
                return text
            positions = rows.starts_B[:, None] + np.arange(self.recipe.data.sequence_length - 2)
        return self._tokens.take(positions, mode="clip")

    def _laid_out(self, rows: Rows, text: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids [B, T], lengths [B], where tokens may be masked [B, T]).

        A row is [CLS] first [SEP], or [CLS] first [SEP] second [SEP], and padding.
        """
        tokenizer, width = self.store.tokenizer, text.shape[1] + 2
        if int(text.max()) >= tokenizer.vocab_size:
            raise DataError(
                f"The token store {self.store.path} holds id {text.max()}, but its vocabulary has "
                f"{tokenizer.vocab_size}: tokens.bin is damaged. Build the store again."
            )
        ends = rows.first_B + 1
        lengths = ends + 1
        ids = np.empty((len(text), width), dtype=text.dtype)
        ids[:, 0], ids[:, -1] = tokenizer.cls_id, tokenizer.sep_id
        ids[:, 1:-1] = text
        if rows.second_B.any():  # the second segment stands one place further on
            np.copyto(ids[:, 2:], text, where=~_before(lengths, width)[:, 2:])
            lengths += rows.second_B + (rows.second_B > 0)
            ids[np.arange(len(ids)), lengths - 1] = tokenizer.sep_id
        ids[np.arange(len(ids)), ends] = tokenizer.sep_id
        short = np.flatnonzero(lengths < width)
        ids[short] = np.where(_before(lengths[short], width), ids[short], np.asarray(tokenizer.pad_id, ids.dtype))
        maskable = np.ones(ids.shape, dtype=bool)
        for special in self._special:
            maskable &= ids != special
        return ids.astype(np.int64), lengths, maskable


def _before(stops_B: np.ndarray, width: int) -> np.ndarray:
    """bool [B, width], True at the places before each row's stop."""
    before: np.ndarray = np.arange(width, dtype=np.int32) < stops_B.astype(np.int32)[:, None]
    return before
