"""Which words name a model of the Hugging Face Hub; told without importing anything slow."""

from __future__ import annotations

import re
from pathlib import Path

_MODEL = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def is_hub_model(text: str) -> bool:
    """Whether it is OWNER/NAME, and neither something that is here nor the name of a file with a vocabulary."""
    path = Path(text)
    return bool(_MODEL.fullmatch(text)) and not path.exists() and path.suffix not in (".json", ".txt")
