"""Answers from the scores of the tokens of windows.

A window is one part of a question's context, in a sequence [CLS] question [SEP] window [SEP]. Shape suffixes: T the
sequence's positions, C its context's tokens, K beams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from electra_ds.finetuning.squad import Question
from electra_ds.finetuning.squad_features import Features

N_BEST = 20
MAX_ANSWER_LENGTH = 30
"""Tokens of an answer. Both numbers are BERT's and the original ELECTRA's."""
BERT_THRESHOLD = 0.0
"""The difference of null score and best score above which BERT says that there is no answer."""


class Candidate(NamedTuple):
    """A span of one window; `end` is its last token's position."""

    start: int
    end: int
    score: float


class Answer(NamedTuple):
    """The answer to one question."""

    text: str
    """A slice of the context; "" for no answer."""
    score: float
    """The score of the best span; minus infinity if there is none."""
    null_score: float
    """The smallest of the windows' scores of no answer; 0 if none are given."""
    n_best: list[tuple[str, float]]
    """(text, score) of the best spans, best first, each text once, none empty."""
    na_score: float
    """The score that was compared with the threshold; the larger, the less likely an answer."""

    @property
    def span(self) -> str:
        """The best text as if there were an answer, which the official script needs in addition to `na_score`."""
        return self.n_best[0][0] if self.n_best else ""


def null_score(start_logits_T: np.ndarray, end_logits_T: np.ndarray) -> float:
    """Return BERT's score of no answer: that of the span [CLS]."""
    return float(start_logits_T[0]) + float(end_logits_T[0])


def independent_candidates(
    start_logits_T: np.ndarray,
    end_logits_T: np.ndarray,
    context: Sequence[int] | np.ndarray,
    is_max_context_C: np.ndarray,
    n_best: int = N_BEST,
    max_answer_length: int = MAX_ANSWER_LENGTH,
) -> list[Candidate]:
    """Return the candidates of BERT's scheme: of the n_best starts and n_best ends, the pairs that are a span of the
    context, no longer than max_answer_length tokens, whose start has its most context in this window. Score: the sum of
    both logits.

    context: (first position, position after the last); is_max_context_C: bool. Best first, at most n_best; of equals
    the leftmost. BERT ranks all positions and then drops those that may not be; here only those that may be are ranked,
    so that [CLS] and the question take no place: what BERT would find is found too.
    """
    first, stop = int(context[0]), int(context[1])
    starts = first + np.flatnonzero(is_max_context_C)
    starts = _highest(starts, start_logits_T[starts], n_best)
    ends = np.arange(first, stop)
    ends = _highest(ends, end_logits_T[first:stop], n_best)
    starts_KK, ends_KK = np.broadcast_arrays(starts[:, None], ends[None, :])
    scores_KK = start_logits_T[starts_KK].astype(np.float64) + end_logits_T[ends_KK]
    return _best(starts_KK, ends_KK, scores_KK, n_best, max_answer_length)


def joint_candidates(
    start_log_probs_K: np.ndarray,
    start_index_K: np.ndarray,
    end_log_probs_KK: np.ndarray,
    end_index_KK: np.ndarray,
    context: Sequence[int] | np.ndarray,
    is_max_context_C: np.ndarray,
    n_best: int = N_BEST,
    max_answer_length: int = MAX_ANSWER_LENGTH,
) -> list[Candidate]:
    """Return the candidates of the original ELECTRA's, and XLNet's, beam search: row i of the ends belongs to the start
    i. The same spans are allowed as above. Score: log probability of the start plus that of the end given the start.

    Another head says whether there is an answer, see `best_answers`.
    """
    first, stop = int(context[0]), int(context[1])
    starts_KK = np.broadcast_to(start_index_K[:, None], end_index_KK.shape)
    inside_KK = (starts_KK >= first) & (starts_KK < stop) & (end_index_KK >= first) & (end_index_KK < stop)
    may_start_T = np.zeros(max(stop, int(starts_KK.max(initial=0)) + 1), bool)
    may_start_T[first:stop] = is_max_context_C
    allowed_KK = inside_KK & may_start_T[starts_KK]
    scores_KK = start_log_probs_K[:, None].astype(np.float64) + end_log_probs_KK
    return _best(starts_KK[allowed_KK], end_index_KK[allowed_KK], scores_KK[allowed_KK], n_best, max_answer_length)


def best_answers(
    questions: Sequence[Question],
    windows: Features,
    candidates: Sequence[Sequence[Candidate]],
    null_scores: Sequence[float] | np.ndarray | None = None,
    *,
    threshold: float = BERT_THRESHOLD,
    against_best: bool = True,
    n_best: int = N_BEST,
) -> dict[str, Answer]:
    """Return every question's answer, by its id, from its windows' candidates.

    null_scores: one for each window, or None if every question has an answer (SQuAD 1.1): then always the best span.
    With them there is no answer if `null score - best score > threshold`, BERT's rule, or with against_best=False if
    `null score > threshold`, the original ELECTRA's, whose null score is its answerability logit, at -2.75
    (`qa_na_threshold` of its configure_finetuning.py): finetune/qa/qa_metrics.py writes every question's best span, and
    with it the smallest of its windows' logits, which the official script compares with the threshold.
    A text is the context from its first token's first character to its last token's last, without whitespace around it.
    """
    pools: list[list[tuple[float, int, Candidate]]] = [[] for _ in questions]
    nulls = np.full(len(questions), np.inf)
    for window, (index, found) in enumerate(zip(windows.question.tolist(), candidates, strict=True)):
        pools[index] += [(candidate.score, window, candidate) for candidate in found]
        if null_scores is not None:
            nulls[index] = min(nulls[index], float(null_scores[window]))
    answers = {}
    for question, pool, null in zip(questions, pools, nulls.tolist(), strict=True):
        best = _distinct_texts(question.context, windows, sorted(pool, key=lambda each: -each[0]), n_best)
        text, score = best[0] if best else ("", -np.inf)
        if null_scores is None:
            answers[question.id] = Answer(text, score, 0.0, best, -np.inf)
            continue
        na_score = null - score if against_best else null
        answers[question.id] = Answer("" if na_score > threshold else text, score, null, best, na_score)
    return answers


def _distinct_texts(
    context: str, windows: Features, ranked: Sequence[tuple[float, int, Candidate]], n_best: int
) -> list[tuple[str, float]]:
    best: dict[str, float] = {}
    for score, window, (start, end, _) in ranked:
        offsets, first = windows.offsets[window], int(windows.context[window][0])
        text = context[int(offsets[start - first][0]) : int(offsets[end - first][1])].strip()
        if text:
            best.setdefault(text, score)
        if len(best) == n_best:
            break
    return list(best.items())


def _highest(positions: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """Return the `count` positions of the highest scores; of equals the leftmost."""
    return positions[np.argsort(-scores, kind="stable")[:count]]


def _best(
    starts: np.ndarray, ends: np.ndarray, scores: np.ndarray, n_best: int, max_answer_length: int
) -> list[Candidate]:
    """Return those pairs, of arrays of one shape, that are spans, best first; of equals the leftmost and shortest."""
    is_span = (ends >= starts) & (ends - starts < max_answer_length)
    starts, ends, scores = starts[is_span], ends[is_span], scores[is_span]
    order = np.lexsort((ends, starts, -scores))[:n_best]
    return [
        Candidate(*each)
        for each in zip(starts[order].tolist(), ends[order].tolist(), scores[order].tolist(), strict=True)
    ]
