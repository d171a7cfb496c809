"""DeepSpeed's checkpoint files are pickles, which can call anything: read so that they call nothing.

What a file would call is found by reading its instructions, without following them. Loading goes through torch's
restricted unpickler, and every class outside of torch's own list, DeepSpeed's included, is replaced by an inert
stand-in that keeps what it was given: tensors and numbers come out, and no code of the file's choosing runs.

torch looks at none of the checksums that its own files hold, so these are checked here.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import _weights_only_unpickler

from electra_ds.core.errors import CheckpointError

_OWN = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)
"""What DeepSpeed itself puts into its files."""
_PLAIN = re.compile(
    r"builtins\.(bool|bytearray|bytes|complex|dict|float|frozenset|int|list|object|range|set|slice|str|tuple)"
    r"|numpy\.(ndarray|dtype|dtypes\.\w+|bool_?|u?int\d+|float\d+|longdouble|complex\d+|str_|bytes_)"
    r"|numpy\._?core\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer)"
    r"|numpy\.random\.(_pickle\.__\w+_ctor|\w+\.(MT19937|PCG64|PCG64DXSM|Philox|SFC64|(__pyx_unpickle_)?SeedSequence))"
    r"|argparse\.Namespace|collections\.(Counter|OrderedDict|defaultdict|deque)|functools\.partial"
    r"|datetime\.(date|datetime|time|timedelta|timezone)|decimal\.Decimal|fractions\.Fraction|uuid\.UUID"
    r"|pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path|types\.(MappingProxyType|SimpleNamespace)"
    r"|copyreg\.(_reconstructor|__newobj__)|_codecs\.encode"
)
"""Names of Python and NumPy that hold data or put it together, and do nothing else."""
_HARMFUL = re.compile(
    r"(_imp|_pickle|_posixsubprocess|bdb|cProfile|cloudpickle|code|codeop|compileall|ctypes|_ctypes|dill|distutils"
    r"|doctest|ftplib|http|httpx|imp|importlib|joblib|marshal|multiprocessing|nt|ntpath|os|pdb|pickle|pip|pkg_resources"
    r"|pkgutil|posix|posixpath|profile|pty|py_compile|requests|runpy|setuptools|shelve|shutil|smtplib|socket"
    r"|subprocess|sys|tempfile|timeit|trace|urllib|webbrowser)\..+"
    r"|builtins\.(__import__|breakpoint|compile|delattr|eval|exec|getattr|globals|input|locals|open|setattr|vars)"
    r"|_?io\.(FileIO|open|open_code)|_?operator\.(attrgetter|methodcaller)|functools\.reduce|pandas\.read_pickle"
    r"|types\.(CodeType|FunctionType|LambdaType|MethodType|ModuleType)"
    r"|torch\.(classes|hub|jit|load|ops|package|serialization|utils\.cpp_extension)(\..+)?"
    r"|numpy\.(f2py|fromfile|genfromtxt|load|loadtxt|memmap|save|savetxt|testing)(\..+)?"
    r"|.+\._?(builtins|os|posix|subprocess|sys)\..+"
)
"""Names that run programs or code, change files or reach the network, or lead to something that does."""
_ZIP_START = b"PK\x03\x04"
"""By which torch tells its files from those of its old format."""


class Inert:
    """Stands for an object of a class that is not loaded: its constructor's arguments and its attributes."""

    arguments: tuple[Any, ...]
    attributes: dict[str, Any]

    def __new__(cls, *arguments: Any) -> Inert:
        made = object.__new__(cls)
        made.arguments = arguments
        made.attributes = {}
        return made

    def __init__(self, *arguments: Any) -> None:
        pass  # called after __new__, where the pickle reduces rather than makes

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = state


def _dictionary(*arguments: Any) -> dict[Any, Any]:
    """Stands for a defaultdict, since torch's unpickler fills only true dictionaries."""
    return {}


def _list(*arguments: Any) -> list[Any]:
    """Stand in for a deque, which the unpickler fills as a list."""
    return []


_FILLED: dict[str, Any] = {"collections.defaultdict": _dictionary, "collections.deque": _list}


def foreign_calls(path: Path) -> list[str]:
    """Full names of the classes and functions outside of torch's safe list that loading the file would call, sorted.

    Nothing of the file is followed. Raises CheckpointError if it is not a file of `torch.save`.
    """
    _check_archive(path)
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception as error:  # torch's reader, the zip's and the pickle's
        names = _named_in_instructions(path)
        if names:
            return [name for name in names if name not in _torchs_own()]
        raise CheckpointError(
            f"{path} is damaged: {_first_line(error)}. It is cut short, or not a file that DeepSpeed wrote."
        ) from error


