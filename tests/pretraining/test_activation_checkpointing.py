"""Layers that are computed again in the backward pass: the same numbers out of less memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.recipe import Recipe
from electra_ds.core.errors import ConfigError
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.electra import Electra
from electra_ds.pretraining.engine import PretrainingEngine
from electra_ds.pretraining.masked_batch import MicroBatch
from tests.helpers import builder_for, cpu_plan, model_for, small_recipe
from tests.memory_tracking import saved_for_backward
from tests.training.test_engine import PRECISIONS

CPU = torch.device("cpu")
LAYERS = 3
RECIPE = (
    f"model.num_hidden_layers={LAYERS}", "generator.depth_multiplier=1", "model.hidden_dropout_prob=0.1",
    "model.attention_probs_dropout_prob=0.1", "schedule.warmup_steps=0",
    "discriminator.loss_weight=1",  # at 50 the first steps overflow in fp16 and are skipped
)  # fmt: skip
SWITCHES = (
    "partition_activations", "cpu_checkpointing", "contiguous_memory_optimization",
    "synchronize_checkpoint_boundary", "profile",
)  # fmt: skip
# Nothing stays gathered for being small, so that the layers' weights come and go.
ZERO: dict[int, dict[str, Any]] = {
    1: {"stage": 1}, 2: {"stage": 2}, 3: {"stage": 3, "stage3_param_persistence_threshold": 0},
}  # fmt: skip


def three_steps(
    store: TokenStore, recipe: Recipe, layers: int, device: torch.device = CPU, **values: Any
) -> dict[str, torch.Tensor]:
    """Losses, gradient norms, and weights and moments, which are running means of the gradients, by name."""
    if layers:
        values["activation_checkpointing"] = {"number_checkpoints": layers}
    plan = cpu_plan(recipe, train_micro_batch_size_per_gpu=4, **values)
    assert plan.checkpointed_layers == layers
    engine = PretrainingEngine(model_for(store, recipe), recipe, plan, device)
    builder = builder_for(store, recipe)
    results = [engine.train_step(builder.build(step), step) for step in range(3)]
    found = {f"step {step}": torch.stack([*result.values()]) for step, result in enumerate(results)}
    assert engine.optimizer.taken_steps == 3
    found |= {name: tensor.clone() for name, tensor in engine.optimizer.snapshot().items()}
    engine.close()
    return found


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.usefixtures("process_group", "half_on_cpu")
@pytest.mark.parametrize("name", PRECISIONS)
def test_nothing_changes_bit_for_bit_in_any_precision(store: TokenStore, name: str) -> None:
    recipe = small_recipe(*RECIPE)
    expected = three_steps(store, recipe, 0, **PRECISIONS[name])
    for layers in (1, 2, LAYERS):
        assert equal(three_steps(store, recipe, layers, **PRECISIONS[name]), expected)


@pytest.mark.usefixtures("process_group", "half_on_cpu")
@pytest.mark.parametrize(
    ("stage", "precision"),
    [(1, "fp32"), (1, "fp16"), (2, "bf16"), (2, "autocast-bf16"), (3, "fp32"), (3, "fp16"),
     *(pytest.param(stage, precision, marks=pytest.mark.nightly) for stage, precision in [
         (1, "bf16"), (1, "autocast-bf16"), (2, "fp32"), (2, "fp16"), (3, "bf16"), (3, "autocast-bf16")])],
)  # fmt: skip
def test_nothing_changes_bit_for_bit_at_any_zero_stage(store: TokenStore, stage: int, precision: str) -> None:
    recipe = small_recipe(*RECIPE)
    values = {"zero_optimization": ZERO[stage], **PRECISIONS[precision]}
    expected = three_steps(store, recipe, 0, **values)
    for layers in (1, LAYERS):
        assert equal(three_steps(store, recipe, layers, **values), expected)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("stage", "sharing"),
    [(0, "embeddings"), (0, "tokens"), (0, "none"), (0, "all"), (3, "embeddings"), (3, "all"),
     pytest.param(3, "tokens", marks=pytest.mark.nightly), pytest.param(3, "none", marks=pytest.mark.nightly)],
)  # fmt: skip
def test_nothing_changes_bit_for_bit_whatever_the_encoders_share(store: TokenStore, sharing: str, stage: int) -> None:
    width = ("generator.width_multiplier=1",) if sharing == "all" else ()
    recipe = small_recipe(*RECIPE, *width, f"generator.sharing={sharing}")
    zero = {"zero_optimization": ZERO.get(stage, {"stage": 0})}
    assert equal(three_steps(store, recipe, 2, **zero), three_steps(store, recipe, 0, **zero))


@pytest.mark.usefixtures("process_group")
def test_at_stage_3_hooks_are_left_as_they_are_entered_and_all_weights_released(store: TokenStore) -> None:
    recipe = small_recipe(*RECIPE)
    plan = cpu_plan(recipe, zero_optimization=ZERO[3], activation_checkpointing={})
    engine = PretrainingEngine(model_for(store, recipe), recipe, plan, CPU)
    depth = len(parameter_offload.FWD_MODULE_STACK)
    for step in range(3):
        engine.train_step(builder_for(store, recipe).build(step), step)
        assert len(parameter_offload.FWD_MODULE_STACK) == depth
        assert {p.ds_status for p in engine.module.parameters()} == {ZeroParamStatus.NOT_AVAILABLE}
    engine.close()


@pytest.mark.gpu
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", PRECISIONS)
def test_on_a_gpu_losses_change_by_no_more_than_the_order_of_sums(store: TokenStore, name: str) -> None:
    recipe, device = small_recipe(*RECIPE), torch.device("cuda", 0)
    expected = three_steps(store, recipe, 0, device, **PRECISIONS[name])
    found = three_steps(store, recipe, LAYERS, device, **PRECISIONS[name])
    for step in ("step 0", "step 1", "step 2"):
        torch.testing.assert_close(found[step], expected[step], rtol=1e-3 if name == "fp32" else 1e-2, atol=0)


# --- the model alone


def micro_batch(store: TokenStore, rows: str) -> MicroBatch:
    recipe = small_recipe(*RECIPE, "global_batch_size=24")
    batch = builder_for(store, recipe).build(3).micro_batch(0, 24, packed=rows == "packed")
    assert (batch.positions_BT is not None) == (rows == "packed")
    assert batch.attention_mask() is not None
    return batch


def model_with(store: TokenStore, layers: int) -> Electra:
    model = model_for(store, small_recipe(*RECIPE)).train()
    for encoder in (model.generator, model.discriminator):
        encoder.checkpointed_layers = layers
    return model


@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_losses_and_gradients_are_equal_where_rows_are_padded_or_shared(store: TokenStore, rows: str) -> None:
    batch = micro_batch(store, rows)
    results = []
    for layers in range(LAYERS + 1):
        model = model_with(store, layers)
        torch.manual_seed(5)
        output = model(batch)
        loss = output.generator_loss_sum + 50 * output.discriminator_loss_sum
        loss.backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        results.append(found | {"loss": loss.detach(), "the next random number": torch.rand(1)})
    assert all(equal(found, results[0]) for found in results[1:])


def saved_bytes(run: Callable[[], Any], *known: torch.Tensor) -> int:
    """What autograd keeps for the backward pass of `run`, each storage once, without those of `known`."""
    with saved_for_backward(*known) as saved:
        output = run()
    del output
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_of_each_such_layer_the_input_alone_is_kept(store: TokenStore, rows: str) -> None:
    batch = micro_batch(store, rows)
    mask = batch.attention_mask()
    assert mask is not None
    inner = 0  # what one layer of each encoder keeps, but for its input
    model = model_with(store, 0)
    for encoder in (model.generator, model.discriminator):
        hidden = torch.randn(*batch.ids_BT.shape, encoder.config.hidden_size, requires_grad=True)
        inner += saved_bytes(partial(encoder.layers[0], hidden, mask), hidden, *model.parameters())
    everything = saved_bytes(partial(model, batch), *model.parameters())
    for layers in range(1, LAYERS + 1):
        model = model_with(store, layers)
        kept = saved_bytes(partial(model, batch), *model.parameters())
        assert kept == everything - layers * inner + mask.untyped_storage().nbytes()  # the layers hold on to one mask
    assert kept < everything / 3


def test_nothing_is_computed_again_without_training_or_gradients(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def counted(run: Callable[..., torch.Tensor], *inputs: Any, use_reentrant: bool) -> torch.Tensor:
        calls.append(run)
        return run(*inputs)

    monkeypatch.setattr("electra_ds.model.encoder.checkpoint", counted)
    model, batch = model_with(store, 2), micro_batch(store, "padded")
    with torch.no_grad():
        model(batch)
    model.eval()(batch)
    assert not calls
    model.train()(batch)
    assert len(calls) == 2 * 2  # of two encoders


# --- the section of the JSON


def plan_of(section: Any) -> DeepSpeedPlan:
    return cpu_plan(small_recipe(*RECIPE), activation_checkpointing=section)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"number_checkpoints": 2}, 2),
        ({"number_checkpoints": 2.0}, 2),
        ({"number_checkpoints": 1, "profile": False}, 1),
        ({"number_checkpoints": LAYERS}, LAYERS),
    ],
)
def test_a_number_is_taken_as_it_is_and_deepspeed_reads_the_same(section: dict[str, Any], expected: int) -> None:
    plan = plan_of(section)
    assert (plan.checkpointed_layers, plan.notes) == (expected, ())
    assert plan_of(plan.document["activation_checkpointing"]) == plan
    for document in (plan.document, plan.engine_config()):
        theirs = DeepSpeedConfig(document).activation_checkpointing_config
        assert theirs.number_checkpoints == expected
        switches = {name: value for name, value in vars(theirs).items() if name != "number_checkpoints"}
        assert set(switches.values()) == {False}
        assert set(switches) == set(SWITCHES)


@pytest.mark.parametrize(
    ("section", "note"),
    [
        ("auto", "so the backward pass recomputes all 3"),
        ({}, "so the backward pass recomputes all 3"),
        ({"number_checkpoints": "auto", "cpu_checkpointing": "auto"}, "so the backward pass recomputes all 3"),
        ({"number_checkpoints": None, "profile": "auto"}, "so the backward pass recomputes all 3"),
        ({"number_checkpoints": 100}, "is 100, which is treated as all of the recipe's 3"),
    ],
)  # fmt: skip
def test_all_layers_are_meant_where_no_number_or_a_larger_one_is_named_and_that_is_said(
    section: Any, note: str
) -> None:
    plan = plan_of(section)
    assert plan.document["activation_checkpointing"] == {"number_checkpoints": LAYERS}
    assert plan.checkpointed_layers == LAYERS
    [said] = plan.notes
    assert note in said


@pytest.mark.parametrize(
    "section",
    [
        dict.fromkeys(SWITCHES, False) | {"number_checkpoints": None},
        dict.fromkeys(SWITCHES, False),
        {"number_checkpoints": None},
        {"number_checkpoints": False},
        {"number_checkpoints": 0, "partition_activations": False},
    ],
)
def test_a_section_in_which_everything_is_off_is_off_and_a_note_says_so(section: dict[str, Any]) -> None:
    plan = plan_of(section)
    assert plan.notes == ("activation_checkpointing is off, so the backward pass recomputes no layer",)
    assert plan.document == cpu_plan(small_recipe(*RECIPE)).document


@pytest.mark.parametrize("switch", ["partition_activations", "contiguous_memory_optimization"])
def test_a_switch_for_model_parallelism_is_a_note(switch: str) -> None:
    plan = plan_of({switch: True, "number_checkpoints": 2})
    assert plan.notes == (f"activation_checkpointing.{switch} has no effect, since no model is split over ranks here",)
    assert plan.document == plan_of({"number_checkpoints": 2}).document
    assert plan_of({switch: True}).checkpointed_layers == LAYERS


def test_without_the_section_nothing_is_computed_again() -> None:
    plan = cpu_plan(small_recipe(*RECIPE))
    assert plan.checkpointed_layers == 0
    assert "activation_checkpointing" not in plan.document


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"number_checkpoints": -1}, "number_checkpoints: -1 is not a positive whole number"),
        ({"number_checkpoints": 2.5}, "number_checkpoints: 2.5 is not a positive whole number"),
        ({"number_checkpoints": True}, "number_checkpoints: True is not a positive whole number"),
        ({"number_checkpoints": "2"}, "number_checkpoints: '2' is not a positive whole number"),
        ({"number_checkpoint": 2}, "number_checkpoint: unknown key; did you mean 'number_checkpoints'"),
        ({"cpu_checkpoints": False}, "cpu_checkpoints: unknown key; did you mean 'cpu_checkpointing'"),
        (True, r'activation_checkpointing: must be an object such as {"number_checkpoints": 3}'),
        (None, "activation_checkpointing: must be an object"),
        ({"profile": "yes"}, "activation_checkpointing.profile: is not supported here; remove it"),
        *(
            ({name: True}, f"activation_checkpointing.{name}: is not supported here; remove it")
            for name in ("cpu_checkpointing", "synchronize_checkpoint_boundary", "profile")
        ),
    ],
)  # fmt: skip
def test_each_fault_of_the_section_is_named(section: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(section)
