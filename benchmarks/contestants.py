"""The steps that are timed against each other: ours, and one as people write it with transformers.

Shape suffixes: B rows, T positions, M selected positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers import ElectraForMaskedLM, ElectraForPreTraining

from electra_ds.config.recipe import Recipe, electra_recipe
from electra_ds.pretraining.convert import transformers_config
from electra_ds.pretraining.electra import discriminator_loss_sum, encoder_configs
from electra_ds.pretraining.engine import PretrainingEngine
from electra_ds.pretraining.masked_batch import MaskedBatch, MicroBatch
from electra_ds.pretraining.plain import PlainEngine
from electra_ds.training.zero import ZeroAdamW

PARTS = ("generator", "head and sampling", "discriminator", "optimizer")


class PaddedBatch(MaskedBatch):
    """The same sequences, each a row of its own."""

    def micro_batch(self, first: int, size: int, *, packed: bool = False) -> MicroBatch:
        return super().micro_batch(first, size, packed=packed)


class Contestant(Protocol):
    """Something that can take an optimiser step on a global batch that is one micro-batch."""

    def step(self, batch: MaskedBatch, number: int) -> None: ...

    def parts(self, batch: MaskedBatch) -> dict[str, Callable[[], None]]:
        """Each part of a step alone, forward and backward, on the same inputs."""
        ...

    def close(self) -> None: ...


class Ours:
    """Our step, through either engine."""

    def __init__(self, engine: PretrainingEngine | PlainEngine) -> None:
        self.engine = engine

    def step(self, batch: MaskedBatch, number: int) -> None:
        self.engine.train_step(batch, number)

    def parts(self, batch: MaskedBatch) -> dict[str, Callable[[], None]]:
        model: Any = self.engine.module.train()
        micro_batch = batch.micro_batch(0, len(batch.ids_BT)).to(self.engine.device)
        attend = micro_batch.attention_mask()
        device_type, autocast = self.engine.device.type, model.autocast_dtype
        with torch.no_grad():
            hidden_BTH = model.generator(micro_batch.masked_ids_BT, attend, micro_batch.segments_BT)
        targets_M = micro_batch.ids_BT.flatten()[micro_batch.selected_M]
        give_gradients = _gradient_giver(list(model.parameters()))

        def run(part: Callable[[], torch.Tensor]) -> None:
            model.zero_grad()
            with torch.autocast(device_type, autocast, enabled=autocast is not None):
                loss = part()
            loss.backward()

        def generator() -> torch.Tensor:
            found_BTH = model.generator(micro_batch.masked_ids_BT, attend, micro_batch.segments_BT)
            return found_BTH.flatten(0, 1).index_select(0, micro_batch.selected_M).sum()

        def head() -> torch.Tensor:
            gathered_MH = hidden_BTH.flatten(0, 1).index_select(0, micro_batch.selected_M).requires_grad_()
            keys = micro_batch.noise_keys_M, model.column_keys_V
            return model.generator_head(gathered_MH, targets_M, *keys, micro_batch.temperature).loss_sum

        def discriminator() -> torch.Tensor:
            found_BTH = model.discriminator(micro_batch.ids_BT, attend, micro_batch.segments_BT)
            is_replaced_BT = torch.zeros_like(micro_batch.counted_BT)
            return discriminator_loss_sum(model.discriminator_head(found_BTH), is_replaced_BT, micro_batch.counted_BT)

        def optimizer() -> None:
            assert not isinstance(self.engine.optimizer, ZeroAdamW)  # stage 0 alone is timed
            give_gradients()
            self.engine.optimizer.step()

        parts = (lambda: run(generator), lambda: run(head), lambda: run(discriminator), optimizer)
        return dict(zip(PARTS, parts, strict=True))

    def close(self) -> None:
        if isinstance(self.engine, PretrainingEngine):
            self.engine.close()


class Transformers:
    """`ElectraForMaskedLM` and `ElectraForPreTraining` with shared embeddings and torch's AdamW, all as they come:
    vocabulary logits at every position, the loss that the model gives for `labels`, Gumbel samples at the selected
    positions, torch.autocast and, for fp16, a GradScaler."""

    def __init__(self, recipe: Recipe, vocab_size: int, pad_id: int, dtype: torch.dtype, device: torch.device) -> None:
        generator_config, discriminator_config = encoder_configs(recipe, vocab_size, pad_id)
        self.recipe, self.dtype, self.device = electra_recipe(recipe), dtype, device
        self.generator = ElectraForMaskedLM(transformers_config(generator_config)).train()
        self.discriminator = ElectraForPreTraining(transformers_config(discriminator_config)).train()
        self.generator.electra.embeddings = self.discriminator.electra.embeddings
        self.generator.generator_lm_head.weight = self.discriminator.electra.embeddings.word_embeddings.weight
        modules = torch.nn.ModuleList((self.generator, self.discriminator)).to(device)
        self.parameters = list(modules.parameters())
        section = recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=section.learning_rate, betas=(section.beta1, section.beta2), eps=section.epsilon,
            weight_decay=section.weight_decay,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step(self, batch: MaskedBatch, number: int) -> None:
        micro_batch = batch.micro_batch(0, len(batch.ids_BT), packed=False).to(self.device)
        mask_BT, segments_BT = _mask(micro_batch), _segments(micro_batch)
        with self._autocast():
            predicted = self.generator(micro_batch.masked_ids_BT, mask_BT, segments_BT, labels=_labels(micro_batch))
            corrupted_BT = _corrupted(predicted.logits, micro_batch)
            judged = self.discriminator(corrupted_BT, mask_BT, segments_BT).logits
            loss = predicted.loss + self.recipe.discriminator.loss_weight * _judged_loss(
                judged, corrupted_BT, micro_batch
            )
        self.scaler.scale(loss).backward()
        self._update()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.optimizer.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def parts(self, batch: MaskedBatch) -> dict[str, Callable[[], None]]:
        micro_batch = batch.micro_batch(0, len(batch.ids_BT), packed=False).to(self.device)
        mask_BT, segments_BT, labels_BT = _mask(micro_batch), _segments(micro_batch), _labels(micro_batch)
        with torch.no_grad(), self._autocast():
            hidden_BTH = self.generator.electra(micro_batch.masked_ids_BT, mask_BT, segments_BT).last_hidden_state
        give_gradients = _gradient_giver(self.parameters)

        def run(part: Callable[[], torch.Tensor]) -> None:
            self.optimizer.zero_grad()
            with self._autocast():
                loss = part()
            loss.backward()

        def generator() -> torch.Tensor:
            found = self.generator.electra(micro_batch.masked_ids_BT, mask_BT, segments_BT)
            return found.last_hidden_state.sum()

        def head() -> torch.Tensor:
            predictions = self.generator.generator_predictions(hidden_BTH.detach().requires_grad_())
            logits_BTV = self.generator.generator_lm_head(predictions)
            _corrupted(logits_BTV, micro_batch)
            return functional.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten())

        def discriminator() -> torch.Tensor:
            judged = self.discriminator(micro_batch.ids_BT, mask_BT, segments_BT).logits
            return _judged_loss(judged, micro_batch.ids_BT, micro_batch)

        def optimizer() -> None:
            give_gradients()
            torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.optimizer.max_grad_norm)
            self.optimizer.step()

        parts = (lambda: run(generator), lambda: run(head), lambda: run(discriminator), optimizer)
        return dict(zip(PARTS, parts, strict=True))

    def close(self) -> None: ...


def _gradient_giver(parameters: list[torch.nn.Parameter]) -> Callable[[], None]:
    """Gives each parameter the same gradient again, for an optimizer that is timed alone."""
    gradients = [torch.full_like(parameter, 1e-3) for parameter in parameters]

    def give() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    return give


def _mask(micro_batch: MicroBatch) -> torch.Tensor | None:
    """int64 [B, T], or None where nothing is padded."""
    return None if micro_batch.sequences_BT is None else (micro_batch.sequences_BT > 0).long()


def _segments(micro_batch: MicroBatch) -> torch.Tensor | None:
    """int64 [B, T], or None where there is one segment."""
    return None if micro_batch.segments_BT is None else micro_batch.segments_BT.long()


def _labels(micro_batch: MicroBatch) -> torch.Tensor:
    """int64 [B, T], -100 where nothing is to be predicted."""
    labels = torch.full_like(micro_batch.ids_BT, -100).flatten()
    selected = micro_batch.ids_BT.flatten().index_select(0, micro_batch.selected_M)
    return labels.index_copy(0, micro_batch.selected_M, selected).view_as(micro_batch.ids_BT)


@torch.no_grad()
def _corrupted(logits_BTV: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
    """int64 [B, T], with Gumbel samples at the places that are to be replaced."""
    logits_MV = logits_BTV.flatten(0, 1).index_select(0, micro_batch.selected_M).float()
    noise_MV = -torch.log(-torch.log(torch.rand_like(logits_MV).clamp_(1e-20, 1 - 1e-7)))
    ids = micro_batch.ids_BT.flatten()
    kept_M = ids.index_select(0, micro_batch.selected_M)
    samples_M = torch.where(micro_batch.replaced_M, (logits_MV + noise_MV).argmax(-1), kept_M)
    return ids.index_copy(0, micro_batch.selected_M, samples_M).view_as(micro_batch.ids_BT)


def _judged_loss(logits_BT: torch.Tensor, corrupted_BT: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
    is_replaced_BT = (corrupted_BT != micro_batch.ids_BT).float()
    losses_BT = functional.binary_cross_entropy_with_logits(logits_BT.float(), is_replaced_BT, reduction="none")
    return (losses_BT * micro_batch.counted_BT).sum() / micro_batch.counted_BT.sum()
