"""The command: seeds, plans, resuming, options, memory and bad input, on tasks of a few words and tiny encoders."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from electra_ds.api.launch import ConsoleDisplay
from electra_ds.cli import main
from electra_ds.config.finetune_recipe import Finetuning, load_finetune_recipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.core import devices
from electra_ds.data.sampling import shuffled
from electra_ds.finetuning import finetune as finetune_module
from electra_ds.finetuning.heads import TaskModel
from electra_ds.finetuning.inputs import _ORDER, TaskMicroBatch
from electra_ds.finetuning.tasks.sequence import SequenceTask
from electra_ds.interop.export_finetuned import export_finetuned
from electra_ds.training.checkpoint import CheckpointFolder, open_checkpoint
from electra_ds.training.engine import Engine
from tests import forks
from tests.finetune_runs import (
    BAD,
    GOOD,
    NO_DROPOUT,
    arguments_of,
    die_at,
    evaluations_of,
    final_tensors,
    finetune,
    in_own_process,
    logits_of,
    losses_of,
    outcome,
    predictions_of,
    reviews,
    same_tensors,
    scores_of,
    tiny_electra,
    write_csv,
    write_glue,
    write_squad,
)
from tests.training.test_out_of_memory import out_of_memory

pytestmark = pytest.mark.usefixtures("process_group")
DRY = ("head.dropout=0",)
"""Beside an encoder without dropout, whose noise belongs to the plan."""


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("many"), train=160)


@pytest.fixture(scope="module")
def squad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squad(write_squad(tmp_path_factory.mktemp("squad")), "1.1")


@pytest.fixture(scope="module")
def electra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_electra(tmp_path_factory.mktemp("electra"))


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_electra(tmp_path_factory.mktemp("dry"), **NO_DROPOUT)


def resume(run_dir: Path, *arguments: object, status: int = 0) -> str:
    return finetune("--resume", run_dir, *arguments, status=status)


def refused(*arguments: object) -> str:
    """The one message of a command that ends before anything is trained."""
    said = finetune(*arguments, status=2)
    lines = [line for line in said.splitlines() if line.startswith("electra-ds finetune: ") or "error: " in line]
    assert len(lines) == 1, said
    return said[said.index(lines[0]) :]


# --- one seed


@pytest.fixture(scope="module")
def straight(electra: Path, glue: Path, process_group: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 steps of MRPC with dropout, in one go."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    finetune(*arguments_of(electra, glue, "mrpc", run_dir, seed=3, eval_every=5))
    return run_dir


def test_one_seed_gives_one_outcome_to_the_bit_and_another_another(
    straight: Path, electra: Path, glue: Path, tmp_path: Path
) -> None:
    for seed in (3, 4):
        finetune(*arguments_of(electra, glue, "mrpc", tmp_path / str(seed), seed=seed, eval_every=5))
    assert outcome(tmp_path / "3") == outcome(straight)
    assert same_tensors(final_tensors(tmp_path / "3"), final_tensors(straight))
    assert losses_of(tmp_path / "4") != losses_of(straight)
    assert logits_of(tmp_path / "4") != logits_of(straight)
    assert not same_tensors(final_tensors(tmp_path / "4"), final_tensors(straight))


def test_a_run_leaves_what_it_can_be_judged_from(straight: Path) -> None:
    assert {path.name for path in straight.iterdir()} >= {
        "recipe.yaml", "deepspeed.json", "run.json", "metrics.jsonl", "status.json", "checkpoints", "scores.json",
        "predictions",
    }  # fmt: skip
    assert json.loads((straight / "status.json").read_text()) == {"status": "done", "step": 24}
    assert [line["step"] for line in evaluations_of(straight)] == [5, 10, 15, 20, 24]
    scores, last = scores_of(straight), evaluations_of(straight)[-1]
    assert (scores["task"], scores["recipe"], scores["seed"], scores["step"]) == ("mrpc", "rc2020", 3, 24)
    assert scores["chosen"] == "last"
    of_dev = scores["sets"]["dev"]
    assert of_dev["metrics"] == {name: last[name] for name in ("accuracy", "f1")}
    predictions = predictions_of(straight)
    right = [line["prediction"] == line["label"] for line in predictions]
    assert sum(right) / len(right) == of_dev["metrics"]["accuracy"]
    assert sum(of_dev["confusion"][index][index] for index in (0, 1)) == sum(right)
    assert all(
        line["prediction"] == ("not_equivalent", "equivalent")[int(np.argmax(line["logits"]))] for line in predictions
    )


PARTS = ("head", "order", "dropout", "encoder")


@pytest.mark.parametrize("free", [*PARTS, None])
def test_each_of_them_follows_the_seed_on_its_own(
    free: str | None, electra: Path, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head's first weights, the order of the examples, dropout and --random-init's encoder: with the seeds of the
    three others held, another seed gives other losses; with all held, the same."""
    held = set(PARTS) - {free}
    builder, head, encoder, dropout = (
        finetune_module.TaskBatchBuilder, SequenceTask.new_head, finetune_module.make_encoder, devices.seed_dropout,
    )  # fmt: skip
    if "order" in held:
        monkeypatch.setattr(
            finetune_module, "TaskBatchBuilder", lambda inputs, size, _, reduction: builder(inputs, size, 0, reduction)
        )
    if "head" in held:
        monkeypatch.setattr(
            SequenceTask,
            "new_head",
            staticmethod(lambda recipe, *rest: head(recipe.model_copy(update={"seed": 0}), *rest)),
        )
    if "encoder" in held:
        monkeypatch.setattr(finetune_module, "make_encoder", lambda config, _: encoder(config, 0))
    if "dropout" in held:
        monkeypatch.setattr(devices, "seed_dropout", lambda device, _, *rest: dropout(device, 0, *rest))
    found = {}
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        finetune(*arguments_of(electra, glue, "mrpc", tmp_path / name, seed=seed, random_init=True, stop_at=3))
        found[name] = losses_of(tmp_path / name)
    assert found["first"] == found["again"]
    assert (found["first"] == found["other"]) == (free is None)


def test_random_init_takes_the_shape_and_the_tokenizer_alone(
    electra: Path, dry: Path, glue: Path, tmp_path: Path
) -> None:
    """Whatever weights lie there; the seed decides, and the record says it."""
    other = tiny_electra(tmp_path / "other", seed=8)
    for name, model in (("a", electra), ("b", other)):
        finetune(*arguments_of(model, glue, "sst-2", tmp_path / name, random_init=True, stop_at=4))
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")
    finetune(*arguments_of(electra, glue, "sst-2", tmp_path / "c", stop_at=4))
    assert losses_of(tmp_path / "c") != losses_of(tmp_path / "a")
    resume(tmp_path / "a")
    assert scores_of(tmp_path / "a")["model"].endswith(" (random weights)")


# --- any plan


def json_of(path: Path, stage: int, micro_batch: int, **values: Any) -> Path:
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    path.write_text(json.dumps({"zero_optimization": zero, "train_micro_batch_size_per_gpu": micro_batch} | values))
    return path


