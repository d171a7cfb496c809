"""The text of each row of a batch: random windows of documents, or lines packed into two segments.

Everything is a function of (seed, step, row), so any step can be computed without the steps before it.
Shape suffixes: B rows of the global batch, C text tokens of a row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import numpy as np

from electra_ds.config.sections import DataSection
from electra_ds.core.errors import DataError
from electra_ds.core.keyed_random import generator, permutation_at
from electra_ds.data.packing import PackedExamples
from electra_ds.data.token_store import Ranges, TokenStore

# Keys of the random draws: no two draws of a run share one.
_EPOCH, _WINDOW, _MIXTURE = 0x41, 0x42, 0x43
FEW_DOCUMENTS_TO_SAMPLE_BY_LENGTH = 10_000
# Rows in one round of a mixture. Each corpus has a fixed number of them.
MIXTURE_ROUND = 1024
# Items of a permutation that are computed together and kept for the next few dozen steps.
_BLOCK = 4096


class Rows(NamedTuple):
    """The text of a batch's rows, without [CLS] and [SEP]."""

    starts_B: np.ndarray
    """int64, the index of each row's first token in tokens.bin."""
    positions_BC: np.ndarray | None
    """int64, the index of each token, arbitrary beyond a row's length; None if each row is one contiguous range."""
    first_B: np.ndarray
    """int64, the number of tokens in the first segment."""
    second_B: np.ndarray
    """int64, the number of tokens in the second segment, or 0."""


class Text(Protocol):
    """A corpus that returns any row by its number. Numbers continue from one epoch to the next."""

    def rows(self, numbers_B: np.ndarray, rng: np.random.Generator) -> Rows: ...


class Windows:
    """Random windows of at most `window_tokens` tokens, one segment each.

    A longer range gives a window at a uniformly random offset; a shorter range is one window.
    """

    def __init__(
        self, ranges: Ranges, window_tokens: int, sampling: Literal["auto", "epoch", "length"], *key: int
    ) -> None:
        self.ranges = ranges
        self.window_tokens = window_tokens
        self.key = key
        if sampling == "auto":
            few = len(ranges.starts) < FEW_DOCUMENTS_TO_SAMPLE_BY_LENGTH
            long = ranges.lengths.mean() > 2 * window_tokens
            sampling = "length" if few and long else "epoch"
        self.sampling = sampling
        self._ends = np.cumsum(ranges.lengths) if sampling == "length" else np.empty(0, dtype=np.int64)

    def rows(self, numbers_B: np.ndarray, rng: np.random.Generator) -> Rows:
        if self.sampling == "epoch":
            chosen = shuffled(numbers_B, len(self.ranges.starts), *self.key, _EPOCH)
        else:
            places = rng.integers(0, self._ends[-1], len(numbers_B))
            chosen = np.searchsorted(self._ends, places, side="right")
        starts = self.ranges.starts[chosen]
        lengths = self.ranges.stops[chosen] - starts
        first = np.minimum(lengths, self.window_tokens)
        offsets = (rng.random(len(chosen)) * (lengths - first + 1)).astype(np.int64)
        return Rows(starts + offsets, None, first, np.zeros_like(first))


class TwoSegments:
    """Packed examples of two segments, each once per epoch."""

    def __init__(self, examples: PackedExamples, *key: int) -> None:
        self.examples = examples
        self.key = key

    def rows(self, numbers_B: np.ndarray, rng: np.random.Generator) -> Rows:
        chosen = shuffled(numbers_B, len(self.examples), *self.key, _EPOCH)
        return Rows(self.examples.starts[chosen], *self.examples.segments(chosen, rng))


