"""DeepSpeed's checkpoint files are pickles, which can call anything: read so that they call nothing.

What a file would call is found by reading its instructions, without following them. Loading goes through torch's
restricted unpickler, and every class outside of torch's own list, DeepSpeed's included, is replaced by an inert
stand-in that keeps what it was given: tensors and numbers come out, and no code of the file's choosing runs.

torch looks at none of the checksums that its own files hold, so these are checked here.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import _weights_only_unpickler

from electra_ds.errors import CheckpointError

_OWN = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)
"""What DeepSpeed itself puts into its files."""
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


def foreign_calls(path: Path) -> list[str]:
    """Full names of the classes and functions outside of torch's safe list that loading the file would call, sorted.

    Nothing of the file is followed. Raises CheckpointError where it is not a file of `torch.save`.
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
    """Raises CheckpointError, which says what the files' pickles would call; to be called where nobody trusts them."""
    own: set[str] = set()
    foreign: dict[str, str] = {}
    for path in files:
        for name in foreign_calls(path):
            if name in _OWN:
                own.add(name)
            else:
                foreign.setdefault(_python_3(name), path.name)
    start = "DeepSpeed's checkpoints are pickles, which are programs that can do anything when they are loaded. "
    if foreign:
        listed = ", ".join(f"{name} (in {file})" for name, file in sorted(foreign.items()))
        raise CheckpointError(
            f"{start}These call what no DeepSpeed checkpoint needs: {listed}. Do not trust it, unless whoever saved it "
            f"says why it is there. Nothing was loaded."
        )
    called = f"DeepSpeed's own {', '.join(sorted(name.rpartition('.')[2] for name in own))}" if own else "torch's own"
    raise CheckpointError(
        f"{start}These name only what DeepSpeed's files hold ({called}), and are read with inert stand-ins for it. "
        f"If you know where they come from, add --trusted. Nothing was loaded."
    )


def load_inert(path: Path) -> dict[str, Any]:
    """The file's dictionary, tensors on the CPU and mapped from the file, other objects as `Inert`.

    Raises CheckpointError where it is damaged, holds something else, or names what torch's unpickler never takes
    (modules os, posix, nt and sys).
    """
    stand_ins: list[Any] = [
        (_dictionary if name == "collections.defaultdict" else type("Inert", (Inert,), {}), name)
        for name in foreign_calls(path)
    ]
    _check_sums(path)
    try:
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a pickle can fail in every way there is
        raise CheckpointError(
            f"{path} cannot be read: {_first_line(error)} It is damaged, or was not written by DeepSpeed alone."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, which is not what DeepSpeed saves.")
    return content


def _python_3(name: str) -> str:
    """The name of today for one of Python 2, which pickles of torch's protocol hold: subprocess is `commands` there."""
    module, _, function = name.rpartition(".")
    return f"{IMPORT_MAPPING.get(module, module)}.{function}"


def _first_line(error: Exception) -> str:
    """What is wrong, without torch's advice to load it without restriction."""
    text = str(error)
    if text.startswith("Weights only load failed"):
        text = text.partition("\n\n")[2].strip()
    lines = text.splitlines() or [type(error).__name__]
    return lines[0]
