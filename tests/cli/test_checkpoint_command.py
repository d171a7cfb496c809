"""`bin/checkpoint ls`, `verify` and `prune`, on checkpoints as killed and damaged runs leave them."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from pathlib import Path

import pytest

from electra_ds.api.run import Run
from electra_ds.cli import main
from electra_ds.config.recipe import Recipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.config.run_record import RunRecord, RunSettings
from electra_ds.training.checkpoint import CheckpointFolder, verify_checkpoint
from electra_ds.training.checkpoints import list_checkpoints
from electra_ds.training.optimizer import FRESH_COUNTERS
from tests.helpers import cpu_plan, small_recipe
from tests.training.test_checkpoint import tensors

STEPS = (10, 20, 30, 40)


def save(folder: CheckpointFolder, step: int, record: dict[str, str]) -> Path:
    whole = tensors(step) | {"exp_avg_sq/a.bias": tensors()["exp_avg/a.bias"]}
    state = {"step": step, "tokens": 100 * step, "precision": "bf16", "optimizer": FRESH_COUNTERS}
    return folder.save(whole, state, record)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    recipe: Recipe = small_recipe()
    settings = RunSettings(log_every=1, eval_every=1, save_every=10, keep=2, eval_windows=8)
    record = RunRecord(
        store="store", store_fingerprint="fingerprint", parameters={}, device="CPU", threads=1, world_size=2,
        settings=settings, command=[],
    )  # fmt: skip
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    plan = cpu_plan(recipe, zero_optimization={"stage": 2})
    directory.write_record(recipe, plan, record)
    folder = CheckpointFolder(directory.checkpoints, keep=10)
    for step in STEPS:
        save(folder, step, directory.record_files(recipe, plan, record))
    return directory.path


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def call(*arguments: object, status: int = 0) -> None:
    if status == 0:
        main(["checkpoint", *map(str, arguments)])
        return
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint", *map(str, arguments)])
    assert ended.value.code == status


def test_ls_tells_what_saved_each_and_what_its_size_gives_away(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "step-00000020" / "optimizer.safetensors").write_bytes(b"short")
    (run / "checkpoints" / "step-00000030" / "state.json").unlink()
    call("ls", run)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-4:] == ["bf16", "2", "2", "complete"]
    call("ls", run, "--json")
    found = json.loads(capsys.readouterr().out)
    assert [checkpoint["step"] for checkpoint in found] == [10, 20, None, 40]
    assert found[1]["problem"].startswith("optimizer.safetensors has 5 bytes, not ")
    assert found[2]["problem"] == "state.json is missing"
    assert [checkpoint._asdict() for checkpoint in Run(run).list_checkpoints()] == found
    assert found[0]["bytes"] == sum(path.stat().st_size for path in (run / "checkpoints" / "step-00000010").iterdir())


def test_ls_shows_tokens_and_sizes_in_a_unit_that_fits_them(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call("ls", run)
    line = capsys.readouterr().out.splitlines()[1].split()
    assert line[1:3] == ["1.0", "k"]  # 100 x 10 tokens
    assert line[line.index("bf16") - 1] == "kB"
    first = list_checkpoints(run)[0]
    for tokens, size, shown in (
        (0, 0, "0 0 B"), (999, 2_500, "999 2.5 kB"), (3_140_000, 7 * 10**6, "3.1 M 7.0 MB"),
        (2 * 10**10, 10**10, "20.0 G 10.0 GB"),
    ):  # fmt: skip
        found = [first._replace(tokens=tokens, bytes=size, saved=None)]
        monkeypatch.setattr("electra_ds.api.run.list_checkpoints", lambda path, found=found: found)
        call("ls", run)
        assert f" {shown} bf16" in " ".join(capsys.readouterr().out.split())


def test_verify_reads_every_byte_and_ends_with_status_2(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("verify", run)
    assert capsys.readouterr().out.count(": complete") == len(STEPS)
    file = run / "checkpoints" / "step-00000030" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    call("verify", run, status=2)
    captured = capsys.readouterr()
    assert "step-00000030: damaged" in captured.out
    assert "1 of 4 checkpoint(s) damaged" in captured.err
    assert "the content of weights.safetensors has changed" in captured.err
    problems = {path.name: problem for path, problem in Run(run).verify_checkpoints().items()}
    assert problems.pop("step-00000030")
    assert problems == {"step-00000040": None, "step-00000020": None, "step-00000010": None}
    call("verify", run / "checkpoints" / "latest")
    call("verify", run / "checkpoints" / "step-00000030", status=2)


def test_verify_notices_tensors_that_do_not_belong_together(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"step": 50, "tokens": 0, "precision": "fp32", "optimizer": FRESH_COUNTERS}
    CheckpointFolder(run / "checkpoints", keep=10).save(tensors(), state, {})  # without exp_avg_sq/a.bias
    call("verify", run, status=2)
    assert "exp_avg_sq/a.bias is missing" in capsys.readouterr().err


def test_a_checkpoint_that_training_prunes_meanwhile_is_left_out(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = run / "checkpoints" / "step-00000010"
    paths = CheckpointFolder.paths

    def then_pruned(folder: CheckpointFolder) -> list[Path]:
        found = paths(folder)
        shutil.rmtree(gone, ignore_errors=True)
        return found

    shutil.copytree(gone, run / "copy")
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "paths", then_pruned)
        call("ls", run, "--json")
        assert [found["step"] for found in json.loads(capsys.readouterr().out)] == [20, 30, 40]
    shutil.copytree(run / "copy", gone)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "paths", then_pruned)
        call("verify", run)
        assert re.findall(r"step-\d+", capsys.readouterr().out) == [
            "step-00000040", "step-00000030", "step-00000020",
        ]  # fmt: skip


def test_verify_notices_weights_that_are_not_finite(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoilt = tensors() | {"exp_avg_sq/a.bias": tensors()["exp_avg/a.bias"] * float("nan")}
    state = {"step": 50, "tokens": 0, "precision": "fp32", "optimizer": FRESH_COUNTERS}
    CheckpointFolder(run / "checkpoints", keep=10).save(spoilt, state, {})
    call("verify", run, status=2)
    assert "1 tensors that are not finite, such as exp_avg_sq/a.bias" in capsys.readouterr().err


def test_prune_keeps_what_can_be_gone_on_from_where_the_newest_only_looks_whole(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "checkpoints" / "step-00000040", run / "checkpoints" / "step-00000150")
    before = names(run)
    call("prune", run, "--keep", "1", status=2)
    assert "step-00000040 is the newest complete one" in capsys.readouterr().err
    assert names(run) == before


def test_a_record_with_impossible_settings_is_not_followed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The copy in the newest checkpoint is, as for any damaged record."""
    record = json.loads((run / "run.json").read_text())
    for keep in (-5, 0, "x", None):
        (run / "run.json").write_text(json.dumps(record | {"settings": record["settings"] | {"keep": keep}}))
        assert RunDirectory(run).read_record().settings.keep == 2
    for name in ("run.json", "recipe.yaml", "deepspeed.json"):
        (run / name).write_text("[")
    assert RunDirectory(run).read_record().settings.keep == 2
    assert RunDirectory(run).read_deepspeed_json()["zero_optimization"]["stage"] == 2
    call("prune", run, "--dry-run")


