"""Collect predictions of GLUE's test sets into the zip that gluebenchmark.com takes."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from electra_ds.core.errors import CheckpointError, ConfigError
from electra_ds.core.files import complete_file

_HEADER = "index\tprediction"
_NUMBERS = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_INFERENCE = ("entailment", "neutral", "contradiction")
_HIGHEST_SIMILARITY = 5
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)
"""The same predictions make the same zip."""


@dataclass(frozen=True)
class _Official:
    rows: int
    """The size of the test set."""
    words: tuple[str, ...] | None
    """The possible predictions; None for a similarity, 0 to 5."""


OFFICIAL = {
    "CoLA.tsv": _Official(1_063, _NUMBERS),
    "SST-2.tsv": _Official(1_821, _NUMBERS),
    "MRPC.tsv": _Official(1_725, _NUMBERS),
    "STS-B.tsv": _Official(1_379, None),
    "QQP.tsv": _Official(390_965, _NUMBERS),
    "MNLI-m.tsv": _Official(9_796, _INFERENCE),
    "MNLI-mm.tsv": _Official(9_847, _INFERENCE),
    "QNLI.tsv": _Official(5_463, _ENTAILMENT),
    "RTE.tsv": _Official(3_000, _ENTAILMENT),
    "WNLI.tsv": _Official(146, _NUMBERS),
    "AX.tsv": _Official(1_104, _INFERENCE),
}
"""The files of a submission, and how many rows their test sets have."""


def zip_submission(runs: Sequence[Path], out: Path, *, fill_wnli: bool = False) -> list[str]:
    """Write RUN/submission/*.tsv of all runs into one zip; notes say what is in it and what is missing.

    With `fill_wnli`, a missing WNLI.tsv answers 0 to all, its larger class. The zip appears complete or not at all.
    Raises ConfigError if two runs bring the same file or none brings any, and CheckpointError if a file is not
    what the site takes or the zip cannot be written.
    """
    found, ignored = _find(runs)
    if not found:
        raise ConfigError(
            f"None of {', '.join(map(str, runs)) or 'no runs'} has predictions of a GLUE test set in submission/. "
            f"Predict the test sets when finetuning."
        )
    contents = {name: _checked(path) for name, path in found.items()}
    notes = [f"{path} is none of GLUE's files and is left out" for path in ignored]
    if fill_wnli and "WNLI.tsv" not in contents:
        rows = OFFICIAL["WNLI.tsv"].rows
        contents["WNLI.tsv"] = "\n".join([_HEADER, *(f"{row}\t0" for row in range(rows)), ""]).encode()
        notes.append(f"WNLI.tsv answers 0, the larger class, to all {rows}: no run predicted it")
    _write(out, contents)
    missing = [name for name in OFFICIAL if name not in contents]
    told = f"; the site refuses it without {', '.join(missing)}" if missing else ", as the site wants them"
    return [*notes, f"{out} has {len(contents)} of {len(OFFICIAL)} files{told}"]


def _find(runs: Sequence[Path]) -> tuple[dict[str, Path], list[Path]]:
    """Return (GLUE's files by name, others)."""
    found: dict[str, Path] = {}
    ignored = []
    for run in {path.resolve(): path for path in runs}.values():
        for path in sorted((run / "submission").glob("*.tsv")):
            if path.name not in OFFICIAL:
                ignored.append(path)
            elif path.name in found:
                raise ConfigError(
                    f"{found[path.name]} and {path} are the same file of a submission. Give one run for each task."
                )
            else:
                found[path.name] = path
    return found, ignored


def _checked(path: Path) -> bytes:
    """Return the file's content. Raises CheckpointError with the line that the site would not take."""
    official = OFFICIAL[path.name]
    advice = "Predict it anew."
    try:
        content = path.read_bytes()
        lines = content.decode("utf8").removesuffix("\n").split("\n")
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text. {advice}") from error
    if lines[0] != _HEADER:
        raise CheckpointError(f"{path} begins with {lines[0][:40]!r} instead of {_HEADER!r}. {advice}")
    for index, line in enumerate(lines[1:]):
        cells = line.split("\t")
        if len(cells) != 2 or cells[0] != str(index) or not _is_prediction(cells[1], official.words):
            wanted = f"0 to {_HIGHEST_SIMILARITY}" if official.words is None else " or ".join(official.words)
            raise CheckpointError(
                f"{path}, line {index + 2}: {line[:60]!r} is not index {index}, a tab and {wanted}. {advice}"
            )
    if len(lines) - 1 != official.rows:
        raise CheckpointError(
            f"{path} has {len(lines) - 1:,} predictions, and the test set {official.rows:,} rows. {advice}"
        )
    return content


def _is_prediction(word: str, words: tuple[str, ...] | None) -> bool:
    if words is not None:
        return word in words
    try:
        value = float(word)
    except ValueError:
        return False
    return math.isfinite(value) and 0 <= value <= _HIGHEST_SIMILARITY


def _write(out: Path, contents: dict[str, bytes]) -> None:
    with complete_file(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as file:
        for name in OFFICIAL:
            if name in contents:
                entry = zipfile.ZipInfo(name, _ZIP_DATE)
                file.writestr(entry, contents[name], zipfile.ZIP_DEFLATED)
