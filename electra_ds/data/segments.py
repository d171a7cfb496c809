"""The division of a token store into training and held-out text."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from electra_ds.config.recipe import DataSection
from electra_ds.core.errors import DataError
from electra_ds.core.keyed_random import generator

_HOLDOUT = 0x40
FEW_DOCUMENTS_TO_HOLD_OUT_SPANS = 1_000


class Ranges(NamedTuple):
    """Ranges of the token store, `starts[i]` to `stops[i]`; each is treated as one document."""

    starts: np.ndarray
    stops: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return self.stops - self.starts

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())


class Split(NamedTuple):
    train: Ranges
    holdout: Ranges
    held_out_by: Literal["document", "span"]


def split_holdout(documents: np.ndarray, data: DataSection, seed: int) -> Split:
    """Return the training and held-out ranges of a store whose documents start at `documents`.

    Raises DataError if the corpus is too small for both.
    """
    ranges = Ranges(np.asarray(documents[:-1]), np.asarray(documents[1:]))
    by = data.holdout_by
    if by == "auto":
        by = "span" if len(ranges.starts) < FEW_DOCUMENTS_TO_HOLD_OUT_SPANS else "document"
    target = min(data.holdout_fraction * ranges.num_tokens, data.holdout_max_tokens)
    rng = generator(seed, _HOLDOUT)
    split = _documents_apart(ranges, target, rng) if by == "document" else _spans_apart(ranges, target, data, rng)
    if not len(split.train.starts) or not len(split.holdout.starts):
        raise DataError(
            f"The corpus is too small to hold out {data.holdout_fraction:.0%} by {by}: {len(ranges.starts)} "
            f"documents, {ranges.num_tokens} tokens. Use more text, a shorter data.sequence_length, or "
            f"data.holdout_by={'document' if by == 'span' else 'span'}."
        )
    return split


def _documents_apart(ranges: Ranges, target: float, rng: np.random.Generator) -> Split:
    order = rng.permutation(len(ranges.starts))
    before = np.concatenate([[0], np.cumsum(ranges.lengths[order])[:-1]])
    held = np.zeros(len(order), dtype=bool)
    held[order[before < target]] = True
    held[order[-1]] = False  # never everything
    return Split(
        Ranges(ranges.starts[~held], ranges.stops[~held]), Ranges(ranges.starts[held], ranges.stops[held]), "document"
    )


def _spans_apart(ranges: Ranges, target: float, data: DataSection, rng: np.random.Generator) -> Split:
    """Hold out one contiguous span of each document that is long enough, at least one window, up to the target."""
    shortest = data.sequence_length - 2
    share = target / ranges.num_tokens
    order = rng.permutation(len(ranges.starts))
    positions = rng.random(len(order))
    held, train = [], []
    num_held = 0
    for index in order:
        start, stop = int(ranges.starts[index]), int(ranges.stops[index])
        size = max(shortest, round(share * (stop - start)))
        if num_held >= target or stop - start < 4 * size:
            train.append((start, stop))
            continue
        num_held += size
        first = start + int(positions[index] * (stop - start - size + 1))
        held.append((first, first + size))
        train += [piece for piece in ((start, first), (first + size, stop)) if piece[0] < piece[1]]
    return Split(_ranges(train), _ranges(held), "span")


def _ranges(pieces: list[tuple[int, int]]) -> Ranges:
    array = np.array(sorted(pieces), dtype=np.int64).reshape(-1, 2)
    return Ranges(array[:, 0], array[:, 1])
