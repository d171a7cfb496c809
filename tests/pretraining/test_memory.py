"""The memory model against what torch itself tells."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from electra_ds.config.deepspeed import DeepSpeedPlan, resolve
from electra_ds.config.names import recipe_names
from electra_ds.config.recipe import Recipe, load_recipe
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining import run_time
from electra_ds.pretraining.electra import Electra
from electra_ds.pretraining.engine import PretrainingEngine
from electra_ds.pretraining.memory import peak_memory, saved_bytes
from electra_ds.pretraining.objectives.base import Objective
from electra_ds.pretraining.objectives.electra import ElectraObjective
from electra_ds.pretraining.step_shape import StepShape
from electra_ds.training.step import AutocastModel
from tests.helpers import builder_for, model_for, shape_of, small_recipe
from tests.memory_tracking import DTYPES, Tracker, cuda_kernels_on_meta, saved_for_backward  # noqa: F401

PRECISIONS = ("fp32", "bf16", "fp16", "autocast-bf16", "autocast-fp16")


def plan_of(recipe: Recipe, precision: str = "fp32", world_size: int = 1, **values: object) -> DeepSpeedPlan:
    section: dict[str, object] = {} if precision == "fp32" else {precision: {"enabled": True}}
    if precision.startswith("autocast"):
        section = {"torch_autocast": {"enabled": True, "dtype": precision.split("-")[1]}}
    return resolve({**section, **values}, recipe, world_size=world_size, auto_fp16=False, source="test")


def set_up(recipe: Recipe, vocab_size: int, precision: str) -> AutocastModel:
    objective: Objective[Any] = Objective.of(recipe, vocab_size)
    model = objective.build_model().train().to(DTYPES.get(precision, torch.float32))
    if precision.startswith("autocast"):
        model.autocast_dtype = DTYPES[precision.removeprefix("autocast-")]
    return model


def measured_saved_bytes(recipe: Recipe, vocab_size: int, size: int, precision: str) -> int:
    model = set_up(recipe, vocab_size, precision)
    with saved_for_backward(*model.parameters(), *model.buffers()) as saved:
        output = model(Objective.of(recipe, vocab_size).longest_micro_batch(size))
        _ = torch.stack(list(output.losses.values())).sum()
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [name for name in recipe_names() if not name.endswith(("-base", "-large", "++"))])
def test_saved_bytes_of_the_shipped_recipes_are_those_that_autograd_saves(name: str, precision: str) -> None:
    recipe = load_recipe(name, [])
    vocab_size = recipe.tokenizer.vocab_size
    size = 1 if "fp16" in precision else 4  # a CPU takes its time over fp16
    predicted = saved_bytes(shape_of(recipe, vocab_size), size, precision, "cpu").total
    assert predicted == pytest.approx(measured_saved_bytes(recipe, vocab_size, size, precision), rel=0.005)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    heads, head_size = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([8, 32, 64]))
    hidden = heads * head_size
    values = {
        "global_batch_size": draw(st.integers(1, 8)),
        "data.sequence_length": draw(st.sampled_from([16, 48, 128])),
        "model.embedding_size": draw(st.sampled_from([hidden, 32, 40])),
        "model.hidden_size": hidden,
        "model.num_hidden_layers": draw(st.integers(1, 3)),
        "model.num_attention_heads": heads,
        "model.intermediate_size": draw(st.sampled_from([2, 4])) * hidden,
        "model.hidden_dropout_prob": draw(st.sampled_from([0, 0.1])),
        "model.attention_probs_dropout_prob": draw(st.sampled_from([0, 0.1])),
        "masking.count": draw(st.sampled_from(["bernoulli", "fixed"])),
        "masking.mlm_probability": draw(st.sampled_from([0.15, 0.4])),
    }
    sharing = draw(st.sampled_from(["embeddings", "tokens", "none", "all"]))
    width = 1.0 if sharing == "all" else draw(st.sampled_from([0.25, 0.5, 1.0]))
    values |= {"generator.sharing": sharing, "generator.width_multiplier": width, "generator.depth_multiplier": 1.0}
    return load_recipe("tiny", [f"{key}={value}" for key, value in values.items()])


@settings(max_examples=60)
@given(recipes(), st.integers(300, 3000), st.sampled_from(PRECISIONS))
def test_saved_bytes_of_any_recipe_are_within_three_percent(recipe: Recipe, vocab_size: int, precision: str) -> None:
    size = recipe.global_batch_size
    predicted = saved_bytes(shape_of(recipe, vocab_size), size, precision, "cpu").total
    assert predicted == pytest.approx(measured_saved_bytes(recipe, vocab_size, size, precision), rel=0.03)


@settings(max_examples=20)
@given(recipes(), st.integers(300, 3000))
def test_parameters_are_counted_without_the_model(recipe: Recipe, vocab_size: int) -> None:
    sizes = {True: 0, False: 0}
    for name, parameter in Electra(recipe, vocab_size, 0).named_parameters():
        sizes[name.startswith("discriminator")] += parameter.numel()
    counts = ElectraObjective(recipe, vocab_size).parameter_counts()
    assert counts == {"generator": sizes[False], "discriminator": sizes[True]}


class Tracked:
    """One forward and backward pass with CUDA's kernels, on the meta device."""

    def __init__(self, recipe: Recipe, size: int, precision: str) -> None:
        vocab_size = recipe.tokenizer.vocab_size
        model = set_up(recipe, vocab_size, precision).to("meta")
        batch = ElectraObjective(recipe, vocab_size).longest_micro_batch(size).to(torch.device("meta"))
        self.tracker = Tracker()
        for parameter in model.parameters():
            self.tracker.note(parameter)
        with self.tracker:
            with saved_for_backward(*model.parameters(), *model.buffers()) as saved:
                output = model.run(batch, None)
                loss = output.generator_loss_sum + output.discriminator_loss_sum
            self.saved_bytes = sum(storage.nbytes() for storage in saved.values())
            saved.clear()
            del output
            loss.backward()


