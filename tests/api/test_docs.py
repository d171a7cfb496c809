"""What the documentation shows runs as it stands."""

from __future__ import annotations

import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import electra_ds
from benchmarks.command import add_bench
from electra_ds.cli import COMMANDS as ADDS
from electra_ds.cli import build_parser
from electra_ds.config.commands import COMMANDS
from tests.api.conftest import write_examples
from tests.helpers import REPOSITORY

WITH_EXAMPLE = (
    "pretrain",
    "finetune",
    "build_data",
    "export",
    "plan",
    "Run",
    "load_recipe",
    "initialize",
    "trainer_json",
)


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
    shutil.rmtree(examples / "stores")  # a reader has texts and tables, and no more
    (examples / "texts").rename(examples / "my_texts")
    if path == "README.md":
        write_examples(examples / "reviews.csv", 24)
        write_examples(examples / "held_out.csv", 10)
    exec(compile(code, path, "exec"), {})
    assert (examples / "my-electra" / "discriminator" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "has_texts"),
    [("own_loop.py", False),
     *(pytest.param("pretrain_and_finetune.py", has_texts, marks=pytest.mark.nightly) for has_texts in (True, False))],
)  # fmt: skip
def test_an_example_runs_as_a_script(name: str, has_texts: bool, tmp_path: Path, corpus_folder: Path) -> None:
    """Nightly the longer one, which has the parts of README and docs/python.md, and on the built-in corpus too."""
    (tmp_path / "out").mkdir()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, REPOSITORY / "examples" / name, "out", *([corpus_folder] if has_texts else [])],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), REPOSITORY / "ds_configs" / "README.md"])


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(REPOSITORY)) for path in paths]


def prose(page: Path) -> str:
    """A page without its fenced code."""
    return re.sub(r"^```.*?^```", "", page.read_text("utf8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as forges and the site make them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), f"{target}: {sorted(anchors(found))}"


def commands(page: Path) -> list[list[str]]:
    """The commands of ours in a page's blocks of code, split into words."""
    text = re.sub(r"\\\n\s*", "", page.read_text("utf8"))
    lines = (line.strip() for line in text.splitlines())
    started = [
        line for line in lines if re.match(r"(torchrun .*|deepspeed .*|srun .*)?(bin/|electra-ds )[a-z-]+ ", line)
    ]
    found = [shlex.split(line.split(" | ")[0].split(" > ")[0], comments=True) for line in started if "`" not in line]
    bare = [[word.removeprefix("bin/") for word in line if word != "electra-ds"] for line in found]
    return [line[next(place for place, word in enumerate(line) if word in PROGRAMS) :] for line in bare]


PROGRAMS = {name.split()[0] for name in COMMANDS} | {"bench"}


PLACEHOLDERS = {
    "TASK": "mrpc", "KIND": "multi-label", "S": "1", "$seed": "1",
    "labelled-lines": "multi-label",  # the example package's, which is not installed here
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_the_commands_of_a_page_have_options_that_there_are(page: Path) -> None:
    for line in commands(page):
        words = [PLACEHOLDERS.get(word, word) for word in line if word not in ("…", "...")]
        parser = build_parser([add_bench] if words[0] == "bench" else ADDS)
        if not {"--help", "--version"} & {*words}:
            parser.parse_args(words)
