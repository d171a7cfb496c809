"""Train ELECTRA by transformers' modules and a plain PyTorch loop, to see whether a recipe learns as it should.

    python -m benchmarks.reference_loop STORE --recipe tiny --seed 0 --steps 6000

It has the recipe's settings and reads the same training and held-out text. Windows, masks, samples, initial weights,
optimizer, schedule and metrics come from transformers, PyTorch and scikit-learn, or stand below, so a fault of
electra_ds in any of them would show as a difference between curves. A line of JSON per evaluation goes to `--out`.
Only for recipes of ELECTRA with shared embeddings, one segment and a linear schedule.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from electra_ds.config.recipe import ElectraRecipe, load_recipe
from electra_ds.data.sampling import Windows
from electra_ds.data.token_store import Ranges, TokenStore, split_holdout

_EVALUATED_WINDOWS = 512


class Rows(NamedTuple):
    """Rows of text with masks. Shapes [B, T]."""

    ids: torch.Tensor
    masked: torch.Tensor
    """The ids with most selected tokens replaced by [MASK]."""
    is_token: torch.Tensor
    is_selected: torch.Tensor
    is_counted: torch.Tensor


class Text:
    """Windows at random places, of documents that are drawn by their length or in turns, as the program chooses."""

    def __init__(self, store: TokenStore, ranges: Ranges, recipe: ElectraRecipe, seed: int) -> None:
        self._store, self._ranges, self._recipe = store, ranges, recipe
        self._draws = np.random.default_rng(seed)
        self._queue: list[int] = []
        width = recipe.data.sequence_length - 2
        self._by_length = Windows(ranges, width, recipe.data.document_sampling).sampling == "length"
        self._shares = ranges.lengths / ranges.num_tokens

    def windows(self, count: int) -> Rows:
        tokenizer, width = self._store.tokenizer, self._recipe.data.sequence_length
        ids = np.full((count, width), tokenizer.pad_id, dtype=np.int64)
        for tokens in ids:
            if not self._queue and self._by_length:
                self._queue = self._draws.choice(len(self._shares), 1000, p=self._shares).tolist()
            elif not self._queue:
                self._queue = self._draws.permutation(len(self._shares)).tolist()
            document = self._queue.pop()
            start, stop = int(self._ranges.starts[document]), int(self._ranges.stops[document])
            size = min(stop - start, width - 2)
            first = start + int(self._draws.integers(stop - start - size + 1))
            tokens[: size + 2] = [tokenizer.cls_id, *self._store.tokens[first : first + size], tokenizer.sep_id]
        is_token = ids != tokenizer.pad_id
        may_be_masked = is_token & (ids != tokenizer.cls_id) & (ids != tokenizer.sep_id)
        is_selected = np.zeros_like(is_token)
        masking = self._recipe.masking
        for row, candidates in enumerate(may_be_masked):
            places = np.flatnonzero(candidates)
            selected = places[self._draws.random(len(places)) < masking.mlm_probability]
            is_selected[row, selected if len(selected) else self._draws.choice(places, 1)] = True
        is_mask = is_selected & (self._draws.random(ids.shape) < masking.mask_token_share)
        masked = np.where(is_mask, tokenizer.mask_id, ids)
        counted = is_token if self._recipe.discriminator.loss_on_special else may_be_masked
        return Rows(*map(torch.from_numpy, (ids, masked, is_token, is_selected, counted)))


class Networks(torch.nn.Module):
    """A generator and a discriminator with one set of embeddings."""

    def __init__(self, recipe: ElectraRecipe, vocab_size: int) -> None:
        super().__init__()
        model, generator = recipe.model, recipe.generator
        sizes: dict[str, Any] = {
            "vocab_size": vocab_size, "embedding_size": model.embedding_size, "hidden_size": model.hidden_size,
            "num_hidden_layers": model.num_hidden_layers, "num_attention_heads": model.num_attention_heads,
            "intermediate_size": model.intermediate_size, "max_position_embeddings": model.max_position_embeddings,
            "hidden_dropout_prob": model.hidden_dropout_prob, "initializer_range": model.initializer_range,
            "attention_probs_dropout_prob": model.attention_probs_dropout_prob,
        }  # fmt: skip
        width = generator.width_multiplier
        own = {name: int(sizes[name] * width) for name in ("hidden_size", "num_attention_heads", "intermediate_size")}
        self.discriminator = ElectraForPreTraining(ElectraConfig(**sizes))
        self.generator = ElectraForMaskedLM(ElectraConfig(**(sizes | own)))
        self.generator.electra.embeddings = self.discriminator.electra.embeddings
        self.generator.tie_weights()

    def forward(self, batch: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the generator's logits [M, V] at selected tokens, the discriminator's and what was replaced [B, T]."""
        logits = self.generator(batch.masked, batch.is_token.long()).logits[batch.is_selected]
        samples = torch.distributions.Categorical(logits=logits.detach()).sample()
        corrupted = batch.ids.clone()
        corrupted[batch.is_selected] = samples
        return logits, self.discriminator(corrupted, batch.is_token.long()).logits, corrupted != batch.ids


