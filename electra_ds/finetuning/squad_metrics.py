"""SQuAD's exact match and F1, as the official scripts of 1.1 and 2.0 define them (https://rajpurkar.github.io/SQuAD-explorer).

All scores are percent.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

Golds = Mapping[str, Sequence[str]]
"""The accepted answers of every question; none where it is impossible."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalize(text: str) -> str:
    """In lower case, without ASCII punctuation and without articles, words divided by single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> float:
    """1 if both normalise to the same, else 0."""
    return float(normalize(prediction) == normalize(gold))


def f1(prediction: str, gold: str, *, both_empty: float = 1.0) -> float:
    """Of the two bags of words. `both_empty` is what two empty ones score: 1 in SQuAD 2.0, 0 in the script of 1.1."""
    predicted, wanted = normalize(prediction).split(), normalize(gold).split()
    if not predicted and not wanted:
        return both_empty
    shared = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * shared / (len(predicted) + len(wanted))  # = 2PR / (P + R) with P = shared/predicted, R = shared/wanted


def evaluate_squad1(golds: Golds, predictions: Mapping[str, str]) -> dict[str, float]:
    """exact_match and f1: for each question the best over its answers, then the mean over all questions.

    A question without a prediction scores 0 and is counted: in `unanswered` too. total: questions.
    """
    exact, overlap, unanswered = 0.0, 0.0, 0
    for question, answers in golds.items():
        prediction = predictions.get(question)
        if prediction is None:
            unanswered += 1
            continue
        exact += max(exact_match(prediction, answer) for answer in answers)
        overlap += max(f1(prediction, answer, both_empty=0.0) for answer in answers)
    total = len(golds)
    return {"exact_match": _percent(exact, total), "f1": _percent(overlap, total), "total": total} | (
        {"unanswered": unanswered} if unanswered else {}
    )


def evaluate_squad2(
    golds: Golds,
    predictions: Mapping[str, str],
    na_scores: Mapping[str, float] | None = None,
    na_threshold: float = 0.0,
) -> dict[str, float]:
    """exact, f1, total, the same with HasAns_ and NoAns_ for answerable and impossible questions where there are any,
    and given na_scores best_exact, best_exact_thresh, best_f1, best_f1_thresh.

    predictions: with na_scores every question's best answer as if it had one, which is replaced by none where the
    score is above na_threshold (one without a score is kept); without them final, "" for no answer. The official
    script leaves a question without a prediction out of `total` and then fails on it; here it scores 0 and is counted,
    as in 1.1.
    """
    exact_raw, f1_raw = _raw_scores(golds, predictions)
    exact, overlap = exact_raw, f1_raw
    if na_scores is not None:
        na_scores = {each: na_scores.get(each, -float("inf")) for each in golds if each in predictions}
        exact = _with_threshold(exact_raw, golds, na_scores, na_threshold)
        overlap = _with_threshold(f1_raw, golds, na_scores, na_threshold)
    result: dict[str, float] = {}
    for prefix, chosen in (
        ("", list(golds)),
        ("HasAns_", [question for question, answers in golds.items() if answers]),
        ("NoAns_", [question for question, answers in golds.items() if not answers]),
    ):
        if chosen or not prefix:
            result[f"{prefix}exact"] = _percent(sum(exact[question] for question in chosen), len(chosen))
            result[f"{prefix}f1"] = _percent(sum(overlap[question] for question in chosen), len(chosen))
            result[f"{prefix}total"] = len(chosen)
    if unanswered := sum(question not in predictions for question in golds):
        result["unanswered"] = unanswered
    if na_scores is not None:
        for key, scores in (("exact", exact_raw), ("f1", f1_raw)):
            best, threshold = best_threshold(golds, predictions, scores, na_scores)
            result |= {f"best_{key}": best, f"best_{key}_thresh": threshold}
    return result


def evaluate(
    name: str,
    golds: Golds,
    predictions: Mapping[str, str],
    na_scores: Mapping[str, float] | None = None,
    na_threshold: float = 0.0,
) -> dict[str, float]:
    """By the data set's name, squad1 or squad2, what its official script says."""
    if name == "squad1":
        return evaluate_squad1(golds, predictions)
    return evaluate_squad2(golds, predictions, na_scores, na_threshold)


def best_threshold(
    golds: Golds, predictions: Mapping[str, str], scores: Mapping[str, float], na_scores: Mapping[str, float]
) -> tuple[float, float]:
    """(best percent, its threshold): the script's find_best_thresh, which starts from no question being answered and
    answers them in the order of rising na_scores. As there, a threshold may part questions of equal score, and the
    threshold of answering none is 0."""
    current = best = float(sum(not answers for answers in golds.values()))
    threshold = 0.0
    for question in sorted((question for question in na_scores if question in golds), key=lambda each: na_scores[each]):
        if golds[question]:
            current += scores[question]
        elif predictions.get(question):
            current -= 1
        if current > best:
            best, threshold = current, na_scores[question]
    return _percent(best, len(golds)), threshold


def _raw_scores(golds: Golds, predictions: Mapping[str, str]) -> tuple[dict[str, float], dict[str, float]]:
    """(exact match, f1) of every question, without a threshold."""
    exact, overlap = dict.fromkeys(golds, 0.0), dict.fromkeys(golds, 0.0)
    for question, answers in golds.items():
        if question in predictions:
            # Answers that normalise to nothing do not count; where none is left, no answer is the only right one.
            wanted = [answer for answer in answers if normalize(answer)] or [""]
            exact[question] = max(exact_match(predictions[question], answer) for answer in wanted)
            overlap[question] = max(f1(predictions[question], answer) for answer in wanted)
    return exact, overlap


def _with_threshold(
    scores: Mapping[str, float], golds: Golds, na_scores: Mapping[str, float], threshold: float
) -> dict[str, float]:
    """What a question without an answer scores where its na_score is above the threshold."""
    return {
        question: float(not golds[question]) if na_scores.get(question, threshold) > threshold else score
        for question, score in scores.items()
    }


def _percent(points: float, total: int) -> float:
    return 100.0 * points / total if total else 0.0
