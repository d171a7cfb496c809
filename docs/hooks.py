"""Copy the files outside docs/ that the pages link to into the site.

A link such as ../sweeps/smoke.yaml works on a forge and in a checkout, but not on a site, which has only docs/. Each
such file is copied into the site's folder repository/, as text that a browser shows, and the link follows.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)")
_ROOT = Path(__file__).resolve().parent.parent


def _outside(page: str, target: str) -> str | None:
    """Return the path in the repository of a file that a page links to; None if it is in docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") or not (_ROOT / path).is_file() else path


def _copy(path: str) -> str:
    """Return the place of a file's copy in the site."""
    return f"repository/{path}" + ("" if path.endswith(".png") else ".txt")


def on_files(files: Files, config: Any) -> Files:
    for page in list(files.documentation_pages()):
        for target in _LINK.findall(page.content_string):
            path = _outside(page.src_uri, target)
            if path is not None and files.get_file_from_path(_copy(path)) is None:
                files.append(File.generated(config, _copy(path), content=(_ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    def moved(match: re.Match[str]) -> str:
        path = _outside(page.file.src_uri, match[1])
        return match[1] if path is None else posixpath.relpath(_copy(path), posixpath.dirname(page.file.src_uri) or ".")

    return _LINK.sub(moved, markdown)
