"""`electra-ds`, `python -m electra_ds` and every script in bin/ begin here, before any package is needed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from electra_ds.core.program import missing_package


def main(arguments: Sequence[str] | None = None, module: str = "electra_ds.cli") -> None:
    """Run a command line by the `main` of a module; if a package that it needs is missing, say what to do."""
    try:
        importlib.import_module(module).main(arguments)
    except ModuleNotFoundError as error:
        if (told := missing_package(error)) is None:
            raise
        sys.exit(told)


if __name__ == "__main__":
    main()
