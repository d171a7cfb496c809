"""Loading a trained model, and evaluating on held-out text, with equal results for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from electra_ds.config.recipe import Recipe
from electra_ds.core.errors import DataError
from electra_ds.core.keyed_random import hash64
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import Split, TokenStore
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer
from electra_ds.pretraining.batches import BatchBuilder, objective_of
from electra_ds.pretraining.objectives.base import Objective, PretrainingBatch
from electra_ds.training.checkpoint import Checkpoint
from electra_ds.training.checkpoints import newest_checkpoint, recorded_recipe
from electra_ds.training.step import AutocastModel


class TrainedModel(NamedTuple):
    """A model loaded from a checkpoint."""

    model: AutocastModel
    """fp32, in evaluation mode."""
    objective: Objective[Any]
    tokenizer: Tokenizer
    recipe: Recipe


def load_trained(run_or_checkpoint: Path) -> TrainedModel:
    """Return the model of a run's newest checkpoint, or of a given checkpoint.

    It needs only the folder itself. Raises CheckpointError if there is no complete checkpoint.
    """
    return load_model(newest_checkpoint(run_or_checkpoint))


def load_model(checkpoint: Checkpoint) -> TrainedModel:
    """Return the model of a checkpoint. Raises CheckpointError if its weights do not fit its recipe."""
    recipe = recorded_recipe(checkpoint)
    tokenizer = load_tokenizer(checkpoint.path / "tokenizer.json")
    objective = objective_of(recipe, tokenizer)
    model = objective.build_model()
    checkpoint.check({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.tensors[f"master/{name}"])
    return TrainedModel(model.eval(), objective, tokenizer, recipe)


SAMPLE_WINDOWS = 64
"""The number of held-out windows among which a report's sample sentences are chosen."""
_EVALUATION = 0xE7
_UNIGRAM_TOKENS = 100_000_000  # counting more does not change any printed digit


def held_out_batch(store: TokenStore, split: Split, recipe: Recipe, num_windows: int) -> PretrainingBatch:
    """Return the same held-out windows, masks and noise at every call."""
    return held_out_builder(store, split, recipe).build(0, num_windows)


def held_out_builder(store: TokenStore, split: Split, recipe: Recipe) -> BatchBuilder:
    """Return the builder whose step 0 is the held-out batch."""
    seed = int(hash64(recipe.seed, _EVALUATION) >> np.uint64(1))
    return BatchBuilder(store, split.holdout, recipe, seed)


class Evaluator:
    """Evaluates on the same windows, masks and noise each time, divided among the ranks.

    Results are combined in the order of the windows, so they are the same for every number of ranks.
    """

    def __init__(self, store: TokenStore, split: Split, recipe: Recipe, num_windows: int, ranks: Ranks) -> None:
        self.batch = held_out_batch(store, split, recipe, num_windows)
        self.objective = objective_of(recipe, store.tokenizer)
        self.ranks = ranks
        self._unigram_nats = unigram_nats(store, split)

    @torch.no_grad()
    def __call__(self, model: Callable[[Any], Any], device: torch.device, micro_batch_size: int) -> dict[str, float]:
        """Return the metrics, the same on all ranks, which must all call it.

        model: runs one micro-batch in evaluation mode.
        """
        world_size = self.ranks.world_size
        starts = range(0, self.batch.num_sequences, micro_batch_size)
        own = []
        for turn in range(-(-len(starts) // world_size)):
            index = turn * world_size + self.ranks.rank
            # At stage 3 all ranks run the model together, so a rank without any share left repeats the last one.
            first = starts[min(index, len(starts) - 1)]
            micro_batch = self.batch.micro_batch(first, micro_batch_size).to(device)
            output = model(micro_batch)
            if index < len(starts):
                own.append(self.objective.measure(micro_batch, output))
        shares = self.ranks.gather(own)
        measured = [shares[index % world_size][index // world_size] for index in range(len(starts))]
        return self.objective.metrics(self.batch, measured, self._unigram_nats)


def unigram_nats(store: TokenStore, split: Split) -> np.ndarray:
    """Return float64 [vocab], -log of each token's share of the training text, with 1 added to every count."""
    size = store.tokenizer.vocab_size
    stop = min(len(store.tokens), _UNIGRAM_TOKENS)
    counts = np.ones(size)
    for first in range(0, stop, 1 << 20):  # bincount converts its input to eight bytes per token
        tokens = store.tokens[first : min(first + (1 << 20), stop)]
        if int(tokens.max()) >= size:
            raise DataError(f"The token store {store.path} contains id {tokens.max()} of {size}: build it again.")
        counts += np.bincount(tokens, minlength=size)
    for first, last in zip(split.holdout.starts, split.holdout.stops, strict=True):
        if last <= stop:
            counts -= np.bincount(store.tokens[first:last], minlength=size)
    return -np.log(counts / counts.sum())