def test_ls_says_how_many_were_set_aside(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "damaged-step-00000005").mkdir()
    call("ls", run)
    assert "1 set aside as damaged" in capsys.readouterr().out


def test_prune_keeps_the_newest_and_what_is_not_its_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints"
    for made in (".writing-step-00000050-ab", ".pruning-step-00000005-cd", "damaged-step-00000007", "step-backup"):
        (folder / made).mkdir()
    (folder / ".latest-ef").symlink_to("step-00000040")
    before = names(run)
    call("prune", run, "--dry-run", "--damaged")
    assert names(run) == before
    assert capsys.readouterr().out.count("would remove") == 6
    reasons = Run(run).prune_checkpoints(damaged=True, dry_run=True)
    assert len(reasons) == 6
    assert reasons[folder / "damaged-step-00000007"] == "damaged"
    call("prune", run)  # as many as the run keeps
    assert names(run) == ["damaged-step-00000007", "latest", "step-00000030", "step-00000040", "step-backup"]
    call("prune", run, "--keep", "1", "--damaged")
    assert names(run) == ["latest", "step-00000040", "step-backup"]
    verify_checkpoint(folder / "latest")
    capsys.readouterr()
    call("prune", run, "--keep", "1")
    assert "Nothing to remove" in capsys.readouterr().out


def test_prune_never_removes_the_newest_whole_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (30, 40):
        (run / "checkpoints" / f"step-{step:08d}" / "weights.safetensors").write_bytes(b"")
    before = names(run)
    call("prune", run, "--keep", "2", status=2)
    assert "step-00000020 is the newest complete one" in capsys.readouterr().err
    assert names(run) == before
    call("prune", run, "--keep", "3")
    assert "step-00000020" in names(run)


def test_prune_leaves_a_run_alone_that_somebody_trains(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(run)
    with (run / ".lock").open("w") as lock:
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        call("prune", run, "--keep", "1", status=2)
    assert "in use by process 4711" in capsys.readouterr().err
    assert names(run) == before


@pytest.mark.parametrize("action", ["ls", "verify", "prune"])
def test_what_is_no_run_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], action: str) -> None:
    call(action, tmp_path / "nowhere", status=2)
    assert "is neither a run directory nor a checkpoint" in capsys.readouterr().err


def test_a_run_without_checkpoints_is_told_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints")
    call("ls", run, status=2)
    assert "has no checkpoint yet" in capsys.readouterr().err
