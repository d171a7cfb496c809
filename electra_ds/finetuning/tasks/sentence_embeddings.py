"""Vectors of texts whose cosine says how similar they are, for search and comparison.

Two kinds of examples: pairs with a score, whose cosine is regressed on the score (Reimers and Gurevych 2019), and pairs
that belong together, whose cosine must be the highest among wrong seconds (van den Oord et al. 2018). The wrong ones
are drawn from the seconds of other examples, keyed by seed and example, so a step is the same under every batch plan.
In-batch negatives, which are usual, would change with the micro-batch.

Shape suffixes: B examples, I inputs, G inputs of each example, T positions, H hidden size, N examples of a set.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from electra_ds.config.finetune_recipe import FinetuneRecipe
from electra_ds.config.run_record import TaskSource
from electra_ds.core.errors import DataError
from electra_ds.core.keyed_random import hash64
from electra_ds.finetuning.heads import TaskModel, TaskOutput, pooled
from electra_ds.finetuning.inputs import (
    GroupedInputs,
    Labels,
    TaskInputs,
    TaskMicroBatch,
    encoded,
    task_inputs,
)
from electra_ds.finetuning.metrics import baseline, has_constant_predictions, score
from electra_ds.finetuning.own_rows import OwnRows, RowData, own_rows, row_data, row_ids
from electra_ds.finetuning.tables import Table
from electra_ds.finetuning.tasks.base import EvaluationResult, FinetuneTask, Outputs, Scale, chosen, lines_file

TEXT_COLUMNS = ("anchor", "query", "sentence1", "text1", "text_a", "text", "question")
"""If no text column is named, the first of these that the file has."""
PAIR_COLUMNS = ("positive", "sentence2", "text2", "text_b", "text_pair", "answer", "passage")
"""If no pair is named, the first of these that the file has."""
NEGATIVE_COLUMN = "negative"
"""A wrong second text, in addition to those that are drawn."""
SCORE_COLUMNS = ("score", "label", "similarity_score", "similarity")
"""If no label column is named, the first of these that the file has. Without one, every pair belongs together."""
_NEGATIVES = 0xF3
_EXCLUDED = -1e4


class Pair(NamedTuple):
    """One example."""

    id: str
    text: str
    second: str
    negative: str | None
    score: float | None


@dataclass(frozen=True)
class MatchingInputs(GroupedInputs):
    """Pairs that belong together: each example is its text, its second text and perhaps a wrong one. Training adds the
    second texts of other examples."""

    negatives: int = 0
    """The number of wrong texts to draw for each example."""
    second_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64, equal for examples with the same second text, which are not wrong for each other."""
    first_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64, equal for examples with the same first text, whose second texts are all right."""

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each example in training, with drawn texts of average length."""
        second = float(self.input_lengths[self.groups[:-1] + 1].mean())
        return super().lengths + round(self.negatives * second)

    def draws(self, numbers_B: np.ndarray, seed: int) -> np.ndarray:
        columns = np.arange(self.negatives)
        return (hash64(seed, _NEGATIVES, numbers_B[:, None], columns) % np.uint64(len(self))).astype(np.int64)

    def micro_batch(
        self, rows_S: np.ndarray, draws: np.ndarray | None = None, *, with_labels: bool = True
    ) -> TaskMicroBatch:
        drawn_SK = np.zeros((len(rows_S), 0), np.int64) if draws is None else draws
        own_SG = self.groups[rows_S][:, None] + np.arange(int(np.diff(self.groups[:2])[0]))
        inputs_SG = np.concatenate([own_SG, self.groups[drawn_SK] + 1], 1)
        batch = self._tensors(inputs_SG.ravel(), None, rows_S, with_labels)
        is_right_SK = (self.second_N[drawn_SK] == self.second_N[rows_S][:, None]) | (
            self.first_N[drawn_SK] == self.first_N[rows_S][:, None]
        )
        excluded_SG = np.concatenate([np.zeros(own_SG.shape, bool), is_right_SK], 1)
        sizes_S = np.full(len(rows_S), inputs_SG.shape[1])
        return batch._replace(targets={"sizes": torch.from_numpy(sizes_S), "excluded": torch.from_numpy(excluded_SG)})


