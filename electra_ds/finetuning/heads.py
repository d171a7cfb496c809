"""Heads that a pretrained encoder is finetuned with.

Shape suffixes: B inputs, T positions, H hidden size, C classes, K starts of a beam.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from electra_ds.config.finetune_recipe import HeadSection
from electra_ds.finetuning.microbatch import TaskMicroBatch

_EXCLUDED = -1e4
"""Added to the score of a position that cannot be one; fits fp16, and exp of it is 0."""


class TaskOutput(NamedTuple):
    """What a head makes of a micro-batch."""

    loss_sum: torch.Tensor | None
    """fp32, over the inputs; None where they have no labels."""
    scores: dict[str, torch.Tensor]
    """fp32 by name, each with B rows: `logits` [B, C]; or `start` and `end` [B, T]; or of the joint head `start_top`,
    `start_index` [B, K], `end_top`, `end_index` [B, K, K] and `unanswerable` [B]."""

    @property
    def losses(self) -> dict[str, torch.Tensor]:
        """The sum under the name of the batch's `loss_terms`. The inputs must have labels."""
        assert self.loss_sum is not None
        return {"loss": self.loss_sum}


class SequenceHead(nn.Module):
    """One vector of a text, or of a pair, to its scores: [B, T, H] -> [B, C], with C = 1 for regression."""

    def __init__(self, section: HeadSection, hidden_size: int, num_outputs: int, is_regression: bool) -> None:
        super().__init__()
        self.section = section
        self.is_regression = is_regression
        width = section.hidden_size or hidden_size
        self.dense = nn.Linear(hidden_size, width) if section.num_layers == 2 else None
        self.out_proj = nn.Linear(width if self.dense is not None else hidden_size, num_outputs)

    def forward(self, hidden_BTH: torch.Tensor, batch: TaskMicroBatch) -> TaskOutput:
        vector_BH = self._dropout(self._pooled(hidden_BTH, batch.attended_BT))
        if self.dense is not None:
            vector_BH = functional.gelu(self.dense(vector_BH))
            if self.section.dropout_at == "each":
                vector_BH = self._dropout(vector_BH)
        logits_BC = self.out_proj(vector_BH).float()
        return TaskOutput(self._loss_sum(logits_BC, batch.labels_B), {"logits": logits_BC})

    def _pooled(self, hidden_BTH: torch.Tensor, attended_BT: torch.Tensor) -> torch.Tensor:
        if self.section.pooling == "first":
            return hidden_BTH[:, 0]
        weights_BT1 = attended_BT.unsqueeze(-1).float()
        mean_BH = (hidden_BTH.float() * weights_BT1).sum(1) / weights_BT1.sum(1)
        return mean_BH.to(hidden_BTH.dtype)

    def _dropout(self, vector_BH: torch.Tensor) -> torch.Tensor:
        return functional.dropout(vector_BH, self.section.dropout, self.training)

    def _loss_sum(self, logits_BC: torch.Tensor, labels_B: torch.Tensor | None) -> torch.Tensor | None:
        if labels_B is None:
            return None
        if self.is_regression:
            return functional.mse_loss(logits_BC.squeeze(-1), labels_B, reduction="sum")
        return functional.cross_entropy(logits_BC, labels_B, reduction="sum")


class SpanHead(nn.Module):
    """Start and end of an answer on their own, as in transformers' models: [B, T, H] -> two times [B, T]."""

    def __init__(self, section: HeadSection, hidden_size: int) -> None:
        super().__init__()
        self.qa_outputs = nn.Linear(hidden_size, 2)

    def forward(self, hidden_BTH: torch.Tensor, batch: TaskMicroBatch) -> TaskOutput:
        start_BT, end_BT = self.qa_outputs(hidden_BTH).float().masked_fill(
            ~batch.attended_BT.unsqueeze(-1), _EXCLUDED
        ).unbind(-1)  # fmt: skip
        loss_sum = None
        if batch.starts_B is not None and batch.ends_B is not None:
            loss_sum = (_nats(start_BT, batch.starts_B) + _nats(end_BT, batch.ends_B)).sum() / 2
        return TaskOutput(loss_sum, {"start": start_BT, "end": end_BT})


