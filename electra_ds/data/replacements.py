"""Recorded replacements: the tokens that a model has drawn for every step of a schedule, in a folder of a token store.

`replacements.json` says for which recipe they were drawn, and exists once all of them are there; until then the same
content is in `drawing.json`. The steps are recorded in stretches: `tokens-N.npy` has the
drawn tokens of all selected positions, in the order of the sequences, of the steps from N on, and `starts-N.npy` the
place of each step's first token. `held-out-W.npy` has those of an evaluation on W windows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from electra_ds.core.errors import DataError
from electra_ds.core.files import complete_file

FOLDER = "replacements"
STRETCH = 1000
"""The number of steps in a file."""
_FORMAT = 1


@dataclass(frozen=True)
class ReplacementsInfo:
    """The content of replacements.json."""

    values: dict[str, Any]
    """The recipe's values on which masks and draws depend, by dotted key."""
    sources: list[str]
    """The sources of the model's weights."""
    precision: str
    """The precision of the model's forward pass."""
    text: str
    """The fingerprint of the store's text."""
    steps: int
    held_out: list[int]
    """Numbers of windows of the recorded evaluations."""
    format: int = _FORMAT


class Replacements:
    """The recorded replacements in a token store's folder."""

    def __init__(self, store: Path) -> None:
        """Raises DataError if they are incomplete or damaged."""
        self.folder = store / FOLDER
        try:
            values = json.loads((self.folder / "replacements.json").read_text("utf8"))
            self.info = ReplacementsInfo(**values)
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"{self.folder} is incomplete ({error}). Run the command that draws the replacements again; it "
                f"continues where it stopped."
            ) from error
        if self.info.format != _FORMAT:
            raise DataError(f"{self.folder} has format {self.info.format}; this version reads {_FORMAT}.")
        self._open: tuple[int, np.ndarray, np.ndarray] | None = None
        """(first step, tokens, starts) of the stretch that was read last."""

    @property
    def fingerprint(self) -> str:
        """A hash of the recipe's values, the text, and the tokens drawn for an evaluation and for the first steps."""
        digest = hashlib.sha256(json.dumps([self.info.values, self.info.text], sort_keys=True).encode())
        for drawn in (self.of_held_out(min(self.info.held_out)), self._read("tokens-0.npy")):
            digest.update(drawn.tobytes())
        return digest.hexdigest()[:16]

    def of_step(self, step: int) -> np.ndarray:
        """Return the drawn tokens of a step's selected positions. Raises DataError for a step that was not recorded."""
        if not 0 <= step < self.info.steps:
            raise DataError(f"{self.folder} has replacements for {self.info.steps:,} steps, not for step {step:,}.")
        first = step - step % STRETCH
        if self._open is None or self._open[0] != first:
            self._open = (first, self._read(f"tokens-{first}.npy"), self._read(f"starts-{first}.npy"))
        _, tokens, starts = self._open
        found: np.ndarray = tokens[starts[step - first] : starts[step - first + 1]]
        return found

    def of_held_out(self, windows: int) -> np.ndarray:
        """Return the drawn tokens of an evaluation. Raises DataError for one that was not recorded."""
        if windows not in self.info.held_out:
            raise DataError(
                f"{self.folder} has replacements for evaluations on {' or '.join(map(str, self.info.held_out))} "
                f"windows, not on {windows}. Set --eval-windows to a recorded number."
            )
        return self._read(f"held-out-{windows}.npy")

    def _read(self, name: str) -> np.ndarray:
        try:
            found: np.ndarray = np.load(self.folder / name, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"{self.folder / name} cannot be read: {error}.") from error
        return found


def write_steps(store: Path, first: int, drawn: Sequence[np.ndarray]) -> None:
    """Write a stretch. drawn: the tokens of each of its steps, in the type of the store."""
    starts = np.concatenate([[0], np.cumsum([len(each) for each in drawn])])
    _write(store / FOLDER / f"starts-{first}.npy", starts)
    _write(store / FOLDER / f"tokens-{first}.npy", np.concatenate(drawn))  # written last: see `has_steps`


def has_steps(store: Path, first: int) -> bool:
    """Return whether the stretch that begins at this step has been written."""
    return (store / FOLDER / f"tokens-{first}.npy").is_file()


def write_held_out(store: Path, windows: int, drawn: np.ndarray) -> None:
    _write(store / FOLDER / f"held-out-{windows}.npy", drawn)


def begin(store: Path, info: ReplacementsInfo) -> None:
    """Record what is about to be drawn. Raises DataError if something else has been begun in this folder."""
    path = store / FOLDER / "drawing.json"
    if not path.exists():
        (store / FOLDER).mkdir(parents=True, exist_ok=True)
        _write_info(path, info)
    elif json.loads(path.read_text("utf8")) != asdict(info):
        raise DataError(
            f"{store} holds replacements of another recipe, generator, precision or text, which were not finished. "
            f"Choose another --out, or delete it."
        )


def finish(store: Path, info: ReplacementsInfo) -> None:
    """Record that everything has been drawn."""
    _write_info(store / FOLDER / "replacements.json", info)
    (store / FOLDER / "drawing.json").unlink()


def _write_info(path: Path, info: ReplacementsInfo) -> None:
    with complete_file(path) as partial:
        partial.write_text(json.dumps(asdict(info), indent=2) + "\n", "utf8")


def _write(path: Path, values: np.ndarray) -> None:
    with complete_file(path) as partial, partial.open("wb") as file:
        np.save(file, values)
