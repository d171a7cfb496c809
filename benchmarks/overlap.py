"""Held-out metrics of a run, on all held-out text and on the part of it that does not occur in the training text.

    python -m benchmarks.overlap RUN [--windows 4096] [--tokens 16]

Text repeats itself, documentation most of all, and metrics on text that a model has been trained on are too good. The
second figures leave out held-out tokens in any stretch of `--tokens` tokens that also occurs in the training text, and
what remains in pieces shorter than a row.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from electra_ds.config.run_directory import RunDirectory
from electra_ds.core.ranks import join_ranks
from electra_ds.data.token_store import Ranges, Split, TokenStore, recorded_store, split_holdout
from electra_ds.pretraining.evaluation import Evaluator, load_trained

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def hashes(tokens: np.ndarray, length: int) -> np.ndarray:
    """Return uint64 [N - length + 1], a hash of the stretch of this length that begins at each token."""
    count = len(tokens) - length + 1
    found = np.zeros(count, dtype=np.uint64)
    for offset in range(length):
        found *= _MULTIPLIER
        found += tokens[offset : offset + count].astype(np.uint64) + np.uint64(1)
    return found


def covered(starts: np.ndarray, stops: np.ndarray, size: int) -> np.ndarray:
    """Return boolean [size], True at the positions that at least one of the ranges covers."""
    changes = np.zeros(size + 1, dtype=np.int64)
    np.add.at(changes, starts, 1)
    np.add.at(changes, stops, -1)
    return np.asarray(np.cumsum(changes)[:-1] > 0)


def without_repeated(store: TokenStore, split: Split, length: int, shortest: int) -> tuple[Ranges, float]:
    """Return the held-out ranges outside stretches of the training text, and the share of held-out tokens there.

    length: of a stretch, in tokens. shortest: the length of the shortest range to return; the share counts all.
    """
    tokens = np.asarray(store.tokens)
    is_held = covered(split.holdout.starts, split.holdout.stops, len(tokens))
    held_before = np.concatenate([[0], np.cumsum(is_held)])
    held_inside = held_before[length:] - held_before[:-length]  # of each stretch
    found = hashes(tokens, length)
    repeated = np.isin(found, np.unique(found[held_inside == 0])) & (held_inside == length)
    (firsts,) = repeated.nonzero()
    is_clean = is_held & ~covered(firsts, firsts + length, len(tokens))
    pieces = []
    for start, stop in zip(split.holdout.starts, split.holdout.stops, strict=True):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], is_clean[start:stop], [0]]))) + start
        pieces += [piece for piece in edges.reshape(-1, 2) if piece[1] - piece[0] >= shortest]
    kept = np.array(pieces, dtype=np.int64).reshape(-1, 2)
    clean_share = is_clean.sum() / split.holdout.num_tokens
    return Ranges(kept[:, 0], kept[:, 1]), float(clean_share)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, metavar="STORE", help="the run's token store, if it has moved")
    parser.add_argument("--windows", type=int, default=4096, metavar="N", help="held-out sequences (default: 4096)")
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="length of a stretch (default: 16)")
    arguments = parser.parse_args()
    record, trained = RunDirectory(arguments.run).read_record(), load_trained(arguments.run)
    store = recorded_store(record, arguments.run, arguments.data, "give its new location with --data")
    recipe = trained.recipe
    split = split_holdout(store.documents, recipe.data, recipe.seed)
    clean, share = without_repeated(store, split, arguments.tokens, recipe.data.sequence_length)
    if not len(clean.starts):
        parser.exit(1, "No row of held-out text is left: the training text has all of it.\n")
    print(
        f"{share:.1%} of the held-out tokens are outside every stretch of {arguments.tokens} tokens that also occurs "
        f"in the training text"
    )
    with join_ranks() as ranks:
        for name, held in (("all held-out text", split.holdout), ("without repeated stretches", clean)):
            evaluate = Evaluator(store, split._replace(holdout=held), recipe, arguments.windows, ranks)
            metrics = evaluate(trained.model, torch.device("cpu"), 64)
            print(f"{name}: {trained.objective.describe(metrics)}")


if __name__ == "__main__":
    main()
