"""Read tables of text: CSV, TSV and JSON lines, with messages that name file and row."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from electra_ds.core.errors import DataError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]  # the check of a sweep does not wait for it


@dataclass(frozen=True)
class Table:
    """A table of examples."""

    source: str
    """Its file or data set, for messages."""
    frame: pd.DataFrame

    def check_columns(self, wanted: Iterable[str | None], problems: Sequence[str] = (), advice: str = "") -> None:
        """Raise DataError if columns are missing; it names all of them, and those that are there.

        problems: further ones for the message. advice: what to do about them.
        """
        there = list(self.frame.columns)
        missing = [name for name in dict.fromkeys(wanted) if name is not None and name not in there]
        hints = (did_you_mean(name, there).removeprefix("; ") for name in missing)
        lacking = (f"no column '{name}'{hint and f' ({hint})'}" for name, hint in zip(missing, hints, strict=True))
        problems = [*lacking, *problems]
        if problems:
            columns = ", ".join(there) or "none"
            raise DataError(f"{self.source}: {'; '.join(problems)}; its columns are {columns}.{advice}")

    def column(self, name: str) -> list[str]:
        """Return a column. Raises DataError if it is missing, or if a row has no text in it."""
        self.check_columns([name])
        values = self.frame[name].tolist()
        for row, value in zip(self.frame.index, values, strict=True):
            if not isinstance(value, str):
                raise DataError(f"{self.source}, row {row + 1}: '{name}' is missing, or not one text or number.")
        return values


def read_csv(path: Path, delimiter: str) -> Table:
    """Read a file whose first line names the columns, with fields quoted as spreadsheets and pandas write them.

    Raises DataError for a file that cannot be read, and for a row that is longer or shorter than the first line.
    """
    import pandas as pd

    limit = csv.field_size_limit(sys.maxsize)  # which is 131,072 characters otherwise
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            rows = []
            for row in filter(None, reader):  # blank lines
                line = reader.line_num
                rows.append(row)
                if len(row) != len(rows[0]):
                    raise csv.Error(f"{len(row)} field(s), but the first line has {len(rows[0])}")
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    except csv.Error as error:
        raise _not_a_table(path, f"line {line or 1}: {error}") from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise DataError(f"{path} is empty. Its first line must name the columns.")
    if len(set(rows[0])) < len(rows[0]):
        raise DataError(f"{path}: two columns have the same name in {', '.join(rows[0])}. Rename one.")
    return Table(str(path), pd.DataFrame(rows[1:], columns=rows[0]))


def read_tsv(path: Path, *, header: Sequence[str] | None = None, wanted: Collection[str | None] | None = None) -> Table:
    """Read a file with one row on each line, as the loader of GLUE on the Hub does: quotes are characters like any
    other, fields that a row lacks at its end are empty, and further fields are ignored.

    header: the columns' names if the file has no line of them. wanted: the columns to keep. Raises DataError for a file
    that cannot be read.
    """
    import pandas as pd

    columns: Any = None
    if header is not None:
        columns = list(header)
    elif wanted is not None:
        columns = lambda name: name in wanted  # noqa: E731  # a list would require every column to exist
    try:
        frame = pd.read_csv(
            path,
            sep="\t",
            dtype=str,
            keep_default_na=False,
            encoding="utf-8-sig",
            names=header,
            quoting=csv.QUOTE_NONE,
            usecols=columns,
            index_col=False,
        )
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{path} is empty. Its first line must name the columns.") from error
    except pd.errors.ParserError as error:
        raise _not_a_table(path, str(error)) from error
    return Table(str(path), frame)


def read_jsonl(path: Path) -> Table:
    """Read one JSON object per line, with a column for every key. Values other than strings become JSON; null is empty.

    Raises DataError for a line that is not a JSON object.
    """
    import pandas as pd

    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise DataError(
                f'{path}, line {number}: not an object such as {{"text": …, "label": …}}. Each line needs one; convert '
                f"a list with: jq -c '.[]' {path} > NEW.jsonl"
            )
        records.append({name: as_text(value) for name, value in record.items()})
    return Table(str(path), pd.DataFrame(records, dtype=object))


def as_text(value: object) -> object:
    """Return a value as text, and the values in a list or an object as texts."""
    if isinstance(value, str):
        return value.encode("utf8", "replace").decode("utf8")  # replaces lone surrogates
    if isinstance(value, list):
        return [as_text(each) for each in value]
    if isinstance(value, dict):
        return {name: as_text(each) for name, each in value.items()}
    return "" if value is None else json.dumps(value)


def _not_utf8(path: Path) -> DataError:
    return DataError(f"{path} is not UTF-8. Convert it from its encoding: iconv -f ENCODING -t utf-8")


def _not_a_table(path: Path, problem: str) -> DataError:
    return DataError(
        f"{path}: {problem.strip()}. Each row needs one field for each column; fields with delimiters or line breaks "
        f"need quotes, and quotes in them are doubled. Or write JSON lines."
    )


def listed(names: Sequence[str], most: int = 10) -> str:
    """Return names in quotes for a message, at most `most` of them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more
