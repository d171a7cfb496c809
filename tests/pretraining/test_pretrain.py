"""The command itself, in processes of its own, as a user starts it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from electra_ds.cli import main
from electra_ds.config.options import PretrainOptions
from electra_ds.config.run_directory import RunDirectory, read_metrics
from electra_ds.config.run_record import TrackingSettings
from electra_ds.core.errors import TrainingError
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore, split_holdout
from electra_ds.pretraining import prepare, pretrain
from electra_ds.pretraining.evaluation import Evaluator, held_out_batch, load_trained
from electra_ds.pretraining.objectives.electra_evaluation import area_under_roc, sample_sentences
from electra_ds.training.checkpoint import CheckpointFolder
from electra_ds.training.optimizer import MasterAdamW
from electra_ds.training.preemption import Preemption
from electra_ds.training.prepare import plan_new
from electra_ds.training.tracking import RunLog
from tests.helpers import REPOSITORY, SMALL, imported, model_for, small_recipe
from tests.pretrain_runs import (
    CPU_JSON,
    DROPOUT,
    command,
    final_tensors,
    has_trained,
    kill_when,
    run,
    start_arguments,
    train_losses,
)


@pytest.fixture(scope="module")
def straight(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 steps at one go, with dropout, as a finished run."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    result = run("pretrain", *start_arguments(store, run_dir, *DROPOUT))
    assert "held out at step 40" in result.stdout
    return run_dir


def test_a_run_leaves_everything_it_can_be_rebuilt_and_judged_from(straight: Path) -> None:
    names = {path.name for path in straight.iterdir()}
    assert {
        "recipe.yaml", "deepspeed.json", "run.json", "metrics.jsonl", "status.json", "checkpoints", "curves.png",
        "samples.txt", "summary.txt",
    } <= names  # fmt: skip
    assert json.loads((straight / "status.json").read_text()) == {"status": "done", "step": 40}
    assert (straight / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "→" in (straight / "samples.txt").read_text("utf8")
    assert "discriminator AUC" in (straight / "summary.txt").read_text("utf8")
    record = json.loads((straight / "run.json").read_text())
    assert record["threads"] == 1
    assert record["versions"]["deepspeed"]
    checkpoint = CheckpointFolder(straight / "checkpoints", keep=1).paths()[-1]
    assert (checkpoint / "recipe.yaml").read_text() == (straight / "recipe.yaml").read_text()
    assert [step for step, _ in train_losses(straight)] == list(range(1, 41))


@pytest.mark.slow
def test_straight_is_15_steps_kill_9_and_resume_bit_for_bit(store: TokenStore, straight: Path, tmp_path: Path) -> None:
    """Dropout on. The kill comes after step 15 is saved, wherever training is by then."""
    run_dir = tmp_path / "run"
    kill_when((run_dir / "checkpoints" / "step-00000015").exists, run_dir, *start_arguments(store, run_dir, *DROPOUT))
    assert len(train_losses(run_dir)) < 40
    result = run("pretrain", "--resume", str(run_dir))
    assert "Resuming from" in result.stdout
    assert train_losses(run_dir) == train_losses(straight)
    ours, theirs = final_tensors(run_dir), final_tensors(straight)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_kill_loses_no_line_of_metrics_however_rarely_they_are_read(
    store: TokenStore, straight: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    rarely = [*start_arguments(store, run_dir, *DROPOUT), "--log-every", "100", "--save-every", "7"]
    kill_when((run_dir / "checkpoints" / "step-00000021").exists, run_dir, *rarely)
    for name in ("recipe.yaml", "deepspeed.json", "run.json"):  # their copies travel in the checkpoints
        (run_dir / name).write_text('{"')
    run("pretrain", "--resume", str(run_dir))
    assert train_losses(run_dir) == train_losses(straight)


@pytest.mark.nightly
@pytest.mark.slow
def test_a_run_whose_newest_checkpoint_is_damaged_is_trained_again_from_the_one_before(
    store: TokenStore, straight: Path, tmp_path: Path
) -> None:
    """The step that was damaged is saved anew, and what is exported is the end of the run."""
    run_dir = tmp_path / "run"
    run("pretrain", *start_arguments(store, run_dir, *DROPOUT), "--stop-at", "30")
    weights = run_dir / "checkpoints" / "step-00000030" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = run("pretrain", "--resume", str(run_dir), "--stop-at", "30")
    assert "Falling back" in result.stdout
    assert "step 25" in result.stdout
    run("pretrain", "--resume", str(run_dir), "--stop-at", "40")
    assert all(torch.equal(final_tensors(run_dir)[name], tensor) for name, tensor in final_tensors(straight).items())
    assert "is finished" in run("pretrain", "--resume", str(run_dir)).stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_the_next_step_and_leaves(
    store: TokenStore, straight: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    arguments = start_arguments(store, run_dir, *DROPOUT)
    process = subprocess.Popen(
        command("pretrain", *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not has_trained(run_dir, 3):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == (-number if number == signal.SIGINT else 128 + number)
    assert f"Resume it with: {REPOSITORY}/bin/pretrain --resume" in errors
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("stopped", number.name)
    assert status["step"] < 40
    assert (run_dir / "checkpoints" / f"step-{status['step']:08d}").exists()
    run("pretrain", "--resume", str(run_dir))
    assert train_losses(run_dir) == train_losses(straight)
    assert all(torch.equal(final_tensors(run_dir)[name], tensor) for name, tensor in final_tensors(straight).items())


@pytest.mark.slow
def test_a_run_stops_at_a_step_of_its_schedule_and_goes_on_under_another_batch_plan(
    store: TokenStore, tmp_path: Path
) -> None:
    """Dropout off, so another plan gives the same losses."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run("pretrain", *start_arguments(store, whole))
    run("pretrain", *start_arguments(store, cut), "--stop-at", "17")
    assert RunDirectory(cut).status() == "stopped"
    other = tmp_path / "micro.json"
    other.write_text('{"train_micro_batch_size_per_gpu": 2}')
    result = run("pretrain", "--resume", str(cut), "--ds-config", str(other))
    assert "2 x 4 x 1 rank" in result.stdout
    np.testing.assert_allclose([x for _, x in train_losses(cut)], [x for _, x in train_losses(whole)], rtol=1e-5)


