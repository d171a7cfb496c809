"""Questions and their contexts as token sequences, a long context as several windows that overlap.

As BERT and the original ELECTRA do it (`featurize` in finetune/qa/qa_tasks.py of
https://github.com/google-research/electra). Shape suffixes: W windows, L a window's tokens, C its context's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from electra_ds.core.errors import ConfigError, DataError
from electra_ds.finetuning.squad import NOT_FOUND, Question

_BATCH = 1000
_LENGTH_WEIGHT = 0.01


@dataclass(frozen=True)
class Features:
    """Windows, as parallel entries; those of a question follow each other, from left to right."""

    question: np.ndarray
    """int32 [W], index into the questions."""
    input_ids: list[np.ndarray]
    """int32 [L]: the tokenizer's pair of question and window, such as [CLS] question [SEP] window [SEP]."""
    token_type_ids: list[np.ndarray]
    """int8 [L], as the tokenizer's template for pairs has them; all 0 if it is like RoBERTa's. What the tokenizer
    says its model takes does not matter: a plain PreTrainedTokenizerFast says that of none."""
    context: np.ndarray
    """int32 [W, 2]: the position of the window's first context token, and the one after the last."""
    offsets: list[np.ndarray]
    """int32 [C, 2]: where in the context each token's characters start and stop, without whitespace around them."""
    is_max_context: list[np.ndarray]
    """bool [C], whether no other window has more context around the token; of equals the leftmost has it."""
    start_position: np.ndarray
    """int32 [W], position of the answer's first token; 0, [CLS], if the window does not hold the complete answer. The
    original ELECTRA's flag for that is the question's, also in windows of an answerable question without the answer."""
    end_position: np.ndarray
    """int32 [W], that of its last."""

    def __len__(self) -> int:
        return len(self.input_ids)


class _Template(NamedTuple):
    """The tokens before, between and after a pair; each [2, N]: ids and token types."""

    before: np.ndarray
    between: np.ndarray
    after: np.ndarray
    types: tuple[int, int]
    """The types of the question's and of the context's tokens."""

    @property
    def length(self) -> int:
        return self.before.shape[1] + self.between.shape[1] + self.after.shape[1]


class _Context(NamedTuple):
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
) -> Features:
    """Return windows of at most max_length tokens, with the question cut to its first max_query_length tokens.

    doc_stride is BERT's: how many tokens further a window starts than the one before it (at most the room for the
    context, so that none is left out). transformers' `stride` is the overlap instead, room - doc_stride, and differs
    from question to question, as the room does; neither that nor the cut question can be asked of it for many questions
    at once, so each context is tokenized once, without special tokens, and the windows are cut here. They are what
    `tokenizer(question, context, truncation="only_second", stride=overlap, return_overflowing_tokens=True)` gives.
    An answer that begins or ends inside a token, as `six` of `sixth`, gets that token.

    for_training: with the first answer's positions; else all of them are 0.
    An empty context has one window, without context tokens. progress: called with the
    number of questions done since the last call.

    Raises ConfigError if a question leaves no room for its context, DataError for a tokenizer without pairs.
    """
    if max_query_length < 1 or doc_stride < 1:
        raise ConfigError(f"max_query_length={max_query_length} and doc_stride={doc_stride}: both must be at least 1.")
    template = _template(tokenizer, questions)
    contexts: dict[str, _Context] = {}
    windows: list[_Window] = []
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
    places = np.array([window.places for window in windows], np.int32).reshape(-1, 5)
    return Features(
        question=places[:, 0],
        input_ids=[window.tokens[0] for window in windows],
        token_type_ids=[window.tokens[1].astype(np.int8) for window in windows],
        context=places[:, 1:3],
        offsets=[window.offsets for window in windows],
        is_max_context=[window.is_max_context for window in windows],
        start_position=places[:, 3],
        end_position=places[:, 4],
    )


class _Window(NamedTuple):
    tokens: np.ndarray
    """int32 [2, L]: ids and token types."""
    offsets: np.ndarray
    is_max_context: np.ndarray
    places: tuple[int, int, int, int, int]
    """The question's index, the positions of the context's beginning and end, and of the answer's."""


