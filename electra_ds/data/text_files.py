"""The documents of one file: plain text, WikiExtractor's output and JSON lines, also compressed, Parquet and Arrow.

A document is a list of non-empty, stripped lines. The module reads, in this order: bytes and lines of a file, plain
text with the tags of WikiExtractor, JSON lines, Parquet and Arrow. At its end it recognises files that are not what
their names say.
"""

from __future__ import annotations

import bz2
import itertools
import json
import lzma
import re
import zlib
from collections import Counter
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
_TABLE_ADVICE = (
    "Write the column with the text as JSON lines: "
    """python -c "import pandas; pandas.read_csv('{path}'SEP)[['text']].to_json('text.jsonl', orient='records', """
    """lines=True, force_ascii=False)\""""
)
_OTHER_SUFFIXES = {
    ".csv": ("a table", _TABLE_ADVICE.replace("SEP", "")),
    ".tsv": ("a table", _TABLE_ADVICE.replace("SEP", r", sep='\t', quoting=3")),
    ".html": ("HTML", "Take the text out of its markup first, and give that."),
    ".htm": ("HTML", "Take the text out of its markup first, and give that."),
}
"""Text files that contain more than the text to train on: (what they are, what to do)."""
_UNPACKERS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    # Dumps made with `zstd --long=31` need a window of 2 GiB. For others this limit makes no difference.
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
}
_UNPACKING_ERRORS = (zlib.error, OSError, lzma.LZMAError, zstandard.ZstdError)
_ARROW_SUFFIX = ".arrow"
_TAR_SUFFIXES = {".tar", ".tgz", ".tbz2", ".txz"}
_ARROW_FILE = b"ARROW1"
_END_OF_ARROW_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_CLOSING_TAG = "</doc>"
_OPENING_TAG_AND_TEXT = re.compile(r'(<doc [^<]*?">)(.+)')
_END_OF_OPENING_TAG = re.compile(r'[^<]*">')
_END_OF_CLOSING_TAG = re.compile(r"/?(doc|oc|c)?>")
_BEGINNING_OF_TAG = re.compile(r"<(doc .*|/?(d|do|doc)?)")
_LONGEST_HEAD_CHARS = 8_000_000
"""Longer than any article."""
WITHOUT_END, WITHOUT_BEGINNING = "without the end", "without the beginning"
"""Parts of an article that may be missing."""
FORMATS = (
    f"{', '.join(sorted((_TEXT_SUFFIXES | _JSON_SUFFIXES) - {''}))}, names without a suffix, each also with "
    f"{', '.join(_UNPACKERS)} after it, or {_PARQUET_SUFFIX}"
)
"""The names of files that are read in a folder, for messages."""


def is_corpus_file(path: Path) -> bool:
    """Return whether a file with this name is read if its folder is given."""
    content, packing = _suffixes(path)
    return content in _TEXT_SUFFIXES | _JSON_SUFFIXES or (content == _PARQUET_SUFFIX and not packing)


def file_documents(
    path: Path, boundary: Boundary, text_key: str, progress: Progress, cut_articles: Counter[str]
) -> Iterator[list[str]]:
    """Yield every document; some may have no lines.

    progress: is called with the number of bytes that were read. cut_articles: counts incomplete articles of
    WikiExtractor, as WITHOUT_END and WITHOUT_BEGINNING. Raises DataError for a file that cannot be read, is damaged,
    cut off or not UTF-8, lacks the text field, or is not what its name says.
    """
    content, packing = _suffixes(path)
    if content in _OTHER_SUFFIXES:
        what, advice = _OTHER_SUFFIXES[content]
        raise DataError(f"{path} is {what}, not plain text. {advice.format(path=path)}")
    if content in _TAR_SUFFIXES:
        raise DataError(f"{path} is a tar archive. Unpack it first: tar xf {path}")
    if packing and content in (_PARQUET_SUFFIX, _ARROW_SUFFIX):
        raise DataError(f"{path} is not compressed text. Unpack it first.")
    if content == _PARQUET_SUFFIX:
        return _parquet_documents(path, text_key, progress)
    if content == _ARROW_SUFFIX:
        return _arrow_documents(path, text_key, progress)
    lines = _lines(path, content in _JSON_SUFFIXES, _UNPACKERS.get(packing), progress)
    if content in _JSON_SUFFIXES:
        return _json_documents(path, lines, text_key)
    lines = _tags_on_lines_of_their_own(_not_json(path, lines, text_key))
    if boundary == "blank-line":
        lines = _with_head_in_one(lines)
    return _text_documents(lines, boundary, cut_articles)


