"""Checkpoints in the background: what is saved is the state at the call, whatever training does meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from electra_ds.core.errors import CheckpointError
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.engine import PretrainingEngine
from electra_ds.training import checkpoint as checkpoint_module
from electra_ds.training.checkpoint import CheckpointFolder, CheckpointSaver, FileEntry, load_checkpoint, write_tensors
from tests.helpers import builder_for, cpu_plan, model_for, small_recipe

STATE = {"step": 3, "tokens": 0, "precision": "fp32"}


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that takes nothing before it is set."""
    is_ready = threading.Event()

    def slowly(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileEntry:
        assert is_ready.wait(60)
        return write_tensors(path, tensors)

    monkeypatch.setattr(checkpoint_module, "write_tensors", slowly)
    return is_ready


def train_while_saving(
    store: TokenStore, ranks: Ranks, folder: Path, disk: threading.Event, device: str, **values: Any
) -> None:
    recipe = small_recipe()
    builder = builder_for(store, recipe)
    plan = cpu_plan(recipe, train_micro_batch_size_per_gpu=4, **values)
    engine = PretrainingEngine(model_for(store, recipe), recipe, plan, torch.device(device))
    try:
        for step in range(3):
            engine.train_step(builder.build(step), step)
        expected, counters = engine.optimizer.snapshot(), engine.optimizer.counters()
        saver = CheckpointSaver(CheckpointFolder(folder, keep=1), ranks)
        saver.save(engine.optimizer, STATE, {})
        for step in range(3, 6):  # nothing can have been written yet
            engine.train_step(builder.build(step), step)
        moved = engine.optimizer.snapshot()
        assert not list(folder.glob("step-*"))
        disk.set()
        saver.finish()
        saved = load_checkpoint(folder / "latest")
        assert saved.state["optimizer"] == counters
        assert saved.tensors.keys() == expected.keys()
        assert all(torch.equal(saved.tensors[name], tensor) for name, tensor in expected.items())
        assert not any(torch.equal(saved.tensors[name], moved[name]) for name in moved if name.startswith("exp_avg/"))
    finally:
        disk.set()
        engine.close()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_is_of_the_step_at_which_it_was_begun(
    store: TokenStore, process_group: Ranks, tmp_path: Path, disk: threading.Event, stage: int
) -> None:
    train_while_saving(store, process_group, tmp_path, disk, "cpu", zero_optimization={"stage": stage})


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_checkpoint_is_of_the_step_at_which_it_was_begun_on_a_gpu(
    store: TokenStore, process_group: Ranks, tmp_path: Path, disk: threading.Event, stage: int, precision: str
) -> None:
    section = {"enabled": True} | ({"initial_scale_power": 8} if precision == "fp16" else {})
    values = {"zero_optimization": {"stage": stage}, precision: section}
    train_while_saving(store, process_group, tmp_path, disk, "cuda", **values)


class Optimizer:
    """What a saver asks of one."""

    def __init__(self, on_snapshot: Callable[[], None] = lambda: None) -> None:
        self.on_snapshot = on_snapshot

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"a": (2,)}

    def snapshot(self, names: object) -> dict[str, torch.Tensor]:
        self.on_snapshot()
        return {f"{kind}/a": torch.ones(2) for kind in ("master", "exp_avg", "exp_avg_sq")}

    def counters(self) -> dict[str, float]:
        return {}


def test_a_save_waits_for_the_one_before_it_lest_two_copies_fill_the_memory(
    process_group: Ranks, tmp_path: Path, disk: threading.Event
) -> None:
    saver = CheckpointSaver(CheckpointFolder(tmp_path, keep=2), process_group)
    saver.save(Optimizer(), STATE, {})  # type: ignore[arg-type]
    threading.Timer(0.2, disk.set).start()
    published: list[bool] = []
    second = Optimizer(lambda: published.append((tmp_path / "step-00000003").exists()))
    saver.save(second, STATE | {"step": 4}, {})  # type: ignore[arg-type]
    saver.finish()
    assert published == [True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003", "step-00000004"]


def test_a_failed_save_is_told_once_and_the_next_one_may_succeed(
    process_group: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = CheckpointSaver(CheckpointFolder(tmp_path, keep=2), process_group)

    def full(path: Path, tensors: object) -> FileEntry:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_tensors", full)
        saver.save(Optimizer(), STATE, {})  # type: ignore[arg-type]
        saver.close()
        assert saver.has_failed
        with pytest.raises(CheckpointError, match=r"No space left on device.*There is none before it. Free disk space"):
            saver.finish()
    assert not saver.has_failed
    assert list(tmp_path.iterdir()) == []
    saver.save(Optimizer(), STATE, {})  # type: ignore[arg-type]
    saver.finish()
    assert load_checkpoint(tmp_path / "latest").state["step"] == 3
