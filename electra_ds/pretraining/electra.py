"""Generator and discriminator in one module, so that one engine trains both, and its micro-batch.

A row of a micro-batch is one sequence with its padding, or several sequences that cannot attend to each other. Shape
suffixes: B rows of the micro-batch, T positions, M selected positions, Q queries (T, or 1 if all of a row's queries
attend to the same positions), V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from electra_ds.config.recipe import ElectraRecipe, Recipe, electra_recipe
from electra_ds.model.encoder import Encoder, EncoderConfig
from electra_ds.model.heads import DiscriminatorHead, GeneratorHead, column_keys
from electra_ds.model.kernels import shared_mask
from electra_ds.training.step import AutocastModel


class MicroBatch(NamedTuple):
    """Tensors of one micro-batch, all on one device."""

    ids_BT: torch.Tensor
    """int64, the original tokens with [CLS], [SEP] and padding."""
    generator_ids_BT: torch.Tensor
    """int64, the generator's input: the same tokens, some of them replaced by [MASK]."""
    selected_M: torch.Tensor
    """int64 indices into the flattened [B * T] of the positions that the generator predicts, in the order of the
    sequences, so that samples drawn with one layout of the rows can be replayed with another."""
    replaced_M: torch.Tensor
    """bool, True if the discriminator's input has the generator's sample at that position."""
    noise_keys_M: torch.Tensor
    """int32 keys of the sampling noise."""
    counted_BT: torch.Tensor
    """bool, positions that count in the discriminator's loss."""
    sequences_BT: torch.Tensor | None
    """int32, the number of the sequence in the micro-batch, counted from 1, and 0 at padding; None if every row is one
    sequence without padding."""
    segments_BT: torch.Tensor | None = None
    """bool, True in the second segment; None if there is only one."""
    positions_BT: torch.Tensor | None = None
    """int64, each token's position in its own sequence; None if every row is one sequence."""
    counts_M: torch.Tensor | None = None
    """bool, False for selected positions that `filled` added; None if there are none."""
    temperature: torch.Tensor | None = None
    """fp32 scalar, the temperature of the softmax from which replacements are drawn; None for 1."""

    @property
    def device(self) -> torch.device:
        return self.ids_BT.device

    @property
    def is_static(self) -> bool:
        """True if it has the shape that a compiled forward pass accepts."""
        return self.counts_M is not None

    def filled(self, size: int) -> MicroBatch:
        """Return the micro-batch padded to `size` selected positions, so that all micro-batches have one shape.

        The added positions point at the first token, a [CLS], which is neither replaced nor predicted.
        """
        added = size - len(self.selected_M)

        def longer(tensor_M: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor_M, tensor_M.new_zeros(added)])

        return self._replace(
            selected_M=longer(self.selected_M),
            replaced_M=longer(self.replaced_M),
            noise_keys_M=longer(self.noise_keys_M),
            counts_M=longer(torch.ones_like(self.replaced_M)),
        )

    def attention_mask(self) -> torch.Tensor | None:
        """Return bool [B, 1, Q, T], True where a query attends, which is in its own sequence; None to mask nothing.

        The mask is created on the device, since with several sequences in a row it is T times as large as the tensors.
        Padding then attends to padding, so that no query attends to nothing.
        """
        if self.sequences_BT is None:
            return None
        if self.positions_BT is None:
            return (self.sequences_BT > 0)[:, None, None, :]
        return self.sequences_BT[:, None, :, None] == self.sequences_BT[:, None, None, :]

    def to(self, device: torch.device) -> MicroBatch:
        """Return the micro-batch on another device."""
        return self._replace(**moved(self._asdict(), device))


