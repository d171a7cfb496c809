"""How long a step takes on a card that is not here: a roofline, and the range that is printed.

A step's matrix products run at a share of the card's peak, everything else at a share of its memory's bandwidth, and no
step is faster than the host starts operations. Published runs took longer than the roofline of our step, each by
another factor, so the prediction is the range that contains all of them.
"""

from __future__ import annotations

from typing import NamedTuple

from electra_ds.config.cards import Card, peak_flops
from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.recipe import Recipe, electra_recipe
from electra_ds.pretraining.electra import encoder_configs
from electra_ds.pretraining.flops import step_flops
from electra_ds.pretraining.masking import usual_most_selected
from electra_ds.pretraining.memory import count_parameters, head_pieces, saved_bytes

PRODUCT_EFFICIENCY, BANDWIDTH_EFFICIENCY = 0.7, 0.75
"""Assumed shares of what makers print."""
LAUNCH_S = 5e-6
"""Assumed: the host's time for one operation."""
SLOWER = (0.9, 7.0)
"""The fastest and the slowest published run over the roofline of our step. A test compares both with all runs in
tests/report/published/, and docs/performance.md lists them."""
# Counted over an eager step, inputs and outputs of every operation that is not a matrix product or attention, as
# multiples of what is saved for the backward pass, and of the logits in fp32 for the head and its noise.
TRAFFIC_OF_SAVED, TRAFFIC_OF_LOGITS = 7, 41
_TRAFFIC_OF_PARAMETER = 36  # bytes: weights and gradients read and written, masters and moments too
# Operations of a micro-batch, counted the same way: of a layer, of a piece of the head, and of the rest.
OPERATIONS = (36, 22, 130)
_COMPUTED_AGAIN = 0.37  # of a step's time, for all layers; measured on a CPU, docs/launching.md


class StepTime(NamedTuple):
    """Seconds of one optimiser step by roofline."""

    products_s: float
    traffic_s: float
    host_s: float

    @property
    def roofline_s(self) -> float:
        return max(self.products_s + self.traffic_s, self.host_s)

    def days(self, steps: int) -> tuple[float, float]:
        """From the fastest to the slowest that is likely."""
        low, high = (self.roofline_s * steps * factor / 86_400 for factor in SLOWER)
        return low, high


def step_time(recipe: Recipe, vocab_size: int, plan: DeepSpeedPlan, card: Card) -> StepTime | None:
    """A step of full rows on cards like this one; None where the card lacks the precision.

    It does not include torch.compile, which fuses operations, offloading, and communication between ranks.
    """
    peak = peak_flops(card, plan.precision.name)
    if peak is None:
        return None
    batch, recipe = plan.batch, electra_recipe(recipe)
    generator, discriminator = encoder_configs(recipe, vocab_size, 0)
    of_rank = recipe.global_batch_size // batch.world_size
    length, masking = recipe.data.sequence_length, recipe.masking
    selected = usual_most_selected(of_rank, length, mlm_probability=masking.mlm_probability, count=masking.count)
    flops = step_flops(generator, discriminator, [length] * of_rank, selected).forward_and_backward
    saved = saved_bytes(recipe, vocab_size, of_rank, plan.precision.name, "cuda")
    traffic = TRAFFIC_OF_SAVED * (saved.generator + saved.discriminator)
    traffic += TRAFFIC_OF_LOGITS * 4 * selected * vocab_size
    traffic += _TRAFFIC_OF_PARAMETER * count_parameters(recipe, vocab_size).all
    of_layer, of_piece, of_rest = OPERATIONS
    operations = of_layer * (generator.num_hidden_layers + discriminator.num_hidden_layers)
    operations += of_piece * head_pieces(vocab_size, selected // batch.gradient_accumulation_steps) + of_rest
    again = 1 + _COMPUTED_AGAIN * plan.checkpointed_layers / discriminator.num_hidden_layers
    return StepTime(
        products_s=again * flops / (peak * PRODUCT_EFFICIENCY),
        traffic_s=again * traffic / (card.bandwidth_gb_s * 1e9 * BANDWIDTH_EFFICIENCY),
        host_s=again * operations * batch.gradient_accumulation_steps * LAUNCH_S,
    )
