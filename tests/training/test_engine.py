"""The DeepSpeed engine against the plain control, under every batch plan and precision."""

from __future__ import annotations

import math
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from electra_ds.config.deepspeed_sections import LossScaling
from electra_ds.config.recipe import Recipe
from electra_ds.config.sections import OptimizerSection
from electra_ds.core.errors import ConfigError
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.engine import PretrainingEngine
from electra_ds.pretraining.plain import PlainEngine
from electra_ds.training.optimizer import MasterAdamW, parameter_groups
from tests.helpers import builder_for, cpu_plan, model_for, small_recipe

CPU = torch.device("cpu")
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 12, "loss_scale_window": 100}}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": FP16,
    "autocast-bf16": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "autocast-fp16": {"torch_autocast": {"enabled": True, "dtype": "float16"}},
}


def run_deepspeed(
    store: TokenStore, recipe: Recipe, steps: int, samples: list[Any] | None = None, **values: Any
) -> tuple[list[float], PretrainingEngine]:
    engine = PretrainingEngine(model_for(store, recipe), recipe, cpu_plan(recipe, **values), CPU)
    builder = builder_for(store, recipe)
    losses = []
    for step in range(steps):
        result = engine.train_step(builder.build(step), step, None if samples is None else samples[step])
        losses.append(result["loss"].item())
    return losses, engine


def run_plain(store: TokenStore, recipe: Recipe, steps: int) -> tuple[list[float], list[Any], PlainEngine]:
    engine = PlainEngine(model_for(store, recipe), recipe, recipe.global_batch_size, CPU)
    builder = builder_for(store, recipe)
    losses, samples = [], []
    for step in range(steps):
        result, drawn = engine.train_step(builder.build(step), step)
        losses.append(result["loss"].item())
        samples.append(drawn)
    return losses, samples, engine


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("count", ["bernoulli", "fixed"])
def test_any_batch_plan_gives_the_same_losses(store: TokenStore, count: str) -> None:
    """32 x 1, 8 x 4 and 4 x 8 over 30 steps, documents of unequal length, samples drawn anew in each."""
    recipe = small_recipe("global_batch_size=32", f"masking.count={count}", "schedule.total_steps=60")
    runs = {}
    for micro in (32, 8, 4):
        runs[micro], engine = run_deepspeed(store, recipe, 30, train_micro_batch_size_per_gpu=micro)
        engine.close()
    for micro in (8, 4):
        np.testing.assert_allclose(runs[micro], runs[32], rtol=1e-5)
    assert runs[32][-1] < runs[32][0]  # and something was learned meanwhile


@pytest.fixture(scope="module")
def control(store: TokenStore) -> tuple[Recipe, list[float], list[Any]]:
    recipe = small_recipe("schedule.total_steps=160", "schedule.warmup_steps=16")
    losses, samples, _ = run_plain(store, recipe, 160)
    return recipe, losses, samples


@pytest.mark.slow
@pytest.mark.usefixtures("process_group", "half_on_cpu")
@pytest.mark.parametrize("name", PRECISIONS)
def test_every_precision_at_stage_0_follows_the_plain_control(
    store: TokenStore, control: tuple[Recipe, list[float], list[Any]], name: str
) -> None:
    recipe, expected, samples = control
    losses, engine = run_deepspeed(store, recipe, 160, samples, **PRECISIONS[name])
    engine.close()
    if name == "fp32":
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert np.mean(losses[-20:]) == pytest.approx(np.mean(expected[-20:]), rel=0.02)
    assert np.mean(expected[-20:]) < 0.95 * np.mean(expected[:20])
    assert engine.optimizer.taken_steps + int(engine.optimizer.skipped_steps) == 160


