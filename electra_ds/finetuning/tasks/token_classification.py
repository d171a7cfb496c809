"""A class for each word, such as named entities or parts of speech, scored as by seqeval.

Words are classified by their first token. A text that is longer than `data.max_length` continues in further inputs, so
every word is trained on and scored.

Shape suffixes: N inputs, S of a micro-batch, T positions, C classes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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
from electra_ds.finetuning.heads import NotExportable, TaskModel, TaskOutput, with_linear_head
from electra_ds.finetuning.inputs import TaskInputs, TaskMicroBatch, task_inputs
from electra_ds.finetuning.metrics import further_metrics, score
from electra_ds.finetuning.own_files import read_own
from electra_ds.finetuning.own_rows import OwnRows, RowData, chosen_column, own_rows, row_data, row_ids, texts_of
from electra_ds.finetuning.tables import Table, listed
from electra_ds.finetuning.tasks.base import EvaluationResult, FinetuneTask, Outputs, Scale, chosen, lines_file

TOKEN_COLUMNS = ("tokens", "words", "text")
"""If no text column is named, the first of these that a file of JSON lines or a data set has."""
TAG_COLUMNS = ("ner_tags", "labels", "tags", "pos_tags", "upos", "label")
"""If no label column is named, the first of these."""
OUTSIDE = "O"
_CONLL = (".conll", ".conllu", ".iob", ".bio", ".txt", ".tsv", ".tok")
_IGNORED = -100
_UNIVERSAL = {"text": 1, "label": 3}  # FORM and UPOS of CoNLL-U, from 0


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
    """The class of each id of all inputs, -100 where there is none."""

    labels: np.ndarray
    """int64, one input after the other."""
    bounds: np.ndarray
    """int64 [N + 1], the start of each input, then the end of the last."""

    def count(self, rows_S: np.ndarray) -> int:
        """Return the number of words that have a class."""
        return max(1, sum(int((self._of(row) != _IGNORED).sum()) for row in rows_S))

    def of(self, rows_S: np.ndarray, width: int, *, with_labels: bool) -> dict[str, np.ndarray]:
        if not with_labels:
            return {}
        labels_ST = np.full((len(rows_S), width), _IGNORED, np.int64)
        for place, row in enumerate(rows_S):
            own = self._of(row)
            labels_ST[place, : len(own)] = own
        return {"labels": labels_ST}

    def _of(self, row: int) -> np.ndarray:
        return self.labels[self.bounds[row] : self.bounds[row + 1]]


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
        found = own_rows(source, "token-classification", lambda path: _read(path, source))
        sets = {name: _sentences(found, name, source) for name in found.tables}
        of_train, of_dev = (Counter(tag for each in sets[name] for tag in each.tags or ()) for name in ("train", "dev"))
        labels = sorted({*of_train, *of_dev}, key=lambda tag: (tag != OUTSIDE, tag))
        if len(of_train) < 2:
            raise DataError(f"{found.source}: the training words have {len(of_train)} class(es), so there is nothing "
                            f"to learn. Name the right column with --label.")  # fmt: skip
        unknown = sorted({tag for each in sets.get("test", ()) for tag in each.tags or ()} - set(labels))
        if unknown:
            raise DataError(f"{found.source}: test has the tags {listed(unknown)}, which train and dev do not have.")
        notes = [
            f"No word of {name} has the tag {listed(missing)}: {effect}."
            for name, counts, effect in (
                ("train", of_train, "it will not be predicted"), ("dev", of_dev, "its scores say nothing about it"),
            )
            if (missing := [tag for tag in labels if not counts[tag]])
        ]  # fmt: skip
        return row_data(found.name, sets, found.source, labels, notes)

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
        self._has_spans = all(tag == OUTSIDE or tag[:2] in ("B-", "I-", "E-", "S-", "L-", "U-") for tag in data.labels)
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
        bounds = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
        is_labelled = all(sentence.tags is not None for sentence in sentences)
        targets = TokenLabels(np.concatenate(labels), bounds) if is_labelled else None
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
            details={"labels": list(self.labels), "sentences": len(sentences)},
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
        spans = {name: float(function(wanted, predicted, zero_division=0)) for name, function in of.items()}
        return spans | score(("accuracy",), truth, found) | more

    # --- as a transformers model

    @classmethod
    def why_not_exportable(
        cls, recipe: FinetuneRecipe, config: PretrainedConfig, num_outputs: int | None = None
    ) -> NotExportable | None:
        return None

    @classmethod
    def to_transformers(
        cls, trained: TaskModel, config: PretrainedConfig, labels: tuple[str, ...], scale: Scale
    ) -> PreTrainedModel:
        assert isinstance(trained.head, TokenHead)
        config.id2label, config.label2id = dict(enumerate(labels)), {name: index for index, name in enumerate(labels)}
        return with_linear_head(AutoModelForTokenClassification, trained, config, "classifier", trained.head.out_proj)


# --- reading


def _read(path: Path, source: TaskSource) -> Table:
    """Read CoNLL columns, or JSON lines with lists of words and tags, as a table of lists."""
    if path.suffix.lower() not in _CONLL:
        return read_own(path)
    import pandas as pd  # type: ignore[import-untyped]

    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {path}: {error}.") from error
    is_universal = path.suffix.lower() == ".conllu"
    places = {"text": _UNIVERSAL["text"] if is_universal else 0, "label": _UNIVERSAL["label"] if is_universal else -1}
    for role, given in (("text", source.text), ("label", source.label)):
        if given is not None:
            if not given.isdigit() or given == "0":
                raise DataError(f"{path}: --{role} is the number of a column, counted from 1, not '{given}'.")
            places[role] = int(given) - 1
    sentences = list(_blocks(text, path, places, is_universal))
    if not any(words for words, _ in sentences):
        raise DataError(f"{path} has no words. Each line needs a word and its tag, and sentences end at an empty line.")
    is_labelled = all(tags is not None for _, tags in sentences)
    columns = {TOKEN_COLUMNS[0]: [words for words, _ in sentences]}
    return Table(
        str(path), pd.DataFrame(columns | ({TAG_COLUMNS[0]: [tags for _, tags in sentences]} if is_labelled else {}))
    )


def _blocks(
    text: str, path: Path, places: dict[str, int], is_universal: bool
) -> Iterable[tuple[list[str], list[str] | None]]:
    """Yield the words and the tags of each sentence; None if no line of it has a tag."""
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        fields = [field.strip() for field in line.split("\t")] if "\t" in line else line.split()
        if not any(fields) or fields[0] == "-DOCSTART-":
            if words:
                yield words, tags or None
            words, tags = [], []
            continue
        if is_universal and (line.startswith("#") or not fields[0].isdigit()):  # comments, 1-2 and 1.1
            continue
        if places["text"] >= len(fields):
            raise DataError(f"{path}, line {number}: there is no column {places['text'] + 1}, only {len(fields)}.")
        words.append(fields[places["text"]])
        has_tag = len(fields) > (1 if places["label"] < 0 else places["label"])
        if has_tag:
            tags.append(fields[places["label"]])
        if len(tags) not in (0, len(words)):
            raise DataError(f"{path}, line {number}: some words of this sentence have a tag, others do not.")


def _sentences(found: OwnRows, name: str, source: TaskSource) -> list[Sentence]:
    table = found.tables[name]
    is_columns = TOKEN_COLUMNS[0] in table.frame and Path(table.source).suffix.lower() in _CONLL
    words = chosen_column(table, None if is_columns else source.text, TOKEN_COLUMNS, "text")
    is_test = name == "test"
    tags: str | None = None
    usual = [column for column in TAG_COLUMNS if column in table.frame]
    given = None if is_columns else source.label
    if not is_test or (given in table.frame if given else usual):
        tags = chosen_column(table, given, TAG_COLUMNS, "label")
    sentences = []
    for row, (identity, value) in enumerate(zip(row_ids(table), table.frame[words], strict=True)):
        own = texts_of(table, row, words, value)
        of_words = None if tags is None else texts_of(table, row, tags, table.frame[tags].iloc[row])
        if of_words is not None and len(of_words) != len(own):
            raise DataError(f"{table.source}, row {row + 1}: {len(own)} words, but {len(of_words)} tags.")
        if own:
            sentences.append(Sentence(identity, own, of_words))
    return sentences


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
