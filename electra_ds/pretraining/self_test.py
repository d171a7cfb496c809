"""One real training step of a very small ELECTRA, in each precision: what `doctor` believes."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from electra_ds.config.deepspeed import resolve
from electra_ds.config.overrides import load_recipe
from electra_ds.config.recipe import Recipe
from electra_ds.core import devices
from electra_ds.core.errors import ConfigError
from electra_ds.core.ranks import join_ranks
from electra_ds.data.build import build_store
from electra_ds.data.corpus import open_corpus
from electra_ds.data.segments import split_holdout
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.batches import BatchBuilder, objective_of
from electra_ds.pretraining.engine import PretrainingEngine
from electra_ds.training.engine import wants_fp16

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    # A low scale, since one step must suffice and a scale that overflows skips it.
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
}
_RECIPE = (
    "global_batch_size=4", "data.sequence_length=32", "model.embedding_size=16", "model.hidden_size=32",
    "model.num_hidden_layers=2", "model.num_attention_heads=4", "model.intermediate_size=64",
    "schedule.total_steps=4", "schedule.warmup_steps=1", "tokenizer.vocab_size=300",
)  # fmt: skip
_STEP = 1  # the learning rate of step 0 is 0
_TEXT = (
    "The miller's geese walk down to the river before the sun is up.",
    "A ferry crosses at noon, and nobody on it speaks of the weather.",
    "Behind the mill lies an orchard whose oldest tree bears no fruit.",
    "In winter the wheel stands still and the children skate on the pond.",
)


@dataclass(frozen=True)
class Trial:
    """How one precision did."""

    precision: str
    result: Literal["works", "fails", "not on this device"]
    reason: str = ""
    """One line; empty where it works."""


def try_precisions() -> list[Trial]:
    """One step each, on the device that pretraining would take. Never raises for what the machine cannot do."""
    with tempfile.TemporaryDirectory() as folder, join_ranks() as ranks:
        device = devices.device(ranks.launch)
        recipe = load_recipe("tiny", _RECIPE)
        store = _store(Path(folder), recipe)
        return [_try(name, values, recipe, store, device) for name, values in PRECISIONS.items()]


def _store(folder: Path, recipe: Recipe) -> TokenStore:
    (folder / "corpus").mkdir()
    for index, sentence in enumerate(_TEXT):
        (folder / "corpus" / f"{index}.txt").write_text(f"{sentence} " * 20, "utf8")
    return build_store(open_corpus([str(folder / "corpus")]), recipe.tokenizer, folder / "store", workers=1)


def _try(name: str, values: dict[str, Any], recipe: Recipe, store: TokenStore, device: torch.device) -> Trial:
    try:
        auto_fp16 = wants_fp16(device)
        plan = resolve(values, recipe, world_size=1, auto_fp16=auto_fp16, source=f"the {name} trial")
        model = objective_of(recipe, store.tokenizer).build_model()
        engine = PretrainingEngine(model, recipe, plan, device)
        try:
            before = [parameter.detach().clone() for parameter in engine.module.parameters()]
            split = split_holdout(store.documents, recipe.data, recipe.seed)
            batch = BatchBuilder(store, split.train, recipe, recipe.seed).build(_STEP)
            loss = engine.train_step(batch, _STEP)["loss"].item()
            moved = any(not torch.equal(old, new) for old, new in zip(before, engine.module.parameters(), strict=True))
        finally:
            engine.close()
    except ConfigError as error:  # the engine refuses a precision that the device does not have
        return Trial(name, "not on this device", str(error))
    except Exception as error:  # CUDA, DeepSpeed, a library that does not load: each is a finding
        return Trial(name, "fails", _one_line(error))
    if not math.isfinite(loss) or not moved:
        return Trial(name, "fails", f"the loss is {loss}, and the weights {'moved' if moved else 'did not move'}")
    return Trial(name, "works")


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else repr(error)
