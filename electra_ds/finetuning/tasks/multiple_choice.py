"""The right one of several choices, given a text: each choice is an input with one score.

Shape suffixes: B examples, I inputs, T positions, H hidden size, C choices.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    ElectraConfig,
    ElectraForMultipleChoice,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from electra_ds.config.finetune_recipe import FinetuneRecipe
from electra_ds.config.run_record import TaskSource
from electra_ds.core.errors import DataError
from electra_ds.finetuning.heads import NotExportable, SequenceHead, TaskModel, TaskOutput, fill, prefixed
from electra_ds.finetuning.inputs import Labels, TaskInputs, TaskMicroBatch, encoded, task_inputs
from electra_ds.finetuning.metrics import further_metrics, score
from electra_ds.finetuning.own_rows import OwnRows, RowData, own_rows, row_data, row_ids, texts_of
from electra_ds.finetuning.tables import Table
from electra_ds.finetuning.tasks.base import EvaluationResult, FinetuneTask, Outputs, Scale, chosen, lines_file
from electra_ds.finetuning.tasks.sequence import SequenceTask

TEXT_COLUMNS = ("question", "context", "text", "sent1", "startphrase", "ctx", "goal", "premise", "sentence")
"""If no text column is named, the first of these that the file has."""
CONTEXT_COLUMNS = ("context", "article", "passage", "premise")
"""The first of these that the file has is the text if there is a `question` too, which then begins each choice."""
PAIR_COLUMNS = ("sent2",)
"""If no pair is named, the column whose text each choice continues, as in SWAG."""
CHOICE_COLUMNS = ("choices", "options", "endings", "answers")
"""The first of these that the file has holds the list of choices; or columns such as ending0, ending1, …"""
LABEL_COLUMNS = ("label", "answer", "answerKey", "gold", "target")
"""If no label column is named, the first of these that the file has."""
_NUMBERED = re.compile(r"(?:ending|choice|option|answer|sol)_?\d+")
_EXCLUDED = -1e4
"""The score of a choice that an example does not have."""


class Exercise(NamedTuple):
    """One example."""

    id: str
    text: str
    choices: tuple[str, ...]
    answer: int | None
    """The number of the right choice, from 0; None if it is not known."""


class ChoiceHead(SequenceHead):
    """One score of each choice; the loss is the cross-entropy over an example's choices."""

    def forward(self, hidden_BTH: torch.Tensor, batch: TaskMicroBatch) -> TaskOutput:
        vector_IH = self.vector(hidden_BTH, batch.attended_BT)
        scores_I = self.out_proj(vector_IH).squeeze(-1).float()
        sizes_B = batch.targets["sizes"]
        places_C = torch.arange(int(sizes_B.max()), device=sizes_B.device)
        is_there_BC = places_C < sizes_B.unsqueeze(-1)
        logits_BC = scores_I.new_full(is_there_BC.shape, _EXCLUDED).masked_scatter(is_there_BC, scores_I)
        loss_sum = None
        if batch.labels is not None:
            loss_sum = functional.cross_entropy(logits_BC, batch.labels, reduction="sum")
        return TaskOutput(loss_sum, {"logits": logits_BC})


