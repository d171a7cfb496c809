"""A token store, tokenised documents on disk that are memory-mapped, and its split into training and held-out text.

STORE/
  tokens.bin       all ids, uint16 where they fit and uint32 otherwise, documents one after another
  documents.npy    int64 [documents + 1], where each document starts in tokens.bin
  lines.npy        int64 [lines + 1], where each line starts
  tokenizer/       the tokenizer, as transformers reads it
  store.json       sizes, sources and fingerprints; it exists only in a complete store
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from electra_ds.config.run_directory import read_where_it_is
from electra_ds.config.run_record import RunRecord
from electra_ds.config.sections import DataSection
from electra_ds.core.errors import DataError
from electra_ds.core.keyed_random import generator
from electra_ds.core.program import command
from electra_ds.data.replacements import FOLDER as REPLACEMENTS
from electra_ds.data.replacements import Replacements
from electra_ds.data.tokenizer import Tokenizer, UnknownText, load_tokenizer

FORMAT = 2
_HOLDOUT = 0x40
FEW_DOCUMENTS_TO_HOLD_OUT_SPANS = 1_000


@dataclass(frozen=True)
class SourceInfo:
    """The part of a store that comes from one source. Sources follow each other in order."""

    description: str
    num_documents: int
    num_tokens: int
    unknown: UnknownText | None = None
    """None in stores made by earlier versions, which did not count it."""


@dataclass(frozen=True)
class StoreInfo:
    """The content of store.json."""

    format: int
    corpora: list[SourceInfo]
    documents_read: list[int]
    """The number of documents read from each source, including those without tokens, which are not in the store."""
    corpus_signature: str
    """A hash of the names, sizes and times of the files read, and of the commits of Hub datasets."""
    corpus_fingerprint: str
    """The SHA-256 of the text."""
    tokenizer_fingerprint: str
    dtype: str
    vocab_size: int
    num_documents: int
    num_lines: int
    num_tokens: int
    file_bytes: dict[str, int]
    unknown_share: float | None = None
    """The share of the tokens that are [UNK]; None as in `SourceInfo`."""

    @property
    def fingerprint(self) -> str:
        """An identifier of the tokens, the same for the same text tokenised by the same tokenizer."""
        return f"{self.corpus_fingerprint[:16]}-{self.tokenizer_fingerprint[:16]}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


class TokenStore:
    """An open store. `tokens` is a read-only memory map, so nothing is loaded before it is used."""

    def __init__(self, path: Path) -> None:
        """Open a store. Raises DataError if it is missing, incomplete, truncated or in another format."""
        self.path = path
        self.info = _read_info(path)
        for name, size in self.info.file_bytes.items():
            actual = (path / name).stat().st_size if (path / name).is_file() else None
            if actual != size:
                found = "is missing" if actual is None else f"has {actual} bytes"
                raise DataError(
                    f"The token store {path} is damaged: {name} {found}, but store.json says {size}. "
                    f"Delete the folder and build it again with {command('build-data')}."
                )
        self.tokenizer: Tokenizer = load_tokenizer(path / "tokenizer")
        if self.tokenizer.fingerprint != self.info.tokenizer_fingerprint:
            raise DataError(
                f"The tokenizer in {path / 'tokenizer'} is not the one that built this token store. "
                f"Put the original back, or build the store again with {command('build-data')}."
            )
        self.tokens = np.memmap(path / "tokens.bin", dtype=self.info.dtype, mode="r")
        self.documents: np.ndarray = np.load(path / "documents.npy", mmap_mode="r")
        self.lines: np.ndarray = np.load(path / "lines.npy", mmap_mode="r")
        self.replacements = Replacements(path) if (path / REPLACEMENTS).is_dir() else None
        """Recorded replacements, see `bin/build-data --corrupt`."""

    def __fspath__(self) -> str:
        """The store's folder, so that it can be given wherever a path is."""
        return str(self.path)

    def __repr__(self) -> str:
        return f"TokenStore({str(self.path)!r})"


def _read_info(path: Path) -> StoreInfo:
    if path.is_file():
        raise DataError(f"{path} is a file, not the folder of a token store. To train on its text: --corpus {path}")
    if not path.is_dir():
        raise DataError(
            f"The token store {path} does not exist. Build one with: {command('build-data')} --out {path} --corpus …"
        )
    try:
        values: dict[str, Any] = json.loads((path / "store.json").read_text("utf8"))
        if values["format"] != FORMAT:
            raise DataError(
                f"The token store {path} has format {values['format']}; this version reads {FORMAT}. "
                f"Delete the folder and build it again with {command('build-data')}."
            )
        return StoreInfo(**values | {"corpora": [_source_info(**source) for source in values["corpora"]]})
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is not a finished token store: it has no store.json. If it holds text: --corpus {path}. "
            f"Otherwise build it with {command('build-data')}; an interrupted build resumes where it stopped."
        ) from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{path / 'store.json'} is damaged ({error}). Build the store again.") from error


