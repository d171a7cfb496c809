"""The metrics of finetuning: SQuAD's, and those of classification and regression through scikit-learn and SciPy.

Labels and predictions are class indices or scores, [N], N >= 1. Values are as the libraries return them: shares in
[0, 1], correlations in [-1, 1]. A correlation or Matthews' coefficient that is undefined, because every label or every
prediction is the same, is 0: such a prediction contains no information about the labels. The score of predictions that
are not finite is nan.

SQuAD's exact match and F1 are defined as in the official scripts of 1.1 and 2.0
(https://rajpurkar.github.io/SQuAD-explorer), in percent.
"""

from __future__ import annotations

import re
import string
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from electra_ds.config.plugins import METRIC, find
from electra_ds.core.errors import PluginError

Golds = Mapping[str, Sequence[str]]
"""The accepted answers of every question, none for an impossible question."""
Values = np.ndarray | Sequence[int] | Sequence[float]
BUILT_IN = (
    "accuracy", "f1", "f1_macro", "f1_micro", "precision", "recall", "matthews", "pearson", "spearman", "mse", "score",
)  # fmt: skip
"""Names that further metrics cannot have."""
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_LEAST_SPREAD = 0.05
"""Predicted scores count as constant if their standard deviation is below this share of the labels'.

Least-squares predictions spread r times as much as the labels, so they explain r^2 < 0.3 % of the variance.
"""


def score(metrics: Sequence[str], labels: Values, predictions: Values) -> dict[str, float]:
    """Return metrics by name, in the order requested.

    They are accuracy, f1 (of class 1 of two; 0 if it neither occurs nor is predicted), f1_macro (the mean over the
    classes that occur in either), matthews, pearson, spearman and mse.
    """
    truth, found = np.asarray(labels), np.asarray(predictions)
    if not np.isfinite(found).all():
        return dict.fromkeys(metrics, float("nan"))
    return {name: _score(name, truth, found) for name in metrics}


def _score(name: str, labels: np.ndarray, predictions: np.ndarray) -> float:
    # Imported here, because the imports take seconds that would delay a run's first step.
    from scipy.stats import pearsonr, spearmanr  # type: ignore[import-untyped]
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if name in ("matthews", "pearson", "spearman") and (_is_constant(labels) or _is_constant(predictions)):
        return 0.0
    if name == "accuracy":
        return float(accuracy_score(labels, predictions))
    if name == "f1":
        return float(f1_score(labels, predictions, pos_label=1, zero_division=0))
    if name == "f1_macro":
        return float(f1_score(labels, predictions, average="macro", zero_division=0))
    if name == "matthews":
        return float(matthews_corrcoef(labels, predictions))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about nearly constant input, for which a correlation may be nan
        if name == "mse":
            return float(np.mean((labels.astype(np.float64) - predictions) ** 2))
        correlation = {"pearson": pearsonr, "spearman": spearmanr}[name]
        value = float(correlation(labels.astype(np.float64), predictions.astype(np.float64)).statistic)
    return 0.0 if np.isnan(value) else value


class Metric(ABC):
    """A custom metric, listed under `metrics` in a recipe. Its name in results is its registered or class name."""

    def __init__(self, classes: Sequence[str]) -> None:
        """classes: the names of the classes in order; empty for scores and for choices."""
        self.classes = classes

    @abstractmethod
    def score(self, labels: np.ndarray, predictions: np.ndarray) -> float:
        """Return the metric of N predictions, the higher the better.

        Both are class indices or scores, [N]; bool [N, C] where several classes may hold. The words of all texts follow
        one another.
        """


def further_metrics(
    names: Sequence[str], classes: Sequence[str], labels: Values, predictions: Values
) -> dict[str, float]:
    """Return the metrics that a recipe adds; nan for predictions that are not finite.

    Raises PluginError if one cannot be loaded or computed.
    """
    truth, found = np.asarray(labels), np.asarray(predictions)
    results = {}
    for name in names:
        metric, value = find(METRIC, name)(classes), float("nan")
        try:
            if np.isfinite(found).all():
                value = float(metric.score(truth, found))
        except Exception as error:
            raise PluginError(
                f"The metric '{name}' cannot be computed for labels of shape {truth.shape}: {type(error).__name__}: "
                f"{error}"
            ) from error
        results[name.rpartition(":")[2]] = value
    return results


class Baseline(NamedTuple):
    """The scores that a model has to beat: those of making the same prediction for every row of a set."""

    prediction: float
    """The index of the set's most frequent class, or the mean of its scores."""
    metrics: dict[str, float]
    """The scores of that prediction. f1 is that of always predicting class 1, since class 0 alone gives 0."""


def baseline(metrics: Sequence[str], labels: Values, *, is_regression: bool) -> Baseline:
    """Return the baseline of a set with these labels, by the same metrics as `score`."""
    truth = np.asarray(labels)
    constant = float(truth.mean()) if is_regression else int(np.bincount(truth).argmax())
    found = score(metrics, truth, np.full(len(truth), constant))
    if "f1" in found:
        found |= score(("f1",), truth, np.ones(len(truth), np.int64))
    return Baseline(constant, found)


