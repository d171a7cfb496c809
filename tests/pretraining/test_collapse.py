"""When a discriminator has collapsed, and when it has not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from electra_ds.pretraining.objectives.electra_evaluation import LEAST_PROGRESS, MOST_AUC, WINDOW, collapsed_at

REPLACED = 0.1


def evaluation(step: int, auc: float, recall: float, loss: float, false_alarms: float = 0.0) -> dict[str, Any]:
    accuracy = REPLACED * recall + (1 - REPLACED) * (1 - false_alarms)
    return {
        "step": step, "discriminator_auc": auc, "discriminator_recall": recall, "discriminator_accuracy": accuracy,
        "replaced_share": REPLACED, "generator_masked_loss": loss,
    }  # fmt: skip


def run(*parts: tuple[int, float, float]) -> list[dict[str, Any]]:
    """Evaluations every 100 steps: (how many, AUC, recall), the generator better by 0.1 nats each time."""
    found: list[dict[str, Any]] = []
    for count, auc, recall in parts:
        for _ in range(count):
            step = 100 * (len(found) + 1)
            found.append(evaluation(step, auc, recall, 8 - step / 1000))
    return found


def test_a_discriminator_that_falls_to_chance_has_collapsed_where_it_fell() -> None:
    lines = run((12, 0.8, 0.4), (WINDOW, 0.5, 0.0))
    assert collapsed_at(lines, 10_000, 100) == 1300
    assert collapsed_at(lines[:-1], 10_000, 100) is None


def test_at_first_every_discriminator_is_at_chance() -> None:
    """A tenth of the schedule, or the warm-up where that is longer."""
    lines = run((10 + WINDOW, 0.5, 0.0))
    assert collapsed_at(lines[:-2], 10_000, 100) is None
    assert collapsed_at(lines, 10_000, 100) == 100  # it never began
    assert collapsed_at(lines, 10_000, 1200) is None


def test_a_fall_before_anything_is_judged_is_told_where_it_was() -> None:
    lines = run((3, 0.8, 0.4), (7 + WINDOW, 0.5, 0.0))
    assert collapsed_at(lines[:-2], 10_000, 100) is None
    assert collapsed_at(lines, 10_000, 100) == 400


@pytest.mark.parametrize(
    ("auc", "recall", "false_alarms"),
    [(0.6, 0.0, 0.0), (0.5, 0.3, 0.0)],
    ids=["it ranks", "it finds"],
)
def test_one_that_still_tells_something_has_not(auc: float, recall: float, false_alarms: float) -> None:
    lines = [evaluation(100 * index, auc, recall, 8 - index / 10, false_alarms) for index in range(10, 30)]
    assert collapsed_at(lines, 10_000, 100) is None


def test_one_that_calls_all_of_them_replaced_has() -> None:
    """Its recall is 1, and says nothing."""
    lines = [evaluation(100 * index, 0.5, 1.0, 8 - index / 10, 1.0) for index in range(10, 30)]
    assert collapsed_at(lines, 10_000, 100) == 1000


def test_where_the_generator_stands_still_nothing_has_collapsed() -> None:
    """Neither of them learns then, which is another fault."""
    lines = [evaluation(100 * index, 0.5, 0.0, 7.0) for index in range(10, 30)]
    assert collapsed_at(lines, 10_000, 100) is None


@given(
    st.lists(
        st.tuples(st.floats(0.4, 0.9), st.floats(0, 1), st.floats(1, 9), st.floats(0, 1), st.booleans()), max_size=14
    )
)
def test_what_is_called_a_collapse_is_one(values: list[tuple[float, float, float, float, bool]]) -> None:
    lines = [
        evaluation(100 * index, auc, recall, loss, alarms) | ({"discriminator_auc": None} if is_lost else {})
        for index, (auc, recall, loss, alarms, is_lost) in enumerate(values)
    ]
    step = collapsed_at(lines, 1000, 0)
    if step is None:
        return
    losses = [line["generator_masked_loss"] for line in lines]
    since = step // 100
    windows = [
        range(first, first + WINDOW) for first in range(max(1, since), len(lines) - WINDOW + 1)
        if losses[first] - losses[first + WINDOW - 1] >= LEAST_PROGRESS
    ]  # fmt: skip
    assert any(
        all((lines[index]["discriminator_auc"] or 1.0) <= MOST_AUC for index in range(since, window.stop))
        for window in windows
    )
    before = lines[since - 1] if since else None
    if before is not None and before["discriminator_recall"] == 0 and before["discriminator_accuracy"] == 1 - REPLACED:
        assert (before["discriminator_auc"] or 1.0) > MOST_AUC