@pytest.mark.slow
def test_the_whole_path_from_text_to_transformers(corpus_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, ElectraForMaskedLM, ElectraForPreTraining

    run("build-data", "--corpus", str(corpus_folder), "--out", "stores/mine", "--recipe", "tiny",
        "--set", "tokenizer.vocab_size=400", "tokenizer.kind=wordpiece", folder=tmp_path)  # fmt: skip
    overrides = [*SMALL, "schedule.total_steps=6", "schedule.warmup_steps=1"]
    run("pretrain", "--data", "stores/mine", "--ds-config", CPU_JSON, "--recipe", "tiny", "--run-dir", "run",
        "--threads", "1", "--set", *overrides, folder=tmp_path)  # fmt: skip
    result = run("export", "run", folder=tmp_path)
    assert "export/discriminator" in result.stdout
    folder = tmp_path / "run" / "export"
    tokenizer = AutoTokenizer.from_pretrained(folder / "discriminator")
    inputs = tokenizer("Some text.", return_tensors="pt")
    model, _, ours, _ = load_trained(tmp_path / "run")
    assert inputs["input_ids"][0, 1:-1].tolist() == ours.encode_lines(["Some text."])[0]
    with torch.no_grad():
        hidden = model.discriminator(inputs["input_ids"], None)
        expected = model.discriminator_head(hidden)
        found = ElectraForPreTraining.from_pretrained(folder / "discriminator").eval()(**inputs).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        head = model.generator_head
        expected = head.decoder(head.transform(model.generator(inputs["input_ids"], None)[0]))
        found = ElectraForMaskedLM.from_pretrained(folder / "generator").eval()(**inputs).logits[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert tokenizer.model_max_length == 512
    card = (folder / "discriminator" / "README.md").read_text("utf8")
    assert "discriminator_auc" in card
    assert "recipe tiny" in card
    (tmp_path / "file").touch()
    run("export", "run", "--out", "file", status=2, folder=tmp_path)
    refused = run("export", "run", status=2, folder=tmp_path)
    assert "already exists" in refused.stderr


@pytest.mark.slow
def test_nothing_is_compiled_and_the_start_is_quiet(store: TokenStore, tmp_path: Path) -> None:
    """Without a compiler or ninja on the PATH, with an empty folder for torch's extensions, on an ASCII terminal."""
    environment = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PATH": str(tmp_path),
        "HOME": str(tmp_path),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
    }
    arguments = start_arguments(store, tmp_path / "run", "schedule.total_steps=5", "schedule.warmup_steps=1")
    result = subprocess.run(
        command("pretrain", *arguments), env=environment, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert not (tmp_path / "extensions").exists()


# --- bad input: a clear error before anything long, and nothing lost


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ds-config", "nowhere.json"], "There is no DeepSpeed JSON nowhere.json"),
        (["--ds-config", CPU_JSON, "--recipe", "tinny"], "did you mean 'tiny'"),
        (["--ds-config", CPU_JSON, "--set", "model.hiden_size=3"], "did you mean 'model.hidden_size'"),
        (["--ds-config", CPU_JSON, "--recipe", "tiny", "--data", "nowhere"], "The token store nowhere does not exist"),
        (["--ds-config", CPU_JSON, "--recipe", "tiny", "--corpus", "nowhere"], "does not exist"),
        (["--ds-config", CPU_JSON, "--recipe", "tiny", "--tokenizer", "nowhere"], "No tokenizer at nowhere"),
        (
            ["--ds-config", CPU_JSON, "--recipe", "tiny", "--stop-at", "99999999"],
            "is beyond the schedule's 12000 steps",
        ),
        (["--ds-config", CPU_JSON, "--data", "x", "--corpus", "y"], "give either --data, or --corpus"),
        (["--resume", "nowhere"], "There is no folder nowhere"),
        (["--ds-config", CPU_JSON, "--cased"], "so they need --tokenizer"),
        (["--resume", "x", "--recipe", "tiny"], "cannot be combined with --recipe"),
        (["--threads", "0"], "not a positive whole number"),
        (["--no-such-flag"], "unrecognized arguments"),
    ],
)
def test_a_wrong_command_line_is_refused_with_what_to_do(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run("pretrain", *arguments, status=2, folder=tmp_path)
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_impossible_batch_plan_is_refused_before_data_is_built(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 3, "fp16": {"enabled": true}}')
    result = run("pretrain", "--ds-config", "ds.json", "--recipe", "tiny", status=2, folder=tmp_path)
    assert "global_batch_size (recipe) is 16" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ds.json"]


def test_an_incomplete_launcher_environment_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    arguments = ["--ds-config", CPU_JSON, "--recipe", "tiny", "--local_rank=0"]
    for launch, missing in (
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "2"}, "RANK is missing"),
    ):
        result = run("pretrain", *arguments, status=2, folder=tmp_path, environment=launch)
        assert missing in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_run_directory_in_use_is_refused(store: TokenStore, straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with (run_dir / ".lock").open("w") as lock:
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run("pretrain", *start_arguments(store, run_dir), status=2)
    assert "in use by process 4711" in result.stderr
    taken = run("pretrain", *start_arguments(store, straight), status=2)
    assert "already holds a run" in taken.stderr


def test_resuming_a_finished_run_is_not_an_error_and_names_its_report_and_its_model(
    straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    main(["pretrain", "--resume", str(straight)])
    assert capsys.readouterr().out == (
        f"The run {straight} is finished, at step 40: nothing is left to train.\n"
        f"Its report: electra-ds report {straight}\n"
        f"As transformers models: electra-ds export {straight}\n"
    )
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*")} == before


def test_a_store_that_is_not_the_runs_own_is_refused(store: TokenStore, straight: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("recipe.yaml", "deepspeed.json", "run.json"):
        (copy / name).write_text((straight / name).read_text())
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(record | {"store_fingerprint": "other"}))
    result = run("pretrain", "--resume", str(copy), status=2)
    assert "is not the one that" in result.stderr


@pytest.mark.slow
def test_a_run_does_not_resume_with_another_recipe(straight: Path, tmp_path: Path) -> None:
    """A flipped bit, or an edit, that makes another recipe of it."""
    copy = tmp_path / "run"
    shutil.copytree(straight, copy, symlinks=True)
    (copy / "status.json").unlink()
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("learning_rate: 0.001", "learning_rate: 0.003"))
    result = run("pretrain", "--resume", str(copy), status=2)
    assert "recipe.yaml has changed since" in result.stderr
    assert "optimizer.learning_rate is 0.003, not 0.001" in result.stderr
    assert (copy / "metrics.jsonl").read_text() == (straight / "metrics.jsonl").read_text()


def test_a_run_whose_checkpoints_are_gone_is_not_started_anew(straight: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("recipe.yaml", "deepspeed.json", "run.json", "metrics.jsonl"):
        (copy / name).write_text((straight / name).read_text())
    result = run("pretrain", "--resume", str(copy), status=2)
    assert "its checkpoints are gone" in result.stderr
    assert (copy / "metrics.jsonl").read_text() == (straight / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_full_disk_in_a_run_is_a_clear_error_and_the_run_goes_on_when_there_is_room(
    store: TokenStore, straight: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY)); "
        f"sys.path.insert(0, {str(REPOSITORY)!r}); from electra_ds.cli import main; main(sys.argv[1:])"
    )
    arguments = ["pretrain", *start_arguments(store, run_dir, *DROPOUT)]
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert "Cannot write the checkpoint" in result.stderr
    assert RunDirectory(run_dir).status() == "failed"
    run("pretrain", "--resume", str(run_dir))
    assert train_losses(run_dir) == train_losses(straight)


@pytest.mark.usefixtures("half_on_cpu")
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize(
    "precision",
    [{}, {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}, {"torch_autocast": {"enabled": True}}],
    ids=str,
)
def test_gradients_that_stay_non_finite_stop_the_run_and_name_the_last_good_checkpoint(
    store: TokenStore, tmp_path: Path, process_group: Ranks, precision: dict[str, Any], stage: int
) -> None:
    """A weight is made NaN at step 10, so every later gradient is; no optimizer step may spread it."""
    recipe = small_recipe()
    config = tmp_path / "ds.json"
    config.write_text(json.dumps(precision | {"zero_optimization": {"stage": stage}}))
    options = PretrainOptions(ds_config=config, threads=1, save_every=5, log_every=1, eval_windows=16)
    directory = RunDirectory(tmp_path / "run")
    with directory.locked(), contextlib.ExitStack() as held:
        plan = plan_new(options, recipe, directory, process_group)
        job = prepare.prepare_new(options, recipe, plan, store, directory, process_group)
        loop = pretrain.PretrainLoop(job, process_group)
        loop.start(held)
        train_step = loop.engine.train_step

        def poisoned(batch: Any, step: int) -> Any:
            if step == 10:
                weight = loop.engine.module.discriminator_head.dense.weight
                with torch.no_grad():
                    weight[0, 0] = float("nan")
                    if isinstance(loop.engine.optimizer, MasterAdamW):
                        loop.engine.optimizer.masters[weight][0, 0] = float("nan")
            return train_step(batch, step)

        loop.engine.train_step = poisoned  # type: ignore[method-assign]
        with pytest.raises(
            TrainingError, match=r"not been finite for \d+ steps.*last good checkpoint is .*step-000000"
        ):
            loop.run(Preemption(process_group))
        optimizer = loop.engine.optimizer
    assert optimizer.taken_steps <= 10
    assert optimizer.taken_steps + int(optimizer.skipped_steps) == loop.step
    lines = (directory.metrics).read_text()
    assert "NaN" not in lines  # JSON has none
    assert '"loss": null' in lines


# --- metrics


def test_evaluation_agrees_with_a_second_implementation(store: TokenStore, process_group: Ranks) -> None:
    recipe = small_recipe("model.initializer_range=0.3")
    model = model_for(store, recipe)
    split = split_holdout(store.documents, recipe.data, recipe.seed)
    evaluator = Evaluator(store, split, recipe, num_windows=24, ranks=process_group)
    found = evaluator(model.eval(), torch.device("cpu"), 5)
    batch = held_out_batch(store, split, recipe, 24)
    whole = batch.micro_batch(0, 24)
    model.eval()
    with torch.no_grad():
        output = model(whole)
    labels = output.is_replaced_BT[whole.counted_BT].numpy()
    scores = output.discriminator_logits_BT[whole.counted_BT].numpy()
    assert found["discriminator_auc"] == pytest.approx(roc_auc_score(labels, scores), rel=1e-6)
    guessed = scores > 0
    assert found["discriminator_precision"] == pytest.approx((guessed & labels).sum() / max(1, guessed.sum()))
    assert found["discriminator_recall"] == pytest.approx((guessed & labels).sum() / labels.sum())
    assert found["generator_loss"] == pytest.approx(output.generator_loss_sum.item() / batch.num_selected, rel=1e-5)
    at_mask = batch.masks.masked
    counts = np.ones(store.tokenizer.vocab_size)
    for start, stop in zip(*split.train, strict=True):
        counts += np.bincount(store.tokens[start:stop], minlength=len(counts))
    by_hand = -np.log(counts[batch.ids_BT[at_mask]] / counts.sum()).mean()
    assert found["unigram_loss"] == pytest.approx(by_hand, rel=1e-9)
    assert found["generator_gain"] == pytest.approx(found["unigram_loss"] - found["generator_masked_loss"])


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=60))
def test_the_area_under_the_roc_curve_is_scikit_learns_with_ties_too(examples: list[tuple[bool, int]]) -> None:
    labels, scores = np.array([label for label, _ in examples]), np.array([float(score) for _, score in examples])
    if labels.all() or not labels.any():
        assert math.isnan(area_under_roc(labels, scores))
    else:
        assert area_under_roc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), rel=1e-12, abs=1e-12)
        assert math.isnan(area_under_roc(labels, np.where(labels, np.inf, scores)))


