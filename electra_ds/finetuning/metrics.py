"""The metrics of finetuning, through scikit-learn and SciPy, and defined where those warn or give nan.

Labels and predictions are class indices or scores, [N], N >= 1. Values are as the libraries give them: shares in
[0, 1], correlations in [-1, 1].

Where a correlation or Matthews' coefficient is undefined, because every label or every prediction is the same, it
is 0: such a prediction says nothing of the labels. Predictions that are not finite have no score: nan.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Values = np.ndarray | Sequence[int] | Sequence[float]
_LEAST_SPREAD = 0.05
"""Predicted scores count as constant if their standard deviation is less than this share of that of the labels.
Least squares predicts with a spread of r times that of the labels, so they explain r^2 < 0.3 % of the variance."""


def _accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def _f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Of class 1 of two; 0 where it was neither there nor predicted."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, pos_label=1, zero_division=0))


def _f1_macro(labels: np.ndarray, predictions: np.ndarray) -> float:
    """The mean over the classes that occur in either."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0))


def _matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    if _is_constant(labels) or _is_constant(predictions):
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def _pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    from scipy.stats import pearsonr  # type: ignore[import-untyped]

    return _correlation(pearsonr, labels, predictions)


def _spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Of ranks, where equal values share the mean of theirs."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, labels, predictions)


def _mse(labels: np.ndarray, predictions: np.ndarray) -> float:
    with np.errstate(over="ignore"):
        return float(np.mean((labels.astype(np.float64) - predictions) ** 2))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "f1_macro": _f1_macro,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
    "mse": _mse,
}
"""By name. scikit-learn and SciPy are imported when one is computed: they take seconds, which a run spends better
on its first step."""


def score(metrics: Sequence[str], labels: Values, predictions: Values) -> dict[str, float]:
    """The metrics by name, in the order asked for.

    Raises ValueError if there are no labels, or not as many predictions.
    """
    truth, found = np.asarray(labels), np.asarray(predictions)
    if truth.ndim != 1 or truth.shape != found.shape or not len(truth):
        raise ValueError(f"labels of shape {truth.shape} and predictions of shape {found.shape} cannot be compared")
    if not np.isfinite(found).all():
        return dict.fromkeys(metrics, float("nan"))
    return {name: METRICS[name](truth, found) for name in metrics}


class Baseline(NamedTuple):
    """The scores that a model has to beat: those of the same prediction for every row of a set."""

    prediction: float
    """The index of the set's most frequent class, or the mean of its scores."""
    metrics: dict[str, float]


def baseline(metrics: Sequence[str], labels: Values, *, is_regression: bool) -> Baseline:
    """Return the baseline of a set with these labels, by the same metrics as `score`."""
    truth = np.asarray(labels)
    constant = float(truth.mean()) if is_regression else int(np.bincount(truth).argmax())
    return Baseline(constant, score(metrics, truth, np.full(len(truth), constant)))


def has_constant_predictions(labels: Values, predictions: Values, *, is_regression: bool) -> bool:
    """Return whether a model predicts the same for every row, although the labels differ."""
    truth, found = np.asarray(labels), np.asarray(predictions)
    if _is_constant(truth):
        return False
    return bool(found.std() < _LEAST_SPREAD * truth.std()) if is_regression else _is_constant(found)


def confusion(labels: Values, predictions: Values, num_classes: int) -> list[list[int]]:
    """How often class i (row) was predicted as class j (column)."""
    cells = np.asarray(labels, np.int64) * num_classes + np.asarray(predictions, np.int64)
    counts: list[list[int]] = np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes).tolist()
    return counts


def _is_constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())


def _correlation(function: Callable, labels: np.ndarray, predictions: np.ndarray) -> float:
    if _is_constant(labels) or _is_constant(predictions):
        return 0.0
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of input so nearly constant that it may come out as nan
        value = float(function(labels.astype(np.float64), predictions.astype(np.float64)).statistic)
    return 0.0 if np.isnan(value) else value
