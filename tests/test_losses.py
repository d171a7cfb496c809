"""A change that leaves the mathematics alone repeats the losses in tests/losses.json, bit for bit on the same machine.

After a change that is meant to change losses, `python -m tests.losses record` writes the file anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.losses import CASES, FILE, differences, losses_of, make_inputs

SHORT = [name for name in CASES if not name.startswith("rc2020")]


@pytest.mark.slow
def test_losses_of_short_runs_are_as_recorded(tmp_path: Path) -> None:
    make_inputs(tmp_path, ["tiny"])
    assert differences({name: losses_of(name, tmp_path) for name in SHORT}) == []


@pytest.mark.nightly
def test_losses_of_the_studys_recipe_are_as_recorded(tmp_path: Path) -> None:
    make_inputs(tmp_path, ["rc2020-small"])
    assert differences({name: losses_of(name, tmp_path) for name in CASES if name not in SHORT}) == []


def test_a_loss_that_differs_is_named_with_its_step() -> None:
    recorded = json.loads(FILE.read_text())["cases"]
    assert differences(recorded) == []
    name = SHORT[0]
    changed = {name: {"loss": [*recorded[name]["loss"]]}}
    changed[name]["loss"][6] *= 1.5
    assert differences(changed) == [f"{name}: loss differs by 0.5 of its value at step 7"]
