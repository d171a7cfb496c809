"""Data files as other people publish them: those beside the checkout, and stand-ins that are written here.

A test that takes the fixture `data_files` runs on the stand-ins everywhere, and again on the real files where they are
beside the checkout.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import BertWordPieceTokenizer

from tests.glue_files import write_official

_PLACES = ("Lindau", "Arendal", "Sibenik", "Cromarty", "Paimpol", "Hanko", "Piran", "Sète")
_KINDS = ("lighthouse", "harbour", "mill", "library", "ferry", "market hall")
_PEOPLE = ("Ada Brandt", "Jonas Vik", "Mara Kovač", "Hector Ross", "Yann Le Goff", "Aino Salmi")
_NUMBERS = ("two", "three", "four", "five", "six", "seven")


@dataclass(frozen=True)
class DataFiles:
    """A folder of data files."""

    path: Path
    is_real: bool

    @property
    def glue(self) -> Path:
        """CoLA, MRPC, STS-B and WNLI whole, QNLI without its training file, and MNLI's dev set as JSON lines."""
        return self.path / "glue"

    @property
    def squad(self) -> Path:
        """A part of SQuAD's training file, and one of its dev file."""
        return self.path / "squad"

    @property
    def vocabulary(self) -> Path:
        """An uncased vocab.txt of WordPieces."""
        return self.path / "vocab" / "bert-uncased-vocab.txt"

    @property
    def wikipedia(self) -> Path:
        """A file of articles as WikiExtractor writes it."""
        return self.path / "corpora" / "enwiki2015" / "wiki_00"

    @property
    def german(self) -> Path:
        """A folder with a text, de.txt, and a tokenizer that lowercases and keeps accents."""
        return self.path / "reported" / "01-accents"

    @property
    def unspaced(self) -> Path:
        """A text in a script without spaces between words."""
        return self.path / "reported" / "02-unspaced" / "unspaced.txt"

    def rows(self, path: str, header: bool = True) -> int:
        """Return the number of rows of one of GLUE's tables."""
        return len((self.glue / path).read_bytes().splitlines()) - header


def write_stand_ins(folder: Path) -> DataFiles:
    """Write small files of the same formats and names, with the same quirks, and return them."""
    files, articles = DataFiles(folder, is_real=False), list(_articles())
    for path in (files.squad, files.vocabulary.parent, files.wikipedia.parent, files.german, files.unspaced.parent):
        path.mkdir(parents=True)
    for name in ("cola", "mrpc", "sts-b", "wnli", "qnli"):
        write_official(files.glue, name, bom=name == "mrpc")
    (files.glue / "QNLI" / "train.tsv").unlink()
    (files.glue / "MNLI").mkdir()
    labels = ("entailment", "neutral", "contradiction")
    lines = [
        {"premise": context, "hypothesis": qas[index % len(qas)]["question"], "label": labels[index % 3]}
        for index, (_, context, qas) in enumerate(articles)
    ]
    _write(files.glue / "MNLI" / "dev_matched.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    half = len(articles) // 2
    _write(files.squad / "train-v1.1.subset.json", json.dumps(_squad(articles[:half], answers=1)))
    _write(files.squad / "dev-v1.1.part1.json", json.dumps(_squad(articles[half:], answers=3)))
    blocks = (
        f'<doc id="{index}" url="https://example.org/?curid={index}" title="{title}">\n{title}\n\n{context}\n\n</doc>\n'
        for index, (title, context, _) in enumerate(articles)
    )
    _write(files.wikipedia, "".join(blocks))
    _write_vocabulary(files.vocabulary, [context for _, context, _ in articles], lowercase=True, strip_accents=True)
    german = [f"Der {a} Käse für {b} Bäume war größer." for a in ("große", "süße", "kühle") for b in ("schöne", "öde")]
    _write(files.german / "de.txt", "\n".join(german * 20) + "\n")
    _write(files.german / "tokenizer_config.json", json.dumps({"do_lower_case": True, "strip_accents": False}))
    _write_vocabulary(files.german / "vocab.txt", german * 20, lowercase=True, strip_accents=False)
    rng = random.Random(0)
    thai = [chr(code) for code in range(0x0E01, 0x0E2F)]
    _write(files.unspaced, "".join("".join(rng.choices(thai, k=240)) + "\n" for _ in range(100)))
    return files


def _write(path: Path, text: str) -> None:
    path.write_text(text, "utf8")


def _articles() -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Yield (title, context, questions with one answer each), all different."""
    rng = random.Random(0)
    for place in _PLACES:
        for kind in _KINDS:
            person, number, year = rng.choice(_PEOPLE), rng.choice(_NUMBERS), str(rng.randrange(1750, 1950))
            context = (
                f'The old {kind} of {place} was built in {year} by {person}, who called it "the pride of {place}". It '
                f"has {number} rooms, and {number} more were added later.\nNobody has lived there since the war."
            )
            asked = {
                f"When was the {kind} of {place} built?": year,
                f"Who built the {kind} in {place}?": person,
                "How many rooms does it have?": number,
                "What did its builder call it?": f"the pride of {place}",
            }
            qas = [
                {
                    "id": f"{place}-{kind}-{index}",
                    "question": question,
                    "answers": [{"text": answer, "answer_start": context.index(answer)}],
                }
                for index, (question, answer) in enumerate(asked.items())
            ]
            yield f"{kind.capitalize()} of {place}", context, qas


def _squad(articles: list[tuple[str, str, list[dict[str, Any]]]], answers: int) -> dict[str, Any]:
    """answers: how many people have answered each question."""
    data = [
        {
            "title": title,
            "paragraphs": [{"context": context, "qas": [qa | {"answers": qa["answers"] * answers} for qa in qas]}],
        }
        for title, context, qas in articles
    ]
    return {"data": data, "version": "1.1"}


def _write_vocabulary(path: Path, texts: list[str], *, lowercase: bool, strip_accents: bool) -> None:
    trained = BertWordPieceTokenizer(lowercase=lowercase, strip_accents=strip_accents)
    trained.train_from_iterator(texts, vocab_size=400, min_frequency=1, show_progress=False)
    ids = trained.get_vocab()
    _write(path, "\n".join(sorted(ids, key=ids.__getitem__)) + "\n")
