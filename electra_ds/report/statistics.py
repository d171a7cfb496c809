"""Scores of runs that differ in their seed, summed up. Every number keeps the unit of what it is made from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

_ROUNDING = 1e-12
"""Metrics that differ by less are equal."""


@dataclass(frozen=True)
class Spread:
    n: int
    mean: float
    std: float | None
    """Sample standard deviation (n - 1); None for one value, which has none."""
    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError if there are none."""
    if not values:
        raise ValueError("no values to sum up")
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(len(values), float(np.mean(values)), std, float(np.median(values)), min(values), max(values))


def difference_interval(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95
) -> tuple[float, float | None, float | None]:
    """(mean of a - mean of b, low, high), Welch's interval.

    low and high are None where the values tell nothing of their spread: a single value, or only equal ones.
    """
    difference = float(np.mean(a) - np.mean(b))
    if min(len(a), len(b)) < 2 or max(np.ptp(a), np.ptp(b)) < _ROUNDING:
        return difference, None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # one side's values are all equal
        test = stats.ttest_ind(a, b, equal_var=False)
        low, high = (float(bound) for bound in test.confidence_interval(confidence))
    return difference, low, high
