"""A folder with what the examples of the documentation name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from electra_ds.api.pretrain import pretrain
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from tests.helpers import SMALL, write_corpus

STEPS = ("schedule.total_steps=6", "schedule.warmup_steps=1")


def write_examples(path: Path, rows: int, text: str = "text", label: str = "label") -> None:
    """Write rows whose label is whether a certain word stands in the text."""
    lines = [f"{'Good' if row % 2 else 'Bad'} words {row % 7} ab,{1 + row % 2}" for row in range(rows)]
    path.write_text("\n".join([f"{text},{label}", *lines]) + "\n", "utf8")


@pytest.fixture(scope="session")
def _examples(tmp_path_factory: pytest.TempPathFactory, store: TokenStore, process_group: Ranks) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    write_corpus(folder / "texts")
    shutil.copytree(store.path, folder / "stores" / "small")
    write_examples(folder / "train.csv", 24)
    write_examples(folder / "dev.csv", 10)
    write_examples(folder / "reviews.csv", 24, "review", "stars")
    write_examples(folder / "held_out.csv", 10, "review", "stars")
    pretrain(
        "tiny", data=folder / "stores" / "small", run_dir=folder / "runs" / "mine", overrides=[*SMALL, *STEPS],
        ds_config="cpu", threads=1, eval_windows=16, log_every=1, quiet=True,
    )  # fmt: skip
    return folder


@pytest.fixture
def examples(_examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, in which the test runs."""
    folder = tmp_path / "examples"
    shutil.copytree(_examples, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder
