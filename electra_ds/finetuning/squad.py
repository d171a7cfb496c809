"""SQuAD 1.1 and 2.0: the official JSON files, or the Hub's tables, as lists of questions.

The files' layout is that of https://rajpurkar.github.io/SQuAD-explorer: data -> paragraphs -> qas.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import datasets  # type: ignore[import-untyped]

from electra_ds.core.errors import DataError
from electra_ds.data.hub import dataset_path, explained

SquadName = Literal["squad1", "squad2"]

VERSIONS: dict[SquadName, str] = {"squad1": "1.1", "squad2": "2.0"}
OFFICIAL_ROWS: dict[SquadName, dict[str, int]] = {
    "squad1": {"train": 87599, "dev": 10570},
    "squad2": {"train": 130319, "dev": 11873},
}
"""The numbers of questions in the published files."""
NOT_FOUND = -1
"""The offset of an answer that is not in its context."""
_COLUMNS = ("id", "title", "context", "question", "answers")
_KINDS = {str: "text", list: "a list", dict: "an object", int: "a whole number"}
_LINK = "https://rajpurkar.github.io/SQuAD-explorer"


@dataclass(frozen=True)
class Question:
    """One question about one paragraph."""

    id: str
    title: str
    question: str
    context: str
    answers: tuple[str, ...]
    """The accepted answers as they are in the context, so that one ends at its offset plus its length; one that is not
    there, as it was written. Empty if the question is impossible."""
    starts: tuple[int, ...]
    """A character offset for each answer; NOT_FOUND for one that is not in the context."""
    is_impossible: bool = False

    @property
    def is_lost(self) -> bool:
        """True if there are answers and none of them is in the context."""
        return bool(self.starts) and max(self.starts) == NOT_FOUND


@dataclass(frozen=True)
class SquadData:
    """One of the two data sets, or a part of it."""

    name: SquadName
    train: list[Question]
    """The training questions without those of `dropped`; empty if there was no such file."""
    dev: list[Question]
    source: str
    fingerprint: str
    """SHA-256 of what was read."""
    dropped: tuple[str, ...] = ()
    """Ids of training questions none of whose answers is in the context."""
    moved: int = 0
    """The number of answers found at other offsets than given, or with other whitespace."""
    lost: int = 0
    """The number of answers not found, those of the dropped questions included."""


def load_squad(name: SquadName, folder: Path) -> SquadData:
    """Read the official files train-v1.1.json and dev-v1.1.json (for squad2, v2.0), or parts of them: if a file is
    missing, the only one whose name is like train*v1.1*.json is taken. A training file need not be there.

    Raises DataError if there is no dev file or several, and for one that is broken or another data set's.
    """
    version = VERSIONS[name]
    if not folder.is_dir():
        raise DataError(
            f"There is no folder {folder}. Put train-v{version}.json and dev-v{version}.json of {_LINK} there."
        )
    dev = _file(folder, "dev", version)
    if dev is None:
        there = ", ".join(sorted(path.name for path in folder.glob("*.json"))) or "none"
        raise DataError(
            f"{folder} has no dev-v{version}.json for {name}; the JSON files there: {there}. Get it from {_LINK}."
        )
    train = _file(folder, "train", version)
    digest = hashlib.sha256(name.encode())
    train_questions = _read(train, name, digest.update) if train else []
    dev_questions = _read(dev, name, digest.update)
    source = " and ".join(str(path) for path in (train, dev) if path)
    return _checked(SquadData(name, train_questions, dev_questions, source, digest.hexdigest()))


def load_squad_hub(name: SquadName, repository: str, revision: str | None = None) -> SquadData:
    """Read a data set of the Hub such as rajpurkar/squad or rajpurkar/squad_v2, or a folder laid out as there.

    Its splits are train, which need not be there, and validation; a question without answers is impossible. Raises
    DataError if it cannot be fetched or is laid out otherwise.
    """
    path = dataset_path(repository, revision)
    source = f"{repository}{f', revision {revision}' if revision else ''}"
    with explained(source, "It must be laid out as rajpurkar/squad is."):
        tables = datasets.load_dataset(path, revision=revision)
    if "validation" not in tables:
        raise DataError(f"{source} has no split 'validation'; its splits are {', '.join(map(str, tables))}.")
    digest = hashlib.sha256(name.encode())
    train = _rows(tables["train"], f"{source}, train", name, digest.update) if "train" in tables else []
    dev = _rows(tables["validation"], f"{source}, validation", name, digest.update)
    return _checked(SquadData(name, train, dev, source, digest.hexdigest()))


def notes(data: SquadData) -> list[str]:
    """Return sentences on what was wrong with the data and what was done about it."""
    said = []
    if data.moved:
        said.append(f"{data.moved} answers are not at their offsets; the nearest place was taken.")
    if data.lost:
        said.append(f"{data.lost} answers are not in their contexts; they only count when predictions are judged.")
    if data.dropped:
        shown = f"{', '.join(data.dropped[:3])}{', …' if len(data.dropped) > 3 else ''}"
        said.append(f"{len(data.dropped)} training questions are left out: no answer is in the context ({shown}).")
    return said


def differing_rows(data: SquadData) -> list[str]:
    """Return a sentence for each part without the published number of questions. Dropped ones count as read."""
    read = {"train": len(data.train) + len(data.dropped), "dev": len(data.dev)}
    return [
        f"{part} has {read[part]:,} questions, the published file of {data.name} {rows:,}."
        for part, rows in OFFICIAL_ROWS[data.name].items()
        if read[part] != rows
    ]


def _file(folder: Path, part: str, version: str) -> Path | None:
    official = folder / f"{part}-v{version}.json"
    if official.is_file():
        return official
    found = sorted(path for path in folder.glob(f"{part}*v{version}*.json") if path.is_file())
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{folder} has several files for {part}: {names}. Leave one, or name it {official.name}.")
    return found[0] if found else None


def _read(path: Path, name: SquadName, take: Callable[[bytes], object]) -> list[Question]:
    try:
        content = path.read_bytes()
        document = json.loads(content.decode("utf-8-sig"))
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON, or is cut off ({error}). Download it again from {_LINK}.") from error
    take(hashlib.sha256(content).digest())
    return list(_questions(document, str(path), name))


def _questions(document: Any, path: str, name: SquadName) -> Iterator[Question]:
    for article, where in _records(document, "data", path, "article"):
        title = _clean(article.get("title", ""))
        for paragraph, here in _records(article, "paragraphs", where, "paragraph"):
            context = _text(paragraph, "context", here)
            for record, at in _records(paragraph, "qas", here, "question"):
                answers = [
                    (_text(answer, "text", spot), _field(answer, "answer_start", int, spot))
                    for answer, spot in _records(record, "answers", at, "answer")
                ]
                is_impossible = record.get("is_impossible", name == "squad2" and not answers)
                if not isinstance(is_impossible, bool):
                    raise DataError(f"{at}: 'is_impossible' is {is_impossible!r}, and not true or false.")
                identity, question = _text(record, "id", at), _text(record, "question", at)
                yield _question(name, at, (identity, title, question, context), answers, is_impossible)


def _rows(table: Any, where: str, name: SquadName, take: Callable[[bytes], object]) -> list[Question]:
    if missing := [column for column in _COLUMNS if column not in table.column_names]:
        there = ", ".join(table.column_names)
        raise DataError(
            f"{where}: no column '{missing[0]}'; its columns are {there}. Choose a data set in SQuAD's layout."
        )
    questions = []
    for number, row in enumerate(table, 1):
        at = f"{where}, row {number}"
        identity, title, context, question = (_text(row, column, at) for column in _COLUMNS[:-1])
        answers = _field(row, "answers", dict, at)
        texts, starts = _field(answers, "text", list, at), _field(answers, "answer_start", list, at)
        if len(texts) != len(starts):
            raise DataError(f"{at}: {len(texts)} answers but {len(starts)} offsets. Download the data set again.")
        pairs = [
            (_text({"text": text}, "text", at), _field({"answer_start": start}, "answer_start", int, at))
            for text, start in zip(texts, starts, strict=True)
        ]
        take(json.dumps([identity, title, context, question, pairs]).encode())
        questions.append(
            _question(name, at, (identity, title, question, context), pairs, name == "squad2" and not pairs)
        )
    return questions


def _question(
    name: SquadName, where: str, texts: tuple[str, str, str, str], answers: list[tuple[str, int]], is_impossible: bool
) -> Question:
    """texts: id, title, question, context. The answers are as they were given, not yet looked for."""
    if is_impossible and name == "squad1":
        raise DataError(f"{where}: an impossible question, which SQuAD 1.1 does not have. Is it SQuAD 2.0 (squad2)?")
    if is_impossible and answers:
        raise DataError(f"{where}: is_impossible, and yet there are answers. Download the data again from {_LINK}.")
    if not is_impossible and not answers:
        raise DataError(f"{where}: no answers, so nothing can be learned or judged by it. Is it a hidden test set?")
    return Question(*texts, tuple(text for text, _ in answers), tuple(start for _, start in answers), is_impossible)


def _checked(data: SquadData) -> SquadData:
    """Return the data with each answer located in its context, and without training questions that have none there.

    Raises DataError if an id occurs twice.
    """
    seen: set[str] = set()
    for question in (*data.train, *data.dev):
        if question.id in seen:
            raise DataError(f"{data.source}: two questions have the id {question.id}. Take each file once.")
        seen.add(question.id)
    train, dev = ([_located(question) for question in part] for part in (data.train, data.dev))
    pairs = [
        pair
        for before, after in zip((*data.train, *data.dev), (*train, *dev), strict=True)
        for pair in zip(_answers(before), _answers(after), strict=True)
    ]
    return replace(
        data,
        train=[question for question in train if not question.is_lost],
        dev=dev,
        dropped=tuple(question.id for question in train if question.is_lost),
        moved=sum(before != after and after[1] != NOT_FOUND for before, after in pairs),
        lost=sum(after[1] == NOT_FOUND for _, after in pairs),
    )


def _answers(question: Question) -> list[tuple[str, int]]:
    return list(zip(question.answers, question.starts, strict=True))


def _located(question: Question) -> Question:
    found = [locate(*answer, question.context) for answer in _answers(question)]
    return replace(question, answers=tuple(text for text, _ in found), starts=tuple(start for _, start in found))


def locate(answer: str, start: int, context: str) -> tuple[str, int]:
    """Return (the answer as it is in the context, its offset): at `start` if it is there, else at the nearest place
    where it is, perhaps with other whitespace, else the answer as given and NOT_FOUND."""
    if answer and start >= 0 and answer == answer.strip() and context.startswith(answer, start):
        return answer, start
    pieces = answer.split()
    if not pieces:
        return answer, NOT_FOUND
    # Only looked ahead at, so that occurrences may overlap.
    spelling = re.compile("(?=(" + r"\s+".join(map(re.escape, pieces)) + "))")
    nearest = min(spelling.finditer(context), key=lambda match: abs(match.start() - start), default=None)
    return (nearest[1], nearest.start()) if nearest else (answer, NOT_FOUND)


def _records(record: Any, key: str, where: str, kind: str) -> Iterator[tuple[dict[str, Any], str]]:
    """(each object of a list, where it is)."""
    for number, each in enumerate(_field(record, key, list, where), 1):
        at = f"{where}, {kind} {number}"
        if not isinstance(each, dict):
            raise DataError(f"{at}: not an object but {type(each).__name__}. Is it a file of SQuAD?")
        yield each, at


def _text(record: Any, key: str, where: str) -> str:
    return _clean(_field(record, key, str, where))


def _clean(text: Any) -> str:
    return str(text).encode("utf8", "replace").decode("utf8")  # a lone surrogate is no text; the length stays


def _field(record: Any, key: str, kind: type, where: str) -> Any:
    value = record.get(key) if isinstance(record, Mapping) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where}: '{key}' is missing or not {_KINDS[kind]}. Is it in SQuAD's layout? See {_LINK}.")
    return value
