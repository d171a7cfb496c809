"""Callbacks see what metrics.jsonl has, and can stop a run, which then resumes as if it had not been stopped."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import electra_ds
from electra_ds.config.run_directory import read_metrics
from electra_ds.core.errors import ConfigError, TrainingError
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from electra_ds.training.callbacks import Callback, Callbacks, Metrics, Progress
from tests.helpers import SMALL
from tests.pretrain_runs import final_tensors, train_losses

STEPS = 20
OVERRIDES = [*SMALL, f"schedule.total_steps={STEPS}", "schedule.warmup_steps=2"]


class Recorder(Callback):
    """Writes down what it is told; stops at a step if it is to."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.told: list[tuple[str, Any]] = []

    def on_start(self, progress: Progress) -> None:
        self.told.append(("start", progress.step))

    def on_step(self, progress: Progress, step: int, metrics: Metrics) -> None:
        self.told.append(("step", (step, metrics["loss"])))
        if step == self.stop_at:
            progress.stop("enough")

    def on_evaluate(self, progress: Progress, metrics: Metrics) -> None:
        self.told.append(("evaluate", (progress.step, metrics["discriminator_auc"])))

    def on_checkpoint(self, progress: Progress, path: Path) -> None:
        assert (path / "manifest.json").is_file()
        self.told.append(("checkpoint", path.name))

    def on_end(self, progress: Progress, status: str) -> None:
        self.told.append(("end", status))

    def of(self, kind: str) -> list[Any]:
        return [value for told, value in self.told if told == kind]


def pretrain(store: TokenStore, run_dir: Path, *callbacks: Callback, stage: int = 0) -> electra_ds.Run:
    ds_config = run_dir.with_suffix(".json")
    ds_config.write_text(f'{{"zero_optimization": {{"stage": {stage}}}}}')
    return electra_ds.pretrain(
        "tiny", data=store.path, run_dir=run_dir, overrides=OVERRIDES, ds_config=ds_config, callbacks=callbacks,
        threads=1, log_every=4, eval_every=10, save_every=5, eval_windows=16, quiet=True,
    )  # fmt: skip


def test_callbacks_see_every_step_evaluation_and_checkpoint(
    store: TokenStore, tmp_path: Path, process_group: Ranks
) -> None:
    recorder = Recorder()
    run = pretrain(store, tmp_path / "run", recorder)
    assert recorder.told[0] == ("start", 0)
    assert recorder.told[-1] == ("end", "done")
    assert recorder.of("step") == train_losses(run.path)
    evaluations = [line for line in read_metrics(run.path / "metrics.jsonl") if line["kind"] == "eval"]
    assert recorder.of("evaluate") == [(line["step"], line["discriminator_auc"]) for line in evaluations]
    assert recorder.of("checkpoint")[-1] == f"step-{STEPS:08d}"
    assert len(recorder.of("checkpoint")) == STEPS // 5


@pytest.mark.parametrize("stage", [0, 2])
def test_a_run_that_a_callback_stops_is_saved_and_resumes_bit_for_bit(
    store: TokenStore, tmp_path: Path, process_group: Ranks, stage: int
) -> None:
    straight = pretrain(store, tmp_path / "straight", stage=stage)
    recorder = Recorder(stop_at=7)
    stopped = pretrain(store, tmp_path / "stopped", recorder, stage=stage)
    details = stopped._directory.status_details()
    assert (stopped.status, details["reason"]) == ("stopped", "enough")
    assert details["step"] == 8  # losses are read back every four steps
    assert recorder.told[-1] == ("end", "stopped")
    assert not (stopped.path / "requeue").exists()  # nobody is to start it again by himself
    assert electra_ds.pretrain(resume=stopped.path, quiet=True).status == "done"
    assert train_losses(stopped.path) == train_losses(straight.path)
    ours, theirs = final_tensors(stopped.path), final_tensors(straight.path)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "callbacks",
    [[Recorder], [print], Recorder(), "loss", [Recorder(), None]],
    ids=["class", "function", "single", "text", "none"],
)
def test_anything_but_a_list_of_callbacks_is_refused_before_the_run(callbacks: Any, tmp_path: Path) -> None:
    for start in (electra_ds.pretrain, electra_ds.finetune):
        given: dict[str, Any] = {"recipe": "tiny"} if start is electra_ds.pretrain else {"model": "x", "task": "rte"}
        with pytest.raises(ConfigError, match=r"must be a list of objects .* such as \[MyCallback\(\)\], not"):
            start(**given, run_dir=tmp_path / "run", callbacks=callbacks)
    assert not (tmp_path / "run").exists()


def test_an_error_of_a_callback_ends_the_run_as_failed(store: TokenStore, tmp_path: Path, process_group: Ranks) -> None:
    class Faulty(Callback):
        def on_evaluate(self, progress: Progress, metrics: Metrics) -> None:
            raise RuntimeError("a mistake of mine")

    with pytest.raises(RuntimeError, match="a mistake of mine"):
        pretrain(store, tmp_path / "run", Faulty())
    run = electra_ds.Run(tmp_path / "run")
    assert run.status == "failed"
    assert run.checkpoints[-1].name == "step-00000005"  # that of step 10 comes after its evaluation


def test_an_error_of_a_callback_on_one_of_several_ranks_is_one_on_which_all_ranks_fail() -> None:
    class Faulty(Callback):
        def on_report(self, progress: Progress, summary: str) -> None:
            raise RuntimeError("a mistake of mine")

    main, other = (SimpleNamespace(is_main=is_main, world_size=2) for is_main in (True, False))
    arguments = ("on_report", Progress(Path("run"), 0, 1, 1), "loss 1")
    with pytest.raises(TrainingError, match=r"Faulty\.on_report.*a mistake of mine") as caught:
        Callbacks([Faulty()], main).call(*arguments)  # type: ignore[arg-type]
    assert isinstance(caught.value.__cause__, RuntimeError)
    Callbacks([Faulty()], other).call(*arguments)  # type: ignore[arg-type]


def test_a_misspelt_method_of_a_callback_is_refused_where_the_class_is_made() -> None:
    with pytest.raises(ConfigError, match=r"Mine\.on_stpe: a run calls no such method; did you mean 'on_step'"):

        class Mine(Callback):
            def on_stpe(self, progress: Progress, step: int, metrics: Metrics) -> None: ...
