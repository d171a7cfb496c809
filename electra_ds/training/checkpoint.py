"""The portable checkpoint: complete or absent, and the same from every ZeRO stage, precision and number of ranks.

    checkpoints/latest -> step-00000040
    checkpoints/step-00000040/
      weights.safetensors     fp32 master weights by parameter name
      optimizer.safetensors   AdamW's moments, exp_avg/NAME and exp_avg_sq/NAME
      state.json              step, tokens seen, optimizer counters, loss scale
      recipe.yaml deepspeed.json run.json tokenizer.json
      manifest.json           size and SHA-256 of every file above

With several ranks, each writes a share of the parameters, as complete tensors, into weights-00001-of-00002.safetensors
and so on; any number of ranks can read them. A checkpoint is written into a hidden folder, the manifest last, flushed,
and published by one rename. Loading it unpickles nothing.

The module has the writing of a checkpoint, the folder of a run's checkpoints, the reading and checking of one, and
`CheckpointSaver`, which saves in the background.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from electra_ds.core.devices import is_disk_full
from electra_ds.core.errors import CheckpointError
from electra_ds.core.ranks import Ranks
from electra_ds.training.optimizer import MOMENTS

FORMAT = 1
LATEST = "latest"
_NAME = re.compile(r"step-\d{8}")  # a copy under another name is the user's
_SHARD = re.compile(r"(weights|optimizer)(-\d{5}-of-\d{5})?\.safetensors")
# A writing thread needs Python's lock once per piece; with pieces of 256 KB it waits for the training thread 20 times
# as long as it works (docs/experiments.md).
_PIECE_BYTES = 16 << 20


class FileEntry(NamedTuple):
    """The entry of a file in a manifest."""

    bytes: int
    sha256: str


def write_file(path: Path, pieces: Iterable[bytes | np.ndarray]) -> FileEntry:
    """Write a file and flush it to disk. The hash is of the data in memory, to detect a bad disk. Raises OSError."""
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
    """Write fp32 CPU tensors as `safetensors.torch.save_file` would, hashing them in the same pass."""
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
    """Return a file's SHA-256. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of several files by name, read on access, so that no rank holds all of them."""

    def __init__(self, prefixes: Mapping[Path, str]) -> None:
        """prefixes: the prefix for the tensor names of each file. Raises SafetensorError and OSError."""
        self._files: dict[str, tuple[Any, str]] = {}
        for path, prefix in prefixes.items():
            file = safe_open(path, "pt")
            self._files |= {prefix + name: (file, name) for name in file.keys()}  # noqa: SIM118

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        file, key = self._files[name]
        return tuple(file.get_slice(key).get_shape())

    def dtypes(self) -> Iterator[tuple[str, str]]:
        """Yield (name, dtype), the dtype by its name in the format, such as F32."""
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


class Checkpoint(NamedTuple):
    """A verified checkpoint. `tensors` has the names of `MasterAdamW.tensors` and is read on access."""

    path: Path
    tensors: TensorFiles
    state: dict[str, Any]

    def check(self, shapes: Mapping[str, tuple[int, ...]], trained: Collection[str] | None = None) -> None:
        """Raise CheckpointError unless it holds, in fp32, exactly what a model with these parameters needs.

        trained: names of the parameters with moments, which frozen ones lack; None to check only the weights.
        """
        wanted = {f"master/{name}": shape for name, shape in shapes.items()}
        found = {name for name in self.tensors if trained is not None or name.startswith("master/")}
        for name in trained or ():
            wanted |= {f"{moment}/{name}": shapes[name] for moment in MOMENTS if name in shapes}
        problems = [f"{name} is missing" for name in wanted.keys() - found]
        problems += [f"{name} is {dtype}, not F32" for name, dtype in self.tensors.dtypes() if dtype != "F32"]
        problems += [f"{name} is not part of the model" for name in found - wanted.keys()]
        problems += [
            f"{name} has shape {list(self.tensors.shape(name))}, not {list(shape)}"
            for name, shape in wanted.items()
            if name in found and self.tensors.shape(name) != shape
        ]
        if problems:
            more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise CheckpointError(
                f"The checkpoint {self.path} does not fit the run's recipe: {'; '.join(sorted(problems)[:3])}{more}. "
                f"It was trained with the recipe {self.path / 'recipe.yaml'}."
            )


