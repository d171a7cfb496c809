"""The files of a DeepSpeed checkpoint: finding them in a folder, and reading one without running anything in it.

What DeepSpeed's `save_checkpoint` writes:

    FOLDER/latest                                          a tag, such as global_step40
    FOLDER/TAG/mp_rank_00_model_states.pt                  stages 0 to 2: weights by name, counters; at stage 0 the
                                                           optimizer too, without names
    FOLDER/TAG/zero_pp_rank_R_mp_rank_00_model_states.pt   stage 3: names and shapes
    FOLDER/TAG/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt   stages 1 to 3: rank R's part of masters and moments,
                                                           flat, group after group

What its script ds_to_universal makes of that, for any number of ranks:

    FOLDER/latest_universal                                a tag, such as global_step40_universal
    FOLDER/TAG/zero/NAME/fp32.pt exp_avg.pt exp_avg_sq.pt  one parameter, complete
    FOLDER/TAG/zero/optimizer_state.pt                     what all parameters have in common
    FOLDER/TAG/*_model_states.pt                           as above

The layouts are those of DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py, runtime/fp16/,
runtime/bf16_optimizer.py).
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from electra_ds.core.errors import CheckpointError
from electra_ds.pretraining.convert import refuse_other_frameworks

_MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<model>\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<model>\d+)_optim_states\.pt")
_OTHER_LAYOUTS = re.compile(r"layer_.*|.*expert_.*|expp_rank_.*")
_MOST_SHOWN = 5


class DeepSpeedFiles(NamedTuple):
    """The files of one tag, by rank."""

    folder: Path
    model: dict[int, Path]
    """One file at stages 0 to 2."""
    optimizer: dict[int, Path]
    """Empty at stage 0."""
    universal: Path | None = None
    """The folder `zero` of a universal checkpoint."""

    def check_ranks(self, kind: str, ranks: int) -> None:
        """Raise CheckpointError unless there is one file for each of so many ranks. kind: `model` or `optim`."""
        found = self.model if kind == "model" else self.optimizer
        missing = ranks - sum(rank < ranks for rank in found)
        if missing:
            gone = [rank for rank in range(len(found) + _MOST_SHOWN) if rank not in found and rank < ranks]
            more = f" and {missing - _MOST_SHOWN} more" if missing > _MOST_SHOWN else ""
            raise CheckpointError(
                f"{self.folder} was saved by {ranks} rank(s), and the *_{kind}_states.pt of rank "
                f"{', '.join(map(str, gone[:_MOST_SHOWN]))}{more} is missing. Copy the files of all ranks into the "
                f"folder."
            )
        surplus = sorted(rank for rank in found if rank >= ranks)
        if surplus:
            raise CheckpointError(
                f"{self.folder} was saved by {ranks or 'no'} rank(s) with ZeRO, and {found[surplus[0]].name} is from "
                f"another save. Move such files away."
            )


def find_files(path: Path) -> DeepSpeedFiles:
    """Return the files of a checkpoint. path: the folder that holds `latest`, or a tag folder.

    Raises CheckpointError if there is no such checkpoint, or it is one of model or pipeline parallelism or experts.
    """
    try:
        return _find(_tag_folder(path))
    except OSError as error:
        raise CheckpointError(f"Cannot look for a checkpoint in {path}: {error}.") from error


def _find(folder: Path) -> DeepSpeedFiles:
    model: dict[int, Path] = {}
    optimizer: dict[int, Path] = {}
    for file in sorted(folder.iterdir()):
        if _OTHER_LAYOUTS.fullmatch(file.name):
            raise CheckpointError(f"{file} belongs to pipeline parallelism or experts, which ELECTRA here never has.")
        for pattern, found in ((_MODEL, model), (_OPTIMIZER, optimizer)):
            if match := pattern.fullmatch(file.name):
                if int(match["model"]):
                    raise CheckpointError(f"{file} belongs to tensor parallelism, which ELECTRA here never has.")
                rank = int(match["rank"] or 0)
                if rank in found:
                    raise CheckpointError(
                        f"{folder} holds two saves: {found[rank].name} and {file.name}. Move the older one away."
                    )
                found[rank] = file
    if not model:
        refuse_other_frameworks(folder, str(folder))
        raise CheckpointError(
            f"{folder} holds no *_model_states.pt. Give the folder that DeepSpeed's save_checkpoint wrote, with the "
            f"file `latest`, or one of its tag folders such as global_step40."
        )
    universal = folder / "zero"
    return DeepSpeedFiles(folder, model, optimizer, universal if universal.is_dir() else None)


def _tag_folder(path: Path) -> Path:
    latest = next((path / name for name in ("latest", "latest_universal") if (path / name).is_file()), None)
    if latest is not None:
        tag = latest.read_text("utf8", errors="replace").strip()
        if tag in ("", "..") or Path(tag).name != tag or not (path / tag).is_dir():
            raise CheckpointError(
                f"{latest} names the tag {tag[:40]!r}, and there is no such folder next to it. Give the tag's folder "
                f"itself."
            )
        return path / tag
    if not path.is_dir():
        refuse_other_frameworks(path, str(path))
        raise CheckpointError(f"There is no folder {path}.")
    return path


class StandIn:
    """Takes the place of an object of a class that is not loaded: it holds the arguments of its constructor and its
    attributes."""

    arguments: tuple[Any, ...]
    attributes: dict[str, Any]

    def __new__(cls, *arguments: Any) -> StandIn:
        made = object.__new__(cls)
        made.arguments = arguments
        made.attributes = {}
        return made

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = state


def _dictionary(*arguments: Any) -> dict[Any, Any]:
    return {}


def _list(*arguments: Any) -> list[Any]:
    return []


_FILLED: dict[str, Any] = {"collections.defaultdict": _dictionary, "collections.deque": _list}
"""Containers that torch's unpickler does not know, and the known ones that it fills in their place."""