def losses(networks: Networks, batch: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    logits, judged, is_replaced = networks(batch)
    return functional.cross_entropy(logits, batch.ids[batch.is_selected]), functional.binary_cross_entropy_with_logits(
        judged[batch.is_counted], is_replaced[batch.is_counted].float()
    )


@torch.no_grad()
def evaluate(networks: Networks, batch: Rows, mask_token: int, counts: np.ndarray) -> dict[str, float]:
    """Return the generator's gain over the unigram at [MASK], in nats, and the discriminator's AUC."""
    networks.eval()
    logits, judged, is_replaced = networks(batch)
    networks.train()
    is_mask = batch.masked[batch.is_selected] == mask_token
    targets = batch.ids[batch.is_selected][is_mask]
    unigram = -np.log((counts + 1) / (counts.sum() + len(counts)))
    loss = functional.cross_entropy(logits[is_mask], targets).item()
    labels, scores = is_replaced[batch.is_counted], judged[batch.is_counted]
    return {
        "generator_gain": float(unigram[targets].mean()) - loss,
        "discriminator_auc": float(roc_auc_score(labels.numpy(), scores.numpy())),
        "discriminator_loss": functional.binary_cross_entropy_with_logits(scores, labels.float()).item(),
        "discriminator_logit_std": scores.std().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="stop earlier; the schedule stays the recipe's")
    parser.add_argument("--eval-every", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, {"seed": arguments.seed})
    assert isinstance(recipe, ElectraRecipe)
    store = TokenStore(arguments.store)
    split = split_holdout(store.documents, recipe.data, recipe.seed)
    text = Text(store, split.train, recipe, 1000 + arguments.seed)
    held_out = Text(store, split.holdout, recipe, 2000).windows(_EVALUATED_WINDOWS)
    is_training = np.zeros(len(store.tokens), dtype=bool)
    for start, stop in zip(split.train.starts, split.train.stops, strict=True):
        is_training[start:stop] = True
    counts = np.bincount(np.asarray(store.tokens)[is_training], minlength=store.info.vocab_size)

    torch.manual_seed(1000 + arguments.seed)
    networks, schedule, settings = Networks(recipe, store.info.vocab_size), recipe.schedule, recipe.optimizer
    weights = list(networks.parameters())
    decayed = [weight for weight in weights if weight.ndim > 1]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, settings.learning_rate, (settings.beta1, settings.beta2), settings.epsilon, foreach=False
    )
    warm, total = schedule.warmup_steps, schedule.total_steps
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / warm if step < warm else (total - step) / (total - warm)
    )
    began = time.monotonic()
    with arguments.out.open("w") as out:
        for step in range(1, (arguments.steps or total) + 1):
            of_generator, of_discriminator = losses(networks, text.windows(recipe.global_batch_size))
            optimizer.zero_grad()
            (of_generator + recipe.discriminator.loss_weight * of_discriminator).backward()
            torch.nn.utils.clip_grad_norm_(weights, settings.max_grad_norm)
            optimizer.step()
            scheduler.step()
            if step % arguments.eval_every == 0:
                found = evaluate(networks, held_out, store.tokenizer.mask_id, counts)
                line = json.dumps({"step": step, **found, "seconds": round(time.monotonic() - began)})
                print(line, flush=True)
                out.write(line + "\n")


if __name__ == "__main__":
    main()
