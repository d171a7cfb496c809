"""Pack lines into examples of two segments, and short sequences into the rows of a micro-batch.

Examples follow the original's build_pretraining_dataset.py: lines of a document are gathered until they reach a target
length. That is the sequence length, or a random shorter one for one example in twenty. A tenth of the examples keep a
single segment; the others are split near the middle.
Shape suffixes: B examples, K lines of an example, C text tokens of a row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

from electra_ds.core.keyed_random import hash64
from electra_ds.data.token_store import Ranges

_TARGET = 0x44
SINGLE_SEGMENT_SHARE = 0.1
SHORT_SHARE = 0.05
SHORTEST_TARGET = 5


class PackedExamples:
    """All examples of a text. Their starts and ends are computed once; their segments are drawn at each use."""

    def __init__(self, lines: np.ndarray, ranges: Ranges, sequence_length: int, seed: int) -> None:
        """lines: int64, ascending: the start of each line in tokens.bin, then the end of the text."""
        self.lines = np.asarray(lines)
        self.sequence_length = sequence_length
        self.starts, self.stops, self.targets = self._packed(ranges, seed)

    def __len__(self) -> int:
        return len(self.starts)

    def _packed(self, ranges: Ranges, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pack all documents in parallel, one example from each at a time."""
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
        """Return token positions [B, sequence_length - 2], and the number of tokens in each of the two segments [B].

        If the text is too long, the end of each segment is cut. The second segment leaves room for the second [SEP].
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
        # A row holds all lines twice, once per segment, with no tokens for lines of the other segment. Anything may
        # follow the last line.
        ends = np.concatenate([first_ends, second_ends, np.full((len(examples_B), 1), room)], axis=1)
        begins = np.concatenate([np.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)
        shifts = np.concatenate([starts_BK, starts_BK, starts_BK[:, :1]], axis=1) - begins
        positions_BC = np.repeat(shifts.ravel(), (ends - begins).ravel()).reshape(-1, room)
        positions_BC += np.arange(room)
        return positions_BC, first_B, second_ends[:, -1] - first_B

    def _bounds(self, examples_B: np.ndarray) -> np.ndarray:
        """Return int64 [B, K + 1]: the start of each line of each example, padded with the example's end."""
        starts, stops = self.starts[examples_B], self.stops[examples_B]
        inner = np.searchsorted(self.lines, starts, side="right")
        num_lines = int((np.searchsorted(self.lines, stops) - inner).max()) + 1
        bounds = self.lines.take(inner[:, None] + np.arange(-1, num_lines), mode="clip")
        np.minimum(bounds, stops[:, None], out=bounds)
        bounds[:, 0] = starts
        return bounds


def _first_segment(sizes_BK: np.ndarray, aims_B: np.ndarray, overshoots_B: np.ndarray) -> np.ndarray:
    """Return bool [B, K], True for lines in the first segment, arbitrary for lines of size 0.

    A line goes into the first segment if that segment is empty, or stays below its target length with the line. The
    first line that would exceed the target goes there too if the example overshoots. All other lines go into the second
    segment. The original flips a coin for that line only: after it the first segment is full, or the second has begun.
    """
    rows, columns = np.arange(len(sizes_BK)), np.arange(sizes_BK.shape[1])
    ends = sizes_BK.cumsum(axis=1)
    last = np.maximum((ends < aims_B[:, None]).sum(axis=1) - 1, 0)  # no earlier line was left out
    crosses = overshoots_B & (ends[rows, last] < aims_B) & (last < columns[-1])
    last = last + crosses
    is_first: np.ndarray = columns <= last[:, None]
    rooms = aims_B - ends[rows, last]
    while True:  # each pass adds the next line that still fits, in every row that has one
        fits = (sizes_BK < rooms[:, None]) & (columns > last[:, None]) & (sizes_BK > 0)
        found = fits.any(axis=1)
        if not found.any():
            return is_first
        rows, rooms, sizes_BK, fits = rows[found], rooms[found], sizes_BK[found], fits[found]
        last = fits.argmax(axis=1)
        is_first[rows, last] = True
        rooms = rooms - sizes_BK[np.arange(len(rows)), last]


# Several sequences share one row of a micro-batch, so nothing is computed for padding. Shape suffixes: S sequences,
# B rows that hold them, T positions, N tokens of the sequences that do not begin a row.


class PackedRows(NamedTuple):
    """The new places of the tokens of S padded sequences [S, T] in fewer rows [B, T].

    A row copies the sequence that it begins with and replaces its padding by the tokens of other sequences.
    """

    starts_S: np.ndarray
    """int64, the index of each sequence's first token in the flattened [B * T]."""
    leaders_B: np.ndarray
    """int64, the sequence that each row begins with."""
    sources_N: np.ndarray
    """int64, the indices of the other sequences' tokens in the flattened [S * T]."""
    targets_N: np.ndarray
    """int64, the indices of the same tokens in the flattened [B * T]."""

    def pack(self, array_ST: np.ndarray) -> np.ndarray:
        """Return the array in rows, [B, T]."""
        array_BT: np.ndarray = array_ST[self.leaders_B]
        array_BT.reshape(-1)[self.targets_N] = array_ST.reshape(-1)[self.sources_N]
        return array_BT

    def positions(self, width: int) -> np.ndarray:
        """Return int64 [B, T], the position of each token within its own sequence."""
        positions_BT = np.empty((len(self.leaders_B), width), dtype=np.int64)
        positions_BT[:] = np.arange(width)
        positions_BT.reshape(-1)[self.targets_N] = self.sources_N % width
        return positions_BT

    def moved(self, places: np.ndarray, width: int) -> np.ndarray:
        """Convert indices into the flattened [S * T] to indices into the flattened [B * T]."""
        moved: np.ndarray = places + (self.starts_S - np.arange(len(self.starts_S)) * width)[places // width]
        return moved


def packed_rows(lengths_S: np.ndarray, width: int) -> PackedRows | None:
    """Pack sequences into rows of `width` tokens by best-fit decreasing. Return None if that saves no row."""
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
    """Return int64 [S], the start of each sequence in the flattened rows.

    From the longest to the shortest, each sequence goes into the row that it fills best. Sequences of equal length keep
    their order.
    """
    order = np.argsort(-lengths_S, kind="stable")
    num_rows = int((lengths_S >= width).sum())  # full sequences, often many
    starts = np.empty(len(lengths_S), dtype=np.int64)
    starts[order[:num_rows]] = np.arange(num_rows) * width
    begun: list[tuple[int, int]] = []  # (free tokens, row), ascending
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
