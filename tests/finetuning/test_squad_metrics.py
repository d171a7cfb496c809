from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from electra_ds.finetuning.metrics import (
    best_threshold,
    evaluate_squad1,
    evaluate_squad2,
    exact_match,
    f1,
    normalize,
)
from electra_ds.finetuning.squad_features import Candidate, independent_candidates, joint_candidates, null_score

WORDS = st.sampled_from(
    ["the", "The", "a", "an", "cat", "Cat", "cat's", "theatre", "U.S.", "--", "!", "_", "1,000", "é"]
)
ANSWERS = st.one_of(st.just(""), st.text(max_size=12), st.lists(WORDS, max_size=6).map(" ".join))
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


def words_by_hand(text: str) -> list[str]:
    """Normalised words, sorted; without regular expressions: an article is a whole run of letters and digits."""
    kept = "".join(char for char in text.lower() if char not in PUNCTUATION)
    runs = ["".join(run) for _, run in itertools.groupby(kept, key=lambda char: char.isalnum() or char == "_")]
    return sorted("".join(" " if run in ("a", "an", "the") else run for run in runs).split())


def f1_by_hand(prediction: str, gold: str, both_empty: float) -> float:
    """By merging two sorted lists, as precision and recall."""
    left, right = words_by_hand(prediction), words_by_hand(gold)
    if not left or not right:
        return both_empty if left == right else 0.0
    i = j = shared = 0
    while i < len(left) and j < len(right):
        if left[i] == right[j]:
            i, j, shared = i + 1, j + 1, shared + 1
        elif left[i] < right[j]:
            i += 1
        else:
            j += 1
    if not shared:
        return 0.0
    precision, recall = shared / len(left), shared / len(right)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat,\tsat.", "cat sat"),
        ("an a the", ""),
        ("theatre of Athens", "theatre of athens"),
        ("U.S.A.", "usa"),
        ("a-b", "ab"),  # punctuation goes before articles
        ("A.", ""),
        ("¿Qué?", "¿qué"),  # only ASCII punctuation
        ("“the” cat", "“ ” cat"),
        ("STRASSE ÉCOLE", "strasse école"),
        ("a\u00a0cat", "cat"),
        ("", ""),
        ("?!", ""),
    ],
)
def test_normalisation(text: str, normal: str) -> None:
    assert normalize(text) == normal


def test_f1_by_arithmetic() -> None:
    # 2 words of 3 and of 4 shared: P = 2/3, R = 2/4, F1 = 2 * (1/3) / (7/6) = 4/7
    assert f1("red green blue", "green red white black") == pytest.approx(4 / 7)
    # A word counts as often as both have it: 1 of 3, 1 of 1: F1 = 2 * 1 / 4
    assert f1("ha ha ha", "ha") == pytest.approx(1 / 2)
    assert f1("the cat", "Cat!") == 1
    assert f1("", "cat") == f1("cat", "the") == 0
    assert f1("", "the") == 1
    assert f1("", "", both_empty=0.0) == 0


@given(ANSWERS, ANSWERS)
def test_scores_are_those_of_another_implementation(prediction: str, gold: str) -> None:
    assert sorted(normalize(prediction).split()) == words_by_hand(prediction)
    for both_empty in (0.0, 1.0):
        assert f1(prediction, gold, both_empty=both_empty) == pytest.approx(f1_by_hand(prediction, gold, both_empty))
    assert f1(prediction, gold) == f1(gold, prediction)
    assert exact_match(prediction, gold) <= f1(prediction, gold) <= 1
    assert exact_match(prediction, prediction) == 1


def test_squad1_takes_the_best_answer() -> None:
    golds = {"1": ["the red cat", "cat"], "2": ["dog"], "3": ["x y", "x"], "4": ["?"]}
    predictions = {"1": "Cat", "2": "a big dog", "3": "", "4": ""}
    # exact: 1, 0, 0, 1 (both normalise to nothing); f1: 1, 2 * 1 / (2 + 1), 0, 0 as in 1.1's script
    assert evaluate_squad1(golds, predictions) == {
        "exact_match": pytest.approx(100 * 2 / 4),
        "f1": pytest.approx(100 * (1 + 2 / 3) / 4),
        "total": 4,
    }
    assert evaluate_squad1({}, {}) == {"exact_match": 0, "f1": 0, "total": 0}