@pytest.mark.usefixtures("process_group", "half_on_cpu")
def test_the_loss_scale_backs_off_grows_and_skipped_steps_are_counted(store: TokenStore) -> None:
    recipe = small_recipe()
    fp16 = {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 10, "hysteresis": 1}
    engine = PretrainingEngine(model_for(store, recipe), recipe, cpu_plan(recipe, fp16=fp16), CPU)
    builder = builder_for(store, recipe)
    scales, skips = [], 0
    for step in range(60):
        before = {name: tensor.clone() for name, tensor in engine.optimizer.snapshot().items()}
        norm = engine.train_step(builder.build(step), step)["grad_norm"]
        scales.append(engine.optimizer.loss_scale.item())
        if not math.isfinite(norm.item()):
            skips += 1
            assert all(torch.equal(before[name], now) for name, now in engine.optimizer.snapshot().items())
    assert scales[0] == 2**23  # the first step overflows at 2**24
    assert min(scales) < scales[0]
    assert max(scales[scales.index(min(scales)) :]) > min(scales)
    assert skips == int(engine.optimizer.skipped_steps) > 0
    assert engine.optimizer.taken_steps == 60 - skips
    assert engine.module.discriminator.embeddings.word_embeddings.weight.dtype == torch.float16
    engine.close()


@pytest.mark.usefixtures("process_group")
def test_clipping_clips(store: TokenStore) -> None:
    """The first update under a tiny norm limit has Adam's direction, so look at its first moment instead."""
    limit = 1e-3
    recipe = small_recipe(f"optimizer.max_grad_norm={limit}", "schedule.warmup_steps=0", "optimizer.beta1=0.9")
    _, engine = run_deepspeed(store, recipe, 1)
    moments = {n: t for n, t in engine.optimizer.snapshot().items() if n.startswith("exp_avg/")}
    norm = torch.linalg.vector_norm(torch.cat([t.flatten() for t in moments.values()])).item()
    assert norm == pytest.approx(0.1 * limit, rel=1e-4)  # (1 - beta1) * clipped gradient
    assert engine.optimizer.grad_norm.item() > limit
    engine.close()


@pytest.mark.usefixtures("process_group")
def test_accumulated_gradients_are_those_of_the_whole_batch(store: TokenStore) -> None:
    """No division by the accumulation steps sneaks in: the norm is the control's."""
    recipe = small_recipe()
    plain = PlainEngine(model_for(store, recipe), recipe, 8, CPU)
    engine = PretrainingEngine(
        model_for(store, recipe), recipe, cpu_plan(recipe, train_micro_batch_size_per_gpu=2), CPU
    )
    batch = builder_for(store, recipe).build(0)
    expected = plain.train_step(batch, 0)[0]
    found = engine.train_step(batch, 0)
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-5)
    engine.close()


@pytest.mark.usefixtures("process_group")
def test_fp16_on_a_cpu_is_refused_with_what_to_do(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)  # some CPUs have it
    recipe = small_recipe()
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        PretrainingEngine(model_for(store, recipe), recipe, cpu_plan(recipe, **FP16), CPU)


# --- the optimizer alone


def tiny_module() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3))


SECTION = OptimizerSection(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5)


def test_biases_and_norms_do_not_decay(store: TokenStore) -> None:
    model = model_for(store, small_recipe())
    decaying, exempt = parameter_groups(model.named_parameters(), 0.01)
    assert all(p.dim() == 2 for p in decaying["params"])
    assert all(p.dim() == 1 for p in exempt["params"])
    assert len(decaying["params"]) + len(exempt["params"]) == len(list(model.parameters()))
    assert (decaying["weight_decay"], exempt["weight_decay"]) == (0.01, 0.0)


def test_fp32_updates_are_torchs_adamw() -> None:
    ours, theirs = tiny_module(), tiny_module()
    optimizer = MasterAdamW(ours.named_parameters(), SECTION, None)
    reference = torch.optim.AdamW(
        [
            {"params": [p for n, p in theirs.named_parameters() if not n.endswith("bias")], "weight_decay": 0.1},
            {"params": [p for n, p in theirs.named_parameters() if n.endswith("bias")], "weight_decay": 0.0},
        ],
        lr=1e-2, betas=(0.9, 0.999), eps=1e-6,
    )  # fmt: skip
    for step in range(30):
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)) * 10
        for module, update in ((ours, optimizer.step), (theirs, reference.step)):
            module(inputs).square().sum().backward()
            if module is theirs:
                torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
            update()
            module.zero_grad()
    for mine, reference_parameter in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference_parameter, rtol=1e-5, atol=1e-7)
    assert optimizer.taken_steps == 30


