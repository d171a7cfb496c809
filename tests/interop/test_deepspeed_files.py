"""Reading a file of DeepSpeed's: tensors come out, nothing in it is run, and damage is noticed."""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import subprocess
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
from transformers.trainer_utils import IntervalStrategy

from electra_ds.core.errors import CheckpointError
from electra_ds.interop.deepspeed_files import Placeholder, load_file

DATA: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace(lr=1, out=Path("x")), "numpy array": np.arange(3.0),
    "numpy scalar": np.float64(0.5), "numpy bool": np.bool_(True), "structured": np.zeros(2, dtype=[("a", "i4")]),
    "generator": np.random.default_rng(0), "random state": np.random.RandomState(0).get_state(),
    "datetime": datetime.datetime.now(datetime.UTC), "delta": datetime.timedelta(1), "decimal": Decimal("0.1"),
    "paths": [Path("x"), PureWindowsPath("y")], "collections": [Counter("ab"), OrderedDict(a=1), deque([1])],
    "defaultdict": defaultdict(list, a=[1]), "simple": SimpleNamespace(a=1), "uuid": uuid4(),
    "plain": [{1, 2}, frozenset("a"), 1j, bytearray(b"x"), range(3), slice(1), object, b"bytes"],
    "torch": [torch.Size([2]), torch.float16, torch.device("cpu"), torch.ones(1)],
    "partial": functools.partial(dict, a=1), "transformers": IntervalStrategy.STEPS,
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_objects_that_a_script_saved_with_its_state_do_not_get_in_the_way(tmp_path: Path, name: str) -> None:
    torch.save({"client": DATA[name], "weight": torch.ones(2)}, tmp_path / "file.pt")
    assert torch.equal(load_file(tmp_path / "file.pt")["weight"], torch.ones(2))


def test_a_placeholder_holds_the_attributes_of_an_object_and_the_arguments_of_a_call(tmp_path: Path) -> None:
    torch.save({"object": argparse.Namespace(lr=1), "enum": IntervalStrategy.STEPS}, tmp_path / "file.pt")
    content = load_file(tmp_path / "file.pt")
    assert isinstance(content["object"], Placeholder)
    assert content["object"].attributes == {"lr": 1}
    assert content["enum"].arguments == ("steps",)


class Attack:
    """Loaded by pickle, it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


class AttackByFunction(Attack):
    def __reduce__(self) -> Any:
        return subprocess.check_call, (["touch", str(self.target)],)


def test_a_pickle_that_would_run_a_program_does_not(tmp_path: Path) -> None:
    target, file = tmp_path / "executed", tmp_path / "file.pt"
    torch.save({"note": AttackByFunction(target), "weight": torch.ones(2)}, file)
    assert torch.equal(load_file(file)["weight"], torch.ones(2))  # the call is a stand-in
    torch.save({"note": Attack(target)}, file)
    with pytest.raises(CheckpointError, match=r"posix\.system whose module"):  # torch never takes anything of os
        load_file(file)
    assert not target.exists()


def test_a_file_that_is_not_as_torch_saved_it_is_damaged(tmp_path: Path) -> None:
    whole, file = tmp_path / "whole.pt", tmp_path / "other.pt"
    torch.save({"a": torch.arange(1000.0)}, whole)
    assert torch.equal(load_file(whole)["a"], torch.arange(1000.0))
    content = bytearray(whole.read_bytes())
    content[content.index(torch.arange(1000.0).numpy().tobytes()) + 2001] ^= 1  # a weight's, which torch would take
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"other\.pt cannot be read: whole/data/0 in it has changed"):
        load_file(file)
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"cannot be read: File is not a zip file"):
        load_file(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("other/data.pkl", b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_file(file)
    with pytest.raises(CheckpointError, match=r"none\.pt cannot be read"):
        load_file(tmp_path / "none.pt")
