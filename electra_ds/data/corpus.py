"""A corpus: sources of raw text, read as documents. A document is a list of non-empty, stripped lines."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import itertools
import os
import re
import sysconfig
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from electra_ds.config.plugins import READER, registered_names
from electra_ds.core.errors import DataError
from electra_ds.core.launcher import worker_pool
from electra_ds.data.text_files import FORMATS, Boundary, Progress, file_documents, is_corpus_file

BUILTIN = "builtin"
_CLASS_AND_PLACE = re.compile(r"(?P<reader>[A-Za-z_][\w.]*:[A-Za-z_]\w*):(?P<place>.+)")


class Source(ABC):
    """Text from one place. `data.corpus_weights` has one weight per source."""

    @property
    @abstractmethod
    def description(self) -> str:
        """The name of the source in messages."""

    @property
    def num_bytes(self) -> int | None:
        """The number of bytes that `documents` will report as progress, or None if it is not known in advance."""
        return None

    @abstractmethod
    def signature(self) -> str:
        """Return a value that changes with the text, as a cheap check that a store was built from this source."""

    def prepare(self) -> None:  # noqa: B027
        """Download the source, if it is not local. Raises DataError."""

    @abstractmethod
    def documents(self, progress: Progress) -> Iterator[list[str]]:
        """Yield every document, always in the same order; some may have no lines. Raises DataError."""

    def notes(self) -> list[str]:
        """Return notes for the user about the last read."""
        return []


@dataclass(frozen=True)
class FileSource(Source):
    """Text in files, read in the order given."""

    files: tuple[Path, ...]
    boundary: Boundary = "file"
    text_key: str = "text"
    name: str = ""
    """The folder of the files, if one was given."""
    unread_files: Counter[str] = field(default_factory=Counter, compare=False)
    """The number of files in the folders that are skipped, by suffix."""

    @property
    def description(self) -> str:
        if self.name or len(self.files) == 1:
            return self.name or str(self.files[0])
        return f"{len(self.files)} files from {self.files[0]} to {self.files[-1]}"

    @property
    def num_bytes(self) -> int | None:
        return sum(size for _, size, _ in file_listing(self.files))

    def signature(self) -> str:
        return hash_of((self.boundary, self.text_key, file_listing(path.resolve() for path in self.files)))

    def documents(self, progress: Progress) -> Iterator[list[str]]:
        for path in self.files:
            yield from file_documents(path, self.boundary, self.text_key, progress)

    def notes(self) -> list[str]:
        total = self.unread_files.total()
        if not total:
            return []
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(self.unread_files.items()))
        return [
            f"{self.description}: {total:,} other {'file is' if total == 1 else 'files are'} not read ({kinds}), "
            f"since only these are read in a folder: {FORMATS}."
        ]


class BuiltinSource(Source):
    """The documentation text of the installed packages."""

    description = "built-in documentation text"

    def signature(self) -> str:
        return hash_of(file_listing(builtin_sources()))

    def documents(self, progress: Progress) -> Iterator[list[str]]:
        yield from builtin_documents()


@dataclass(frozen=True)
class Corpus:
    """Sources that are read one after another."""

    sources: tuple[Source, ...]

    @property
    def description(self) -> str:
        return ", ".join(source.description for source in self.sources)

    @property
    def num_bytes(self) -> int | None:
        """The number of bytes that `documents` will report as progress, or None if a source does not know it."""
        sizes = [source.num_bytes for source in self.sources]
        return None if None in sizes else sum(size for size in sizes if size)

    def signature(self) -> str:
        """Return a value that changes when a source is added, removed or written, a cheap check that a store fits."""
        return hash_of([source.signature() for source in self.sources])

    def prepare(self) -> None:
        """Download the sources that are not local."""
        for source in self.sources:
            source.prepare()

    def documents(self, progress: Progress = lambda num_bytes: None) -> Iterator[list[str]]:
        """Yield every document with at least one line. `progress` is called with the number of bytes read.

        Raises DataError if text cannot be read or a source has no text.
        """
        for _, document in self.documents_by_source(progress):
            yield document

    def documents_by_source(self, progress: Progress = lambda num_bytes: None) -> Iterator[tuple[int, list[str]]]:
        """Yield the same documents, each with the index of its source."""
        for index, source in enumerate(self.sources):
            is_empty = True
            for document in source.documents(progress):
                if document:
                    is_empty = False
                    yield index, document
            if is_empty:
                raise DataError(f"The corpus {source.description} holds no text.")

    def first_lines(self, max_characters: int) -> Iterator[str]:
        """Yield the first lines of each source, up to an equal share of `max_characters`."""
        share = -(-max_characters // len(self.sources))
        for source in self.sources:
            rest = share
            for line in itertools.chain.from_iterable(Corpus((source,)).documents()):
                yield line[:rest]
                rest -= len(line)
                if rest <= 0:
                    break

    def notes(self) -> list[str]:
        """Return notes for the user about the last read."""
        return [note for source in self.sources for note in source.notes()]


def named_reader(text: str) -> tuple[str, str] | None:
    """Return the reader and the place of a source `READER:PLACE`, or None if the text is a path or another source.

    READER is the name of a registered reader, or `module:Class`.
    """
    name, _, place = text.partition(":")
    if Path(text).exists() or not place:
        return None
    if name in registered_names(READER):
        return name, place
    match = _CLASS_AND_PLACE.fullmatch(text)
    return (match["reader"], match["place"]) if match else None


def open_corpus(sources: Iterable[str | Path], boundary: Boundary = "file", text_key: str = "text") -> Corpus:
    """Return a corpus with one source for each file, folder or `builtin`. Raises DataError as `open_source` does."""
    return Corpus(tuple(open_source([path], boundary, text_key) for path in sources))


def open_source(paths: Sequence[str | Path], boundary: Boundary = "file", text_key: str = "text") -> Source:
    """Return one source made of files and folders. Folders are read recursively in sorted order.

    The single path `builtin` names the built-in corpus. Raises DataError if a path is missing or has no text.
    """
    if [str(path) for path in paths] == [BUILTIN]:
        return BuiltinSource()
    files: list[Path] = []
    unread_files: Counter[str] = Counter()
    for path in map(Path, paths):
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            files += _files_in(path, unread_files)
        else:
            raise DataError(f"The corpus {path} does not exist.")
    source = FileSource(tuple(files), boundary, text_key, str(paths[0]) if len(paths) == 1 else "", unread_files)
    if not source.num_bytes:
        raise DataError(f"The corpus is empty: {source.description}.")
    return source


def _files_in(folder: Path, unread_files: Counter[str]) -> list[Path]:
    """Return the files to read in a folder, and count the suffixes of all other files in `unread_files`.

    Raises DataError if there is no file to read, or if the folder holds a saved dataset or is a token store.
    """
    if (folder / "store.json").is_file() and (folder / "tokens.bin").is_file():
        raise DataError(f"The folder {folder} is a token store, not text. Train on it with --data {folder}")
    found = []
    for entry in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in entry.relative_to(folder).parts)
        if entry.is_file() and not is_hidden:
            if is_corpus_file(entry):
                found.append(entry)
            else:
                unread_files[entry.suffix.lower()] += 1
    if not found:
        raise DataError(f"The folder {folder} holds no text files ({FORMATS}).")
    saved = next(filter(is_saved_dataset, sorted({file.parent for file in found})), None)
    if saved is not None:
        raise DataError(f"{saved} is a dataset that save_to_disk wrote. Give it its own --corpus: --corpus {saved}")
    return found


def is_saved_dataset(folder: Path) -> bool:
    """Return True if `save_to_disk` of `datasets` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("state.json", "dataset_info.json")
    )


