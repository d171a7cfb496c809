"""What fits is found by trying: the largest micro-batch whose forward and backward pass a device has memory for."""

from __future__ import annotations

import torch

from electra_ds.config.recipe import Recipe
from electra_ds.objective.masking import usual_most_selected
from electra_ds.objective.microbatch import MicroBatch


def longest_micro_batch(recipe: Recipe, vocab_size: int, size: int) -> MicroBatch:
    """The micro-batch that takes the most memory: full rows, with as many selected positions as are usual at most.

    Its tokens mean nothing.
    """
    length = recipe.data.sequence_length
    selected = usual_most_selected(
        size, length, mlm_probability=recipe.masking.mlm_probability, count=recipe.masking.count
    )
    places = torch.arange(size * length)
    ids_BT = (places % vocab_size).view(size, length)
    return MicroBatch(
        ids_BT=ids_BT,
        generator_ids_BT=ids_BT.clone(),
        selected_M=places[:selected].clone(),
        replaced_M=torch.ones(selected, dtype=torch.bool),
        noise_keys_M=torch.arange(selected, dtype=torch.int32),
        counted_BT=torch.ones(size, length, dtype=torch.bool),
        sequences_BT=None,
    )
