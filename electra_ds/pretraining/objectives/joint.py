"""The base of objectives with a generator: masks and noise, the generator's metrics, and the sizes of a step.

Shape suffixes: B sequences of the global batch, T positions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from electra_ds.config.recipe import JointRecipe
from electra_ds.config.sections import GeneratorSection
from electra_ds.core.keyed_random import generator, random_bits
from electra_ds.model.encoder import EncoderConfig
from electra_ds.pretraining.electra import JointModel, encoder_configs
from electra_ds.pretraining.masked_batch import MaskedBatch, MicroBatch, WeightedLoss
from electra_ds.pretraining.masking import Masks, choose_masks
from electra_ds.pretraining.objectives.base import Export, Objective, TextBatch
from electra_ds.pretraining.objectives.token_metrics import token_labels
from electra_ds.pretraining.step_shape import (
    Network,
    StepShape,
    embedding_parameters,
    encoder_parameters,
    token_head_parameters,
)
from electra_ds.training.optimizer import ParameterRates, Rates, pretraining_rates

JointRecipeT = TypeVar("JointRecipeT", bound=JointRecipe)

_MASKS_AND_NOISE = 0x50
GENERATOR_LOSS = "generator_loss"


class JointObjective(Objective[JointRecipeT]):
    """A generator, and a network that reads the text with the generator's replacements."""

    trains_generator: ClassVar[bool] = True
    generator_labels: ClassVar[dict[str, str]] = token_labels("generator") | {
        "generator_sampled_accuracy": "generator accuracy at [MASK], sampled",
        "replaced_share": "share of the tokens that were replaced",
    }

    @property
    @abstractmethod
    def losses(self) -> Mapping[str, WeightedLoss]:
        """The losses of a step."""

    @property
    def loss_names(self) -> list[str]:
        return list(self.losses)

    def generator_loss(self) -> dict[str, WeightedLoss]:
        section = self.recipe.generator
        assert isinstance(section, GeneratorSection)  # of an objective that trains its generator
        return {GENERATOR_LOSS: WeightedLoss(section.loss_weight, "selected")}

    @classmethod
    def rates(cls, recipe: JointRecipeT) -> Rates:
        section = recipe.generator
        if not isinstance(section, GeneratorSection):
            return pretraining_rates
        optimizer = recipe.optimizer
        betas = (
            optimizer.beta1 if section.beta1 is None else section.beta1,
            optimizer.beta2 if section.beta2 is None else section.beta2,
        )
        own: dict[str, Any] = {
            "lr_scale": (section.learning_rate or optimizer.learning_rate) / optimizer.learning_rate,
            "max_grad_norm": section.max_grad_norm,
            "betas": None if betas == (optimizer.beta1, optimizer.beta2) else betas,
            "total_steps": section.total_steps,
        }

        def rates(name: str) -> ParameterRates:
            usual = pretraining_rates(name)
            return usual._replace(**own) if name.startswith(("generator.", "generator_head.")) else usual

        return rates

    def temperature(self, seed: int, step: int) -> float:
        """Return the temperature at which a step's replacements are drawn. seed: as in `make_batch`."""
        section = self.recipe.generator
        return section.temperature if isinstance(section, GeneratorSection) else 1.0

    @abstractmethod
    def counted(self, text: TextBatch, masks: Masks) -> np.ndarray:
        """Return bool [B, T], the positions that count in a loss over all tokens."""

    def make_batch(self, text: TextBatch, seed: int, step: int) -> MaskedBatch:
        rng = generator(seed, _MASKS_AND_NOISE, step, *text.part_key)
        noise = random_bits(rng, *text.ids_BT.shape).view(np.int32)
        masks = choose_masks(text.maskable_BT, text.lengths_B, rng, self.recipe.masking)
        return MaskedBatch(
            **vars(text),
            masks=masks,
            counted_BT=self.counted(text, masks),
            noise_keys_BT=noise,
            masking=self.recipe.masking,
            losses=self.losses,
            temperature=self.temperature(seed, step),
        )

    @abstractmethod
    def main_network(self, config: EncoderConfig, encoder_parameters: int) -> Network:
        """Return the shape of the network that reads the replacements. encoder_parameters: without its heads."""

    @cached_property
    def shape(self) -> StepShape:
        small, main = encoder_configs(self.recipe, self.vocab_size, self.pad_token_id)
        embeddings, sharing = embedding_parameters(main), self.recipe.sharing
        shared = {"embeddings": embeddings, "tokens": self.vocab_size * main.embedding_size, "none": 0}
        own = 0 if sharing == "all" else embeddings + encoder_parameters(small) - shared[sharing]
        return StepShape(
            networks=(
                Network(
                    "generator",
                    small,
                    own + token_head_parameters(small),
                    predicts_at="selected",
                    draws=True,
                    is_trained=self.trains_generator,
                    has_own_encoder=sharing != "all",
                ),
                self.main_network(main, embeddings + encoder_parameters(main)),
            ),
            global_batch_size=self.recipe.global_batch_size,
            length=self.recipe.data.sequence_length,
            masking=self.recipe.masking,
            has_temperature=self.temperature(self.recipe.seed, 0) != 1.0,
        )

    def longest_micro_batch(self, size: int) -> MicroBatch:
        shape = self.shape
        temperature = torch.tensor(2.0) if shape.has_temperature else None
        return full_micro_batch(shape, size, self.vocab_size, draws=True)._replace(temperature=temperature)

    def generator_export(self, model: JointModel) -> Export:
        from electra_ds.pretraining.convert import masked_lm

        return Export(
            masked_lm(model, "generator"),
            "ElectraForMaskedLM",
            "fills in [MASK] tokens; it was trained to make replacements for the other network",
        )

    def encoder_exports(self, model: JointModel, purpose: str) -> dict[str, Export]:
        """Return the exports of a model whose encoder predicts tokens. purpose: the encoder's, as in `Export`."""
        from electra_ds.pretraining.convert import masked_lm

        encoder = Export(masked_lm(model, "encoder"), "ElectraForMaskedLM", purpose)
        return {"encoder": encoder, "generator": self.generator_export(model)}


def full_micro_batch(shape: StepShape, rows: int, vocab_size: int, *, draws: bool) -> MicroBatch:
    """Return full rows with `StepShape.selected` positions; their tokens are arbitrary."""
    selected, places = shape.selected(rows), torch.arange(rows * shape.length)
    ids_BT = (places % vocab_size).view(rows, shape.length)
    return MicroBatch(
        ids_BT=ids_BT,
        masked_ids_BT=ids_BT.clone(),
        selected_M=places[:selected].clone(),
        replaced_M=torch.ones(selected, dtype=torch.bool),
        noise_keys_M=torch.arange(selected, dtype=torch.int32) if draws else None,
        counted_BT=torch.ones(rows, shape.length, dtype=torch.bool),
        sequences_BT=None,
    )


def describe_share(metrics: Mapping[str, Any]) -> str:
    return f"{100 * metrics['replaced_share']:.1f} % of the tokens replaced"
