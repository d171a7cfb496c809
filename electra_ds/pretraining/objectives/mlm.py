"""Masked language modelling: one encoder predicts selected tokens, most of which are shown as [MASK].

Devlin et al. 2019 (BERT), without next-sentence prediction. Of the selected tokens 80 % are shown as [MASK], 10 % as a
random token of the vocabulary and 10 % unchanged; the masks differ in every epoch. google-research/electra trains its
own BERT with 85 % [MASK], 15 % unchanged and no random tokens: `masking.mask_token_share: 0.85` and
`masking.random_token_share: 0`.

Shape suffixes: B rows, T positions, M selected positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from electra_ds.config.recipe import MlmRecipe
from electra_ds.core.keyed_random import generator, random_bits
from electra_ds.model.encoder import Encoder
from electra_ds.model.heads import Prediction, TokenHead
from electra_ds.pretraining.electra import MaskedTextModel, initialise, main_config
from electra_ds.pretraining.masked_batch import MaskedBatch, MicroBatch, WeightedLoss
from electra_ds.pretraining.masking import choose_masks
from electra_ds.pretraining.objectives.base import Curve, Export, Objective, PretrainingBatch, TextBatch
from electra_ds.pretraining.objectives.joint import full_micro_batch
from electra_ds.pretraining.objectives.token_metrics import (
    PredictedTokens,
    describe_tokens,
    predicted_tokens,
    token_labels,
    token_metrics,
)
from electra_ds.pretraining.step_shape import (
    Network,
    StepShape,
    embedding_parameters,
    encoder_parameters,
    token_head_parameters,
)

_MASKS = 0x51


class MlmOutput(NamedTuple):
    """The loss sum of a micro-batch, and its parts."""

    prediction: Prediction

    @property
    def losses(self) -> dict[str, torch.Tensor]:
        return {"mlm_loss": self.prediction.loss_sum}


class MaskedLm(MaskedTextModel):
    """An encoder that predicts the selected tokens."""

    def __init__(self, recipe: MlmRecipe, vocab_size: int, pad_token_id: int) -> None:
        super().__init__()
        config = main_config(recipe.model, vocab_size, pad_token_id)
        self.encoder = Encoder(config)
        self.encoder_head = TokenHead(config, self.encoder.embeddings.word_embeddings)
        initialise(self, recipe.model, recipe.seed)

    def run(self, batch: MicroBatch, replayed: None) -> MlmOutput:
        """Return the loss of one micro-batch. Nothing is drawn, so nothing can be replayed."""
        attend_B1QT = self._attend(batch, self.encoder_head.dense.weight)
        hidden_BTH = self.encoder(batch.masked_ids_BT, attend_B1QT, batch.segments_BT, batch.positions_BT)
        return MlmOutput(self.encoder_head(batch.at_selected(hidden_BTH), batch.targets, counts_M=batch.counts_M))


class MlmObjective(Objective[MlmRecipe]):
    """Masked language modelling with one encoder."""

    recipe_type = MlmRecipe
    metric_labels: ClassVar[Mapping[str, str]] = token_labels("mlm")
    main_metric = "mlm_accuracy"
    key_metrics = ("mlm_gain", "mlm_accuracy")
    encoder = "masked_lm"
    loss_names = ("mlm_loss",)

    def build_model(self) -> MaskedLm:
        return MaskedLm(self.recipe, self.vocab_size, self.pad_token_id)

    def make_batch(self, text: TextBatch, seed: int, step: int) -> MaskedBatch:
        masking, rng = self.recipe.masking, generator(seed, _MASKS, step, *text.part_key)
        masks = choose_masks(text.maskable_BT, text.lengths_B, rng, masking)
        others = masks.selected & ~masks.masked
        random_ids = None
        if masking.random_token_share:
            share = masking.random_token_share / (1 - masking.mask_token_share)
            is_random = others & (random_bits(rng, *text.ids_BT.shape) < share * 2.0**32)
            tokens = (random_bits(rng, *text.ids_BT.shape).astype(np.int64) * self.vocab_size) >> 32
            random_ids = np.where(is_random, tokens, -1)
        return MaskedBatch(
            **vars(text),
            masks=masks,
            counted_BT=text.maskable_BT,
            noise_keys_BT=None,
            masking=masking,
            losses={"mlm_loss": WeightedLoss(1.0, "selected")},
            random_ids_BT=random_ids,
        )

    def measure(self, micro_batch: MicroBatch, output: MlmOutput) -> PredictedTokens:
        return predicted_tokens(micro_batch, *output.prediction)

    def metrics(
        self, batch: PretrainingBatch, measured: Sequence[PredictedTokens], unigram_nats_V: np.ndarray
    ) -> dict[str, float]:
        assert isinstance(batch, MaskedBatch)
        found = token_metrics("mlm", batch, measured, unigram_nats_V)
        return {name: found[name] for name in self.metric_labels}

    def describe(self, metrics: Mapping[str, float]) -> str:
        return f"{describe_tokens('mlm', metrics)}, accuracy at [MASK] {metrics['mlm_accuracy']:.3f}"

    @property
    def curves(self) -> Sequence[Curve]:
        return (
            Curve("loss at all selected tokens (nats)", {"mlm_loss": ""}, is_loss=True),
            Curve("nats", {"mlm_gain": "gain over unigram at [MASK]"}, baseline=0.0),
            Curve("held out", {"mlm_accuracy": "accuracy at [MASK]"}),
        )

    def exports(self, model: MaskedLm) -> Mapping[str, Export]:
        from electra_ds.pretraining.convert import masked_lm

        exported = masked_lm(model, "encoder")
        return {"masked_lm": Export(exported, "ElectraForMaskedLM", "fills in [MASK] tokens; finetune its encoder")}

    @cached_property
    def shape(self) -> StepShape:
        config = main_config(self.recipe.model, self.vocab_size, self.pad_token_id)
        parameters = embedding_parameters(config) + encoder_parameters(config) + token_head_parameters(config)
        return StepShape(
            networks=(Network("encoder", config, parameters, predicts_at="selected"),),
            global_batch_size=self.recipe.global_batch_size,
            length=self.recipe.data.sequence_length,
            masking=self.recipe.masking,
        )

    def longest_micro_batch(self, size: int) -> MicroBatch:
        return full_micro_batch(self.shape, size, self.vocab_size, draws=False)
