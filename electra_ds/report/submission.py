"""Collect predictions of GLUE's test sets into the zip that gluebenchmark.com takes."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

from electra_ds.core.errors import CheckpointError, ConfigError
from electra_ds.core.files import complete_file

_HEADER = "index\tprediction"
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)
"""The same predictions make the same zip."""


OFFICIAL = {
    "CoLA.tsv": 1_063, "SST-2.tsv": 1_821, "MRPC.tsv": 1_725, "STS-B.tsv": 1_379, "QQP.tsv": 390_965,
    "MNLI-m.tsv": 9_796, "MNLI-mm.tsv": 9_847, "QNLI.tsv": 5_463, "RTE.tsv": 3_000, "WNLI.tsv": 146, "AX.tsv": 1_104,
}  # fmt: skip
"""The files of a submission, and how many rows their test sets have."""


def zip_submission(runs: Sequence[Path], out: Path) -> list[str]:
    """Write RUN/submission/*.tsv of all runs into one zip; notes say what is in it and what is missing.

    A missing WNLI.tsv answers 0 to all, its larger class. The zip appears complete or not at all.
    Raises ConfigError if two runs bring the same file or none brings any, and CheckpointError if a file has not one
    prediction for each row of its test set, or the zip cannot be written.
    """
    found, ignored = _find(runs)
    if not found:
        raise ConfigError(
            f"None of {', '.join(map(str, runs)) or 'no runs'} has predictions of a GLUE test set in submission/. "
            f"Predict the test sets when finetuning."
        )
    contents = {name: _checked(path) for name, path in found.items()}
    notes = [f"{path} is none of GLUE's files and is left out" for path in ignored]
    if "WNLI.tsv" not in contents:
        rows = OFFICIAL["WNLI.tsv"]
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
    """Return the file's content. Raises CheckpointError unless it has a prediction for each row of the test set."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    header, *lines = content.decode("utf8", "replace").removesuffix("\n").split("\n")
    indices = [line.partition("\t")[0] for line in lines]
    if header != _HEADER or indices != [str(row) for row in range(OFFICIAL[path.name])]:
        raise CheckpointError(
            f"{path} does not have one prediction for each of the test set's {OFFICIAL[path.name]:,} rows, in their "
            f"order. Predict it anew on the official test set."
        )
    return content


def _write(out: Path, contents: dict[str, bytes]) -> None:
    with complete_file(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as file:
        for name in OFFICIAL:
            if name in contents:
                entry = zipfile.ZipInfo(name, _ZIP_DATE)
                file.writestr(entry, contents[name], zipfile.ZIP_DEFLATED)
