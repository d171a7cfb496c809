"""Raw text in, documents out. A document is a list of non-empty, stripped lines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from electra_ds.data.builtin import builtin_documents, builtin_sources
from electra_ds.errors import DataError

BUILTIN = "builtin"
_TEXT_SUFFIXES = {"", ".txt", ".text", ".md", ".rst"}
_JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}

_FOREIGN = (b"\x1f\x8b", b"\xff\xfe", b"\xfe\xff", b"\x28\xb5\x2f\xfd", b"BZh", b"PK\x03\x04")

Boundary = Literal["file", "blank-line"]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Corpus:
    """Files to read, in a fixed order, or the built-in corpus."""

    files: tuple[Path, ...]
    boundary: Boundary = "file"
    text_key: str = "text"
    builtin: bool = False

    @property
    def description(self) -> str:
        if self.builtin:
            return "built-in documentation text"
        return str(self.files[0]) if len(self.files) == 1 else f"{len(self.files)} files"

    @property
    def num_bytes(self) -> int | None:
        """Size of the files; None for the built-in corpus, whose size is known only once it is read."""
        return None if self.builtin else sum(path.stat().st_size for path in self.files)

    def signature(self) -> str:
        """Changes when a file is added, removed or written: a cheap sign that a store is still of this corpus."""
        files = builtin_sources() if self.builtin else self.files
        try:
            stats = [(str(path.resolve()), path.stat()) for path in files]
        except OSError as error:
            raise DataError(f"Cannot read {error.filename}: {error.strerror}.") from error
        listing = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return hashlib.sha256(repr((self.boundary, self.text_key, listing)).encode()).hexdigest()

    def documents(self, progress: Progress = lambda num_bytes: None) -> Iterator[list[str]]:
        """Every document with at least one non-empty line. `progress` is told bytes as they are read.

        Raises DataError for text that is not UTF-8 or a JSON line without the text field.
        """
        if self.builtin:
            yield from builtin_documents()
            return
        for path in self.files:
            for document in self._file_documents(path, _lines(path, progress)):
                if document:
                    yield document

    def _file_documents(self, path: Path, lines: Iterator[str]) -> Iterator[list[str]]:
        if path.suffix.lower() in _JSON_SUFFIXES:
            return _json_documents(path, lines, self.text_key)
        first = next((line for line in lines if line), None)
        if first is None:
            return iter(())
        if first.startswith("<doc ") and first.endswith(">"):
            return _wiki_documents(lines)
        return _text_documents(first, lines, self.boundary)


def open_corpus(paths: Iterable[str | Path], boundary: Boundary = "file", text_key: str = "text") -> Corpus:
    """A corpus of files and folders (read recursively, in sorted order); the one path `builtin` names the
    built-in corpus. Raises DataError where a path is missing or holds no text."""
    paths = list(paths)
    if [str(path) for path in paths] == [BUILTIN]:
        return Corpus((), builtin=True)
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            found = sorted(entry for entry in path.rglob("*") if _is_text_file(entry, path))
            if not found:
                suffixes = ", ".join(sorted((_TEXT_SUFFIXES | _JSON_SUFFIXES) - {""}))
                raise DataError(f"The folder {path} holds no text files ({suffixes}, or names without a suffix).")
            files += found
        else:
            raise DataError(f"The corpus {path} does not exist.")
    corpus = Corpus(tuple(files), boundary, text_key)
    if not corpus.num_bytes:
        raise DataError(f"The corpus is empty: {', '.join(map(str, paths))}.")
    return corpus


def _is_text_file(entry: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in entry.relative_to(root).parts)
    return entry.is_file() and not hidden and entry.suffix.lower() in _TEXT_SUFFIXES | _JSON_SUFFIXES


def _lines(path: Path, progress: Progress) -> Iterator[str]:
    """Stripped lines without a byte-order mark. In text every kind of line end counts, in JSON only LF and CRLF,
    since a JSON string may hold the others."""
    is_json = path.suffix.lower() in _JSON_SUFFIXES
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                progress(len(raw))
                if number == 1 and raw.startswith(_FOREIGN):
                    raise DataError(f"{path} is compressed or UTF-16, not UTF-8 text. Unpack or convert it first.")
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start}). "
                        f"Convert it, for instance with: iconv -f latin1 -t utf-8"
                    ) from error
                for line in [text] if is_json else text.splitlines() or [""]:
                    yield line.strip()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error


def _text_documents(first: str, lines: Iterator[str], boundary: Boundary) -> Iterator[list[str]]:
    document = [first]
    for line in lines:
        if line:
            document.append(line)
        elif boundary == "blank-line" and document:
            yield document
            document = []
    yield document


def _wiki_documents(lines: Iterator[str]) -> Iterator[list[str]]:
    """WikiExtractor's `<doc id=… url=… title=…>` … `</doc>` blocks; the first opening tag is already read."""
    document: list[str] = []
    for line in lines:
        if line == "</doc>":
            yield document
            document = []
        elif line and not line.startswith("<doc "):
            document.append(line)
    yield document


def _json_documents(path: Path, lines: Iterator[str], text_key: str) -> Iterator[list[str]]:
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}); one object per line.") from error
        if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
            keys = f"its keys are {', '.join(record)}" if isinstance(record, dict) else "it is not an object"
            raise DataError(f"{path}, line {number}: no text field '{text_key}'; {keys}. Name it with --text-key.")
        text = record[text_key].encode("utf8", "replace").decode("utf8")  # a lone surrogate is no text
        yield [stripped for part in text.splitlines() if (stripped := part.strip())]
