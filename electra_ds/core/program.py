"""The names of commands as this program was called, for messages and help texts."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

_CONSOLE_SCRIPT = "electra-ds"
PACKAGES = frozenset(
    {
        "datasets", "deepspeed", "hjson", "huggingface_hub", "matplotlib", "numpy", "packaging", "pandas", "psutil",
        "pyarrow", "pydantic", "ray", "rich", "safetensors", "scipy", "seqeval", "sklearn", "tokenizers", "torch",
        "transformers", "typing_extensions", "wandb", "yaml", "zstandard",
    }
)  # fmt: skip
"""Import names of the packages that this program requires."""
_IN_BIN = re.compile(r"(?<![\w/.])bin/(?=[a-z])")


def command(name: str) -> str:
    """Return the command line for `name`, such as `export` or `checkpoint import`, in the style of this process's call.

    A process started as `bin/pretrain` shows `bin/export`, with the same path in front; `electra-ds` and `python -m
    electra_ds` show themselves. Any other process, such as a notebook, shows `electra-ds`.
    """
    return _prefix(sys.argv[0] if sys.argv else "") + name


def as_called(text: str) -> str:
    """Return a help text in which each `bin/NAME` is written as `command` would write it."""
    return _IN_BIN.sub(lambda _: _prefix(sys.argv[0] if sys.argv else ""), text)


def missing_package(error: ModuleNotFoundError) -> str | None:
    """Return a message for a user who started a command outside its environment.

    Return None if the missing module belongs to the user's plug-in, or to a package that is installed.
    """
    if error.name not in PACKAGES:
        return None
    found = f"The package {error.name} is not installed in the environment of {sys.executable}."
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "Makefile").is_file():
        return f"{found} Reinstall this program with its requirements: {sys.executable} -m pip install electra_ds"
    python = checkout / ".venv" / "bin" / "python"
    if not python.exists() or Path(sys.prefix) == python.parent.parent:
        return f"{found} Run 'make install' in {checkout}, then 'source {python.parent}/activate', and try again."
    return f"{found} Run 'source {python.parent}/activate' and try again, or start the command with {python}."


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
