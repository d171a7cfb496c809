"""Turn questions and contexts into token sequences, and the scores of their tokens into answers.

A long context becomes several overlapping windows, as in BERT and the original ELECTRA (`featurize` in
finetune/qa/qa_tasks.py of https://github.com/google-research/electra). Shape suffixes: W windows, L tokens of a window,
that is of [CLS] question [SEP] window [SEP], C tokens of its context, T positions with padding, K beams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from electra_ds.core.errors import ConfigError, DataError
from electra_ds.finetuning.squad import NOT_FOUND, Question

_BATCH = 1000
_LENGTH_WEIGHT = 0.01
N_BEST = 20
MAX_ANSWER_LENGTH = 30
"""The maximum number of tokens of an answer. Both numbers are BERT's and the original ELECTRA's."""
BERT_THRESHOLD = 0.0
"""The difference between null score and best score above which BERT predicts no answer."""


class Window(NamedTuple):
    """A question with one part of its context."""

    question: int
    """The index of the question."""
    input_ids_L: np.ndarray
    """int32: the tokenizer's pair of question and window, such as [CLS] question [SEP] window [SEP]."""
    token_type_ids_L: np.ndarray
    """int8, from the tokenizer's template for pairs; all 0 if it is like RoBERTa's.

    The tokenizer's list of model inputs does not matter, since a plain PreTrainedTokenizerFast lists none of them.
    """
    context: tuple[int, int]
    """The position of the first context token, and the position after the last."""
    offsets_C2: np.ndarray
    """int32: the start and stop of each token's characters in the context, without whitespace around them."""
    is_max_context_C: np.ndarray
    """bool, True if no other window has more context around the token. The leftmost of equal windows has it."""
    answer: tuple[int, int] = (0, 0)
    """The positions of the answer's first and last token, both 0 ([CLS]) if the window lacks part of the answer.

    The original ELECTRA's flag for no answer is the question's, even in windows that lack an answerable question's
    answer.
    """


class _Template(NamedTuple):
    """The tokens before, between and after the texts of a pair, each [2, N]: ids and token types."""

    before: np.ndarray
    between: np.ndarray
    after: np.ndarray
    types: tuple[int, int]
    """The token types of the question and of the context."""

    @property
    def length(self) -> int:
        return self.before.shape[1] + self.between.shape[1] + self.after.shape[1]


class _Context(NamedTuple):
    """The tokens of a context, without special tokens."""

    ids_C: np.ndarray
    offsets_C2: np.ndarray


def make_features(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int = 512,
    max_query_length: int = 64,
    doc_stride: int = 128,
    for_training: bool,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Window]:
    """Return windows of at most max_length tokens, with the question cut to its first max_query_length tokens.

    doc_stride is BERT's: the number of tokens from the start of one window to the start of the next (at most the room
    for the context, so that no token is left out). transformers' `stride` is the overlap instead, room - doc_stride,
    and differs between questions, as the room does. transformers offers neither that nor the cut question for a batch
    of questions, so each context is tokenized once, without special tokens, and cut into windows here. They equal
    `tokenizer(question, context, truncation="only_second", stride=overlap, return_overflowing_tokens=True)`.
    An answer that begins or ends inside a token, such as `six` in `sixth`, includes that token.

    for_training: include the positions of the first answer. progress: called with the number of questions done since
    the last call. An empty context has one window, without context tokens.

    Raises ConfigError if a question leaves no room for its context, and DataError if the tokenizer makes no pairs.
    """
    template = _template(tokenizer, questions)
    contexts: dict[str, _Context] = {}
    windows: list[Window] = []
    for begin in range(0, len(questions), _BATCH):
        batch = questions[begin : begin + _BATCH]
        new = list(dict.fromkeys(each.context for each in batch if each.context not in contexts))
        contexts |= zip(new, _tokenized_contexts(tokenizer, new), strict=True)
        queries = _tokenize(tokenizer, [each.question for each in batch])["input_ids"]
        for index, (question, query) in enumerate(zip(batch, queries, strict=True), begin):
            query_ids = np.array(query[:max_query_length], np.int32)
            room = max_length - template.length - len(query_ids)
            if room < 1:
                raise ConfigError(
                    f"max_length={max_length} leaves no room for the context next to the {len(query_ids)} tokens of "
                    f"question {question.id} and {template.length} special ones. Raise max_length, or lower "
                    f"max_query_length={max_query_length}."
                )
            tokens = contexts[question.context]
            answer = _answer(question, tokens) if for_training else None
            windows += _windows(index, query_ids, tokens, template, room, doc_stride, answer)
        progress(len(batch))
    return windows


