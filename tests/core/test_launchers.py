"""Every launcher, started from the README's own line on two ranks: the same losses, and every way to stop."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from electra_ds.config.run_directory import RunDirectory
from electra_ds.core import devices
from electra_ds.core.errors import ConfigError
from electra_ds.core.launcher import SECOND_SIGNAL_AFTER_S, Launch, LauncherWatch, detect, first_host
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.plain import PlainEngine
from electra_ds.training.checkpoint import CheckpointFolder, verify_checkpoint
from tests.helpers import REPOSITORY, builder_for, free_port, model_for, small_recipe
from tests.launchers import LAUNCHERS, finish, processes_of, start, wait_until_gone
from tests.launching import ENVIRONMENT, run_arguments, srun_environment
from tests.pretrain_runs import DROPOUT, train_losses

# --- what launchers set


def test_without_a_launcher_a_process_is_alone_even_inside_a_slurm_allocation() -> None:
    batch_script = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967291"}
    for environ in ({}, batch_script, {"LOCAL_RANK": "0"}):
        assert detect(environ)[:3] == ("none", 0, 1)


def test_srun_is_read_from_its_step() -> None:
    launch = detect(srun_environment(1, 2) | {"SLURM_STEP_NUM_NODES": "2"})
    assert launch[:5] == ("srun", 1, 2, 1, "node007")
    assert launch.port == detect(srun_environment(0, 2)).port
    assert launch.port != detect(srun_environment(0, 2) | {"SLURM_STEP_ID": "1"}).port
    assert 20_000 <= launch.port < 40_000


def test_torchrun_inside_srun_is_torchrun() -> None:
    inner = {
        "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "5",
        "TORCHELASTIC_RUN_ID": "x",
    }  # fmt: skip
    assert detect(srun_environment(0, 2) | inner) == ("torchrun", 3, 8, 1, "a", 5, 1)


@pytest.mark.parametrize(
    ("environ", "ranks"),
    [
        (srun_environment(0, 8) | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, 4),
        ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "5"}, 8),
    ],
)
def test_the_ranks_of_a_node_are_known(environ: dict[str, str], ranks: int) -> None:
    assert detect(environ).local_size == ranks


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"), ("gpu[003-007,012],login1", "gpu003"), ("a-b[1,5]", "a-b1"), ("n1,n2", "n1"),
        ("rack[2-3]-x", "rack2-x"),
    ],
)  # fmt: skip
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is missing"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "abc"}, "LOCAL_RANK is 'abc'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "rank 2 for a world size of 2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}, "MASTER_PORT"),
    ],
)
def test_what_a_launcher_left_out_is_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        detect(environ)


@pytest.mark.parametrize(
    ("launcher", "local_rank", "visible", "index"), [("srun", 3, 1, 0), ("srun", 3, 4, 3), ("torchrun", 1, 4, 1)]
)
def test_each_rank_has_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, launcher: Any, local_rank: int, visible: int, index: int
) -> None:
    """`srun --gpus-per-task 1` shows every task one card, number 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    launch = Launch(launcher, 5, 8, local_rank, "a", 1)
    assert devices.device(launch) == torch.device("cuda", index)
    with pytest.raises(ConfigError, match="Local rank 7 has no GPU"):
        devices.device(launch._replace(launcher="torchrun", local_rank=7))


