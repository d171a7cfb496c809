"""Extractive question answering, as in SQuAD 1.1 and 2.0."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForQuestionAnswering, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from electra_ds.config.finetune_recipe import FinetuneRecipe
from electra_ds.config.run_record import TaskSource
from electra_ds.core.errors import ConfigError
from electra_ds.finetuning.heads import JointSpanHead, NotExportable, SpanHead, TaskModel, with_linear_head
from electra_ds.finetuning.inputs import TaskInputs, TaskMicroBatch, span_inputs
from electra_ds.finetuning.metrics import evaluate_squad1, evaluate_squad2
from electra_ds.finetuning.squad import Question, SquadData, load_own_squad
from electra_ds.finetuning.squad_features import (
    Answer,
    Candidate,
    Window,
    best_answers,
    independent_candidates,
    joint_candidates,
    make_features,
    null_score,
)
from electra_ds.finetuning.tasks.base import EvaluationResult, FinetuneTask, Outputs, Scale, chosen, json_file

_SHARES = (
    "exact_match", "exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1", "best_exact", "best_f1",
)  # fmt: skip
_OWN_NAMES = {"exact_match": "exact"}


class QuestionAnsweringTask(FinetuneTask):
    """Extractive question answering."""

    hub_task = "question-answering"
    num_outputs = None
    takes = ("train", "dev")
    has_own_metrics = False
    labels = ()
    has_labels = False
    chosen_by = "f1"
    shown_metrics = ("exact", "f1")
    possible_metrics: ClassVar[tuple[str, ...]] = ("exact", "f1")

    @classmethod
    def load(cls, source: TaskSource) -> SquadData:
        if source.train is None or source.dev is None:
            raise ConfigError("--task question-answering needs --train FILE and --dev FILE in SQuAD's layout.")
        return load_own_squad(Path(source.train), Path(source.dev))

    def __init__(
        self,
        data: SquadData,
        tokenizer: PreTrainedTokenizerFast,
        recipe: FinetuneRecipe,
        *,
        has_segments: bool,
        max_train: int | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        self._recipe, self._dev = recipe, data.dev
        self.name, self._is_second = data.title or data.name, data.name == "squad2"
        section = recipe.data

        def inputs(questions: Sequence[Question], for_training: bool) -> tuple[list[Window], TaskInputs]:
            windows = make_features(
                questions,
                tokenizer,
                max_length=section.max_length,
                max_query_length=section.max_query_length,
                doc_stride=section.doc_stride,
                for_training=for_training,
                progress=progress,
            )
            return windows, span_inputs(questions, windows, tokenizer, recipe, has_segments=has_segments)

        self._windows, dev = inputs(data.dev, False)
        questions = [data.train[index] for index in chosen(len(data.train), max_train, recipe.seed)]
        _, self.train = inputs(questions, True)
        self.dev = {"dev": dev}
        self.test = {}

    @classmethod
    def make_head(cls, recipe: FinetuneRecipe, hidden_size: int, num_outputs: int | None) -> nn.Module:
        head = JointSpanHead if recipe.head.span == "joint" else SpanHead
        return head(recipe.head, hidden_size)

    @classmethod
    def training_inputs(cls, data: SquadData, recipe: FinetuneRecipe, max_train: int | None) -> int | None:
        return None

    @classmethod
    def why_not_exportable(
        cls, recipe: FinetuneRecipe, config: PretrainedConfig, num_outputs: int | None = None
    ) -> NotExportable | None:
        if recipe.head.span != "joint":
            return None
        return NotExportable(
            "head.span is joint, but transformers' classes score start and end independently", "head.span=independent"
        )

    @classmethod
    def to_transformers(
        cls, trained: TaskModel, config: PretrainedConfig, labels: tuple[str, ...], scale: Scale
    ) -> PreTrainedModel:
        assert isinstance(trained.head, SpanHead)
        config.num_labels, config.problem_type = 2, None
        return with_linear_head(AutoModelForQuestionAnswering, trained, config, "qa_outputs", trained.head.qa_outputs)

    @classmethod
    def compared(
        cls, trained: TaskModel, model: Any, batch: TaskMicroBatch, scale: Scale
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        scores, output = trained(batch).scores, model(**trained.encoder_inputs(batch))
        return [(scores["start"], output.start_logits), (scores["end"], output.end_logits)]

    def evaluate(self, name: str, outputs: Outputs) -> EvaluationResult:
        answers = self._answers(outputs)
        # The official script of 2.0 takes the best span of every question and applies the threshold itself.
        given = {key: answer.span if self._is_second else answer.text for key, answer in answers.items()}
        na_scores = {key: answer.na_score for key, answer in answers.items()}
        golds = {question.id: question.answers for question in self._dev}
        if self._is_second:
            percents = evaluate_squad2(golds, given, na_scores, self._recipe.head.null_threshold)
        else:
            percents = evaluate_squad1(golds, given)
        metrics = _shares(percents)
        files: dict[str, bytes] = {
            f"predictions/{name}-logits.npz": _packed(outputs, self.dev[name]),
            f"predictions/{name}.json": json_file({key: answer.text for key, answer in answers.items()}),
            f"predictions/{name}-n-best.json": json_file({key: answer.n_best for key, answer in answers.items()}),
        }
        if self._is_second:
            files[f"predictions/{name}-na-scores.json"] = json_file(na_scores)
        trivial = {}
        if self._is_second:  # in 1.1 every question has an answer, and no single answer fits them all
            never, certain = dict.fromkeys(golds, ""), dict.fromkeys(golds, math.inf)
            trivial = _shares(evaluate_squad2(golds, never, certain))
        has_answers = self._is_second and any(golds.values())
        return EvaluationResult(
            len(self._dev),
            metrics,
            trivial,
            "no answer" if trivial else "",
            constant="no answer" if has_answers and not any(answer.text for answer in answers.values()) else None,
            is_beaten=has_answers and metrics["exact"] <= trivial["exact"],
            details={key: value for key, value in percents.items() if key not in _SHARES},
            files=files,
        )

    def _answers(self, outputs: Outputs) -> dict[str, Answer]:
        section = self._recipe.data
        candidates: list[list[Candidate]] = []
        nulls = []
        for row, window in zip(outputs, self._windows, strict=True):
            limits = (window.context, window.is_max_context_C, section.n_best, section.max_answer_length)
            if "start" in row:
                candidates.append(independent_candidates(row["start"], row["end"], *limits))
                nulls.append(null_score(row["start"], row["end"]))
            else:
                beam = (row["start_top"], row["start_index"], row["end_top"], row["end_index"])
                candidates.append(joint_candidates(*beam, *limits))
                nulls.append(float(row["unanswerable"]))
        head = self._recipe.head
        return best_answers(
            self._dev,
            self._windows,
            candidates,
            nulls if self._is_second else None,
            threshold=head.null_threshold,
            against_best=head.span == "independent",
            n_best=section.n_best,
        )


def _shares(percents: Mapping[str, float]) -> dict[str, float]:
    return {_OWN_NAMES.get(key, key): value / 100 for key, value in percents.items() if key in _SHARES}


def _packed(outputs: Outputs, inputs: TaskInputs) -> bytes:
    """Return a NumPy archive of each of the head's scores, in fp16 unless they are indices.

    Scores of positions are stored without padding, window after window, with the number of positions in `lengths`.
    """
    lengths = inputs.lengths
    arrays: dict[str, Any] = {"lengths": lengths}
    for name in outputs[0]:
        if name in ("start", "end"):
            joined = np.concatenate([row[name][:length] for row, length in zip(outputs, lengths, strict=True)])
        else:
            joined = np.stack([row[name] for row in outputs])
        arrays[name] = joined.astype(np.float16 if joined.dtype.kind == "f" else np.int16)
    archive = io.BytesIO()
    np.savez_compressed(archive, **arrays)
    return archive.getvalue()
