"""Running out of memory: in a step, before the first one, and where nothing can be done about it.

The errors are raised by these tests, at the places where torch raises its own; everything that follows is real.
"""

from __future__ import annotations

import json
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from electra_ds.config.options import PretrainOptions
from electra_ds.config.run_directory import RunDirectory, read_metrics
from electra_ds.core.devices import is_out_of_memory
from electra_ds.core.errors import CheckpointError, ConfigError, TrainingError
from electra_ds.core.ranks import Ranks
from electra_ds.core.terminal import log_shown_on
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining import prepare
from electra_ds.pretraining.electra import Electra
from electra_ds.pretraining.evaluation import Evaluator
from electra_ds.pretraining.masked_batch import MicroBatch
from electra_ds.pretraining.objectives.electra import ElectraObjective
from electra_ds.pretraining.prepare import fits_in_memory, fitting_plan, largest_fitting
from electra_ds.pretraining.pretrain import PretrainLoop, pretrain
from electra_ds.training.checkpoint import CheckpointFolder, PendingCheckpoint
from electra_ds.training.optimizer import MasterAdamW
from electra_ds.training.preemption import Preemption
from electra_ds.training.prepare import plan_new
from electra_ds.training.step import StepLosses
from tests.helpers import cpu_plan, small_recipe
from tests.pretrain_runs import DROPOUT, final_tensors, run, start_arguments, train_losses

STEPS = 6


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@contextmanager
def fails(where: str, decide: Callable[[int, int], bool]) -> Iterator[None]:
    """While it lasts, the forward or backward pass of a training micro-batch runs out of memory where `decide(number of
    the pass, its sequences)` says so."""
    run_model, passes = Electra.run, [0]

    def faulty(self: Electra, batch: MicroBatch, samples_M: torch.Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return run_model(self, batch, samples_M)
        passes[0] += 1
        fault = decide(
            passes[0], int(batch.sequences_BT.max()) if batch.sequences_BT is not None else len(batch.ids_BT)
        )
        if fault and where == "forward":
            raise out_of_memory()
        output = run_model(self, batch, samples_M)
        if fault and where == "backward":
            output = output._replace(discriminator_loss_sum=_Faulty.apply(output.discriminator_loss_sum))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Electra, "run", faulty)
        yield


class _Faulty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        raise out_of_memory()


def train(
    store: TokenStore,
    folder: Path,
    ranks: Ranks,
    values: dict[str, Any],
    *overrides: str,
    console: Console | None = None,
) -> Path:
    """A whole run in this process."""
    steps = ("schedule.total_steps=6", "schedule.warmup_steps=1")
    recipe = small_recipe("global_batch_size=12", *steps, *overrides)
    config = folder / "ds.json"
    folder.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps(values))
    options = PretrainOptions(
        ds_config=str(config), threads=1, save_every=5, log_every=1, eval_windows=16, compile="off"
    )
    directory = RunDirectory(folder / "run")
    with directory.locked():
        plan = plan_new(options, recipe, directory, ranks)
        job = prepare.prepare_new(options, recipe, plan, store, directory, ranks)
        with log_shown_on(console or Console(quiet=True)):
            assert pretrain(job, ranks, Preemption(ranks))
    return directory.path


def micro(size: int, **values: Any) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": size, **values}


