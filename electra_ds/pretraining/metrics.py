"""What a model is worth on held-out text.

Shape suffixes: M masked positions, V vocabulary, B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from electra_ds.config.recipe import Recipe
from electra_ds.core.errors import DataError
from electra_ds.core.keyed_random import hash64
from electra_ds.core.ranks import Ranks
from electra_ds.data.segments import Split
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.batches import BatchBuilder, GlobalBatch
from electra_ds.pretraining.electra import ElectraOutput
from electra_ds.pretraining.microbatch import MicroBatch

ALWAYS_ORIGINAL = "always_original_accuracy"
_EVALUATION = 0xE7
_UNIGRAM_TOKENS = 100_000_000  # counting more changes nothing that is printed


class Evaluation(NamedTuple):
    """Metrics of one evaluation; shares and rates in [0, 1], losses in nats."""

    generator_loss: float
    """Mean over the selected positions, [MASK] or not, as in training."""
    discriminator_loss: float
    """Mean over the counted positions, as in training."""
    generator_masked_loss: float
    """Mean over the positions that the generator saw as [MASK]."""
    unigram_loss: float
    """Cross-entropy of the tokens at those positions under the training text's unigram distribution."""
    generator_gain: float
    """unigram_loss - generator_masked_loss: nats that the generator gets from context."""
    generator_accuracy: float
    """Share of [MASK]ed positions where the most probable token is the original."""
    generator_sampled_accuracy: float
    """Share of [MASK]ed positions where the sampled token is the original."""
    replaced_share: float
    """Share of the counted tokens that were replaced."""
    discriminator_accuracy: float
    discriminator_precision: float
    discriminator_recall: float
    discriminator_f1: float
    """These three with "replaced" as the positive class and a threshold of 0.5."""
    discriminator_auc: float
    """Area under the ROC curve; nan where only one class occurred."""


def always_original_accuracy(replaced_share: float) -> float:
    """Return the accuracy of always answering "original", the baseline of `discriminator_accuracy`."""
    return 1 - replaced_share