def test_ranks_that_share_a_node_share_its_cores() -> None:
    before = torch.get_num_threads()
    try:
        alone = devices.set_threads(None, detect({}))
        crowded = detect(srun_environment(0, 64) | {"SLURM_STEP_TASKS_PER_NODE": "64"})
        assert devices.set_threads(None, crowded) <= max(1, alone // 2)
        assert devices.set_threads(2, crowded) == 2
    finally:
        torch.set_num_threads(before)


def test_a_shell_that_started_a_rank_may_die() -> None:
    """Hand-started ranks and those of other job systems have no launcher to watch."""
    for launcher in ("none", "torchrun", "deepspeed", "srun"):
        watch = LauncherWatch(Launch(launcher, 0, 2, 0, "a", 1))  # type: ignore[arg-type]
        assert watch._expected == []  # pytest is no launcher


# --- whole runs


# Batches of some size, so that a few seconds do not run through the steps that are compared.
STOPPABLE = (*DROPOUT, "global_batch_size=64")
STRAIGHT_STEPS = 150


@pytest.fixture(scope="module")
def straight(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[tuple[int, float]]]:
    """Losses on one rank for `bare`, else on two, with dropout, not stopped by anything."""

    @cache
    def losses(launcher: str) -> list[tuple[int, float]]:
        if launcher not in ("bare", "srun"):
            return losses("srun")
        folder = tmp_path_factory.mktemp(launcher)
        arguments = ["--stop-at", str(STRAIGHT_STEPS), *run_arguments(store.path, folder / "run", *STOPPABLE)]
        assert set(finish(start(launcher, arguments, folder / "log"))) == {0}, (folder / "log").read_text()
        return train_losses(folder / "run")

    return losses


@pytest.fixture(scope="module")
def alone(store: TokenStore) -> np.ndarray:
    """Losses of twenty steps in the plain engine, which knows of no launcher and no DeepSpeed."""
    recipe = small_recipe("schedule.total_steps=3000")
    engine = PlainEngine(model_for(store, recipe), recipe, recipe.global_batch_size, torch.device("cpu"))
    builder = builder_for(store, recipe)
    return np.array([engine.train_step(builder.build(step), step)[0]["loss"].item() for step in range(20)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",  # that of deepspeed stops and resumes below
    [pytest.param(each, marks=pytest.mark.nightly if each == "deepspeed" else ()) for each in LAUNCHERS],
)
def test_the_readmes_line_runs_and_gives_the_same_losses(
    store: TokenStore, alone: np.ndarray, tmp_path: Path, launcher: str
) -> None:
    arguments = ["--stop-at", "20", *run_arguments(store.path, tmp_path / "run")]
    assert set(finish(start(launcher, arguments, tmp_path / "log"))) == {0}, (tmp_path / "log").read_text()
    losses = np.array([loss for _, loss in train_losses(tmp_path / "run")])
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["world_size"] == (1 if launcher == "bare" else 2)
    log = (tmp_path / "log").read_text()
    assert log.count("run directory:") == 1  # one rank speaks
    assert log.count("held out at step 20") == 1
    assert not (tmp_path / "run" / "requeue").exists()


WAYS = ("SIGTERM", "SIGINT", "SIGUSR1", "time limit")
IN_CI = {("deepspeed", "SIGINT"), ("srun", "time limit")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "way"),
    [
        pytest.param(*case, marks=[] if case in IN_CI else [pytest.mark.nightly])
        for case in itertools.product(LAUNCHERS, WAYS)
    ],
)
def test_stopping_saves_leaves_no_orphan_and_resumes_exactly(
    store: TokenStore, straight: Callable[[str], list[tuple[int, float]]], tmp_path: Path, launcher: str, way: str
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = run_arguments(store.path, run_dir, *STOPPABLE)
    if way == "time limit":
        arguments = ["--time-limit", "7s", *arguments]
    processes = start(launcher, arguments, log)
    if way != "time limit":
        wait_for_steps(run_dir, 5)
        number = signal.Signals[way]
        if number == signal.SIGINT and launcher in ("torchrun", "deepspeed"):
            os.killpg(processes[0].pid, number)  # as a terminal does on Ctrl-C
        else:
            processes[0].send_signal(number)  # under srun to one rank alone
    statuses = finish(processes)
    assert wait_until_gone(run_dir, 45) == [], log.read_text()
    if way == "time limit":
        assert set(statuses) == {0}
    elif (launcher, way) == ("bare", "SIGINT"):
        assert statuses == [-signal.SIGINT]
    elif launcher in ("bare", "srun"):
        assert set(statuses) == {128 + signal.Signals[way]}
    else:
        assert 0 not in statuses
    assert RunDirectory(run_dir).status() == "stopped"
    assert (run_dir / "requeue").is_file()  # until the run goes on, or fails
    newest = CheckpointFolder(run_dir / "checkpoints", keep=1).paths()[-1]
    verify_checkpoint(newest)
    stopped_at = int(newest.name.removeprefix("step-"))
    assert train_losses(run_dir)[-1][0] == stopped_at

    if stopped_at + 10 > STRAIGHT_STEPS:
        pytest.skip(f"this machine is too fast: {stopped_at} steps in a few seconds")
    # Resuming under torchrun and deepspeed is tested in tests/training/test_resume_ranks.py.
    anew = "bare" if launcher == "bare" else "srun"
    resumed = start(anew, ["--stop-at", str(stopped_at + 10)], log, resume=run_dir)
    assert set(finish(resumed)) == {0}, log.read_text()
    assert not (run_dir / "requeue").exists()
    assert train_losses(run_dir) == straight(launcher)[: stopped_at + 10]


def wait_for_steps(run_dir: Path, steps: int, seconds: float = 90) -> None:
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + seconds
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert time.monotonic() < deadline, "the run did not get going"
        time.sleep(0.05)


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_resume_from_disk_and_fall_back_from_a_damaged_checkpoint(
    store: TokenStore, tmp_path: Path, stage: int
) -> None:
    """Bit for bit."""
    json_file = tmp_path / "ds.json"
    json_file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    how = ["--ds-config", str(json_file), "--save-every", "5"]
    for run, stop in (("straight", "20"), ("parted", "10")):
        arguments = run_arguments(store.path, tmp_path / run, *DROPOUT)
        processes = start("srun", [*arguments, "--stop-at", stop, *how], tmp_path / f"{run}.log")
        assert set(finish(processes)) == {0}, (tmp_path / f"{run}.log").read_text()
    newest = tmp_path / "parted" / "checkpoints" / "step-00000010" / "optimizer-00002-of-00002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    processes = start("srun", ["--stop-at", "20"], tmp_path / "resumed.log", resume=tmp_path / "parted")
    assert set(finish(processes)) == {0}, (tmp_path / "resumed.log").read_text()
    assert (tmp_path / "resumed.log").read_text().count("Falling back") == 1
    straight, resumed = train_losses(tmp_path / "straight"), train_losses(tmp_path / "parted")
    assert resumed == straight


@pytest.mark.slow
def test_a_second_signal_leaves_at_once_but_not_within_five_seconds(store: TokenStore, tmp_path: Path) -> None:
    """Rank 1 stands still, so rank 0 cannot stop as it should."""
    run_dir = tmp_path / "run"
    first, second = start("srun", run_arguments(store.path, run_dir), tmp_path / "log")
    try:
        wait_for_steps(run_dir, 5)
        second.send_signal(signal.SIGSTOP)
        first.send_signal(signal.SIGINT)
        time.sleep(1)
        first.send_signal(signal.SIGTERM)  # as the deepspeed launcher does
        time.sleep(SECOND_SIGNAL_AFTER_S)
        assert first.poll() is None
        first.send_signal(signal.SIGINT)
        assert first.wait(5) == 128 + signal.SIGINT
    finally:
        first.kill()
        second.kill()
        second.wait()


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_within_seconds(store: TokenStore, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first, second = start("srun", run_arguments(store.path, run_dir), tmp_path / "log")
    wait_for_steps(run_dir, 5)
    second.kill()
    assert finish([first], timeout=30) == [2]
    log = (tmp_path / "log").read_text()
    assert "(rank" not in log.replace("(rank 0)", "")
    assert "lost contact with another rank" in log
    assert "Traceback" not in log
    assert RunDirectory(run_dir).status() == "failed"
    assert processes_of(run_dir) == []


FAULTS = {
    "refused at the start": (
        "import electra_ds.data.token_store as m\n"
        "m._read_info = lambda path: exec('raise m.DataError(\"no disk here\")')",
        "no disk here", 2,
    ),
    "broken in training": (
        "import electra_ds.pretraining.batches as m\nbuild = m.BatchBuilder.build\n"
        "m.BatchBuilder.build = lambda self, step, size=None: 1 // 0 if step == 30 else build(self, step, size)",
        "ZeroDivisionError: integer division or modulo by zero", 1,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_error_of_one_rank_is_shown_first_and_once(store: TokenStore, tmp_path: Path, fault: str) -> None:
    code, message, status = FAULTS[fault]
    run_dir, log = tmp_path / "run", tmp_path / "log"
    processes = start("srun", run_arguments(store.path, run_dir), log, before_rank_1=(exec, code, {}))
    assert finish(processes, timeout=200) == [2, status]
    text = log.read_text()
    assert text.count(message) == 1, text
    if status == 2:  # a fault that the user can mend: the message alone, and nothing from the other rank
        assert f"electra-ds pretrain (rank 1): {message}" in text
        assert "Traceback" not in text
        assert not (run_dir / "run.json").exists()
    else:
        assert text.index(message) < text.index("lost contact with another rank")
        assert RunDirectory(run_dir).status() == "failed"
        assert "division" in (run_dir / "status.json").read_text()


LITTLE_MEMORY = """
import psutil, torch
from collections import namedtuple
psutil.virtual_memory = lambda: namedtuple("Memory", "available")(52_100_000)
from electra_ds.pretraining.electra import Electra
run, passes = Electra.run, [0]
def faulty(self, batch, samples):
    passes[0] += torch.is_grad_enabled()
    if passes[0] == 30:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return run(self, batch, samples)
Electra.run = faulty
"""


@pytest.mark.slow
def test_ranks_take_the_micro_batch_that_fits_all_and_end_together_where_memory_runs_out(
    store: TokenStore, tmp_path: Path
) -> None:
    """Rank 1 has little memory, and none in its 30th pass. It cannot do the step again while rank 0 is in the middle of
    it, but says what will do."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = ["--micro-batch", "auto", *run_arguments(store.path, run_dir, "global_batch_size=16")]
    processes = start("srun", arguments, log, before_rank_1=(exec, LITTLE_MEMORY, {}))
    assert finish(processes, timeout=200) == [2, 2]
    text = log.read_text()
    size = json.loads((run_dir / "deepspeed.json").read_text())["train_micro_batch_size_per_gpu"]
    assert 1 < size < 8
    assert f"micro-batch x accumulation = {size} x {8 // size} x 2 rank(s)" in text
    step = -(-30 // (8 // size))
    message = (
        f"(rank 1): Memory ran out in step {step} with micro-batch {size}, and the step cannot be repeated, since "
        f"other ranks are in the middle of it. No checkpoint was saved yet, so start again: "
        f"{REPOSITORY}/bin/pretrain --resume {run_dir} --micro-batch {size // 2}"
    )
    assert text.count(message) == 1, text
    assert "Traceback" not in text
    assert RunDirectory(run_dir).status() == "failed"


@pytest.mark.nightly
def test_a_hostfile_of_two_nodes_without_ssh(store: TokenStore, tmp_path: Path) -> None:
    """`--deepspeed --deepspeed_config FILE`, as scripts written for DeepSpeed are started; both nodes are this one."""
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    port = str(free_port())
    nodes = []
    for node in range(2):
        command = [
            "deepspeed", "--no_ssh", "--hostfile", str(tmp_path / "hosts"), "--node_rank", str(node),
            "--master_addr", "127.0.0.1", "--master_port", port, "bin/pretrain", "--deepspeed", "--deepspeed_config",
            str(REPOSITORY / "ds_configs" / "zero1.json"), "--recipe", "tiny", "--stop-at", "3",
            *run_arguments(store.path, tmp_path / "run"),
        ]  # fmt: skip
        with (tmp_path / f"log{node}").open("w") as log:
            nodes.append(subprocess.Popen(command, cwd=REPOSITORY, env=ENVIRONMENT, text=True, stdout=log, stderr=log))
    assert finish(nodes) == [0, 0], (tmp_path / "log0").read_text() + (tmp_path / "log1").read_text()
    assert len(train_losses(tmp_path / "run")) == 3
    assert json.loads((tmp_path / "run" / "run.json").read_text())["world_size"] == 2
