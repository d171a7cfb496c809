"""One file's documents: text, WikiExtractor's output and JSON lines, each perhaps compressed, and Parquet.

A document is a list of non-empty, stripped lines.
"""

from __future__ import annotations

import bz2
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import zstandard

from electra_ds.errors import DataError

Boundary = Literal["file", "blank-line"]
Progress = Callable[[int], None]

_BLOCK_BYTES = 1 << 18
_PARQUET_ROWS = 1000
_TEXT_SUFFIXES = {"", ".txt", ".text", ".md", ".rst"}
_JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
_PARQUET_SUFFIX = ".parquet"
_UNPACKERS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    # Dumps made with `zstd --long=31` need a window of 2 GiB; others take no more for the permission.
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
}
_UNPACKING_ERRORS = (zlib.error, OSError, lzma.LZMAError, zstandard.ZstdError)
_FOREIGN = (b"\x1f\x8b", b"\xff\xfe", b"\xfe\xff", b"\x28\xb5\x2f\xfd", b"BZh", b"PK\x03\x04", b"\xfd7zXZ")

FORMATS = (
    f"{', '.join(sorted((_TEXT_SUFFIXES | _JSON_SUFFIXES) - {''}))}, names without a suffix, each also with "
    f"{', '.join(_UNPACKERS)} after it, or {_PARQUET_SUFFIX}"
)
"""What a folder's files are chosen by, for messages."""


def is_corpus_file(path: Path) -> bool:
    """Whether the name is one that is read where a folder is given."""
    content, packing = _suffixes(path)
    return content in _TEXT_SUFFIXES | _JSON_SUFFIXES or (content == _PARQUET_SUFFIX and not packing)


def file_documents(path: Path, boundary: Boundary, text_key: str, progress: Progress) -> Iterator[list[str]]:
    """Every document, perhaps without a line. `progress` is told bytes of the file as they are read.

    Raises DataError for a file that cannot be read, is damaged, cut off or not UTF-8, or lacks the text field.
    """
    content, packing = _suffixes(path)
    if packing and content in (".tar", _PARQUET_SUFFIX):
        raise DataError(f"{path} is not compressed text. Unpack it first.")
    if content == _PARQUET_SUFFIX:
        return _parquet_documents(path, text_key, progress)
    lines = _lines(path, content in _JSON_SUFFIXES, _UNPACKERS.get(packing), progress)
    if content in _JSON_SUFFIXES:
        return _json_documents(path, lines, text_key)
    return _plain_documents(lines, boundary)


def lines_of(text: str) -> list[str]:
    """A record's text as a document."""
    return [stripped for line in text.splitlines() if (stripped := line.strip())]


def is_text_type(kind: Any) -> bool:
    """Whether an Arrow column of this type holds text."""
    if pa.types.is_dictionary(kind):
        return is_text_type(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _suffixes(path: Path) -> tuple[str, str]:
    """(suffix that says what is in the file, suffix of its compression or nothing)."""
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), suffix) if suffix in _UNPACKERS else (suffix, "")


def _blocks(path: Path, progress: Progress) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                progress(len(block))
                yield block
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error


def _unpacked(path: Path, blocks: Iterator[bytes], unpacker: Callable[[], Any]) -> Iterator[bytes]:
    """The content of one or more compressed streams, one after another.

    The file objects of the standard library and of zstandard are not used: some pass over a damaged or cut-off
    stream in silence.
    """
    stream, at_start, finished = unpacker(), True, 0
    for packed in blocks:
        rest = packed
        while rest := (rest.lstrip(b"\0") if at_start else rest):  # zeros may fill up the space between streams
            try:
                yield stream.decompress(rest)
            except _UNPACKING_ERRORS as error:
                raise DataError(f"{path} is damaged, or not what its name says: {error}. Get it anew.") from error
            at_start, rest = stream.eof, stream.unused_data
            if at_start:
                stream, finished = unpacker(), finished + 1
    if not at_start or not finished:
        raise DataError(f"{path} is cut off: the compressed data ends in the middle. Get it anew.")


def _raw_lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    pieces: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        pieces.append(first)
        for other in others:
            yield b"".join(pieces)
            pieces = [other]
    if last := b"".join(pieces):
        yield last


def _lines(path: Path, is_json: bool, unpacker: Callable[[], Any] | None, progress: Progress) -> Iterator[str]:
    """Stripped lines without a byte-order mark. In text every kind of line end counts, in JSON only LF and CRLF,
    since a JSON string may hold the others."""
    blocks = _blocks(path, progress)
    if unpacker is not None:
        blocks = _unpacked(path, blocks, unpacker)
    for number, raw in enumerate(_raw_lines(blocks), 1):
        if number == 1 and raw.startswith(_FOREIGN):
            raise DataError(f"{path} is compressed or UTF-16, not UTF-8 text. Unpack or convert it first.")
        if b"\0" in raw:
            raise DataError(f"{path}, line {number}: NUL bytes, so it is UTF-16 or no text. Convert it to UTF-8 first.")
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start}). "
                f"Convert it from the encoding that it has: iconv -f ENCODING -t utf-8"
            ) from error
        for line in [text] if is_json else text.splitlines() or [""]:
            yield line.strip()


def _plain_documents(lines: Iterator[str], boundary: Boundary) -> Iterator[list[str]]:
    first = next((line for line in lines if line), None)
    if first is None:
        return iter(())
    if first.startswith("<doc ") and first.endswith(">"):
        return _wiki_documents(lines)
    return _text_documents(first, lines, boundary)


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
            if isinstance(record, dict) and text_key in record:
                kind = type(record[text_key]).__name__
                raise DataError(f"{path}, line {number}: the field '{text_key}' holds a {kind}, not text.")
            raise DataError(f"{path}, line {number}: no text field '{text_key}'; {keys}. Name it with --text-key.")
        yield lines_of(record[text_key].encode("utf8", "replace").decode("utf8"))  # a lone surrogate is no text


def _parquet_documents(path: Path, text_key: str, progress: Progress) -> Iterator[list[str]]:
    """One document a row; rows without a text are left out. The file's bytes are counted by its rows."""
    try:
        size, read = path.stat().st_size, 0
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
            if text_key not in schema.names:
                names = ", ".join(schema.names)
                raise DataError(f"{path}: no column '{text_key}'; its columns are {names}. Name it with --text-key.")
            if not is_text_type(kind := schema.field(text_key).type):
                raise DataError(f"{path}: the column '{text_key}' is of type {kind}, not text. See --text-key.")
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[text_key]):
                yield from (lines_of(text) for text in batch.column(0).to_pylist() if text is not None)
                progress(size * (read + len(batch)) // num_rows - size * read // num_rows)
                read += len(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the Parquet file {path}; it may be damaged or cut off: {error}") from error
