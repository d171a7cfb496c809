"""Trackers, judged by what their own readers find in the files."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from rich.console import Console

from electra_ds.config.monitors import FolderMonitor, Monitors, WandbMonitor, wandb_login, wandb_module
from electra_ds.config.options import PretrainOptions
from electra_ds.config.run_directory import RunDirectory, read_metrics
from electra_ds.config.run_record import TrackingSettings
from electra_ds.core.errors import ConfigError, InterruptedBySignalError, TrainingError
from electra_ds.core.terminal import log_shown_on
from electra_ds.data.token_store import TokenStore
from electra_ds.training.prepare import tracking_settings
from electra_ds.training.tracking import RunLog, check_tracking
from tests.helpers import REPOSITORY
from tests.pretrain_runs import CPU_JSON, DROPOUT, command, run, start_arguments, train_losses

OFFLINE = TrackingSettings(wandb="offline")
NO_ONE_ASKED = "given here, recorded by the run or its default"


@pytest.fixture(autouse=True)
def _nobody_is_logged_in(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.delenv("NETRC", raising=False)


SHOWN = contextlib.ExitStack()
"""Where the log is shown in a test."""


@pytest.fixture(autouse=True)
def _nothing_is_shown_any_more() -> Iterator[None]:
    yield
    SHOWN.close()


def opened(
    settings: TrackingSettings, run_dir: Path, *, resume_step: int = 0, console: Console | None = None
) -> RunLog:
    run_dir.mkdir(exist_ok=True)
    SHOWN.enter_context(log_shown_on(console or Console(file=io.StringIO())))
    config = {"recipe": {"name": "tiny"}, "deepspeed": {"fp16": {"enabled": True}}}
    return RunLog(RunDirectory(run_dir), settings, config, resume_step)


# --- wandb


def wandb_records(run_dir: Path) -> list[list[Any]]:
    """The records of each start, in the order of the starts: a .wandb file is a LevelDB log of protobuf messages."""
    from wandb.proto import wandb_internal_pb2

    starts = []
    for path in sorted(
        (run_dir / "wandb").glob("*run-*/run-*.wandb"), key=lambda path: path.parent.name.split("-")[-2]
    ):
        data, position, message = path.read_bytes(), 7, b""
        assert data[:4] == b":W&B"
        records = []
        while position + 7 <= len(data):
            if (left := 32768 - position % 32768) < 7:  # a header does not cross a block
                position += left
                continue
            _, size, kind = struct.unpack("<IHB", data[position : position + 7])
            message += data[position + 7 : position + 7 + size]
            position += 7 + size
            if kind in (1, 4):  # whole, or the last part
                record = wandb_internal_pb2.Record()
                record.ParseFromString(message)
                records.append(record)
                message = b""
        starts.append(records)
    return starts


def wandb_rows(records: list[Any]) -> list[dict[str, Any]]:
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def of_kind(records: list[Any], kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def test_wandb_drops_no_step_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    """Its own step never falls over three starts, and `step` is the x axis."""
    run_dir = tmp_path / "run"
    for resume_step, reached, stop in ((0, 0, 6), (3, 6, 5), (4, 5, 8)):
        tracked = opened(OFFLINE, run_dir, resume_step=resume_step)
        assert tracked.reached == reached
        for step in range(resume_step + 1, stop + 1):
            tracked.write("train", step, {"loss": 1 / step, "grad_norm": None})
        tracked.write("eval", stop, {"discriminator_auc": 0.5})
        tracked.finish(None)
        time.sleep(1.1)  # wandb's folders are named by the second
    starts = wandb_records(run_dir)
    rows = [row for records in starts for row in wandb_rows(records)]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 4, 5, 5, 6, 7, 8]
    assert [row["_step"] for row in rows] == list(range(1, 13))
    assert all(row["train/loss"] == pytest.approx(1 / row["step"]) for row in rows)
    assert [row["step"] for row in rows if "eval/discriminator_auc" in row] == [6, 5, 8]
    assert not any("train/grad_norm" in row for row in rows)
    for records in starts:
        [record] = {(item.run_id, item.project, item.display_name) for item in of_kind(records, "run")}
        assert record == (OFFLINE.wandb_id, "electra_ds", "run")
        assert ("*", "step") in {(item.glob_name, item.step_metric) for item in of_kind(records, "metric")}
        config = {item.key: item.value_json for item in of_kind(records, "run")[0].config.update}
        assert json.loads(config["recipe"]) == {"name": "tiny"}
        assert json.loads(config["deepspeed"]) == {"fp16": {"enabled": True}}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, 0),
        (InterruptedBySignalError("SIGTERM: saved", signal.SIGTERM), 143),
        (TrainingError("not finite"), 2),
        (RuntimeError("a bug"), 1),
    ],
    ids=str,
)
def test_wandb_is_told_the_exit_status(tmp_path: Path, error: Exception | None, status: int) -> None:
    with contextlib.suppress(Exception), contextlib.ExitStack() as stack:
        tracked = opened(OFFLINE, tmp_path / "run")
        stack.push(lambda kind, raised, traceback: tracked.finish(raised))
        tracked.write("train", 1, {"loss": 1.0})
        if error is not None:
            raise error
    [records] = wandb_records(tmp_path / "run")
    assert [item.exit_code for item in of_kind(records, "exit")] == [status]


def test_the_death_of_wandb_is_one_warning_and_the_other_trackers_continue(tmp_path: Path) -> None:
    said = io.StringIO()
    settings = TrackingSettings(wandb="offline", csv="csv")
    tracked = opened(settings, tmp_path / "run", console=Console(file=said, width=500))
    tracked.write("train", 1, {"loss": 1.0})
    service = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(service) == 1
    os.kill(int(service[0]), signal.SIGKILL)
    time.sleep(0.5)
    for step in range(2, 6):
        tracked.write("train", step, {"loss": 1.0})
    tracked.finish(None)
    assert said.getvalue().count("Warning") == 1
    assert "wandb failed" in said.getvalue()
    assert [row[0] for row in csv_rows(tmp_path / "run" / "csv" / "train_loss.csv")] == ["1", "2", "3", "4", "5"]
    with contextlib.suppress(OSError):
        wandb_module().teardown()


def on_a_terminal(*arguments: str, cwd: Path, **environment: str) -> tuple[int, str]:
    """Exit status and what was shown, for a command whose user sits at a terminal and types nothing."""
    own, theirs = pty.openpty()
    process = subprocess.Popen(
        command(*arguments), stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd, env=os.environ | environment
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal's other end was closed
        while part := os.read(own, 4096):
            shown += part
    os.close(own)
    return process.wait(timeout=200), shown.decode()


@pytest.mark.parametrize("way", ["flag", "json"])
def test_without_an_account_wandb_online_is_refused_and_nobody_is_asked(tmp_path: Path, way: str) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    config = folder / "ds.json"
    config.write_text(json.dumps({"wandb": {"enabled": True}} if way == "json" else {}))
    flags = ["--wandb", "online"] if way == "flag" else []
    status, shown = on_a_terminal("pretrain", "--ds-config", str(config), "--recipe", "tiny", *flags, cwd=folder)
    assert status == 2, shown
    assert "wandb login" in shown
    assert "--wandb offline" in shown
    assert [path.name for path in folder.iterdir()] == ["ds.json"]


def test_a_key_that_cannot_be_right_is_refused(tmp_path: Path) -> None:
    arguments = ["--ds-config", CPU_JSON, "--recipe", "tiny", "--wandb", "online"]
    result = run("pretrain", *arguments, status=2, folder=tmp_path, environment={"WANDB_API_KEY": "short"})
    assert "WANDB_API_KEY invalid" in result.stderr
    assert "wandb login" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_where_wandb_cannot_be_reached_the_run_goes_on_offline(store: TokenStore, tmp_path: Path) -> None:
    environment = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "3"}
    arguments = start_arguments(store, tmp_path / "run", "schedule.total_steps=6")
    result = run("pretrain", *arguments, "--wandb", "online", environment=environment)
    assert "continues offline" in result.stdout
    rows = wandb_rows(wandb_records(tmp_path / "run")[-1])
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


# --- CSV and TensorBoard


def csv_rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))[1:]


def test_csv_files_are_laid_out_as_deepspeed_lays_them_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed.comm
    from deepspeed.monitor.config import CSVConfig
    from deepspeed.monitor.csv_monitor import csvMonitor

    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda: 0)  # all that it asks of DeepSpeed's process group
    theirs = csvMonitor(CSVConfig(enabled=True, output_path=str(tmp_path), job_name="theirs"))
    ours = opened(TrackingSettings(csv="ours"), tmp_path)
    for step in range(1, 4):
        theirs.write_events([("train/generator_loss", step / 8, step), ("eval/discriminator_auc", 0.5, step)])
        ours.write("train", step, {"generator_loss": step / 8})
        ours.write("eval", step, {"discriminator_auc": 0.5})
    ours.finish(None)
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "ours").iterdir())
    for name in names:
        with (tmp_path / "theirs" / name).open() as one, (tmp_path / "ours" / name).open() as two:
            assert list(csv.reader(one)) == list(csv.reader(two))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(item.step, item.value) for item in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_resumed_run_has_each_step_once_in_csv_and_tensorboard(tmp_path: Path) -> None:
    settings = TrackingSettings(csv="csv", tensorboard="tb")
    killed = opened(settings, tmp_path)
    for step in range(1, 8):
        killed.write("train", step, {"loss": float(step)})
    killed.flush()
    with (tmp_path / "csv" / "train_loss.csv").open("a") as file:
        file.write("8")  # cut by the kill
    (tmp_path / "csv" / "train_other.csv").touch()  # killed before its first line
    resumed = opened(settings, tmp_path, resume_step=4)
    for step in range(5, 11):
        resumed.write("train", step, {"loss": step + 0.5, "other": 1.0})
    resumed.finish(None)
    expected = [(step, step + (0.5 if step > 4 else 0.0)) for step in range(1, 11)]
    assert scalars(tmp_path / "tb")["train/loss"] == expected
    assert [(int(step), float(value)) for step, value in csv_rows(tmp_path / "csv" / "train_loss.csv")] == expected
    assert len(csv_rows(tmp_path / "csv" / "train_other.csv")) == 6


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the file that could not be written
def test_a_full_disk_costs_the_tracker_and_not_the_run(tmp_path: Path) -> None:
    said = io.StringIO()
    tracked = opened(TrackingSettings(csv="csv"), tmp_path, console=Console(file=said, width=500))
    (tmp_path / "csv" / "train_loss.csv").symlink_to("/dev/full")
    for step in range(1, 4):
        tracked.write("train", step, {"loss": 1.0})
    tracked.finish(None)
    assert said.getvalue().count("csv_monitor failed") == 1
    assert "No space left" in said.getvalue()


def test_another_runs_numbers_are_not_written_over(tmp_path: Path) -> None:
    settings = TrackingSettings(csv="csv")
    first = opened(settings, tmp_path)
    first.write("train", 1, {"loss": 1.0})
    first.finish(None)
    with pytest.raises(ConfigError, match="job_name"):
        check_tracking(settings, RunDirectory(tmp_path), is_new=True)
    check_tracking(settings, RunDirectory(tmp_path), is_new=False)


def test_tensorboard_that_is_not_installed_is_refused_before_anything_starts(tmp_path: Path) -> None:
    script = (
        f"import sys; sys.modules['tensorboard'] = None; sys.path.insert(0, {str(REPOSITORY)!r}); "
        "from electra_ds.cli import main; main(sys.argv[1:])"
    )
    arguments = ["pretrain", "--ds-config", CPU_JSON, "--recipe", "tiny", "--tensorboard"]
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert result.returncode == 2, result.stderr
    assert "pip install tensorboard" in result.stderr
    assert list(tmp_path.iterdir()) == []


# --- settings


def test_the_command_line_wins_over_the_json_and_the_json_over_the_record(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "my-run")
    monitors = Monitors(
        tensorboard=FolderMonitor(str(tmp_path / "logs"), "job"),
        wandb=WandbMonitor(project="theirs", team="team", group="group"),
        csv_monitor=FolderMonitor(str(tmp_path / "logs")),
    )
    before = TrackingSettings(wandb="offline", wandb_project="recorded")
    assert tracking_settings(PretrainOptions(), before, Monitors(), directory) == before
    from_json = tracking_settings(PretrainOptions(), before, monitors, directory)
    assert from_json == TrackingSettings(
        "online", before.wandb_id, "theirs", "team", "group", f"{tmp_path}/logs/job", f"{tmp_path}/logs/my-run"
    )
    options = PretrainOptions(wandb="offline", wandb_project="mine", tensorboard=False)
    given = tracking_settings(options, before, monitors, directory)
    assert (given.wandb, given.wandb_project, given.wandb_group) == ("offline", "mine", "group")
    assert given.tensorboard is None
    assert tracking_settings(PretrainOptions(wandb="off"), before, monitors, directory).wandb == "off"
    folders = Monitors(tensorboard=FolderMonitor(), csv_monitor=FolderMonitor())
    inside = tracking_settings(PretrainOptions(), before, folders, directory)
    assert (inside.tensorboard, inside.csv) == ("tensorboard", "csv_monitor")
    with pytest.raises(ConfigError, match="wandb is off"):
        tracking_settings(PretrainOptions(wandb_project="mine"), TrackingSettings(), Monitors(), directory)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [(None, "online"), ("offline", "offline"), ("dryrun", "offline"), ("disabled", "off"), ("online", "online")],
)
def test_wandb_mode_decides_where_only_the_json_asks_for_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None, expected: str
) -> None:
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    run, monitors = RunDirectory(tmp_path / "run"), Monitors(wandb=WandbMonitor("p"))
    assert tracking_settings(PretrainOptions(), TrackingSettings(), monitors, run).wandb == expected
    assert tracking_settings(PretrainOptions(wandb="offline"), TrackingSettings(), monitors, run).wandb == "offline"
    assert tracking_settings(PretrainOptions(), TrackingSettings(), Monitors(), run).wandb == "off"


@pytest.mark.parametrize(
    ("settings", "mode", "line"),
    [
        (OFFLINE, "offline", None),
        (OFFLINE, "disabled", "--wandb offline, given here or recorded by the run, overrides WANDB_MODE=disabled."),
        (TrackingSettings(), "disabled", None),
        (TrackingSettings(), "nonsense", None),
        (TrackingSettings(), "online", f"--wandb off, {NO_ONE_ASKED}, overrides WANDB_MODE=online."),
        (TrackingSettings(), "dryrun", f"--wandb off, {NO_ONE_ASKED}, overrides WANDB_MODE=dryrun."),
    ],
)
def test_one_line_says_which_mode_wins_if_wandb_mode_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: TrackingSettings, mode: str, line: str | None
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    console = Console(file=io.StringIO(), width=200)
    opened(settings, tmp_path / "run", console=console).finish(None)
    said = [each for each in console.file.getvalue().splitlines() if "WANDB_MODE" in each]  # type: ignore[attr-defined]
    assert said == ([f"Note: {line}"] if line else [])


@pytest.mark.parametrize("mode", ["", "on"])
def test_a_wandb_mode_that_wandb_does_not_know_is_a_message(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.teardown()  # which has read the environment once
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(ConfigError, match=r"WANDB_MODE: [\s\S]*--wandb off"):
        wandb_login()


def test_each_new_run_has_its_own_wandb_id() -> None:
    assert len({TrackingSettings().wandb_id for _ in range(100)}) == 100


# --- the whole command


@contextlib.contextmanager
def killed_at(checkpoint: Path, *arguments: str) -> Iterator[None]:
    """A command that is killed as soon as the checkpoint is there."""
    process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL)
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.005)
    yield
    process.kill()
    process.wait()


@pytest.mark.slow
def test_after_kill_9_and_resume_every_tracker_has_every_step_and_wandb_the_same_run(
    store: TokenStore, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"csv_monitor": {"enabled": True}, "tensorboard": {"enabled": True}}))
    arguments = [*start_arguments(store, run_dir, *DROPOUT), "--ds-config", str(config), "--wandb", "offline"]
    with killed_at(run_dir / "checkpoints" / "step-00000015", "pretrain", *arguments):
        while len(train_losses(run_dir)) < 17:  # so that there are steps to repeat
            time.sleep(0.001)
    settings = json.loads((run_dir / "run.json").read_text())["tracking"]
    reached = len(train_losses(run_dir))
    assert 15 < reached < 40
    run("pretrain", "--resume", str(run_dir))
    assert json.loads((run_dir / "run.json").read_text())["tracking"] == settings

    losses = train_losses(run_dir)
    assert [step for step, _ in losses] == list(range(1, 41))
    shown = scalars(run_dir / "tensorboard")
    assert [step for step, _ in shown["train/loss"]] == list(range(1, 41))
    assert [value for _, value in shown["train/loss"]] == pytest.approx([value for _, value in losses])
    evaluated = [line["step"] for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "eval"]
    assert [step for step, _ in shown["eval/discriminator_auc"]] == evaluated == [20, 40]
    rows = csv_rows(run_dir / "csv_monitor" / "train_loss.csv")
    assert [(int(step), float(value)) for step, value in rows] == losses

    starts = wandb_records(run_dir)
    assert {item.run_id for records in starts for item in of_kind(records, "run")} == {settings["wandb_id"]}
    first, second = map(wandb_rows, starts)
    assert [row["step"] for row in second] == list(range(second[0]["step"], 41))
    assert {row["step"] for row in first + second} == set(range(1, 41))
    steps = [row["_step"] for row in first + second]
    assert steps == sorted(set(steps))
    line = next(line for line in read_metrics(run_dir / "metrics.jsonl") if line["step"] == 40)
    assert line["learning_rate"] == pytest.approx(second[-1]["train/learning_rate"])
    assert line["tokens_seen"] == second[-1]["train/tokens_seen"] > 0


@pytest.mark.slow
def test_a_signal_ends_the_wandb_run_with_its_status(store: TokenStore, tmp_path: Path) -> None:
    """Ctrl-C goes to the whole process group; wandb's service must outlive it to write the end."""
    run_dir = tmp_path / "run"
    arguments = [*start_arguments(store, run_dir, "schedule.total_steps=4000"), "--wandb", "offline"]
    process = subprocess.Popen(command("pretrain", *arguments), stdout=subprocess.DEVNULL, start_new_session=True)
    while not (run_dir / "metrics.jsonl").exists() or len(train_losses(run_dir)) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=200) == -signal.SIGINT
    [records] = wandb_records(run_dir)
    assert [item.exit_code for item in of_kind(records, "exit")] == [130]
    assert wandb_rows(records)[-1]["step"] == train_losses(run_dir)[-1][0]
