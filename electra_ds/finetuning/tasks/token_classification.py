"""A class for each word, such as named entities or parts of speech, scored as by seqeval.

Words are classified by their first token. A text that is longer than `data.max_length` continues in further inputs, so
every word is trained on and scored.

Shape suffixes: N inputs, S of a micro-batch, T positions, C classes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from electra_ds.config.finetune_recipe import FinetuneRecipe, HeadSection
from electra_ds.config.run_record import TaskSource
from electra_ds.core.errors import DataError
from electra_ds.finetuning.conll import TAG_COLUMNS, TOKEN_COLUMNS, is_conll, read_words
from electra_ds.finetuning.heads import TaskModel, TaskOutput, with_linear_head
from electra_ds.finetuning.inputs import TaskInputs, TaskMicroBatch, task_inputs
from electra_ds.finetuning.metrics import further_metrics, score
from electra_ds.finetuning.own_rows import NO_LABELS, OwnRows, RowData, own_rows, row_data, row_ids, texts_of
from electra_ds.finetuning.tables import listed
from electra_ds.finetuning.tasks.base import EvaluationResult, FinetuneTask, Outputs, Scale, chosen, lines_file

OUTSIDE = "O"
_PREFIXES = ("B-", "I-", "E-", "S-", "L-", "U-")
_SEQEVAL = {"L-": "E-", "U-": "S-"}
"""seqeval's names of the last word and of a single word of an entity."""
_IGNORED = -100


class Sentence(NamedTuple):
    """One text, as words."""

    id: str
    words: tuple[str, ...]
    tags: tuple[str, ...] | None
    """None if they are not known."""


class _Piece(NamedTuple):
    """The words of one input."""

    sentence: int
    words_W: np.ndarray
    """int64, the numbers of the words in the sentence."""
    positions_W: np.ndarray
    """int64, the position of each word's first token in the input."""


@dataclass(frozen=True)
class TokenLabels:
    """The tags of N inputs."""

    labels: Sequence[np.ndarray]
    """For each input, int64 [T], the class of each word at its first token, and -100 at all other positions."""

    def count(self, rows_S: np.ndarray) -> int:
        """Return the number of words that have a class."""
        return max(1, sum(int((self.labels[row] != _IGNORED).sum()) for row in rows_S))

    def of(self, rows_S: np.ndarray, width: int, *, with_labels: bool) -> dict[str, np.ndarray]:
        if not with_labels:
            return {}
        labels_ST = np.full((len(rows_S), width), _IGNORED, np.int64)
        for place, row in enumerate(rows_S):
            labels_ST[place, : len(self.labels[row])] = self.labels[row]
        return {"labels": labels_ST}


class TokenHead(nn.Module):
    """Scores of the classes at every position, as in transformers' models: [B, T, H] -> [B, T, C]."""

    def __init__(self, section: HeadSection, hidden_size: int, num_outputs: int) -> None:
        super().__init__()
        self.dropout = section.dropout
        self.out_proj = nn.Linear(hidden_size, num_outputs)

    def forward(self, hidden_BTH: torch.Tensor, batch: TaskMicroBatch) -> TaskOutput:
        logits_BTC = self.out_proj(functional.dropout(hidden_BTH, self.dropout, self.training)).float()
        loss_sum = None
        if batch.labels is not None:
            loss_sum = functional.cross_entropy(
                logits_BTC.flatten(0, 1), batch.labels.flatten(), ignore_index=_IGNORED, reduction="sum"
            )
        return TaskOutput(loss_sum, {"logits": logits_BTC})


