"""The warning about pickles that nobody trusts yet calls harmful what could do harm, and nothing else."""

from __future__ import annotations

import argparse
import datetime
import functools
import pickle
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
from electra_ds.interop.deepspeed_pickle import load_inert, refuse_untrusted

DATA: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace(lr=1, out=Path("x")), "numpy array": np.arange(3.0),
    "numpy scalar": np.float64(0.5), "numpy bool": np.bool_(True), "structured": np.zeros(2, dtype=[("a", "i4")]),
    "generator": np.random.default_rng(0), "random state": np.random.RandomState(0).get_state(),
    "datetime": datetime.datetime.now(datetime.UTC), "delta": datetime.timedelta(1), "decimal": Decimal("0.1"),
    "paths": [Path("x"), PureWindowsPath("y")], "collections": [Counter("ab"), OrderedDict(a=1), deque([1])],
    "defaultdict": defaultdict(list, a=[1]), "simple": SimpleNamespace(a=1), "uuid": uuid4(),
    "plain": [{1, 2}, frozenset("a"), 1j, bytearray(b"x"), range(3), slice(1), object, b"bytes"],
    "torch": [torch.Size([2]), torch.float16, torch.device("cpu"), torch.ones(1)],
    "partial": functools.partial(dict, a=1),
}  # fmt: skip


class Calls:
    """Pickled, it is a call of a function of that name; Python looks it up when it loads the file."""

    def __init__(self, name: str) -> None:
        self.name = name


class Pickler(pickle._Pickler):
    """Writes what `Calls` names, with arguments of none."""

    def reducer_override(self, value: Any) -> Any:
        return NotImplemented

    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        if isinstance(value, Calls):
            module, _, function = value.name.rpartition(".")
            self.write(pickle.GLOBAL + f"{module}\n{function}\n".encode() + pickle.EMPTY_TUPLE + pickle.REDUCE)
        else:
            super().save(value, save_persistent_id)


def refused(path: Path, content: Any) -> str:
    torch.save(content, path, pickle_module=SimpleNamespace(Pickler=Pickler, dumps=pickle.dumps, __name__="pickle"))
    with pytest.raises(CheckpointError) as error:
        refuse_untrusted([path])
    return str(error.value)


@pytest.mark.parametrize("name", DATA)
def test_data_that_a_script_saved_with_its_state_is_not_called_harmful_and_can_be_read(
    tmp_path: Path, name: str
) -> None:
    torch.save({"client": DATA[name], "weight": torch.ones(2)}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError) as error:
        refuse_untrusted([tmp_path / "file.pt"])
    told = str(error.value)
    assert "nothing that is known to do harm" in told
    assert "other packages" not in told
    assert "Do not trust" not in told
    assert "add --trusted" in told
    assert torch.equal(load_inert(tmp_path / "file.pt")["weight"], torch.ones(2))


def test_a_class_of_another_package_is_named_and_not_called_harmful(tmp_path: Path) -> None:
    torch.save({"strategy": IntervalStrategy.STEPS, "args": argparse.Namespace()}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError) as error:
        refuse_untrusted([tmp_path / "file.pt"])
    told = str(error.value)
    assert "They also name transformers.trainer_utils.IntervalStrategy (in file.pt), which is code of other" in told
    assert "argparse.Namespace" in told.partition("They also name")[0]
    assert "Do not trust" not in told


@pytest.mark.parametrize(
    "name",
    [
        "builtins.eval", "builtins.exec", "builtins.getattr", "builtins.__import__", "builtins.open", "os.system",
        "posix.system", "nt.system", "subprocess.Popen", "shutil.rmtree", "socket.create_connection", "runpy.run_path",
        "importlib.import_module", "ctypes.CDLL", "pickle.loads", "marshal.loads", "operator.attrgetter", "io.open",
        "webbrowser.open", "urllib.request.urlopen", "torch.load", "torch.hub.load", "torch.utils.cpp_extension.load",
        "numpy.load", "numpy.testing._private.utils.runstring", "pathlib.os.system", "argparse._os.system",
        "types.FunctionType", "code.InteractiveInterpreter", "functools.reduce", "timeit.timeit", "pip.main",
        "__builtin__.eval", "commands.getoutput", "urllib2.urlopen",
    ],
)  # fmt: skip
def test_what_could_do_harm_is_called_harmful_wherever_it_is(tmp_path: Path, name: str) -> None:
    told = refused(tmp_path / "file.pt", {"client": argparse.Namespace(a=1, b=[np.float64(1), Calls(name)])})
    assert "These call what could run programs or change files, which no checkpoint needs: " in told
    assert f".{name.rpartition('.')[2]} (in file.pt)" in told
    assert "Namespace" not in told
    assert "numpy._core" not in told
    assert "Do not trust the files" in told
