"""Read the documents of one file: plain text, WikiExtractor output or JSON lines, also compressed, or Parquet.

A document is a list of non-empty, stripped lines. The module has, in this order: bytes and lines of a file, plain text,
JSON lines, Parquet, and the recognition of files that are not what their names say.
"""

from __future__ import annotations

import bz2
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import zstandard

from electra_ds.core.errors import DataError

Boundary = Literal["file", "blank-line"]
Progress = Callable[[int], None]

_BLOCK_BYTES = 1 << 18
_TEXT_SUFFIXES = {"", ".txt", ".text", ".md", ".rst"}
_JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
_PARQUET_SUFFIX = ".parquet"
_NO_TEXT_SUFFIXES = {
    **dict.fromkeys(
        (".csv", ".tsv"),
        "a table. Write the column with the text as JSON lines, such as with pandas' to_json(orient='records', "
        "lines=True).",
    ),
    **dict.fromkeys((".html", ".htm"), "HTML. Extract the text from the markup first, and give that."),
    **dict.fromkeys((".tar", ".tgz", ".tbz2", ".txz"), "a tar archive. Unpack it first, with tar xf."),
    ".arrow": "an Arrow file. Give the folder of the dataset that save_to_disk wrote.",
}
"""The kind of file that each of these suffixes stands for, and what to do with it."""
_UNPACKERS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    # Dumps made with `zstd --long=31` need a window of 2 GiB. For others this limit makes no difference.
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
}
_UNPACKING_ERRORS = (zlib.error, OSError, lzma.LZMAError, zstandard.ZstdError)
_CLOSING_TAG = "</doc>"
_JSON_ADVICE = (
    "JSON lines hold one object per line. A list is converted with: jq -c '.[]' FILE.json > FILE.jsonl; plain text has "
    "a name that ends in .txt."
)
FORMATS = (
    f"{', '.join(sorted((_TEXT_SUFFIXES | _JSON_SUFFIXES) - {''}))}, names without a suffix, each also with "
    f"{', '.join(_UNPACKERS)} after it, or {_PARQUET_SUFFIX}"
)
"""The names of files that are read in a folder, as messages show them."""


def is_corpus_file(path: Path) -> bool:
    """Return True if a file with this name is read when its folder is given."""
    content, packing = _suffixes(path)
    return content in _TEXT_SUFFIXES | _JSON_SUFFIXES or (content == _PARQUET_SUFFIX and not packing)


def file_documents(path: Path, boundary: Boundary, text_key: str, progress: Progress) -> Iterator[list[str]]:
    """Yield every document; some may have no lines.

    progress: called with the number of bytes read. Raises DataError for a file that cannot be read, is damaged, cut off
    or not UTF-8, lacks the text field, or is not what its name says.
    """
    content, packing = _suffixes(path)
    if content in _NO_TEXT_SUFFIXES:
        raise DataError(f"{path} is not plain text but {_NO_TEXT_SUFFIXES[content]}")
    if content == _PARQUET_SUFFIX:
        return _parquet_documents(path, text_key, progress)
    lines = _lines(path, content in _JSON_SUFFIXES, _UNPACKERS.get(packing), progress)
    if content in _JSON_SUFFIXES:
        return _json_documents(path, lines, text_key)
    return _text_documents(_not_json(path, lines, text_key), boundary)


def lines_of(text: str) -> list[str]:
    """Return the text of a JSON object or of a row, as a document."""
    return [stripped for line in text.splitlines() if (stripped := line.strip())]


def check_column(description: str, schema: Any, text_key: str) -> None:
    """Raise DataError unless an Arrow schema has a column of text with this name."""
    if text_key not in schema.names:
        raise DataError(
            f"{description}: no column '{text_key}'; its columns are {', '.join(schema.names)}. Name it with "
            f"--text-key."
        )
    kind = schema.field(text_key).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if not any(is_kind(kind) for is_kind in kinds):
        raise DataError(
            f"{description}: the column '{text_key}' has type {kind}, not text. Name the text column with --text-key."
        )


def _suffixes(path: Path) -> tuple[str, str]:
    """Return the suffix of a file's content and that of its compression, which may be empty."""
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
    """Yield the content of one or more compressed streams, one after another.

    This does not use the file objects of the standard library and of zstandard, because some of them silently accept
    a damaged or cut-off stream.
    """
    stream, at_start, finished = unpacker(), True, 0
    for packed in blocks:
        rest = packed
        while rest := (rest.lstrip(b"\0") if at_start else rest):  # zeros may separate streams
            try:
                yield stream.decompress(rest)
            except _UNPACKING_ERRORS as error:
                raise DataError(f"{path} is damaged, or not what its name says: {error}. Download it again.") from error
            at_start, rest = stream.eof, stream.unused_data
            if at_start:
                stream, finished = unpacker(), finished + 1
    if not at_start or not finished:
        raise DataError(f"{path} is cut off: the compressed data ends in the middle. Download it again.")


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
    """Yield stripped lines without a byte-order mark.

    In text every kind of line end counts; in JSON only LF and CRLF do, because a JSON string may contain the others.
    """
    blocks = _blocks(path, progress)
    if unpacker is not None:
        blocks = _unpacked(path, blocks, unpacker)
    for number, raw in enumerate(_raw_lines(blocks), 1):
        if number == 1 and (kind := kind_of(raw)):
            raise DataError(f"{path} is {kind.what}, not plain text in UTF-8. {kind.advice}")
        try:
            if b"\0" in raw:
                raise ValueError("it contains NUL bytes")
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except ValueError as error:
            reason = f"{error.reason} at byte {error.start}" if isinstance(error, UnicodeDecodeError) else error
            raise DataError(
                f"{path}, line {number}: not UTF-8 ({reason}). If it is text, convert it from its encoding: "
                f"iconv -f ENCODING -t utf-8"
            ) from error
        for line in [text] if is_json else text.splitlines() or [""]:
            yield line.strip()


