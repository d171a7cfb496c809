"""Selecting the tokens to predict, and those that are shown as [MASK].

Each batch has one random source, and each draw uses 32 random bits per token: a draw with probability p succeeds if
they are below p * 2^32. Shape suffixes: B sequences of the global batch, T positions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from electra_ds.config.sections import MaskingSection, SelectionSection
from electra_ds.core.keyed_random import random_bits


def before(stops_B: np.ndarray, width: int) -> np.ndarray:
    """Return bool [B, width], True at the positions before each row's stop."""
    places: np.ndarray = np.arange(width, dtype=np.int32) < stops_B.astype(np.int32)[:, None]
    return places


class Masks(NamedTuple):
    """Boolean [B, T] arrays; `replaced` positions get a generator's sample in the discriminator's input."""

    selected: np.ndarray
    masked: np.ndarray
    replaced: np.ndarray


def choose_masks(
    maskable_BT: np.ndarray,
    lengths_B: np.ndarray,
    rng: np.random.Generator,
    masking: SelectionSection,
) -> Masks:
    """Choose the masks of a global batch.

    maskable_BT: True where a token may be selected (no padding, no special token). lengths_B: tokens per
    sequence, including [CLS] and [SEP]. `fixed` selects min(round(p * length), floor((p + 0.005) * T)) and at
    least one token of each sequence without replacement (google-research/electra pretrain_helpers.py draws
    with replacement); if a sequence has fewer maskable tokens, all of them are selected.
    """
    batch, length = maskable_BT.shape
    noise_BT = random_bits(rng, batch, length)
    if masking.count == "bernoulli":  # one draw serves both
        selected = (noise_BT <= _highest(masking.mlm_probability)) & maskable_BT
        masked = (noise_BT <= _highest(masking.mlm_probability * masking.mask_token_share)) & maskable_BT
    else:
        wanted = _fixed_counts(lengths_B, length, masking.mlm_probability)
        _make_distinct(noise_BT)
        np.putmask(noise_BT, ~maskable_BT, np.uint32(0xFFFFFFFF))
        last = np.take_along_axis(np.sort(noise_BT, axis=1), wanted[:, None] - 1, axis=1)
        selected = (noise_BT <= last) & maskable_BT
        masked = (random_bits(rng, batch, length) <= _highest(masking.mask_token_share)) & selected
    only_masked = isinstance(masking, MaskingSection) and masking.replace_at == "masked"
    return Masks(selected, masked, masked if only_masked else selected)


def selected_limit(masking: SelectionSection, num_sequences: int, length: int) -> int:
    """Return a number of selected positions that fewer than one in 1e9 batches of full sequences exceed.

    `bernoulli`: mean plus six standard deviations, rounded up to a multiple of 64 for efficient matrix products.
    `fixed`: the exact number.
    """
    maskable = num_sequences * (length - 2)
    if masking.count == "fixed":
        [of_one] = _fixed_counts(np.array([length]), length, masking.mlm_probability).tolist()
        return min(maskable, num_sequences * of_one)
    mean = maskable * masking.mlm_probability
    most = math.ceil(mean + 6 * math.sqrt(mean * (1 - masking.mlm_probability)))
    return min(maskable, -(-most // 64) * 64)


def _fixed_counts(lengths_B: np.ndarray, length: int, mlm_probability: float) -> np.ndarray:
    """Return int64 [B], the number of tokens of each sequence that `fixed` selects in rows of `length` positions."""
    counts = np.minimum(np.round(mlm_probability * lengths_B), np.floor((mlm_probability + 0.005) * length))
    return np.maximum(counts, 1).astype(np.int64)


def _highest(probability: float) -> np.uint32:
    """Return the largest 32-bit number for which a draw with this probability succeeds."""
    return np.uint32(max(1, round(probability * 2.0**32)) - 1)


def _make_distinct(noise_BT: np.ndarray) -> None:
    """Put the column into each number's lowest bits, so that all numbers in a row differ."""
    columns = np.arange(noise_BT.shape[1], dtype=np.uint32)
    lowest = np.uint32((1 << int(columns[-1]).bit_length()) - 1)
    np.bitwise_and(noise_BT, ~lowest, out=noise_BT)
    np.bitwise_or(noise_BT, columns, out=noise_BT)
