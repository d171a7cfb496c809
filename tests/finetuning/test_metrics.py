"""The metrics of finetuning against the libraries, against hand computations, and where the libraries give up."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from electra_ds.finetuning.metrics import baseline, confusion, has_constant_predictions, score

pytestmark = pytest.mark.filterwarnings("error")

Pairs = list[tuple[float, float]]


def classes(count: int) -> st.SearchStrategy[Pairs]:
    return st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), min_size=1, max_size=40)


# Few distinct values, so that ties and constants occur, and any others of sizes that occur as scores.
NUMBERS = st.one_of(st.sampled_from([0.0, 1.0, 2.5, 5.0]), st.floats(-1e6, 1e6, allow_subnormal=False))
SCORES = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=30)


def split(pairs: Pairs) -> tuple[list[float], list[float]]:
    return [truth for truth, _ in pairs], [found for _, found in pairs]


def of_library(function: Callable, truth: list[float], found: list[float], **options: object) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(function(truth, found, **options))


@given(classes(2))
def test_scores_of_two_classes_are_the_librarys(pairs: Pairs) -> None:
    truth, found = split(pairs)
    scored = score(["accuracy", "f1", "f1_macro", "matthews"], truth, found)
    assert list(scored) == ["accuracy", "f1", "f1_macro", "matthews"]
    assert scored["accuracy"] == of_library(sklearn.metrics.accuracy_score, truth, found)
    assert scored["f1"] == of_library(sklearn.metrics.f1_score, truth, found, zero_division=0)
    assert scored["f1_macro"] == of_library(sklearn.metrics.f1_score, truth, found, average="macro", zero_division=0)
    assert scored["matthews"] == pytest.approx(of_library(sklearn.metrics.matthews_corrcoef, truth, found))


@given(classes(4))
def test_scores_of_several_classes_are_the_librarys_and_the_confusion_tells_them(pairs: Pairs) -> None:
    truth, found = split(pairs)
    table = np.array(confusion(truth, found, 4))
    assert table.sum() == len(pairs)
    np.testing.assert_array_equal(table, sklearn_confusion(truth, found, 4))
    scored = score(["accuracy", "f1_macro", "matthews"], truth, found)
    assert scored["accuracy"] == pytest.approx(table.trace() / len(pairs))
    assert scored["matthews"] == pytest.approx(of_library(sklearn.metrics.matthews_corrcoef, truth, found), abs=1e-12)
    f1s = [
        2 * table[c, c] / (table[c].sum() + table[:, c].sum()) for c in range(4) if table[c].sum() + table[:, c].sum()
    ]
    assert scored["f1_macro"] == pytest.approx(sum(f1s) / len(f1s))


def sklearn_confusion(truth: list[float], found: list[float], count: int) -> np.ndarray:
    return sklearn.metrics.confusion_matrix(truth, found, labels=range(count))


@given(SCORES)
def test_correlations_are_the_librarys_and_never_nan(pairs: Pairs) -> None:
    truth, found = split(pairs)
    scored = score(["spearman", "pearson", "mse"], truth, found)
    assert not any(math.isnan(value) for value in scored.values())
    assert scored["mse"] == pytest.approx(sklearn.metrics.mean_squared_error(truth, found))
    if len(set(truth)) == 1 or len(set(found)) == 1:
        assert scored["spearman"] == scored["pearson"] == 0
        return
    for name, function in (("spearman", scipy.stats.spearmanr), ("pearson", scipy.stats.pearsonr)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = float(function(truth, found).statistic)
        assert scored[name] == pytest.approx(0.0 if math.isnan(expected) else expected, abs=1e-12)
        assert -1 - 1e-9 <= scored[name] <= 1 + 1e-9


@given(SCORES)
def test_spearman_is_the_correlation_of_ranks_with_ties_sharing_their_mean(pairs: Pairs) -> None:
    def ranks(values: list[float]) -> list[float]:
        return [
            sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
            for value in values
        ]

    truth, found = split(pairs)
    a, b = np.array(ranks(truth)), np.array(ranks(found))
    a, b = a - a.mean(), b - b.mean()
    spread = math.sqrt((a * a).sum() * (b * b).sum())
    expected = float((a * b).sum()) / spread if spread else 0.0
    assert score(["spearman"], truth, found)["spearman"] == pytest.approx(expected, abs=1e-9)


def test_hand_computations() -> None:
    truth, found = [1, 1, 1, 1, 0, 0, 0, 1], [1, 1, 0, 1, 0, 1, 0, 1]
    (tn, fp), (fn, tp) = confusion(truth, found, 2)
    assert (tn, fp, fn, tp) == (2, 1, 1, 4)
    scored = score(["accuracy", "f1", "f1_macro", "matthews"], truth, found)
    assert scored["accuracy"] == 6 / 8
    assert scored["f1"] == pytest.approx(2 * 4 / (2 * 4 + 1 + 1))
    assert scored["f1_macro"] == pytest.approx((0.8 + 2 * 2 / (2 * 2 + 1 + 1)) / 2)
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert scored["matthews"] == pytest.approx(matthews) == pytest.approx(7 / 15)
    # d = 0, 1, -1, 0 between the ranks: 1 - 6 * 2 / (4 * 15).
    scored = score(["spearman", "pearson", "mse"], [1, 2, 3, 4], [10, 30, 20, 70])
    assert scored["spearman"] == pytest.approx(0.8)
    # Deviations -1.5, -.5, .5, 1.5 and -22.5, -2.5, -12.5, 37.5: 85 / sqrt(5 * 2075).
    assert scored["pearson"] == pytest.approx(85 / math.sqrt(5 * 2075))
    assert scored["mse"] == pytest.approx((9**2 + 28**2 + 17**2 + 66**2) / 4)


@pytest.mark.parametrize(
    ("truth", "found"), [([1, 1, 1], [1, 1, 1]), ([0, 1, 1], [1, 1, 1]), ([0, 0], [0, 1]), ([0], [0]), ([2], [1])]
)
def test_what_is_undefined_is_zero(truth: list[int], found: list[int]) -> None:
    scored = score(["matthews", "spearman", "pearson"], truth, found)
    assert scored == {"matthews": 0.0, "spearman": 0.0, "pearson": 0.0}
    assert score(["f1"], [0, 0], [0, 0]) == {"f1": 0.0}


def test_nearly_constant_scores_raise_no_warning() -> None:
    scored = score(["spearman", "pearson"], [1.0, 1.0, 1.0 + 1e-16, 1.0 + 1e-15], [1.0, 2.0, 3.0, 4.0])
    assert all(-1 <= value <= 1 for value in scored.values())


def test_a_prediction_that_is_not_finite_has_no_score() -> None:
    for value in (math.nan, math.inf):
        assert all(map(math.isnan, score(["spearman", "mse"], [1.0, 2.0, 3.0], [1.0, value, 3.0]).values()))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_no_class_for_every_row_is_more_accurate_than_the_baseline(truth: list[int]) -> None:
    found = baseline(["accuracy", "matthews"], truth, is_regression=False)
    assert found.metrics["accuracy"] == max(truth.count(label) for label in truth) / len(truth)
    assert truth[truth.index(int(found.prediction))] == found.prediction
    assert found.metrics["matthews"] == 0


@given(st.lists(st.integers(0, 1), min_size=1, max_size=40))
def test_neither_class_for_every_row_has_a_higher_f1_than_the_baseline(truth: list[int]) -> None:
    share = sum(truth) / len(truth)
    found = baseline(["f1"], truth, is_regression=False).metrics["f1"]
    assert found == pytest.approx(2 * share / (1 + share))  # a balanced set: 2/3
    assert found == max(score(["f1"], truth, [label] * len(truth))["f1"] for label in (0, 1))


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.floats(-1e3, 1e3))
def test_no_score_for_every_row_has_a_smaller_squared_error_than_the_baseline(truth: list[float], any_: float) -> None:
    found = baseline(["mse", "pearson"], truth, is_regression=True)
    assert found.metrics["mse"] == pytest.approx(np.var(truth), abs=1e-6)
    assert found.metrics["mse"] <= score(["mse"], truth, [any_] * len(truth))["mse"] + 1e-6
    assert found.metrics["pearson"] == 0


@pytest.mark.parametrize(
    ("truth", "found", "is_regression", "expected"),
    [
        ([0, 1, 1], [1, 1, 1], False, True),
        ([0, 1, 1], [0, 1, 1], False, False),
        ([1, 1, 1], [1, 1, 1], False, False),  # right
        ([0.0, 5.0, 2.5], [2.50, 2.52, 2.51], True, True),
        ([0.0, 5.0, 2.5], [2.0, 3.0, 2.5], True, False),
        ([2.5, 2.5], [2.5, 2.5], True, False),
    ],
)
def test_predictions_are_constant_where_they_do_not_follow_labels_that_differ(
    truth: list[float], found: list[float], is_regression: bool, expected: bool
) -> None:
    assert has_constant_predictions(truth, found, is_regression=is_regression) == expected