@pytest.fixture(scope="module")
def halves(store: TokenStore, process_group: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs planned with the smaller micro-batch from the start, dropout off."""
    folder = tmp_path_factory.mktemp("planned")
    return {size: train(store, folder / str(size), process_group, micro(size)) for size in (1, 2, 3, 6)}


@pytest.mark.slow
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.sampled_from([12, 6, 4, 3]), seed=st.integers(0, 10**6), where=st.sampled_from(["forward", "backward"]))
def test_a_fault_at_any_micro_step_leaves_the_losses_of_the_smaller_plan(
    store: TokenStore, process_group: Ranks, halves: dict[int, Path], size: int, seed: int, where: str
) -> None:
    smaller = {12: 6, 6: 3, 4: 2, 3: 1}[size]
    number = 1 + seed % (STEPS * 12 // size)
    with tempfile.TemporaryDirectory() as folder, fails(where, lambda turn, _: turn == number):
        path = train(store, Path(folder), process_group, micro(size))
        losses, planned = train_losses(path), train_losses(halves[smaller])
        assert [step for step, _ in losses] == list(range(1, STEPS + 1))
        assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in planned], rel=1e-5)
        for name, tensor in final_tensors(path).items():
            # Adam divides by the root of tiny second moments, so single weights may differ by more than the losses.
            torch.testing.assert_close(tensor, final_tensors(halves[smaller])[name], rtol=1e-3, atol=2e-5)
        assert json.loads((path / "deepspeed.json").read_text())["train_micro_batch_size_per_gpu"] == smaller
        [cut] = [line for line in read_metrics(path / "metrics.jsonl") if line["kind"] == "plan"]
        assert (cut["micro_batch_size"], cut["gradient_accumulation_steps"]) == (smaller, 12 // smaller)
        assert cut["step"] == (number - 1) // (12 // size)


def test_memory_that_shrinks_again_and_again_is_followed_down(
    store: TokenStore, process_group: Ranks, halves: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """12, then 6, then 3 sequences are too many from the fourth pass on."""
    with fails("forward", lambda turn, sequences: turn > 3 and sequences > 1):
        path = train(store, tmp_path, process_group, micro(12), console=Console(width=400))
    assert [loss for _, loss in train_losses(path)] == pytest.approx(
        [loss for _, loss in train_losses(halves[1])], rel=1e-5
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "memory ran out in step 4, which is repeated; from here on micro-batch x" in said
    assert [f"{size} x {12 // size} x 1 rank(s)" in said for size in (6, 3, 1)] == [True] * 3


@pytest.mark.slow
@pytest.mark.usefixtures("half_on_cpu")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", [{}, {"fp16": {"enabled": True, "loss_scale_window": 2}}], ids=["fp32", "fp16"])
def test_going_on_after_a_fault_is_going_on_from_a_checkpoint_under_the_smaller_plan(
    store: TokenStore, process_group: Ranks, tmp_path: Path, stage: int, precision: dict[str, Any]
) -> None:
    """To the bit, dropout and loss scale included: the same state, and the same random numbers from that step on."""
    values = precision | {"zero_optimization": {"stage": stage}}
    with fails("backward", lambda turn, _: turn == 8):  # the second micro-batch of step 4
        faulty = train(store, tmp_path / "faulty", process_group, micro(6, **values), *DROPOUT)
    recipe = small_recipe("global_batch_size=12", "schedule.total_steps=6", "schedule.warmup_steps=1", *DROPOUT)
    (tmp_path / "first.json").write_text(json.dumps(micro(6, **values)))
    directory = RunDirectory(tmp_path / "stopped")
    first = PretrainOptions(
        ds_config=str(tmp_path / "first.json"), threads=1, save_every=5, log_every=1, eval_windows=16, stop_at=3
    )
    second = PretrainOptions(micro_batch=3)
    with directory.locked():
        plan = plan_new(first, recipe, directory, process_group)
        job = prepare.prepare_new(first, recipe, plan, store, directory, process_group)
        pretrain(job, process_group, Preemption(process_group))
        plan = prepare.plan_resume(second, directory, process_group)
        assert plan.batch.micro_batch_size == 3
        job = prepare.prepare_resume(second, plan, directory, process_group)
        pretrain(job, process_group, Preemption(process_group))
    assert train_losses(faulty) == train_losses(directory.path)
    expected = final_tensors(directory.path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in final_tensors(faulty).items())


def test_where_one_sequence_is_too_much_the_run_fails_with_what_to_do(
    store: TokenStore, process_group: Ranks, tmp_path: Path
) -> None:
    with (
        fails("forward", lambda turn, _: turn > 12),
        pytest.raises(
            TrainingError,
            match=r"step 2 with micro-batch 1, and there is no smaller one.*start again: .*run --micro-batch auto",
        ),
    ):
        train(store, tmp_path, process_group, micro(1))
    assert RunDirectory(tmp_path / "run").status() == "failed"


def test_an_update_that_had_begun_is_not_done_twice(
    store: TokenStore, process_group: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, calls = MasterAdamW._update_scale, [0]

    def faulty(self: MasterAdamW, found_inf: torch.Tensor) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise out_of_memory()
        update(self, found_inf)

    monkeypatch.setattr(MasterAdamW, "_update_scale", faulty)
    with pytest.raises(
        TrainingError, match=r"since its update had already begun\. No checkpoint.*--resume .*run --micro-batch 6"
    ):
        train(store, tmp_path, process_group, micro(12))


@pytest.mark.parametrize("stage", [0, 1])
def test_a_step_that_is_done_is_not_done_twice(
    store: TokenStore, process_group: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """Memory runs out when the losses of the sixth step are put together, after its update, and while the checkpoint
    from before it is still being written."""
    result, calls = StepLosses.result, [0]

    def faulty(self: StepLosses, grad_norm: torch.Tensor) -> Any:
        calls[0] += 1
        if calls[0] == 6:
            raise out_of_memory()
        return result(self, grad_norm)

    publish = PendingCheckpoint.publish

    def slow(*arguments: Any) -> None:
        time.sleep(0.5)  # on a slow disk
        publish(*arguments)

    monkeypatch.setattr(PendingCheckpoint, "publish", slow)
    monkeypatch.setattr(StepLosses, "result", faulty)
    wanted = r"had already begun\. Resume from step-00000005: electra-ds pretrain --resume \S+run --micro-batch 6"
    with pytest.raises(TrainingError, match=wanted):
        train(store, tmp_path, process_group, micro(12, zero_optimization={"stage": stage}))


def test_memory_that_runs_out_in_an_evaluation_ends_the_run_with_what_to_do(
    store: TokenStore, process_group: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(self: Evaluator, *arguments: Any) -> Any:
        raise out_of_memory()

    monkeypatch.setattr(Evaluator, "__call__", faulty)
    with pytest.raises(
        TrainingError, match=r"outside the steps, for example in an evaluation: CUDA out of memory.*--resume"
    ):
        train(store, tmp_path, process_group, micro(12))
    assert RunDirectory(tmp_path / "run").status() == "failed"
    assert CheckpointFolder(tmp_path / "run" / "checkpoints", keep=3).paths()  # the step before it is not lost


def test_an_evaluation_that_is_too_large_is_done_in_fewer_rows_with_the_same_numbers(
    store: TokenStore, process_group: Ranks, halves: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_model = Electra.run

    def faulty(self: Electra, batch: MicroBatch, samples_M: torch.Tensor | None) -> Any:
        if not torch.is_grad_enabled() and len(batch.ids_BT) > 3:
            raise out_of_memory()
        return run_model(self, batch, samples_M)

    monkeypatch.setattr(Electra, "run", faulty)
    path = train(store, tmp_path, process_group, micro(6))
    found, expected = (
        [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "eval"]
        for folder in (path, halves[6])
    )
    assert len(found) == len(expected) == STEPS
    for ours, theirs in zip(found, expected, strict=True):
        numbers = [name for name, value in theirs.items() if isinstance(value, float)]
        assert {name: ours[name] for name in numbers} == pytest.approx(
            {name: theirs[name] for name in numbers}, rel=1e-4
        )


def test_a_full_disk_does_not_hide_that_memory_ran_out_nor_end_the_run(
    store: TokenStore, process_group: Ranks, halves: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write, calls = RunDirectory.write_record, [0]

    def faulty(self: RunDirectory, *arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise CheckpointError("Cannot write recipe.yaml: No space left on device.")
        write(self, *arguments)

    monkeypatch.setattr(RunDirectory, "write_record", faulty)
    with fails("forward", lambda turn, _: turn == 3):
        path = train(store, tmp_path, process_group, micro(12), console=Console(width=400))
    said = " ".join(capsys.readouterr().out.split())
    assert "memory ran out in step 3" in said
    assert "No space left on device. Give --micro-batch 6 when you resume this run." in said
    assert len(train_losses(path)) == STEPS


def test_where_not_even_the_engine_can_be_made_again_what_was_learned_is_saved(
    store: TokenStore, process_group: Ranks, halves: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, calls = PretrainLoop._make_engine, [0]

    def faulty(self: PretrainLoop) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise out_of_memory()
        return make(self)

    monkeypatch.setattr(PretrainLoop, "_make_engine", faulty)
    with fails("backward", lambda turn, _: turn == 3), pytest.raises(TrainingError, match="Memory ran out"):
        train(store, tmp_path, process_group, micro(12))
    run_dir = tmp_path / "run"
    assert [path.name for path in CheckpointFolder(run_dir / "checkpoints", keep=3).paths()] == ["step-00000002"]
    run("pretrain", "--resume", str(run_dir), "--micro-batch", "6")
    assert [loss for _, loss in train_losses(run_dir)] == pytest.approx(
        [loss for _, loss in train_losses(halves[6])], rel=1e-5
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nothing_of_the_failed_step_and_its_engine_stays(
    store: TokenStore, process_group: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """When the next engine is made, the one before it is gone, model, state and all."""
    make, before = PretrainLoop._make_engine, []

    def watched(self: PretrainLoop) -> Any:
        assert [alive() for alive in before] == [None] * len(before)
        engine = make(self)
        before.extend(map(weakref.ref, (engine, engine.module, engine.optimizer, *engine.module.parameters())))
        return engine

    monkeypatch.setattr(PretrainLoop, "_make_engine", watched)
    with fails("backward", lambda turn, _: turn == 3):
        train(store, tmp_path, process_group, micro(12, zero_optimization={"stage": stage}))
    assert len(before) > 20


def test_other_errors_are_not_taken_for_it(store: TokenStore, process_group: Ranks, tmp_path: Path) -> None:
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")
    )
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert not is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


# --- before the first step


@pytest.mark.slow
def test_the_probe_finds_the_largest_micro_batch_that_fits(process_group: Ranks) -> None:
    """The search that a GPU gets, on the CPU, with a memory that holds so many sequences."""
    recipe = small_recipe("global_batch_size=12")
    plan = cpu_plan(recipe)
    fits = partial(fits_in_memory, ElectraObjective(recipe, 400), device=torch.device("cpu"))
    for room, expected in [(12, 12), (11, 6), (5, 4), (1, 1)]:
        with fails("backward", lambda turn, sequences, room=room: sequences > room):
            found = largest_fitting(plan, fits, process_group)
        assert found is not None
        assert (found.batch.micro_batch_size, found.batch.gradient_accumulation_steps) == (expected, 12 // expected)
        assert not found.is_micro_batch_open
    with fails("forward", lambda turn, sequences: True):
        assert largest_fitting(plan, fits, process_group) is None


def test_a_probe_leaves_weights_and_random_numbers_of_the_run_alone(process_group: Ranks) -> None:
    recipe = small_recipe(*DROPOUT)
    before = {name: tensor.clone() for name, tensor in Electra(recipe, 400, 0).state_dict().items()}
    assert fits_in_memory(ElectraObjective(recipe, 400), cpu_plan(recipe), torch.device("cpu"))
    after = Electra(recipe, 400, 0).state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_on_a_gpu_it_is_predicted_for_an_objective_without_a_micro_batch_to_try(
    process_group: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe("global_batch_size=128", "data.sequence_length=128")
    objective, plan = ElectraObjective(recipe, 400), cpu_plan(recipe)
    monkeypatch.setattr(ElectraObjective, "longest_micro_batch", lambda self, size: None)
    half = objective.needed_bytes(plan.with_micro_batch(64), "cuda")
    monkeypatch.setattr(prepare, "free_bytes", lambda device, ranks: half)
    found = fitting_plan(recipe, 400, plan, torch.device("cuda"), process_group)
    assert found.batch.micro_batch_size == 64


def test_on_a_cpu_the_micro_batch_is_computed_from_the_free_memory(
    process_group: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe("global_batch_size=128", "data.sequence_length=128")
    plan = cpu_plan(recipe)

    def with_free(number_bytes: float) -> int:
        monkeypatch.setattr(prepare.psutil, "virtual_memory", lambda: type("", (), {"available": number_bytes}))
        return fitting_plan(recipe, 400, plan, torch.device("cpu"), process_group).batch.micro_batch_size

    assert with_free(10e9) == 128
    sizes = [with_free(megabytes * 1e6) for megabytes in (200, 100, 50, 25)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 2
    with pytest.raises(ConfigError, match="Not even one sequence fits"):
        with_free(1e5)


@pytest.mark.slow
def test_the_command_line_sets_the_micro_batch_of_new_and_resumed_runs(store: TokenStore, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    start = start_arguments(store, run_dir)
    said = run("pretrain", *start, "--micro-batch", "2", "--stop-at", "2").stdout
    assert "micro-batch x accumulation = 2 x 4 x 1 rank(s)" in said
    said = run("pretrain", "--resume", str(run_dir), "--micro-batch", "auto", "--stop-at", "4").stdout
    assert "micro-batch x accumulation = 8 x 1 x 1 rank(s)" in said
    said = run("pretrain", "--resume", str(run_dir), "--stop-at", "5").stdout
    assert "micro-batch x accumulation = 8 x 1 x 1 rank(s)" in said
    refused = run("pretrain", "--resume", str(run_dir), "--micro-batch", "3", status=2).stderr
    assert "train_micro_batch_size_per_gpu 3 x" in refused
    for wrong in ("0", "-4", "2.5", "automatic"):
        assert "argument --micro-batch" in run("pretrain", *start, "--micro-batch", wrong, status=2).stderr
