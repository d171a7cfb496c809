"""GLUE's tasks in their official files, with made-up rows whose texts are hard to read."""

from __future__ import annotations

import random
from pathlib import Path

from electra_ds.finetuning.glue import GLUE, OFFICIAL_ROWS

FOLDERS = {
    "cola": "CoLA", "sst-2": "SST-2", "mrpc": "MRPC", "sts-b": "STS-B", "qqp": "QQP",
    "mnli": "MNLI", "qnli": "QNLI", "rte": "RTE", "wnli": "WNLI",
}  # fmt: skip
PARSES = ["sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse"]
MNLI_HEADER = ["index", "promptID", "pairID", "genre", *PARSES, "sentence1", "sentence2"]
STS_HEADER = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2"]
TRICKY = [
    'He said "no.',
    '"Quoted" at first',
    "A\u2028B\u0085C",
    " spaces  ",
    "Größe 日本",
    "",
    "it's",
    "\\N \\t \ufeff",
]

Row = tuple[str, str, float]
"""(text, second text, class index or score)."""


def sets_of(name: str) -> list[str]:
    return list(OFFICIAL_ROWS[name])


def rows_for(name: str, set_name: str, count: int = 12) -> list[Row]:
    generator = random.Random(f"{name} {set_name}")
    classes = len(GLUE[name].labels)

    def text() -> str:
        return f"{generator.choice(TRICKY)} {generator.getrandbits(40):x}{generator.choice(TRICKY)}"

    return [
        (text(), text(), index % classes if classes else round(generator.uniform(0, 5), 3)) for index in range(count)
    ]


def official_table(name: str, set_name: str, rows: list[Row]) -> tuple[list[str] | None, list[list[str]]]:
    """(header, rows) as GLUE's own files have them."""
    task, is_test = GLUE[name], set_name.startswith("test") or set_name == "ax"
    labels = ["" if is_test else task.written[int(y)] if task.labels else f"{y:.3f}" for _, _, y in rows]
    triples = [(a, b, label) for (a, b, _), label in zip(rows, labels, strict=True)]
    if name in ("cola", "sst-2"):
        if is_test:
            return ["index", "sentence"], [[str(i), a] for i, (a, _, _) in enumerate(triples)]
        if name == "cola":
            return None, [["gj04", label, "" if label == "1" else "*", a] for a, _, label in triples]
        return ["sentence", "label"], [[a, label] for a, _, label in triples]
    if name == "mrpc":
        first = "index" if is_test else "Quality"
        header = [first, "#1 ID", "#2 ID", "#1 String", "#2 String"]
        return header, [
            [str(i) if is_test else label, f"{i}1", f"{i}2", a, b] for i, (a, b, label) in enumerate(triples)
        ]
    if name == "qqp":
        if is_test:
            return ["id", "question1", "question2"], [[str(i), a, b] for i, (a, b, _) in enumerate(triples)]
        header = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
        return header, [[f"{i + 700}", "1", "2", a, b, label] for i, (a, b, label) in enumerate(triples)]
    if set_name == "labelled ax":
        header = ["Lexical Semantics", "Predicate-Argument Structure", "Logic", "Knowledge", "Domain"]
        return [*header, "Premise", "Hypothesis", "Label"], [["", "", "Negation", "", "News", *t] for t in triples]
    header, annotations = (["index", "sentence1", "sentence2"], [])
    last = ["label"]
    if name == "mnli" and set_name != "ax":
        header, annotations = MNLI_HEADER, ["x"] * 7
        last = [*(f"label{i}" for i in range(1, 2 if set_name == "train" else 6)), "gold_label"]
    elif name == "sts-b":
        header, annotations, last = STS_HEADER, ["none"] * 6, ["score"]
    elif name == "qnli":
        header = ["index", "question", "sentence"]
    full = header if is_test else [*header, *last]
    return full, [
        [str(i), *annotations, a, b, *([] if is_test else ["neutral"] * (len(last) - 1) + [label])]
        for i, (a, b, label) in enumerate(triples)
    ]


def write_tsv(path: Path, table: tuple[list[str] | None, list[list[str]]], end: str = "\n", bom: bool = False) -> None:
    header, rows = table
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(row) + end for row in ([header] if header else []) + rows]
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + "".join(lines).encode())


def official_file(name: str, set_name: str) -> str:
    return "../diagnostic/diagnostic.tsv" if set_name == "ax" else f"{set_name}.tsv"


def write_official(folder: Path, name: str, end: str = "\n", bom: bool = False) -> dict[str, list[Row]]:
    """Every set of the task in its folder's official name; returns the rows."""
    all_rows = {set_name: rows_for(name, set_name) for set_name in sets_of(name)}
    (folder / FOLDERS[name]).mkdir(parents=True, exist_ok=True)
    for set_name, rows in all_rows.items():
        path = (folder / FOLDERS[name] / official_file(name, set_name)).resolve()
        write_tsv(path, official_table(name, set_name, rows), end, bom)
    return all_rows
