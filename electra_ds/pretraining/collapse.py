"""Says when a discriminator has stopped discriminating, or never began, while its generator still learns.

The reproduction study saw it with generators of half the discriminator's width and more: the generator fools the
discriminator altogether, and from then on the run is worth nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

WINDOW = 4
"""Evaluations in a row that must all look alike."""
LEAST_SHARE = 0.1
"""Of the schedule, before which nothing is judged: at first every discriminator is at chance. The study's collapses
came at the end of its warm-up, one hundredth into its schedule, and lasted."""
MOST_AUC = 0.52
MOST_YOUDEN = 0.02
"""Recall above the share of unreplaced tokens that are taken for replaced, which at chance is 0."""
LEAST_PROGRESS = 0.01
"""Nats by which the generator's loss at [MASK] falls over the window."""


def collapsed_at(evaluations: Sequence[Mapping[str, Any]], total_steps: int, warmup_steps: int) -> int | None:
    """Since which step it is so, None where it is not.

    evaluations: in order, with `step` and the values of metrics.Evaluation. It is so where in all of WINDOW
    evaluations that are judged AUC and recall are at chance, and the generator is better at the end than at the
    beginning. The step is that of the first evaluation from which on all were at chance, judged or not: a discriminator
    that never began has it at the first one of the run.
    """
    least = max(LEAST_SHARE * total_steps, warmup_steps)
    for first in range(len(evaluations) - WINDOW + 1):
        window = evaluations[first : first + WINDOW]
        losses = [_number(each.get("generator_masked_loss")) for each in window]
        is_judged = window[0]["step"] >= least
        if is_judged and all(map(_is_at_chance, window)) and losses[0] - losses[-1] >= LEAST_PROGRESS:
            while first > 0 and _is_at_chance(evaluations[first - 1]):
                first -= 1
            return int(evaluations[first]["step"])
    return None


def _is_at_chance(evaluation: Mapping[str, Any]) -> bool:
    auc = _number(evaluation.get("discriminator_auc"))
    return auc <= MOST_AUC and _youden(evaluation) <= MOST_YOUDEN


def _youden(evaluation: Mapping[str, Any]) -> float:
    """Recall - the share of unreplaced tokens that are taken for replaced: 0 for any blind guess, 1 at best."""
    accuracy, recall, replaced = (
        _number(evaluation.get(name)) for name in ("discriminator_accuracy", "discriminator_recall", "replaced_share")
    )
    if not 0 < replaced < 1:
        return math.nan
    specificity = (accuracy - replaced * recall) / (1 - replaced)
    return recall + specificity - 1


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
