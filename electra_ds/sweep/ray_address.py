"""What a sweep is told to use, tried before anything waits for it: a cluster's address, a place for Tune's records."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
from pyarrow import fs

from electra_ds.core.errors import ConfigError

_WITHIN_S = 5.0
_ADDRESS = re.compile(r"(?:ray://)?(\[[0-9a-fA-F:]+\]|[\w.-]+):(\d{1,5})", re.ASCII)


def check_reachable(address: str) -> None:
    """Raises ConfigError for what is no address, and where nobody answers."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or _noted_address()
    found = _ADDRESS.fullmatch(address)
    if found is None or not 0 < int(found[2]) < 2**16:
        raise ConfigError(f"--address {address} is none. Write auto, HOST:6379 or ray://HOST:10001.")
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), _WITHIN_S).close()
    except OSError as error:
        raise ConfigError(f"Nobody answers at {address}: {error}. Is a Ray cluster running there?") from error


def _noted_address() -> str:
    """Where `ray start` has noted its cluster's address, which stays there after a cluster was killed."""
    noted = Path(tempfile.gettempdir()) / "ray" / "ray_current_cluster"
    try:
        return noted.read_text("utf8").strip()
    except OSError:
        raise ConfigError("No Ray cluster runs on this machine. Start one: ray start --head") from None


def checked_storage(storage: str) -> str:
    """A path in full, or an address that pyarrow knows. Raises ConfigError if it cannot be written to."""
    if "://" not in storage:
        storage = str(Path(storage).expanduser().absolute())
    try:
        system, path = fs.FileSystem.from_uri(storage)
        system.create_dir(path, recursive=True)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"--storage {storage} cannot be used: {first}") from error
    return storage
