"""What the documentation shows runs as it stands."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import electra_ds
from tests.api.conftest import write_examples
from tests.helpers import REPOSITORY

WITH_EXAMPLE = ("pretrain", "finetune", "build_data", "export", "plan", "Run", "load_recipe")


def test_every_function_that_starts_something_has_an_example() -> None:
    found = {name for name in electra_ds.__all__ if ">>>" in (getattr(electra_ds, name).__doc__ or "")}
    assert found == {*WITH_EXAMPLE}


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_the_example_of_a_docstring_gives_what_it_shows(name: str, examples: Path) -> None:
    if name == "build_data":
        (examples / "stores" / "small").rename(examples / "stores" / "other")
    example = doctest.DocTestParser().get_doctest(getattr(electra_ds, name).__doc__, {}, name, None, None)
    said: list[str] = []
    failed, tried = doctest.DocTestRunner().run(example, out=said.append, clear_globs=False)
    assert tried
    assert not failed, "".join(said)


def blocks(path: str) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", (REPOSITORY / path).read_text("utf8"), re.DOTALL)
    return [block for block in found if "electra_ds" in block]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["README.md", "docs/python.md"])
def test_the_code_of_a_page_runs_from_beginning_to_end(path: str, examples: Path) -> None:
    code = "\n".join(blocks(path))
    assert "electra_ds.pretrain(" in code
    if path == "README.md":
        write_examples(examples / "reviews.csv", 24)
        write_examples(examples / "held_out.csv", 10)
    exec(compile(code, path, "exec"), {})
    assert (examples / "my-electra" / "discriminator" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "has_texts"),
    [("pretrain_and_finetune.py", True), ("own_loop.py", False),
     pytest.param("pretrain_and_finetune.py", False, marks=pytest.mark.nightly)],
)  # fmt: skip
def test_an_example_runs_as_a_script(name: str, has_texts: bool, tmp_path: Path, corpus_folder: Path) -> None:
    """Nightly on the built-in corpus too, which takes a minute to tokenise."""
    (tmp_path / "out").mkdir()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, REPOSITORY / "examples" / name, "out", *([corpus_folder] if has_texts else [])],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
