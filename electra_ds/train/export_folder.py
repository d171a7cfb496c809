"""The folder that an export appears in, complete or not at all."""

from __future__ import annotations

from pathlib import Path

from electra_ds import runtime
from electra_ds.errors import CheckpointError

_LONGEST_NAME = 200


def check_out(out: Path) -> None:
    """Raises CheckpointError unless a folder can be made there, or an empty one be replaced."""
    try:
        if out.is_symlink():
            raise CheckpointError(
                f"{out} is a symbolic link, which would be replaced. Give the folder itself as --out."
            )
        if out.exists() and not out.is_dir():
            raise CheckpointError(f"{out} is a file, and an export is a folder. Give another --out.")
        if out.is_dir() and any(out.iterdir()):
            raise CheckpointError(f"{out} already exists and is not empty. Delete it, or give another --out.")
    except OSError as error:
        raise cannot_write(out, error) from error


def unfinished(out: Path, token: str) -> Path:
    """The hidden folder beside it in which the export is made; with a token, so that it is nobody else's."""
    return out.parent / f".{out.name[:_LONGEST_NAME]}.{token}"


def cannot_write(out: Path, error: Exception) -> CheckpointError:
    """What to say where an export could not be written."""
    advice = " Make room, then start it anew." if runtime.is_disk_full(error) else ""
    return CheckpointError(f"Cannot write the export {out}: {error}.{advice}")
