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
from electra_ds.data.segments import Ranges, WindowSampler
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
        )


class BatchBuilder:
    """Builds the global batch of any step."""

    def __init__(self, store: TokenStore, ranges: Ranges, recipe: Recipe, seed: int) -> None:
        self.store = store
        self.recipe = recipe
        self.seed = seed
        length = recipe.data.sequence_length
        self.sampler = WindowSampler(ranges, length - 2, recipe.data.document_sampling, seed)
        self._positions = np.arange(length - 2)

    def build(self, step: int, batch_size: int | None = None) -> GlobalBatch:
        """The batch of optimiser step `step`. Raises DataError where the store holds ids outside its vocabulary."""
        batch_size = batch_size or self.recipe.global_batch_size
        tokenizer, masking = self.store.tokenizer, self.recipe.masking
        starts, sizes = self.sampler.windows(step, batch_size)
        ids = np.full((batch_size, self.recipe.data.sequence_length), tokenizer.pad_id, dtype=np.int64)
        inside = self._positions < sizes[:, None]
        last = len(self.store.tokens) - 1
        tokens = self.store.tokens[np.minimum(starts[:, None] + self._positions, last)]
        np.copyto(ids[:, 1:-1], tokens, where=inside)
        ids[:, 0] = tokenizer.cls_id
        ids[np.arange(batch_size), sizes + 1] = tokenizer.sep_id
        if int(ids.max()) >= tokenizer.vocab_size:
            raise DataError(
                f"The token store {self.store.path} holds id {ids.max()}, but its vocabulary has "
                f"{tokenizer.vocab_size}: tokens.bin is damaged. Build the store again."
            )
        lengths = sizes + 2
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
        return GlobalBatch(ids, lengths, masks, counted, noise.reshape(ids.shape), tokenizer.mask_id)


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