def test_without_bias_correction_the_update_is_the_originals() -> None:
    """google-research/electra, AdamWeightDecayOptimizer, written out in float64; decay off for biases."""
    section = SECTION.model_copy(update={"bias_correction": False, "max_grad_norm": 1e9})
    module = tiny_module()
    optimizer = MasterAdamW(module.named_parameters(), section, None)
    by_hand = {name: parameter.detach().double().numpy().copy() for name, parameter in module.named_parameters()}
    first = {name: np.zeros_like(value) for name, value in by_hand.items()}
    second = {name: np.zeros_like(value) for name, value in by_hand.items()}
    for step in range(30):
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        module(inputs).square().sum().backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            gradient = parameter.grad.double().numpy()
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            decay = 0.0 if name.endswith("bias") else 0.1
            update = first[name] / (np.sqrt(second[name]) + 1e-6) + decay * by_hand[name]
            by_hand[name] = by_hand[name] - 1e-2 * update
        optimizer.step()
        module.zero_grad()
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), by_hand[name], rtol=2e-5, atol=2e-6)
    assert optimizer.taken_steps == 30


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("bias_correction", [True, False])
def test_every_stage_updates_as_the_plain_engine_does(store: TokenStore, bias_correction: bool) -> None:
    recipe = small_recipe(f"optimizer.bias_correction={bias_correction}", "schedule.warmup_steps=2")
    expected, _, plain = run_plain(store, recipe, 8)
    weights = {name: parameter.detach() for name, parameter in plain.module.named_parameters()}
    for stage in (0, 1, 2, 3):
        losses, engine = run_deepspeed(
            store, recipe, 8, train_micro_batch_size_per_gpu=4, zero_optimization={"stage": stage}
        )
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        tensors = engine.optimizer.snapshot()
        assert engine.optimizer.taken_steps == 8
        engine.close()
        assert {name for name in tensors if name.startswith("master/")} == {f"master/{name}" for name in weights}
        for name, weight in weights.items():
            torch.testing.assert_close(tensors[f"master/{name}"], weight, rtol=1e-3, atol=2e-5)


@pytest.mark.usefixtures("process_group", "half_on_cpu")
def test_a_growing_loss_scale_changes_no_update_at_any_stage(store: TokenStore) -> None:
    """It doubles after every second good step here; DeepSpeed alone would halve the gradients of those steps."""
    recipe = small_recipe("schedule.warmup_steps=0", "optimizer.max_grad_norm=1e9")
    _, samples, plain = run_plain(store, recipe, 5)
    expected = torch.cat([plain.optimizer.state[p]["exp_avg"].flatten() for p in plain.module.parameters()]).norm()
    fp16 = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 1}
    for stage in (0, 1, 2, 3):
        _, engine = run_deepspeed(store, recipe, 5, samples, fp16=fp16, zero_optimization={"stage": stage})
        moments = [t.flatten() for name, t in engine.optimizer.snapshot().items() if name.startswith("exp_avg/")]
        assert engine.optimizer.counters()["loss_scale"] > 2**4
        assert engine.optimizer.taken_steps == 5
        engine.close()
        assert torch.cat(moments).norm().item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.usefixtures("process_group", "half_on_cpu")