def test_metrics_beyond_the_resumed_step_and_a_cut_line_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = RunLog(RunDirectory(tmp_path), TrackingSettings(), {}, 0)
    for step in range(1, 6):
        first.write("train", step, {"loss": step / 3})
    first.finish(None)
    path.write_text(path.read_text() + '{"kind": "tra')
    second = RunLog(RunDirectory(tmp_path), TrackingSettings(), {}, 3)
    second.write("train", 4, {"loss": 4.0})
    second.finish(None)
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 1 / 3), (2, 2 / 3), (3, 1.0), (4, 4.0)]


def test_one_damaged_line_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\ngarbage\n[1]\n{}\n{"kind": "train", "step": 2}\n')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def test_sample_sentences_mark_exactly_what_was_replaced(store: TokenStore) -> None:
    recipe = small_recipe("model.initializer_range=0.3")
    model = model_for(store, recipe).eval()
    batch = held_out_batch(store, split_holdout(store.documents, recipe.data, recipe.seed), recipe, 16)
    with torch.no_grad():
        replaced = model(batch.micro_batch(0, 16, packed=False)).is_replaced_BT.sum(1).tolist()
    for count, sentence in zip(replaced, sample_sentences(model, store.tokenizer, batch, 16), strict=True):
        assert len(re.findall(r"→[^→]*?\}[✓✗]", sentence.plain)) == count
        assert all(0 <= span.start < span.end <= len(sentence.plain) for span in sentence.spans)


