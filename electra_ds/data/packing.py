"""Lines packed into examples of two segments, by the rule of the original's build_pretraining_dataset.py.

Lines of a document are gathered until they reach a target length, which is the sequence length, or for one example in
twenty a random shorter one. A tenth of the examples keep a single segment; the others are cut near the middle.
"""

from __future__ import annotations

import itertools

import numpy as np

from electra_ds.data.segments import Ranges
from electra_ds.objective.keyed_random import hash64

_TARGET = 0x44
SINGLE_SEGMENT_SHARE = 0.1
SHORT_SHARE = 0.05
SHORTEST_TARGET = 5


class PackedExamples:
    """All examples of a text: where each begins and ends, found once; its cut into segments, drawn at each use."""

    def __init__(self, lines: np.ndarray, ranges: Ranges, sequence_length: int, seed: int) -> None:
        """lines: int64, ascending, where each line starts in tokens.bin, and at last the end of the text."""
        self.lines = lines
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
        """(token positions [B, sequence_length - 2], tokens of the first segment [B], of the second [B])."""
        chance = rng.random((2, len(examples_B)))
        room = self.sequence_length - 2
        positions = np.zeros((len(examples_B), room), dtype=np.int64)
        first_sizes = np.zeros(len(examples_B), dtype=np.int64)
        second_sizes = np.zeros(len(examples_B), dtype=np.int64)
        starts, stops, targets = self.starts[examples_B], self.stops[examples_B], self.targets[examples_B]
        inner = np.searchsorted(self.lines, starts, side="right")
        outer = np.searchsorted(self.lines, stops, side="left")
        for row in range(len(examples_B)):
            bounds = [int(starts[row]), *self.lines[inner[row] : outer[row]].tolist(), int(stops[row])]
            is_single = chance[0, row] < SINGLE_SEGMENT_SHARE
            aim = 100_000 if is_single else (int(targets[row]) - 3) // 2
            first, second = _cut(bounds, aim, overshoots=chance[1, row] < 0.5)
            first_size = _fill(positions[row], 0, room, first)
            first_sizes[row] = first_size
            second_sizes[row] = _fill(positions[row], first_size, room - 1, second)  # a second [SEP] takes one place
        return positions, first_sizes, second_sizes


def _cut(bounds: list[int], aim: int, *, overshoots: bool) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Lines (start, stop) of the first and of the second segment.

    A line goes to the first segment where that is empty or stays below the aim with it; the first line that would
    cross the aim goes there too where `overshoots`; every other line goes to the second. The original tosses a coin
    for that line alone: after it the first segment is full, or the second has begun.
    """
    first: list[tuple[int, int]] = []
    second: list[tuple[int, int]] = []
    size = 0
    for line in itertools.pairwise(bounds):
        length = line[1] - line[0]
        if not first or size + length < aim or (overshoots and not second and size < aim):
            first.append(line)
            size += length
        else:
            second.append(line)
    return first, second


def _fill(positions: np.ndarray, begin: int, end: int, lines: list[tuple[int, int]]) -> int:
    """Write the lines' token positions into `positions[begin:end]`, as many as fit; returns how many."""
    at = begin
    for start, stop in lines:
        if at >= end:
            break
        size = min(stop - start, end - at)
        positions[at : at + size] = np.arange(start, start + size)
        at += size
    return at - begin
