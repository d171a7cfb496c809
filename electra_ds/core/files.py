"""Recognising Hub model names, and writing a file completely or not at all."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from electra_ds.core.errors import CheckpointError

_HUB_MODEL = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def is_hub_model(text: str) -> bool:
    """Return whether a text is OWNER/NAME, and not a path.

    A missing runs/mine is a path if there is a folder `runs`, and a name ending in .json or .txt is that of a file.
    """
    path = Path(text)
    return bool(_HUB_MODEL.fullmatch(text)) and not path.parent.is_dir() and path.suffix not in (".json", ".txt")


def path_hint(text: str) -> str:
    """Return the end of a message about a missing path that could also be a model on the Hub, or an empty text."""
    folder = Path(text).parent
    if not _HUB_MODEL.fullmatch(text) or not folder.is_dir():
        return ""
    return f"; there is a folder {folder} here, so {text} is read as a path"


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which is renamed to `path` at the end.

    The file's mode follows the umask, whatever the writer sets. Raises CheckpointError if it cannot be written.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise CheckpointError(f"Cannot write {path}: it is not an ordinary file. Choose another name.")
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