class MultipleChoiceTask(FinetuneTask):
    """One right answer of several: `--task multiple-choice`."""

    hub_task = "multiple-choice"
    usage = "from transformers import AutoModelForMultipleChoice; AutoModelForMultipleChoice.from_pretrained('PATH')"
    example = """\
import torch
from transformers import AutoModelForMultipleChoice, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForMultipleChoice.from_pretrained("PATH")


def answer(text, choices, beginning=""):
    seconds = [f"{beginning} {choice}".strip() for choice in choices]
    inputs = tokenizer([text] * len(choices), seconds, truncation=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**{name: tensor.unsqueeze(0) for name, tensor in inputs.items()}).logits
    return choices[logits.argmax().item()]
"""
    outputs = (
        "Each choice gets a score. `beginning` is text that every choice continues; use it only if the training data "
        "had it."
    )
    takes = (*FinetuneTask.takes, "pair")
    possible_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    chosen_by = "accuracy"
    num_outputs = 1
    labels = ()
    has_labels = False

    @classmethod
    def load(cls, source: TaskSource) -> RowData[Exercise]:
        found = own_rows(source, "multiple-choice")
        train = found.tables["train"].frame
        text, pair = source.text, source.pair
        if text is None and pair is None and "question" in train:  # about another text
            text = next((name for name in CONTEXT_COLUMNS if name in train), None)
            pair = None if text is None else "question"
        if source.text is None and pair is None:
            pair = next((name for name in PAIR_COLUMNS if name in train), None)
        text = found.column(text, TEXT_COLUMNS, "text")
        label = found.column(source.label, LABEL_COLUMNS, "label", is_label=True)
        sets = {name: _exercises(found, name, text, pair, label) for name in found.tables}
        return row_data(found.name, sets, found.read_as(text=text, pair=pair, label=label))

    def __init__(
        self,
        data: RowData[Exercise],
        tokenizer: PreTrainedTokenizerFast,
        recipe: FinetuneRecipe,
        *,
        has_segments: bool,
        max_train: int | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.name, self._metrics = data.name, recipe.metrics
        self._sets = {name: list(rows) for name, rows in data.sets.items()}

        def inputs(rows: list[Exercise]) -> TaskInputs:
            texts = [row.text for row in rows for _ in row.choices]
            ids, segments = encoded(texts, [choice for row in rows for choice in row.choices], tokenizer, recipe)
            progress(len(rows))
            answers = [row.answer for row in rows]
            targets = None if None in answers else Labels(np.array(answers, np.int64))
            uses_segments = has_segments and recipe.data.segment_ids
            sizes = [len(row.choices) for row in rows]
            return task_inputs(ids, segments if uses_segments else None, tokenizer, targets, sizes)

        train = self._sets["train"]
        self.train = inputs([train[index] for index in chosen(len(train), max_train, recipe.seed)])
        self.dev = {"dev": inputs(self._sets["dev"])}
        self.test = {"test": inputs(self._sets["test"])} if "test" in self._sets else {}

    @classmethod
    def make_head(cls, recipe: FinetuneRecipe, hidden_size: int, num_outputs: int | None) -> nn.Module:
        return ChoiceHead(recipe.head, hidden_size, 1, is_regression=False)

    def evaluate(self, name: str, outputs: Outputs) -> EvaluationResult:
        rows = self._sets[name]
        logits = [output["logits"][: len(row.choices)] for row, output in zip(rows, outputs, strict=True)]
        predicted = [int(each.argmax()) for each in logits]
        lines = []
        for row, best, of_row in zip(rows, predicted, logits, strict=True):
            line: dict[str, Any] = {"id": row.id, "prediction": best, "text": row.choices[best]}
            line["logits"] = of_row.tolist()
            lines.append(json.dumps(line | ({} if row.answer is None else {"label": row.answer}), ensure_ascii=False))
        files = {f"predictions/{name}.jsonl": lines_file(lines)}
        answers = [row.answer for row in rows if row.answer is not None]
        if len(answers) < len(rows):
            return EvaluationResult(len(rows), files=files)
        usual, count = Counter(answers).most_common(1)[0]
        more = partial(further_metrics, self._metrics, (), answers)
        metrics = score(("accuracy",), answers, predicted) | more(predicted)
        baseline = {"accuracy": count / len(answers)} | more([usual] * len(answers))
        differ = len(set(answers)) > 1
        return EvaluationResult(
            len(rows),
            metrics,
            baseline,
            f"choice {usual}",
            f"choice {predicted[0]}" if differ and len(set(predicted)) == 1 else None,
            is_beaten=differ and metrics["accuracy"] <= baseline["accuracy"],
            files=files,
        )

    # --- as a transformers model

    @classmethod
    def why_not_exportable(
        cls, recipe: FinetuneRecipe, config: PretrainedConfig, num_outputs: int | None = None
    ) -> NotExportable | None:
        if recipe.head.num_layers == 1:
            return NotExportable(
                "head.num_layers is 1, but transformers' head has two layers", "head.num_layers=2 head.hidden_size=null"
            )
        return SequenceTask.why_not_exportable(recipe, config, 1)

    @classmethod
    def to_transformers(
        cls, trained: TaskModel, config: PretrainedConfig, labels: tuple[str, ...], scale: Scale
    ) -> PreTrainedModel:
        head = trained.head
        assert isinstance(head, ChoiceHead)
        assert head.dense is not None
        assert isinstance(config, ElectraConfig)
        config.summary_type, config.summary_use_proj, config.summary_activation = "first", True, "gelu"
        config.summary_last_dropout = head.section.dropout
        model = ElectraForMultipleChoice(config)
        tensors = {f"sequence_summary.summary.{name}": tensor for name, tensor in head.dense.named_parameters()}
        tensors |= {f"classifier.{name}": tensor for name, tensor in head.out_proj.named_parameters()}
        fill(model, prefixed(trained.encoder, model) | tensors)
        return model

    @classmethod
    def compared(
        cls, trained: TaskModel, model: Any, batch: TaskMicroBatch, scale: Scale
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        logits_BC = trained(batch).scores["logits"]
        inputs = {name: tensor.view(*logits_BC.shape, -1) for name, tensor in trained.encoder_inputs(batch).items()}
        return [(logits_BC, model(**inputs).logits)]


def _exercises(found: OwnRows, name: str, text: str, pair: str | None, label: str) -> list[Exercise]:
    table = found.tables[name]
    choices, names = _choices(table)
    answers: Sequence[int | None] = [None] * len(choices)
    if found.is_labelled(name, label):
        answers = _answers(table, [value.strip() for value in table.column(label)], choices, names)
    if pair is not None:  # each choice continues the beginning of a second text
        beginnings = found.texts(name, pair)
        choices = [
            tuple(f"{beginning} {choice}" for choice in of_row)
            for beginning, of_row in zip(beginnings, choices, strict=True)
        ]
    return [Exercise(*row) for row in zip(row_ids(table), found.texts(name, text), choices, answers, strict=True)]


def _choices(table: Table) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Return each row's choices, and their names if the file has some, such as A, B, C and D."""
    column = next((each for each in CHOICE_COLUMNS if each in table.frame), None)
    numbered = sorted((each for each in table.frame if _NUMBERED.fullmatch(each)), key=lambda each: (len(each), each))
    if column is None and len(numbered) < 2:
        table.check_columns(
            [], ["no choices"],
            f" Give a list of texts in a column {' or '.join(CHOICE_COLUMNS)}, or columns such as choice0 and choice1.",
        )  # fmt: skip
    choices: list[tuple[str, ...]] = []
    names: list[tuple[str, ...]] = []
    columns = [] if column is not None else [table.column(each) for each in numbered]
    for row in range(len(table.frame)):
        of_row: tuple[str, ...] = ()
        if column is None:
            texts = tuple(each[row] for each in columns)
            while texts and not texts[-1].strip():  # rows may have fewer choices than others
                texts = texts[:-1]
        else:
            value = table.frame[column].iloc[row]
            if isinstance(value, dict):  # ARC and CommonsenseQA: {"text": [...], "label": ["A", "B", ...]}
                of_row = texts_of(table, row, column, list(value.get("label", ())))
                value = list(value.get("text", ()))
            texts = texts_of(table, row, column, value)
        if len(texts) < 2 or not all(text.strip() for text in texts):
            raise DataError(f"{table.source}, row {row + 1}: needs two or more choices, none of them empty: {texts}.")
        choices.append(texts)
        names.append(of_row)
    return choices, names


def _answers(
    table: Table, written: list[str], choices: list[tuple[str, ...]], names: list[tuple[str, ...]]
) -> list[int]:
    """Return the number of each row's right choice.

    It is given in one way throughout: by its name, as a number from 0, as a letter, or by its text. Raises DataError.
    """
    readings = {
        "names": names,
        "numbers from 0": [tuple(map(str, range(len(of_row)))) for of_row in choices],
        "letters from A": [tuple(string.ascii_uppercase[: len(of_row)]) for of_row in choices],
        "texts": choices,
    }
    fitting = {
        way: [known.index(value) for value, known in zip(written, of_rows, strict=True)]
        for way, of_rows in readings.items()
        if all(value in known for value, known in zip(written, of_rows, strict=True))
    }
    if "names" in fitting:
        return fitting["names"]
    found = list(fitting.values())
    if not found:
        wrong = [row for row, value in enumerate(written) if not any(value in each[row] for each in readings.values())]
        problem = "the answers are written in different ways"
        if wrong:
            problem = f"row {wrong[0] + 1}: the answer '{written[wrong[0]]}' is none of the row's choices"
        raise DataError(
            f"{table.source}, {problem}. Write each as a number from 0, a letter from A, the choice's name, or its "
            f"text, the same way in every row."
        )
    if any(other != found[0] for other in found):
        raise DataError(
            f"{table.source}: the answers can be read as {' or as '.join(fitting)}. Write them as letters: A for the "
            f"first choice, B for the second."
        )
    return found[0]
