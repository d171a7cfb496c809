"""A token store: tokenised documents on disk, which are memory-mapped.

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
from typing import Any

import numpy as np

from electra_ds.config.run_directory import read_where_it_is
from electra_ds.config.run_record import RunRecord
from electra_ds.core.errors import DataError
from electra_ds.core.program import command
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer
from electra_ds.data.unknown import UnknownText

FORMAT = 2


@dataclass(frozen=True)
class SourceInfo:
    """The part of a store from one source. The sources' documents follow one another in order."""

    description: str
    num_documents: int
    num_tokens: int
    unknown: UnknownText | None = None
    """None in stores of earlier versions, which did not count it."""


@dataclass(frozen=True)
class StoreInfo:
    """The content of store.json."""

    format: int
    corpora: list[SourceInfo]
    documents_read: list[int]
    """Documents of each source, including those without tokens, which are not in the store."""
    corpus_signature: str
    """Hash of the names, sizes and times of the files that were read, and of the commits of Hub datasets."""
    corpus_fingerprint: str
    """SHA-256 of the text."""
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
        """Identifier of the tokens: the same text tokenised by the same tokenizer."""
        return f"{self.corpus_fingerprint[:16]}-{self.tokenizer_fingerprint[:16]}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


class TokenStore:
    """An open store. `tokens` is a read-only memory map, so that nothing is loaded before it is used."""

    def __init__(self, path: Path) -> None:
        """Open a store. Raises DataError if it is missing, incomplete, truncated or of another format."""
        self.path = path
        self.info = _read_info(path)
        for name, size in self.info.file_bytes.items():
            actual = (path / name).stat().st_size if (path / name).is_file() else None
            if actual != size:
                found = "is missing" if actual is None else f"has {actual} bytes"
                raise DataError(
                    f"The token store {path} is damaged: {name} {found}, store.json says {size}. "
                    f"Delete the folder and build it again with {command('build-data')}."
                )
        self.tokenizer: Tokenizer = load_tokenizer(path / "tokenizer")
        if self.tokenizer.fingerprint != self.info.tokenizer_fingerprint:
            raise DataError(
                f"The tokenizer in {path / 'tokenizer'} is not the one that made this token store. "
                f"Put the original back, or build the store again with {command('build-data')}."
            )
        try:
            self.tokens = np.memmap(path / "tokens.bin", dtype=self.info.dtype, mode="r")
            self.documents: np.ndarray = np.load(path / "documents.npy", mmap_mode="r")
            self.lines: np.ndarray = np.load(path / "lines.npy", mmap_mode="r")
        except (ValueError, OSError) as error:
            raise DataError(
                f"The token store {path} is damaged ({error}). Delete the folder and build it again."
            ) from error


def _read_info(path: Path) -> StoreInfo:
    if path.is_file():
        raise DataError(f"{path} is a file, not the folder of a token store. To train on its text: --corpus {path}")
    if not path.is_dir():
        raise DataError(
            f"There is no token store at {path}. Build one with: {command('build-data')} --out {path} --corpus …"
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
    """Return the token store that a run's record names, also if both have moved.

    folder: the folder with the record; given: the path that the user gave; remedy: the option for that path. Raises
    DataError if the store is missing, or if it is not the same one.
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
