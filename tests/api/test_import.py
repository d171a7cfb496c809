"""`import electra_ds` offers everything and waits for nothing."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

import electra_ds
from tests.helpers import REPOSITORY


def said(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    return result.stdout.strip()


def test_importing_is_quick_and_loads_no_large_package() -> None:
    """The time is the best of five, since other work may hold up any one."""
    code = (
        "import sys, time; began = time.perf_counter(); import electra_ds; took = time.perf_counter() - began; "
        "print(took, *({'torch', 'numpy', 'pydantic', 'deepspeed', 'transformers', 'rich'} & set(sys.modules)))"
    )
    times, loaded = zip(*(said(code).partition(" ")[::2] for _ in range(5)), strict=True)
    assert set(loaded) == {""}
    assert min(map(float, times)) < 0.1


def test_recipes_and_options_do_not_wait_for_torch() -> None:
    code = "import sys, electra_ds; electra_ds.load_recipe('tiny'); electra_ds.FinetuneOptions(); "
    assert said(code + "print('torch' in sys.modules)") == "False"


def test_every_public_name_is_there_documented_and_known_to_type_checkers() -> None:
    for name in electra_ds.__all__:
        assert name in dir(electra_ds)
        assert getattr(electra_ds, name).__doc__
    tree = ast.parse((REPOSITORY / "electra_ds" / "__init__.py").read_text("utf8"))
    typed = {alias.asname: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
             for alias in node.names if node.module and node.module.startswith("electra_ds.")}  # fmt: skip
    assert typed == {name: f"electra_ds.{home}" for name, home in electra_ds._MODULES.items()}


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'pretrian'"):
        electra_ds.pretrian  # noqa: B018