def _windows(
    index: int,
    query_ids: np.ndarray,
    context: _Context,
    template: _Template,
    room: int,
    doc_stride: int,
    answer: tuple[int, int] | None,
) -> Iterator[Window]:
    """Yield the windows of question `index`. answer: its first and last token in the context."""
    query, all_tokens = (
        np.stack([ids, np.full_like(ids, kind)])
        for ids, kind in zip((query_ids, context.ids_C), template.types, strict=True)
    )
    beginning = np.concatenate([template.before, query, template.between], axis=1)
    first, length = beginning.shape[1], len(context.ids_C)
    is_max_contexts = max_contexts(length, room, doc_stride)
    for (start, stop), is_max in zip(window_spans(length, room, doc_stride), is_max_contexts, strict=True):
        ids, types = np.concatenate([beginning, all_tokens[:, start:stop], template.after], axis=1)
        positions = (0, 0)
        if answer is not None and start <= answer[0] and answer[1] < stop:
            positions = (first + answer[0] - start, first + answer[1] - start)
        place = (first, first + stop - start)
        yield Window(index, ids, types.astype(np.int8), place, context.offsets_C2[start:stop], is_max, positions)


def window_spans(length: int, room: int, doc_stride: int) -> list[tuple[int, int]]:
    """Return (first token, token after the last) of each window over `length` context tokens, at least one window."""
    step, spans = min(room, doc_stride), [(0, min(room, length))]
    while spans[-1][1] < length:
        start = spans[-1][0] + step
        spans.append((start, min(start + room, length)))
    return spans


@lru_cache(4096)
def max_contexts(length: int, room: int, doc_stride: int) -> tuple[np.ndarray, ...]:
    """Return bool [C] for each window: True for tokens that have their most context in it, as in BERT.

    A token's context in a window is min(tokens to its left, tokens to its right) + 0.01 * the window's length.
    """
    spans = window_spans(length, room, doc_stride)
    scores_WC = np.full((len(spans), length), -np.inf)
    for row, (start, stop) in enumerate(spans):
        left = np.arange(stop - start)
        scores_WC[row, start:stop] = np.minimum(left, left[::-1]) + _LENGTH_WEIGHT * (stop - start)
    best_C = scores_WC.argmax(0)
    return tuple(best_C[start:stop] == row for row, (start, stop) in enumerate(spans))


def _tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str], **settings: Any) -> Any:
    if not texts:
        return {"input_ids": [], "offset_mapping": []}
    settings |= {"padding": False, "truncation": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=False, **settings)