class JointSpanHead(nn.Module):
    """The end given the start, and a classifier for whether there is an answer (google-research/electra,
    finetune/qa/qa_tasks.py)."""

    def __init__(self, section: HeadSection, hidden_size: int) -> None:
        super().__init__()
        self.section = section
        width = section.span_hidden_size
        self.start = nn.Linear(hidden_size, 1)
        self.end_hidden = nn.Linear(2 * hidden_size, width)
        self.end = nn.Linear(width, 1)
        self.answerable_hidden = nn.Linear(2 * hidden_size, width)
        self.answerable = nn.Linear(width, 1)

    def forward(self, hidden_BTH: torch.Tensor, batch: TaskMicroBatch) -> TaskOutput:
        assert batch.answerable_BT is not None
        excluded_BT = ~batch.answerable_BT
        start_BT = self.start(hidden_BTH).squeeze(-1).float().masked_fill(excluded_BT, _EXCLUDED)
        chances_BT = start_BT.softmax(-1).to(hidden_BTH.dtype)
        expected_BH = (chances_BT.unsqueeze(1) @ hidden_BTH).squeeze(1)
        features_BW = functional.gelu(self.answerable_hidden(torch.cat([hidden_BTH[:, 0], expected_BH], -1)))
        unanswerable_B = self.answerable(features_BW).squeeze(-1).float()
        loss_sum = None
        if batch.starts_B is not None and batch.ends_B is not None and batch.is_impossible_B is not None:
            chosen_B1H = hidden_BTH[torch.arange(len(hidden_BTH), device=hidden_BTH.device), batch.starts_B].unsqueeze(
                1
            )
            end_BT = self._ends(hidden_BTH, chosen_B1H, excluded_BT).squeeze(1)
            loss_sum = (_nats(start_BT, batch.starts_B) + _nats(end_BT, batch.ends_B)).sum() / 2
            loss_sum = loss_sum + self.section.answerable_weight * functional.binary_cross_entropy_with_logits(
                unanswerable_B, batch.is_impossible_B, reduction="sum"
            )
        if self.training:
            return TaskOutput(loss_sum, {})
        return TaskOutput(loss_sum, self._beam(hidden_BTH, start_BT, excluded_BT) | {"unanswerable": unanswerable_B})

    def _beam(
        self, hidden_BTH: torch.Tensor, start_BT: torch.Tensor, excluded_BT: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        size = min(self.section.beam_size, start_BT.shape[1])
        start_top_BK, start_index_BK = start_BT.log_softmax(-1).topk(size)
        chosen_BKH = hidden_BTH.gather(1, start_index_BK.unsqueeze(-1).expand(-1, -1, hidden_BTH.shape[-1]))
        # One start at a time: all of them at once would be K times the hidden states.
        ends = [self._ends(hidden_BTH, chosen_BKH[:, k : k + 1], excluded_BT) for k in range(size)]
        end_top_BKK, end_index_BKK = torch.cat(ends, 1).log_softmax(-1).topk(size)
        starts = {"start_top": start_top_BK, "start_index": start_index_BK}
        return starts | {"end_top": end_top_BKK, "end_index": end_index_BKK}

    def _ends(self, hidden_BTH: torch.Tensor, start_B1H: torch.Tensor, excluded_BT: torch.Tensor) -> torch.Tensor:
        """[B, 1, T] scores of every end, given one start each."""
        pairs_BTH2 = torch.cat([start_B1H.expand_as(hidden_BTH), hidden_BTH], -1)
        scores_BT = self.end(functional.gelu(self.end_hidden(pairs_BTH2))).squeeze(-1).float()
        return scores_BT.masked_fill(excluded_BT, _EXCLUDED).unsqueeze(1)


def _nats(scores_BT: torch.Tensor, targets_B: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(scores_BT, targets_B, reduction="none")


def initialise(head: nn.Module, section: HeadSection, seed: int) -> None:
    """Matrices as the recipe says, keyed by the seed; biases 0."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.dim() < 2:
                parameter.zero_()
            elif section.initializer == "normal":
                parameter.normal_(0.0, section.initializer_range, generator=rng)
            else:
                bound = math.sqrt(6 / sum(parameter.shape))
                parameter.uniform_(-bound, bound, generator=rng)
