"""Which tokens the generator predicts, and which of them it sees as [MASK].

One random source per batch: the noise for a whole global batch is two numpy draws. Shape suffixes:
B sequences of the global batch, T positions.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np


class Masks(NamedTuple):
    """Boolean [B, T] arrays; `replaced` positions get a generator's sample in the discriminator's input."""

    selected: np.ndarray
    masked: np.ndarray
    replaced: np.ndarray


def choose_masks(
    maskable_BT: np.ndarray,
    lengths_B: np.ndarray,
    rng: np.random.Generator,
    *,
    mlm_probability: float,
    mask_token_share: float,
    count: Literal["bernoulli", "fixed"],
    replace_at: Literal["selected", "masked"],
) -> Masks:
    """Masks for a global batch.

    maskable_BT: True where a token may be selected (no padding, no special token). lengths_B: tokens per
    sequence, [CLS] and [SEP] included. `fixed` selects min(round(p * length), floor((p + 0.005) * T)) and at
    least one token of each sequence without replacement (google-research/electra pretrain_helpers.py draws
    with replacement); a sequence with fewer maskable tokens has them all selected.
    """
    noise = rng.random(maskable_BT.shape, dtype=np.float32)
    if count == "bernoulli":
        selected = (noise < mlm_probability) & maskable_BT
    else:
        wanted = np.minimum(
            np.round(mlm_probability * lengths_B), np.floor((mlm_probability + 0.005) * maskable_BT.shape[1])
        )
        wanted = np.maximum(wanted, 1).astype(np.int64)
        noise[~maskable_BT] = 2.0
        ranks = noise.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
        selected = (ranks < wanted[:, None]) & maskable_BT
    masked = selected & (rng.random(maskable_BT.shape, dtype=np.float32) < mask_token_share)
    return Masks(selected, masked, selected if replace_at == "selected" else masked)
