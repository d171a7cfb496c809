from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from electra_ds.core.errors import CheckpointError
from electra_ds.training import checkpoint as checkpoint_module
from electra_ds.training.checkpoint import (
    CheckpointFolder,
    PendingCheckpoint,
    TensorFiles,
    hash_file,
    load_checkpoint,
    share_of,
    verify_checkpoint,
    write_tensors,
)
from electra_ds.training.optimizer import FRESH_COUNTERS
from tests.helpers import REPOSITORY

RECORD = {"recipe.yaml": "name: x\n", "run.json": "{}"}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    names = ("master/a.weight", "exp_avg/a.weight", "exp_avg_sq/a.weight", "master/a.bias", "exp_avg/a.bias")
    return {name: torch.randn(7, 5, generator=rng) for name in names}


def save(folder: CheckpointFolder, step: int) -> Path:
    return folder.save(
        tensors(step), {"step": step, "tokens": 0, "optimizer": FRESH_COUNTERS | {"loss_scale": 0.1 + step}}, RECORD
    )


def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path: Path) -> None:
    path = save(CheckpointFolder(tmp_path, keep=3), 12)
    loaded = load_checkpoint(path)
    assert loaded.tensors.keys() == tensors().keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in tensors(12).items())
    assert loaded.state["optimizer"]["loss_scale"] == 12.1
    assert (path / "recipe.yaml").read_text() == RECORD["recipe.yaml"]
    assert (path / "weights.safetensors").stat().st_mode == (path / "state.json").stat().st_mode


@given(
    shapes=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20),
        st.lists(st.integers(1, 5), max_size=3),
        max_size=6,
    )
)
@settings(max_examples=50)
def test_a_tensor_file_is_to_the_byte_what_safetensors_writes(shapes: dict[str, list[int]]) -> None:
    rng = torch.Generator().manual_seed(0)
    named = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items() if name != "__metadata__"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ours"
        entry = write_tensors(path, named)
        save_file(named, Path(folder) / "theirs")
        content = path.read_bytes()
        assert content == (Path(folder) / "theirs").read_bytes()
        assert entry == (len(content), hashlib.sha256(content).hexdigest())
        assert hash_file(path) == entry.sha256
        again = TensorFiles({path: "x/"})
        assert again.keys() == {f"x/{name}" for name in named}
        assert all(torch.equal(again[f"x/{name}"], tensor) for name, tensor in named.items())
        assert all(again.shape(f"x/{name}") == tensor.shape for name, tensor in named.items())


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=40), world_size=st.integers(1, 8))
def test_ranks_share_the_parameters_and_none_has_much_more_than_the_others(sizes: list[int], world_size: int) -> None:
    shapes = {f"p{index}": (size,) for index, size in enumerate(sizes)}
    shares = [share_of(shapes, rank, world_size) for rank in range(world_size)]
    assert sorted(name for share in shares for name in share) == sorted(shapes)
    loads = [sum(shapes[name][0] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes)


def test_shares_of_several_ranks_are_one_checkpoint_and_a_missing_one_is_noticed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    draft = PendingCheckpoint(folder, 4, "token")
    whole = tensors(4)
    entries = {}
    for rank in range(3):
        own = {name: tensor for index, (name, tensor) in enumerate(whole.items()) if index % 3 == rank}
        entries |= draft.write_shard(own, rank, 3)
    draft.publish(entries, {"step": 4}, RECORD)
    loaded = load_checkpoint(draft.final)
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in whole.items())
    assert loaded.tensors.keys() == whole.keys()
    (draft.final / "optimizer-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer-00002-of-00003\.safetensors is missing"):
        load_checkpoint(draft.final)


