"""Read SQuAD 1.1 and 2.0 as lists of questions, from the official JSON files or the Hub's tables.

The files have the layout of https://rajpurkar.github.io/SQuAD-explorer: data -> paragraphs -> qas.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from electra_ds.core.errors import DataError
from electra_ds.data.hub import dataset_path, explain_errors
from electra_ds.finetuning.own_files import own_name

SquadName = Literal["squad1", "squad2"]

VERSIONS: dict[SquadName, str] = {"squad1": "1.1", "squad2": "2.0"}
OFFICIAL_ROWS: dict[SquadName, dict[str, int]] = {
    "squad1": {"train": 87599, "dev": 10570},
    "squad2": {"train": 130319, "dev": 11873},
}
"""The numbers of questions in the published files."""
NOT_FOUND = -1
"""The offset of an answer that does not occur in its context."""
_LINK = "https://rajpurkar.github.io/SQuAD-explorer"


@dataclass(frozen=True)
class Question:
    """One question about one paragraph."""

    id: str
    title: str
    question: str
    context: str
    answers: tuple[str, ...]
    """The accepted answers, empty if the question is impossible.

    An answer is spelled as in its context, so it ends at its offset plus its length. One that does not occur there is
    spelled as in the data.
    """
    starts: tuple[int, ...]
    """The character offset of each answer, NOT_FOUND for one that does not occur in the context."""
    is_impossible: bool = False

    @property
    def is_lost(self) -> bool:
        """True if there are answers but none of them occurs in the context."""
        return bool(self.starts) and max(self.starts) == NOT_FOUND


@dataclass(frozen=True)
class SquadData:
    """One of the two data sets, or a part of it."""

    name: SquadName
    train: list[Question]
    """Training questions, without those that have no answer in the context; empty if there was no training file."""
    dev: list[Question]
    source: str
    fingerprint: str
    """The SHA-256 of what was read."""
    notes: tuple[str, ...] = ()
    """Notes on what was wrong with the data and how it was handled, one sentence each."""
    title: str | None = None
    """The name of a task of the user's own, in one of the two formats."""
    labels: tuple[str, ...] = ()

    @property
    def sizes(self) -> Mapping[str, int]:
        """The number of questions of each set."""
        return {"train": len(self.train), "dev": len(self.dev)}


