"""Learning rates by depth: what exponent a parameter gets, and what the optimizers of every ZeRO stage make of it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AlbertConfig,
    AutoModel,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    PretrainedConfig,
    RobertaConfig,
)

from electra_ds.config.deepspeed import resolve
from electra_ds.config.finetune_recipe import (
    FinetuneOptimizerSection,
    FinetuneRecipe,
    Finetuning,
    load_finetune_recipe,
)
from electra_ds.core.errors import ConfigError
from electra_ds.core.ranks import Ranks
from electra_ds.finetuning.heads import (
    TaskModel,
    check_layers,
    decay_exponent,
    finetuning_rates,
    make_encoder,
)
from electra_ds.finetuning.inputs import Labels, TaskBatchBuilder, TaskInputs
from electra_ds.finetuning.tasks.base import FinetuneTask
from electra_ds.finetuning.tasks.question_answering import QuestionAnsweringTask
from electra_ds.finetuning.tasks.sequence import SequenceTask
from electra_ds.training.engine import Engine
from electra_ds.training.optimizer import learning_rate_at
from tests.finetune_runs import NO_DROPOUT, SMALL, electra_config

KINDS = ("original", "corrected", "study")


def section(kind: str, **values: Any) -> FinetuneOptimizerSection:
    return FinetuneOptimizerSection(learning_rate=1e-3, layer_decay=0.8, layer_decay_exponents=kind, **values)


def names_of(config: PretrainedConfig) -> list[str]:
    """Of an encoder's parameters, as a `TaskModel` has them."""
    with torch.device("meta"):
        encoder = AutoModel.from_config(config)
    return [f"encoder.{name}" for name, _ in encoder.named_parameters() if not name.startswith("pooler.")]


CONFIGS = {
    "electra": lambda n: ElectraConfig(num_hidden_layers=n),
    "bert": lambda n: BertConfig(num_hidden_layers=n),
    "roberta": lambda n: RobertaConfig(num_hidden_layers=n),
    "distilbert": lambda n: DistilBertConfig(n_layers=n),
}
LAYERS = dict.fromkeys(CONFIGS, r"^encoder\.encoder\.layer\.(\d+)\.") | {
    "distilbert": r"^encoder\.transformer\.layer\.(\d+)\."
}


@pytest.mark.parametrize("model", CONFIGS)
@settings(max_examples=6, deadline=None)
@given(num_layers=st.integers(1, 24))
def test_every_parameter_of_an_encoder_gets_the_exponent_of_its_depth(model: str, num_layers: int) -> None:
    """Counted here from the recipes' own words: 0-based layer i of n."""
    n, names = num_layers, names_of(CONFIGS[model](num_layers))
    seen = set()
    for name in names:
        match = re.match(LAYERS[model], name)
        if match is None:
            assert name.startswith(("encoder.embeddings.", "encoder.embeddings_project."))
            expected = {"original": n + 2, "corrected": n + 1, "study": n - 1}
        else:
            i = int(match[1])
            seen.add(i)
            expected = {"original": n + 1 - i, "corrected": n - i, "study": n - 1 - i}
        assert {kind: decay_exponent(name, n, section(kind)) for kind in KINDS} == expected, name
    assert seen == set(range(n))


@pytest.mark.parametrize("num_layers", range(1, 25))
def test_the_ends_of_each_scheme_are_those_of_its_source(num_layers: int) -> None:
    n = num_layers
    first, last = "encoder.encoder.layer.0.output.dense.weight", f"encoder.encoder.layer.{n - 1}.output.dense.bias"
    names = ("encoder.embeddings.word_embeddings.weight", first, last, "head.out_proj.weight")
    found = {kind: [decay_exponent(name, n, section(kind)) for name in names] for kind in KINDS}
    assert found == {"original": [n + 2, n + 1, 2, 0], "corrected": [n + 1, n, 1, 0], "study": [n - 1, n - 1, 0, 0]}


@pytest.mark.parametrize("decay", KINDS)
def test_every_heads_parameters_are_never_decayed(decay: str) -> None:
    for recipe, outputs in (("rc2020", 3), ("original", 2), ("original", None), ("rc2020", None)):
        kind: type[FinetuneTask] = QuestionAnsweringTask if outputs is None else SequenceTask
        head = kind.new_head(load_finetune_recipe(recipe, "squad1"), 32, outputs)
        assert {decay_exponent(f"head.{name}", 12, section(decay)) for name, _ in head.named_parameters()} == {0}


def test_what_stands_beyond_the_layers_goes_with_the_last_one() -> None:
    for name in ("encoder.final_norm.weight", "encoder.encoder.LayerNorm.bias"):
        assert [decay_exponent(name, 12, section(kind)) for kind in KINDS] == [2, 1, 0]


