"""A custom reader: the spoken text of subtitles in SubRip files (.srt), one document per file."""

from __future__ import annotations

import re
from pathlib import Path

from electra_ds import Source
from electra_ds.core.errors import DataError
from electra_ds.data.corpus import file_listing, hash_of

_NOT_SPOKEN = re.compile(r"\d+|.*-->.*")
_MARKUP = re.compile(r"<[^>]*>|\{[^}]*\}")


class Subtitles(Source):
    """`--corpus subtitles:FOLDER`"""

    description = ""  # in messages

    def __init__(self, place):
        self.description = f"subtitles in {place}"
        self._files = sorted(Path(place).resolve().rglob("*.srt"))
        if not self._files:
            raise DataError(f"The folder {place} has no .srt files.")

    @property
    def num_bytes(self):
        return sum(path.stat().st_size for path in self._files)

    def signature(self):
        return hash_of(file_listing(self._files))

    def documents(self, progress):
        for path in self._files:
            lines = [_MARKUP.sub("", line).strip() for line in path.read_text("utf-8-sig").splitlines()]
            yield [line for line in lines if line and not _NOT_SPOKEN.fullmatch(line)]
            progress(path.stat().st_size)