def lines_of(text: str) -> list[str]:
    """Return the text of a JSON object or a row as a document.

    If the text is exactly one of WikiExtractor's articles, its tags are removed. All other tags in a record are text.
    """
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    if lines and lines[0].startswith("<doc ") and lines[-1].endswith(_CLOSING_TAG) and text.count("<doc ") == 1:
        apart = [line for line in _tags_on_lines_of_their_own(lines) if line]
        if _is_opening_tag(apart[0]) and apart[-1] == _CLOSING_TAG:
            return apart[1:-1]
    return lines


def is_text_type(kind: Any) -> bool:
    """Return whether an Arrow column of this type holds text."""
    if pa.types.is_dictionary(kind):
        return is_text_type(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


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

    The file objects of the standard library and of zstandard are not used, because some of them silently accept a
    damaged or cut-off stream.
    """
    stream, at_start, finished = unpacker(), True, 0
    for packed in blocks:
        rest = packed
        while rest := (rest.lstrip(b"\0") if at_start else rest):  # there may be zeros between streams
            try:
                yield stream.decompress(rest)
            except _UNPACKING_ERRORS as error:
                raise DataError(f"{path} is damaged, or not what its name says: {error}. Get it again.") from error
            at_start, rest = stream.eof, stream.unused_data
            if at_start:
                stream, finished = unpacker(), finished + 1
    if not at_start or not finished:
        raise DataError(f"{path} is cut off: the compressed data ends in the middle. Get it again.")


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

    In text every kind of line end counts, in JSON only LF and CRLF, because a JSON string may contain the others.
    """
    blocks = _blocks(path, progress)
    if unpacker is not None:
        blocks = _unpacked(path, blocks, unpacker)
    for number, raw in enumerate(_raw_lines(blocks), 1):
        if number == 1 and (kind := kind_of(raw)):
            raise DataError(f"{path} is {kind.what}, not plain text in UTF-8. {kind.advice}")
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


def _tags_on_lines_of_their_own(lines: Iterable[str]) -> Iterator[str]:
    """Yield lines with WikiExtractor's tags separated from text on the same line, as some tools write them."""
    for line in lines:
        text = line
        if line.startswith("<doc ") and (match := _OPENING_TAG_AND_TEXT.fullmatch(line)):
            yield match[1]
            text = match[2].strip()
        if text.endswith(_CLOSING_TAG) and text != _CLOSING_TAG:
            yield text.removesuffix(_CLOSING_TAG).rstrip()
            text = _CLOSING_TAG
        yield text


def _is_opening_tag(line: str) -> bool:
    return line.startswith("<doc ") and line.endswith(">")


def _with_head_in_one(lines: Iterator[str]) -> Iterator[str]:
    """Yield the lines, but without blank lines before a closing tag that comes first: they belong to one article."""
    head: list[str] = []
    num_chars = 0
    for line in lines:
        head.append(line)
        num_chars += len(line) + 1
        if line == _CLOSING_TAG:
            head = [line for line in head if line]
        if line == _CLOSING_TAG or _is_opening_tag(line) or num_chars > _LONGEST_HEAD_CHARS:
            break
    yield from head
    yield from lines


def _text_documents(lines: Iterable[str], boundary: Boundary, cut_articles: Counter[str]) -> Iterator[list[str]]:
    """Yield documents as divided by `boundary`; text between WikiExtractor's tags `<doc id=…>` and `</doc>` is one.

    A file may begin or end within an article or a tag, like the parts of an extract that was split or cut off. The rest
    of such an article is a document, too.
    """
    document: list[str] = []
    is_open = has_tags = False
    for line in lines:
        opens, closes = _is_opening_tag(line), line == _CLOSING_TAG
        if opens or closes:
            if document and not has_tags:
                is_open = bool(_END_OF_OPENING_TAG.fullmatch(document[0]))
                if is_open or _END_OF_CLOSING_TAG.fullmatch(document[0]):
                    del document[0]
            if opens and is_open:
                cut_articles[WITHOUT_END] += 1
            if document and closes and not is_open:
                cut_articles[WITHOUT_BEGINNING] += 1
            yield document
            document, is_open, has_tags = [], opens, True
        elif line:
            document.append(line)
        elif boundary == "blank-line" and document and not is_open:
            yield document
            document = []
    if has_tags and document and _BEGINNING_OF_TAG.fullmatch(document[-1]):
        del document[-1]
        is_open = False  # where an article was open, this was its end
    if is_open:
        cut_articles[WITHOUT_END] += 1
    yield document


def _json_documents(path: Path, lines: Iterator[str], text_key: str) -> Iterator[list[str]]:
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}). {_advice_on_json(number, line)}") from error
        text = record.get(text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DataError(f"{path}, line {number}: {_problem_of_record(record, text_key, number, line)}")
        yield lines_of(text.encode("utf8", "replace").decode("utf8"))  # a lone surrogate is not text


def _problem_of_record(record: Any, text_key: str, number: int, line: str) -> str:
    if isinstance(record, list) and any(isinstance(each, dict) for each in record):
        return f"a list of objects. {_advice_on_json(number, line)}"
    if not isinstance(record, dict):
        return f"no text field '{text_key}'; it is not an object. Name it with --text-key."
    if text_key in record:
        return f"the field '{text_key}' holds a {type(record[text_key]).__name__}, not text."
    return f"no text field '{text_key}'; its keys are {', '.join(record)}. Name it with --text-key."


def _advice_on_json(number: int, line: str) -> str:
    if number == 1 and line.startswith("["):
        return "JSON lines hold one object per line; convert a list with: jq -c '.[]' FILE.json > FILE.jsonl"
    if number == 1 and not line.startswith("{"):
        return "JSON lines hold one object per line. If this is plain text, rename it to end in .txt."
    return "JSON lines hold one object per line."


def _check_column(path: Path, schema: Any, text_key: str) -> None:
    if text_key not in schema.names:
        columns = f"its columns are {', '.join(schema.names)}"
        raise DataError(f"{path}: no column '{text_key}'; {columns}. Name it with --text-key.")
    if not is_text_type(kind := schema.field(text_key).type):
        raise DataError(f"{path}: the column '{text_key}' is of type {kind}, not text. See --text-key.")


def _parquet_documents(path: Path, text_key: str, progress: Progress) -> Iterator[list[str]]:
    """Yield one document per row; rows without a text are left out. Progress is counted in rows."""
    try:
        size, read = path.stat().st_size, 0
        with path.open("rb") as head:
            kind = kind_of(head.read(32))
        if kind and kind.what != "Parquet":
            raise DataError(f"{path} is {kind.what}, although its name says Parquet. {kind.advice}")
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            num_rows = file.metadata.num_rows
            _check_column(path, file.schema_arrow, text_key)
            for batch in file.iter_batches(1000, columns=[text_key]):
                yield from (lines_of(text) for text in batch.column(0).to_pylist() if text is not None)
                progress(size * (read + len(batch)) // num_rows - size * read // num_rows)
                read += len(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the Parquet file {path}; it may be damaged or cut off: {error}") from error


def _arrow_documents(path: Path, text_key: str, progress: Progress) -> Iterator[list[str]]:
    """Yield one document per row of the streams that `save_to_disk` of `datasets` writes, and of Arrow's own files."""
    try:
        size = path.stat().st_size
        with pa.memory_map(str(path)) as source:
            is_stream = source.read_at(len(_ARROW_FILE), 0) != _ARROW_FILE
            if is_stream and source.read_at(len(_END_OF_ARROW_STREAM), max(size - 8, 0)) != _END_OF_ARROW_STREAM:
                raise DataError(f"{path} is cut off, or is not an Arrow file as its name says. Save the dataset again.")
            file = pa.ipc.open_stream(source) if is_stream else pa.ipc.open_file(source)
            _check_column(path, file.schema, text_key)
            read = 0
            for batch in file if is_stream else map(file.get_batch, range(file.num_record_batches)):
                yield from (lines_of(text) for text in batch.column(text_key).to_pylist() if text is not None)
                done = min(batch.nbytes, size - read)  # the file's other columns and its headers are not counted
                progress(done)
                read += done
            progress(size - read)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the Arrow file {path}; it may be damaged or cut off: {error}") from error


# Recognising what a file holds by its first bytes


class FileKind(NamedTuple):
    """The kind of a file, and what to do with it if text was expected."""

    what: str
    advice: str


_BY_FIRST_BYTES = {
    b"\x1f\x8b": FileKind("compressed with gzip", "Add .gz to its name, or unpack it."),
    b"BZh": FileKind("compressed with bzip2", "Add .bz2 to its name, or unpack it."),
    b"\xfd7zXZ": FileKind("compressed with xz", "Add .xz to its name, or unpack it."),
    b"\x28\xb5\x2f\xfd": FileKind("compressed with zstd", "Add .zst to its name, or unpack it."),
    b"\x04\x22\x4d\x18": FileKind("compressed with lz4", "Unpack it: lz4 -d FILE"),
    b"7z\xbc\xaf\x27\x1c": FileKind("a 7z archive", "Unpack it: 7z x FILE"),
    b"Rar!\x1a\x07": FileKind("a RAR archive", "Unpack it: unrar x FILE"),
    b"PK\x03\x04": FileKind("a ZIP archive, as .docx and .xlsx files are", "Unpack it, or save it as plain text."),
    b"\xff\xfe": FileKind("UTF-16 text", "Convert it: iconv -f utf-16 -t utf-8"),
    b"\xfe\xff": FileKind("UTF-16 text", "Convert it: iconv -f utf-16 -t utf-8"),
    b"PAR1": FileKind("Parquet", "Rename it to end in .parquet."),
    b"ARROW1": FileKind("an Arrow file", "Convert it to Parquet, or give the save_to_disk folder that it is from."),
    b"\xff\xff\xff\xff": FileKind("an Arrow file", "Give the save_to_disk folder that it is from."),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": FileKind("an old Office file, such as .doc", "Save it as plain text."),
    b"\x89HDF": FileKind("an HDF5 file", "Write its text as JSON lines."),
    b"\x93NUMPY": FileKind("a NumPy array", "Give the text that it was made from."),
    b"SQLite format 3\0": FileKind("an SQLite database", "Write its text as JSON lines."),
    b"<mediawiki ": FileKind("a MediaWiki dump in XML", "Take the text out of it with WikiExtractor, and give that."),
    b"%PDF": FileKind("a PDF", "Extract its text first: pdftotext FILE.pdf"),
    b"version https://git-lfs": FileKind("a Git LFS pointer, not the file itself", "Fetch the file: git lfs pull"),
}


def kind_of(content: bytes) -> FileKind | None:
    """Return the kind of a file whose content begins with these bytes, or None if it may be UTF-8 text."""
    if content[257:].startswith(b"ustar"):
        return FileKind("a tar archive", "Unpack it first: tar xf FILE")
    return next((kind for start, kind in _BY_FIRST_BYTES.items() if content.startswith(start)), None)
