"""Find the inputs that a record names by absolute paths again after a project has moved."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from electra_ds.core.errors import CheckpointError, DataError

_Read = TypeVar("_Read")


def places_of(recorded: str, folder: Path) -> Iterator[Path]:
    """Yield the existing places where something that was once at the path `recorded` may be now.

    Places relative to `folder`, which has the record, come first: if both moved together, a folder above it holds the
    end of the recorded path. The nearest such folder comes first, and for each the longest end. The recorded path
    itself comes last. What is found need not be what was recorded: its content decides.
    """
    parts = Path(recorded).parts[1:]
    above = dict.fromkeys((*folder.absolute().parents, *folder.resolve().parents))  # a link's place, and what it names
    found = (base.joinpath(*parts[start:]) for base in above for start in range(len(parts)))
    for place in dict.fromkeys((*found, Path(recorded))):
        if os.path.exists(place):
            yield place


def read_where_it_is(recorded: str, folder: Path, read: Callable[[Path], _Read], missing: str) -> _Read:
    """Return what `read` returns for the first place of `places_of` at which it does not raise.

    Raises what `read` raised for the recorded path, or DataError with the message `missing` if nothing is there.
    """
    problem: CheckpointError | DataError = DataError(missing)
    for place in places_of(recorded, folder):
        try:
            return read(place)
        except (CheckpointError, DataError) as error:
            if place == Path(recorded):
                problem = error
    raise problem
