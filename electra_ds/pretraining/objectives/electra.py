"""ELECTRA: a generator fills in masked tokens, and a discriminator predicts which tokens were replaced.

Clark et al. 2020. Generator and discriminator train together (`pretraining/electra.py`).

Shape suffixes: B sequences of the global batch, T positions, M selected positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from rich.text import Text

from electra_ds.config.cards import Card
from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.recipe import ElectraRecipe
from electra_ds.core.keyed_random import generator, random_bits
from electra_ds.data.packing import packed_rows
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.pretraining.electra import Electra, ElectraOutput, MicroBatch, encoder_configs
from electra_ds.pretraining.masking import Masks, before, choose_masks, selected_limit
from electra_ds.pretraining.memory import Kernels, PeakMemory, count_parameters, peak_memory
from electra_ds.pretraining.objectives.base import Curve, Export, Objective, PretrainingBatch, TextBatch
from electra_ds.pretraining.objectives.electra_evaluation import (
    ALWAYS_ORIGINAL,
    LEGEND,
    Measured,
    collapsed_at,
    evaluation_of,
    measured,
    sample_sentences,
)
from electra_ds.pretraining.run_time import StepTime, step_flops, step_operations, step_time
from electra_ds.training.step import LossTerm

_MASKS_AND_NOISE = 0x50
GENERATOR_LOSS, DISCRIMINATOR_LOSS = "generator_loss", "discriminator_loss"


@dataclass(frozen=True)
class ElectraBatch(TextBatch, PretrainingBatch):
    """The text of one optimizer step, with masks and noise."""

    masks: Masks
    counted_BT: np.ndarray
    """bool, True where the discriminator's loss counts."""
    noise_keys_BT: np.ndarray
    """int32."""
    recipe: ElectraRecipe

    @property
    def num_selected(self) -> int:
        """The divisor of the generator's loss."""
        return max(1, int(np.count_nonzero(self.masks.selected)))

    @property
    def num_counted(self) -> int:
        """The divisor of the discriminator's loss."""
        return max(1, int(np.count_nonzero(self.counted_BT)))

    @property
    def loss_terms(self) -> Mapping[str, LossTerm]:
        return {
            GENERATOR_LOSS: LossTerm(self.recipe.generator.loss_weight, self.num_selected),
            DISCRIMINATOR_LOSS: LossTerm(self.recipe.discriminator.loss_weight, self.num_counted),
        }

    def micro_batch(self, first: int, size: int, *, packed: bool = True) -> MicroBatch:
        """Return sequences `first` to `first + size` as tensors in ordinary memory.

        packed: put several short sequences into one row if that saves rows; otherwise each has its own row.
        """
        taken = slice(first, first + size)
        ids, lengths, second = self.ids_BT[taken], self.lengths_B[taken], self.second_segment_BT
        width = ids.shape[1]
        selected_M = np.flatnonzero(self.masks.selected[taken])
        masked_M, replaced_M, noise_keys_M = (
            array_BT[taken].reshape(-1)[selected_M]
            for array_BT in (self.masks.masked, self.masks.replaced, self.noise_keys_BT)
        )
        counted, second = self.counted_BT[taken], None if second is None else second[taken]
        sequences = positions = None
        if lengths.min() < width:
            sequences = np.arange(1, len(ids) + 1, dtype=np.int32)[:, None] * before(lengths, width)
            rows = packed_rows(lengths, width) if packed else None
            if rows is not None:
                ids, counted, sequences = rows.pack(ids), rows.pack(counted), rows.pack(sequences)
                second = None if second is None else rows.pack(second)
                positions, selected_M = rows.positions(width), rows.moved(selected_M, width)
        generator_ids = ids.copy()
        generator_ids.reshape(-1)[selected_M[masked_M]] = self.mask_token_id
        temperature = self.recipe.generator.temperature
        return MicroBatch(
            ids_BT=torch.from_numpy(ids),
            generator_ids_BT=torch.from_numpy(generator_ids),
            selected_M=torch.from_numpy(selected_M),
            replaced_M=torch.from_numpy(replaced_M),
            noise_keys_M=torch.from_numpy(noise_keys_M),
            counted_BT=torch.from_numpy(counted),
            sequences_BT=None if sequences is None else torch.from_numpy(sequences),
            segments_BT=None if second is None else torch.from_numpy(second),
            positions_BT=None if positions is None else torch.from_numpy(positions),
            temperature=None if temperature == 1.0 else torch.tensor(temperature, dtype=torch.float32),
        )

    def static_micro_batch(self, first: int, size: int) -> MicroBatch | None:
        """Return full or nearly full rows, with the selected positions padded to a number that practically no
        micro-batch exceeds; None for shorter rows, or for more selected positions."""
        if self.lengths_B[first : first + size].mean() / self.ids_BT.shape[1] < _FULL_ENOUGH:
            return None
        micro_batch = self.micro_batch(first, size, packed=False)
        most = selected_limit(self.recipe.masking, size, self.ids_BT.shape[1])
        return micro_batch.filled(most) if len(micro_batch.selected_M) <= most else None


