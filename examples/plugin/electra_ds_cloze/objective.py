"""A custom objective: masked language modelling by transformers' BERT.

It has one network of another architecture, a section of the recipe, losses, metrics and random draws of its own, and a
temperature that depends on the step.

Shape suffixes: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM

from electra_ds.config.recipe import Recipe
from electra_ds.config.sections import Section
from electra_ds.core.keyed_random import generator
from electra_ds.pretraining.objectives.base import Export, Objective, PretrainingBatch, TextBatch
from electra_ds.training.step import AutocastModel, LossTerm

_MASKS = 0x70
_IGNORED = -100


class ClozeSection(Section):
    masked_share: float = Field(default=0.15, gt=0, lt=1)
    temperature: float = Field(default=1.5, gt=0)
    """At the first step; it falls to 1 at the last one."""


class ClozeRecipe(Recipe):
    cloze: ClozeSection = ClozeSection()


class ClozeMicroBatch(NamedTuple):
    masked_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    """int64, the original token where it was masked, and -100 elsewhere."""
    is_token_BT: torch.Tensor
    temperature: torch.Tensor
    """fp32 scalar."""

    @property
    def device(self) -> torch.device:
        return self.masked_ids_BT.device

    def to(self, device: torch.device) -> ClozeMicroBatch:
        return ClozeMicroBatch(*(tensor.to(device) for tensor in self))


@dataclass(frozen=True)
class ClozeBatch(PretrainingBatch):
    text: TextBatch
    masked_BT: np.ndarray
    temperature: float

    @property
    def loss_terms(self) -> Mapping[str, LossTerm]:
        return {"cloze_loss": LossTerm(1.0, max(1, int(self.masked_BT.sum())))}

    @property
    def num_tokens(self) -> int:
        return int(self.text.lengths_B.sum())

    @property
    def num_sequences(self) -> int:
        return len(self.masked_BT)

    def micro_batch(self, first: int, size: int) -> ClozeMicroBatch:
        rows = slice(first, first + size)
        ids_BT, masked_BT = self.text.ids_BT[rows], self.masked_BT[rows]
        return ClozeMicroBatch(
            torch.from_numpy(np.where(masked_BT, self.text.mask_token_id, ids_BT)),
            torch.from_numpy(np.where(masked_BT, ids_BT, _IGNORED)),
            torch.from_numpy(self.text.is_token[rows].astype(np.int64)),
            torch.tensor(self.temperature),
        )


class ClozeOutput(NamedTuple):
    cloze_loss_sum: torch.Tensor
    is_right_BT: torch.Tensor

    @property
    def losses(self) -> dict[str, torch.Tensor]:
        return {"cloze_loss": self.cloze_loss_sum}


class ClozeModel(AutocastModel):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertForMaskedLM(config)

    def run(self, batch: ClozeMicroBatch, replayed: Any) -> ClozeOutput:
        logits_BTV = self.bert(batch.masked_ids_BT, batch.is_token_BT).logits.float()
        losses_BT = functional.cross_entropy(
            (logits_BTV / batch.temperature).transpose(1, 2), batch.labels_BT, reduction="none", ignore_index=_IGNORED
        )
        return ClozeOutput(losses_BT.sum(), logits_BTV.detach().argmax(-1) == batch.labels_BT)


class Cloze(Objective[ClozeRecipe]):
    recipe_type = ClozeRecipe
    metric_labels: ClassVar[Mapping[str, str]] = {
        "cloze_loss": "loss at masked tokens (nats)",
        "cloze_gain": "  gain over the unigram (nats)",
        "cloze_accuracy": "accuracy at masked tokens",
    }
    main_metric = "cloze_accuracy"
    key_metrics = ("cloze_accuracy",)
    encoder = "masked_lm"
    loss_names = ("cloze_loss",)

    def build_model(self) -> ClozeModel:
        model = self.recipe.model
        with torch.random.fork_rng():
            torch.manual_seed(self.recipe.seed)
            return ClozeModel(
                BertConfig(
                    vocab_size=self.vocab_size,
                    hidden_size=model.hidden_size,
                    num_hidden_layers=model.num_hidden_layers,
                    num_attention_heads=model.num_attention_heads,
                    intermediate_size=model.intermediate_size,
                    max_position_embeddings=model.max_position_embeddings,
                    hidden_dropout_prob=model.hidden_dropout_prob,
                    attention_probs_dropout_prob=model.attention_probs_dropout_prob,
                    pad_token_id=self.pad_token_id,
                )
            )

    def make_batch(self, text: TextBatch, seed: int, step: int) -> ClozeBatch:
        cloze = self.recipe.cloze
        draws_BT = generator(seed, _MASKS, step, *text.part_key).random(text.ids_BT.shape)
        share = step / self.recipe.schedule.total_steps
        masked_BT = text.maskable_BT & (draws_BT < cloze.masked_share)
        return ClozeBatch(text, masked_BT, cloze.temperature + share * (1 - cloze.temperature))

    def measure(self, micro_batch: ClozeMicroBatch, output: ClozeOutput) -> tuple[float, np.ndarray, np.ndarray]:
        masked_BT = micro_batch.labels_BT != _IGNORED
        targets_M, is_right_M = micro_batch.labels_BT[masked_BT], output.is_right_BT[masked_BT]
        return output.cloze_loss_sum.item(), targets_M.cpu().numpy(), is_right_M.cpu().numpy()

    def metrics(self, batch: PretrainingBatch, measured: Sequence[Any], unigram_nats_V: np.ndarray) -> dict[str, float]:
        sums, targets, is_right = zip(*measured, strict=True)
        loss = sum(sums) / batch.loss_terms["cloze_loss"].divisor
        unigram = float(unigram_nats_V[np.concatenate(targets)].mean())
        return {
            "cloze_loss": loss,
            "cloze_gain": unigram - loss,
            "cloze_accuracy": float(np.concatenate(is_right).mean()),
        }

    def collapsed_at(self, evaluations: Sequence[Mapping[str, Any]]) -> int | None:
        """Return the step of the first evaluation with a loss that only a broken run has."""
        return next((line["step"] for line in evaluations if line["cloze_loss"] > 1e3), None)

    def exports(self, model: ClozeModel) -> Mapping[str, Export]:
        copied = BertForMaskedLM(model.bert.config)
        copied.load_state_dict({name: tensor.detach().float() for name, tensor in model.bert.state_dict().items()})
        return {"masked_lm": Export(copied.eval(), "BertForMaskedLM", "fills in [MASK] tokens")}
