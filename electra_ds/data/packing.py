"""Lines packed into examples of two segments, by the rule of the original's build_pretraining_dataset.py.

Lines of a document are gathered until they reach a target length, which is the sequence length, or for one example in
twenty a random shorter one. A tenth of the examples keep a single segment; the others are cut near the middle.
Shape suffixes: B examples, K lines of an example, C text tokens of a row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

from electra_ds.core.keyed_random import hash64
from electra_ds.data.segments import Ranges

_TARGET = 0x44
SINGLE_SEGMENT_SHARE = 0.1
SHORT_SHARE = 0.05
SHORTEST_TARGET = 5


class PackedExamples:
    """All examples of a text: where each begins and ends, found once; its cut into segments, drawn at each use."""

    def __init__(self, lines: np.ndarray, ranges: Ranges, sequence_length: int, seed: int) -> None:
        """lines: int64, ascending, where each line starts in tokens.bin, and at last the end of the text."""
        self.lines = np.asarray(lines)
        self.sequence_length = sequence_length
        self.starts, self.stops, self.targets = self._packed(ranges, seed)

    def __len__(self) -> int:
        return len(self.starts)

    def _packed(self, ranges: Ranges, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All documents side by side, one example of each at a time."""
        pieces = []
        documents, starts = np.arange(len(ranges.starts)), np.asarray(ranges.starts)
        turn = 0
        while len(documents):
            targets = self._targets(documents, turn, seed)
            enough = np.searchsorted(self.lines, starts + targets)  # the first line that ends at the target or beyond
            stops = np.minimum(self.lines[np.minimum(enough, len(self.lines) - 1)], ranges.stops[documents])
            pieces.append((starts, stops, targets))
            goes_on = stops < ranges.stops[documents]
            documents, starts = documents[goes_on], stops[goes_on]
            turn += 1
        columns = [np.concatenate(column) for column in zip(*pieces, strict=True)]
        return columns[0], columns[1], columns[2].astype(np.int32)

    def _targets(self, documents: np.ndarray, turn: int, seed: int) -> np.ndarray:
        draws = hash64(seed, _TARGET, turn, documents)
        is_short = (draws >> np.uint64(32)).astype(np.float64) < SHORT_SHARE * 2.0**32
        kinds = np.uint64(self.sequence_length - SHORTEST_TARGET + 1)
        short = SHORTEST_TARGET + ((draws & np.uint64(0xFFFFFFFF)) % kinds).astype(np.int64)
        return np.where(is_short, short, self.sequence_length)

    def segments(self, examples_B: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(token positions [B, sequence_length - 2], tokens of the first segment [B], of the second [B]).

        Where the text is too long, each segment loses its end; the second leaves a place to the second [SEP].
        """
        chance = rng.random((2, len(examples_B)))
        room = self.sequence_length - 2
        aims_B = np.where(chance[0] < SINGLE_SEGMENT_SHARE, 100_000, (self.targets[examples_B] - 3) // 2)
        bounds = self._bounds(examples_B)
        starts_BK, sizes_BK = bounds[:, :-1], np.diff(bounds, axis=1)
        is_first = _first_segment(sizes_BK, aims_B, chance[1] < 0.5)
        first_ends = np.minimum((sizes_BK * is_first).cumsum(axis=1), room)
        first_B = first_ends[:, -1]
        second_ends = first_B[:, None] + (sizes_BK * ~is_first).cumsum(axis=1)
        second_ends = np.minimum(second_ends, np.maximum(first_B, room - 1)[:, None])
        # A row is its lines once for the first segment and once for the second, those of the other with no token, and
        # whatever follows the last one.
        ends = np.concatenate([first_ends, second_ends, np.full((len(examples_B), 1), room)], axis=1)
        begins = np.concatenate([np.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)
        shifts = np.concatenate([starts_BK, starts_BK, starts_BK[:, :1]], axis=1) - begins
        positions_BC = np.repeat(shifts.ravel(), (ends - begins).ravel()).reshape(-1, room)
        positions_BC += np.arange(room)
        return positions_BC, first_B, second_ends[:, -1] - first_B

    def _bounds(self, examples_B: np.ndarray) -> np.ndarray:
        """int64 [B, K + 1]: where each example's lines begin, and from the last one on where the example ends."""
        starts, stops = self.starts[examples_B], self.stops[examples_B]
        inner = np.searchsorted(self.lines, starts, side="right")
        num_lines = int((np.searchsorted(self.lines, stops) - inner).max()) + 1
        bounds = self.lines.take(inner[:, None] + np.arange(-1, num_lines), mode="clip")
        np.minimum(bounds, stops[:, None], out=bounds)
        bounds[:, 0] = starts
        return bounds


def _first_segment(sizes_BK: np.ndarray, aims_B: np.ndarray, overshoots_B: np.ndarray) -> np.ndarray:
    """bool [B, K]: which lines stand in the first segment; lines of size 0 may say either.

    A line goes to the first segment where that is empty or stays below the aim with it; the first line that would
    cross the aim goes there too where it overshoots; every other line goes to the second. The original tosses a coin
    for that line alone: after it the first segment is full, or the second has begun.
    """
    rows, columns = np.arange(len(sizes_BK)), np.arange(sizes_BK.shape[1])
    ends = sizes_BK.cumsum(axis=1)
    last = np.maximum((ends < aims_B[:, None]).sum(axis=1) - 1, 0)  # up to here no line was left out
    crosses = overshoots_B & (ends[rows, last] < aims_B) & (last < columns[-1])
    last = last + crosses
    is_first: np.ndarray = columns <= last[:, None]
    rooms = aims_B - ends[rows, last]
    while True:  # at each turn the next line, in every row that has one, that still fits behind those left out
        fits = (sizes_BK < rooms[:, None]) & (columns > last[:, None]) & (sizes_BK > 0)
        found = fits.any(axis=1)
        if not found.any():
            return is_first
        rows, rooms, sizes_BK, fits = rows[found], rooms[found], sizes_BK[found], fits[found]
        last = fits.argmax(axis=1)
        is_first[rows, last] = True
        rooms = rooms - sizes_BK[np.arange(len(rows)), last]


# Several sequences in one row of a micro-batch, so that nothing is computed for padding. Shape suffixes: S sequences,
# B rows that hold them, T positions, N tokens of the sequences that do not begin a row.


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
