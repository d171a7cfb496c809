"""The folder that an export appears in, complete or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from electra_ds.core import devices
from electra_ds.core.errors import CheckpointError
from electra_ds.core.files import is_hub_model

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


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder to write into, which becomes `out` at the end, or is removed where anything is raised.

    Raises CheckpointError if it cannot be written.
    """
    partial = unfinished(out, secrets.token_hex(4))
    try:
        partial.mkdir(parents=True)
        yield partial
        _give_usual_modes(partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise cannot_write(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone where all went well


def _give_usual_modes(folder: Path) -> None:
    """Give all files the permissions of the umask; safetensors writes files that only their owner can read."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def unfinished(out: Path, token: str) -> Path:
    """The hidden folder beside it in which the export is made; with a token, so that it is nobody else's."""
    return out.parent / f".{out.name[:_LONGEST_NAME]}.{token}"


def cannot_write(out: Path, error: Exception) -> CheckpointError:
    """What to say where an export could not be written."""
    advice = " Make room, then start it anew." if devices.is_disk_full(error) else ""
    return CheckpointError(f"Cannot write the export {out}: {error}.{advice}")


def published_name(source: str) -> str:
    """A Hub name, or a folder's own: its place on this machine is nothing for a published card."""
    path = Path(source)
    if is_hub_model(source):
        return source
    return f"{path.parent.name}/{path.name}" if path.name in ("generator", "discriminator") else path.name
