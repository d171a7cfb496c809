"""Random numbers as a pure function of a key, equal on every device and under every batch plan. Imports no torch.

The numbers of torch's CUDA generator depend on the GPU's number of multiprocessors, and those of every torch generator
on how a batch is split. Here a number is a hash of (seed, step, row, column) in integer arithmetic, which is exact on
every device.
"""

from __future__ import annotations

import math

import numpy as np

_SMALL_PERMUTATION = 4096
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_64_BITS = (1 << 64) - 1


def hash64(*parts: int | np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of integers or integer arrays that broadcast together (splitmix64 finaliser per part).

    Source of the mixer: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    number, rest = 0, list(parts)
    while rest and isinstance(part := rest[0], int):  # Python's integers take a tenth of the time of numpy's scalars
        del rest[0]
        number = ((number ^ (part & _64_BITS)) + _GOLDEN) & _64_BITS
        number = ((number ^ (number >> 30)) * _FIRST) & _64_BITS
        number = ((number ^ (number >> 27)) * _SECOND) & _64_BITS
        number ^= number >> 31
    state = np.asarray(number, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in rest:
            state = np.asarray((state ^ np.asarray(part).astype(np.uint64)) + np.uint64(_GOLDEN))
            for shift, factor in ((30, _FIRST), (27, _SECOND)):
                state ^= state >> np.uint64(shift)
                state *= np.uint64(factor)
            state ^= state >> np.uint64(31)
    return state


def generator(*parts: int) -> np.random.Generator:
    """Return a numpy generator keyed by integers: one random source for a complete batch.

    SFC64 gives raw bits twice as fast as Philox; numpy promises that neither's stream changes (NEP 19).
    """
    return np.random.Generator(np.random.SFC64(int(hash64(*parts))))


def random_bits(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Return uint32 of full range, two from each raw number, in a third of the time of `rng.integers`."""
    size = math.prod(shape)
    raw = np.asarray(rng.bit_generator.random_raw(size - size // 2))
    return raw.view(np.uint32)[:size].reshape(shape)


def permutation_at(places: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Return the int64 items at the given places of a keyed random permutation of 0 … size - 1.

    A small permutation is made in full. A large one needs no table: a Feistel network of four rounds over the next
    power of four is applied until the result falls below `size` (Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002).
    """
    if size <= _SMALL_PERMUTATION:
        return generator(*key).permutation(size)[places]
    half = np.uint64((int(size - 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = np.asarray(places).astype(np.uint64)
    walking = np.ones(result.shape, dtype=bool)
    while walking.any():
        left, right = result[walking] >> half, result[walking] & mask
        for turn in range(4):
            left, right = right, left ^ (hash64(*key, turn, right) & mask)
        result[walking] = left << half | right
        walking[walking] = result[walking] >= size
    return result.astype(np.int64)
