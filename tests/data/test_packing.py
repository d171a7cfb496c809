"""Two-segment packing against the rule of the original's build_pretraining_dataset.py, written anew here."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from electra_ds.data.packing import PackedExamples
from electra_ds.data.token_store import Ranges

LENGTH = 128


def text_of(line_lengths: list[list[int]]) -> tuple[np.ndarray, Ranges]:
    """(line starts, document ranges) of documents given as lists of line lengths."""
    flat = [length for document in line_lengths for length in document]
    lines = np.concatenate([[0], np.cumsum(flat)]).astype(np.int64)
    ends = np.cumsum([sum(document) for document in line_lengths])
    return lines, Ranges(np.concatenate([[0], ends[:-1]]).astype(np.int64), ends.astype(np.int64))


def original(line_lengths: list[list[int]], length: int, rng: random.Random) -> list[tuple[list[int], list[int]]]:
    """Segments of every example as token numbers, line by line as the original reads them."""
    examples, sentences, size, target, token = [], [], 0, length, 0  # type: ignore[var-annotated]

    def create() -> None:
        nonlocal sentences, size, target
        aim = 100_000 if rng.random() < 0.1 else (target - 3) // 2
        first: list[int] = []
        second: list[int] = []
        for sentence in sentences:
            fits = len(first) == 0 or len(first) + len(sentence) < aim
            if fits or (len(second) == 0 and len(first) < aim and rng.random() < 0.5):
                first += sentence
            else:
                second += sentence
        first = first[: length - 2]
        examples.append((first, second[: max(0, length - len(first) - 3)]))
        sentences, size = [], 0
        target = rng.randint(5, length) if rng.random() < 0.05 else length

    for document in line_lengths:
        for line in document:
            sentences.append(list(range(token, token + line)))
            token += line
            size += line
            if size >= target:
                create()
        if size:
            create()
    return examples


def ours(line_lengths: list[list[int]], length: int, seed: int) -> list[tuple[list[int], list[int]]]:
    lines, ranges = text_of(line_lengths)
    packed = PackedExamples(lines, ranges, length, seed)
    positions, first, second = packed.segments(np.arange(len(packed)), np.random.default_rng(seed))
    return [
        (row[:size].tolist(), row[size : size + rest].tolist())
        for row, size, rest in zip(positions, first, second, strict=True)
    ]


def corpus(documents: int, seed: int) -> list[list[int]]:
    """Line lengths like those of a web text: many short lines, some longer than a whole example."""
    rng = np.random.default_rng(seed)
    return [np.maximum(1, rng.lognormal(3.2, 0.9, rng.integers(1, 60))).astype(int).tolist() for _ in range(documents)]


def statistics(examples: list[tuple[list[int], list[int]]]) -> dict[str, float]:
    first = np.array([len(a) for a, _ in examples])
    second = np.array([len(b) for _, b in examples])
    total = first + second
    return {
        "examples per token": len(examples) / total.sum(),
        "one segment": (second == 0).mean(),
        "full": (total >= LENGTH - 3).mean(),
        "below half": (total < LENGTH // 2).mean(),
        "first, mean": first.mean() / LENGTH,
        "second, mean": second.mean() / LENGTH,
        "first, spread": first.std() / LENGTH,
        "second, spread": second.std() / LENGTH,
        "gap between segments": np.mean([b[0] != a[-1] + 1 for a, b in examples if b]),
    }


@pytest.mark.slow
def test_statistics_are_the_originals() -> None:
    """Each figure against 12 runs of the original's rule: within five of its standard deviations from run to run."""
    text = corpus(3000, 0)
    theirs = [statistics(original(text, LENGTH, random.Random(seed))) for seed in range(12)]
    found = statistics(ours(text, LENGTH, 0))
    for name, value in found.items():
        runs = np.array([run[name] for run in theirs])
        assert abs(value - runs.mean()) < 5 * runs.std(ddof=1) + 1e-12, (name, value, runs.mean(), runs.std(ddof=1))
    assert 0.05 < found["one segment"] < 0.4
    assert found["gap between segments"] > 0


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=8), st.integers(0, 99))
@settings(max_examples=150)
def test_examples_are_whole_lines_of_one_document_and_nothing_is_left_out(text: list[list[int]], seed: int) -> None:
    lines, ranges = text_of(text)
    packed = PackedExamples(lines, ranges, 32, seed)
    order = np.argsort(packed.starts)
    starts, stops = packed.starts[order], packed.stops[order]
    assert starts[0] == 0
    assert stops[-1] == lines[-1]
    assert (starts[1:] == stops[:-1]).all()
    assert np.isin(starts, lines).all()
    document = np.searchsorted(ranges.stops, starts, side="right")
    assert (stops <= ranges.stops[document]).all()
    sizes, targets = stops - starts, packed.targets[order]
    assert ((sizes >= targets) | (stops == ranges.stops[document])).all()  # an example ends at its target, or with
    last_lines = lines[np.searchsorted(lines, stops) - 1]  # its document,
    assert (last_lines - starts < targets).all()  # and not a line later
    assert set(np.unique(targets)) <= set(range(5, 33))


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=8), st.integers(0, 99))
@settings(max_examples=150)
def test_segments_obey_the_rule_line_by_line(text: list[list[int]], seed: int) -> None:
    lines, ranges = text_of(text)
    packed = PackedExamples(lines, ranges, 32, seed)
    chance = np.random.default_rng(seed).random((2, len(packed)))
    for index, (first, second) in enumerate(ours(text, 32, seed)):
        start, stop, target = packed.starts[index], packed.stops[index], packed.targets[index]
        inside = [*lines[(lines >= start) & (lines < stop)].tolist(), int(stop)]
        sentences = [list(range(a, b)) for a, b in itertools.pairwise(inside)]
        aim = 100_000 if chance[0, index] < 0.1 else (int(target) - 3) // 2
        a: list[int] = []
        b: list[int] = []
        for sentence in sentences:
            if not a or len(a) + len(sentence) < aim or (not b and len(a) < aim and chance[1, index] < 0.5):
                a += sentence
            else:
                b += sentence
        assert first == a[:30]
        assert second == b[: max(0, 32 - len(first) - 3)]


def test_a_range_that_begins_or_ends_inside_a_line_is_packed_without_its_neighbours() -> None:
    lines, _ = text_of([[10, 10, 10, 10]])
    packed = PackedExamples(lines, Ranges(np.array([13]), np.array([36])), 16, 0)
    positions, first, second = packed.segments(np.arange(len(packed)), np.random.default_rng(0))
    for row, size in zip(positions, first + second, strict=True):
        assert set(row[:size]) <= set(range(13, 36))


def test_short_targets_come_in_their_share_and_every_length() -> None:
    lines, ranges = text_of([[1] * 200_000])
    targets = PackedExamples(lines, ranges, LENGTH, 3).targets
    short = targets[targets < LENGTH]
    share = (len(targets) * 0.05 * (LENGTH - 5) / (LENGTH - 4)) / len(targets)  # one in 124 draws is LENGTH itself
    assert abs(len(short) / len(targets) - share) < 5 * (share / len(targets)) ** 0.5
    assert short.min() >= 5
