"""`electra-ds`, `python -m electra_ds` and every script in bin/ begin here, before any package is needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from electra_ds.core.program import missing_package


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line; where a package that it needs is missing, say what to do."""
    try:
        from electra_ds.cli import main as run

        run(arguments)
    except ModuleNotFoundError as error:
        if (told := missing_package(error)) is None:
            raise
        sys.exit(told)


if __name__ == "__main__":
    main()