# Rows with a smaller share of tokens are packed instead of compiled. Assumed: compiling saves a quarter of the time.
_FULL_ENOUGH = 0.75


class ElectraObjective(Objective[ElectraRecipe]):
    """Generator and discriminator, trained together."""

    recipe_type = ElectraRecipe
    metric_labels: ClassVar[Mapping[str, str]] = {
        "generator_loss": "generator loss at all selected tokens (nats)",
        "generator_masked_loss": "generator loss at [MASK] (nats)",
        "unigram_loss": "  loss of the training unigram there (nats)",
        "generator_gain": "  gain of the generator over it (nats)",
        "generator_accuracy": "generator accuracy at [MASK], argmax",
        "generator_sampled_accuracy": "generator accuracy at [MASK], sampled",
        "replaced_share": "share of the tokens that were replaced",
        "discriminator_loss": "discriminator loss (nats)",
        "discriminator_accuracy": "discriminator accuracy",
        ALWAYS_ORIGINAL: '  accuracy of always answering "original"',
        "discriminator_precision": "discriminator precision (replaced)",
        "discriminator_recall": "discriminator recall (replaced)",
        "discriminator_f1": "discriminator F1 (replaced)",
        "discriminator_auc": "discriminator AUC",
    }
    main_metric = "discriminator_auc"
    encoder = "discriminator"
    baselines: ClassVar[Mapping[str, str]] = {"discriminator_accuracy": ALWAYS_ORIGINAL}
    key_metrics = ("generator_gain", "generator_accuracy", "discriminator_auc", "discriminator_recall")
    loss_names = (GENERATOR_LOSS, DISCRIMINATOR_LOSS)

    def build_model(self) -> Electra:
        return Electra(self.recipe, self.vocab_size, self.pad_token_id)

    def make_batch(self, text: TextBatch, seed: int, step: int) -> ElectraBatch:
        rng = generator(seed, _MASKS_AND_NOISE, step)
        noise = random_bits(rng, *text.ids_BT.shape).view(np.int32)
        masks = choose_masks(text.maskable_BT, text.lengths_B, rng, self.recipe.masking)
        counted = text.is_token if self.recipe.discriminator.loss_on_special else text.maskable_BT
        return ElectraBatch(**vars(text), masks=masks, counted_BT=counted, noise_keys_BT=noise, recipe=self.recipe)

    def measure(self, micro_batch: MicroBatch, output: ElectraOutput) -> Measured:
        return measured(micro_batch, output)

    def metrics(
        self, batch: PretrainingBatch, measured: Sequence[Measured], unigram_nats_V: np.ndarray
    ) -> dict[str, float]:
        assert isinstance(batch, ElectraBatch)
        return evaluation_of(measured, batch.num_selected, batch.num_counted, unigram_nats_V)._asdict()

    @classmethod
    def complete(cls, metrics: Mapping[str, Any]) -> dict[str, Any]:
        share = metrics.get("replaced_share")
        return dict(metrics) if share is None else {**metrics, ALWAYS_ORIGINAL: 1 - share}

    def describe(self, metrics: Mapping[str, float]) -> str:
        original = 1 - metrics["replaced_share"]
        return (
            f"generator loss {metrics['generator_loss']:.3f} ({metrics['generator_masked_loss']:.3f} at [MASK], a gain "
            f"of {metrics['generator_gain']:+.3f} nats over the unigram), discriminator loss "
            f"{metrics['discriminator_loss']:.3f}, accuracy {metrics['discriminator_accuracy']:.3f} "
            f'(always "original": {original:.3f}), AUC {metrics["discriminator_auc"]:.3f}'
        )

    def collapsed_at(self, evaluations: Sequence[Mapping[str, Any]]) -> int | None:
        schedule = self.recipe.schedule
        return collapsed_at(evaluations, schedule.total_steps, schedule.warmup_steps)

    def describe_collapse(self, step: int) -> str:
        return f"The discriminator has been at chance since step {step} while the generator improved: it has collapsed"

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

    def samples(self, model: Electra, tokenizer: Tokenizer, batch: ElectraBatch, count: int) -> list[Text]:
        return [LEGEND, *sample_sentences(model, tokenizer, batch, count)]

    def exports(self, model: Electra) -> Mapping[str, Export]:
        # Importing it takes as long as importing torch, and training does not need it.
        from electra_ds.pretraining.convert import to_transformers

        masked_lm, discriminator = to_transformers(model)
        return {
            "discriminator": Export(
                discriminator,
                "ElectraForPreTraining",
                "predicts for every token whether it was replaced; finetune this encoder",
            ),
            "generator": Export(
                masked_lm,
                "ElectraForMaskedLM",
                "fills in [MASK] tokens; it was trained to give the discriminator something to detect",
            ),
        }

    def parameter_counts(self) -> dict[str, int]:
        return count_parameters(self.recipe, self.vocab_size)._asdict()

    def flops(self, batch: ElectraBatch) -> float:
        return self._flops(batch.lengths_B, batch.num_selected)

    def usual_flops(self) -> float:
        rows, length = self.recipe.global_batch_size, self.recipe.data.sequence_length
        return self._flops([length] * rows, selected_limit(self.recipe.masking, rows, length))

    def _flops(self, lengths_B: Sequence[int] | np.ndarray, selected: int) -> float:
        configs = encoder_configs(self.recipe, self.vocab_size, self.pad_token_id)
        return step_flops(*configs, lengths_B, selected).forward_and_backward

    def usual_operations(self, plan: DeepSpeedPlan) -> int:
        return step_operations(self.recipe, self.vocab_size, plan)

    def step_time(self, plan: DeepSpeedPlan, card: Card) -> StepTime | None:
        return step_time(self.recipe, self.vocab_size, plan, card)

    def peak_memory(self, plan: DeepSpeedPlan, kernels: Kernels) -> PeakMemory:
        return peak_memory(self.recipe, self.vocab_size, plan, kernels)

    def longest_micro_batch(self, size: int) -> MicroBatch:
        """Return full rows with `selected_limit` positions."""
        length = self.recipe.data.sequence_length
        selected = selected_limit(self.recipe.masking, size, length)
        places = torch.arange(size * length)
        ids_BT = (places % self.vocab_size).view(size, length)
        return MicroBatch(
            ids_BT=ids_BT,
            generator_ids_BT=ids_BT.clone(),
            selected_M=places[:selected].clone(),
            replaced_M=torch.ones(selected, dtype=torch.bool),
            noise_keys_M=torch.arange(selected, dtype=torch.int32),
            counted_BT=torch.ones(size, length, dtype=torch.bool),
            sequences_BT=None,
        )
