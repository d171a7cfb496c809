"""Replace MLM: a network predicts the original tokens where a generator has replaced them, and never sees [MASK].

Clark et al. 2020, section 3.5. It shows how much of BERT's disadvantage comes from [MASK], which occurs in pretraining
but not in finetuning. The paper gives neither the generator, which here is trained as ELECTRA's is, nor the weight of
the loss, `prediction.loss_weight`.

Shape suffixes: B rows, T positions, M selected positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from electra_ds.config.recipe import ReplaceMlmRecipe
from electra_ds.model.encoder import Encoder, EncoderConfig
from electra_ds.model.heads import Prediction, TokenHead
from electra_ds.pretraining.electra import Generated, JointModel
from electra_ds.pretraining.masked_batch import MaskedBatch, MicroBatch, WeightedLoss
from electra_ds.pretraining.masking import Masks
from electra_ds.pretraining.objectives.base import Curve, Export, PretrainingBatch, TextBatch
from electra_ds.pretraining.objectives.joint import JointObjective, describe_share
from electra_ds.pretraining.objectives.token_metrics import (
    PredictedTokens,
    describe_tokens,
    predicted_tokens,
    token_metrics,
)
from electra_ds.pretraining.step_shape import Network, token_head_parameters


class ReplaceMlmOutput(NamedTuple):
    """Results of one micro-batch."""

    generator: Prediction
    samples_M: torch.Tensor
    """int64, the tokens that were drawn or replayed."""
    prediction: Prediction
    """The encoder's prediction at the selected positions."""
    is_replaced_BT: torch.Tensor

    @property
    def losses(self) -> dict[str, torch.Tensor]:
        return {"generator_loss": self.generator.loss_sum, "prediction_loss": self.prediction.loss_sum}


class ReplaceMlm(JointModel):
    """A generator, and an encoder that predicts what stood at the selected positions."""

    main_name = "encoder"
    encoder: Encoder

    def _add_heads(self, main: Encoder) -> None:
        self.encoder_head = TokenHead(main.config, main.embeddings.word_embeddings)

    def run(self, batch: MicroBatch, samples_M: torch.Tensor | None) -> ReplaceMlmOutput:
        """Return both losses of one micro-batch. samples_M: as in `_generate`."""
        generated: Generated = self._generate(batch, samples_M)
        hidden_BTH = self.encoder(generated.corrupted_BT, generated.attend_B1QT, batch.segments_BT, batch.positions_BT)
        prediction = self.encoder_head(batch.at_selected(hidden_BTH), batch.targets, counts_M=batch.counts_M)
        is_replaced_BT = generated.corrupted_BT != batch.ids_BT
        return ReplaceMlmOutput(generated.prediction, generated.samples_M, prediction, is_replaced_BT)


class _Measured(NamedTuple):
    """Results of one micro-batch."""

    generator: PredictedTokens
    prediction_sum: float
    targets: np.ndarray
    hits: np.ndarray
    """True where the most probable token is the original."""
    num_replaced: int


class ReplaceMlmObjective(JointObjective[ReplaceMlmRecipe]):
    """A generator, and an encoder that predicts the original tokens at the selected positions."""

    recipe_type = ReplaceMlmRecipe
    metric_labels: ClassVar[Mapping[str, str]] = JointObjective.generator_labels | {
        "prediction_loss": "prediction loss at all selected tokens (nats)",
        "prediction_gain": "  gain of the prediction over the unigram (nats)",
        "prediction_accuracy": "prediction accuracy there, argmax",
    }
    main_metric = "prediction_accuracy"
    key_metrics = ("generator_gain", "prediction_gain", "prediction_accuracy")
    encoder = "encoder"

    @property
    def losses(self) -> Mapping[str, WeightedLoss]:
        weight = self.recipe.prediction.loss_weight
        return self.generator_loss() | {"prediction_loss": WeightedLoss(weight, "selected")}

    def build_model(self) -> ReplaceMlm:
        return ReplaceMlm(self.recipe, self.vocab_size, self.pad_token_id)

    def counted(self, text: TextBatch, masks: Masks) -> np.ndarray:
        return text.maskable_BT

    def measure(self, micro_batch: MicroBatch, output: ReplaceMlmOutput) -> _Measured:
        generator, prediction = output.generator, output.prediction
        targets = micro_batch.targets
        return _Measured(
            generator=predicted_tokens(micro_batch, *generator._replace(samples_M=output.samples_M)),
            prediction_sum=prediction.loss_sum.item(),
            targets=targets.cpu().numpy(),
            hits=(prediction.best_M == targets).cpu().numpy(),
            num_replaced=int(output.is_replaced_BT.sum()),
        )

    def metrics(
        self, batch: PretrainingBatch, measured: Sequence[_Measured], unigram_nats_V: np.ndarray
    ) -> dict[str, float]:
        assert isinstance(batch, MaskedBatch)
        targets = np.concatenate([each.targets for each in measured])
        loss = sum(each.prediction_sum for each in measured) / batch.num_selected
        return token_metrics("generator", batch, [each.generator for each in measured], unigram_nats_V) | {
            "replaced_share": sum(each.num_replaced for each in measured) / batch.num_counted,
            "prediction_loss": loss,
            "prediction_gain": float(unigram_nats_V[targets].mean(dtype=np.float64)) - loss,
            "prediction_accuracy": float(np.concatenate([each.hits for each in measured]).mean(dtype=np.float64)),
        }

    def describe(self, metrics: Mapping[str, float]) -> str:
        return (
            f"{describe_tokens('generator', metrics)}, {describe_share(metrics)}, prediction loss "
            f"{metrics['prediction_loss']:.3f} (a gain of {metrics['prediction_gain']:+.3f} nats), accuracy "
            f"{metrics['prediction_accuracy']:.3f}"
        )

    @property
    def curves(self) -> Sequence[Curve]:
        return (
            Curve("generator loss at all selected tokens (nats)", {"generator_loss": ""}, is_loss=True),
            Curve("prediction loss at all selected tokens (nats)", {"prediction_loss": ""}, is_loss=True),
            Curve("nats", {"prediction_gain": "prediction", "generator_gain": "generator"}, baseline=0.0),
            Curve("held out", {"prediction_accuracy": "prediction accuracy"}),
        )

    def exports(self, model: ReplaceMlm) -> Mapping[str, Export]:
        return self.encoder_exports(model, "predicts original tokens from a text without [MASK]; finetune its encoder")

    def main_network(self, config: EncoderConfig, encoder_parameters: int) -> Network:
        parameters = encoder_parameters + token_head_parameters(config)
        return Network("encoder", config, parameters, predicts_at="selected")