class UnreadableError(CheckpointError):
    """A file could not be read, which does not mean that it is damaged."""


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep: int, keep_at: Collection[int] = ()) -> None:
        """keep: number of newest checkpoints to retain. keep_at: steps whose checkpoints are always retained."""
        self.folder = folder
        self.keep = keep
        self._always_kept = {self.path(step) for step in keep_at}

    def path(self, step: int) -> Path:
        """Return the path of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def paths(self) -> list[Path]:
        """Return the published checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())

    def save(self, tensors: Mapping[str, torch.Tensor], state: dict[str, Any], record: Mapping[str, str]) -> Path:
        """Publish a checkpoint of `state["step"]` from one process, and prune old ones.

        tensors: on the CPU. record: text files to include, by name. Raises CheckpointError if it cannot be written;
        earlier checkpoints stay unchanged.
        """
        draft = PendingCheckpoint(self, state["step"], secrets.token_hex(4))
        try:
            draft.publish(draft.write_shard(tensors, 0, 1), state, record)
        except CheckpointError:
            draft.discard()
            raise
        return draft.final

    def prune(self) -> None:
        """Remove all checkpoints except the newest ones and those of `keep_at`. Raises OSError."""
        for path in self.paths()[: -self.keep]:
            if path not in self._always_kept:
                remove(path)

    def latest_valid(self, ranks: Ranks | None = None) -> tuple[Path | None, dict[Path, str]]:
        """Return the newest complete checkpoint, or None if none was ever published, and each newer one's problem.

        All ranks must call it, and share the reading of the files. Raises CheckpointError if every checkpoint is
        damaged, or one cannot be read.
        """
        damaged: dict[Path, str] = {}
        for path in reversed(ranks.broadcast(self.paths()) if ranks else self.paths()):
            problem = _problem(path, ranks)
            if problem is None:
                return path, damaged
            if isinstance(problem, UnreadableError):
                raise problem
            damaged[path] = str(problem)
        if damaged:
            raise CheckpointError("No checkpoint of this run is complete:\n  " + "\n  ".join(damaged.values()))
        return None, {}

    def tidy(self, damaged: Iterable[Path]) -> None:
        """Set damaged checkpoints aside as `damaged-…`, finish the pruning, and remove what interrupted saves left.

        Only the process that has locked the run may call it. Raises CheckpointError if the folder is not writable.
        """
        damaged_paths = list(damaged)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK | os.X_OK):  # fail now, not at the first save
                raise PermissionError(errno.EACCES, "it is not writable")
            complete = [path for path in self.paths() if path not in damaged_paths]
            if damaged_paths or complete:
                self.point_to(complete[-1] if complete else None)
            for path in damaged_paths:
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        except OSError as error:
            raise CheckpointError(f"Cannot clean up {self.folder}: {error}.") from error
        with contextlib.suppress(OSError):  # the last save may have been killed before it came to this
            self.prune()
        for leftover in self.leftovers():
            with contextlib.suppress(OSError):  # a rank that outlived its run may still be writing there
                remove(leftover)

    def leftovers(self) -> list[Path]:
        """Return the leftovers of interrupted saves and prunings."""
        return sorted(path for kind in ("writing", "pruning", LATEST) for path in self.folder.glob(f".{kind}-*"))

    def point_to(self, path: Path | None) -> None:
        """Point the link `latest` at a checkpoint, for people and scripts; nothing here reads it. Raises OSError."""
        link = self.folder / LATEST
        if path is None:
            link.unlink(missing_ok=True)
        elif not link.is_symlink() or os.readlink(link) != path.name:
            made = self.folder / f".{LATEST}-{secrets.token_hex(4)}"
            try:
                made.symlink_to(path.name)
                made.replace(link)
            except OSError as error:
                with contextlib.suppress(OSError):
                    made.unlink(missing_ok=True)
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EISDIR):
                    raise  # a file system without links, or a folder put there by someone else, is no error

    def cannot_write(self, path: Path, error: Exception) -> CheckpointError:
        """Return the error for a checkpoint that could not be written."""
        earlier = self.paths()
        kept = f"The newest complete one is {earlier[-1]}." if earlier else "There is none before it."
        remedy = "Free disk space" if is_disk_full(error) else "Fix that"
        is_begun = earlier or (self.folder.parent / "run.json").is_file()
        then = "resume with --resume" if is_begun else "run the command again"
        return CheckpointError(f"Cannot write the checkpoint {path}: {error}. {kept} {remedy}, then {then}.")


