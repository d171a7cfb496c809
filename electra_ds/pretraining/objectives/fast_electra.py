"""Fast-ELECTRA: a frozen masked language model makes the replacements, at a temperature that falls to 1.

Dong et al. 2024. The auxiliary model was trained before, by this program or another, and is given with `--init-from`.
It has neither gradients nor optimizer state, and runs forward only, without dropout, in the precision of the run. At
first its replacements are drawn at a higher temperature, which makes them easy to detect; ELECTRA gets that from a
generator that starts untrained and improves along with the discriminator.

With a constant temperature of 1 and `discriminator.starts_from: generator` this is the two-stage training of Clark et
al. 2020, section 3.2: first a generator alone (the objective `mlm`), then a discriminator that begins with its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from electra_ds.config.recipe import FastElectraRecipe
from electra_ds.pretraining.electra import Electra, Generated
from electra_ds.pretraining.masked_batch import MicroBatch
from electra_ds.pretraining.objectives.base import Export
from electra_ds.pretraining.objectives.electra import RtdObjective


class FastElectra(Electra):
    """ELECTRA's networks with a frozen generator."""

    def __init__(self, recipe: FastElectraRecipe, vocab_size: int, pad_token_id: int) -> None:
        super().__init__(recipe, vocab_size, pad_token_id)
        self.generator.requires_grad_(False)
        self.generator_head.requires_grad_(False)

    def train(self, mode: bool = True) -> FastElectra:
        super().train(mode)
        self.generator.eval()
        return self

    def _generate(self, batch: MicroBatch, samples_M: torch.Tensor | None) -> Generated:
        with torch.no_grad():
            return super()._generate(batch, samples_M)


class FastElectraObjective(RtdObjective[FastElectraRecipe]):
    """A frozen generator, and a discriminator that predicts which tokens were replaced."""

    recipe_type = FastElectraRecipe
    required_weights = "generator"
    trains_generator = False

    def build_model(self) -> FastElectra:
        return FastElectra(self.recipe, self.vocab_size, self.pad_token_id)

    def temperature(self, seed: int, step: int) -> float:
        if seed != self.recipe.seed:  # held-out text, on which every step is evaluated alike
            return 1.0
        return self.recipe.temperature.at(step / self.recipe.schedule.total_steps)

    def begin(self, model: FastElectra, given: Mapping[str, torch.Tensor]) -> None:
        start = self.recipe.discriminator.starts_from
        if start == "random" or any(name.startswith("discriminator.") for name in given):
            return
        generator, discriminator = model.generator, model.discriminator
        if start == "generator":
            discriminator.load_state_dict(generator.state_dict())
        else:
            discriminator.embeddings.load_state_dict(generator.embeddings.state_dict())

    def exports(self, model: Any) -> Mapping[str, Export]:
        found = super().exports(model)
        generator = found["generator"]._replace(purpose="the frozen generator; fills in [MASK] tokens")
        return {**found, "generator": generator}
