"""All-Tokens MLM: a network predicts the original token at every position of a text with a generator's replacements.

Clark et al. 2020, section 3.5; it stands between BERT and ELECTRA. A copy mechanism spares the network from predicting
what it sees: at each position it copies the input token with a copy probability that it computes, and otherwise
predicts a token. `prediction.copy_loss: separate` trains the copy probability with a cross-entropy of its own, as
COCO-LM does (Meng et al. 2021), whose authors found this more stable. The copy probability says how likely it is that a
token was not replaced, so it is evaluated like a discriminator.

Shape suffixes: B rows, T positions, N tokens of a micro-batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn

from electra_ds.config.recipe import AllTokensMlmRecipe
from electra_ds.model.encoder import Encoder, EncoderConfig
from electra_ds.model.heads import Copy, Prediction, TokenHead
from electra_ds.pretraining.electra import Generated, JointModel, discriminator_loss_sum
from electra_ds.pretraining.masked_batch import MaskedBatch, MicroBatch, WeightedLoss
from electra_ds.pretraining.masking import Masks
from electra_ds.pretraining.objectives.base import Curve, Export, PretrainingBatch, TextBatch
from electra_ds.pretraining.objectives.electra_evaluation import Judged, area_under_roc, judged
from electra_ds.pretraining.objectives.joint import JointObjective, describe_share
from electra_ds.pretraining.objectives.token_metrics import (
    PredictedTokens,
    describe_tokens,
    predicted_tokens,
    token_metrics,
)
from electra_ds.pretraining.step_shape import Network, token_head_parameters


class AllTokensOutput(NamedTuple):
    """Results of one micro-batch."""

    generator: Prediction
    samples_M: torch.Tensor
    """int64, the tokens that were drawn or replayed."""
    prediction: Prediction
    """At every position, row by row."""
    copy_loss_sum: torch.Tensor
    copy_logits_BT: torch.Tensor
    """The logits of the copy probability."""
    is_replaced_BT: torch.Tensor
    is_separate: bool

    @property
    def losses(self) -> dict[str, torch.Tensor]:
        joint = {"generator_loss": self.generator.loss_sum, "prediction_loss": self.prediction.loss_sum}
        return joint | {"copy_loss": self.copy_loss_sum} if self.is_separate else joint


class AllTokensMlm(JointModel):
    """A generator, and an encoder that predicts or copies the token at every position."""

    main_name = "encoder"
    encoder: Encoder

    def __init__(self, recipe: AllTokensMlmRecipe, vocab_size: int, pad_token_id: int) -> None:
        super().__init__(recipe, vocab_size, pad_token_id)
        self._is_separate = recipe.prediction.copy_loss == "separate"

    def _add_heads(self, main: Encoder) -> None:
        self.encoder_head = TokenHead(main.config, main.embeddings.word_embeddings)
        self.copy_head = nn.Linear(main.config.hidden_size, 1)

    def run(self, batch: MicroBatch, samples_M: torch.Tensor | None) -> AllTokensOutput:
        """Return the losses of one micro-batch. samples_M: as in `_generate`."""
        generated: Generated = self._generate(batch, samples_M)
        corrupted_BT = generated.corrupted_BT
        hidden_BTH = self.encoder(corrupted_BT, generated.attend_B1QT, batch.segments_BT, batch.positions_BT)
        copy_logits_BT = self.copy_head(hidden_BTH).squeeze(-1)
        is_replaced_BT = corrupted_BT != batch.ids_BT
        mixed_BT = copy_logits_BT.detach() if self._is_separate else copy_logits_BT
        prediction = self.encoder_head(
            hidden_BTH.flatten(0, 1),
            batch.ids_BT.flatten(),
            counts_M=batch.counted_BT.flatten(),
            copy=Copy(mixed_BT.flatten(), ~is_replaced_BT.flatten()),
        )
        copy_loss_sum = discriminator_loss_sum(copy_logits_BT, ~is_replaced_BT, batch.counted_BT)
        return AllTokensOutput(
            generated.prediction,
            generated.samples_M,
            prediction,
            copy_loss_sum,
            copy_logits_BT.detach(),
            is_replaced_BT,
            self._is_separate,
        )


class _Measured(NamedTuple):
    """Results of one micro-batch."""

    generator: PredictedTokens
    prediction_sum: float
    replaced_hits: np.ndarray
    """At the replaced tokens: True where the most probable token is the original."""
    copy: Judged


class AllTokensMlmObjective(JointObjective[AllTokensMlmRecipe]):
    """A generator, and an encoder that predicts or copies the token at every position."""

    recipe_type = AllTokensMlmRecipe
    metric_labels: ClassVar[Mapping[str, str]] = JointObjective.generator_labels | {
        "prediction_loss": "prediction loss at all tokens (nats)",
        "prediction_accuracy": "prediction accuracy at replaced tokens, argmax",
        "copy_loss": "loss of the copy probability (nats)",
        "copy_auc": "AUC of the copy probability",
    }
    main_metric = "prediction_accuracy"
    key_metrics = ("generator_gain", "prediction_loss", "prediction_accuracy", "copy_auc")
    encoder = "encoder"

    @property
    def losses(self) -> Mapping[str, WeightedLoss]:
        section = self.recipe.prediction
        losses = self.generator_loss() | {"prediction_loss": WeightedLoss(section.loss_weight, "counted")}
        if section.copy_loss == "separate":
            losses["copy_loss"] = WeightedLoss(section.copy_loss_weight, "counted")
        return losses

    def build_model(self) -> AllTokensMlm:
        return AllTokensMlm(self.recipe, self.vocab_size, self.pad_token_id)

    def counted(self, text: TextBatch, masks: Masks) -> np.ndarray:
        return text.is_token if self.recipe.prediction.loss_on_special else text.maskable_BT

    def measure(self, micro_batch: MicroBatch, output: AllTokensOutput) -> _Measured:
        is_right_BT = output.prediction.best_M.view_as(micro_batch.ids_BT) == micro_batch.ids_BT
        return _Measured(
            generator=predicted_tokens(micro_batch, *output.generator._replace(samples_M=output.samples_M)),
            prediction_sum=output.prediction.loss_sum.item(),
            replaced_hits=is_right_BT[output.is_replaced_BT].cpu().numpy(),
            copy=judged(micro_batch, output.copy_loss_sum, ~output.is_replaced_BT, output.copy_logits_BT),
        )

    def metrics(
        self, batch: PretrainingBatch, measured: Sequence[_Measured], unigram_nats_V: np.ndarray
    ) -> dict[str, float]:
        assert isinstance(batch, MaskedBatch)
        kept = np.concatenate([each.copy.labels for each in measured])
        scores = np.concatenate([each.copy.scores for each in measured])
        hits = np.concatenate([each.replaced_hits for each in measured])
        return token_metrics("generator", batch, [each.generator for each in measured], unigram_nats_V) | {
            "replaced_share": 1 - float(kept.mean()),
            "prediction_loss": sum(each.prediction_sum for each in measured) / batch.num_counted,
            "prediction_accuracy": float(hits.mean(dtype=np.float64)) if len(hits) else float("nan"),
            "copy_loss": sum(each.copy.loss_sum for each in measured) / batch.num_counted,
            "copy_auc": area_under_roc(kept, scores),
        }

    def describe(self, metrics: Mapping[str, float]) -> str:
        return (
            f"{describe_tokens('generator', metrics)}, {describe_share(metrics)}, prediction loss "
            f"{metrics['prediction_loss']:.3f}, accuracy at replaced tokens {metrics['prediction_accuracy']:.3f}, AUC "
            f"of copying {metrics['copy_auc']:.3f}"
        )

    @property
    def curves(self) -> Sequence[Curve]:
        return (
            Curve("generator loss at all selected tokens (nats)", {"generator_loss": ""}, is_loss=True),
            Curve("prediction loss at all tokens (nats)", {"prediction_loss": ""}, is_loss=True),
            Curve("nats", {"generator_gain": "gain of the generator over unigram at [MASK]"}, baseline=0.0),
            Curve("held out", {"copy_auc": "AUC of copying", "prediction_accuracy": "accuracy at replaced tokens"}),
        )

    def exports(self, model: AllTokensMlm) -> Mapping[str, Export]:
        return self.encoder_exports(
            model, "predicts original tokens, without its copy mechanism; finetune this encoder"
        )

    def main_network(self, config: EncoderConfig, encoder_parameters: int) -> Network:
        parameters = encoder_parameters + token_head_parameters(config) + config.hidden_size + 1
        return Network("encoder", config, parameters, predicts_at="all", copies=True)
