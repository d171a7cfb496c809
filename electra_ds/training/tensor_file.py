"""Files of named fp32 tensors in the safetensors format, hashed while they are written, read one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open

# A thread that writes takes part in Python's lock once a piece; at 256 KB it waits for the training thread 20 times as
# long as it works (docs/experiments.md).
_PIECE_BYTES = 16 << 20


class FileEntry(NamedTuple):
    """What a manifest says of a file."""

    bytes: int
    sha256: str


def write_file(path: Path, pieces: Iterable[bytes | np.ndarray]) -> FileEntry:
    """Write and flush to the disk; the hash is of what was meant, not of what a bad disk gives back. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for whole in pieces:
            view = memoryview(whole).cast("B")  # type: ignore[arg-type]
            for start in range(0, len(view), _PIECE_BYTES):
                piece = view[start : start + _PIECE_BYTES]
                digest.update(piece)
                size += len(piece)
                while piece:
                    piece = piece[file.write(piece) :]
        os.fsync(file.fileno())
    return FileEntry(size, digest.hexdigest())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileEntry:
    """fp32 tensors on the CPU, as `safetensors.torch.save_file` would write them, in one pass over the bytes."""
    names = sorted(tensors)
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        assert tensors[name].dtype == torch.float32, name
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[bytes | np.ndarray]:
        yield len(text).to_bytes(8, "little") + text
        for name in names:
            yield tensors[name].detach().contiguous().flatten().numpy()

    return write_file(path, pieces())


def hash_file(path: Path) -> str:
    """SHA-256. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


class TensorFiles(Mapping[str, torch.Tensor]):
    """Tensors of several files by name, read when they are asked for, so that no rank holds all of them."""

    def __init__(self, prefixes: Mapping[Path, str]) -> None:
        """prefixes: what to put before the names of each file. Raises SafetensorError and OSError."""
        self._files: dict[str, tuple[Any, str]] = {}
        for path, prefix in prefixes.items():
            file = safe_open(path, "pt")
            self._files |= {prefix + name: (file, name) for name in file.keys()}  # noqa: SIM118

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        file, key = self._files[name]
        return tuple(file.get_slice(key).get_shape())

    def dtypes(self) -> Iterator[tuple[str, str]]:
        """(name, dtype as the format names it), such as F32."""
        for name, (file, key) in self._files.items():
            yield name, file.get_slice(key).get_dtype()

    def __getitem__(self, name: str) -> torch.Tensor:
        file, key = self._files[name]
        tensor: torch.Tensor = file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