def file_listing(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return the path, size and modification time of each file."""
    try:
        stats = [(str(path), os.stat(path)) for path in files]
    except OSError as error:
        raise DataError(f"Cannot read {error.filename}: {error.strerror}.") from error
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def hash_of(identity: Any) -> str:
    """Return the SHA-256 of a value's representation."""
    return hashlib.sha256(repr(identity).encode()).hexdigest()


# --- the built-in corpus: the documentation text that comes with Python and the installed packages
#
# Every machine that can run electra_ds has some megabytes of English on its disk: `pydoc_data` and the docstrings of
# the standard library and of a few packages. `ast` reads them without importing anything, one document per module, in
# sorted order. Repeated paragraphs are left out, because held-out text must not occur in the training text.

PACKAGES = ("matplotlib", "numpy", "scipy", "sklearn", "torch", "transformers")
_SKIPPED_FOLDERS = {"__pycache__", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}
_PARAGRAPHS = re.compile(r"\n\s*\n")
_SHORTEST_DOCSTRING_CHARS = 80


@functools.cache
def builtin_documents() -> list[list[str]]:
    """Return the documents, always in the same order. They are about 25 MB and are read once per process.

    Raises DataError if no installed package has documentation.
    """
    paths = builtin_sources()
    seen: set[bytes] = set()
    documents = []
    with worker_pool(min(os.cpu_count() or 1, 8)) as pool:
        for texts in pool.map(_documentation_of, paths, chunksize=64):
            new = [paragraph for text in texts for paragraph in _PARAGRAPHS.split(text) if _is_new(paragraph, seen)]
            if lines := [line.strip() for paragraph in new for line in paragraph.splitlines() if line.strip()]:
                documents.append(lines)
    if not documents:
        raise DataError("This Python has no documentation text to train on. Give a corpus with --corpus PATH.")
    return documents


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = hashlib.blake2b(" ".join(text.split()).encode("utf8"), digest_size=16).digest()
    is_new = digest not in seen
    seen.add(digest)
    return is_new


def builtin_sources() -> list[Path]:
    """Return the Python files to read."""
    roots = [Path(sysconfig.get_paths()["stdlib"]).resolve()]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            roots.append(Path(spec.submodule_search_locations[0]).resolve())
    paths = []
    for root in roots:
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
            paths += [Path(folder) / name for name in sorted(files) if name.endswith(".py")]
    return paths


def _documentation_of(path: Path) -> list[str]:
    """Return the cleaned docstrings of one module in source order, or the texts of `pydoc_data/topics.py`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    if path.parent.name == "pydoc_data":
        return [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_prose(node.value)
        ]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        (getattr(node, "lineno", 0), inspect.cleandoc(text))
        for node in ast.walk(tree)
        if isinstance(node, documented) and (text := ast.get_docstring(node, clean=False)) and _is_prose(text)
    ]
    # A docstring may contain lone surrogates, which cannot be encoded.
    return [text.encode("utf8", "replace").decode("utf8") for _, text in sorted(found)]


def _is_prose(text: str) -> bool:
    return len(text) >= _SHORTEST_DOCSTRING_CHARS