RECIPES = {
    "rc2020": ("mrpc", "rc2020"),
    "original": ("sts-b", "original"),
    "original-squad": ("squad2", "original"),
}
BY_PLAN = ("global_batch_size=32", "data.max_length=48", "schedule.epochs=5", *DRY)
SMALL_JOINT = ("head.span_hidden_size=16", "head.beam_size=4")


def plan_run(kind: str, model: Path, glue: Path, squad: Path, run_dir: Path, ds_json: Path) -> list[str]:
    task, recipe = RECIPES[kind]
    arguments = arguments_of(
        model, squad if task == "squad2" else glue, task, run_dir, *BY_PLAN,
        *(SMALL_JOINT if task == "squad2" else ()), recipe=recipe,
    )  # fmt: skip
    arguments[arguments.index("--ds-config") + 1] = str(ds_json)
    return arguments


@pytest.fixture(scope="module")
def whole(
    dry: Path, glue: Path, squad: Path, process_group: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Runs with the whole batch at once."""
    folder = tmp_path_factory.mktemp("whole")
    for kind in RECIPES:
        ds_json = json_of(folder / f"{kind}.json", 0, 32)
        finetune(*plan_run(kind, dry, glue, squad, folder / kind, ds_json))
    return {kind: folder / kind for kind in RECIPES}


def check_same(run_dir: Path, expected: Path) -> None:
    """To rounding: losses, and what the head says of the dev set."""
    np.testing.assert_allclose(losses_of(run_dir), losses_of(expected), rtol=1e-5)
    if (expected / "predictions" / "dev.jsonl").exists():
        np.testing.assert_allclose(logits_of(run_dir), logits_of(expected), rtol=1e-4, atol=1e-4)
        assert [line["id"] for line in predictions_of(run_dir)] == [line["id"] for line in predictions_of(expected)]
        return
    for name in ("dev-na-scores", "dev-n-best"):
        found, wanted = (
            json.loads((path / "predictions" / f"{name}.json").read_text()) for path in (run_dir, expected)
        )
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            scores = [(found[key], value)] if name.endswith("scores") else list(zip(found[key], value, strict=True))
            for ours, theirs in scores:
                numbers = (ours, theirs) if name.endswith("scores") else (ours[1], theirs[1])
                assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-4)


PLANS = {
    "rc2020": [(0, 8), (0, 1), (3, 16)],
    "original": [(1, 8), (2, 32)],
    "original-squad": [(2, 16), (3, 8)],
}


@pytest.mark.parametrize(
    ("kind", "stage", "micro_batch"), [(kind, *plan) for kind, plans in PLANS.items() for plan in plans]
)
def test_any_plan_gives_the_same_losses_and_predictions(
    kind: str, stage: int, micro_batch: int, whole: dict[str, Path], dry: Path, glue: Path, squad: Path, tmp_path: Path
) -> None:
    ds_json = json_of(tmp_path / "ds.json", stage, micro_batch)
    finetune(*plan_run(kind, dry, glue, squad, tmp_path / "run", ds_json))
    check_same(tmp_path / "run", whole[kind])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("rc2020", 2),
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in (("original-squad", 3), ("original", 0))),
    ],
)
def test_two_ranks_give_the_same_losses_and_predictions(
    kind: str, stage: int, whole: dict[str, Path], dry: Path, glue: Path, squad: Path, tmp_path: Path
) -> None:
    ds_json = json_of(tmp_path / "ds.json", stage, 8)
    in_own_process(plan_run(kind, dry, glue, squad, tmp_path / "run", ds_json), ranks=2)
    check_same(tmp_path / "run", whole[kind])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [{}, {"fp16": {"enabled": True}}, {"bf16": {"enabled": True}}], ids=str)
def test_a_gpu_trains_to_what_the_task_can_give(
    precision: dict[str, Any], electra: Path, many: Path, tmp_path: Path
) -> None:
    ds_json = json_of(tmp_path / "ds.json", 0, 8, **precision)
    arguments = arguments_of(electra, many, "sst-2", tmp_path / "run", *LEARNT)
    arguments[arguments.index("--ds-config") + 1] = str(ds_json)
    finetune(*arguments)
    assert scores_of(tmp_path / "run")["sets"]["dev"]["metrics"]["accuracy"] > 0.9


# --- against a loop of its own


class Plain(nn.Module):
    """An encoder and a head written down once more."""

    def __init__(self, folder: Path, recipe: str, outputs: int) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder)
        self.layers = nn.ModuleList(
            [nn.Linear(32, 32), nn.Linear(32, outputs)] if recipe == "rc2020" else [nn.Linear(32, outputs)]
        )
        self.is_mean = recipe == "rc2020"

    def forward(self, encoded: Any) -> torch.Tensor:
        hidden = self.encoder(**encoded).last_hidden_state
        if self.is_mean:
            weights = encoded["attention_mask"].float()
            hidden = torch.einsum("bth,bt->bh", hidden, weights) / weights.sum(1, keepdim=True)
            return self.layers[1](functional.gelu(self.layers[0](hidden)))
        return self.layers[0](hidden[:, 0])


def depth_of(name: str) -> int:
    """0 for the embeddings, 1 and 2 for the layers, 3 for the head, of two layers."""
    if name.startswith("layers."):
        return 3
    return int(name.split(".layer.")[1][0]) + 1 if ".layer." in name else 0


EXPONENTS = {"rc2020": [1, 1, 0, 0], "original": [4, 3, 2, 0]}


@pytest.mark.parametrize("recipe", ["rc2020", "original"])
def test_losses_are_those_of_a_loop_written_in_plain_torch(
    recipe: str, whole: dict[str, Path], dry: Path, glue: Path
) -> None:
    """10 steps: torch's AdamW with a group for each depth, or Adam without bias correction by hand."""
    run_dir = whole[recipe]
    is_study = recipe == "rc2020"
    lines = [
        line.split("\t") for line in (glue / ("MRPC" if is_study else "STS-B") / "train.tsv").read_text().split("\n")
    ]
    rows = [line for line in lines[1:] if len(line) > 1]
    if is_study:
        texts, labels = [(row[3], row[4]) for row in rows], torch.tensor([int(row[0]) for row in rows])
    else:
        texts = [(row[1], row[2]) for row in rows] + [(row[2], row[1]) for row in rows]
        labels = torch.tensor([float(row[3]) / 5 for row in rows] * 2)
    total = math.ceil(5 * len(texts) / 32)
    warmup, peak = int(0.1 * total), 2e-3
    model = Plain(dry, recipe, 2 if is_study else 1)
    head = SequenceTask.new_head(load_finetune_recipe(recipe, "mrpc"), 32, 2 if is_study else 1)
    for ours, theirs in zip(model.layers.parameters(), head.parameters(), strict=True):
        ours.data.copy_(theirs.data)
    tokenizer = AutoTokenizer.from_pretrained(dry)
    named = [(name, p) for name, p in model.named_parameters() if not name.startswith("encoder.pooler")]
    scale = {name: 0.8 ** EXPONENTS[recipe][depth_of(name)] for name, _ in named}
    optimizer = torch.optim.AdamW(
        [{"params": [parameter], "name": name} for name, parameter in named], eps=1e-6, weight_decay=0.01
    )
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in named}
    found = []
    for step in range(10):
        order = shuffled(np.arange(step * 32, step * 32 + 32), len(texts), 0, _ORDER).tolist()
        encoded = tokenizer(
            [texts[i][0] for i in order],
            [texts[i][1] for i in order],
            padding=True,
            return_tensors="pt",
            return_token_type_ids=True,
        )
        logits, wanted = model.train()(encoded), labels[order]
        loss = functional.cross_entropy(logits, wanted) if is_study else functional.mse_loss(logits[:, 0], wanted)
        found.append(loss.item())
        model.zero_grad()
        (loss if is_study else 32 * loss).backward()  # the original adds up
        nn.utils.clip_grad_norm_([parameter for _, parameter in named], 1.0)
        rise = min(1.0, step / warmup) if warmup else 1.0
        rate = peak * (rise if is_study and step < warmup else 1.0)
        rate *= min(1.0, (total - step) / (total - warmup)) if is_study else rise * (1 - step / total)
        if is_study:
            for group in optimizer.param_groups:
                group["lr"] = rate * scale[group["name"]]
            optimizer.step()
            continue
        for name, parameter in named:
            first, second = moments[name]
            first.mul_(0.9).add_(parameter.grad, alpha=0.1)
            second.mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
            update = first / (second.sqrt() + 1e-6)
            if not (name.endswith("bias") or "LayerNorm" in name):
                update = update + 0.01 * parameter.data
            parameter.data.sub_(rate * scale[name] * update)
    np.testing.assert_allclose(losses_of(run_dir)[:10], found, rtol=1e-5)


