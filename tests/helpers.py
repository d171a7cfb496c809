"""Small corpora and recipes, made here so that tests need no file and no network."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import distributed

from electra_ds.config.deepspeed import DeepSpeedPlan, resolve
from electra_ds.config.recipe import Recipe, load_recipe
from electra_ds.data.token_store import TokenStore, split_holdout
from electra_ds.pretraining.batches import BatchBuilder
from electra_ds.pretraining.electra import Electra
from electra_ds.pretraining.objectives.base import Objective
from electra_ds.pretraining.step_shape import StepShape

if TYPE_CHECKING:
    from transformers import ElectraForMaskedLM, ElectraForPreTraining

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

SMALL = (
    "global_batch_size=8", "data.sequence_length=32",
    "data.document_sampling=epoch", "model.embedding_size=16", "model.hidden_size=32",
    "model.num_hidden_layers=2", "model.num_attention_heads=4", "model.intermediate_size=64",
    "model.initializer_range=0.02", "model.hidden_dropout_prob=0", "model.attention_probs_dropout_prob=0",
    "generator.width_multiplier=0.5", "generator.depth_multiplier=0.5", "discriminator.loss_weight=50",
    "masking.mlm_probability=0.15", "schedule.total_steps=400", "schedule.warmup_steps=40",
    "optimizer.learning_rate=1e-3", "optimizer.beta2=0.999", "optimizer.max_grad_norm=1.0",
    "tokenizer.vocab_size=400",
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def imported(code: str, modules: set[str]) -> set[str]:
    """Return which of the modules are imported by this code, in an interpreter of its own."""
    script = f"import sys; {code}; print(); print(*({modules!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    return set(done.stdout.splitlines()[-1].split())


def write_corpus(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """Text files of very unequal length, sentences over a made-up Zipfian vocabulary."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, rng.integers(2, 8))) for _ in range(500)]
    weights = 1 / np.arange(1, len(words) + 1)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(documents):
        lines = []
        for _ in range(int(rng.integers(1, 40)) if index % 3 else 1):
            chosen = rng.choice(words, rng.integers(3, 12), p=weights / weights.sum())
            lines.append(" ".join(chosen).capitalize() + ".")
        (folder / f"{index:03d}.txt").write_text("\n".join(lines) + "\n", "utf8")
    return folder


def small_recipe(*overrides: str) -> Recipe:
    return load_recipe("tiny", [*SMALL, *overrides])


def cpu_plan(recipe: Recipe, **values: Any) -> DeepSpeedPlan:
    world_size = distributed.get_world_size() if distributed.is_initialized() else 1
    return resolve(values, recipe, world_size=world_size, auto_fp16=False, source="test")


def shape_of(recipe: Recipe, vocab_size: int) -> StepShape:
    objective: Objective[Any] = Objective.of(recipe, vocab_size)
    assert objective.shape is not None
    return objective.shape


def to_transformers(model: Electra) -> tuple[ElectraForMaskedLM, ElectraForPreTraining]:
    from electra_ds.pretraining.convert import discriminator, masked_lm

    return masked_lm(model, "generator"), discriminator(model)


def builder_for(store: TokenStore, recipe: Recipe) -> BatchBuilder:
    return BatchBuilder(store, split_holdout(store.documents, recipe.data, recipe.seed).train, recipe, recipe.seed)


def model_for(store: TokenStore, recipe: Recipe) -> Electra:
    return Electra(recipe, store.tokenizer.vocab_size, store.tokenizer.pad_id)