# --- the command line


@pytest.mark.parametrize("name", ["pretrain", "build-data", "report", "export"])
def test_help_teaches_by_example(name: str) -> None:
    assert "example" in run(name, "--help").stdout


def test_the_three_ways_to_start_it_are_one_program() -> None:
    def said(*command: str) -> str:
        done = subprocess.run(
            [*command, "--help"], capture_output=True, text=True, check=True, cwd=REPOSITORY,
            env=os.environ | {"COLUMNS": "9999"},
        )  # fmt: skip
        return done.stdout

    module = said(sys.executable, "-m", "electra_ds", "pretrain")
    assert module.startswith("usage: python -m electra_ds pretrain [-h]")
    assert module.replace("python -m electra_ds ", "bin/") == said(sys.executable, "bin/pretrain")


SLOW_IMPORTS = {
    "torch", "torch._dynamo", "deepspeed", "transformers", "scipy", "sklearn", "matplotlib", "numpy", "tokenizers",
    "datasets", "wandb", "pandas", "pyarrow", "pydantic", "ray",
}  # fmt: skip


def test_help_does_not_wait_for_torch() -> None:
    assert imported("import electra_ds.cli as c; c.build_parser()", SLOW_IMPORTS) == set()


@pytest.mark.slow
def test_a_run_waits_for_no_more_than_it_needs(store: TokenStore, tmp_path: Path) -> None:
    """torch's compiler, transformers and scikit-learn each take as long to import as torch."""
    arguments = start_arguments(store, tmp_path / "run", "schedule.total_steps=3", "schedule.warmup_steps=1")
    assert imported(f"from electra_ds.cli import main; main({['pretrain', *arguments]!r})", SLOW_IMPORTS) == {
        "torch", "deepspeed", "numpy", "tokenizers", "pyarrow", "pydantic", "matplotlib", "pandas",
    }  # fmt: skip
    assert "deepspeed" not in imported("import electra_ds.api.run", SLOW_IMPORTS)  # to look at a run