@pytest.mark.usefixtures("cuda_kernels_on_meta")
@pytest.mark.parametrize(
    ("name", "size", "precision", "overrides"),
    [
        ("rc2020-small", 128, "fp16", ()),
        ("rc2020-small", 128, "fp32", ()),
        ("rc2020-small", 64, "bf16", ()),
        ("rc2020-small", 8, "fp16", ()),
        ("rc2020-small", 8, "fp32", ()),
        ("rc2020-small", 32, "fp16", ("data.sequence_length=512",)),
        ("electra-small", 128, "fp16", ("generator.temperature=0.5",)),
        ("tiny", 16, "fp16", ()),
        ("mini", 32, "fp32", ()),
    ],
)
def test_the_gpu_model_agrees_with_torchs_own_shapes(
    name: str, size: int, precision: str, overrides: tuple[str, ...]
) -> None:
    gc.collect()
    recipe = load_recipe(name, [f"global_batch_size={size}", *overrides])
    vocab_size = recipe.tokenizer.vocab_size
    tracked = Tracked(recipe, size, precision)
    shape = shape_of(recipe, vocab_size)
    saved = saved_bytes(shape, size, precision, "cuda")
    assert saved.total == pytest.approx(tracked.saved_bytes, rel=0.002)
    memory = peak_memory(shape, plan_of(recipe, precision))
    flat_gradients = 0 if precision == "fp32" else 4 * shape.trained_parameters
    cublas = memory.update.workspace - flat_gradients
    of_passes = max(memory.head.total, memory.backward.total) - memory.backward.optimizer - cublas
    assert of_passes == pytest.approx(tracked.tracker.peak_bytes, rel=0.1)


@pytest.mark.usefixtures("cuda_kernels_on_meta")
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_the_rooflines_traffic_and_operations_are_those_of_a_step(precision: str) -> None:
    recipe = load_recipe("rc2020-small", [])
    vocab_size, size = recipe.tokenizer.vocab_size, recipe.global_batch_size
    tracked = Tracked(recipe, size, precision)
    shape = shape_of(recipe, vocab_size)
    saved = saved_bytes(shape, size, precision, "cuda")
    selected = len(ElectraObjective(recipe, vocab_size).longest_micro_batch(size).selected_M)
    traffic = run_time.TRAFFIC_OF_SAVED * sum(saved.encoders)
    traffic += run_time.TRAFFIC_OF_LOGITS * 4 * selected * vocab_size
    assert traffic == pytest.approx(tracked.tracker.traffic_bytes, rel=0.1)
    operations = run_time.step_operations(shape, plan_of(recipe, precision))
    assert operations == pytest.approx(tracked.tracker.operations, rel=0.1)


