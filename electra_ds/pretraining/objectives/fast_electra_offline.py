"""Fast-ELECTRA offline: a discriminator alone, on replacements that were drawn before the run.

`bin/build-data --corrupt` draws them, for every step of a recipe of `fast-electra`, and stores them beside the text
(`data/replacements.py`). A run on them computes exactly what one with the frozen generator computes, without the
generator's weights or forward pass.

Shape suffixes: B sequences, T positions, M selected positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from electra_ds.config.recipe import FastElectraOfflineRecipe, FastElectraRecipe, Recipe
from electra_ds.core.errors import DataError
from electra_ds.core.program import command
from electra_ds.data.replacements import Replacements
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.electra import Electra
from electra_ds.pretraining.masked_batch import MaskedBatch, MicroBatch
from electra_ds.pretraining.objectives.base import Curve, Export, PretrainingBatch, TextBatch
from electra_ds.pretraining.objectives.electra import RtdObjective
from electra_ds.pretraining.objectives.electra_evaluation import describe_discriminator, discriminator_metrics, judged
from electra_ds.pretraining.objectives.fast_electra import begin_discriminator
from electra_ds.pretraining.objectives.joint import describe_share, full_micro_batch
from electra_ds.pretraining.step_shape import StepShape

_BESIDE_THE_DRAWS = (
    "name", "description", "objective", "model", "tokenizer", "optimizer", "discriminator", "generator",
)  # fmt: skip
"""The keys of a recipe on which neither masks nor draws depend; of the schedule only `total_steps` counts. The drawing
model itself is known by its source."""


def values_of_draws(recipe: Recipe) -> dict[str, Any]:
    """Return the values of a recipe on which masks and drawn tokens depend, by dotted key."""
    values = recipe.model_dump(mode="json", exclude={*_BESIDE_THE_DRAWS, "schedule"})
    found = {"seed": values.pop("seed"), "global_batch_size": values.pop("global_batch_size")}
    found |= {f"{section}.{key}": value for section, inner in values.items() for key, value in inner.items()}
    return found | {"schedule.total_steps": recipe.schedule.total_steps}


class OfflineOutput(NamedTuple):
    """The loss sum of a micro-batch, and its parts."""

    discriminator_loss_sum: torch.Tensor
    samples_M: torch.Tensor
    discriminator_logits_BT: torch.Tensor
    is_replaced_BT: torch.Tensor

    @property
    def losses(self) -> dict[str, torch.Tensor]:
        return {"discriminator_loss": self.discriminator_loss_sum}


class Discriminator(Electra):
    """The discriminator of `FastElectra`, with the same initial weights."""

    def __init__(self, recipe: FastElectraRecipe, vocab_size: int, pad_token_id: int) -> None:
        super().__init__(recipe, vocab_size, pad_token_id)
        del self.generator, self.generator_head, self.column_keys_V

    def run(self, batch: MicroBatch, samples_M: torch.Tensor | None) -> Any:
        """Return the loss of one micro-batch. samples_M: None, since there is nothing to replay."""
        assert batch.samples_M is not None
        attend_B1QT = self._attend(batch, self.discriminator_head.dense.weight)
        detected = self._detect(batch, batch.corrupted(batch.samples_M), attend_B1QT)
        return OfflineOutput(detected.loss_sum, batch.samples_M, detected.logits_BT, detected.is_replaced_BT)


class FastElectraOfflineObjective(RtdObjective[FastElectraOfflineRecipe]):
    """A discriminator that predicts which tokens were replaced, with recorded replacements."""

    recipe_type = FastElectraOfflineRecipe
    trains_generator = False
    reads_replacements = True
    metric_labels: ClassVar[Mapping[str, str]] = {
        name: label
        for name, label in RtdObjective.metric_labels.items()
        if name == "replaced_share" or not name.startswith(("generator", "unigram"))
    }
    key_metrics = ("discriminator_auc", "discriminator_loss", "discriminator_recall")

    def build_model(self) -> Discriminator:
        return Discriminator(self.recipe, self.vocab_size, self.pad_token_id)

    def begin(self, model: Discriminator, given: Mapping[str, torch.Tensor]) -> None:
        begin_discriminator(model, given, self.recipe.discriminator.starts_from)

    def check_store(self, store: TokenStore, eval_windows: int | None = None) -> None:
        recorded = _recorded(store.replacements)
        wanted, there = values_of_draws(self.recipe), recorded.info.values
        differing = [
            f"  {key}: {there.get(key)} when they were drawn, {wanted.get(key)} in this recipe"
            for key in dict.fromkeys([*wanted, *there])
            if wanted.get(key) != there.get(key)
        ]
        if differing:
            raise DataError(
                "\n".join(
                    [
                        f"The replacements in {recorded.folder} were drawn for another recipe:",
                        *differing,
                        f"Start from {recorded.folder / 'recipe.yaml'}, or draw replacements for this recipe.",
                    ]
                )
            )
        if eval_windows is not None:
            recorded.of_held_out(eval_windows)

    def make_batch(self, text: TextBatch, seed: int, step: int) -> MaskedBatch:
        batch = super().make_batch(text, seed, step)
        recorded, selected_BT = _recorded(text.replacements), batch.masks.selected
        held_out = seed != self.recipe.seed
        drawn = recorded.of_held_out(text.num_sequences) if held_out else recorded.of_step(step)
        if len(drawn) != np.count_nonzero(selected_BT):
            raise DataError(f"The replacements in {recorded.folder} do not belong to the text of this store.")
        drawn_BT = np.zeros(text.ids_BT.shape, dtype=np.int64)
        drawn_BT[selected_BT] = drawn
        return replace(batch, noise_keys_BT=None, temperature=1.0, drawn_BT=drawn_BT)

    def measure(self, micro_batch: MicroBatch, output: Any) -> Any:
        return judged(micro_batch, output.discriminator_loss_sum, output.is_replaced_BT, output.discriminator_logits_BT)

    def metrics(self, batch: PretrainingBatch, measured: Sequence[Any], unigram_nats_V: np.ndarray) -> dict[str, float]:
        assert isinstance(batch, MaskedBatch)
        return discriminator_metrics(measured, batch.num_counted)

    def describe(self, metrics: Mapping[str, float]) -> str:
        return f"{describe_share(metrics)}, {describe_discriminator(metrics)}"

    @property
    def curves(self) -> Sequence[Curve]:
        return (
            Curve("discriminator loss (nats)", {"discriminator_loss": ""}, is_loss=True),
            Curve("held out", {"discriminator_auc": "discriminator AUC"}, baseline=0.5),
        )

    def exports(self, model: Any) -> Mapping[str, Export]:
        return {"discriminator": self.discriminator_export(model)}

    @cached_property
    def shape(self) -> StepShape:
        whole = super().shape
        return replace(whole, networks=whole.networks[1:], has_temperature=False)

    def longest_micro_batch(self, size: int) -> MicroBatch:
        full = full_micro_batch(self.shape, size, self.vocab_size, draws=False)
        return full._replace(samples_M=torch.zeros_like(full.selected_M))


def _recorded(found: Replacements | None) -> Replacements:
    if found is None:
        raise DataError(
            f"The objective fast-electra-offline reads replacements that were drawn beforehand. Draw them with "
            f"{command('build-data')} --corrupt STORE, and pass the new store with --data."
        )
    return found
