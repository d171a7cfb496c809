"""Loss curves of one recipe in several precisions on the same data, masks and noise: the section `precisions`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.recipe import Recipe, load_recipe
from electra_ds.core import devices
from electra_ds.data.token_store import TokenStore, split_holdout
from electra_ds.pretraining.batches import BatchBuilder
from electra_ds.pretraining.electra import Electra
from electra_ds.pretraining.engine import PretrainingEngine
from electra_ds.training.step import prefetched

WINDOW_STEPS = 10
LOSSES = ("generator_loss", "discriminator_loss")


def shortened(recipe_name: str, steps: int) -> Recipe:
    """The recipe with its schedule drawn together to so many steps, a tenth of them warm-up, so that the curves see its
    highest learning rate: its own warm-up alone may be longer."""
    return load_recipe(recipe_name, [f"schedule.total_steps={steps}", f"schedule.warmup_steps={steps // 10}"])


def train(
    recipe: Recipe,
    plan: DeepSpeedPlan,
    store: TokenStore,
    device: torch.device,
    turn: Callable[[], None],
    curve: dict[str, Any],
) -> None:
    """Train for the whole schedule, adding to `curve` each loss's mean over every WINDOW_STEPS steps (None where it is
    not finite) and the steps skipped so far."""
    tokenizer = store.tokenizer
    curve |= {name: [] for name in LOSSES} | {"skipped_steps": 0}
    engine = PretrainingEngine(Electra(recipe, tokenizer.vocab_size, tokenizer.pad_id), recipe, plan, device)
    builder = BatchBuilder(store, split_holdout(store.documents, recipe.data, recipe.seed).train, recipe, recipe.seed)
    steps = recipe.schedule.total_steps
    unread: list[dict[str, torch.Tensor]] = []
    try:
        for step, batch in prefetched(builder, 0, steps):
            unread.append(engine.train_step(batch, step))
            if (step + 1) % WINDOW_STEPS == 0 or step + 1 == steps:
                for name in LOSSES:
                    mean = torch.stack([result[name] for result in unread]).mean().item()
                    curve[name].append(mean if np.isfinite(mean) else None)
                curve["skipped_steps"] = int(engine.optimizer.skipped_steps.item())
                unread.clear()
            turn()
    finally:
        engine.close()
        del engine
        devices.release_memory(device)


def differences(curve: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Of each loss, relative to the reference's, over the last half of the windows: the largest and the mean one, which
    keeps its sign. None where a loss was not finite."""
    found = {}
    for name in LOSSES:
        ours, theirs = (np.array(values[name], dtype=float) for values in (curve, reference))
        relative = (ours / theirs - 1)[len(ours) // 2 :]
        is_finite = bool(np.isfinite(relative).all())
        found[name] = {
            "largest": float(np.abs(relative).max()) if is_finite else None,
            "mean": float(relative.mean()) if is_finite else None,
        }
    return found