def moved(tensors: Mapping[str, torch.Tensor | None], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the tensors that are not None on another device. Copies to a GPU use pinned memory, so that the host does
    not wait."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    return {name: move(tensor) for name, tensor in tensors.items() if tensor is not None}


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


def encoder_configs(recipe: Recipe, vocab_size: int, pad_token_id: int) -> tuple[EncoderConfig, EncoderConfig]:
    """Return the sizes of generator and discriminator.

    The generator follows google-research/electra `get_generator_config`: hidden = round(multiplier * hidden),
    feed-forward 4 * hidden, heads = max(1, hidden // 64) unless the recipe sets their number. If the discriminator's
    heads are narrower than 64, their size replaces 64. Raises ConfigError for another objective's recipe.
    """
    recipe = electra_recipe(recipe)
    model = recipe.model
    sizes = model.model_dump(exclude={"initializer"})
    discriminator = EncoderConfig(vocab_size=vocab_size, pad_token_id=pad_token_id, **sizes)
    if recipe.generator.sharing == "all":
        return discriminator, discriminator
    head_size = min(64, model.hidden_size // model.num_attention_heads)
    wanted = round(model.hidden_size * recipe.generator.width_multiplier)
    heads = recipe.generator.num_attention_heads or max(1, wanted // head_size)
    hidden = -(-wanted // heads) * heads  # rounded up to a multiple of the heads
    generator = replace(
        discriminator,
        hidden_size=hidden,
        num_hidden_layers=max(1, round(model.num_hidden_layers * recipe.generator.depth_multiplier)),
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
    )
    return generator, discriminator


class Electra(AutocastModel):
    """The joint model of Clark et al. 2020, figure 2."""

    def __init__(self, recipe: Recipe, vocab_size: int, pad_token_id: int) -> None:
        super().__init__()
        recipe = electra_recipe(recipe)
        generator_config, discriminator_config = encoder_configs(recipe, vocab_size, pad_token_id)
        self.discriminator = Encoder(discriminator_config)
        sharing = recipe.generator.sharing
        self.generator = self.discriminator if sharing == "all" else Encoder(generator_config)
        if sharing == "embeddings":
            self.generator.embeddings = self.discriminator.embeddings
        elif sharing == "tokens":
            shared_table = self.discriminator.embeddings.word_embeddings.weight
            self.generator.embeddings.word_embeddings.weight = shared_table
        self.generator_head = GeneratorHead(generator_config, self.generator.embeddings.word_embeddings)
        self.discriminator_head = DiscriminatorHead(discriminator_config)
        self.register_buffer("column_keys_V", column_keys(vocab_size), persistent=False)
        self.column_keys_V: torch.Tensor
        self._initialise(recipe)

    def _initialise(self, recipe: ElectraRecipe) -> None:
        """Initialise matrices and tables with Normal(0, initializer_range) from the recipe's seed, norms with 1, biases
        with 0."""
        rng = torch.Generator().manual_seed(recipe.seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() == 2 and recipe.model.initializer == "truncated-normal":
                    spread = recipe.model.initializer_range
                    nn.init.trunc_normal_(parameter, 0.0, spread, -2 * spread, 2 * spread, generator=rng)
                elif parameter.dim() == 2:
                    parameter.normal_(0.0, recipe.model.initializer_range, generator=rng)
                else:
                    parameter.fill_(1.0 if name.endswith("LayerNorm.weight") or "norm.weight" in name else 0.0)
            for encoder in (self.discriminator, self.generator):
                table = encoder.embeddings.word_embeddings
                table.weight[table.padding_idx].zero_()

    def set_up(self, autocast_dtype: torch.dtype | None, checkpointed_layers: int) -> None:
        """Set what an engine's plan decides about the model itself."""
        super().set_up(autocast_dtype, checkpointed_layers)
        for encoder in (self.generator, self.discriminator):
            encoder.checkpointed_layers = checkpointed_layers

    def run(self, batch: MicroBatch, samples_M: torch.Tensor | None) -> ElectraOutput:
        """Return both losses of one micro-batch.

        samples_M: int64 tokens to use at the selected positions instead of drawing them, to replay another run.
        """
        dtype = self.autocast_dtype or self.discriminator_head.dense.weight.dtype
        attend_B1QT = shared_mask(batch.attention_mask(), dtype)
        generator_BTH = self.generator(batch.generator_ids_BT, attend_B1QT, batch.segments_BT, batch.positions_BT)
        gathered_MH = generator_BTH.flatten(0, 1).index_select(0, batch.selected_M)
        targets_M = batch.ids_BT.flatten().index_select(0, batch.selected_M)
        prediction = self.generator_head(
            gathered_MH, targets_M, batch.noise_keys_M, self.column_keys_V, batch.temperature, batch.counts_M
        )
        with torch.no_grad():
            if samples_M is None:
                samples_M = prediction.samples_M
            corrupted_M = torch.where(batch.replaced_M, samples_M, targets_M)
            corrupted_BT = batch.ids_BT.flatten().index_copy(0, batch.selected_M, corrupted_M).view_as(batch.ids_BT)
            is_replaced_BT = corrupted_BT != batch.ids_BT
        discriminator_BTH = self.discriminator(corrupted_BT, attend_B1QT, batch.segments_BT, batch.positions_BT)
        discriminator_logits_BT = self.discriminator_head(discriminator_BTH)
        return ElectraOutput(
            prediction.loss_sum,
            discriminator_loss_sum(discriminator_logits_BT, is_replaced_BT, batch.counted_BT),
            prediction.losses_M,
            prediction.best_M,
            samples_M,
            discriminator_logits_BT.detach(),
            is_replaced_BT,
        )


def discriminator_loss_sum(
    logits_BT: torch.Tensor, is_replaced_BT: torch.Tensor, counted_BT: torch.Tensor
) -> torch.Tensor:
    """Return the sum of binary cross-entropies over the counted positions, in nats and fp32. ELECTRA paper, eq. 3."""
    losses = functional.binary_cross_entropy_with_logits(logits_BT.float(), is_replaced_BT.float(), reduction="none")
    return torch.where(counted_BT, losses, 0.0).sum()