def _not_json(path: Path, lines: Iterator[str], text_key: str) -> Iterator[str]:
    """Return the same lines. Raises DataError if the first line is a JSON object with the text field."""
    first = next(lines, "")
    if first.startswith("{"):
        try:
            record = json.loads(first)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get(text_key), str):
            raise DataError(f"{path} holds JSON lines, although its name says text. Rename it to end in .jsonl.")
    return itertools.chain([first], lines)


def _text_documents(lines: Iterable[str], boundary: Boundary) -> Iterator[list[str]]:
    """Yield documents, split at `boundary`. Text between the tags `<doc id=…>` and `</doc>` is one document."""
    document: list[str] = []
    in_article = False
    for line in lines:
        opens = line.startswith("<doc ") and line.endswith(">")
        if opens or line == _CLOSING_TAG:
            yield document
            document, in_article = [], opens
        elif line:
            document.append(line)
        elif boundary == "blank-line" and not in_article:
            yield document
            document = []
    yield document


def _json_documents(path: Path, lines: Iterator[str], text_key: str) -> Iterator[list[str]]:
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}). {_JSON_ADVICE}") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: a {type(record).__name__}, not an object. {_JSON_ADVICE}")
        text = record.get(text_key)
        if not isinstance(text, str):
            what = "no field" if text_key not in record else f"a {type(text).__name__}, not text, in the field"
            raise DataError(
                f"{path}, line {number}: {what} '{text_key}'; its keys are {', '.join(record)}. Name the field with "
                f"the text with --text-key."
            )
        yield lines_of(text.encode("utf8", "replace").decode("utf8"))  # a lone surrogate is not text


def _parquet_documents(path: Path, text_key: str, progress: Progress) -> Iterator[list[str]]:
    """Yield one document per row, without rows that have no text. Progress counts rows."""
    try:
        with path.open("rb") as head:
            kind = kind_of(head.read(512))
        if kind and kind.what != "Parquet":
            raise DataError(f"{path} is {kind.what}, although its name says Parquet. {kind.advice}")
        size, read = path.stat().st_size, 0
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            num_rows = file.metadata.num_rows
            check_column(str(path), file.schema_arrow, text_key)
            for batch in file.iter_batches(1000, columns=[text_key]):
                yield from (lines_of(text) for text in batch.column(0).to_pylist() if text is not None)
                progress(size * (read + len(batch)) // num_rows - size * read // num_rows)
                read += len(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the Parquet file {path}; it may be damaged or cut off: {error}") from error


# --- recognise what a file holds by its first bytes


class FileKind(NamedTuple):
    """The kind of a file, and the advice if text was expected."""

    what: str
    advice: str


_BY_FIRST_BYTES = {
    b"\x1f\x8b": FileKind("compressed with gzip", "Add .gz to its name, or unpack it."),
    b"BZh": FileKind("compressed with bzip2", "Add .bz2 to its name, or unpack it."),
    b"\xfd7zXZ": FileKind("compressed with xz", "Add .xz to its name, or unpack it."),
    b"\x28\xb5\x2f\xfd": FileKind("compressed with zstd", "Add .zst to its name, or unpack it."),
    b"PK\x03\x04": FileKind("a ZIP archive, as .docx and .xlsx files are", "Unpack it, or save it as plain text."),
    b"\xff\xfe": FileKind("UTF-16 text", "Convert it: iconv -f utf-16 -t utf-8"),
    b"\xfe\xff": FileKind("UTF-16 text", "Convert it: iconv -f utf-16 -t utf-8"),
    b"PAR1": FileKind("Parquet", "Rename it to end in .parquet."),
    b"<mediawiki ": FileKind("a MediaWiki dump in XML", "Extract the text with WikiExtractor, and give that."),
    b"%PDF": FileKind("a PDF", "Extract its text first: pdftotext FILE.pdf"),
    b"version https://git-lfs": FileKind("a Git LFS pointer, not the file itself", "Fetch the file: git lfs pull"),
}


def kind_of(content: bytes) -> FileKind | None:
    """Return the kind of a file that begins with these bytes, or None if it may be UTF-8 text."""
    if content[257:].startswith(b"ustar"):
        return FileKind("a tar archive", "Unpack it first: tar xf FILE")
    return next((kind for start, kind in _BY_FIRST_BYTES.items() if content.startswith(start)), None)