def load_file(path: Path) -> Any:
    """Return what the file holds: tensors on the CPU, mapped from the file, and a `StandIn` for every object of a class
    that is not on torch's list of safe ones.

    DeepSpeed's files are pickles, which can call anything. torch's restricted unpickler calls what is on that list, and
    here stand-ins in place of the rest, so that no code that the file chooses is run: DeepSpeed's loss scaler and the
    objects that a script saved with its state (argparse.Namespace, NumPy scalars, paths) do no harm. Raises
    CheckpointError if the file is damaged, or names functions of os or sys, which torch never takes.
    """
    _check_intact(path)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        # A class of its own for each name: torch's unpickler looks objects up by their class.
        stand_ins: list[Any] = [(_FILLED.get(name) or type("StandIn", (StandIn,), {}), name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a pickle can fail in every way there is
        raise CheckpointError(
            f"{path} cannot be read: {_without_advice(error)} It is damaged, or was not written by DeepSpeed alone."
        ) from error


def load_dictionary(path: Path) -> dict[str, Any]:
    """Return the dictionary in the file, see `load_file`. Raises CheckpointError also if it holds something else."""
    content = load_file(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, which is not what DeepSpeed saves.")
    return content


def _check_intact(path: Path) -> None:
    """Raise CheckpointError unless every part of the zip has its checksum, which torch does not check."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing. Copy all files of the checkpoint.")
    try:
        if not zipfile.is_zipfile(path):
            raise CheckpointError(
                f"{path} is cut short, or not a file of DeepSpeed: DeepSpeed 0.19.8 saves zip files, and this is none. "
                f"Copy it again from where it was saved."
            )
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
    except (OSError, EOFError, zipfile.BadZipFile, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Copy it again from where it was saved.") from error
    if changed is not None:
        raise CheckpointError(
            f"{path} is damaged: {changed} in it has changed since it was saved. Copy it again from where it was saved."
        )


def _without_advice(error: Exception) -> str:
    """Return what is wrong, without torch's advice to load the file without restriction."""
    text = str(error)
    if text.startswith("Weights only load failed"):
        text = text.partition("\n\n")[2].strip()
    return (text.splitlines() or [type(error).__name__])[0]
