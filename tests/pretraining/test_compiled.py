"""A compiled forward is the same function, has one shape, and gives way where it cannot be."""

from __future__ import annotations

import logging
import re
import shutil
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from electra_ds.config.run_record import Compile
from electra_ds.config.sections import MaskingSection
from electra_ds.core.errors import ConfigError
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.engine import CompiledForward, PretrainingEngine, check_compile
from electra_ds.pretraining.masking import selected_limit
from tests.helpers import builder_for, cpu_plan, model_for, small_recipe

CPU = torch.device("cpu")
# Windows long enough that no row is padded.
FULL = ("data.document_sampling=length", "data.sequence_length=16", "global_batch_size=4", "data.holdout_by=span")
ONE_LAYER = ("model.num_hidden_layers=1", "generator.depth_multiplier=1")


def unpadded_steps(store: TokenStore, recipe: Any, count: int) -> list[int]:
    builder = builder_for(store, recipe)
    steps = (step for step in range(1000) if builder.build(step).micro_batch(0, 4).sequences_BT is None)
    return [next(steps) for _ in range(count)]


def share_of_tokens(store: TokenStore, recipe: Any, step: int) -> float:
    batch = builder_for(store, recipe).build(step)
    return batch.num_tokens / batch.ids_BT.size


@pytest.mark.parametrize("count", ["bernoulli", "fixed"])
def test_a_filled_micro_batch_gives_the_same_losses_and_gradients(store: TokenStore, count: str) -> None:
    recipe = small_recipe(*FULL, f"masking.count={count}")
    [step] = unpadded_steps(store, recipe, 1)
    plain = builder_for(store, recipe).build(step).micro_batch(0, 4)
    filled = plain.filled(len(plain.selected_M) + 7)
    results = []
    for batch in (plain, filled):
        model = model_for(store, recipe).train()
        output = model(batch)
        (output.generator_loss_sum + 50 * output.discriminator_loss_sum).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        results.append([output.generator_loss_sum, output.discriminator_loss_sum, output.is_replaced_BT, *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", ["bernoulli", "fixed"])
def test_the_one_shape_holds_what_is_selected_with_little_to_spare(store: TokenStore, count: str) -> None:
    recipe = small_recipe(*FULL, f"masking.count={count}")
    most = selected_limit(recipe.masking, 4, 16)
    builder = builder_for(store, recipe)
    sizes = [len(builder.build(step).micro_batch(0, 4).selected_M) for step in range(200)]
    assert max(sizes) <= most
    if count == "fixed":
        assert most == 4 * 2 == max(sizes)  # min(round(0.15 * 16), floor(0.155 * 16)) = 2 of each
    # 128 x 126 maskable tokens: mean 2,419, standard deviation 45.3; 2,691.3 rounded up.
    assert selected_limit(MaskingSection(), 128, 128) == 2752
    assert selected_limit(MaskingSection(count="fixed"), 128, 128) == 128 * 19


def test_sequences_that_leave_much_of_their_rows_empty_are_laid_side_by_side(store: TokenStore) -> None:
    recipe = small_recipe(*FULL)
    forward = CompiledForward(model_for(store, recipe), cpu_plan(recipe), CPU, "auto")
    for step in range(50):
        batch = builder_for(store, recipe).build(step)
        found = forward.micro_batch(batch, 0, 4)
        if share_of_tokens(store, recipe, step) < 0.75:
            assert found.counts_M is None
        else:
            assert found.positions_BT is None
            assert found.ids_BT.shape == (4, 16)
            assert len(found.selected_M) == selected_limit(recipe.masking, 4, 16)


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",  # the graphs of inductor, which takes 40 CPU-seconds to make C++ of them
        pytest.param("inductor", marks=[
            pytest.mark.nightly,
            pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"),
        ]),
    ],
)  # fmt: skip
def test_compiled_steps_have_the_losses_of_plain_ones(
    store: TokenStore, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full rows and padded ones, each in a shape of its own."""
    if backend != "inductor":
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    recipe = small_recipe(*FULL, *ONE_LAYER)
    steps = unpadded_steps(store, recipe, 3)
    padded = next(step for step in range(1000) if 0.75 <= share_of_tokens(store, recipe, step) < 1)
    found: dict[str, list[float]] = {}
    for compile in ("off", "on"):
        engine = PretrainingEngine(model_for(store, recipe), recipe, cpu_plan(recipe), CPU, compile)  # type: ignore[arg-type]
        assert engine.is_compiled == (compile == "on")
        builder = builder_for(store, recipe)
        torch._dynamo.utils.counters.clear()
        found[compile] = [
            engine.train_step(builder.build(step), 50)["loss"].item() for step in (*steps, padded, steps[0])
        ]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (2 if compile == "on" else 0)
        engine.close()
    np.testing.assert_allclose(found["on"], found["off"], rtol=1e-5)


def test_a_temperature_that_changes_between_steps_reaches_a_compiled_forward_pass(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a tensor of the batch it needs no second graph, and is no constant in the one there is."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    recipe = small_recipe(*FULL, *ONE_LAYER, "model.initializer_range=0.3")
    [step] = unpadded_steps(store, recipe, 1)
    batch = builder_for(store, recipe).build(step)
    plain, compiled = model_for(store, recipe).train(), model_for(store, recipe).train()
    forward = CompiledForward(compiled, cpu_plan(recipe), CPU, "on")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    drawn = []
    for temperature in (0.05, 1.0, 3.0):
        micro_batch = forward.micro_batch(batch, 0, 4)._replace(temperature=torch.tensor(temperature))
        found, expected = compiled(micro_batch), plain(micro_batch)
        torch.testing.assert_close(found.discriminator_loss_sum, expected.discriminator_loss_sum, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.samples_M, expected.samples_M)
        drawn.append(found.samples_M)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch.equal(drawn[0], drawn[2])


def test_a_compiler_that_fails_is_done_without_or_told_where_it_was_asked_for(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: Any, **keywords: Any) -> Any:
        def run(*arguments: Any) -> Any:
            raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no Python.h"), None)

        return run

    monkeypatch.setattr(torch, "compile", broken)
    recipe = small_recipe(*FULL)
    [step] = unpadded_steps(store, recipe, 1)
    batch = builder_for(store, recipe).build(step)
    expected = model_for(store, recipe)(batch.micro_batch(0, 4)).generator_loss_sum
    choices: tuple[Compile, ...] = ("auto", "on")
    for wanted in choices:
        model = model_for(store, recipe)
        forward = CompiledForward(model, cpu_plan(recipe), CPU, wanted)
        if wanted == "on":
            with pytest.raises(ConfigError, match=r"(?s)leave out --compile on\. Its message: .*no Python\.h"):
                model(forward.micro_batch(batch, 0, 4))
            continue
        with caplog.at_level(logging.WARNING):
            torch.testing.assert_close(model(forward.micro_batch(batch, 0, 4)).generator_loss_sum, expected)
        assert re.search(r"(?s)the run continues without it: .*no Python\.h", caplog.text)
        assert forward.micro_batch(batch, 0, 4).counts_M is None


@pytest.mark.parametrize(
    ("wanted", "capability", "stage", "expected"),
    [
        ("auto", (7, 0), 0, True),
        ("auto", (9, 0), 2, True),
        ("auto", (6, 1), 0, False),
        ("auto", (9, 0), 3, False),
        ("off", (9, 0), 0, False),
        ("on", (6, 1), 0, "this card has 6.1"),
        ("on", (9, 0), 3, "stage 3 gathers"),
        ("auto", None, 0, False),
        ("on", None, 0, True),
        ("on", None, 3, "stage 3 gathers"),
    ],
)
def test_what_is_compiled_follows_the_card_and_the_stage(
    monkeypatch: pytest.MonkeyPatch, wanted: Any, capability: tuple[int, int] | None, stage: int, expected: bool | str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    device = CPU if capability is None else torch.device("cuda", 0)
    plan = cpu_plan(small_recipe(), zero_optimization={"stage": stage})
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            check_compile(wanted, device, plan)
    else:
        assert check_compile(wanted, device, plan) == expected


def test_layers_that_are_computed_again_are_not_compiled() -> None:
    plan = cpu_plan(small_recipe(), activation_checkpointing={"number_checkpoints": 1})
    for device in (CPU, torch.device("cuda", 0)):
        assert not check_compile("auto", device, plan)
        with pytest.raises(ConfigError, match=r"--compile on is not possible: layers with activation_checkpointing"):
            check_compile("on", device, plan)


@pytest.mark.gpu
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("micro_batch", [4, 2], ids=["with graphs", "accumulating, without"])
@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_compiled_steps_on_a_gpu_follow_plain_ones(store: TokenStore, micro_batch: int, dropout: str) -> None:
    """Without dropout to rounding; with dropout, whose numbers are other ones, on average."""
    dropouts = (f"model.hidden_dropout_prob={dropout}", f"model.attention_probs_dropout_prob={dropout}")
    recipe = small_recipe(*FULL, *dropouts)
    found: dict[str, list[float]] = {}
    for compile in ("off", "on"):
        plan = cpu_plan(recipe, train_micro_batch_size_per_gpu=micro_batch)
        device = torch.device("cuda", 0)
        engine = PretrainingEngine(model_for(store, recipe), recipe, plan, device, compile)  # type: ignore[arg-type]
        builder = builder_for(store, recipe)
        torch._dynamo.utils.counters.clear()
        found[compile] = [engine.train_step(builder.build(step), step)["loss"].item() for step in range(200)]
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == (compile == "on")
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
        engine.close()
    if dropout == "0":
        np.testing.assert_allclose(found["on"][:20], found["off"][:20], rtol=1e-3)
    assert np.mean(found["on"][-50:]) == pytest.approx(np.mean(found["off"][-50:]), rel=0.02)


@pytest.mark.gpu
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize("section", [{}, {"fp16": {"enabled": True}}], ids=["fp32", "fp16"])
def test_a_step_on_a_gpu_never_waits_for_it(store: TokenStore, compile: Any, section: dict[str, Any]) -> None:
    recipe = small_recipe(*FULL)
    device = torch.device("cuda", 0)
    engine = PretrainingEngine(model_for(store, recipe), recipe, cpu_plan(recipe, **section), device, compile)
    builder = builder_for(store, recipe)
    for step in range(5):  # warming up, compiling, recording graphs
        engine.train_step(builder.build(step), step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(5, 10):
            engine.train_step(builder.build(step), step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        engine.close()
