"""A task with a head of its own: ordered classes, such as one to five stars (Cheng et al. 2008).

For each class but the lowest, the head gives the probability that the right class is at least that high. The prediction
counts the probabilities above one half.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from electra_ds import FinetuneTask
from electra_ds.core.errors import DataError
from electra_ds.finetuning.heads import TaskOutput, pooled
from electra_ds.finetuning.inputs import Labels, encoded, task_inputs
from electra_ds.finetuning.own_rows import own_rows, row_data
from electra_ds.finetuning.tasks.base import EvaluationResult, chosen, lines_file


class RankingHead(nn.Module):
    def __init__(self, section, hidden_size, num_outputs):
        super().__init__()
        self.section = section
        self.out_proj = nn.Linear(hidden_size, num_outputs)

    def forward(self, hidden_BTH, batch):
        vector_BH = functional.dropout(
            pooled(hidden_BTH, batch.attended_BT, self.section), self.section.dropout, self.training
        )
        logits_BR = self.out_proj(vector_BH).float()
        loss_sum = None
        if batch.labels is not None:
            reached_BR = (
                batch.labels.unsqueeze(-1) > torch.arange(logits_BR.shape[1], device=logits_BR.device)
            ).float()
            loss_sum = functional.binary_cross_entropy_with_logits(logits_BR, reached_BR, reduction="sum")
        return TaskOutput(loss_sum, {"logits": logits_BR})


class Ranking(FinetuneTask):
    """`--task ranking --train FILE --dev FILE`, with whole numbers as labels."""

    possible_metrics = ("accuracy", "within_one")
    chosen_by = "accuracy"

    @classmethod
    def load(cls, source):
        found = own_rows(source, "ranking")
        text = found.column(source.text, ("text", "review"), "text")
        label = found.column(source.label, ("label", "stars", "rating"), "label", is_label=True)
        sets = {}
        for name, table in found.tables.items():
            written = table.column(label) if found.is_labelled(name, label) else [None] * len(table.frame)
            if wrong := [value for value in written if value is not None and not value.strip().isdigit()]:
                raise DataError(f"{table.source}: the rating '{wrong[0]}' in '{label}' is not a whole number.")
            ranks = [None if value is None else int(value) for value in written]
            sets[name] = list(zip(found.texts(name, text), ranks, strict=True))
        labels = [str(rank) for rank in range(min(r for _, r in sets["train"]), 1 + max(r for _, r in sets["train"]))]
        return row_data(found.name, sets, found.read_as(text=text, label=label), labels)

    def __init__(self, data, tokenizer, recipe, *, has_segments, max_train=None, progress=lambda done: None):
        self.name, self.labels, self.num_outputs = data.name, data.labels, len(data.labels) - 1
        self._sets, lowest = data.sets, int(data.labels[0])

        def inputs(rows):
            ids, segments = encoded([text for text, _ in rows], None, tokenizer, recipe, progress)
            ranks = [rank for _, rank in rows]
            targets = None if None in ranks else Labels(np.array(ranks) - lowest)
            return task_inputs(ids, segments if has_segments else None, tokenizer, targets)

        train = data.sets["train"]
        self.train = inputs([train[index] for index in chosen(len(train), max_train, recipe.seed)])
        self.dev = {"dev": inputs(data.sets["dev"])}
        self.test = {"test": inputs(data.sets["test"])} if "test" in data.sets else {}

    @classmethod
    def make_head(cls, recipe, hidden_size, num_outputs):
        return RankingHead(recipe.head, hidden_size, num_outputs)

    def evaluate(self, name, outputs):
        ranks, lowest = [rank for _, rank in self._sets[name]], int(self.labels[0])
        predicted = np.array([lowest + int((row["logits"] > 0).sum()) for row in outputs])
        lines = [json.dumps({"id": str(row), "prediction": int(rank)}) for row, rank in enumerate(predicted)]
        files = {f"predictions/{name}.jsonl": lines_file(lines)}
        if None in ranks:
            return EvaluationResult(len(ranks), files=files)
        usual = int(np.median(ranks))
        metrics, baseline = _scores(np.array(ranks), predicted), _scores(np.array(ranks), np.full(len(ranks), usual))
        return EvaluationResult(len(ranks), metrics, baseline, f"'{usual}'", files=files)


def _scores(ranks, predicted):
    return {
        "accuracy": float((ranks == predicted).mean()),
        "within_one": float((abs(ranks - predicted) <= 1).mean()),
    }