class EmbeddingHead(nn.Module):
    """Vectors of length 1, pooled as the recipe says, and no parameters."""

    def __init__(self, recipe: FinetuneRecipe) -> None:
        super().__init__()
        self.section, self.scale = recipe.head, recipe.head.cosine_scale

    def forward(self, hidden_BTH: torch.Tensor, batch: TaskMicroBatch) -> TaskOutput:
        vectors_IH = functional.normalize(pooled(hidden_BTH, batch.attended_BT, self.section).float(), dim=-1)
        vectors_BGH = vectors_IH.unflatten(0, (len(batch.targets["sizes"]), -1))
        cosines_BG = (vectors_BGH[:, :1] * vectors_BGH[:, 1:]).sum(-1)
        loss_sum = None
        if batch.labels is not None:
            loss_sum = functional.mse_loss(cosines_BG[:, 0], batch.labels, reduction="sum")
        elif "excluded" in batch.targets and cosines_BG.shape[1] > 1:
            logits_BG = (self.scale * cosines_BG).masked_fill(batch.targets["excluded"][:, 1:], _EXCLUDED)
            loss_sum = -logits_BG.log_softmax(-1)[:, 0].sum()
        return TaskOutput(loss_sum, {} if self.training else {"vectors": vectors_BGH[:, :2]})


class SentenceEmbeddingsTask(FinetuneTask):
    """Vectors for search and comparison: `--task sentence-embeddings`."""

    hub_task = "sentence-similarity"
    library = "sentence-transformers"
    usage = "from sentence_transformers import SentenceTransformer; SentenceTransformer('PATH').encode(['…'])"
    example = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH")
