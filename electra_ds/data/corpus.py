"""Raw text in, documents out. A document is a list of non-empty, stripped lines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from electra_ds.data.builtin import builtin_documents, builtin_sources
from electra_ds.data.text_files import FORMATS, Boundary, Progress, file_documents, is_corpus_file
from electra_ds.errors import DataError

BUILTIN = "builtin"


class Source(Protocol):
    """Text from one place. What `data.corpus_weights` weighs."""

    @property
    def description(self) -> str: ...

    @property
    def num_bytes(self) -> int | None:
        """How much `documents` will tell its progress; None where that is known only once it is read."""

    def signature(self) -> str:
        """Changes when the text does: a cheap sign that a store is still of this source."""

    def prepare(self) -> None:
        """Fetch what has to be there before `documents` can be read. Raises DataError."""

    def documents(self, progress: Progress) -> Iterator[list[str]]:
        """Every document, perhaps without a line, always in the same order. Raises DataError."""


@dataclass(frozen=True)
class FileSource:
    """Files, read in this order."""

    files: tuple[Path, ...]
    boundary: Boundary = "file"
    text_key: str = "text"
    name: str = ""
    """The folder that the files are from, where there is one."""

    @property
    def description(self) -> str:
        if self.name or len(self.files) == 1:
            return self.name or str(self.files[0])
        return f"{len(self.files)} files from {self.files[0]} to {self.files[-1]}"

    @property
    def num_bytes(self) -> int | None:
        return sum(size for _, size, _ in _listing(self.files))

    def signature(self) -> str:
        listing = _listing(self.files)
        return hashlib.sha256(repr((self.boundary, self.text_key, listing)).encode()).hexdigest()

    def prepare(self) -> None:
        """Files are there already."""

    def documents(self, progress: Progress) -> Iterator[list[str]]:
        for path in self.files:
            yield from file_documents(path, self.boundary, self.text_key, progress)


class BuiltinSource:
    """The documentation text of the installed packages."""

    description = "built-in documentation text"
    num_bytes: int | None = None

    def signature(self) -> str:
        return hashlib.sha256(repr(_listing(builtin_sources())).encode()).hexdigest()

    def prepare(self) -> None:
        """It is installed already."""

    def documents(self, progress: Progress) -> Iterator[list[str]]:
        yield from builtin_documents()


@dataclass(frozen=True)
class Corpus:
    """Sources, read one after another."""

    sources: tuple[Source, ...]

    @property
    def description(self) -> str:
        return ", ".join(source.description for source in self.sources)

    @property
    def num_bytes(self) -> int | None:
        """What `documents` will tell its progress, where all sources know it."""
        sizes = [source.num_bytes for source in self.sources]
        return None if None in sizes else sum(size for size in sizes if size)

    def signature(self) -> str:
        """Changes when a source is added, removed or written: a cheap sign that a store is still of this corpus."""
        return hashlib.sha256(repr([source.signature() for source in self.sources]).encode()).hexdigest()

    def prepare(self) -> None:
        """Fetch what has to be there before the documents can be read."""
        for source in self.sources:
            source.prepare()

    def documents(self, progress: Progress = lambda num_bytes: None) -> Iterator[list[str]]:
        """Every document with at least one line. `progress` is told bytes as they are read.

        Raises DataError for text that cannot be read, and for a source without any.
        """
        for _, document in self.documents_by_source(progress):
            yield document

    def documents_by_source(self, progress: Progress = lambda num_bytes: None) -> Iterator[tuple[int, list[str]]]:
        """The same with the place of each document's source."""
        for place, source in enumerate(self.sources):
            is_empty = True
            for document in source.documents(progress):
                if document:
                    is_empty = False
                    yield place, document
            if is_empty:
                raise DataError(f"The corpus {source.description} holds no text.")


def open_corpus(sources: Iterable[str | Path], boundary: Boundary = "file", text_key: str = "text") -> Corpus:
    """A corpus of which each file, folder, or `builtin`, is a source. Raises DataError as `open_source` does."""
    return Corpus(tuple(open_source([path], boundary, text_key) for path in sources))


def open_source(paths: Sequence[str | Path], boundary: Boundary = "file", text_key: str = "text") -> Source:
    """One source of files and folders (read recursively, in sorted order); the one path `builtin` names the
    built-in corpus. Raises DataError where a path is missing or holds no text."""
    if [str(path) for path in paths] == [BUILTIN]:
        return BuiltinSource()
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            found = sorted(entry for entry in path.rglob("*") if _is_listed(entry, path))
            if not found:
                raise DataError(f"The folder {path} holds no text files ({FORMATS}).")
            files += found
        else:
            raise DataError(f"The corpus {path} does not exist.")
    source = FileSource(tuple(files), boundary, text_key, str(paths[0]) if len(paths) == 1 else "")
    if not source.num_bytes:
        raise DataError(f"The corpus is empty: {source.description}.")
    return source


def _is_listed(entry: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in entry.relative_to(root).parts)
    return entry.is_file() and not hidden and is_corpus_file(entry)


def _listing(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Names, sizes and times."""
    try:
        stats = [(str(path.resolve()), path.stat()) for path in files]
    except OSError as error:
        raise DataError(f"Cannot read {error.filename}: {error.strerror}.") from error
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