def has_constant_predictions(labels: Values, predictions: Values, *, is_regression: bool) -> bool:
    """Return True if a model predicts the same for every row although the labels differ."""
    truth, found = np.asarray(labels), np.asarray(predictions)
    if _is_constant(truth):
        return False
    return bool(found.std() < _LEAST_SPREAD * truth.std()) if is_regression else _is_constant(found)


def confusion(labels: Values, predictions: Values, num_classes: int) -> list[list[int]]:
    """Return how often class i (row) was predicted as class j (column)."""
    cells = np.asarray(labels, np.int64) * num_classes + np.asarray(predictions, np.int64)
    counts: list[list[int]] = np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes).tolist()
    return counts


def _is_constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())


# --- SQuAD


def normalize(text: str) -> str:
    """Return the text in lower case, without ASCII punctuation and articles, with single spaces between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> float:
    """Return 1 if both normalise to the same text, else 0."""
    return float(normalize(prediction) == normalize(gold))


def f1(prediction: str, gold: str, *, both_empty: float = 1.0) -> float:
    """Return the F1 of two bags of words. both_empty: the score if both are empty, 1 in SQuAD 2.0 and 0 in 1.1."""
    predicted, wanted = normalize(prediction).split(), normalize(gold).split()
    if not predicted and not wanted:
        return both_empty
    shared = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * shared / (len(predicted) + len(wanted))  # = 2PR / (P + R) with P = shared/predicted, R = shared/wanted


def evaluate_squad1(golds: Golds, predictions: Mapping[str, str]) -> dict[str, float]:
    """Return exact_match and f1, the means over all questions of the best over a question's answers, and `total`, the
    number of questions."""
    exact, overlap = _points(golds, predictions, both_empty=0.0)
    total = len(golds)
    means = {"exact_match": _percent(sum(exact.values()), total), "f1": _percent(sum(overlap.values()), total)}
    return means | {"total": total}


def evaluate_squad2(
    golds: Golds, predictions: Mapping[str, str], na_scores: Mapping[str, float], na_threshold: float = 0.0
) -> dict[str, float]:
    """Return exact, f1, total, best_exact, best_exact_thresh, best_f1 and best_f1_thresh.

    The first three are also given as HasAns_ and NoAns_, for the answerable and the impossible questions if any.
    predictions: every question's best answer as if it had one. An answer whose na_score is above na_threshold is
    replaced by no answer.
    """
    # Answers that normalise to nothing do not count. If none is left, only an empty prediction is right.
    wanted = {each: [answer for answer in golds[each] if normalize(answer)] or [""] for each in golds}
    points = dict(zip(("exact", "f1"), _points(wanted, predictions, both_empty=1.0), strict=True))
    result: dict[str, float] = {}
    for prefix, chosen in (
        ("", list(golds)),
        ("HasAns_", [question for question, answers in golds.items() if answers]),
        ("NoAns_", [question for question, answers in golds.items() if not answers]),
    ):
        if chosen or not prefix:
            for key, scores in points.items():
                kept = _with_threshold(scores, golds, na_scores, na_threshold)
                result[prefix + key] = _percent(sum(kept[question] for question in chosen), len(chosen))
            result[f"{prefix}total"] = len(chosen)
    for key, scores in points.items():
        best, threshold = best_threshold(golds, predictions, scores, na_scores)
        result |= {f"best_{key}": best, f"best_{key}_thresh": threshold}
    return result


def _points(
    golds: Golds, predictions: Mapping[str, str], *, both_empty: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Return (exact match, f1) of every question, each the best over its answers."""
    exact, overlap = {}, {}
    for question, answers in golds.items():
        found = predictions[question]
        exact[question] = max(exact_match(found, answer) for answer in answers)
        overlap[question] = max(f1(found, answer, both_empty=both_empty) for answer in answers)
    return exact, overlap


def best_threshold(
    golds: Golds, predictions: Mapping[str, str], scores: Mapping[str, float], na_scores: Mapping[str, float]
) -> tuple[float, float]:
    """Return (best percent, its threshold) as the official script's find_best_thresh does.

    It starts with no question answered and answers them in the order of rising na_scores. As there, a threshold may
    separate questions of equal score, and the threshold for answering none is 0.
    """
    current = best = float(sum(not answers for answers in golds.values()))
    threshold = 0.0
    for question in sorted(golds, key=lambda each: na_scores[each]):
        if golds[question]:
            current += scores[question]
        elif predictions[question]:
            current -= 1
        if current > best:
            best, threshold = current, na_scores[question]
    return _percent(best, len(golds)), threshold


def _with_threshold(
    scores: Mapping[str, float], golds: Golds, na_scores: Mapping[str, float], threshold: float
) -> dict[str, float]:
    """Return the scores, with questions whose na_score is above the threshold counted as not answered."""
    return {
        question: float(not golds[question]) if na_scores[question] > threshold else score
        for question, score in scores.items()
    }


def _percent(points: float, total: int) -> float:
    return 100.0 * points / total if total else 0.0
