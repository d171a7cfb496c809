"""Files that the user asked for by name: they are written completely or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from electra_ds.core.errors import CheckpointError


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which becomes `path` at the end, with the mode that the umask gives, whatever
    the writer sets. Raises CheckpointError if that fails."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise CheckpointError(f"Cannot write {path}: it is no ordinary file. Name one.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode & 0o666)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(f"Cannot write {path}: {error.strerror}.") from error
