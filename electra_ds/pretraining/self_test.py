"""A real training step of a very small ELECTRA in each precision, for the report of `doctor`."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from electra_ds.config.deepspeed import resolve
from electra_ds.config.deepspeed_sections import precision_section
from electra_ds.config.recipe import Recipe, load_recipe
from electra_ds.core import devices
from electra_ds.core.errors import ConfigError
from electra_ds.core.ranks import join_ranks
from electra_ds.data.build import build_store
from electra_ds.data.corpus import open_corpus
from electra_ds.data.token_store import TokenStore, split_holdout
from electra_ds.pretraining.batches import BatchBuilder, objective_of
from electra_ds.pretraining.doctor import Finding, failed_step
from electra_ds.pretraining.engine import PretrainingEngine
from electra_ds.training.engine import wants_fp16

_RECIPE = (
    "global_batch_size=4", "data.sequence_length=32", "model.embedding_size=16", "model.hidden_size=32",
    "model.num_hidden_layers=2", "model.num_attention_heads=4", "model.intermediate_size=64",
    "schedule.total_steps=4", "schedule.warmup_steps=1", "tokenizer.vocab_size=300",
)  # fmt: skip
_STEP = 1  # the learning rate of step 0 is 0
_TEXT = "The miller's geese walk down to the river before the sun is up, and nobody speaks of the weather. "


def try_precisions() -> list[Finding]:
    """Try one step in each precision on the device that pretraining would use. Failures are returned, not raised."""
    with tempfile.TemporaryDirectory() as folder, join_ranks() as ranks:
        device = devices.device(ranks.launch)
        recipe = load_recipe("tiny", _RECIPE)
        for index in range(4):
            Path(folder, f"{index}.txt").write_text(f"{index} {_TEXT}" * 20, "utf8")
        corpus = open_corpus([f"{folder}/{index}.txt" for index in range(4)])
        store = build_store(corpus, recipe.tokenizer, Path(folder) / "store", workers=1)
        return [_try(precision, recipe, store, device) for precision in ("fp32", "bf16", "fp16")]


def _try(precision: str, recipe: Recipe, store: TokenStore, device: torch.device) -> Finding:
    values: dict[str, Any] = precision_section(precision)
    if precision == "fp16":  # a scale that overflows would skip the only step
        values["fp16"]["initial_scale_power"] = 8
    try:
        plan = resolve(values, recipe, world_size=1, auto_fp16=wants_fp16(device), source=f"the step in {precision}")
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
    except ConfigError as error:  # the engine rejects a precision that the device lacks
        return Finding(f"a step in {precision}", "not on this device", "note", str(error))
    except Exception as error:  # CUDA, DeepSpeed, a library that cannot be loaded
        return failed_step(precision, error)
    if not math.isfinite(loss) or not moved:
        return failed_step(precision, f"the loss is {loss}, and the weights {'moved' if moved else 'did not move'}")
    return Finding(f"a step in {precision}", "works")