@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 2), (2, 3), (3, 0), (0, 3), (2, 0)])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_state_goes_on_at_another_stage(store: TokenStore, before: int, after: int, precision: str) -> None:
    recipe = small_recipe("schedule.warmup_steps=2")
    builder = builder_for(store, recipe)
    values = {"fp16": {"enabled": True, "initial_scale_power": 8}} if precision == "fp16" else {}

    def engine(stage: int) -> PretrainingEngine:
        plan = cpu_plan(recipe, zero_optimization={"stage": stage}, **values)
        return PretrainingEngine(model_for(store, recipe), recipe, plan, CPU)

    first = engine(before)
    for step in range(4):
        first.train_step(builder.build(step), step)
    tensors = {name: tensor.clone() for name, tensor in first.optimizer.snapshot().items()}
    counters = first.optimizer.counters()
    straight = [first.train_step(builder.build(step), step)["loss"].item() for step in range(4, 8)]
    first.close()
    second = engine(after)
    second.optimizer.load(tensors, counters)
    again = second.optimizer.snapshot()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
    assert second.optimizer.counters() == counters
    losses = [second.train_step(builder.build(step), step)["loss"].item() for step in range(4, 8)]
    second.close()
    np.testing.assert_allclose(losses, straight, rtol=1e-5 if precision == "fp32" else 1e-3)


