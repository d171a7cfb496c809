"""The built-in corpus: the documentation text that comes with Python and the installed packages.

Every machine that can run electra_ds has some megabytes of English on its disk: `pydoc_data` and the docstrings of the
standard library and of a few packages. They are read with `ast`, without importing anything, one document per module,
in sorted order. Repeated paragraphs are left out, because held-out text must not occur in the training text.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import os
import re
import sysconfig
import warnings
from pathlib import Path

from electra_ds.core.errors import DataError
from electra_ds.core.launcher import worker_pool

PACKAGES = ("matplotlib", "numpy", "scipy", "sklearn", "torch", "transformers")
_SKIPPED_FOLDERS = {"__pycache__", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}
_PARAGRAPHS = re.compile(r"\n\s*\n")
_SHORTEST_DOCSTRING_CHARS = 80


@functools.cache
def builtin_documents() -> list[list[str]]:
    """Return the documents, always in the same order; about 25 MB, which are read once per process.

    Raises DataError if no installed package has documentation.
    """
    paths = builtin_sources()
    seen: set[bytes] = set()
    documents = []
    with worker_pool(min(os.cpu_count() or 1, 8)) as pool:
        for texts in pool.map(_documentation_of, paths, chunksize=64):
            new = [paragraph for text in texts for paragraph in _PARAGRAPHS.split(text) if _is_new(paragraph, seen)]
            if lines := [line.strip() for paragraph in new for line in paragraph.splitlines() if line.strip()]:
                documents.append(lines)
    if not documents:
        raise DataError("This Python has no documentation text to train on. Give a corpus with --corpus PATH.")
    return documents


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = hashlib.blake2b(" ".join(text.split()).encode("utf8"), digest_size=16).digest()
    is_new = digest not in seen
    seen.add(digest)
    return is_new


def builtin_sources() -> list[Path]:
    """Return the Python files that are read."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            roots.append(Path(spec.submodule_search_locations[0]))
    paths = []
    for root in roots:
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
            paths += [Path(folder) / name for name in sorted(files) if name.endswith(".py")]
    return paths


def _documentation_of(path: Path) -> list[str]:
    """Return the cleaned docstrings of one module in source order; for `pydoc_data/topics.py`, its texts."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    if path.parent.name == "pydoc_data":
        return [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_prose(node.value)
        ]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        (getattr(node, "lineno", 0), inspect.cleandoc(text))
        for node in ast.walk(tree)
        if isinstance(node, documented) and (text := ast.get_docstring(node, clean=False)) and _is_prose(text)
    ]
    # A docstring may contain lone surrogates, which cannot be encoded.
    return [text.encode("utf8", "replace").decode("utf8") for _, text in sorted(found)]


def _is_prose(text: str) -> bool:
    return len(text) >= _SHORTEST_DOCSTRING_CHARS