def test_the_small_layers_operations_are_those_that_torch_calls() -> None:
    call = run_time.small_layer()
    call()
    with Tracker() as tracker:
        call()
    assert tracker.operations == pytest.approx(run_time.LAYER_OPERATIONS, rel=0.1)


def test_the_largest_micro_batch_fits_and_the_next_larger_does_not() -> None:
    recipe = load_recipe("rc2020-small", ["global_batch_size=96"])
    plan = plan_of(recipe, "fp16")
    sizes = [cut.micro_batch_size for cut in plan.batch.alternatives()]
    assert sizes == [96, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1]
    shape = shape_of(recipe, 30522)
    peaks = [peak_memory(shape, plan.with_micro_batch(size)).card_bytes for size in sizes]
    assert peaks == sorted(peaks, reverse=True)
    for size, peak in zip(sizes, peaks, strict=True):
        found = _largest(plan, shape, peak)
        assert found is not None
        assert found.batch.micro_batch_size == size
        assert found.document["gradient_accumulation_steps"] == 96 // size
        smaller = _largest(plan, shape, peak - 1)
        assert smaller is None or smaller.batch.micro_batch_size < size


def _largest(plan: DeepSpeedPlan, shape: StepShape, free_bytes: int) -> DeepSpeedPlan | None:
    return plan.with_largest_micro_batch(lambda cut: peak_memory(shape, cut).card_bytes <= free_bytes)


@pytest.mark.parametrize("name", recipe_names())
def test_sharding_and_offloading_only_ever_save(name: str) -> None:
    recipe = load_recipe(name, [])
    shape = shape_of(recipe, recipe.tokenizer.vocab_size)
    base = {"train_micro_batch_size_per_gpu": 1}

    def resting(world_size: int, **zero: object) -> int:
        plan = plan_of(recipe, "fp16", world_size, zero_optimization=zero, **base)
        return peak_memory(shape, plan).update.optimizer

    whole = resting(1, stage=0)
    assert whole == 12 * shape.trained_parameters  # masters and two moments, 4 bytes each
    assert resting(2, stage=1) == whole // 2
    assert resting(4, stage=2) == whole // 4
    assert resting(2, stage=3, offload_optimizer={"device": "cpu"}) == 0


@pytest.mark.usefixtures("cuda_kernels_on_meta")
def test_all_layers_share_one_attention_mask_on_a_gpu() -> None:
    """Padding costs one mask in the queries' dtype, not one for each of the 24 layers."""
    recipe = load_recipe("rc2020-small", [])
    model = set_up(recipe, 1000, "fp16").to("meta")
    full = ElectraObjective(recipe, 1000).longest_micro_batch(4)
    rows, length = full.ids_BT.shape
    sequences_BT = torch.ones(rows, length, dtype=torch.int32)
    sequences_BT[:, -3:] = 2
    packed = full._replace(
        sequences_BT=sequences_BT, positions_BT=torch.arange(length).expand(rows, length).contiguous()
    )
    kept = []
    for batch in (full, packed):
        with saved_for_backward(*model.parameters(), *model.buffers()) as saved:
            output = model.run(batch.to(torch.device("meta")), None)
            _ = output.generator_loss_sum + output.discriminator_loss_sum
        kept.append(sum(storage.nbytes() for storage in saved.values()))
    mask, positions = 2 * rows * length * length, 8 * rows * length
    assert kept[1] - kept[0] == mask + positions


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zeros_buffers_are_as_large_as_the_json_says_however_small_the_model(store: TokenStore, stage: int) -> None:
    recipe = small_recipe()
    predicted, measured = [], []
    for elements in (1_000_000, 3_000_000):
        zero = {"stage": stage, "reduce_bucket_size": elements}
        plan = plan_of(recipe, zero_optimization=zero)
        tracker = Tracker()
        with tracker:
            engine = PretrainingEngine(model_for(store, recipe), recipe, plan, torch.device("cpu"))
            engine.train_step(builder_for(store, recipe).build(0), 0)
        engine.close()
        measured.append(tracker.peak_bytes)
        predicted.append(peak_memory(shape_of(recipe, store.tokenizer.vocab_size), plan, "cpu").update.buffers)
    assert measured[1] - measured[0] == pytest.approx(predicted[1] - predicted[0], rel=0.05)
    assert predicted[1] - predicted[0] == 4 * 2_000_000
