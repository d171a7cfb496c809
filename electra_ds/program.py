"""What this program is called by, for the commands that messages and help texts name."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

_CONSOLE_SCRIPT = "electra-ds"
_IN_BIN = re.compile(r"(?<![\w/.])bin/(?=[a-z])")


def command(name: str) -> str:
    """Return how to call the command `name`, such as `export` or `checkpoint import`, the way this process was called.

    A checkout's `bin/pretrain` names `bin/export`, with the same path before it; `electra-ds` and `python -m
    electra_ds` name themselves. A process that was started in another way, such as a notebook, names `electra-ds`.
    """
    return _prefix(sys.argv[0] if sys.argv else "") + name


def as_called(text: str) -> str:
    """Return a help text with each `bin/NAME` in it as `command` would write it."""
    return _IN_BIN.sub(lambda _: _prefix(sys.argv[0] if sys.argv else ""), text)


def _prefix(called: str) -> str:
    path = Path(called)
    if path.parent.name == "bin" and (path.parent.parent / "electra_ds" / "__main__.py").is_file():
        return shlex.quote(str(path.parent)) + "/"
    if path.name == "__main__.py" and path.parent.name == "electra_ds":
        return "python -m electra_ds "
    found = shutil.which(_CONSOLE_SCRIPT)
    if path.name == _CONSOLE_SCRIPT and (found is None or Path(found).resolve() != path.resolve()):
        return f"{shlex.quote(called)} "  # it is not on the PATH
    return f"{_CONSOLE_SCRIPT} "
