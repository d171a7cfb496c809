"""The networks of ELECTRA in one module, so that one engine trains both: a generator, and a network that reads the text
with the generator's replacements.

Shape suffixes: B rows of the micro-batch, T positions, M selected positions, Q queries, V vocabulary, H hidden.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from electra_ds.config.recipe import JointRecipe, Recipe, joint_recipe
from electra_ds.config.sections import ModelSection
from electra_ds.model.encoder import Encoder, EncoderConfig
from electra_ds.model.heads import DiscriminatorHead, Prediction, TokenHead, column_keys
from electra_ds.model.kernels import shared_mask
from electra_ds.pretraining.masked_batch import MicroBatch
from electra_ds.training.step import AutocastModel


class ElectraOutput(NamedTuple):
    """Loss sums over the micro-batch (to be divided by counts over the global batch), and their parts."""

    generator_loss_sum: torch.Tensor
    discriminator_loss_sum: torch.Tensor
    generator_losses_M: torch.Tensor
    """fp32, nats."""
    best_M: torch.Tensor
    """int64, the generator's most probable tokens."""
    samples_M: torch.Tensor
    discriminator_logits_BT: torch.Tensor
    is_replaced_BT: torch.Tensor

    @property
    def losses(self) -> dict[str, torch.Tensor]:
        """The two sums, by the names of the batch's `loss_terms`."""
        return {"generator_loss": self.generator_loss_sum, "discriminator_loss": self.discriminator_loss_sum}


def main_config(model: ModelSection, vocab_size: int, pad_token_id: int) -> EncoderConfig:
    """Return the sizes of the network that is kept."""
    return EncoderConfig(vocab_size=vocab_size, pad_token_id=pad_token_id, **model.model_dump(exclude={"initializer"}))


def encoder_configs(recipe: Recipe, vocab_size: int, pad_token_id: int) -> tuple[EncoderConfig, EncoderConfig]:
    """Return the sizes of the generator and of the network that reads its replacements.

    Raises ConfigError for a recipe without a generator.
    """
    recipe = joint_recipe(recipe)
    main = main_config(recipe.model, vocab_size, pad_token_id)
    if recipe.sharing == "all":
        return main, main
    return replace(main, **recipe.generator_sizes._asdict()), main


_BY_TENSORFLOW = ("embeddings_project.weight", "dense_prediction.weight")


def initialise(model: nn.Module, section: ModelSection, seed: int) -> None:
    """Initialise matrices and tables with Normal(0, initializer_range) from the seed, norms with 1, biases with 0.

    With `truncated-normal`, as in google-research/electra, the projection of the embeddings and the discriminator's
    last layer have Glorot's uniform distribution, TensorFlow's default, since its code names no other for them.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(_BY_TENSORFLOW) and section.initializer == "truncated-normal":
                nn.init.xavier_uniform_(parameter, generator=rng)
            elif parameter.dim() == 2 and section.initializer == "truncated-normal":
                spread = section.initializer_range
                nn.init.trunc_normal_(parameter, 0.0, spread, -2 * spread, 2 * spread, generator=rng)
            elif parameter.dim() == 2:
                parameter.normal_(0.0, section.initializer_range, generator=rng)
            else:
                parameter.fill_(1.0 if name.endswith("LayerNorm.weight") or "norm.weight" in name else 0.0)
        for module in model.modules():
            if isinstance(module, Encoder):
                table = module.embeddings.word_embeddings
                table.weight[table.padding_idx].zero_()


class MaskedTextModel(AutocastModel):
    """A model of our encoders that reads a `MicroBatch`."""

    def set_up(self, autocast_dtype: torch.dtype | None, checkpointed_layers: int) -> None:
        super().set_up(autocast_dtype, checkpointed_layers)
        for module in self.modules():
            if isinstance(module, Encoder):
                module.checkpointed_layers = checkpointed_layers

    def _attend(self, batch: MicroBatch, weight: torch.Tensor) -> torch.Tensor | None:
        """Return the mask of all layers' attention, in the dtype of the forward pass. weight: any of a matrix."""
        return shared_mask(batch.attention_mask(), self.autocast_dtype or weight.dtype)


class Generated(NamedTuple):
    """A micro-batch with the generator's replacements."""

    prediction: Prediction
    samples_M: torch.Tensor
    """int64, the tokens that were drawn or replayed."""
    corrupted_BT: torch.Tensor
    """int64, the input of the main network."""
    attend_B1QT: torch.Tensor | None


