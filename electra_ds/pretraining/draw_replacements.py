"""Drawing the replacements of a Fast-ELECTRA schedule before training, for the objective `fast-electra-offline`.

The tokens that are drawn at a step depend only on the recipe, the frozen model and the step, so drawing can stop and
continue, and gives what a run with the model itself would draw.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.recipe import FastElectraRecipe, for_objective
from electra_ds.config.values import values_yaml
from electra_ds.core.files import complete_file
from electra_ds.data.replacements import (
    FOLDER,
    STRETCH,
    ReplacementsInfo,
    begin,
    finish,
    has_steps,
    write_held_out,
    write_steps,
)
from electra_ds.data.token_store import TokenStore, split_holdout
from electra_ds.pretraining.batches import BatchBuilder
from electra_ds.pretraining.evaluation import SAMPLE_WINDOWS, held_out_batch
from electra_ds.pretraining.masked_batch import MaskedBatch
from electra_ds.pretraining.objectives.fast_electra import FastElectra
from electra_ds.pretraining.objectives.fast_electra_offline import values_of_draws
from electra_ds.training.step import set_up_model

RECIPE = "recipe.yaml"


def copy_store(store: TokenStore, out: Path) -> None:
    """Create a store with the same text; the files are linked if both are on one disk."""
    names = [*store.info.file_bytes, *(f"tokenizer/{path.name}" for path in (store.path / "tokenizer").iterdir())]
    for name in (*names, "store.json"):
        path, copy = store.path / name, out / name
        if copy.exists():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, copy)
        except OSError:
            with complete_file(copy) as partial:
                shutil.copyfile(path, partial)


def draw_replacements(
    recipe: FastElectraRecipe,
    model: FastElectra,
    store: TokenStore,
    out: Path,
    plan: DeepSpeedPlan,
    device: torch.device,
    *,
    eval_windows: int,
    sources: Sequence[str],
    progress: Callable[[int], None],
) -> None:
    """Draw the replacements of all steps of a recipe, and of its evaluations, into a new store with the same text.

    model: with the frozen generator's weights. sources: their names. progress: is given each number of steps done.
    Finished stretches are kept, so a second call continues. Raises DataError if `out` holds other ones.
    """
    split = split_holdout(store.documents, recipe.data, recipe.seed)
    model.to(device, set_up_model(model, plan)).eval()
    rows, dtype = plan.batch.micro_batch_size, np.dtype(store.info.dtype)

    def drawn(batch: MaskedBatch) -> np.ndarray:
        starts = range(0, batch.num_sequences, rows)
        found = [model.draw(batch.micro_batch(first, rows).to(device)).cpu().numpy() for first in starts]
        return np.concatenate(found).astype(dtype)

    held_out = sorted({eval_windows, SAMPLE_WINDOWS})
    info = ReplacementsInfo(
        values=values_of_draws(recipe), sources=list(sources), precision=plan.precision.name,
        text=store.info.fingerprint, steps=recipe.schedule.total_steps, held_out=held_out,
    )  # fmt: skip
    begin(out, info)
    copy_store(store, out)
    for windows in held_out:
        write_held_out(out, windows, drawn(_masked(held_out_batch(store, split, recipe, windows))))
    builder, total = BatchBuilder(store, split.train, recipe, recipe.seed), recipe.schedule.total_steps
    for first in range(0, total, STRETCH):
        steps = range(first, min(first + STRETCH, total))
        if has_steps(out, first):
            progress(len(steps))
            continue
        stretch = []
        for step in steps:
            stretch.append(drawn(_masked(builder.build(step))))
            progress(1)
        write_steps(out, first, stretch)
    values = for_objective(recipe.model_dump(mode="json"), "fast-electra-offline")
    with complete_file(out / FOLDER / RECIPE) as path:
        path.write_text(values_yaml(values | {"name": f"{recipe.name}-offline", "description": ""}), "utf8")
    finish(out, info)


def _masked(batch: object) -> MaskedBatch:
    assert isinstance(batch, MaskedBatch)
    return batch