def _tokenized_contexts(tokenizer: PreTrainedTokenizerFast, contexts: list[str]) -> Iterator[_Context]:
    encoded = _tokenize(tokenizer, contexts, return_offsets_mapping=True)
    for text, ids, offsets in zip(contexts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        yield _Context(np.array(ids, np.int32), _stripped(text, np.array(offsets, np.int32).reshape(-1, 2)))


def _stripped(text: str, offsets_C2: np.ndarray) -> np.ndarray:
    """Return the offsets without the whitespace around a token, which byte-level tokenizers include.

    A token of whitespace gets an empty span.
    """
    for row in offsets_C2:
        start, stop = int(row[0]), int(row[1])
        if start < stop and (text[start].isspace() or text[stop - 1].isspace()):
            piece = text[start:stop]
            start += len(piece) - len(piece.lstrip())
            row[:] = start, max(start, start + len(piece.strip()))
    return offsets_C2


def _answer(question: Question, tokens: _Context) -> tuple[int, int] | None:
    """Return the first and last token of the first answer that occurs in the context; None if no answer does."""
    found = [each for each in zip(question.answers, question.starts, strict=True) if each[1] != NOT_FOUND]
    if question.is_impossible or not found:
        return None
    text, start = found[0]
    first = int(np.searchsorted(tokens.offsets_C2[:, 1], start, side="right"))
    last = int(np.searchsorted(tokens.offsets_C2[:, 0], start + len(text), side="left")) - 1
    return (first, last) if first <= last else None


def _template(tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]) -> _Template:
    """Return the tokenizer's template, taken from the tokens of a tokenized pair that belong to neither text."""
    probes = [("a", "b"), ("1", "2"), *((each.question, each.context) for each in questions[:_BATCH])]
    for pair in probes:
        encoded = tokenizer(*pair, padding=False, truncation=False, return_token_type_ids=True, verbose=False)
        parts = [-1 if part is None else part for part in encoded.sequence_ids(0)]
        if {0, 1} <= set(parts):
            break
    else:
        raise DataError(f"The tokenizer {tokenizer.name_or_path} makes no tokens from the questions and contexts.")
    query, context = parts.index(0), parts.index(1)
    query_stop, context_stop = query + parts.count(0), context + parts.count(1)
    as_expected = [-1] * query + [0] * parts.count(0) + [-1] * (context - query_stop) + [1] * parts.count(1)
    if parts[:context_stop] != as_expected or not query:
        raise DataError(
            f"The tokenizer {tokenizer.name_or_path} does not make pairs as [CLS] question [SEP] context [SEP]: "
            f"a token must come before the question, and the question before the context. Use another."
        )
    both = np.array([encoded["input_ids"], encoded["token_type_ids"]], np.int32)
    return _Template(
        before=both[:, :query],
        between=both[:, query_stop:context],
        after=both[:, context_stop:],
        types=(int(both[1, query]), int(both[1, context])),
    )


# --- answers


class Candidate(NamedTuple):
    """A span of one window. `end` is the position of its last token."""

    start: int
    end: int
    score: float


class Answer(NamedTuple):
    """The answer to one question."""

    text: str
    """A slice of the context, or "" for no answer."""
    n_best: list[tuple[str, float]]
    """(text, score) of the best spans, best first. Each text occurs once, and none is empty."""
    na_score: float
    """The score that was compared with the threshold, larger if an answer is less likely; -inf if none was compared."""

    @property
    def span(self) -> str:
        """The best text as if there were an answer, which the official script needs next to `na_score`."""
        return self.n_best[0][0] if self.n_best else ""


def null_score(start_logits_T: np.ndarray, end_logits_T: np.ndarray) -> float:
    """Return BERT's score of no answer, which is that of the span [CLS]."""
    return float(start_logits_T[0]) + float(end_logits_T[0])


def independent_candidates(
    start_logits_T: np.ndarray,
    end_logits_T: np.ndarray,
    context: tuple[int, int],
    is_max_context_C: np.ndarray,
    n_best: int = N_BEST,
    max_answer_length: int = MAX_ANSWER_LENGTH,
) -> list[Candidate]:
    """Return BERT's candidates: pairs of the n_best starts and the n_best ends, scored by the sum of both logits.

    A pair must be a span of the context of at most max_answer_length tokens, and its start must have its most context
    in this window. At most n_best pairs are returned, best first, the leftmost first among equals.

    context: (first position, position after the last). is_max_context_C: bool. BERT ranks all positions and then drops
    the excluded ones. Here only allowed positions are ranked, so [CLS] and the question take no place among the n_best,
    and everything that BERT would find is found.
    """
    first, stop = context
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
    context: tuple[int, int],
    is_max_context_C: np.ndarray,
    n_best: int = N_BEST,
    max_answer_length: int = MAX_ANSWER_LENGTH,
) -> list[Candidate]:
    """Return the candidates of the beam search of the original ELECTRA and XLNet.

    Row i of the ends belongs to start i. The same spans are allowed as above. The score is the log probability of the
    start plus that of the end given the start. Another head decides if there is an answer, see `best_answers`.
    """
    first, stop = context
    starts_KK = np.broadcast_to(start_index_K[:, None], end_index_KK.shape)
    inside_KK = (starts_KK >= first) & (starts_KK < stop) & (end_index_KK >= first) & (end_index_KK < stop)
    may_start_T = np.zeros(max(stop, int(starts_KK.max(initial=0)) + 1), bool)
    may_start_T[first:stop] = is_max_context_C
    allowed_KK = inside_KK & may_start_T[starts_KK]
    scores_KK = start_log_probs_K[:, None].astype(np.float64) + end_log_probs_KK
    return _best(starts_KK[allowed_KK], end_index_KK[allowed_KK], scores_KK[allowed_KK], n_best, max_answer_length)


