"""A run is resumed on another number of ranks: what we chose is chosen again, and what the user gave is kept."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from electra_ds.config.options import PretrainOptions
from electra_ds.config.run_directory import RunDirectory
from electra_ds.config.run_record import RunRecord, RunSettings
from electra_ds.core import devices
from electra_ds.core.errors import ConfigError
from electra_ds.core.launcher import detect
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from electra_ds.training import prepare
from electra_ds.training.prepare import plan_of_run, resolved_plan, resumed_record
from tests.finetune_runs import arguments_of, in_own_process, losses_of, tiny_electra, write_glue
from tests.helpers import small_recipe
from tests.launchers import finish, start
from tests.launching import run_arguments
from tests.pretrain_runs import train_losses

RECIPE = small_recipe("global_batch_size=32")
PAIRS = list(itertools.product((1, 2), (1, 2)))
CUTS: list[tuple[dict[str, Any], PretrainOptions]] = [
    ({}, PretrainOptions()),
    ({"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}, PretrainOptions()),
    ({"train_micro_batch_size_per_gpu": 4}, PretrainOptions()),
    ({"train_micro_batch_size_per_gpu": 32}, PretrainOptions()),
    ({"gradient_accumulation_steps": 4}, PretrainOptions()),
    ({}, PretrainOptions(micro_batch=8)),
    ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4}, PretrainOptions(micro_batch="auto")),
]


@pytest.fixture(autouse=True)
def _no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own check of a JSON asks torch for the number of ranks, which here is always one."""
    monkeypatch.setattr(prepare, "check_plan", lambda *arguments: None)


def ranks_of(number: int) -> Ranks:
    """What the first of so many knows of them, as far as a plan asks."""
    ranks = Ranks(detect({}))
    ranks.world_size = number
    return ranks


def begun(path: Path, values: dict[str, Any], options: PretrainOptions, ranks: int) -> RunDirectory:
    """A run directory as a run leaves it that began with a DeepSpeed JSON of these values."""
    run = RunDirectory(path)
    path.mkdir(parents=True, exist_ok=True)
    plan = resolved_plan(options, values, "given.json", RECIPE, ranks_of(ranks))
    record = RunRecord(
        store="/nowhere", store_fingerprint="", parameters={}, device=devices.device_name(torch.device("cpu")),
        threads=1, threads_given=False, world_size=ranks, command=[],
        settings=RunSettings(log_every=1, eval_every=1, save_every=1, keep=1, eval_windows=1),
    )  # fmt: skip
    run.write_record(RECIPE, plan, record)
    return run


def resumed(run: RunDirectory, ranks: int, options: PretrainOptions = PretrainOptions()) -> Any:  # noqa: B008
    return plan_of_run(options, run, run.read_record(), RECIPE, ranks_of(ranks))


@pytest.mark.parametrize(("before", "after"), PAIRS)
@pytest.mark.parametrize("cut", range(len(CUTS)))
def test_a_run_is_resumed_without_a_flag_as_it_would_begin_there(
    cut: int, before: int, after: int, tmp_path: Path
) -> None:
    values, options = CUTS[cut]
    run = begun(tmp_path, values, options, before)
    plan = resumed(run, after)
    anew = resolved_plan(options, values, "given.json", RECIPE, ranks_of(after))
    assert plan.batch == anew.batch
    assert plan.given_batch == anew.given_batch
    assert plan.is_micro_batch_open == (anew.is_micro_batch_open and before != after)
    run.write_record(RECIPE, plan, replace(run.read_record(), world_size=after))
    back = resolved_plan(options, values, "given.json", RECIPE, ranks_of(before))
    assert resumed(run, before).batch == back.batch


