"""What a checkpoint costs, beside DeepSpeed's own of the same state: the section `checkpoints`."""

from __future__ import annotations

import gc
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import ratio
from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.recipe import Recipe, load_recipe
from electra_ds.core.ranks import join_ranks
from electra_ds.interop.export_deepspeed import native_engine
from electra_ds.pretraining.electra import Electra
from electra_ds.pretraining.engine import PretrainingEngine
from electra_ds.training.checkpoint import CheckpointFolder, CheckpointSaver, load_checkpoint, open_checkpoint

_BASE = (
    "model.embedding_size=768", "model.hidden_size=768", "model.num_attention_heads=12",
    "model.intermediate_size=3072", "generator.width_multiplier=0.333333",
)  # fmt: skip
_MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rc2020-small": ("rc2020-small", ()),
    "110M": ("electra-small", _BASE),
}
"""The study's ELECTRA-Small, and a discriminator of 110 M parameters, the original's base size, with its generator."""
_TURNS = 4


def measure(
    results: dict[str, Any],
    plan_of: Callable[[Recipe], DeepSpeedPlan],
    device: torch.device,
    folder: Path,
    rounds: int,
    begin: Callable[[str, int], None],
    turn: Callable[[], None],
) -> None:
    """Put medians, ratios and sizes of each model into `results`, as they come.

    `stall` is how long training waits, `save` how long until the checkpoint is flushed, hashed and published, `load`
    until it is verified and in the engine; `deepspeed_save` and `deepspeed_load` are DeepSpeed's, which neither flushes
    nor hashes. Seconds of the wall clock; one round before those that count warms up, and each has its own order.
    """
    found = results["checkpoints"] = {}
    for name, (recipe_name, overrides) in _MODELS.items():
        recipe = load_recipe(recipe_name, overrides)
        begin(f"checkpoints of {name}", _TURNS * (rounds + 1))
        seconds, sizes = _measure_model(recipe, plan_of(recipe), device, folder / name, rounds, turn)
        speeds = {
            f"{ours}_vs_deepspeed": ratio(seconds[f"deepspeed_{theirs}"], seconds[ours]).figure()
            for ours, theirs in (("stall", "save"), ("save", "save"), ("load", "load"))
        }
        found[name] = sizes | {"seconds": {what: float(np.median(s)) for what, s in seconds.items()}} | speeds


def _measure_model(
    recipe: Recipe, plan: DeepSpeedPlan, device: torch.device, folder: Path, rounds: int, turn: Callable[[], None]
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """(seconds by what was timed, sizes)."""
    vocab_size = recipe.tokenizer.vocab_size
    engine = PretrainingEngine(Electra(recipe, vocab_size, 0), recipe, plan, device)
    ours, native = CheckpointFolder(folder / "ours", keep=1), folder / "deepspeed"
    state = {"step": 1, "tokens": 0, "precision": "fp32"}
    first = ours.save(engine.optimizer.snapshot(), state | {"optimizer": engine.optimizer.counters()}, {})
    model = Electra(recipe, vocab_size, 0)
    with join_ranks() as ranks, native_engine(load_checkpoint(first), model, recipe, plan, device) as theirs:
        saver = CheckpointSaver(ours, ranks)

        def save(clock: _Clock) -> None:
            shutil.rmtree(ours.folder)
            with clock("save"):
                with clock("stall"):
                    saver.save(engine.optimizer, state, {})
                saver.finish()

        def load(clock: _Clock) -> None:
            with clock("load"):
                path, _ = ours.latest_valid(ranks)
                assert path is not None
                checkpoint = open_checkpoint(path)
                checkpoint.check(engine.optimizer.shapes(), engine.optimizer.trained())
                engine.optimizer.load(checkpoint.tensors, checkpoint.state["optimizer"])

        def their_save(clock: _Clock) -> None:
            shutil.rmtree(native, ignore_errors=True)
            with clock("deepspeed_save"):
                theirs.save_checkpoint(str(native), tag="native")

        def their_load(clock: _Clock) -> None:
            with clock("deepspeed_load"):
                theirs.load_checkpoint(str(native))

        clock = _Clock(device)
        their_save(_Clock(device))
        for number in range(-1, rounds):
            for timed in random.Random(number).sample([save, load, their_save, their_load], _TURNS):
                gc.collect()
                timed(clock if number >= 0 else _Clock(device))
                turn()
        sizes = {
            "parameters": sum(parameter.numel() for parameter in engine.module.parameters()),
            "bytes": _size(ours.folder),
            "deepspeed_bytes": _size(native),
        }
    engine.close()
    return clock.seconds, sizes


class _Clock:
    """Collects seconds of the wall clock by name."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = self._now()
        yield
        self.seconds.setdefault(name, []).append(self._now() - started)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
