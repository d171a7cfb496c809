"""Short sequences of a micro-batch laid side by side in one row, so that nothing is computed for padding.

Shape suffixes: S sequences, B rows that hold them, T positions, N tokens of the sequences that do not begin a row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np


class PackedRows(NamedTuple):
    """Where the tokens of S padded sequences [S, T] stand in fewer rows [B, T].

    A row is the sequence that it begins with, copied whole, and over its padding the tokens of the others.
    """

    starts_S: np.ndarray
    """int64 indices into the flattened [B * T] where each sequence begins."""
    leaders_B: np.ndarray
    """int64, the sequence that each row begins with."""
    sources_N: np.ndarray
    """int64 indices into the flattened [S * T] of the tokens of the others,"""
    targets_N: np.ndarray
    """and into the flattened [B * T] of where they go."""

    def laid(self, array_ST: np.ndarray) -> np.ndarray:
        """The same [B, T]."""
        array_BT: np.ndarray = array_ST[self.leaders_B]
        array_BT.reshape(-1)[self.targets_N] = array_ST.reshape(-1)[self.sources_N]
        return array_BT

    def positions(self, width: int) -> np.ndarray:
        """int64 [B, T]: the place of each token within its own sequence."""
        positions_BT = np.empty((len(self.leaders_B), width), dtype=np.int64)
        positions_BT[:] = np.arange(width)
        positions_BT.reshape(-1)[self.targets_N] = self.sources_N % width
        return positions_BT

    def moved(self, places: np.ndarray, width: int) -> np.ndarray:
        """Indices into the flattened [S * T] as indices into the flattened [B * T]."""
        moved: np.ndarray = places + (self.starts_S - np.arange(len(self.starts_S)) * width)[places // width]
        return moved


def packed_rows(lengths_S: np.ndarray, width: int) -> PackedRows | None:
    """Sequences in as few rows of `width` places as best-fit decreasing finds; None where that saves no row."""
    shortest = np.sort(lengths_S)[:2]
    if len(shortest) < 2 or shortest.sum() > width:
        return None
    starts_S = _best_fit_decreasing(lengths_S, width)
    rows, begins = np.divmod(starts_S, width)
    leaders, others = np.flatnonzero(begins == 0), np.flatnonzero(begins)
    leaders_B = np.empty_like(leaders)
    leaders_B[rows[leaders]] = leaders
    lengths = lengths_S[others]
    sources_N = np.repeat(others * width - lengths.cumsum() + lengths, lengths) + np.arange(lengths.sum())
    targets_N = sources_N + np.repeat(starts_S[others] - others * width, lengths)
    return PackedRows(starts_S, leaders_B, sources_N, targets_N)


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
