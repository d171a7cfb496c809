"""ELECTRA: a generator fills in masked tokens, and a discriminator predicts which tokens were replaced.

Clark et al. 2020. Generator and discriminator train together (`pretraining/electra.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from rich.text import Text

from electra_ds.config.recipe import ElectraRecipe, FastElectraOfflineRecipe, FastElectraRecipe
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.model.encoder import EncoderConfig
from electra_ds.pretraining.electra import Electra, ElectraOutput
from electra_ds.pretraining.masked_batch import MaskedBatch, MicroBatch, WeightedLoss
from electra_ds.pretraining.masking import Masks
from electra_ds.pretraining.objectives.base import Curve, Export, PretrainingBatch, TextBatch
from electra_ds.pretraining.objectives.electra_evaluation import (
    ALWAYS_ORIGINAL,
    LEGEND,
    Judged,
    collapsed_at,
    describe_collapse,
    describe_discriminator,
    discriminator_metrics,
    judged,
    sample_sentences,
)
from electra_ds.pretraining.objectives.joint import JointObjective
from electra_ds.pretraining.objectives.token_metrics import (
    PredictedTokens,
    describe_tokens,
    predicted_tokens,
    token_metrics,
)
from electra_ds.pretraining.step_shape import Network, detection_head_parameters

RtdRecipeT = TypeVar("RtdRecipeT", ElectraRecipe, FastElectraRecipe, FastElectraOfflineRecipe)


class _Measured(NamedTuple):
    """Results of one micro-batch."""

    generator: PredictedTokens
    discriminator: Judged


class RtdObjective(JointObjective[RtdRecipeT]):
    """A generator, and a discriminator that predicts which tokens were replaced."""

    metric_labels: ClassVar[Mapping[str, str]] = JointObjective.generator_labels | {
        "discriminator_loss": "discriminator loss (nats)",
        "discriminator_accuracy": "discriminator accuracy",
        ALWAYS_ORIGINAL: '  accuracy of always answering "original"',
        "discriminator_precision": "discriminator precision (replaced)",
        "discriminator_recall": "discriminator recall (replaced)",
        "discriminator_f1": "discriminator F1 (replaced)",
        "discriminator_auc": "discriminator AUC",
        "discriminator_logit_std": "standard deviation of the discriminator's logits",
    }
    main_metric = "discriminator_auc"
    encoder = "discriminator"
    baselines: ClassVar[Mapping[str, str]] = {"discriminator_accuracy": ALWAYS_ORIGINAL}
    key_metrics: ClassVar[Sequence[str]] = (
        "generator_gain",
        "generator_accuracy",
        "discriminator_auc",
        "discriminator_recall",
    )

    @property
    def losses(self) -> Mapping[str, WeightedLoss]:
        return {"discriminator_loss": WeightedLoss(self.recipe.discriminator.loss_weight, "counted")}

    def counted(self, text: TextBatch, masks: Masks) -> np.ndarray:
        return text.is_token if self.recipe.discriminator.loss_on_special else text.maskable_BT

    def measure(self, micro_batch: MicroBatch, output: ElectraOutput) -> _Measured:
        return _Measured(
            predicted_tokens(
                micro_batch, output.generator_loss_sum, output.generator_losses_M, output.best_M, output.samples_M
            ),
            judged(micro_batch, output.discriminator_loss_sum, output.is_replaced_BT, output.discriminator_logits_BT),
        )

    def metrics(
        self, batch: PretrainingBatch, measured: Sequence[_Measured], unigram_nats_V: np.ndarray
    ) -> dict[str, float]:
        assert isinstance(batch, MaskedBatch)
        generator = token_metrics("generator", batch, [each.generator for each in measured], unigram_nats_V)
        return generator | discriminator_metrics([each.discriminator for each in measured], batch.num_counted)

    @classmethod
    def complete(cls, metrics: Mapping[str, Any]) -> dict[str, Any]:
        share = metrics.get("replaced_share")
        return dict(metrics) if share is None else {**metrics, ALWAYS_ORIGINAL: 1 - share}

    def describe(self, metrics: Mapping[str, float]) -> str:
        return f"{describe_tokens('generator', metrics)}, {describe_discriminator(metrics)}"

    def collapsed_at(self, evaluations: Sequence[Mapping[str, Any]]) -> int | None:
        schedule = self.recipe.schedule
        return collapsed_at(
            evaluations, schedule.total_steps, schedule.warmup_steps, generator_learns=self.trains_generator
        )

    def describe_collapse(self, step: int, evaluations: Sequence[Mapping[str, Any]]) -> str:
        return describe_collapse(step, evaluations, generator_learns=self.trains_generator)

    @property
    def curves(self) -> Sequence[Curve]:
        return (
            Curve("generator loss at all selected tokens (nats)", {"generator_loss": ""}, is_loss=True),
            Curve("discriminator loss (nats)", {"discriminator_loss": ""}, is_loss=True),
            Curve("nats", {"generator_gain": "gain over unigram at [MASK]"}, baseline=0.0),
            Curve(
                "held out",
                {"discriminator_auc": "discriminator AUC", "generator_accuracy": "generator accuracy at [MASK]"},
                baseline=0.5,
            ),
        )

    def samples(self, model: Electra, tokenizer: Tokenizer, batch: MaskedBatch, count: int) -> list[Text]:
        return [LEGEND, *sample_sentences(model, tokenizer, batch, count)]

    def exports(self, model: Electra) -> Mapping[str, Export]:
        return {"discriminator": self.discriminator_export(model), "generator": self.generator_export(model)}

    def discriminator_export(self, model: Electra) -> Export:
        # Importing it takes as long as importing torch, and training does not need it.
        from electra_ds.pretraining.convert import discriminator

        return Export(
            discriminator(model),
            "ElectraForPreTraining",
            "predicts for every token whether it was replaced; finetune this encoder",
        )

    def main_network(self, config: EncoderConfig, encoder_parameters: int) -> Network:
        parameters = encoder_parameters + detection_head_parameters(config)
        return Network("discriminator", config, parameters, judges=True)


class ElectraObjective(RtdObjective[ElectraRecipe]):
    """Generator and discriminator, trained together."""

    recipe_type = ElectraRecipe

    @property
    def losses(self) -> Mapping[str, WeightedLoss]:
        return {**self.generator_loss(), **super().losses}

    def build_model(self) -> Electra:
        return Electra(self.recipe, self.vocab_size, self.pad_token_id)