def _check_archive(path: Path) -> None:
    """Raises CheckpointError for what is no plain file, and for a zip that torch would not have written.

    torch never compresses: whatever is read takes no more memory than the file has bytes.
    """
    if not path.is_file():  # a pipe would be waited for without end
        raise CheckpointError(f"{path} is damaged: it is not a regular file.")
    try:
        with path.open("rb") as file:
            if file.read(len(_ZIP_START)) != _ZIP_START:
                return
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Copy it anew from where it was saved.") from error
    compressed = next((entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    if compressed is not None:
        raise CheckpointError(f"{path} is damaged: {compressed} in it is compressed, and torch.save compresses none.")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(f"{path} is damaged: it says that it holds more than it has bytes.")


def _check_sums(path: Path) -> None:
    """Raises CheckpointError unless every part of the zip has its checksum."""
    try:
        with path.open("rb") as file:
            if file.read(len(_ZIP_START)) != _ZIP_START:
                raise CheckpointError(
                    f"{path} is of torch's old format or damaged: DeepSpeed 0.19.8 saves zip files, and this is none."
                )
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
    except (OSError, EOFError, zipfile.BadZipFile, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Copy it anew from where it was saved.") from error
    if changed is not None:
        raise CheckpointError(
            f"{path} is damaged: {changed} in it has changed since it was saved. Copy it anew from where it was saved."
        )


def _torchs_own() -> frozenset[str]:
    """What torch's restricted unpickler takes by itself, by full names."""
    return frozenset(_weights_only_unpickler._get_allowed_globals())


def _named_in_instructions(path: Path) -> list[str]:
    """The same in pickles that torch does not write (bare ones, newer protocols), as far as they can be read."""
    found: set[str] = set()
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                content = archive.read(name)
        else:
            content = path.read_bytes()
        stream, texts = io.BytesIO(content), list[str]()
        while stream.tell() < len(content):  # torch's old format is several pickles, one after the other
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    found.add(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL" and len(texts) > 1:
                    found.add(".".join(texts[-2:]))
                elif isinstance(argument, str):
                    texts.append(argument)
    except Exception:  # what was named up to here still counts
        pass
    return sorted(found)


def refuse_untrusted(files: Iterable[Path]) -> NoReturn:
    """Raise CheckpointError that says what the files' pickles would call; to be called if nobody trusts them.

    Only what could do harm is called harmful: Python and NumPy data that a script saved with its state is not.
    """
    found: dict[str, dict[str, str]] = {"own": {}, "plain": {}, "harmful": {}, "other": {}}
    for path in files:
        for name in foreign_calls(path):
            found[_kind_of(name)].setdefault(_python_3(name), path.name)
    start = "DeepSpeed's checkpoints are pickles, which are programs that can do anything when they are loaded. "
    if found["harmful"]:
        raise CheckpointError(
            f"{start}These call what could run programs or change files, which no checkpoint needs: "
            f"{_listed(found['harmful'])}. Do not trust the files unless whoever saved them can explain "
            f"that. Nothing was loaded."
        )
    held = f"DeepSpeed's own {', '.join(sorted(name.rpartition('.')[2] for name in found['own']))}"
    known = [held if found["own"] else "torch's own", *sorted(found["plain"])]
    other = ""
    if found["other"]:
        other = (
            f" They also name {_listed(found['other'])}, which is code of other packages: whoever saved them should "
            f"know why. It is not loaded either."
        )
    raise CheckpointError(
        f"{start}These hold data ({', '.join(known)}) and nothing that is known to do harm, and are read with inert "
        f"stand-ins for all but tensors and numbers.{other} If you know where they come from, add --trusted. Nothing "
        f"was loaded."
    )


def _kind_of(name: str) -> str:
    """Return the kind of a name: `own` (DeepSpeed's), `plain` (data), `harmful` or `other`."""
    if name in _OWN:
        return "own"
    name = _python_3(name)
    if _PLAIN.fullmatch(name):
        return "plain"
    return "harmful" if _HARMFUL.fullmatch(name) else "other"


def _listed(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} (in {file})" for name, file in sorted(found.items()))


def load_inert(path: Path) -> dict[str, Any]:
    """Return the file's dictionary, see `load_inert_content`. Raises CheckpointError also if it holds something
    else."""
    content = load_inert_content(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, which is not what DeepSpeed saves.")
    return content


def load_inert_content(path: Path) -> Any:
    """Return what the file holds: tensors on the CPU, mapped from the file, and other objects as `Inert`.

    Raises CheckpointError if it is damaged, or names what torch's unpickler never takes (modules os, posix, nt and
    sys).
    """
    stand_ins: list[Any] = [(_FILLED.get(name) or type("Inert", (Inert,), {}), name) for name in foreign_calls(path)]
    _check_sums(path)
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a pickle can fail in every way there is
        raise CheckpointError(
            f"{path} cannot be read: {_first_line(error)} It is damaged, or was not written by DeepSpeed alone."
        ) from error


def _python_3(name: str) -> str:
    """The name of today for one of Python 2, which pickles of torch's protocol hold: subprocess is `commands` there."""
    module, _, function = name.rpartition(".")
    module, function = NAME_MAPPING.get((module, function), (IMPORT_MAPPING.get(module, module), function))
    return f"{module}.{function}"


def _first_line(error: Exception) -> str:
    """What is wrong, without torch's advice to load it without restriction."""
    text = str(error)
    if text.startswith("Weights only load failed"):
        text = text.partition("\n\n")[2].strip()
    lines = text.splitlines() or [type(error).__name__]
    return lines[0]