def _source_info(unknown: dict[str, Any] | None = None, **values: Any) -> SourceInfo:
    return SourceInfo(**values, unknown=None if unknown is None else UnknownText(**unknown))


def token_dtype(vocab_size: int) -> str:
    """Return uint16 if every id fits, else uint32."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def recorded_store(record: RunRecord, folder: Path, given: Path | None, remedy: str) -> TokenStore:
    """Return the token store that a run's record names, even if both have moved.

    folder: the folder with the record. given: the path that the user gave. remedy: the option for that path. Raises
    DataError if the store is missing or is not the same one.
    """

    def read(place: Path) -> TokenStore:
        store = TokenStore(place)
        if store.info.fingerprint != record.store_fingerprint:
            raise DataError(
                f"The token store {place} is not the one that {folder} was started on "
                f"({store.info.fingerprint}, not {record.store_fingerprint}). Put the original back, or {remedy}."
            )
        return store

    if given is not None:
        return read(given)
    missing = (
        f"The token store of {folder} is neither at {record.store} nor at the same place relative to the run. "
        f"If it has moved, {remedy}."
    )
    return read_where_it_is(record.store, folder, read, missing)


# --- training and held-out text


class Ranges(NamedTuple):
    """Ranges of the token store, `starts[i]` to `stops[i]`, each treated as one document."""

    starts: np.ndarray
    stops: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return self.stops - self.starts

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())


class Split(NamedTuple):
    train: Ranges
    holdout: Ranges
    held_out_by: Literal["document", "span"]


def split_holdout(documents: np.ndarray, data: DataSection, seed: int) -> Split:
    """Return the training and held-out ranges of a store whose documents start at `documents`.

    Raises DataError if the corpus is too small for both.
    """
    ranges = Ranges(np.asarray(documents[:-1]), np.asarray(documents[1:]))
    by = data.holdout_by
    if by == "auto":
        by = "span" if len(ranges.starts) < FEW_DOCUMENTS_TO_HOLD_OUT_SPANS else "document"
    target = min(data.holdout_fraction * ranges.num_tokens, data.holdout_max_tokens)
    rng = generator(seed, _HOLDOUT)
    split = _hold_out_documents(ranges, target, rng) if by == "document" else _hold_out_spans(ranges, target, data, rng)
    if not len(split.train.starts) or not len(split.holdout.starts):
        raise DataError(
            f"The corpus is too small to hold out {data.holdout_fraction:.0%} by {by}: {len(ranges.starts)} "
            f"documents, {ranges.num_tokens} tokens. Use more text, a shorter data.sequence_length, or "
            f"data.holdout_by={'document' if by == 'span' else 'span'}."
        )
    return split


def _hold_out_documents(ranges: Ranges, target: float, rng: np.random.Generator) -> Split:
    order = rng.permutation(len(ranges.starts))
    before = np.concatenate([[0], np.cumsum(ranges.lengths[order])[:-1]])
    held = np.zeros(len(order), dtype=bool)
    held[order[before < target]] = True
    held[order[-1]] = False  # never hold out everything
    return Split(
        Ranges(ranges.starts[~held], ranges.stops[~held]), Ranges(ranges.starts[held], ranges.stops[held]), "document"
    )


def _hold_out_spans(ranges: Ranges, target: float, data: DataSection, rng: np.random.Generator) -> Split:
    """Hold out one contiguous span, at least one window, of each document that is long enough, up to the target."""
    shortest = data.sequence_length - 2
    share = target / ranges.num_tokens
    order = rng.permutation(len(ranges.starts))
    positions = rng.random(len(order))
    held, train = [], []
    num_held = 0
    for index in order:
        start, stop = int(ranges.starts[index]), int(ranges.stops[index])
        size = max(shortest, round(share * (stop - start)))
        if num_held >= target or stop - start < 4 * size:
            train.append((start, stop))
            continue
        num_held += size
        first = start + int(positions[index] * (stop - start - size + 1))
        held.append((first, first + size))
        train += [piece for piece in ((start, first), (first + size, stop)) if piece[0] < piece[1]]
    return Split(_ranges(train), _ranges(held), "span")


def _ranges(pieces: list[tuple[int, int]]) -> Ranges:
    array = np.array(sorted(pieces), dtype=np.int64).reshape(-1, 2)
    return Ranges(array[:, 0], array[:, 1])