class JointModel(MaskedTextModel):
    """A generator, and a main network that reads its replacements. Subclasses say what the main network predicts."""

    main_name: ClassVar[str]
    """The attribute with the main network's encoder."""

    def __init__(self, recipe: JointRecipe, vocab_size: int, pad_token_id: int) -> None:
        super().__init__()
        generator_config, config = encoder_configs(recipe, vocab_size, pad_token_id)
        main = Encoder(config)
        self.add_module(self.main_name, main)
        self.generator = main if recipe.sharing == "all" else Encoder(generator_config)
        if recipe.sharing == "embeddings":
            self.generator.embeddings = main.embeddings
        elif recipe.sharing == "tokens":
            self.generator.embeddings.word_embeddings.weight = main.embeddings.word_embeddings.weight
        self.generator_head = TokenHead(generator_config, self.generator.embeddings.word_embeddings)
        self._add_heads(main)
        self.register_buffer("column_keys_V", column_keys(vocab_size), persistent=False)
        self.column_keys_V: torch.Tensor
        initialise(self, recipe.model, recipe.seed)

    @abstractmethod
    def _add_heads(self, main: Encoder) -> None:
        """Create the main network's heads."""

    def _generate(self, batch: MicroBatch, samples_M: torch.Tensor | None) -> Generated:
        """Predict the selected tokens and put drawn ones in their place.

        samples_M: int64 tokens to use at the selected positions instead of drawing them, to replay another run.
        """
        attend_B1QT = self._attend(batch, self.generator_head.dense.weight)
        generator_BTH = self.generator(batch.masked_ids_BT, attend_B1QT, batch.segments_BT, batch.positions_BT)
        prediction = self.generator_head(
            batch.at_selected(generator_BTH),
            batch.targets,
            batch.noise_keys_M,
            self.column_keys_V,
            batch.temperature,
            batch.counts_M,
        )
        with torch.no_grad():
            if samples_M is None:
                samples_M = prediction.samples_M
            corrupted_BT = batch.corrupted(samples_M)
        return Generated(prediction, samples_M, corrupted_BT, attend_B1QT)


class Detected(NamedTuple):
    """The discriminator's results for a micro-batch."""

    loss_sum: torch.Tensor
    logits_BT: torch.Tensor
    """Without gradient."""
    is_replaced_BT: torch.Tensor


class Electra(JointModel):
    """The joint model of Clark et al. 2020, figure 2."""

    main_name = "discriminator"
    discriminator: Encoder

    def __init__(self, recipe: Recipe, vocab_size: int, pad_token_id: int) -> None:
        super().__init__(joint_recipe(recipe), vocab_size, pad_token_id)

    def _add_heads(self, main: Encoder) -> None:
        self.discriminator_head = DiscriminatorHead(main.config)

    def run(self, batch: MicroBatch, samples_M: torch.Tensor | None) -> ElectraOutput:
        """Return both losses of one micro-batch. samples_M: as in `_generate`."""
        prediction, samples_M, corrupted_BT, attend_B1QT = self._generate(batch, samples_M)
        detected = self._detect(batch, corrupted_BT, attend_B1QT)
        return ElectraOutput(
            prediction.loss_sum,
            detected.loss_sum,
            prediction.losses_M,
            prediction.best_M,
            samples_M,
            detected.logits_BT,
            detected.is_replaced_BT,
        )

    def _detect(self, batch: MicroBatch, corrupted_BT: torch.Tensor, attend_B1QT: torch.Tensor | None) -> Detected:
        """Predict which tokens of a corrupted text were replaced."""
        is_replaced_BT = corrupted_BT != batch.ids_BT
        hidden_BTH = self.discriminator(corrupted_BT, attend_B1QT, batch.segments_BT, batch.positions_BT)
        logits_BT = self.discriminator_head(hidden_BTH)
        loss_sum = discriminator_loss_sum(logits_BT, is_replaced_BT, batch.counted_BT)
        return Detected(loss_sum, logits_BT.detach(), is_replaced_BT)


def discriminator_loss_sum(
    logits_BT: torch.Tensor, is_replaced_BT: torch.Tensor, counted_BT: torch.Tensor
) -> torch.Tensor:
    """Return the sum of binary cross-entropies over the counted positions, in nats and fp32. ELECTRA paper, eq. 3."""
    losses = functional.binary_cross_entropy_with_logits(logits_BT.float(), is_replaced_BT.float(), reduction="none")
    return torch.where(counted_BT, losses, 0.0).sum()