def test_squad2_by_arithmetic() -> None:
    golds = {"1": ["red cat"], "2": [], "3": ["the"], "4": ["dog"], "5": []}
    predictions = {"1": "cat", "2": "", "3": "", "4": "", "5": "cat"}
    # 1: exact 0, f1 2/3. 2: 1. 3: its answer normalises to nothing, so "" is right: 1. 4: 0. 5: 0.
    found = evaluate_squad2(golds, predictions, dict.fromkeys(golds, 0.0))
    assert {key: value for key, value in found.items() if not key.startswith("best")} == {
        "exact": pytest.approx(100 * 2 / 5),
        "f1": pytest.approx(100 * (2 / 3 + 2) / 5),
        "total": 5,
        "HasAns_exact": pytest.approx(100 / 3),
        "HasAns_f1": pytest.approx(100 * (2 / 3 + 1) / 3),
        "HasAns_total": 3,
        "NoAns_exact": 50,
        "NoAns_f1": 50,
        "NoAns_total": 2,
    }
    answerable = evaluate_squad2({"1": ["cat"]}, {"1": "cat"}, {"1": 0.0})
    assert answerable["exact"] == 100
    assert "NoAns_exact" not in answerable


def test_squad2_thresholds_by_arithmetic() -> None:
    golds = {"1": ["cat"], "2": [], "3": ["red dog"], "4": []}
    predictions = {"1": "cat", "2": "bird", "3": "dog", "4": "fish"}
    scores = {"1": -3.0, "2": 1.0, "3": 0.5, "4": -1.0}
    # At 0: 1 answered (right), 2 not (right), 3 not (wrong), 4 answered (wrong).
    found = evaluate_squad2(golds, predictions, scores, 0.0)
    assert (found["exact"], found["HasAns_exact"], found["NoAns_exact"]) == (50, 50, 50)
    # None answered: 2 points. Answering 1: +1 = 3, the best for exact. 4: -1. 3: + 0 exact, + 2/3 f1. 2: -1.
    assert (found["best_exact"], found["best_exact_thresh"]) == (75, -3.0)
    assert (found["best_f1"], found["best_f1_thresh"]) == (75, -3.0)
    # With 3 before 4: 2 + 1 + 2/3 is the best f1.
    found = evaluate_squad2(golds, predictions, scores | {"3": -2.0}, 0.0)
    assert (found["best_exact"], found["best_exact_thresh"]) == (75, -3.0)
    assert (found["best_f1"], found["best_f1_thresh"]) == (pytest.approx(100 * (3 + 2 / 3) / 4), -2.0)


DATA_SETS = st.lists(
    st.tuples(st.lists(ANSWERS, max_size=3), ANSWERS, st.floats(-5, 5)),
    min_size=1,
    max_size=12,
    unique_by=lambda x: x[2],
)


@given(DATA_SETS)
def test_the_best_threshold_is_the_best_of_all(rows: list[tuple[list[str], str, float]]) -> None:
    golds = {str(number): row[0] for number, row in enumerate(rows)}
    # "THE" to an impossible question is right where the script scores, wrong where it looks for a threshold.
    predictions = {str(number): row[1] if normalize(row[1]) else "" for number, row in enumerate(rows)}
    scores = {str(number): row[2] for number, row in enumerate(rows)}
    found = evaluate_squad2(golds, predictions, scores, 100.0)
    for key in ("exact", "f1"):
        every = [evaluate_squad2(golds, predictions, scores, threshold)[key] for threshold in (-6.0, *scores.values())]
        assert found[f"best_{key}"] == pytest.approx(max(every))
        if found[f"best_{key}"] > every[0] + 1e-9:
            at_best = evaluate_squad2(golds, predictions, scores, found[f"best_{key}_thresh"])
            assert at_best[key] == pytest.approx(found[f"best_{key}"])


def test_questions_of_equal_score_are_parted_as_in_the_official_script() -> None:
    golds: dict[str, list[str]] = {"1": ["cat"], "2": []}
    predictions, equal = {"1": "cat", "2": "dog"}, {"1": 0.25, "2": 0.25}
    assert best_threshold(golds, predictions, {"1": 1.0, "2": 0.0}, equal) == (100, 0.25)