def test_a_model_whose_layers_share_their_weights_is_refused_unless_nothing_decays() -> None:
    names = names_of(AlbertConfig(**SMALL, embedding_size=16))
    with pytest.raises(ConfigError, match=r"do not show its layers.* Add --set optimizer\.layer_decay=1"):
        check_layers(names, section("corrected"))
    check_layers(names, section("corrected").model_copy(update={"layer_decay": 1.0}))


# --- in the optimizers


def _recipe(*overrides: str) -> FinetuneRecipe:
    return load_finetune_recipe(
        "original", "cola",
        [
            "global_batch_size=4", "optimizer.bias_correction=true", "optimizer.epsilon=1e-12", "head.dropout=0",
            "optimizer.max_grad_norm=1e6", "data.max_length=16", "schedule.warmup_share=0", *overrides,
        ],
    )  # fmt: skip


def _inputs() -> TaskInputs:
    rng = np.random.default_rng(0)
    bounds = np.arange(0, 8 * 16 + 1, 8)
    return TaskInputs(rng.integers(5, 40, 8 * 16).astype(np.int32), None, bounds, 0, Labels(rng.integers(0, 2, 16)))


def _updated(
    ranks: Ranks, stage: int, recipe: FinetuneRecipe, step: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    """Weights before and after one step at `step` of the schedule, from fresh moments; and the schedule's rate."""
    encoder = make_encoder(electra_config(**NO_DROPOUT), seed=3)
    model = TaskModel(encoder, SequenceTask.new_head(recipe, 32, 2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in model.parameters():  # biases too, whose decay could not be seen at 0
            parameter.data.normal_(0.0, 0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    inputs = _inputs()
    training = Finetuning(recipe, len(inputs), 2)
    values = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 2}
    plan = resolve(values, training, world_size=ranks.world_size, auto_fp16=False, source="test")
    rates = finetuning_rates(2, recipe.optimizer)
    engine = Engine(model, training, plan, torch.device("cpu"), rates)
    try:
        engine.train_step(TaskBatchBuilder(inputs, 4, 0).build(step), step)
        after = {
            name.removeprefix("master/"): tensor
            for name, tensor in engine.optimizer.snapshot().items()
            if name.startswith("master/")
        }
    finally:
        engine.close()
    schedule = training.schedule
    rate = learning_rate_at(step, learning_rate=recipe.optimizer.learning_rate, **schedule.model_dump())
    return before, after, rate


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_moves_by_its_own_learning_rate(process_group: Ranks, stage: int, kind: str) -> None:
    """Adam's first step is the sign of the gradient times the learning rate, which is so read off the weights."""
    recipe = _recipe(f"optimizer.layer_decay_exponents={kind}", "optimizer.layer_decay=0.5", "optimizer.weight_decay=0")
    before, after, rate = _updated(process_group, stage, recipe, step=5)
    assert rate == pytest.approx(recipe.optimizer.learning_rate * (1 - 5 / 12))
    depths = {
        "original": {"embeddings": 4, "layer.0": 3, "layer.1": 2, "head": 0},
        "corrected": {"embeddings": 3, "layer.0": 2, "layer.1": 1, "head": 0},
        "study": {"embeddings": 1, "layer.0": 1, "layer.1": 0, "head": 0},
    }[kind]
    seen = set()
    for name, start in before.items():
        [part] = [part for part in depths if part in name]
        seen.add(part)
        if name.endswith("key.bias"):  # softmax does not see it, so that its gradient is rounding alone
            continue
        expected = rate * 0.5 ** depths[part]
        moved = (after[name] - start).abs().max().item()
        assert moved == pytest.approx(expected, rel=2e-3), name
    assert seen == depths.keys()


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("on", ["all", "matrices"])
def test_weight_decay_is_on_all_parameters_or_on_matrices_alone(process_group: Ranks, stage: int, on: str) -> None:
    """What a decay of 10 moves beside what none moves: the weights themselves, at each parameter's own rate."""
    shared = (f"optimizer.weight_decay_on={on}", "optimizer.layer_decay=0.5", "optimizer.learning_rate=1e-2")
    before, plain, rate = _updated(process_group, stage, _recipe(*shared, "optimizer.weight_decay=0"))
    _, decayed, _ = _updated(process_group, stage, _recipe(*shared, "optimizer.weight_decay=10"))
    scales = finetuning_rates(2, _recipe(*shared).optimizer)
    for name, start in before.items():
        decays = on == "all" or not (name.endswith(".bias") or "LayerNorm" in name)
        expected = -10 * rate * scales(name).lr_scale * start if decays else torch.zeros_like(start)
        torch.testing.assert_close(decayed[name] - plain[name], expected, rtol=1e-3, atol=1e-6, msg=name)
