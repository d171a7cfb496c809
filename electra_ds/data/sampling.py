"""Which text each row of a batch gets: random windows of documents, or lines packed into two segments.

Everything is a function of (seed, step, row): any step is reached at once, without replaying the ones before.
Shape suffixes: B rows of the global batch, C text tokens of a row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import numpy as np

from electra_ds.config.recipe import DataSection
from electra_ds.core.errors import DataError
from electra_ds.core.keyed_random import generator, permutation_at
from electra_ds.data.packing import PackedExamples
from electra_ds.data.segments import Ranges
from electra_ds.data.token_store import TokenStore

# Purposes, so that no two draws of a run share a key.
_EPOCH, _WINDOW, _MIXTURE = 0x41, 0x42, 0x43
FEW_DOCUMENTS_TO_SAMPLE_BY_LENGTH = 10_000
# Rows in one round of a mixture: each corpus has a fixed number of them.
MIXTURE_ROUND = 1024
# Items of a permutation that are found together and kept for the steps that follow: some dozens of steps' worth.
_BLOCK = 4096


class Rows(NamedTuple):
    """The text of a batch's rows, without [CLS] and [SEP]."""

    starts_B: np.ndarray
    """int64, where each row's first token stands in tokens.bin."""
    positions_BC: np.ndarray | None
    """int64, where each token stands, beyond a row's length any number; None where each row is one stretch of text."""
    first_B: np.ndarray
    """int64, tokens of the first segment."""
    second_B: np.ndarray
    """int64, tokens of the second segment, 0 where there is none."""


class Text(Protocol):
    """A corpus that gives any of its rows by number; the numbers run on over the epochs."""

    def rows(self, numbers_B: np.ndarray, rng: np.random.Generator) -> Rows: ...


class Windows:
    """Random windows of at most `window_tokens` tokens, one segment each.

    A range longer than that gives a window whose offset is uniform over all that fit; a shorter one is taken whole.
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
    """Every packed example once per epoch."""

    def __init__(self, examples: PackedExamples, *key: int) -> None:
        self.examples = examples
        self.key = key

    def rows(self, numbers_B: np.ndarray, rng: np.random.Generator) -> Rows:
        chosen = shuffled(numbers_B, len(self.examples), *self.key, _EPOCH)
        return Rows(self.examples.starts[chosen], *self.examples.segments(chosen, rng))


def shuffled(numbers: np.ndarray, size: int, *key: int) -> np.ndarray:
    """The items that stand at running numbers, when all `size` of them come once per epoch, each time anew ordered."""
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
    """The rows of any step: of one text, or of several corpora in fixed proportions."""

    def __init__(self, store: TokenStore, ranges: Ranges, data: DataSection, seed: int) -> None:
        """Raises DataError if `data.corpus_weights` does not fit the store."""
        self.seed = seed
        self._texts: list[Text] = []
        weights = []
        for index, (weight, part) in enumerate(_weighted(store, ranges, data)):
            if len(part.starts):
                self._texts.append(_text(store, part, data, seed, index))
                weights.append(weight)
        self._quotas = _quotas(np.array(weights))

    def rows(self, step: int, batch_size: int) -> Rows:
        """The rows of optimiser step `step`."""
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
        """(corpus, running number within that corpus) of each running number of the mixture.

        Every round of 1,024 rows holds a fixed number of each corpus in shuffled order, so proportions are exact
        and any row is reached at once.
        """
        rounds, slots = numbers // MIXTURE_ROUND, shuffled(numbers, MIXTURE_ROUND, self.seed, _MIXTURE)
        ends = np.cumsum(self._quotas)
        sources = np.searchsorted(ends, slots, side="right")
        return sources, rounds * self._quotas[sources] + slots - (ends - self._quotas)[sources]


def _weighted(store: TokenStore, ranges: Ranges, data: DataSection) -> list[tuple[float, Ranges]]:
    """(weight, ranges) of each corpus; of everything together where no weights are given."""
    if data.corpus_weights is None:
        return [(1.0, ranges)]
    corpora = store.info.corpora
    if len(data.corpus_weights) != len(corpora):
        raise DataError(
            f"data.corpus_weights has {len(data.corpus_weights)} numbers, but the token store {store.path} holds "
            f"{len(corpora)} corpora: {', '.join(corpus.description for corpus in corpora)}. Give one for each."
        )
    if len(corpora) > MIXTURE_ROUND:
        raise DataError(f"At most {MIXTURE_ROUND} corpora can be weighted; {store.path} holds {len(corpora)}.")
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
    """int64, rows of each corpus in a round, at least one each, by the largest remainders."""
    exact = weights / weights.sum() * MIXTURE_ROUND
    quotas = np.maximum(1, np.floor(exact)).astype(np.int64)
    while (missing := np.sign(MIXTURE_ROUND - quotas.sum())) != 0:
        short = np.where((quotas > 1) | (missing > 0), (exact - quotas) * missing, -np.inf)
        quotas[np.argmax(short)] += missing
    return quotas
