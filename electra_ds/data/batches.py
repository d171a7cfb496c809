"""From (seed, step) to the global batch, and from there to one rank's micro-batches.

Every rank builds the whole global batch: it is cheap (some 10 ns a token), and so every rank knows the
counts that losses are divided by without asking the others. Shape suffixes: B sequences of the global
batch, T positions, M selected positions.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from electra_ds.config.recipe import Recipe
from electra_ds.data.sampling import Rows, Sampler
from electra_ds.data.segments import Ranges
from electra_ds.data.token_store import TokenStore
from electra_ds.errors import DataError
from electra_ds.objective.keyed_random import generator, hash64
from electra_ds.objective.masking import Masks, choose_masks
from electra_ds.objective.microbatch import MicroBatch

_MASKS, _NOISE = 0x50, 0x51


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
        return max(1, int(self.masks.selected.sum()))

    @property
    def num_counted(self) -> int:
        """What the discriminator's loss is divided by."""
        return max(1, int(self.counted_BT.sum()))

    @property
    def num_tokens(self) -> int:
        return int(self.lengths_B.sum())

    def micro_batch(self, first: int, size: int) -> MicroBatch:
        """Sequences `first` to `first + size` as tensors in ordinary memory."""
        rows = slice(first, first + size)
        ids, selected = self.ids_BT[rows], self.masks.selected[rows]
        padded = bool((self.lengths_B[rows] < ids.shape[1]).any())
        attend = np.arange(ids.shape[1]) < self.lengths_B[rows, None]
        return MicroBatch(
            ids_BT=torch.from_numpy(ids),
            generator_ids_BT=torch.from_numpy(np.where(self.masks.masked[rows], self.mask_token_id, ids)),
            selected_M=torch.from_numpy(np.flatnonzero(selected)),
            replaced_M=torch.from_numpy(self.masks.replaced[rows][selected]),
            noise_keys_M=torch.from_numpy(self.noise_keys_BT[rows][selected]),
            counted_BT=torch.from_numpy(self.counted_BT[rows]),
            attend_B11T=torch.from_numpy(attend[:, None, None, :]) if padded else None,
            segments_BT=None if self.second_segment_BT is None else torch.from_numpy(self.second_segment_BT[rows]),
        )


class BatchBuilder:
    """Builds the global batch of any step."""

    def __init__(self, store: TokenStore, ranges: Ranges, recipe: Recipe, seed: int) -> None:
        self.store = store
        self.recipe = recipe
        self.seed = seed
        self.sampler = Sampler(store, ranges, recipe.data, seed)

    def build(self, step: int, batch_size: int | None = None) -> GlobalBatch:
        """The batch of optimiser step `step`. Raises DataError where the store holds ids outside its vocabulary."""
        batch_size = batch_size or self.recipe.global_batch_size
        tokenizer, masking = self.store.tokenizer, self.recipe.masking
        rows = self.sampler.rows(step, batch_size)
        ids, lengths = self._laid_out(rows)
        if int(ids.max()) >= tokenizer.vocab_size:
            raise DataError(
                f"The token store {self.store.path} holds id {ids.max()}, but its vocabulary has "
                f"{tokenizer.vocab_size}: tokens.bin is damaged. Build the store again."
            )
        real = np.arange(ids.shape[1]) < lengths[:, None]
        maskable = real & ~tokenizer.is_special[ids]
        masks = choose_masks(
            maskable,
            lengths,
            generator(self.seed, _MASKS, step),
            mlm_probability=masking.mlm_probability,
            mask_token_share=masking.mask_token_share,
            count=masking.count,
            replace_at=masking.replace_at,
        )
        counted = real if self.recipe.discriminator.loss_on_special else maskable
        noise = hash64(self.seed, _NOISE, step, np.arange(ids.size)).astype(np.uint32).view(np.int32)
        second = None
        if self.recipe.data.segments == "two":
            second = real & (np.arange(ids.shape[1]) > rows.first_B[:, None] + 1)
        return GlobalBatch(ids, lengths, second, masks, counted, noise.reshape(ids.shape), tokenizer.mask_id)

    def _laid_out(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """(ids [B, T], lengths [B]): [CLS] first [SEP], or [CLS] first [SEP] second [SEP], and padding."""
        tokenizer, place = self.store.tokenizer, np.arange(self.recipe.data.sequence_length)
        first, second = rows.first_B[:, None], rows.second_B[:, None]
        text = place - 1 - (place > first + 1)  # which of a row's tokens stands at a place
        is_text = (place > 0) & (place != first + 1) & (text < first + second)
        lengths = first + second + np.where(second > 0, 3, 2)
        positions = np.take_along_axis(rows.positions_BC, np.clip(text, 0, rows.positions_BC.shape[1] - 1), axis=1)
        tokens = self.store.tokens[np.minimum(positions, len(self.store.tokens) - 1)]
        ids = np.where(is_text, tokens, tokenizer.pad_id).astype(np.int64)
        ids[:, 0] = tokenizer.cls_id
        ids[(place == first + 1) | (place == lengths - 1)] = tokenizer.sep_id
        return ids, lengths[:, 0]


def prefetched(builder: BatchBuilder, first_step: int, stop_step: int) -> Iterator[tuple[int, GlobalBatch]]:
    """(step, batch) in order, built one or two steps ahead in a thread."""
    ready: queue.Queue[tuple[int, GlobalBatch] | BaseException | None] = queue.Queue(maxsize=2)
    stopped = threading.Event()

    def put(item: tuple[int, GlobalBatch] | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for step in range(first_step, stop_step):
                if stopped.is_set():
                    return
                put((step, builder.build(step)))
            put(None)
        except BaseException as error:  # handed to the consumer
            put(error)

    thread = threading.Thread(target=produce, name="batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
