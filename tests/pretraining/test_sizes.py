"""The recipes of the published models: their sizes, and steps of the large ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining, ElectraModel

from electra_ds.config.recipe import load_recipe
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.batches import objective_of
from electra_ds.pretraining.engine import PretrainingEngine
from electra_ds.pretraining.objectives.electra import ElectraObjective
from tests.helpers import builder_for, cpu_plan

VOCAB_SIZE = 30_522
# config.json of google/electra-small-discriminator and so on; what is not named has ElectraConfig's default.
SMALL = {"embedding_size": 128, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
BASE = {"embedding_size": 768, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
LARGE = {
    "embedding_size": 1024, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 24,
}  # fmt: skip
QUARTER_OF_LARGE = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("recipe", "discriminator", "generator", "encoder_parameters"),
    [
        ("electra-small", SMALL, {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1}, 13_483_008),
        ("electra-small++", SMALL, {}, 13_483_008),
        ("electra-base", BASE, QUARTER_OF_LARGE, 108_891_648),  # a third of 768 is the same
        ("electra-large", LARGE, QUARTER_OF_LARGE, 334_092_288),
    ],
)
def test_parameters_are_those_of_the_published_models_to_the_unit(
    recipe: str, discriminator: dict[str, int], generator: dict[str, int], encoder_parameters: int
) -> None:
    with torch.device("meta"):
        encoder = ElectraModel(ElectraConfig(vocab_size=VOCAB_SIZE, **discriminator))
        judge = ElectraForPreTraining(encoder.config)
        writer = ElectraForMaskedLM(ElectraConfig(vocab_size=VOCAB_SIZE, **discriminator | generator))
    assert count(encoder) == encoder_parameters
    shared = count(writer.electra.embeddings)
    counts = ElectraObjective(load_recipe(recipe), VOCAB_SIZE).parameter_counts()
    assert counts == {"discriminator": count(judge), "generator": count(writer) - shared}


@pytest.mark.nightly
@pytest.mark.parametrize("recipe", ["electra-base", "electra-large", "fast-electra-base", "all-tokens-mlm-base"])
def test_steps_of_the_large_recipes_with_recomputed_layers(
    store: TokenStore, process_group: Ranks, recipe: str
) -> None:
    """A batch of two rows; of one with two micro-batches the second loss is the same."""
    losses = {}
    for size in (2, 1):
        values: dict[str, Any] = {
            "extends": recipe,
            "global_batch_size": 2,
            "data": {"segments": "one", "sequence_length": 64, "holdout_by": "document"},
        }
        chosen = load_recipe(values, ["schedule.warmup_steps=1", "model.hidden_dropout_prob=0",
                                      "model.attention_probs_dropout_prob=0"])  # fmt: skip
        plan = cpu_plan(
            chosen, train_micro_batch_size_per_gpu=size, activation_checkpointing={"number_checkpoints": 24}
        )
        engine = PretrainingEngine(
            objective_of(chosen, store.tokenizer).build_model(), chosen, plan, torch.device("cpu")
        )
        builder = builder_for(store, chosen)
        try:
            losses[size] = [engine.train_step(builder.build(step), step)["loss"].item() for step in range(3)]
        finally:
            engine.close()
    assert np.isfinite(losses[2]).all()
    np.testing.assert_allclose(losses[1], losses[2], rtol=1e-3)