def test_a_checkpoint_of_another_model_is_refused_with_what_differs(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    with pytest.raises(CheckpointError, match=r"does not fit.*a.weight has shape \[7, 5\], not \[7, 6\]"):
        checkpoint.check({"a.weight": (7, 6), "a.bias": (7, 5)}, {"a.weight", "a.bias"})
    with pytest.raises(CheckpointError, match=r"exp_avg_sq/a.bias is missing"):
        checkpoint.check({"a.weight": (7, 5), "a.bias": (7, 5)}, {"a.weight", "a.bias"})
    with pytest.raises(CheckpointError, match=r"a.bias is not part of the model"):
        checkpoint.check({"a.weight": (7, 5)}, {"a.weight", "a.bias"})


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (5, 10, 15, 120, 1000):
        save(folder, step)
    assert [path.name for path in folder.paths()] == ["step-00000120", "step-00001000"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000120", "step-00001000"]
    assert load_checkpoint(tmp_path / "latest").state["step"] == 1000


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(CheckpointFolder(tmp_path_factory.mktemp("run"), keep=3), 7)


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_byte_or_a_cut_file_is_always_noticed(saved: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(path.name for path in saved.iterdir())))
    file = saved / name
    content = file.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    bit = data.draw(st.integers(0, 7))
    flipped = content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]
    damaged = data.draw(st.sampled_from([flipped, content[:place], content + b"x"]))
    try:
        file.write_bytes(damaged)
        if name == "manifest.json":  # a blank more or the format's number decide nothing; all else is noticed
            try:
                loaded = load_checkpoint(saved)
            except CheckpointError:
                return
            assert all(torch.equal(loaded.tensors[key], tensor) for key, tensor in tensors(7).items())
        else:
            with pytest.raises(CheckpointError, match=f"damaged: .*{name}"):
                load_checkpoint(saved)
    finally:
        file.write_bytes(content)
    verify_checkpoint(saved)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    save(folder, 1)
    newest = save(folder, 2)
    (newest / "optimizer.safetensors").unlink()
    path, damaged = folder.latest_valid()
    assert path == folder.path(1)
    assert "optimizer.safetensors is missing" in damaged[newest]
    assert os.readlink(tmp_path / "latest") == "step-00000002"
    folder.tidy(damaged)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged-step-00000002", "latest", "step-00000001"]
    assert os.readlink(tmp_path / "latest") == "step-00000001"
    save(folder, 2)  # the step is written anew, not taken for saved
    verify_checkpoint(newest)
    newest.joinpath("manifest.json").unlink()
    (folder.paths()[0] / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="No checkpoint of this run is complete"):
        folder.latest_valid()


LEFTOVER = ".writing-step-00000009-abcd0123"  # what a kill in the middle of a save leaves


def test_a_folder_that_was_never_published_does_not_count(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    path = save(folder, 3)
    path.rename(tmp_path / LEFTOVER)
    (tmp_path / "latest").unlink()
    assert folder.latest_valid() == (None, {})
    save(folder, 9)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [LEFTOVER, "latest", "step-00000009"]
    for leftover in (".writing-step-00000011", ".pruning-step-00000002"):
        (tmp_path / leftover).mkdir()
    (tmp_path / "step-notes.txt").write_text("mine")
    shutil.copytree(tmp_path / "step-00000009", tmp_path / "step-backup")
    folder.tidy([])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "latest", "step-00000009", "step-backup", "step-notes.txt",
    ]  # fmt: skip
    assert folder.paths() == [tmp_path / "step-00000009"]