def load_squad(name: SquadName, folder: Path) -> SquadData:
    """Read the official files train-v1.1.json and dev-v1.1.json (for squad2, v2.0), or parts of them.

    If a file is missing, the only one that matches train*v1.1*.json or dev*v1.1*.json is used. The training file is
    optional. Raises DataError if there is no dev file or several, or if a file is broken or another data set's.
    """
    version = VERSIONS[name]
    if not folder.is_dir():
        raise DataError(
            f"The folder {folder} does not exist. Put train-v{version}.json and dev-v{version}.json of {_LINK} there."
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
    """Read a data set from the Hub such as rajpurkar/squad or rajpurkar/squad_v2, or a folder with the same layout.

    Its splits are validation and, optionally, train. A question without answers is impossible. Raises DataError if it
    cannot be downloaded or has another layout.
    """
    path = dataset_path(repository, revision)
    source = f"{repository}{f', revision {revision}' if revision else ''}"
    with explain_errors(source, "It must have the layout of rajpurkar/squad."):
        import datasets

        tables = datasets.load_dataset(path, revision=revision)
    if "validation" not in tables:
        raise DataError(f"{source} has no split 'validation'; its splits are {', '.join(map(str, tables))}.")
    digest = hashlib.sha256(name.encode())
    train = _rows(tables["train"], f"{source}, train", name, digest.update) if "train" in tables else []
    dev = _rows(tables["validation"], f"{source}, validation", name, digest.update)
    return _checked(SquadData(name, train, dev, source, digest.hexdigest()))


def load_own_squad(train: Path, dev: Path) -> SquadData:
    """Read the user's own questions in SQuAD's layout, as SQuAD 2.0 if any question is impossible. Raises DataError."""
    digest = hashlib.sha256()
    train_questions, dev_questions = (_read(path, "squad2", digest.update) for path in (train, dev))
    has_impossible = any(question.is_impossible for question in (*train_questions, *dev_questions))
    return _checked(
        SquadData(
            "squad2" if has_impossible else "squad1",
            train_questions,
            dev_questions,
            f"{train} and {dev}",
            digest.hexdigest(),
            title=f"question-answering-{own_name(train)}",
        )
    )


def _file(folder: Path, part: str, version: str) -> Path | None:
    official = folder / f"{part}-v{version}.json"
    if official.is_file():
        return official
    found = sorted(path for path in folder.glob(f"{part}*v{version}*.json") if path.is_file())
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{folder} has several files for {part}: {names}. Keep one, or name it {official.name}.")
    return found[0] if found else None


def _read(path: Path, name: SquadName, take: Callable[[bytes], object]) -> list[Question]:
    try:
        content = path.read_bytes()
        document = json.loads(content.decode("utf-8-sig"))
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON, or is cut off ({error}). Download it again from {_LINK}.") from error
    take(hashlib.sha256(content).digest())
    questions: list[Question] = []
    with _in_layout(str(path), questions):
        for article in document["data"]:
            for paragraph in article["paragraphs"]:
                for record in paragraph["qas"]:
                    answers = [(_clean(answer["text"]), answer["answer_start"]) for answer in record["answers"]]
                    is_impossible = bool(record.get("is_impossible", name == "squad2" and not answers))
                    texts = (record["id"], article.get("title", ""), record["question"], paragraph["context"])
                    questions.append(_question(name, str(path), texts, answers, is_impossible))
    return questions


def _rows(table: Any, source: str, name: SquadName, take: Callable[[bytes], object]) -> list[Question]:
    questions: list[Question] = []
    with _in_layout(source, questions):
        for row in table:
            found = row["answers"]
            answers = list(zip(map(_clean, found["text"]), found["answer_start"], strict=True))
            texts = (row["id"], row["title"], row["question"], row["context"])
            question = _question(name, source, texts, answers, name == "squad2" and not answers)
            take(json.dumps([question.id, question.title, question.context, question.question, answers]).encode())
            questions.append(question)
    return questions


@contextmanager
def _in_layout(source: str, questions: list[Question]) -> Iterator[None]:
    """Raise DataError if the data have another layout. questions: those read so far."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        place = f"after question {questions[-1].id}" if questions else "at the first question"
        raise DataError(
            f"{source}: not in SQuAD's layout {place} ({type(error).__name__}: {error}). See {_LINK}."
        ) from error


def _question(
    name: SquadName, source: str, texts: tuple[str, str, str, str], answers: list[tuple[str, int]], is_impossible: bool
) -> Question:
    """Return a question with its answers as given. texts: id, title, question, context."""
    where = f"{source}, question {texts[0]}"
    if is_impossible and name == "squad1":
        raise DataError(f"{where} is impossible, which SQuAD 1.1 does not have. Is it SQuAD 2.0 (squad2)?")
    if is_impossible == bool(answers):
        problem = "is impossible but has answers" if answers else "has no answers. Is it a hidden test set?"
        raise DataError(f"{where} {problem}")
    starts = tuple(start + 0 for _, start in answers)  # raises TypeError if a start is not a number
    identity, title, question, context = map(_clean, texts)
    return Question(identity, title, question, context, tuple(text for text, _ in answers), starts, is_impossible)


def _checked(data: SquadData) -> SquadData:
    """Return the data with each answer located in its context, and with notes.

    Training questions without an answer in the context are left out. Raises DataError if an id occurs twice.
    """
    ids = Counter(question.id for question in (*data.train, *data.dev))
    if repeated := [identity for identity, count in ids.items() if count > 1]:
        raise DataError(f"{data.source}: two questions have the id {repeated[0]}. Give each file once.")
    notes = []
    for part, questions in (("train", data.train), ("dev", data.dev)):
        rows = OFFICIAL_ROWS[data.name][part]
        if len(questions) != rows and data.title is None:
            notes.append(f"{part} has {len(questions):,} questions, the published file of {data.name} has {rows:,}.")
    train, dev = ([_located(question) for question in part] for part in (data.train, data.dev))
    before, after = _answers([*data.train, *data.dev]), _answers([*train, *dev])
    if moved := sum(old != new and new[1] != NOT_FOUND for old, new in zip(before, after, strict=True)):
        notes.append(f"{moved} answers are not at their offsets; the nearest occurrence is used.")
    if lost := sum(start == NOT_FOUND for _, start in after):
        notes.append(f"{lost} answers do not occur in their contexts; they count only when predictions are scored.")
    if dropped := [question.id for question in train if question.is_lost]:
        shown = f"{', '.join(dropped[:3])}{', …' if len(dropped) > 3 else ''}"
        notes.append(
            f"{len(dropped)} training questions are left out, because no answer occurs in the context ({shown})."
        )
    return replace(data, train=[question for question in train if not question.is_lost], dev=dev, notes=tuple(notes))


def _answers(questions: list[Question]) -> list[tuple[str, int]]:
    return [answer for each in questions for answer in zip(each.answers, each.starts, strict=True)]


def _located(question: Question) -> Question:
    found = [locate(*answer, question.context) for answer in zip(question.answers, question.starts, strict=True)]
    return replace(question, answers=tuple(text for text, _ in found), starts=tuple(start for _, start in found))


def locate(answer: str, start: int, context: str) -> tuple[str, int]:
    """Return (the answer as the context spells it, its offset).

    The answer is taken at `start` if it occurs there, else at its nearest occurrence, perhaps with other whitespace.
    If the context does not contain it, return the answer as given and NOT_FOUND.
    """
    if answer and start >= 0 and answer == answer.strip() and context.startswith(answer, start):
        return answer, start
    pieces = answer.split()
    if not pieces:
        return answer, NOT_FOUND
    # A look-ahead, so that occurrences may overlap.
    spelling = re.compile("(?=(" + r"\s+".join(map(re.escape, pieces)) + "))")
    nearest = min(spelling.finditer(context), key=lambda match: abs(match.start() - start), default=None)
    return (nearest[1], nearest.start()) if nearest else (answer, NOT_FOUND)


def _clean(text: str) -> str:
    return text.encode("utf8", "replace").decode("utf8")  # replaces lone surrogates and keeps the length