vectors = model.encode(["…", "…"])
model.similarity(vectors, vectors)
"""
    outputs = "The vectors have length 1; the higher the cosine of two, the more alike the texts."
    takes = (*FinetuneTask.takes, "pair")
    possible_metrics: ClassVar[tuple[str, ...]] = ("spearman", "pearson", "mrr", "accuracy_at_1", "recall_at_10")
    num_outputs = None
    has_own_metrics = False
    labels = ()
    has_labels = False

    @classmethod
    def load(cls, source: TaskSource) -> RowData[Pair]:
        found = own_rows(source, "sentence-embeddings")
        train = found.tables["train"].frame
        text = found.column(source.text, TEXT_COLUMNS, "text")
        pair = found.column(source.pair, PAIR_COLUMNS, "pair")
        label = source.label or next((name for name in SCORE_COLUMNS if name in train), None)
        if label is not None:
            found.column(label, (), "label", is_label=True)
        sets = {name: _pairs(found, name, text, pair, label) for name in found.tables}
        scores, seconds = {row.score for row in sets["train"]}, {row.second for row in sets["train"]}
        if label is not None and len(scores) == 1:
            raise DataError(
                f"{found.tables['train'].source}: every pair has the same score in '{label}', so there is nothing to "
                f"learn. Remove the column if all pairs belong together, or name another one with --label."
            )
        if label is None and len(seconds) == 1:
            raise DataError(
                f"{found.tables['train'].source}: every '{pair}' is the same text, so there is nothing to learn."
            )
        notes = []
        if label is not None and NEGATIVE_COLUMN in train:
            notes.append(f"The column '{NEGATIVE_COLUMN}' is not used, because the pairs have scores.")
        return row_data(found.name, sets, found.read_as(text=text, pair=pair, label=label), notes=notes)

    def __init__(
        self,
        data: RowData[Pair],
        tokenizer: PreTrainedTokenizerFast,
        recipe: FinetuneRecipe,
        *,
        has_segments: bool,
        max_train: int | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.name = data.name
        self._sets = {name: list(rows) for name, rows in data.sets.items()}
        self._is_scored = data.sets["train"][0].score is not None
        self.chosen_by = "spearman" if self._is_scored else "mrr"
        scores = [row.score for row in data.sets["train"] if row.score is not None]
        low, high = (min(scores), max(scores)) if scores else (0.0, 1.0)

        def inputs(rows: list[Pair]) -> TaskInputs:
            texts = [text for row in rows for text in (row.text, row.second, row.negative) if text is not None]
            ids, segments = encoded(texts, None, tokenizer, recipe)
            progress(len(rows))
            uses_segments = has_segments and recipe.data.segment_ids
            sizes = [2 if row.negative is None else 3 for row in rows]
            labels = [row.score for row in rows]
            targets = None
            if None not in labels:
                targets = Labels(((np.array(labels) - low) / (high - low)).astype(np.float32))
            found = task_inputs(ids, segments if uses_segments else None, tokenizer, targets, sizes)
            assert isinstance(found, GroupedInputs)
            if self._is_scored:
                return found
            seconds, firsts = _numbered([row.second for row in rows]), _numbered([row.text for row in rows])
            shared = (found.ids, found.segments, found.bounds, found.pad_id, None, found.groups)
            return MatchingInputs(*shared, recipe.data.negatives, seconds, firsts)

        train = self._sets["train"]
        self.train = inputs([train[index] for index in chosen(len(train), max_train, recipe.seed)])
        self.dev = {"dev": inputs(self._sets["dev"])}
        self.test = {"test": inputs(self._sets["test"])} if "test" in self._sets else {}

    @classmethod
    def make_head(cls, recipe: FinetuneRecipe, hidden_size: int, num_outputs: int | None) -> nn.Module:
        return EmbeddingHead(recipe)

    def evaluate(self, name: str, outputs: Outputs) -> EvaluationResult:
        rows = self._sets[name]
        vectors_N2H = np.stack([output["vectors"] for output in outputs]).astype(np.float64)
        cosines = (vectors_N2H[:, 0] * vectors_N2H[:, 1]).sum(-1)
        lines: list[dict[str, Any]] = [
            {"id": row.id, "cosine": cosine} | ({} if row.score is None else {"label": row.score})
            for row, cosine in zip(rows, cosines.tolist(), strict=True)
        ]
        if not self._is_scored:
            metrics, by_chance, ranks = retrieval(vectors_N2H, [row.second for row in rows])
            lines = [line | {"rank": rank} for line, rank in zip(lines, ranks.tolist(), strict=True)]
        files = {f"predictions/{name}.jsonl": lines_file([json.dumps(line) for line in lines])}
        if not self._is_scored:
            is_beaten = metrics["mrr"] <= by_chance["mrr"] < 1
            return EvaluationResult(
                len(rows), metrics, by_chance, "texts in random order", is_beaten=is_beaten, files=files
            )
        truth = np.array([row.score for row in rows if row.score is not None])
        if len(truth) < len(rows):
            return EvaluationResult(len(rows), files=files)
        metrics = score(("spearman", "pearson"), truth, cosines)
        constant = None
        if has_constant_predictions(truth, cosines, is_regression=True):
            constant = f"about {cosines.mean():.4g}"
        return EvaluationResult(
            len(rows),
            metrics,
            baseline(("spearman", "pearson"), truth, is_regression=True).metrics,
            "one cosine",
            constant,
            is_beaten=metrics["spearman"] <= 0 and len(set(truth)) > 1,
            files=files,
        )

    # --- as a folder for sentence-transformers

    @classmethod
    def to_transformers(
        cls, trained: TaskModel, config: PretrainedConfig, labels: tuple[str, ...], scale: Scale
    ) -> PreTrainedModel:
        return trained.encoder

    @classmethod
    def more_files(cls, recipe: FinetuneRecipe, config: PretrainedConfig) -> dict[str, str]:
        modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize")]
        is_mean = recipe.head.pooling == "mean"
        pooling = {
            "word_embedding_dimension": int(config.hidden_size),
            "pooling_mode_cls_token": not is_mean,
            "pooling_mode_mean_tokens": is_mean,
        }
        contents: dict[str, Any] = {
            "modules.json": [
                {"idx": index, "name": name, "path": path, "type": f"sentence_transformers.models.{kind}"}
                for index, (name, path, kind) in enumerate(modules)
            ],
            "sentence_bert_config.json": {"max_seq_length": recipe.data.max_length, "do_lower_case": False},
            "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
            "1_Pooling/config.json": pooling,
            "2_Normalize/config.json": {},
        }
        return {name: json.dumps(content, indent=2) + "\n" for name, content in contents.items()}


def _numbered(texts: list[str]) -> np.ndarray:
    """Return int64 [N], equal for equal texts."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int64)


