"""Sample sentences are prose where the held-out text has any."""

from __future__ import annotations

import pytest

from electra_ds.pretraining.objectives.electra_evaluation import most_prose

PROSE = "The lamp had gone out, and nobody in the house remembered who was to light it again."
CODE = "def forward(self, x: torch.Tensor) -> torch.Tensor:\n    return self.weight[0] * x + self.bias"
TABLE = "| 12 | 0.341 | 0.299 | 17,401 | 3.1e-4 | 0.0 | 1.0 | 2.0 | 8.19 | 0.2 | 55.1 | 7 | 8 | 9 |"
UKRAINIAN = "Мій дід тримав бджіл за старою клунею, і щоліта ми крутили з ним мед для всіх сусідів."


@pytest.mark.parametrize(
    ("texts", "count", "expected"),
    [
        ([CODE, PROSE, TABLE, PROSE], 2, [1, 3]),
        ([TABLE, UKRAINIAN, CODE], 1, [1]),
        ([CODE, "Short", PROSE], 1, [2]),
        ([CODE, TABLE], 4, [0, 1]),
        ([], 4, []),
    ],
)
def test_the_texts_that_read_most_like_prose_are_chosen_in_their_order(
    texts: list[str], count: int, expected: list[int]
) -> None:
    assert most_prose(texts, count) == expected