# --- resuming


SAVED = {"seed": 3, "eval_every": 5, "save_every": 4}


def same_end(run_dir: Path, straight: Path) -> None:
    assert outcome(run_dir) == outcome(straight)
    assert same_tensors(final_tensors(run_dir), final_tensors(straight))


def test_a_stop_right_after_a_logged_step_does_not_call_its_losses_not_finite(
    electra: Path, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time limit has passed when the run starts, so it stops after its first step."""
    shown: list[str] = []
    monkeypatch.setattr(ConsoleDisplay, "on_report", lambda self, progress, summary: shown.append(summary))
    finetune(*arguments_of(electra, glue, "mrpc", tmp_path / "run", log_every=1, time_limit="1s"))
    assert shown
    assert not any("not finite" in numbers for numbers in shown)


@pytest.mark.parametrize("stop_at", [1, 5, 13])
def test_stopped_and_resumed_is_straight_bit_for_bit(
    stop_at: int, straight: Path, electra: Path, glue: Path, tmp_path: Path
) -> None:
    """Also where it stops at an evaluation (5) and twice; only the evaluation at the stop itself is one more."""
    run_dir = tmp_path / "run"
    said = finetune(*arguments_of(electra, glue, "mrpc", run_dir, **SAVED, stop_at=stop_at))
    how = f"Stopped at step {stop_at} of 24, because of --stop-at. To resume: electra-ds finetune --resume {run_dir}"
    assert how in " ".join(said.split())
    assert not (run_dir / "scores.json").exists()
    resume(run_dir, "--stop-at", stop_at + 1)
    resume(run_dir)
    assert losses_of(run_dir) == losses_of(straight)
    assert scores_of(run_dir) == scores_of(straight)
    assert predictions_of(run_dir) == predictions_of(straight)
    assert same_tensors(final_tensors(run_dir), final_tensors(straight))
    found = {line["step"]: line for line in evaluations_of(run_dir)}
    assert found.keys() == {5, 10, 15, 20, 24} | {stop_at, stop_at + 1}
    assert all(found[line["step"]] == line for line in evaluations_of(straight))


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", ["9", "2", "end"])
def test_killed_and_resumed_is_straight_bit_for_bit(
    kill_at: str, straight: Path, electra: Path, glue: Path, tmp_path: Path
) -> None:
    """SIGKILL after a checkpoint or two, before the first, and when all is trained and the scores are to be written."""
    run_dir = tmp_path / "run"
    arguments = arguments_of(electra, glue, "mrpc", run_dir, **SAVED)
    killed = forks.start(["finetune", *arguments], run_dir, tmp_path / "log", prepare={0: (die_at, kill_at)})
    assert killed.wait() == [-signal.SIGKILL], killed.output
    assert not (run_dir / "status.json").exists()
    resume(run_dir)
    same_end(run_dir, straight)


@contextmanager
def before_step(number: int, act: Callable[[], None]) -> Iterator[None]:
    train_step = Engine.train_step

    def acting(self: Engine, batch: Any, step: int, samples: Any = None) -> Any:
        if step == number:
            act()
        return train_step(self, batch, step, samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "train_step", acting)
        yield


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_leaves_with_its_status_and_says_how_to_resume(
    number: signal.Signals, straight: Path, electra: Path, glue: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with before_step(7, lambda: os.kill(os.getpid(), number)):
        said = finetune(*arguments_of(electra, glue, "mrpc", run_dir, **SAVED), status=128 + number)
    assert f"{number.name}: saved {run_dir / 'checkpoints' / 'step-'}" in said
    assert f"Resume it with: electra-ds finetune --resume {run_dir}" in said
    assert json.loads((run_dir / "status.json").read_text())["status"] == "stopped"
    assert (run_dir / "requeue").exists()
    resume(run_dir)
    same_end(run_dir, straight)
    assert not (run_dir / "requeue").exists()


def test_a_run_goes_on_under_another_json_to_rounding(
    whole: dict[str, Path], dry: Path, glue: Path, squad: Path, tmp_path: Path
) -> None:
    first, second, third = (
        json_of(tmp_path / f"{stage}.json", stage, micro) for stage, micro in ((0, 32), (3, 8), (1, 16))
    )
    finetune(*plan_run("original", dry, glue, squad, tmp_path / "run", first), "--stop-at", 4)
    resume(tmp_path / "run", "--ds-config", second, "--stop-at", 9)
    resume(tmp_path / "run", "--ds-config", third)
    check_same(tmp_path / "run", whole["original"])


@pytest.fixture
def stopped(electra: Path, tmp_path: Path) -> Path:
    """A run on its own copy of the data, at step 6."""
    write_glue(tmp_path / "glue")
    finetune(*arguments_of(electra, tmp_path / "glue", "mrpc", tmp_path / "run", stop_at=6))
    return tmp_path / "run"


def test_a_run_whose_data_have_changed_cannot_be_resumed(stopped: Path) -> None:
    for name in ("train.tsv", "dev.tsv"):
        path = stopped.parent / "glue" / "MRPC" / name
        before = path.read_text()
        path.write_text(before.replace(GOOD[0], BAD[0], 1) if GOOD[0] in before else before.replace("film", "play", 1))
        said = refused("--resume", stopped)
        assert "has changed since" in said
        assert "Put the files back, or start a new run." in said
        assert f"--resume {stopped} --data-dir DIR" in said
        path.write_text(before)
    resume(stopped)


def test_a_run_whose_recipe_has_changed_cannot_be_resumed(stopped: Path) -> None:
    path = stopped / "recipe.yaml"
    before = path.read_text()
    path.write_text(before.replace("dropout: 0.1", "dropout: 0.2"))
    assert path.read_text() != before
    said = refused("--resume", stopped)
    assert "head.dropout is 0.2, not 0.1" in said
    assert "--init-from" not in said  # which is of pretraining
    path.write_text(before)
    resume(stopped)


def test_a_run_whose_number_of_examples_was_edited_cannot_be_resumed(stopped: Path) -> None:
    path = stopped / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"num_examples": record["num_examples"] + 32}))
    assert f"but there are {record['num_examples']}: it was edited" in refused("--resume", stopped)
    path.write_text(json.dumps(record))
    resume(stopped)


def test_a_run_without_a_checkpoint_whose_model_has_changed_cannot_be_resumed(
    electra: Path, glue: Path, tmp_path: Path
) -> None:
    shutil.copytree(electra, tmp_path / "model")
    finetune(*arguments_of(tmp_path / "model", glue, "mrpc", tmp_path / "run", stop_at=2))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "status.json").unlink()
    tiny_electra(tmp_path / "model", seed=9)
    assert "has changed since" in refused("--resume", tmp_path / "run")


def test_a_run_needs_its_model_no_more_once_it_has_a_checkpoint(
    straight: Path, electra: Path, glue: Path, tmp_path: Path
) -> None:
    shutil.copytree(electra, tmp_path / "model")
    finetune(*arguments_of(tmp_path / "model", glue, "mrpc", tmp_path / "run", **SAVED, stop_at=8))
    shutil.rmtree(tmp_path / "model")
    resume(tmp_path / "run")
    assert losses_of(tmp_path / "run") == losses_of(straight)


def test_resuming_a_finished_run_is_not_an_error_and_names_its_scores_and_its_model(straight: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    assert finetune("--resume", straight) == (
        f"The run {straight} is finished: nothing is left to train. Its scores are in {straight / 'scores.json'}.\n"
        "Several runs together: electra-ds report RUN RUN …\n"
        f"As a transformers model: electra-ds export {straight} --encoder-only\n"
        f"To predict the test sets: electra-ds finetune --resume {straight} --predict-test\n"
    )
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*")} == before


def test_a_finished_run_without_test_sets_does_not_suggest_to_predict_them(
    electra: Path, glue: Path, tmp_path: Path
) -> None:
    shutil.copytree(glue, tmp_path / "glue")
    (tmp_path / "glue" / "MRPC" / "test.tsv").unlink()
    finetune(*arguments_of(electra, tmp_path / "glue", "mrpc", tmp_path / "run"))
    said = finetune("--resume", tmp_path / "run")
    assert "is finished" in said
    assert "--predict-test" not in said


def test_what_is_no_run_of_this_command_is_not_resumed(stopped: Path, tmp_path: Path) -> None:
    assert f"There is no folder {tmp_path / 'nowhere'}" in refused("--resume", tmp_path / "nowhere")
    checkpoint = next(path for path in (stopped / "checkpoints").glob("step-*") if not path.is_symlink())
    before = sorted(path.name for path in checkpoint.iterdir())
    assert f"--resume {stopped}" in refused("--resume", checkpoint)
    assert sorted(path.name for path in checkpoint.iterdir()) == before


def test_each_command_resumes_its_own_runs_alone(stopped: Path, store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["pretrain", "--resume", str(stopped)])
    assert left.value.code == 2
    assert "is a run of electra-ds finetune, but a run of electra-ds pretrain is needed here" in capsys.readouterr().err
    record = json.loads((stopped / "run.json").read_text())
    (stopped / "run.json").write_text(json.dumps(record | {"kind": "pretrain"}))
    assert "is a run of electra-ds pretrain, but a run of electra-ds finetune is needed here" in refused(
        "--resume", stopped
    )


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--seed", "0"), ("--model", "x"), ("--task", "rte"), ("--set", "seed=1"), ("--max-train-examples", "5")],
)
def test_what_a_run_has_settled_is_not_given_again(flag: str, value: str, stopped: Path) -> None:
    said = refused("--resume", stopped, flag, value)
    assert f"cannot be combined with {flag}." in said or f"leave out {flag}." in said


@pytest.mark.slow
def test_an_own_task_that_is_called_like_one_of_glue_is_resumed_as_its_own(electra: Path, tmp_path: Path) -> None:
    own = {
        name: write_csv(tmp_path / f"{name}.csv", ("text", "label"), reviews(size, 1))
        for name, size in (("rte", 16), ("held", 8))
    }
    arguments = arguments_of(
        electra, None, "", tmp_path / "run", train=own["rte"], dev=own["held"], stop_at=2
    )  # fmt: skip
    finetune(*arguments)
    resume(tmp_path / "run")
    assert scores_of(tmp_path / "run")["sets"]["dev"]["rows"] == 8


# --- options


LEARNT = ("optimizer.learning_rate=3e-3", "schedule.epochs=12")
"""With 160 examples or so; LEARNABLE, with 64, comes far enough to fall again."""
LEARNABLE = ("optimizer.learning_rate=5e-3", "schedule.epochs=12", "data.segment_ids=true")


@pytest.mark.parametrize("recipe", ["rc2020", "original"])
def test_a_task_that_can_be_learnt_is(recipe: str, electra: Path, many: Path, tmp_path: Path) -> None:
    finetune(*arguments_of(electra, many, "sst-2", tmp_path / "run", *LEARNT, recipe=recipe))
    assert scores_of(tmp_path / "run")["sets"]["dev"]["metrics"]["accuracy"] > 0.9
    losses = losses_of(tmp_path / "run")
    assert np.mean(losses[-8:]) < 0.5 * np.mean(losses[:8])


SUBMISSIONS = {
    "sst-2": ("SST-2.tsv",), "cola": ("CoLA.tsv",), "mrpc": ("MRPC.tsv",), "sts-b": ("STS-B.tsv",),
    "rte": ("RTE.tsv",), "mnli": ("MNLI-m.tsv", "MNLI-mm.tsv"),
}  # fmt: skip
WRITTEN = {"rte": {"entailment", "not_entailment"}, "mnli": {"entailment", "neutral", "contradiction"}}


@pytest.mark.parametrize("task", SUBMISSIONS)
def test_predictions_of_the_test_sets_are_in_glues_files(task: str, electra: Path, glue: Path, tmp_path: Path) -> None:
    """And beside them with logits; without the option there are none."""
    finetune(*arguments_of(electra, glue, task, tmp_path / "run", stop_at=1))
    resume(tmp_path / "run", "--predict-test")
    run_dir = tmp_path / "run"
    files = sorted(path.name for path in (run_dir / "submission").iterdir())
    assert files == sorted(SUBMISSIONS[task])
    for name in files:
        header, *lines = (run_dir / "submission" / name).read_text().splitlines()
        assert header == "index\tprediction"
        rows = [line.split("\t") for line in lines]
        assert [row[0] for row in rows] == [str(index) for index in range(10)]
        if task == "sts-b":
            assert all(0 <= float(row[1]) <= 5 and len(row[1].split(".")[1]) == 3 for row in rows)
        else:
            assert {row[1] for row in rows} <= WRITTEN.get(task, {"0", "1"})
    scores = scores_of(run_dir)["sets"]
    tests = {"test_matched", "test_mismatched"} if task == "mnli" else {"test"}
    assert {name for name in scores if name.startswith("test")} == tests
    assert all(scores[name]["metrics"] == {} and scores[name]["rows"] == 10 for name in tests)
    assert len(predictions_of(run_dir, sorted(tests)[0])) == 10
    if task == "mnli":
        assert {name for name in scores if name.startswith("dev")} == {"dev_matched", "dev_mismatched"}
        assert evaluations_of(run_dir)[-1]["dev_matched/accuracy"] == scores["dev_matched"]["metrics"]["accuracy"]
        assert len(scores["dev_matched"]["labels"]) == 3


def test_fewer_training_examples_are_chosen_by_the_seed(electra: Path, glue: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        finetune(*arguments_of(electra, glue, "sst-2", tmp_path / name, seed=seed, max_train_examples=10))
        assert scores_of(tmp_path / name)["training_examples"] == 10
        assert len(losses_of(tmp_path / name)) == math.ceil(3 * 10 / 8)
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
    assert losses_of(tmp_path / "a") != losses_of(tmp_path / "c")


def test_both_orders_of_a_pair_are_trained_on_where_the_recipe_says_so(
    electra: Path, glue: Path, tmp_path: Path
) -> None:
    for value, expected in (("true", 128), ("false", 64)):
        said = finetune(
            *arguments_of(electra, glue, "mrpc", tmp_path / value, f"data.double_unordered={value}", stop_at=1)
        )
        assert f"data: {expected} training inputs; dev 24" in said
        assert f"{expected * 3 // 8} steps of 8 (3 epochs)" in said


@settings(max_examples=60, deadline=None)
@given(
    examples=st.integers(1, 5000), size=st.integers(1, 64), epochs=st.sampled_from([0.1, 1.0, 2.5, 3.0, 10.0]),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.99]),
)  # fmt: skip
def test_the_schedule_has_every_example_once_an_epoch(examples: int, size: int, epochs: float, share: float) -> None:
    recipe = load_finetune_recipe(
        "rc2020", "cola",
        [f"global_batch_size={size}", f"schedule.epochs={epochs}", f"schedule.warmup_share={share}"],
    )  # fmt: skip
    schedule = Finetuning(recipe, examples, 12).schedule
    exact = epochs * examples / size
    assert schedule.total_steps == max(1, math.ceil(round(exact, 6)))
    assert schedule.warmup_steps == min(int(share * schedule.total_steps), schedule.total_steps - 1)
    rows = np.concatenate(
        [
            shuffled(np.arange(step * size, (step + 1) * size), examples, 0, _ORDER)
            for step in range(-(-examples // size))
        ]
    )
    assert sorted(rows[:examples].tolist()) == list(range(examples))


def test_learning_rates_are_the_schedules(straight: Path, whole: dict[str, Path]) -> None:
    def rates(run_dir: Path) -> list[float]:
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [line["learning_rate"] for line in lines if line["kind"] == "train"]

    linear = [2e-3 * (step / 2 if step < 2 else (24 - step) / 22) for step in range(24)]
    np.testing.assert_allclose(rates(straight), linear, rtol=1e-9)
    product = [2e-3 * min(1, step / 2) * (1 - step / 20) for step in range(20)]
    np.testing.assert_allclose(rates(whole["original"]), product, rtol=1e-9)


@pytest.mark.parametrize("scale", ["unit", "raw"])
def test_scores_come_back_in_the_tasks_range(scale: str, electra: Path, many: Path, tmp_path: Path) -> None:
    """Targets of 1.25 and 4.5 of 5; what the head gives is scaled or not, what is predicted never is."""
    overrides = (*LEARNT, f"data.regression_scale={scale}", "data.double_unordered=false")
    finetune(*arguments_of(electra, many, "sts-b", tmp_path / "run", *overrides, recipe="original"))
    lines = predictions_of(tmp_path / "run")
    factor = 5 if scale == "unit" else 1
    for line in lines:
        assert line["prediction"] == pytest.approx(line["logits"][0] * factor, rel=1e-5)
    error = np.mean([(line["prediction"] - line["label"]) ** 2 for line in lines])
    assert error < 0.5 * np.var([line["label"] for line in lines])
    metrics = scores_of(tmp_path / "run")["sets"]["dev"]["metrics"]
    assert metrics["spearman"] > 0.7
    assert metrics.keys() == {"spearman", "pearson"}


def wrecked_after(good_steps: int) -> Any:
    """From that step on the learning rate is huge."""
    learning_rate = Engine.learning_rate
    return lambda self, step, *rest: learning_rate(self, step, *rest) if step < good_steps else 0.5


def test_the_best_evaluation_is_kept_and_scored(
    electra: Path, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the weights are wrecked afterwards; stopped on the way, with the test sets predicted by the best too."""
    monkeypatch.setattr(Engine, "learning_rate", wrecked_after(64))
    flags = {"eval_every": 16, "best": True, "predict_test": True}
    finetune(*arguments_of(electra, glue, "sst-2", tmp_path / "run", *LEARNABLE, **flags))
    found = evaluations_of(tmp_path / "run")
    accuracies = {line["step"]: line["accuracy"] for line in found}
    best = min(accuracies, key=lambda step: (-accuracies[step], step))
    assert best <= 64
    assert accuracies[96] < accuracies[best]
    scores = scores_of(tmp_path / "run")
    assert scores["step"] == best
    assert scores["chosen"] == f"best of {len(found)} evaluations on dev"
    assert scores["sets"]["dev"]["metrics"]["accuracy"] == accuracies[best]
    kept = open_checkpoint(CheckpointFolder(tmp_path / "run" / "best", keep=1).paths()[-1])
    assert kept.state["step"] == best
    finetune(*arguments_of(electra, glue, "sst-2", tmp_path / "short", *LEARNABLE, stop_at=best, eval_every=16))
    reached = final_tensors(tmp_path / "short")
    assert all(torch.equal(kept.tensors[name], tensor) for name, tensor in reached.items())
    finetune(*arguments_of(electra, glue, "sst-2", tmp_path / "parts", *LEARNABLE, **flags, stop_at=best + 3))
    left_over = (
        tmp_path / "parts" / "best" / "step-00000090"
    )  # of before a kill, after which less was left to go on from
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000096", left_over)
    resume(tmp_path / "parts")
    assert not left_over.exists()
    assert scores_of(tmp_path / "parts")["sets"] == scores["sets"]
    assert scores_of(tmp_path / "parts")["step"] == best
    assert "--best must be given when a run starts" in refused("--resume", tmp_path / "short", "--best")
    for name in ("dev", "test"):
        assert predictions_of(tmp_path / "parts", name) == predictions_of(tmp_path / "run", name)


def test_training_ends_early_after_so_many_evaluations_without_a_better_score(
    electra: Path, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And at the same step where it was stopped before, between evaluations or at one."""
    monkeypatch.setattr(Engine, "learning_rate", wrecked_after(40))
    flags = {"eval_every": 8, "early_stopping": 2, "save_every": 100}
    arguments = [electra, glue, "sst-2"]
    finetune(*arguments_of(*arguments, tmp_path / "run", *LEARNABLE, **flags))
    found = [(line["step"], line["accuracy"]) for line in evaluations_of(tmp_path / "run")]
    best = max(range(len(found)), key=lambda index: (found[index][1], -index))
    assert len(found) == best + 3
    end = found[-1][0]
    assert end < 96
    assert json.loads((tmp_path / "run" / "status.json").read_text()) == {"status": "done", "step": end}
    assert scores_of(tmp_path / "run")["step"] == end == len(losses_of(tmp_path / "run"))
    for name, stop_at in (("between", end - 3), ("at", end - 8)):
        finetune(*arguments_of(*arguments, tmp_path / name, *LEARNABLE, **flags, stop_at=stop_at))
        resume(tmp_path / name)
        assert losses_of(tmp_path / name) == losses_of(tmp_path / "run")
        assert scores_of(tmp_path / name) == scores_of(tmp_path / "run")
        assert same_tensors(final_tensors(tmp_path / name), final_tensors(tmp_path / "run"))


def test_a_run_that_died_after_it_had_ended_early_is_not_trained_further(
    electra: Path, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "learning_rate", wrecked_after(40))
    flags = {"eval_every": 8, "early_stopping": 2}
    finetune(*arguments_of(electra, glue, "sst-2", tmp_path / "run", *LEARNABLE, **flags))
    expected = outcome(tmp_path / "run")
    for name in ("status.json", "scores.json"):  # as a kill while they are made leaves it
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "predictions")
    resume(tmp_path / "run")
    assert outcome(tmp_path / "run") == expected


@pytest.mark.parametrize("task", ["sst-2", "sts-b"])
def test_a_run_that_has_diverged_has_failed_and_is_not_scored(
    electra: Path, glue: Path, tmp_path: Path, task: str
) -> None:
    arguments = arguments_of(electra, glue, task, tmp_path / "run", "optimizer.learning_rate=1e30")
    assert "scores are not finite at step" in finetune(*arguments, status=2)
    assert RunDirectory(tmp_path / "run").status() == "failed"
    assert not (tmp_path / "run" / "scores.json").exists()


def test_what_was_kept_for_the_best_is_missed_before_training_goes_on(
    electra: Path, glue: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    finetune(*arguments_of(electra, glue, "sst-2", run_dir, eval_every=4, best=True, stop_at=10))
    assert "--eval-every cannot change: --best" in resume(run_dir, "--eval-every", 5, status=2)
    shutil.rmtree(run_dir / "best")
    assert "weights are gone from" in resume(run_dir, status=2)


def test_test_sets_are_asked_for_only_where_there_are_some(electra: Path, glue: Path, tmp_path: Path) -> None:
    folder = tmp_path / "SST-2"
    shutil.copytree(glue / "SST-2", folder)
    (folder / "test.tsv").write_text("index\tsentence\n")
    assert "no test set of sst-2" in refused(
        *arguments_of(electra, folder, "sst-2", tmp_path / "run", predict_test=True)
    )
    finetune(*arguments_of(electra, folder, "sst-2", tmp_path / "run", stop_at=1))


@pytest.mark.parametrize("best", [False, True])
def test_the_test_sets_of_a_finished_run_are_predicted_later(
    electra: Path, glue: Path, tmp_path: Path, best: bool
) -> None:
    flags: dict[str, Any] = {"eval_every": 5} | ({"best": True} if best else {})
    finetune(*arguments_of(electra, glue, "mrpc", tmp_path / "at once", **flags, predict_test=True))
    finetune(*arguments_of(electra, glue, "mrpc", tmp_path / "later", **flags))
    losses = losses_of(tmp_path / "later")
    assert not (tmp_path / "later" / "submission").exists()
    resume(tmp_path / "later", "--predict-test")
    assert scores_of(tmp_path / "later") == scores_of(tmp_path / "at once")
    assert predictions_of(tmp_path / "later", "test") == predictions_of(tmp_path / "at once", "test")
    assert (tmp_path / "later/submission/MRPC.tsv").read_text() == (
        tmp_path / "at once/submission/MRPC.tsv"
    ).read_text()
    assert losses_of(tmp_path / "later") == losses
    assert json.loads((tmp_path / "later" / "status.json").read_text())["status"] == "done"
    said = finetune("--resume", tmp_path / "later", "--predict-test")
    assert "is finished" in said
    assert "To predict" not in said


@pytest.mark.parametrize(
    ("overrides", "flags", "told"),
    [
        (["head.pooling=mean"], {}, "electra-ds export {run} --encoder-only"),
        (["head.pooling=first", "head.hidden_size=null"], {}, "electra-ds export {run}\n"),
        ([], {"discard_weights": True}, "electra-ds report RUN RUN …\n"),
    ],
)
def test_the_export_that_is_named_at_the_end_is_one_that_can_be_made(
    electra: Path, glue: Path, tmp_path: Path, overrides: list[str], flags: dict[str, Any], told: str
) -> None:
    run = tmp_path / "run"
    said = finetune(*arguments_of(electra, glue, "mrpc", run, *overrides, **flags, max_train_examples=8))
    assert told.format(run=run) in said
    if not flags:
        export_finetuned(run, tmp_path / "out", encoder_only=told.endswith("--encoder-only"))


def test_discarded_weights_leave_scores_and_predictions(
    straight: Path, electra: Path, glue: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    finetune(*arguments_of(electra, glue, "mrpc", run_dir, seed=3, eval_every=5, discard_weights=True, best=True))
    assert not (run_dir / "checkpoints").exists()
    assert not (run_dir / "best").exists()
    assert losses_of(run_dir) == losses_of(straight)
    assert len(predictions_of(run_dir)) == 24
    said = finetune("--resume", run_dir)
    assert "is finished" in said
    assert "export" not in said


def test_a_stopped_run_keeps_its_weights_though_they_are_to_be_discarded(
    electra: Path, glue: Path, tmp_path: Path
) -> None:
    finetune(*arguments_of(electra, glue, "mrpc", tmp_path / "run", discard_weights=True, stop_at=3))
    assert CheckpointFolder(tmp_path / "run" / "checkpoints", keep=1).paths()
    resume(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_examples_of_ones_own_are_classified_and_scored(electra: Path, tmp_path: Path) -> None:
    train = write_csv(tmp_path / "mine.csv", ("review", "stars"), reviews(160, 1))
    dev = write_csv(tmp_path / "dev.csv", ("stars", "review"), [row[::-1] for row in reviews(24, 2)])
    test = write_csv(tmp_path / "test.csv", ("review",), [row[:1] for row in reviews(6, 3)])
    finetune(
        *arguments_of(
            electra,
            None,
            "",
            tmp_path / "run",
            *LEARNT,
            train=train,
            dev=dev,
            test=test,
            recipe="rc2020",
            text="review",
            label="stars",
        )
    )
    scores = scores_of(tmp_path / "run")
    assert scores["task"] == "mine"
    assert scores["sets"]["dev"]["labels"] == ["bad", "good"]
    assert scores["sets"]["dev"]["metrics"]["accuracy"] > 0.9
    expected = [label for _, label in reviews(6, 3)]
    assert [line["prediction"] for line in predictions_of(tmp_path / "run", "test")] == expected
    assert not (tmp_path / "run" / "submission").exists()


def test_scores_of_ones_own_are_regressed_in_their_own_range(electra: Path, tmp_path: Path) -> None:
    """From -20.5 to 71.25, which the unit scale hides from the head."""
    labels = (-20.5, 71.25)
    train = write_csv(tmp_path / "mine.csv", ("text", "score"), reviews(160, 1, labels))
    dev = write_csv(tmp_path / "dev.csv", ("text", "score"), reviews(24, 2, labels))
    finetune(
        *arguments_of(electra, None, "", tmp_path / "run", *LEARNT, "data.regression_scale=unit", train=train, dev=dev)
    )
    metrics = scores_of(tmp_path / "run")["sets"]["dev"]["metrics"]
    assert metrics["pearson"] > 0.7
    predictions = [line["prediction"] for line in predictions_of(tmp_path / "run")]
    assert min(predictions) < 10
    assert max(predictions) > 40


@pytest.mark.parametrize("recipe", ["rc2020", "original"])
@pytest.mark.parametrize("task", ["squad1", "squad2"])
def test_questions_are_answered_with_words_of_their_context(
    task: str, recipe: str, electra: Path, squad: Path, tmp_path: Path
) -> None:
    small = (*SMALL_JOINT, "data.max_length=32", "data.doc_stride=4", "schedule.epochs=6")
    finetune(*arguments_of(electra, squad, task, tmp_path / "run", *small, recipe=recipe))
    version = {"squad1": "1.1", "squad2": "2.0"}[task]
    document = json.loads((squad / f"dev-v{version}.json").read_text())
    contexts = {each["qas"][0]["id"]: each["context"] for each in document["data"][0]["paragraphs"]}
    answers = json.loads((tmp_path / "run" / "predictions" / "dev.json").read_text())
    assert answers.keys() == contexts.keys()
    assert all(answer in contexts[key] for key, answer in answers.items())
    assert task == "squad2" or all(answers.values())
    metrics = scores_of(tmp_path / "run")["sets"]["dev"]["metrics"]
    assert {"exact", "f1"} <= metrics.keys()
    assert 0 <= metrics["exact"] <= metrics["f1"] <= 1
    losses = losses_of(tmp_path / "run")
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


# --- memory


@contextmanager
def runs_out(decide: Callable[[bool, int, int], bool]) -> Iterator[None]:
    """While it lasts, a forward pass runs out of memory where `decide(whether in training, its number among those
    alike, inputs)` says so."""
    forward, passes = TaskModel.forward, {True: 0, False: 0}

    def faulty(self: TaskModel, batch: TaskMicroBatch) -> Any:
        passes[self.training] += 1
        if decide(self.training, passes[self.training], len(batch.ids_BT)):
            raise out_of_memory()
        return forward(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskModel, "forward", faulty)
        yield


@pytest.mark.parametrize("kind", RECIPES)
def test_a_step_without_memory_is_done_in_smaller_micro_batches_with_the_same_losses(
    kind: str, whole: dict[str, Path], dry: Path, glue: Path, squad: Path, tmp_path: Path
) -> None:
    ds_json = json_of(tmp_path / "ds.json", 0, 32)
    with runs_out(lambda training, number, inputs: training and number > 1 and inputs > 8):
        said = finetune(*plan_run(kind, dry, glue, squad, tmp_path / "run", ds_json))
    assert "memory ran out in step 2" in said
    check_same(tmp_path / "run", whole[kind])
    assert json.loads((tmp_path / "run" / "deepspeed.json").read_text())["train_micro_batch_size_per_gpu"] == 8


def test_an_evaluation_without_memory_is_done_in_fewer_rows_with_the_same_scores(
    whole: dict[str, Path], dry: Path, glue: Path, squad: Path, tmp_path: Path
) -> None:
    ds_json = json_of(tmp_path / "ds.json", 0, 32)
    with runs_out(lambda training, _, inputs: not training and inputs > 5):
        finetune(*plan_run("rc2020", dry, glue, squad, tmp_path / "run", ds_json))
    check_same(tmp_path / "run", whole["rc2020"])
    assert scores_of(tmp_path / "run") == scores_of(whole["rc2020"])


def test_the_test_sets_are_predicted_in_fewer_rows_where_memory_runs_out(dry: Path, glue: Path, tmp_path: Path) -> None:
    """10 rows of them, beside 24 of dev, which fit at the last evaluation before."""
    arguments = [dry, glue, "sst-2"]
    finetune(*arguments_of(*arguments, tmp_path / "plain", *DRY, predict_test=True, best=True))
    finetune(*arguments_of(*arguments, tmp_path / "run", *DRY, predict_test=True, best=True, stop_at=23))
    with runs_out(lambda training, number, inputs: not training and number > 1 and inputs > 3):
        resume(tmp_path / "run")
    np.testing.assert_allclose(
        logits_of(tmp_path / "run", "test"), logits_of(tmp_path / "plain", "test"), rtol=1e-4, atol=1e-5
    )


def test_where_nothing_smaller_fits_the_run_fails_with_what_to_do(dry: Path, glue: Path, tmp_path: Path) -> None:
    with runs_out(lambda training, number, _: training and number > 1):
        said = finetune(*arguments_of(dry, glue, "sst-2", tmp_path / "run"), status=2)
    assert "there is no smaller one" in said
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"


# --- bad input


def sst(folder: Path, name: str, text: str) -> None:
    (folder / "SST-2" / f"{name}.tsv").write_text(text)


def test_tasks_are_known_by_the_hubs_names_too(electra: Path, glue: Path, tmp_path: Path) -> None:
    finetune(*arguments_of(electra, glue, "SST2", tmp_path / "run", stop_at=1))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["task"] == "sst-2"


SPOILT: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "wrong columns": ("sst-2", lambda f: sst(f, "train", "text\tlabel\na film\t1\n"), "no column 'sentence'"),
    "too few columns": ("sst-2", lambda f: sst(f, "train", "sentence\tlabel\na film\n"), "row 1: the label '' is"),
    "unknown label": (
        "sst-2", lambda f: sst(f, "dev", "sentence\tlabel\na film\t2\n"), "row 1: the label '2' is not one of 0, 1"
    ),
    "empty dev": ("sst-2", lambda f: sst(f, "dev", "sentence\tlabel\n"), "no development examples"),
    "empty train": ("sst-2", lambda f: sst(f, "train", "sentence\tlabel\n"), "no training examples"),
    "no dev": ("sst-2", lambda f: (f / "SST-2/dev.tsv").unlink(), "no development examples"),
    "no train": ("sst-2", lambda f: (f / "SST-2/train.tsv").unlink(), "no training examples"),
    "no text": ("sst-2", lambda f: (f / "SST-2/dev.tsv").write_bytes(b"sentence\tlabel\n\xff\xfe\t1\n"), "not UTF-8"),
    "score out of range": (
        "sts-b",
        lambda f: (f / "STS-B/train.tsv").write_text("index\tsentence1\tsentence2\tscore\n0\ta\tb\t7\n"),
        "is not a score from 0 to 5",
    ),
    "no such folder": ("sst-2", lambda f: shutil.rmtree(f), "does not exist"),
    "no files of the task": ("qnli", lambda f: None, "holds no files of qnli"),
    "another task's folder": ("rte", lambda f: (f / "RTE").rename(f / "R"), "holds no files of rte"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SPOILT)
def test_spoilt_data_are_refused_before_anything_is_written(fault: str, electra: Path, tmp_path: Path) -> None:
    task, spoil, expected = SPOILT[fault]
    folder = write_glue(tmp_path / "glue", 16, 8, 4)
    spoil(folder)
    said = refused(*arguments_of(electra, folder, task, tmp_path / "run"))
    assert expected in said, said
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_folder_is_refused(electra: Path, tmp_path: Path) -> None:
    folder = write_glue(tmp_path / "glue", 16, 8, 4)
    (folder / "SST-2").chmod(0)
    try:
        assert "Cannot read" in refused(*arguments_of(electra, folder, "sst-2", tmp_path / "run"))
    finally:
        (folder / "SST-2").chmod(0o700)


@pytest.mark.parametrize("name", ["squad1", "squad2"])
def test_spoilt_questions_are_refused(name: str, electra: Path, squad: Path, tmp_path: Path) -> None:
    version = {"squad1": "1.1", "squad2": "2.0"}[name]
    shutil.copytree(squad, tmp_path / "squad")
    (tmp_path / "squad" / f"train-v{version}.json").unlink()
    arguments = arguments_of(electra, tmp_path / "squad", name, tmp_path / "run", "data.max_length=48")
    assert f"no training examples of {name}" in refused(*arguments)
    (tmp_path / "squad" / f"dev-v{version}.json").write_text('{"data": ')
    refused(*arguments)
    assert not (tmp_path / "run").exists()


def test_a_class_that_dev_lacks_is_a_note(electra: Path, tmp_path: Path) -> None:
    rows = [*reviews(15, 1), ("a film", "so-so")]
    train = write_csv(tmp_path / "mine.csv", ("text", "label"), rows)
    dev = write_csv(tmp_path / "dev.csv", ("text", "label"), reviews(8, 2))
    said = finetune(*arguments_of(electra, None, "", tmp_path / "run", train=train, dev=dev, stop_at=1))
    assert "Note: No example of dev has the label 'so-so': its scores say nothing about it." in said
    said = refused(*arguments_of(electra, None, "", tmp_path / "other", train=dev, dev=train))
    assert "row 16: the label 'so-so' is not one of the training labels, 'bad', 'good'" in said


BAD_ARGUMENTS: dict[str, tuple[list[str], str]] = {
    "unknown key": (["--set", "head.pool=mean"], "head.pool"),
    "bad value": (["--set", "head.pooling=last"], "head.pooling"),
    "recipe for pretraining's key": (["--set", "masking.mlm_probability=0.1"], "masking.mlm_probability"),
    "unknown recipe": (["--recipe", "orignal"], "orignal"),
    "seed twice": (["--seed", "1", "--set", "seed=2"], "--seed 1 and --set seed=2 differ"),
    "max_length beyond the positions": (
        ["--set", "data.max_length=65"],
        "takes 64 tokens. Add --set data.max_length=64",
    ),
    "unknown DeepSpeed JSON": (["--ds-config", "nowhere.json"], "nowhere.json"),
    "micro-batch that does not divide": (["--micro-batch", "3"], "train_micro_batch_size_per_gpu 3"),
    "beyond the schedule": (["--stop-at", "1000"], "--stop-at 1000 is beyond the schedule's 24 steps"),
    "own beside a task": (["--train", "x.csv"], "--train is for your own examples"),
    "folder and hub": (["--hub", "nyu-mll/glue"], "--hub and --revision are for datasets on the Hub"),
    "bad seed": (["--seed", "-1"], "is not a whole number of at least 0"),
    "fractional seed": (["--seed", "1.5"], "is not a whole number of at least 0"),
    "seed in other digits": (["--seed", "\u0663"], "is not a whole number of at least 0"),
    "no examples": (["--max-train-examples", "0"], "is not a positive whole number"),
}


@pytest.mark.parametrize("fault", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_before_anything_is_written(
    fault: str, electra: Path, glue: Path, tmp_path: Path
) -> None:
    more, expected = BAD_ARGUMENTS[fault]
    said = refused(*arguments_of(electra, glue, "sst-2", tmp_path / "run"), *more)
    assert expected in said, said
    assert not (tmp_path / "run").exists()


def test_missing_arguments_are_named(electra: Path, glue: Path, tmp_path: Path) -> None:
    assert "Say what to finetune with --model" in refused("--task", "rte", "--data-dir", glue)
    assert "--task TASK, or your own examples" in refused("--model", electra)
    assert "need --dev FILE too" in refused("--model", electra, "--train", "x.csv")
    assert "need --train FILE too" in refused("--model", electra, "--dev", "x.csv")
    assert "there is no task 'ax'" in refused("--model", electra, "--task", "ax")
    assert "there is no task 'rtee'; did you mean 'rte'?" in refused("--model", electra, "--task", "rtee")
    said = refused("--model", electra, "--train", "x.csv", "--dev", "y.csv", "--data-dir", glue)
    assert "--data-dir is for --task" in said


def test_a_run_directory_that_holds_a_run_is_left_alone(straight: Path, electra: Path, glue: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    assert "already holds a run" in refused(*arguments_of(electra, glue, "mrpc", straight))
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*")} == before


def test_own_files_that_cannot_be_learnt_from_are_refused(electra: Path, tmp_path: Path) -> None:
    good = write_csv(tmp_path / "good.csv", ("text", "label"), reviews(12, 1))
    alike = write_csv(tmp_path / "alike.csv", ("text", "label"), [(text, "good") for text, _ in reviews(12, 1)])
    empty = write_csv(tmp_path / "empty.csv", ("text", "label"), [])
    cases = [
        ({"train": alike, "dev": alike}, "so there is nothing to learn"),
        ({"train": good, "dev": empty}, "has no rows"),
        ({"train": good, "dev": good, "text": "txt"}, "no column 'txt'"),
        ({"train": good, "dev": tmp_path / "nowhere.csv"}, "nowhere.csv"),
        ({"train": good, "dev": good, "label_kind": "regression"}, "is not a finite number"),
    ]
    for flags, expected in cases:
        assert expected in refused(*arguments_of(electra, None, "", tmp_path / "run", **flags)), flags
        assert not (tmp_path / "run").exists()