@given(DATA_SETS)
def test_totals_are_the_means_over_both_kinds(rows: list[tuple[list[str], str, float]]) -> None:
    golds = {str(number): row[0] for number, row in enumerate(rows)}
    predictions = {str(number): row[1] for number, row in enumerate(rows)}
    found = evaluate_squad2(golds, predictions, dict.fromkeys(golds, 0.0))
    for key in ("exact", "f1"):
        parts = [found.get(f"{kind}_{key}", 0) * found.get(f"{kind}_total", 0) for kind in ("HasAns", "NoAns")]
        assert sum(parts) / len(rows) == pytest.approx(found[key])
        assert 0 <= found[key] <= 100
        by_hand = []
        for answers, prediction, _ in rows:
            wanted = [answer for answer in answers if words_by_hand(answer)] or [""]
            if key == "f1":
                by_hand.append(max(f1_by_hand(prediction, answer, 1.0) for answer in wanted))
            else:
                by_hand.append(max(float(normalize(prediction) == normalize(answer)) for answer in wanted))
        assert found[key] == pytest.approx(100 * sum(by_hand) / len(rows))


# --- candidates


@st.composite
def windows(draw: st.DrawFn) -> dict[str, Any]:
    """Logits with many ties, a context in the sequence, limits."""
    first, size, after = draw(st.integers(1, 5)), draw(st.integers(0, 12)), draw(st.integers(1, 3))
    length = first + size + after
    logits = st.lists(st.integers(-4, 4).map(float), min_size=length, max_size=length).map(np.float32)
    return {
        "start": draw(logits),
        "end": draw(logits),
        "context": (first, first + size),
        "is_max": np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)), bool),
        "n_best": draw(st.integers(1, 25)),
        "longest": draw(st.integers(1, 8)),
    }


@given(windows())
def test_candidates_are_those_of_a_search_through_all(window: dict[str, Any]) -> None:
    (first, stop), is_max, n_best = window["context"], window["is_max"], window["n_best"]
    found = independent_candidates(window["start"], window["end"], (first, stop), is_max, n_best, window["longest"])
    may_start = [place for place in range(first, stop) if is_max[place - first]]
    starts = sorted(may_start, key=lambda place: (-window["start"][place], place))[:n_best]
    ends = sorted(range(first, stop), key=lambda place: (-window["end"][place], place))[:n_best]
    every = [
        Candidate(start, end, float(window["start"][start] + window["end"][end]))
        for start in starts
        for end in ends
        if 0 <= end - start < window["longest"]
    ]
    assert found == sorted(every, key=lambda each: (-each.score, each.start, each.end))[:n_best]


@given(windows())
def test_candidates_hold_what_bert_would_find(window: dict[str, Any]) -> None:
    """BERT ranks all positions, then drops those outside the context; the best of what is left is no better."""
    (first, stop), n_best = window["context"], window["n_best"]
    every = range(len(window["start"]))
    starts = sorted(every, key=lambda place: -window["start"][place])[:n_best]
    ends = sorted(every, key=lambda place: -window["end"][place])[:n_best]
    bert = [
        window["start"][start] + window["end"][end]
        for start in starts
        for end in ends
        if first <= start <= end < stop and window["is_max"][start - first] and end - start < window["longest"]
    ]
    found = independent_candidates(
        window["start"], window["end"], (first, stop), window["is_max"], n_best, window["longest"]
    )
    if bert:
        assert found[0].score >= max(bert)


@settings(max_examples=50)
@given(windows(), st.integers(1, 6), st.integers(0, 2**31))
def test_beam_candidates_are_those_of_a_search_through_all(window: dict[str, Any], beams: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    (first, stop), is_max, n_best = window["context"], window["is_max"], window["n_best"]
    length = len(window["start"])
    start_index = rng.permutation(length)[: min(beams, length)]
    end_index = np.stack([rng.permutation(length)[: len(start_index)] for _ in start_index])
    start_scores, end_scores = rng.normal(size=len(start_index)), rng.normal(size=end_index.shape)
    found = joint_candidates(
        start_scores, start_index, end_scores, end_index, (first, stop), is_max, n_best, window["longest"]
    )
    every = [
        Candidate(int(start), int(end_index[i, j]), start_scores[i] + end_scores[i, j])
        for i, start in enumerate(start_index)
        for j in range(len(start_index))
        if first <= start <= end_index[i, j] < stop
        and is_max[start - first]
        and end_index[i, j] - start < window["longest"]
    ]
    assert found == sorted(every, key=lambda each: -each.score)[:n_best]


def test_the_null_score_is_that_of_the_first_position() -> None:
    assert null_score(np.array([1.5, 9.0]), np.array([-0.5, 9.0])) == 1.0
    assert math.isinf(-null_score(np.array([-np.inf]), np.array([0.0])))
