"""The portable checkpoint: complete or absent, and the same from every precision.

    checkpoints/step-00000040/
      weights.safetensors     fp32 master weights by parameter name
      optimizer.safetensors   AdamW's moments, exp_avg/NAME and exp_avg_sq/NAME
      state.json              step, tokens seen, optimizer counters, loss scale
      recipe.yaml deepspeed.json run.json tokenizer.json
      manifest.json           size and SHA-256 of every file above

It is written into a hidden folder, flushed, and published by one rename. Nothing in it is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from electra_ds.errors import CheckpointError

FORMAT = 1
_NAME = re.compile(r"step-\d{8}")  # a copy that somebody keeps beside them under another name is theirs


class Checkpoint(NamedTuple):
    """A loaded checkpoint. `tensors` as `MasterAdamW.tensors` names them."""

    path: Path
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep: int) -> None:
        """keep: how many of the newest to retain."""
        self.folder = folder
        self.keep = keep

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step stands."""
        return self.folder / f"step-{step:08d}"

    def paths(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())

    def save(self, tensors: Mapping[str, torch.Tensor], state: dict[str, Any], record: Mapping[str, str]) -> Path:
        """Publish a checkpoint of `state["step"]` and prune old ones.

        record: text files that travel along, by name. Raises CheckpointError where it cannot be written; the
        checkpoints before it stay as they are.
        """
        final = self.path(state["step"])
        if final.exists():
            return final  # published whole by this very step; damaged ones are set aside before training goes on
        temporary = self.folder / f".writing-{final.name}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            self._write(temporary, tensors, state, record)
            temporary.rename(final)
            _flush(self.folder)
            self._prune()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            earlier = self.paths()
            kept = f"The newest complete one is {earlier[-1]}." if earlier else "There is none before it."
            raise CheckpointError(
                f"Cannot write the checkpoint {final}: {error}. {kept} Make room, then go on with --resume."
            ) from error
        return final

    def _write(
        self, folder: Path, tensors: Mapping[str, torch.Tensor], state: dict[str, Any], record: Mapping[str, str]
    ) -> None:
        on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        weights = {name.removeprefix("master/"): t for name, t in on_cpu.items() if name.startswith("master/")}
        moments = {name: tensor for name, tensor in on_cpu.items() if not name.startswith("master/")}
        texts = record | {"state.json": json.dumps({"format": FORMAT} | state, indent=2)}  # type: ignore[operator]
        for name, text in texts.items():
            (folder / name).write_text(text, "utf8")
        for name, group in {"weights.safetensors": weights, "optimizer.safetensors": moments}.items():
            save_file(group, folder / name)
            shutil.copymode(folder / "state.json", folder / name)  # save_file leaves 0600 whatever the umask
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())
        }
        for name in files:
            _flush(folder / name)
        (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": files}, indent=2), "utf8")
        _flush(folder / "manifest.json")
        _flush(folder)

    def _prune(self) -> None:
        for path in self.paths()[: -self.keep]:
            doomed = path.with_name(f".pruning-{path.name}")
            path.rename(doomed)  # so that no half-deleted checkpoint ever stands under a real name
            shutil.rmtree(doomed)

    def load_latest(self) -> tuple[Checkpoint | None, dict[Path, CheckpointError]]:
        """The newest checkpoint that is whole, and what is wrong with each newer one.

        None where no checkpoint was ever published. Raises CheckpointError where every one is damaged.
        """
        damaged: dict[Path, CheckpointError] = {}
        for path in reversed(self.paths()):
            try:
                return load_checkpoint(path), damaged
            except CheckpointError as error:
                damaged[path] = error
        if damaged:
            raise CheckpointError("No checkpoint of this run is whole:\n  " + "\n  ".join(map(str, damaged.values())))
        return None, {}

    def tidy(self, damaged: Iterable[Path]) -> None:
        """Set damaged checkpoints aside as `damaged-…`, and remove what killed saves and prunings left.

        For the process that holds the run. Raises CheckpointError where the folder cannot be written.
        """
        try:
            for path in damaged:
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            for leftover in (*self.folder.glob(".writing-*"), *self.folder.glob(".pruning-*")):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        except OSError as error:
            raise CheckpointError(f"Cannot tidy {self.folder}: {error}.") from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Load and verify. Raises CheckpointError where a file is missing, cut short or changed."""
    verify_checkpoint(path)
    try:
        weights = load_file(path / "weights.safetensors")
        tensors = {f"master/{name}": tensor for name, tensor in weights.items()}
        tensors |= load_file(path / "optimizer.safetensors")
        state = json.loads((path / "state.json").read_text("utf8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"The checkpoint {path} cannot be read: {error}.") from error
    if path.name != f"step-{state['step']:08d}":
        raise CheckpointError(f"The checkpoint {path} is of step {state['step']}, not what its name says.")
    if state["format"] != FORMAT:
        raise CheckpointError(f"The checkpoint {path} has format {state['format']}; this version reads {FORMAT}.")
    return Checkpoint(path, tensors, state)


def verify_checkpoint(path: Path) -> None:
    """Raises CheckpointError unless every file has the size and hash that the manifest gives."""
    try:
        listed = json.loads((path / "manifest.json").read_text("utf8"))["files"].items()
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"The checkpoint {path} is damaged: manifest.json cannot be read.") from error
    for name in ("weights.safetensors", "optimizer.safetensors", "state.json"):
        if name not in files:
            raise CheckpointError(f"The checkpoint {path} is damaged: manifest.json does not list {name}.")
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"The checkpoint {path} is damaged: {name} is missing.")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"The checkpoint {path} is damaged: {name} has {file.stat().st_size} bytes, not {size}."
            )
        if _sha256(file) != digest:
            raise CheckpointError(f"The checkpoint {path} is damaged: the content of {name} has changed.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