def shuffled(numbers: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Return the items with the given numbers. Numbers run over epochs, each with all `size` items in a new order."""
    epochs, places = np.divmod(numbers, size)
    blocks = epochs * -(-size // _BLOCK) + places // _BLOCK
    places %= _BLOCK
    first, last = int(blocks.min()), int(blocks.max())
    if first == last:
        return _shuffled_block(first, size, *key)[places]
    items = np.empty_like(places)
    for block in np.unique(blocks).tolist():
        of_block = blocks == block
        items[of_block] = _shuffled_block(block, size, *key)[places[of_block]]
    return items


@lru_cache(maxsize=64)
def _shuffled_block(block: int, size: int, *key: int) -> np.ndarray:
    epoch, part = divmod(block, -(-size // _BLOCK))
    return permutation_at(np.arange(part * _BLOCK, min(size, (part + 1) * _BLOCK)), size, *key, epoch)


class Sampler:
    """The rows of any step, from one text or from several corpora in fixed proportions."""

    def __init__(self, store: TokenStore, ranges: Ranges, data: DataSection, seed: int) -> None:
        """Prepare the sampling. Raises DataError if `data.corpus_weights` does not fit the store."""
        self.seed = seed
        self._texts: list[Text] = []
        weights = []
        for index, (weight, part) in enumerate(_weighted(store, ranges, data)):
            if len(part.starts):
                self._texts.append(_text(store, part, data, seed, index))
                weights.append(weight)
        self._quotas = _quotas(np.array(weights))

    def rows(self, step: int, batch_size: int) -> Rows:
        """Return the rows of optimizer step `step`."""
        rng = generator(self.seed, _WINDOW, step)
        numbers = step * batch_size + np.arange(batch_size)
        if len(self._texts) == 1:
            return self._texts[0].rows(numbers, rng)
        sources, numbers = self._mixed(numbers)
        parts = [(sources == index, text) for index, text in enumerate(self._texts)]
        drawn = [(where, text.rows(numbers[where], rng)) for where, text in parts if where.any()]
        order = np.argsort(np.concatenate([np.flatnonzero(where) for where, _ in drawn]))
        positions = [rows.positions_BC for _, rows in drawn if rows.positions_BC is not None]
        return Rows(
            np.concatenate([rows.starts_B for _, rows in drawn])[order],
            np.concatenate(positions)[order] if positions else None,
            np.concatenate([rows.first_B for _, rows in drawn])[order],
            np.concatenate([rows.second_B for _, rows in drawn])[order],
        )

    def _mixed(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the corpus of each row of the mixture, and the row's number within that corpus.

        Every round of 1,024 rows has a fixed number of rows from each corpus in shuffled order, so proportions are
        exact and any row can be computed directly.
        """
        rounds, slots = numbers // MIXTURE_ROUND, shuffled(numbers, MIXTURE_ROUND, self.seed, _MIXTURE)
        ends = np.cumsum(self._quotas)
        sources = np.searchsorted(ends, slots, side="right")
        return sources, rounds * self._quotas[sources] + slots - (ends - self._quotas)[sources]


def _weighted(store: TokenStore, ranges: Ranges, data: DataSection) -> list[tuple[float, Ranges]]:
    """Return (weight, ranges) for each corpus, or for all text together if no weights are given."""
    if data.corpus_weights is None:
        return [(1.0, ranges)]
    corpora = store.info.corpora
    if len(data.corpus_weights) != len(corpora):
        raise DataError(
            f"data.corpus_weights has {len(data.corpus_weights)} numbers, but the token store {store.path} holds "
            f"{len(corpora)} corpora: {', '.join(corpus.description for corpus in corpora)}. Give one number for each."
        )
    documents = np.cumsum([0, *(corpus.num_documents for corpus in corpora)])
    bounds = np.searchsorted(ranges.starts, store.documents[documents])
    return [
        (weight, Ranges(ranges.starts[first:last], ranges.stops[first:last]))
        for weight, first, last in zip(data.corpus_weights, bounds[:-1], bounds[1:], strict=True)
    ]


def _text(store: TokenStore, ranges: Ranges, data: DataSection, seed: int, index: int) -> Text:
    if data.segments == "two":
        return TwoSegments(PackedExamples(store.lines, ranges, data.sequence_length, seed), seed, index)
    return Windows(ranges, data.sequence_length - 2, data.document_sampling, seed, index)


def _quotas(weights: np.ndarray) -> np.ndarray:
    """Return int64, the number of rows from each corpus in a round, at least one, by largest remainders."""
    exact = weights / weights.sum() * MIXTURE_ROUND
    quotas = np.maximum(1, np.floor(exact)).astype(np.int64)
    while (missing := np.sign(MIXTURE_ROUND - quotas.sum())) != 0:
        short = np.where((quotas > 1) | (missing > 0), (exact - quotas) * missing, -np.inf)
        quotas[np.argmax(short)] += missing
    return quotas