class PendingCheckpoint:
    """A checkpoint that is being written, in a hidden folder next to the published ones."""

    def __init__(self, folder: CheckpointFolder, step: int, token: str) -> None:
        """token: the same on every rank, so that a rank that outlives another run cannot write into this folder."""
        self.folder = folder
        self.final = folder.path(step)
        self._temporary = folder.folder / f".writing-{self.final.name}-{token}"

    def write_shard(self, tensors: Mapping[str, torch.Tensor], rank: int, world_size: int) -> dict[str, FileEntry]:
        """Write and flush this rank's tensors, fp32 on the CPU; return its files.

        Raises CheckpointError and leaves the files in place, since other ranks may be writing there: see `discard`.
        """
        weights = {name.removeprefix("master/"): t for name, t in tensors.items() if name.startswith("master/")}
        moments = {name: tensor for name, tensor in tensors.items() if not name.startswith("master/")}
        part = "" if world_size == 1 else f"-{rank + 1:05d}-of-{world_size:05d}"
        try:
            self._temporary.mkdir(parents=True, exist_ok=True)
            return {
                name: write_tensors(self._temporary / name, group)
                for name, group in ((f"weights{part}.safetensors", weights), (f"optimizer{part}.safetensors", moments))
            }
        except OSError as error:
            raise self.folder.cannot_write(self.final, error) from error

    def publish(self, shards: Mapping[str, FileEntry], state: dict[str, Any], record: Mapping[str, str]) -> None:
        """Write the remaining files, the manifest last, rename the folder, and prune. Raises CheckpointError."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        texts = record | {"state.json": json.dumps({"format": FORMAT, "saved": now} | state, indent=2)}  # type: ignore[operator]
        try:
            for name, entry in shards.items():
                if (self._temporary / name).stat().st_size != entry.bytes:  # the rank may see a different disk
                    raise OSError(f"{name} does not have the size that the rank that wrote it reports")
            files = dict(shards)
            for name, text in texts.items():
                files[name] = write_file(self._temporary / name, [text.encode()])
            listed = {name: entry._asdict() for name, entry in sorted(files.items())}
            manifest = json.dumps({"format": FORMAT, "files": listed}, indent=2)
            write_file(self._temporary / "manifest.json", [manifest.encode()])
            _flush(self._temporary)
            self._temporary.rename(self.final)
            _flush(self.folder.folder)
            _flush(self.folder.folder.parent)
        except OSError as error:
            raise self.folder.cannot_write(self.final, error) from error
        with contextlib.suppress(OSError):  # it is published; the next save tries again to remove old ones
            self.folder.point_to(self.final)
            _flush(self.folder.folder)
            self.folder.prune()

    def discard(self) -> None:
        """Remove what all ranks wrote, once none of them is writing any more. Failures are ignored."""
        shutil.rmtree(self._temporary, ignore_errors=True)


def share_of(shapes: Mapping[str, tuple[int, ...]], rank: int, world_size: int) -> set[str]:
    """Return the parameters that a rank writes. The shares are nearly equal in size, and the same at every call."""
    loads = [0] * world_size
    own = set()
    for name, shape in sorted(shapes.items(), key=lambda item: (-torch.Size(item[1]).numel(), item[0])):
        lightest = loads.index(min(loads))
        loads[lightest] += torch.Size(shape).numel()
        if lightest == rank:
            own.add(name)
    return own


def _problem(path: Path, ranks: Ranks | None) -> CheckpointError | None:
    """Return a checkpoint's problem that any rank finds: each rank verifies a share of the hashes, then all open it."""
    rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    for check in (partial(verify_checkpoint, path, rank, world_size), partial(open_checkpoint, path)):
        own: CheckpointError | None = None
        try:
            check()
        except CheckpointError as error:
            own = error
        problems = [problem for problem in (ranks.gather(own) if ranks else [own]) if problem is not None]
        if problems:
            return next((problem for problem in problems if isinstance(problem, UnreadableError)), problems[0])
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify and open a checkpoint. Raises CheckpointError if a file is missing, truncated or changed, or if the files
    contradict each other."""
    verify_checkpoint(path)
    return open_checkpoint(path)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a verified checkpoint. Raises CheckpointError if it cannot be read after all."""
    path = path.resolve()  # it may be `latest` or `.`
    try:
        files = [path / name for name in sorted(read_manifest(path)) if _SHARD.fullmatch(name)]
        tensors = TensorFiles({file: "master/" if file.name.startswith("weights") else "" for file in files})
        state = json.loads((path / "state.json").read_text("utf8"))
        step, number = state["step"], state["format"]
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"The checkpoint {path} cannot be read: {error!r}.") from error
    if _NAME.fullmatch(path.name) and path.name != f"step-{step:08d}":
        raise CheckpointError(f"The checkpoint {path} is from step {step}, which contradicts its name.")
    if number != FORMAT:
        raise CheckpointError(f"The checkpoint {path} has format {number}; this version reads {FORMAT}.")
    return Checkpoint(path, tensors, state)


