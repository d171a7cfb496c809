"""Recognise what a file holds by its first bytes, for messages about files that are not what their names say."""

from __future__ import annotations

from typing import NamedTuple


class FileKind(NamedTuple):
    """The kind of a file, and what to do if text was expected."""

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
_TAR_AT, _TAR = 257, b"ustar"


def kind_of(content: bytes) -> FileKind | None:
    """Return the kind of a file whose content begins with these bytes, or None if it may be UTF-8 text."""
    if content[_TAR_AT:].startswith(_TAR):
        return FileKind("a tar archive", "Unpack it first: tar xf FILE")
    return next((kind for start, kind in _BY_FIRST_BYTES.items() if content.startswith(start)), None)