class NoReads(TorchDispatchMode):
    """Fails where a tensor's value is read by the host, which on a GPU would wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the step waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("process_group", "half_on_cpu")
@pytest.mark.parametrize("name", PRECISIONS)
def test_a_whole_step_never_reads_back_from_the_device(store: TokenStore, name: str) -> None:
    recipe = small_recipe()
    plan = cpu_plan(recipe, **PRECISIONS[name], train_micro_batch_size_per_gpu=4)
    engine = PretrainingEngine(model_for(store, recipe), recipe, plan, CPU)
    batch = builder_for(store, recipe).build(0)
    with NoReads():
        result = engine.train_step(batch, 0)
    assert math.isfinite(result["loss"].item())
    with pytest.raises(AssertionError, match="waits for the device"), NoReads():
        result["loss"].item()
    engine.close()


def test_a_loss_scale_that_has_come_down_to_one_is_resumed_at_one() -> None:
    scaling = LossScaling(initial_scale=8.0, hysteresis=1)
    module = tiny_module().half()
    first = MasterAdamW(module.named_parameters(), SECTION, scaling)
    for _ in range(3):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, math.inf)
        first.step()
    assert first.loss_scale.item() == 1.0
    second = MasterAdamW(tiny_module().half().named_parameters(), SECTION, scaling)
    second.load(first.tensors(), first.counters())
    assert second.counters() == first.counters()


@pytest.mark.usefixtures("process_group")
@given(
    overflows=st.lists(st.booleans(), min_size=1, max_size=60),
    window=st.integers(1, 6),
    hysteresis=st.integers(1, 3),
    consecutive=st.booleans(),
    power=st.integers(0, 8),
)
@settings(max_examples=80)
def test_the_loss_scale_moves_as_deepspeeds_own_scaler_does(
    overflows: list[bool], window: int, hysteresis: int, consecutive: bool, power: int
) -> None:
    deepspeed.init_distributed(dist_init_required=False)  # the scaler asks for its rank
    theirs = DynamicLossScaler(
        init_scale=2.0**power, scale_window=window, min_scale=1.0, delayed_shift=hysteresis,
        consecutive_hysteresis=consecutive, raise_error_at_min_scale=False, dtype=torch.half,
    )  # fmt: skip
    scaling = LossScaling(2.0**power, True, window, hysteresis, consecutive, 1.0)
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = MasterAdamW([("weight", parameter)], SECTION, scaling)
    for overflow in overflows:
        parameter.grad = torch.full((2, 2), math.inf if overflow else 1.0)
        optimizer.step()
        theirs.update_scale(overflow)
        assert optimizer.loss_scale.item() == theirs.cur_scale
    assert optimizer.taken_steps == overflows.count(False)
    assert int(optimizer.skipped_steps) == overflows.count(True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_non_finite_gradient_changes_nothing_in_any_precision(dtype: torch.dtype) -> None:
    module = tiny_module().to(dtype)
    optimizer = MasterAdamW(module.named_parameters(), SECTION, None)
    before = {name: tensor.clone() for name, tensor in optimizer.snapshot().items()}
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(module.parameters()).grad.view(-1)[0] = math.nan  # type: ignore[union-attr]
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.snapshot().items())
    assert (optimizer.taken_steps, int(optimizer.skipped_steps), int(optimizer.consecutive_skips)) == (0, 1, 1)


def test_half_weights_follow_fp32_masters_that_keep_what_half_would_lose() -> None:
    module = torch.nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    start = module.weight.detach().float()
    optimizer = MasterAdamW(module.named_parameters(), OptimizerSection(learning_rate=1e-5, weight_decay=0), None)
    for _ in range(100):
        module.weight.grad = torch.ones_like(module.weight)
        optimizer.step()
    master = optimizer.tensors()["master/weight"]
    torch.testing.assert_close(master, start - 100 * 1e-5, rtol=0, atol=2e-6)
    assert torch.equal(module.weight, master.to(torch.bfloat16))


def test_state_moves_between_precisions() -> None:
    full = tiny_module()
    first = MasterAdamW(full.named_parameters(), SECTION, None)
    full(torch.randn(4, 5)).square().sum().backward()
    first.step()
    half = tiny_module().half()
    second = MasterAdamW(half.named_parameters(), SECTION, LossScaling(initial_scale=256.0))
    second.load(first.tensors(), first.counters())
    assert all(torch.equal(tensor, first.tensors()[name]) for name, tensor in second.tensors().items())
    assert second.taken_steps == 1
    assert second.loss_scale.item() == 256.0  # fp32 had none, so it starts from the configured one
    assert torch.equal(half[0].weight, full[0].weight.half())


@pytest.mark.gpu
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", PRECISIONS)
def test_every_precision_follows_the_control_on_a_gpu(
    store: TokenStore, control: tuple[Recipe, list[float], list[Any]], name: str
) -> None:
    recipe, expected, samples = control
    device = torch.device("cuda", 0)
    engine = PretrainingEngine(model_for(store, recipe), recipe, cpu_plan(recipe, **PRECISIONS[name]), device)
    builder = builder_for(store, recipe)
    losses = [
        engine.train_step(builder.build(step), step, [s.to(device) for s in samples[step]])["loss"].item()
        for step in range(300)
    ]
    engine.close()
    assert np.mean(losses[-20:]) == pytest.approx(np.mean(expected[-20:]), rel=0.02)


OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}


@pytest.mark.gpu
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "zero", [{"stage": 1}, {"stage": 2}, {"stage": 2, **OFFLOAD}, {"stage": 3}, {"stage": 3, **OFFLOAD}], ids=str
)
def test_every_stage_follows_the_control_on_a_gpu_and_gives_and_takes_its_state(
    store: TokenStore, control: tuple[Recipe, list[float], list[Any]], zero: dict[str, Any], precision: str
) -> None:
    recipe, expected, samples = control
    device = torch.device("cuda", 0)
    plan = cpu_plan(recipe, zero_optimization=zero, **PRECISIONS[precision])
    engine = PretrainingEngine(model_for(store, recipe), recipe, plan, device)
    builder = builder_for(store, recipe)
    losses = []
    for step in range(300):
        if step == 150:
            tensors, counters = engine.optimizer.snapshot(), engine.optimizer.counters()
            engine.close()
            engine = PretrainingEngine(model_for(store, recipe), recipe, plan, device)
            engine.optimizer.load(tensors, counters)
        replay = [sample.to(device) for sample in samples[step]]
        losses.append(engine.train_step(builder.build(step), step, replay)["loss"].item())
    engine.close()
    assert np.mean(losses[-20:]) == pytest.approx(np.mean(expected[-20:]), rel=0.02)


@pytest.mark.gpu
def test_noise_is_the_same_on_a_gpu_as_on_the_cpu() -> None:
    from electra_ds.model.heads import column_keys, exponential_noise

    rows = torch.arange(-50, 50, dtype=torch.int32) * 7919
    on_cpu = exponential_noise(rows, column_keys(3000))
    on_gpu = exponential_noise(rows.cuda(), column_keys(3000).cuda()).cpu()
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-6, atol=0)
