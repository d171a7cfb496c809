"""Short sequences of a micro-batch laid side by side in one row, so that nothing is computed for padding.

Shape suffixes: S sequences, B rows that hold them, T positions.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np


class PackedRows(NamedTuple):
    """Where the tokens of S padded sequences [S, T] stand in fewer rows [B, T].

    A sequence brings as much of its own padding along as there is room for: after a row's last one to the row's end.
    """

    starts_S: np.ndarray
    """int64 indices into the flattened [B * T] where each sequence begins."""
    sources_BT: np.ndarray
    """int64 indices into the flattened [S * T], what stands at each place."""
    positions_BT: np.ndarray
    """int64, the place within its own sequence."""
    sequences_BT: np.ndarray
    """int32, which sequence a place belongs to, counted from 1, and 0 at padding."""

    def moved(self, places: np.ndarray) -> np.ndarray:
        """Indices into the flattened [S * T] as indices into the flattened [B * T]."""
        sequences, positions = np.divmod(places, self.sources_BT.shape[1])
        return self.starts_S[sequences] + positions


def packed_rows(lengths_S: np.ndarray, width: int) -> PackedRows | None:
    """Sequences in as few rows of `width` places as best-fit decreasing finds; None where that saves no row."""
    shortest = np.sort(lengths_S)[:2]
    if len(shortest) < 2 or shortest.sum() > width:
        return None
    starts_S = _best_fit_decreasing(lengths_S, width)
    order = np.argsort(starts_S)
    starts = starts_S[order]
    places = np.arange((starts[-1] // width + 1) * width)
    spans = np.diff(starts, append=len(places))
    positions = places - np.repeat(starts, spans)
    sequences = np.repeat(order + 1, spans) * (positions < np.repeat(lengths_S[order], spans))
    sources = np.repeat(order * width, spans) + positions
    return PackedRows(
        starts_S,
        sources.reshape(-1, width),
        positions.reshape(-1, width),
        sequences.astype(np.int32).reshape(-1, width),
    )


def _best_fit_decreasing(lengths_S: np.ndarray, width: int) -> np.ndarray:
    """int64 [S]: where each sequence begins in the flattened rows. From the longest to the shortest, each goes into
    the row that it fills best; of equal ones the first comes first."""
    order = np.argsort(-lengths_S, kind="stable")
    num_rows = int((lengths_S >= width).sum())  # a full sequence is a row, and there may be many
    starts = np.empty(len(lengths_S), dtype=np.int64)
    starts[order[:num_rows]] = np.arange(num_rows) * width
    begun: list[tuple[int, int]] = []  # (free places, row), ascending
    for sequence, length in zip(order[num_rows:].tolist(), lengths_S[order[num_rows:]].tolist(), strict=True):
        found = bisect_left(begun, (length, 0))
        if found < len(begun):
            free, row = begun.pop(found)
        else:
            free, row, num_rows = width, num_rows, num_rows + 1
        starts[sequence] = row * width + width - free
        if free > length:
            insort(begun, (free - length, row))
    return starts