def _windows(
    index: int,
    query_ids: np.ndarray,
    context: _Context,
    template: _Template,
    room: int,
    doc_stride: int,
    answer: tuple[int, int] | None,
) -> Iterator[_Window]:
    """Yield the windows of question `index`. answer: the first and the last of its tokens in the context."""
    query, all_tokens = (
        np.stack([ids, np.full_like(ids, kind)])
        for ids, kind in zip((query_ids, context.ids_C), template.types, strict=True)
    )
    beginning = np.concatenate([template.before, query, template.between], axis=1)
    first, length = beginning.shape[1], len(context.ids_C)
    is_max_contexts = max_contexts(length, room, doc_stride)
    for (start, stop), is_max in zip(window_spans(length, room, doc_stride), is_max_contexts, strict=True):
        tokens = np.concatenate([beginning, all_tokens[:, start:stop], template.after], axis=1)
        positions = (0, 0)
        if answer is not None and start <= answer[0] and answer[1] < stop:
            positions = (first + answer[0] - start, first + answer[1] - start)
        places = (index, first, first + stop - start, *positions)
        yield _Window(tokens, context.offsets_C2[start:stop], is_max, places)


def window_spans(length: int, room: int, doc_stride: int) -> list[tuple[int, int]]:
    """Return (first token, token after the last) of the windows over a context of `length` tokens; one for none."""
    step, spans = min(room, doc_stride), [(0, min(room, length))]
    while spans[-1][1] < length:
        start = spans[-1][0] + step
        spans.append((start, min(start + room, length)))
    return spans


@lru_cache(4096)
def max_contexts(length: int, room: int, doc_stride: int) -> tuple[np.ndarray, ...]:
    """Return for each window bool [C]: whether min(tokens to its left, to its right) + 0.01 * the window's length is
    the highest of all windows that hold the token, as in BERT."""
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
    """Return the offsets without the whitespace around a token, which byte-level tokenizers include; a token of
    whitespace gets an empty span."""
    for row in offsets_C2:
        start, stop = int(row[0]), int(row[1])
        if start < stop and (text[start].isspace() or text[stop - 1].isspace()):
            piece = text[start:stop]
            start += len(piece) - len(piece.lstrip())
            row[:] = start, max(start, start + len(piece.strip()))
    return offsets_C2


def _answer(question: Question, tokens: _Context) -> tuple[int, int] | None:
    """Return the first and the last token of the first answer that is in the context, or None if none is."""
    found = [each for each in zip(question.answers, question.starts, strict=True) if each[1] != NOT_FOUND]
    if question.is_impossible or not found:
        return None
    text, start = found[0]
    first = int(np.searchsorted(tokens.offsets_C2[:, 1], start, side="right"))
    last = int(np.searchsorted(tokens.offsets_C2[:, 0], start + len(text), side="left")) - 1
    return (first, last) if first <= last else None


def _template(tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]) -> _Template:
    """Return the template, read off a pair that the tokenizer made: its tokens that belong to neither text."""
    probes = [("a", "b"), ("1", "2"), *((each.question, each.context) for each in questions[:_BATCH])]
    for pair in probes:
        encoded = tokenizer(*pair, padding=False, truncation=False, return_token_type_ids=True, verbose=False)
        parts = [-1 if part is None else part for part in encoded.sequence_ids(0)]
        if {0, 1} <= set(parts):
            break
    else:
        raise DataError(f"The tokenizer {tokenizer.name_or_path} makes no tokens of the questions and contexts.")
    query, context = parts.index(0), parts.index(1)
    query_stop, context_stop = query + parts.count(0), context + parts.count(1)
    as_expected = [-1] * query + [0] * parts.count(0) + [-1] * (context - query_stop) + [1] * parts.count(1)
    if parts[:context_stop] != as_expected or not query:
        raise DataError(
            f"The tokenizer {tokenizer.name_or_path} does not make pairs as [CLS] question [SEP] context [SEP]: "
            f"a token must come before the question, and the question before the context. Take another."
        )
    both = np.array([encoded["input_ids"], encoded["token_type_ids"]], np.int32)
    return _Template(
        before=both[:, :query],
        between=both[:, query_stop:context],
        after=both[:, context_stop:],
        types=(int(both[1, query]), int(both[1, context])),
    )