def with_baseline(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation as in metrics.jsonl, with the accuracy of always answering "original"."""
    share = evaluation.get("replaced_share")
    return dict(evaluation) | {ALWAYS_ORIGINAL: None if share is None else always_original_accuracy(share)}


def held_out_batch(store: TokenStore, split: Split, recipe: Recipe, num_windows: int) -> GlobalBatch:
    """The same held-out windows, masks and noise at every call."""
    seed = int(hash64(recipe.seed, _EVALUATION) >> np.uint64(1))
    return BatchBuilder(store, split.holdout, recipe, seed).build(0, num_windows)


class _Chunk(NamedTuple):
    """What one micro-batch says; the arrays are over its [MASK]ed and its counted positions."""

    generator_sum: float
    discriminator_sum: float
    masked_nats: np.ndarray
    masked_targets: np.ndarray
    argmax_hits: np.ndarray
    sampled_hits: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


class Evaluator:
    """Evaluates on the same windows, masks and noise each time, shared out over the ranks.

    The numbers are put together in the order of the windows, so they are the same for every number of ranks.
    """

    def __init__(self, store: TokenStore, split: Split, recipe: Recipe, num_windows: int, ranks: Ranks) -> None:
        self.batch = held_out_batch(store, split, recipe, num_windows)
        self.ranks = ranks
        self._unigram_nats = unigram_nats(store, split)

    @torch.no_grad()
    def __call__(
        self, model: Callable[[MicroBatch], ElectraOutput], device: torch.device, micro_batch_size: int
    ) -> Evaluation:
        """model: runs one micro-batch in evaluation mode. To be called by all ranks; all get the metrics."""
        world_size = self.ranks.world_size
        starts = range(0, len(self.batch.ids_BT), micro_batch_size)
        own = []
        for turn in range(-(-len(starts) // world_size)):
            index = turn * world_size + self.ranks.rank
            # At stage 3 all ranks run the model together, so one without a share left runs the last again.
            first = starts[min(index, len(starts) - 1)]
            micro_batch = self.batch.micro_batch(first, micro_batch_size).to(device)
            output = model(micro_batch)
            if index < len(starts):
                own.append(_measured(micro_batch, output))
        shares = self.ranks.gather(own)
        return self._evaluation([shares[index % world_size][index // world_size] for index in range(len(starts))])

    def _evaluation(self, chunks: list[_Chunk]) -> Evaluation:
        # Takes as long to import as torch, and training begins without it.
        from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

        replaced = np.concatenate([chunk.labels for chunk in chunks])
        score = np.concatenate([chunk.scores for chunk in chunks])
        generator_nats = _mean(chunk.masked_nats for chunk in chunks)
        unigram = _mean(self._unigram_nats[chunk.masked_targets] for chunk in chunks)
        precision, recall, f1, _ = precision_recall_fscore_support(
            replaced, score > 0, average="binary", zero_division=0.0
        )
        two_classes = 0 < replaced.sum() < len(replaced) and np.isfinite(score).all()
        return Evaluation(
            generator_loss=sum(chunk.generator_sum for chunk in chunks) / self.batch.num_selected,
            discriminator_loss=sum(chunk.discriminator_sum for chunk in chunks) / self.batch.num_counted,
            generator_masked_loss=generator_nats,
            unigram_loss=unigram,
            generator_gain=unigram - generator_nats,
            generator_accuracy=_mean(chunk.argmax_hits for chunk in chunks),
            generator_sampled_accuracy=_mean(chunk.sampled_hits for chunk in chunks),
            replaced_share=float(replaced.mean()),
            discriminator_accuracy=float((replaced == (score > 0)).mean()),
            discriminator_precision=float(precision),
            discriminator_recall=float(recall),
            discriminator_f1=float(f1),
            discriminator_auc=float(roc_auc_score(replaced, score)) if two_classes else float("nan"),
        )


def _measured(micro_batch: MicroBatch, output: ElectraOutput) -> _Chunk:
    targets = micro_batch.ids_BT.flatten()[micro_batch.selected_M]
    masked = micro_batch.generator_ids_BT.flatten()[micro_batch.selected_M] != targets
    targets = targets[masked]
    return _Chunk(
        generator_sum=output.generator_loss_sum.item(),
        discriminator_sum=output.discriminator_loss_sum.item(),
        masked_nats=output.generator_losses_M[masked].cpu().numpy(),
        masked_targets=targets.cpu().numpy(),
        argmax_hits=(output.best_M[masked] == targets).cpu().numpy(),
        sampled_hits=(output.samples_M[masked] == targets).cpu().numpy(),
        labels=output.is_replaced_BT[micro_batch.counted_BT].cpu().numpy(),
        scores=output.discriminator_logits_BT[micro_batch.counted_BT].float().cpu().numpy(),
    )


def _mean(parts: Iterable[np.ndarray]) -> float:
    return float(np.concatenate(list(parts)).mean(dtype=np.float64))


def unigram_nats(store: TokenStore, split: Split) -> np.ndarray:
    """float64 [vocab]: -log of each token's share of the training text, counts plus one."""
    size = store.tokenizer.vocab_size
    stop = min(len(store.tokens), _UNIGRAM_TOKENS)
    counts = np.ones(size)
    for first in range(0, stop, 1 << 20):  # bincount widens what it is given to eight bytes a token
        tokens = store.tokens[first : min(first + (1 << 20), stop)]
        if int(tokens.max()) >= size:
            raise DataError(f"The token store {store.path} holds id {tokens.max()} of {size}: build it again.")
        counts += np.bincount(tokens, minlength=size)
    for first, last in zip(split.holdout.starts, split.holdout.stops, strict=True):
        if last <= stop:
            counts -= np.bincount(store.tokens[first:last], minlength=size)
    return -np.log(counts / counts.sum())