def test_a_checkpoint_is_flushed_before_it_gets_its_name_and_an_old_one_goes_only_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut needs, which no test can make: the order of flushing, renaming and removing."""
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=1)
    save(folder, 1)
    told: list[str] = []

    def telling(name: str, function: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            path = arguments[0]
            place = Path(os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path)
            told.append(f"{name} {place.name.partition('-')[0] if '-' in place.name else place.name}")
            return function(*arguments, **more)

        return call

    monkeypatch.setattr(os, "fsync", telling("flush", os.fsync))
    monkeypatch.setattr(Path, "rename", telling("rename", Path.rename))
    monkeypatch.setattr(Path, "replace", telling("replace", Path.replace))
    monkeypatch.setattr(shutil, "rmtree", telling("remove", shutil.rmtree))
    save(folder, 2)
    files = ["weights.safetensors", "optimizer.safetensors", "recipe.yaml", "run.json", "state.json", "manifest.json"]
    assert told == [f"flush {name}" for name in files] + [
        "flush .writing", "rename .writing", "flush checkpoints", f"flush {tmp_path.name}", "replace .latest",
        "flush checkpoints", "rename step", "remove .pruning",
    ]  # fmt: skip


def test_what_cannot_be_pruned_costs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    save(folder, 1)

    def refuse(path: Path) -> None:
        raise OSError(39, "Directory not empty")  # as over NFS while somebody reads it

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        save(folder, 2)
    verify_checkpoint(tmp_path / "latest")
    folder.tidy([])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002"]


def test_a_copy_under_a_name_of_ones_own_can_be_used(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    shutil.copytree(save(folder, 1), tmp_path / "best")
    shutil.copytree(tmp_path / "best", tmp_path / "step-00000007")
    assert load_checkpoint(tmp_path / "best").state["step"] == 1
    with pytest.raises(CheckpointError, match="is from step 1, which contradicts its name"):
        load_checkpoint(tmp_path / "step-00000007")
    assert folder.latest_valid()[0] == folder.path(1)


def test_a_folder_called_latest_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    folder = CheckpointFolder(tmp_path, keep=1)
    save(folder, 1)
    folder.tidy([])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_what_cannot_be_read_just_now_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    save(folder, 1)
    save(folder, 2)

    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "hash_file", fail)
        with pytest.raises(CheckpointError, match=r"cannot be read: .*Input/output error.*move .*step-00000002 away"):
            folder.latest_valid()
    assert folder.latest_valid() == (folder.path(2), {})


@pytest.mark.parametrize(
    "files",
    [
        {"weights.safetensors": {"bytes": 5}},
        {},
        [],
    ],
    ids=str,
)
def test_a_manifest_that_is_incomplete_is_damage(tmp_path: Path, files: Any) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    save(folder, 1)
    newest = save(folder, 2)
    manifest = json.loads((newest / "manifest.json").read_text())
    mixed = manifest["files"] | files if files else files
    (newest / "manifest.json").write_text(json.dumps(manifest | {"files": mixed}))
    with pytest.raises(CheckpointError, match=r"is damaged: manifest\.json"):
        load_checkpoint(newest)
    assert folder.latest_valid()[0] == folder.path(1)


def test_a_state_that_is_not_complete_is_passed_over(tmp_path: Path) -> None:
    """With hashes that are right: a version before, or a hand, may have written it."""
    folder = CheckpointFolder(tmp_path, keep=3)
    save(folder, 1)
    newest = save(folder, 2)
    text = json.dumps({"format": 1})
    (newest / "state.json").write_text(text)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    verify_checkpoint(newest)
    path, damaged = folder.latest_valid()
    assert path == folder.path(1)
    assert "cannot be read" in damaged[newest]


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.training.test_checkpoint import CheckpointFolder, save
from electra_ds.core.errors import CheckpointError
folder = CheckpointFolder(Path(sys.argv[1]), keep=3)
save(folder, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))  # the kernel refuses to write more, as on a full disk
try:
    save(folder, 2)
except CheckpointError as error:
    print(error)
"""


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(REPOSITORY)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert "Cannot write the checkpoint" in result.stdout
    assert "The newest complete one is" in result.stdout
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step-00000001"]
    verify_checkpoint(tmp_path / "step-00000001")


def test_a_checkpoint_of_another_format_is_refused(saved: Path, tmp_path: Path) -> None:
    state = json.loads((saved / "state.json").read_text())
    folder = CheckpointFolder(tmp_path, keep=1)
    path = folder.save(tensors(), state | {"format": 99}, RECORD)
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(path)
