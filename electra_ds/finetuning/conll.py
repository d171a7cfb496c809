"""Read words and tags from the columns of CoNLL files, or from JSON lines, as a table of lists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from electra_ds.config.run_record import TaskSource
from electra_ds.core.errors import DataError
from electra_ds.finetuning.own_files import read_own
from electra_ds.finetuning.tables import Table

TOKEN_COLUMNS = ("tokens", "words", "text")
"""If no text column is named, the first of these that a file of JSON lines or a data set has."""
TAG_COLUMNS = ("ner_tags", "labels", "tags", "pos_tags", "upos", "label")
"""If no label column is named, the first of these."""
_ENDINGS = (".conll", ".conllu", ".iob", ".bio", ".txt", ".tsv", ".tok")
_UNIVERSAL = ("ID", "FORM", "LEMMA", "UPOS", "XPOS", "FEATS", "HEAD", "DEPREL", "DEPS", "MISC")
"""The columns of CoNLL-U."""
_COMMENT = re.compile(r"#[^\t]*\s\S*=")
"""Before a sentence, such as `# id 7 domain=en`."""


class _Places(NamedTuple):
    """The columns of the word and the tag, from 0; -1 is the last, and None stands for no tags."""

    word: int
    tag: int | None
    is_universal: bool
    """True for CoNLL-U, whose lines begin with a number, and whose FORM and UPOS are the second and fourth column."""


def is_conll(path: Path) -> bool:
    """Return whether a file has one word per line, by its name."""
    return path.suffix.lower() in _ENDINGS


def read_words(path: Path, source: TaskSource) -> Table:
    """Read a file with one row per sentence.

    source: --text and --label are the numbers of columns, from 1. Raises DataError, with the line.
    """
    if not is_conll(path):
        return read_own(path)
    import pandas as pd  # type: ignore[import-untyped]

    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8. Convert it from its encoding: iconv -f ENCODING -t utf-8") from error
    places = _places(path, source)
    is_test = str(path) == source.test
    if is_test and not places.is_universal and _width(text) <= max(1, places.tag or 0):  # a test set may lack tags
        places = places._replace(tag=None)
    sentences = list(_sentences(text, path, places))
    if not sentences:
        raise DataError(f"{path} has no words. Each line needs a word and its tag, and sentences end at an empty line.")
    columns = {TOKEN_COLUMNS[0]: [words for words, _ in sentences]}
    if sentences[0][1]:
        columns[TAG_COLUMNS[0]] = [tags for _, tags in sentences]
    elif not is_test:
        raise DataError(
            f"{path} has one column, so its words have no tags. Give a file with a word and a tag per line."
        )
    return Table(str(path), pd.DataFrame(columns))


def _places(path: Path, source: TaskSource) -> _Places:
    is_universal = path.suffix.lower() == ".conllu"
    places = {"text": 1, "label": 3} if is_universal else {"text": 0, "label": -1}
    for role, given in (("text", source.text), ("label", source.label)):
        if given is not None:
            number = _UNIVERSAL.index(given) + 1 if is_universal and given in _UNIVERSAL else given
            if not str(number).isdigit() or number == "0":
                names = f", or one of {', '.join(_UNIVERSAL)}" if is_universal else ""
                raise DataError(f"{path}: --{role} is the number of a column, counted from 1{names}, not '{given}'.")
            places[role] = int(number) - 1
    return _Places(places["text"], places["label"], is_universal)


def _sentences(text: str, path: Path, places: _Places) -> Iterator[tuple[list[str], list[str]]]:
    """Yield each sentence's words and tags; no tags if the file has a single column."""
    words, tags = list[str](), list[str]()
    widest = 0
    for number, line in enumerate([*text.split("\n"), ""], 1):
        fields = _fields(line)
        if not any(fields) or fields[0] == "-DOCSTART-":
            if words:
                yield words, tags
            words, tags = [], []
            continue
        if not words and _COMMENT.match(line):
            continue
        if places.is_universal and (line.startswith("#") or not fields[0].isdigit()):  # comments, 1-2 and 1.1
            continue
        if places.word >= len(fields):
            raise _too_narrow(path, number, len(fields), places.word)
        if not fields[places.word]:
            raise DataError(f"{path}, line {number}: the word is empty. Remove the line, or correct it.")
        words.append(fields[places.word])
        if places.tag is not None and places.tag >= len(fields):
            raise _too_narrow(path, number, len(fields), places.tag)
        if widest and len(fields) != widest:
            raise DataError(
                f"{path}, line {number}: {len(fields)} columns, but earlier lines have {widest}. Correct it."
            )
        widest = len(fields)
        if places.tag is not None and len(fields) > 1:
            tags.append(fields[places.tag])


def _width(text: str) -> int:
    """Return the number of columns of the first line with words."""
    lines = (line for line in text.split("\n") if not _COMMENT.match(line))
    return next((len(fields) for fields in map(_fields, lines) if any(fields)), 0)


def _fields(line: str) -> list[str]:
    """Return the columns of a line, which are separated by tabs or spaces; other white space belongs to the words."""
    line = line.strip("\r")
    if "\t" in line:
        return [field.strip(" ") for field in line.split("\t")]
    return line.strip(" ").split() if line.isascii() else [field for field in line.split(" ") if field]


def _too_narrow(path: Path, number: int, columns: int, place: int) -> DataError:
    return DataError(
        f"{path}, line {number}: it has {columns} column(s), but column {place + 1} is needed. Correct the line, or "
        f"choose other columns with --text N and --label N."
    )