def test_a_cut_that_the_user_gave_and_that_does_not_fit_names_the_flag_that_helps(tmp_path: Path) -> None:
    values = {"train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 2}
    run = begun(tmp_path, values, PretrainOptions(), 1)
    with pytest.raises(ConfigError, match="16 x gradient_accumulation_steps 2 x 2") as refused:
        resumed(run, 2)
    flag = re.search(r"Give --micro-batch (\d+)", str(refused.value))
    assert flag is not None, refused.value
    assert resumed(run, 2, PretrainOptions(micro_batch=int(flag[1]))).batch.world_size == 2
    assert resumed(run, 2, PretrainOptions(micro_batch="auto")).batch.micro_batch_size == 16


def test_a_micro_batch_that_memory_has_made_smaller_stays_small(tmp_path: Path) -> None:
    for name, values in (("given", {"train_micro_batch_size_per_gpu": 16}), ("chosen", {})):
        run = begun(tmp_path / name, values, PretrainOptions(), 1)
        run.write_record(RECIPE, resumed(run, 1).with_micro_batch(4), run.read_record())
        assert resumed(run, 1).batch.micro_batch_size == 4
        plan = resumed(run, 2)
        assert plan.batch.micro_batch_size == (4 if name == "given" else 16)
        assert plan.is_micro_batch_open == (name == "chosen")


@pytest.mark.parametrize(("before", "after"), PAIRS)
@pytest.mark.parametrize("values", [{}, {"train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": "auto"}])
def test_a_record_that_does_not_say_who_chose_keeps_its_micro_batch_as_far_as_it_divides_and_says_so(
    values: dict[str, Any], before: int, after: int, tmp_path: Path
) -> None:
    run = begun(tmp_path, values, PretrainOptions(), before)
    lines = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(
        json.dumps({key: value for key, value in lines.items() if key not in ("given_batch", "threads_given")})
    )
    recorded = json.loads((tmp_path / "deepspeed.json").read_text())["train_micro_batch_size_per_gpu"]
    plan = resumed(run, after)
    assert plan.batch.micro_batch_size == min(recorded, 32 // after)
    told = [note for note in plan.notes if "does not say who chose its micro-batch" in note]
    assert len(told) == (before != after)
    assert all("--micro-batch auto" in note for note in told)
    assert resumed(run, after, PretrainOptions(micro_batch="auto")).batch.micro_batch_size == 32 // after


@pytest.mark.parametrize(("given", "kept"), [(False, False), (True, True), (None, True)])
def test_threads_that_we_chose_are_chosen_again_on_other_ranks(given: bool | None, kept: bool, tmp_path: Path) -> None:
    run = begun(tmp_path, {}, PretrainOptions(), 2)
    record = replace(run.read_record(), threads=2, threads_given=given)
    before = torch.get_num_threads()
    try:
        same = resumed_record(record, PretrainOptions(), resumed(run, 2), run, ranks_of(2))
        assert same.threads == 2
        torch.set_num_threads(1)
        other = resumed_record(record, PretrainOptions(), resumed(run, 1), run, ranks_of(1))
        assert other.threads == (2 if kept else 1)
        assert other.threads_given == given
        told = resumed_record(record, PretrainOptions(threads=1), resumed(run, 1), run, ranks_of(1))
        assert (told.threads, told.threads_given) == (1, True)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [pytest.param("torchrun", marks=pytest.mark.nightly), pytest.param("deepspeed", marks=pytest.mark.nightly), "srun"],
)
def test_every_launcher_resumes_on_one_rank_or_two_without_another_flag(
    store: TokenStore, tmp_path: Path, launcher: str
) -> None:
    """Each pair of 1 and 2 ranks; with dropout off, so that the losses are those of one rank without a launcher."""
    run_dir, log, steps = tmp_path / "run", tmp_path / "log", 4
    begin = run_arguments(store.path, run_dir)
    assert set(finish(start(launcher, ["--stop-at", str(steps), *begin], log, ranks=1))) == {0}, log.read_text()
    for number, (name, ranks) in enumerate([(launcher, 2), (launcher, 2), ("bare", 1), (launcher, 1)], start=2):
        stop = ["--stop-at", str(number * steps)]
        assert set(finish(start(name, stop, log, resume=run_dir, ranks=ranks))) == {0}, log.read_text()
        assert json.loads((run_dir / "run.json").read_text())["world_size"] == ranks
        plan = json.loads((run_dir / "deepspeed.json").read_text())
        assert plan["train_micro_batch_size_per_gpu"] == 8 // ranks
    straight = tmp_path / "straight"
    assert finish(start("bare", ["--stop-at", "20", *run_arguments(store.path, straight)], log)) == [0]
    assert [step for step, _ in train_losses(run_dir)] == list(range(1, 21))
    np.testing.assert_allclose(
        [loss for _, loss in train_losses(run_dir)], [loss for _, loss in train_losses(straight)], rtol=1e-5
    )


@pytest.mark.slow
def test_a_finetuning_is_resumed_on_one_rank_or_two_without_another_flag(tmp_path: Path) -> None:
    glue, model = tmp_path / "glue", tiny_electra(tmp_path / "model", hidden_dropout_prob=0.0)
    write_glue(glue)
    dropless = ("head.dropout=0",)
    begin = arguments_of(model, glue, "mrpc", tmp_path / "run", *dropless, stop_at=2)
    in_own_process(begin)
    for number, ranks in enumerate((2, 2, 1, 1), start=2):
        in_own_process(["--resume", tmp_path / "run", "--stop-at", 2 * number], ranks)
        assert json.loads((tmp_path / "run" / "run.json").read_text())["world_size"] == ranks
    in_own_process(arguments_of(model, glue, "mrpc", tmp_path / "straight", *dropless, stop_at=10))
    np.testing.assert_allclose(losses_of(tmp_path / "run"), losses_of(tmp_path / "straight"), rtol=1e-4)