def best_answers(
    questions: Sequence[Question],
    windows: Sequence[Window],
    candidates: Sequence[Sequence[Candidate]],
    null_scores: Sequence[float] | np.ndarray | None = None,
    *,
    threshold: float = BERT_THRESHOLD,
    against_best: bool = True,
    n_best: int = N_BEST,
) -> dict[str, Answer]:
    """Return every question's answer, by its id, from its windows' candidates.

    null_scores: one for each window, or None if every question has an answer (SQuAD 1.1), which is then the best span.

    By BERT's rule there is no answer if `null score - best score > threshold`. With against_best=False, the original
    ELECTRA's rule, there is no answer if `null score > threshold`. Its null score is the answerability logit, and its
    threshold is -2.75 (`qa_na_threshold` in its configure_finetuning.py): finetune/qa/qa_metrics.py writes every
    question's best span and the smallest logit of its windows, which the official script compares with the threshold.

    A text runs from its first token's first character to its last token's last, without whitespace around it.
    """
    pools: list[list[tuple[Candidate, Window]]] = [[] for _ in questions]
    nulls = np.full(len(questions), np.inf)
    for number, (window, found) in enumerate(zip(windows, candidates, strict=True)):
        pools[window.question] += [(candidate, window) for candidate in found]
        if null_scores is not None:
            nulls[window.question] = min(nulls[window.question], float(null_scores[number]))
    answers = {}
    for question, pool, null in zip(questions, pools, nulls.tolist(), strict=True):
        best = _distinct_texts(question.context, sorted(pool, key=lambda each: -each[0].score), n_best)
        text, score = best[0] if best else ("", -np.inf)
        if null_scores is None:
            answers[question.id] = Answer(text, best, -np.inf)
            continue
        na_score = null - score if against_best else null
        answers[question.id] = Answer("" if na_score > threshold else text, best, na_score)
    return answers


def _distinct_texts(context: str, ranked: Sequence[tuple[Candidate, Window]], n_best: int) -> list[tuple[str, float]]:
    best: dict[str, float] = {}
    for (start, end, score), window in ranked:
        first = window.context[0]
        text = context[int(window.offsets_C2[start - first][0]) : int(window.offsets_C2[end - first][1])].strip()
        if text:
            best.setdefault(text, score)
        if len(best) == n_best:
            break
    return list(best.items())


def _highest(positions: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """Return the `count` positions with the highest scores, the leftmost among equals."""
    return positions[np.argsort(-scores, kind="stable")[:count]]


def _best(
    starts: np.ndarray, ends: np.ndarray, scores: np.ndarray, n_best: int, max_answer_length: int
) -> list[Candidate]:
    """Return the pairs that are allowed spans, best first, then leftmost, then shortest. All arrays have one shape."""
    is_span = (ends >= starts) & (ends - starts < max_answer_length)
    starts, ends, scores = starts[is_span], ends[is_span], scores[is_span]
    order = np.lexsort((ends, starts, -scores))[:n_best]
    return [
        Candidate(*each)
        for each in zip(starts[order].tolist(), ends[order].tolist(), scores[order].tolist(), strict=True)
    ]