def retrieval(vectors_N2H: np.ndarray, seconds: list[str]) -> tuple[dict[str, float], dict[str, float], np.ndarray]:
    """Return how well each first text finds its second among all different ones, what a random order would score, and
    the rank of each second, from 1.

    The metrics are the mean reciprocal rank, and the shares of texts whose second is the first, and among the first
    ten. Ties count as scikit-learn counts them.
    """
    # Imported here, because it takes seconds that would delay a run's first step.
    from sklearn.metrics import label_ranking_average_precision_score, top_k_accuracy_score

    wanted = _numbered(seconds)
    corpus = np.unique(wanted, return_index=True)[1]  # the first row of each different text
    size = len(corpus)
    if size == 1:
        perfect = dict.fromkeys(("mrr", "accuracy_at_1", "recall_at_10"), 1.0)
        return perfect, perfect, np.ones(len(seconds), np.int64)
    ranks = np.zeros(len(seconds), np.int64)
    totals = np.zeros(3)
    for first in range(0, len(seconds), 1024):  # a matrix of all pairs may not fit
        part = slice(first, first + 1024)
        cosines = vectors_N2H[part, 0] @ vectors_N2H[corpus, 1].T
        right = np.take_along_axis(cosines, wanted[part, None], 1)
        ranks[part] = 1 + (cosines > right).sum(1)
        is_wanted = np.arange(size) == wanted[part, None]
        found = [float(label_ranking_average_precision_score(is_wanted, cosines))]
        for k in (1, 10):
            if k >= size:
                found.append(1.0)
            elif size == 2:  # scikit-learn takes it for a classification of two classes
                found.append(float((cosines.argmax(-1) == wanted[part]).mean()))
            else:
                found.append(float(top_k_accuracy_score(wanted[part], cosines, k=k, labels=np.arange(size))))
        totals += np.array(found) * len(is_wanted)
    mrr, first_share, ten = (totals / len(seconds)).tolist()
    harmonic = float((1 / np.arange(1, size + 1)).sum())
    by_chance = {"mrr": harmonic / size, "accuracy_at_1": 1 / size, "recall_at_10": min(1.0, 10 / size)}
    return {"mrr": mrr, "accuracy_at_1": first_share, "recall_at_10": ten}, by_chance, ranks


def _pairs(found: OwnRows, name: str, text: str, pair: str, label: str | None) -> list[Pair]:
    table = found.tables[name]
    rows = len(table.frame)
    scores: list[float | None] = [None] * rows
    negatives: list[Any] = [None] * rows
    if label is not None:
        if found.is_labelled(name, label, unknown=("", "?")):
            scores = [_score(table, row, label, value) for row, value in enumerate(table.column(label))]
    elif NEGATIVE_COLUMN in table.frame:
        negatives = table.column(NEGATIVE_COLUMN)
    texts = found.texts(name, text), found.texts(name, pair)
    for column, of_column in zip((NEGATIVE_COLUMN, text, pair), (negatives, *texts), strict=True):
        if "" in of_column:
            row = of_column.index("")
            raise DataError(f"{table.source}, row {row + 1}: '{column}' is empty. Fill it in or drop the row.")
    return [Pair(*row) for row in zip(row_ids(table), *texts, negatives, scores, strict=True)]


def _score(table: Table, row: int, column: str, value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise DataError(
            f"{table.source}, row {row + 1}: the score '{value}' in '{column}' is not a number. Correct it, drop the "
            f"row, name another column with --label, or remove the column if all pairs belong together."
        )
    return found