def verify_checkpoint(path: Path, rank: int = 0, world_size: int = 1) -> None:
    """Raise CheckpointError unless every file has the size and hash in the manifest.

    With several ranks, each hashes its share of the files.
    """
    files = read_manifest(path)
    damaged = f"The checkpoint {path} is damaged:"
    if "state.json" not in files or not any(map(_SHARD.fullmatch, files)):
        raise CheckpointError(f"{damaged} manifest.json does not list all of its files.")
    for index, (name, entry) in enumerate(sorted(files.items())):
        try:
            size = (path / name).stat().st_size
            if size != entry.bytes:
                raise CheckpointError(f"{damaged} {name} has {size} bytes, not {entry.bytes}.")
            if index % world_size == rank and hash_file(path / name) != entry.sha256:
                raise CheckpointError(f"{damaged} the content of {name} has changed.")
        except FileNotFoundError as error:
            raise CheckpointError(f"{damaged} {name} is missing.") from error
        except OSError as error:  # another attempt may succeed
            raise UnreadableError(
                f"{path / name} cannot be read: {error}. If this persists, move {path} away to use the checkpoint "
                f"before it."
            ) from error


def read_manifest(path: Path) -> dict[str, FileEntry]:
    """Return a checkpoint's files by name. Raises CheckpointError."""
    try:
        listed = json.loads((path / "manifest.json").read_text("utf8"))["files"]
        return {name: FileEntry(entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"The checkpoint {path} is damaged: manifest.json cannot be read.") from error


def remove(path: Path) -> None:
    """Remove a checkpoint, or the remains of one. Raises OSError."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    if not path.name.startswith("."):  # a half-deleted checkpoint must not keep its name
        path = path.rename(path.with_name(f".pruning-{path.name}-{secrets.token_hex(4)}"))
    shutil.rmtree(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- saving in the background


class SavedOptimizer(Protocol):
    """The interface of `MasterAdamW` and `ZeroAdamW` that saving uses. Importing `ZeroAdamW` would import DeepSpeed."""

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def snapshot(self, names: Collection[str] | None = None) -> dict[str, torch.Tensor]: ...

    def counters(self) -> dict[str, float]: ...


class CheckpointSaver:
    """Saves a run's checkpoints in the background, one at a time: training waits only for the copy to memory.

    All ranks must call `save` and `finish` together; a rank may call the other methods alone.
    """

    def __init__(
        self, folder: CheckpointFolder, ranks: Ranks, on_checkpoint: Callable[[Path], None] | None = None
    ) -> None:
        """on_checkpoint: called by `announce` on the main rank."""
        self._folder = folder
        self._ranks = ranks
        self._on_checkpoint = on_checkpoint
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._published: Path | None = None
        """The last checkpoint, until it is announced; only the main rank publishes."""

    def save(self, optimizer: SavedOptimizer, state: dict[str, Any], record: Mapping[str, str]) -> None:
        """Copy the optimizer's state and start writing it, each rank its share; `finish` waits for the end.

        state: for state.json, in addition to the optimizer's counters. Raises CheckpointError if the previous save
        failed.
        """
        self.finish()  # before the copy: two copies may not fit
        is_there, token = self._ranks.broadcast((self._folder.path(state["step"]).exists(), secrets.token_hex(4)))
        if is_there:
            return  # this step is already published; damaged checkpoints are set aside before training continues
        tensors = optimizer.snapshot(share_of(optimizer.shapes(), self._ranks.rank, self._ranks.world_size))
        state = state | {"optimizer": optimizer.counters()}
        pending = PendingCheckpoint(self._folder, state["step"], token)
        self._thread = threading.Thread(
            target=self._write, args=(pending, tensors, state, record), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _write(
        self,
        pending: PendingCheckpoint,
        tensors: Mapping[str, torch.Tensor],
        state: dict[str, Any],
        record: Mapping[str, str],
    ) -> None:
        """Write this rank's share; on the main rank, publish the checkpoint if every rank has written its share."""
        own: dict[str, FileEntry] | None = None
        shards: list[dict[str, FileEntry] | None] = []
        try:
            try:
                own = pending.write_shard(tensors, self._ranks.rank, self._ranks.world_size)
            finally:
                shards = self._ranks.gather_in_background(own)
            if self._ranks.is_main and None not in shards:
                pending.publish(
                    {name: entry for shard in shards for name, entry in (shard or {}).items()}, state, record
                )
                self._published = pending.final
        except Exception as error:  # raised the next time that the training thread checks
            self._error = error
        # On every rank, since ranks may have separate disks. A rank that lost the others leaves the files to them.
        if shards and (self._error is not None or None in shards):
            pending.discard()

    @property
    def has_failed(self) -> bool:
        """True if this rank knows that the last save failed; `finish` raises the reason."""
        return self._error is not None

    def finish(self) -> None:
        """Wait until the pending checkpoint is published. Raises CheckpointError on the rank that could not write its
        share, and FailedElsewhereError on the others."""
        self.close()
        with self._ranks.fail_together():
            error, self._error = self._error, None
            if error is not None:
                raise error
            self.announce()

    def announce(self) -> None:
        """Call `on_checkpoint` with a checkpoint that was published since the last call, if there is one."""
        path = self._published
        if path is not None:  # only then, since the writing thread may publish at any moment
            self._published = None
            if self._on_checkpoint is not None:
                self._on_checkpoint(path)

    def saved(self) -> list[Path]:
        """Return all checkpoints, after waiting for the one that is being written."""
        self.close()
        return self._folder.paths()

    def close(self) -> None:
        """Wait for the pending save, and leave reporting its result to `finish`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