class TokenClassificationTask(FinetuneTask):
    """Tags for words: `--task token-classification`."""

    hub_task = "token-classification"
    usage = "from transformers import pipeline; pipeline('token-classification', model='PATH')('…')"
    example = """\
from transformers import pipeline

tagger = pipeline("token-classification", model="PATH", aggregation_strategy="first")
tagger("…")
"""
    outputs = "The strategy `first` gives each word the class of its first token, as in training."
    possible_metrics: ClassVar[tuple[str, ...]] = ("f1", "precision", "recall", "accuracy", "f1_macro")

    @classmethod
    def load(cls, source: TaskSource) -> RowData[Sentence]:
        found = own_rows(source, "token-classification", lambda path: read_words(path, source))
        is_columns = source.train is not None and is_conll(Path(source.train))
        words = found.column(None if is_columns else source.text, TOKEN_COLUMNS, "text")
        tags = found.column(None if is_columns else source.label, TAG_COLUMNS, "label", is_label=True)
        sets = {name: _sentences(found, name, words, tags) for name in found.tables}
        of_train, of_dev = (Counter(tag for each in sets[name] for tag in each.tags or ()) for name in ("train", "dev"))
        labels = sorted({*of_train, *of_dev}, key=lambda tag: (tag != OUTSIDE, tag))
        if len(of_train) < 2:
            raise DataError(
                f"{found.source}: the training set has fewer than two different tags, so there is nothing to learn. "
                f"Check that --label names the right column."
            )
        _check_spans(found, sets, labels)
        unknown = sorted({tag for each in sets.get("test", ()) for tag in each.tags or ()} - set(labels))
        if unknown:
            raise DataError(
                f"{found.source}: the test set has tags that train and dev lack: {listed(unknown)}. Correct or remove "
                f"them."
            )
        notes = []
        if unseen := [tag for tag in labels if not of_train[tag]]:
            count = sum(of_dev[tag] for tag in unseen)
            notes.append(
                f"Tags that occur in dev but not in train: {listed(unseen)}. Their {count:,} words in dev count as "
                f"wrong."
            )
        if unscored := [tag for tag in labels if not of_dev[tag]]:
            notes.append(f"No word of dev has the tag {listed(unscored)}: its scores say nothing about it.")
        return row_data(
            found.name, sets, found.source if is_columns else found.read_as(text=words, label=tags), labels, notes
        )

    def __init__(
        self,
        data: RowData[Sentence],
        tokenizer: PreTrainedTokenizerFast,
        recipe: FinetuneRecipe,
        *,
        has_segments: bool,
        max_train: int | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.name, self.labels, self.num_outputs = data.name, data.labels, len(data.labels)
        self._metrics = recipe.metrics
        self._has_spans = all(tag == OUTSIDE or tag[:2] in _PREFIXES for tag in data.labels)
        self.chosen_by = "f1" if self._has_spans else "accuracy"
        self._sentences = {name: list(rows) for name, rows in data.sets.items()}
        self._pieces: dict[str, list[_Piece]] = {}

        def inputs(name: str) -> TaskInputs:
            pieces, found = self._tokenised(self._sentences[name], tokenizer, recipe, has_segments, progress)
            self._pieces[name] = pieces
            return found

        train = self._sentences["train"]
        self._sentences["train"] = [train[index] for index in chosen(len(train), max_train, recipe.seed)]
        self.train, self.dev = inputs("train"), {"dev": inputs("dev")}
        self.test = {"test": inputs("test")} if "test" in self._sentences else {}
        counts = Counter(tag for each in self._sentences["train"] for tag in each.tags or ())
        self._shares = np.array([counts[tag] for tag in self.labels]) / sum(counts.values())

    def _tokenised(
        self,
        sentences: Sequence[Sentence],
        tokenizer: PreTrainedTokenizerFast,
        recipe: FinetuneRecipe,
        has_segments: bool,
        progress: Callable[[int], None],
    ) -> tuple[list[_Piece], TaskInputs]:
        numbers = {label: number for number, label in enumerate(self.labels)}
        pieces: list[_Piece] = []
        ids: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        for index, sentence in enumerate(sentences):
            tags = None if sentence.tags is None else np.array([numbers[tag] for tag in sentence.tags])
            for row, words, positions in _encoded(sentence.words, tokenizer, recipe.data.max_length):
                of_row = np.full(len(row), _IGNORED, np.int64)
                if tags is not None:
                    of_row[positions] = tags[words]
                pieces.append(_Piece(index, words, positions))
                ids.append(row)
                labels.append(of_row)
            progress(1)
        segments = [np.zeros(len(row), np.int8) for row in ids] if has_segments and recipe.data.segment_ids else None
        is_labelled = all(sentence.tags is not None for sentence in sentences)
        targets = TokenLabels(labels) if is_labelled else None
        return pieces, task_inputs(ids, segments, tokenizer, targets)

    @classmethod
    def make_head(cls, recipe: FinetuneRecipe, hidden_size: int, num_outputs: int | None) -> nn.Module:
        assert num_outputs is not None
        return TokenHead(recipe.head, hidden_size, num_outputs)

    @classmethod
    def training_inputs(cls, data: RowData[Sentence], recipe: FinetuneRecipe, max_train: int | None) -> int | None:
        return None  # long sentences are several inputs

    def class_shares(self) -> np.ndarray | None:
        return self._shares

    def evaluate(self, name: str, outputs: Outputs) -> EvaluationResult:
        sentences = self._sentences[name]
        # A word without a token, such as one that the tokenizer removes, gets the most frequent class.
        usual = self.labels[int(self._shares.argmax())]
        predicted = [[usual] * len(sentence.words) for sentence in sentences]
        for piece, row in zip(self._pieces[name], outputs, strict=True):
            best = row["logits"][piece.positions_W].argmax(-1)
            for word, label in zip(piece.words_W, best, strict=True):
                predicted[piece.sentence][word] = self.labels[label]
        lines = [
            json.dumps(
                {"id": each.id, "tokens": each.words, "prediction": tags} | ({"label": each.tags} if each.tags else {}),
                ensure_ascii=False,
            )
            for each, tags in zip(sentences, predicted, strict=True)
        ]
        files = {f"predictions/{name}.jsonl": lines_file(lines)}
        rows = sum(len(sentence.words) for sentence in sentences)
        if any(sentence.tags is None for sentence in sentences):
            return EvaluationResult(rows, files=files)
        wanted = [list(sentence.tags or ()) for sentence in sentences]
        metrics = self._scores(wanted, predicted)
        most = Counter(tag for tags in wanted for tag in tags).most_common(1)[0][0]
        baseline = self._scores(wanted, [[most] * len(tags) for tags in wanted])
        kinds = {tag for tags in predicted for tag in tags}
        differ = len({tag for tags in wanted for tag in tags}) > 1
        return EvaluationResult(
            rows,
            metrics,
            baseline,
            f"'{most}'",
            f"'{next(iter(kinds))}'" if differ and len(kinds) == 1 else None,
            is_beaten=differ and metrics[self.chosen_by] <= baseline[self.chosen_by],
            details={"labels": list(self.labels), "unit": "words", "sentences": len(sentences)},
            files=files,
        )

    def _scores(self, wanted: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
        """Return seqeval's scores of whole entities if the classes are spans, and those of the words."""
        numbers = {label: number for number, label in enumerate(self.labels)}
        truth, found = ([numbers[tag] for tags in each for tag in tags] for each in (wanted, predicted))
        more = further_metrics(self._metrics, self.labels, truth, found)
        if not self._has_spans:
            return score(("accuracy", "f1_macro"), truth, found) | more
        # Imported here, because it takes seconds that would delay a run's first step.
        from seqeval.metrics import f1_score, precision_score, recall_score  # type: ignore[import-untyped]

        of = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
        named = [
            [[_SEQEVAL.get(tag[:2], tag[:2]) + tag[2:] for tag in tags] for tags in each]
            for each in (wanted, predicted)
        ]
        spans = {name: float(function(*named, zero_division=0)) for name, function in of.items()}
        return spans | score(("accuracy",), truth, found) | more

    # --- as a transformers model

    @classmethod
    def to_transformers(
        cls, trained: TaskModel, config: PretrainedConfig, labels: tuple[str, ...], scale: Scale
    ) -> PreTrainedModel:
        assert isinstance(trained.head, TokenHead)
        config.id2label, config.label2id = dict(enumerate(labels)), {name: index for index, name in enumerate(labels)}
        return with_linear_head(AutoModelForTokenClassification, trained, config, "classifier", trained.head.out_proj)


# --- examples


def _sentences(found: OwnRows, name: str, words: str, tags: str) -> list[Sentence]:
    table = found.tables[name]
    is_labelled = found.is_labelled(name, tags)
    sentences = []
    for row, (identity, value) in enumerate(zip(row_ids(table), table.frame[words], strict=True)):
        own = texts_of(table, row, words, value)
        of_words = texts_of(table, row, tags, table.frame[tags].iloc[row]) if is_labelled else None
        if of_words is not None and (unknown := set(NO_LABELS) & set(of_words)):
            raise DataError(
                f"{table.source}, sentence {row + 1}: the tag '{min(unknown)}' means that it is unknown. Correct it, "
                f"or remove the sentence."
            )
        if of_words is not None and len(of_words) != len(own):
            raise DataError(f"{table.source}, row {row + 1}: {len(own)} words but {len(of_words)} tags.")
        sentences.append(Sentence(identity, own, of_words))
    if not any(each.words for each in sentences):
        raise DataError(f"{table.source} has no words in '{words}'.")
    return sentences


def _check_spans(found: OwnRows, sets: Mapping[str, Sequence[Sentence]], labels: Iterable[str]) -> None:
    """Raise DataError if most tags mark entities and others do not, as after a header or a comment."""
    spans = {tag for tag in labels if tag == OUTSIDE or tag[:2] in _PREFIXES}
    others = sorted(set(labels) - spans)
    if not others or len(spans) <= len(others):
        return
    name, row, word = next(
        (name, row, word)
        for name, rows in sets.items()
        for row, each in enumerate(rows)
        for word, tag in zip(each.words, each.tags or (), strict=False)
        if tag == others[0]
    )
    raise DataError(
        f"{found.tables[name].source}, sentence {row + 1}: the tag '{others[0]}' of '{word}' marks no entity, as "
        f"'{sorted(spans)[0]}' and others do. Is its line a header or a comment? Remove it, or correct the tag."
    )


def _encoded(
    words: Sequence[str], tokenizer: PreTrainedTokenizerFast, longest: int
) -> Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the inputs of a sentence: ids, and of each word that has a token its number and its first token's position.

    The words are joined by spaces, as in the running text of pretraining. An input has as many whole words as fit, and
    of a word that is longer than an input its beginning.
    """
    first = 0
    while first < len(words):
        part = words[first : first + longest]
        ids, word_of_token = _joined(part, tokenizer)
        if len(ids) > longest:
            num_special = int((word_of_token < 0).sum())
            fitting = int(word_of_token[word_of_token >= 0][longest - num_special])  # the first word that is cut
            part = part[: max(1, fitting)]
            ids, word_of_token = _joined(part, tokenizer, longest)
        positions = np.flatnonzero(np.diff(word_of_token, prepend=-1) * (word_of_token >= 0))
        yield ids, word_of_token[positions] + first, positions
        first += len(part)


def _joined(
    words: Sequence[str], tokenizer: PreTrainedTokenizerFast, longest: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of some words with special tokens, and the number of each token's word, -1 for special ones."""
    found = tokenizer(
        " ".join(words),
        truncation=longest is not None,
        max_length=longest,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    ends = np.cumsum([len(word) + 1 for word in words])  # where the next word begins
    # By its last character, because a token may begin with the space before its word.
    last = np.array([max(stop - 1, 0) for _, stop in found["offset_mapping"]], np.int64)
    word_of_token = np.minimum(np.searchsorted(ends, last, side="right"), len(words) - 1)
    is_special = np.array(found["special_tokens_mask"], bool)
    return np.asarray(found["input_ids"], np.int32), np.where(is_special, -1, word_of_token)
