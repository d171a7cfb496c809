"""Fast-ELECTRA: a frozen masked language model makes the replacements, at a temperature that falls to 1.

Dong et al. 2024. The auxiliary model was trained before and is given with `--init-from`, or is pretrained first by the
recipe that `generator.recipe` names. It has neither gradients nor optimizer state, and runs forward only, without
dropout, in the precision of the run. At first its replacements are drawn at a higher temperature, which makes them
easy to detect; ELECTRA gets the same effect from a generator that starts untrained and improves along with the
discriminator.

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

    @torch.no_grad()
    def draw(self, batch: MicroBatch) -> torch.Tensor:
        """Return int64 [M], the tokens that the generator draws for a micro-batch's selected positions."""
        with self.autocast(batch.device):
            return self._generate(batch, None).samples_M

    def _generate(self, batch: MicroBatch, samples_M: torch.Tensor | None) -> Generated:
        with torch.no_grad():
            return super()._generate(batch, samples_M)


def begin_discriminator(model: Electra, given: Mapping[str, torch.Tensor], starts_from: str) -> None:
    """Give the discriminator its first weights, unless its own were given.

    given: as in `Objective.begin`. starts_from: as in the recipe.
    """
    if starts_from == "random" or any(name.startswith("discriminator.") for name in given):
        return
    taken = "generator." if starts_from == "generator" else "generator.embeddings."
    own = model.discriminator.state_dict()
    model.discriminator.load_state_dict(
        {
            name: given[f"generator.{name}"][: len(tensor)] if f"generator.{name}".startswith(taken) else tensor
            for name, tensor in own.items()
        }
    )


class FastElectraObjective(RtdObjective[FastElectraRecipe]):
    """A frozen generator, and a discriminator that predicts which tokens were replaced."""

    recipe_type = FastElectraRecipe
    trains_generator = False

    def build_model(self) -> FastElectra:
        return FastElectra(self.recipe, self.vocab_size, self.pad_token_id)

    def temperature(self, seed: int, step: int) -> float:
        if seed != self.recipe.seed:  # held-out text, on which every step is evaluated alike
            return 1.0
        return self.recipe.temperature.at(step / self.recipe.schedule.total_steps)

    def begin(self, model: FastElectra, given: Mapping[str, torch.Tensor]) -> None:
        begin_discriminator(model, given, self.recipe.discriminator.starts_from)

    def exports(self, model: Any) -> Mapping[str, Export]:
        found = super().exports(model)
        generator = found["generator"]._replace(
            purpose="fills in [MASK] tokens; it was the frozen generator that made the replacements"
        )
        return {**found, "generator": generator}
