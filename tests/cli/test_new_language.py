"""The blocks of docs/new-language/README.md, run in order as a reader would, and what must then be true.

A block's tag says what is done with it: `sh run` and `python run` have to succeed, `sh fails` has to be refused, and
every line of `text output` has to stand in the output of the block before. Blocks with other tags are not run.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from electra_ds.config.run_directory import read_metrics
from electra_ds.data.token_store import TokenStore
from tests import forks
from tests.helpers import REPOSITORY

PAGE = REPOSITORY / "docs" / "new-language" / "README.md"
SENTENCES = ("Їжак їсть ґрунт? Ні: п’ять гілок — і щавель…", "Об’їзд, Ґудзик, «фальш», щойно 1945 року.")


class Block(NamedTuple):
    tag: str
    code: str
    line: int


class Result(NamedTuple):
    block: Block
    stdout: str
    stderr: str


class Walk(NamedTuple):
    folder: Path
    results: list[Result]

    def stdout_of(self, text: str) -> str:
        """Of the one block whose code holds `text`."""
        (found,) = [result.stdout for result in self.results if text in result.block.code]
        return found


def blocks() -> list[Block]:
    text = PAGE.read_text("utf8")
    found = re.finditer(r"^```([a-z]+(?: [a-z]+)?)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2], text.count("\n", 0, match.start()) + 1) for match in found]


def our_commands(block: Block) -> list[list[str]]:
    """Return the words of each line of a block, if all lines are commands of ours; otherwise nothing."""
    lines = [shlex.split(line) for line in block.code.replace("\\\n", " ").splitlines()]
    return lines if all(line and line[0].startswith("bin/") for line in lines) else []


def execute(block: Block, folder: Path) -> Result:
    """Run a block: commands of ours as forks, which save their imports, and everything else as a reader would."""
    if commands := our_commands(block) if block.tag.startswith("sh ") else []:
        *before, last = [forks.run(words[0][4:], *words[1:], folder=folder) for words in commands]
        assert not any(done.returncode for done in before), before
        return checked(block, last.returncode, "".join(done.stdout for done in (*before, last)), last.stderr)
    program = [sys.executable, "-c"] if block.tag.startswith("python") else ["bash", "-e", "-o", "pipefail", "-c"]
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),  # a reader has installed it
        "PYTHONUTF8": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [*program, block.code],
        capture_output=True, encoding="utf8", check=False, timeout=600, cwd=folder, env=environment,
    )  # fmt: skip
    return checked(block, result.returncode, result.stdout, result.stderr)


def checked(block: Block, status: int, stdout: str, stderr: str) -> Result:
    output = stdout + stderr
    if block.tag.endswith(" fails"):
        assert status == 2, f"{PAGE.name}:{block.line} should be refused:\n{output}"
    else:
        assert status == 0, f"{PAGE.name}:{block.line}:\n{output}"
    assert "Traceback" not in output, output
    return Result(block, stdout, stderr)


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """The page from its first block to its last, in a folder that looks like a checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "docs").symlink_to(REPOSITORY / "docs")
    (folder / "ds_configs").symlink_to(REPOSITORY / "ds_configs")
    (folder / "bin").mkdir()
    for script in (REPOSITORY / "bin").iterdir():
        if script.is_file():
            started = folder / "bin" / script.name
            started.write_text(f'exec {shlex.quote(sys.executable)} {shlex.quote(str(script))} "$@"\n')
            started.chmod(0o755)
    results: list[Result] = []
    for block in blocks():
        if block.tag in ("sh run", "sh fails", "python run"):
            results.append(execute(block, folder))
        elif block.tag == "text output":
            printed = results[-1].stdout + results[-1].stderr
            for line in block.code.splitlines():
                assert line in printed, f"{PAGE.name}:{block.line}: not in\n{printed}"
    return Walk(folder, results)


def test_every_block_has_a_known_tag() -> None:
    """A misspelt tag would quietly take a block out of the test."""
    tags = [block.tag for block in blocks()]
    assert set(tags) == {"sh", "sh run", "sh fails", "python run", "text", "text output"}
    assert PAGE.read_text("utf8").count("```") == 2 * len(tags)


@pytest.mark.slow
def test_the_tokenizer_gives_ukrainian_back_and_knows_every_letter(walk: Walk) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(walk.folder / "stores" / "uk-smoke" / "tokenizer")
    texts = [line for line in (walk.folder / "uk-sample" / "uk.txt").read_text("utf8").splitlines() if line]
    for text in (*texts, *SENTENCES):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == " " + text  # the space that stands for the line break
        assert tokenizer.unk_token_id not in ids
    store = TokenStore(walk.folder / "stores" / "uk-smoke")
    assert store.tokenizer.unk_id not in store.tokens


@pytest.mark.slow
def test_training_learns(walk: Walk) -> None:
    lines = read_metrics(walk.folder / "runs" / "uk-smoke" / "metrics.jsonl")
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert evaluations[-1]["step"] > evaluations[0]["step"]
    assert evaluations[-1]["generator_masked_loss"] < evaluations[0]["generator_masked_loss"] - 0.05


@pytest.mark.slow
def test_the_exported_model_opens_and_has_the_tokenizer_of_the_store(walk: Walk) -> None:
    from transformers import AutoModel, AutoTokenizer

    store = TokenStore(walk.folder / "stores" / "uk-smoke")
    for name in ("discriminator", "generator"):
        tokenizer = AutoTokenizer.from_pretrained(walk.folder / "uk-electra" / name)
        for text, ids in zip(SENTENCES, store.tokenizer.encode_lines(list(SENTENCES)), strict=True):
            assert tokenizer(text)["input_ids"] == [store.tokenizer.cls_id, *ids, store.tokenizer.sep_id]
    encoder, loading = AutoModel.from_pretrained(walk.folder / "uk-electra" / "discriminator", output_loading_info=True)
    assert not loading["missing_keys"]
    inputs = tokenizer(SENTENCES[0], return_tensors="pt")
    with torch.no_grad():
        hidden = encoder.eval()(**inputs).last_hidden_state
    assert hidden.shape == (1, inputs["input_ids"].shape[1], 64)
    assert torch.isfinite(hidden).all()


@pytest.mark.slow
def test_the_generator_suggests_cyrillic_and_every_token_is_scored(walk: Walk) -> None:
    output = walk.stdout_of("ElectraForMaskedLM")
    suggestions, *scores = output.strip().splitlines()
    assert re.search(r"[а-яіїєґ]", suggestions), suggestions
    assert all(re.fullmatch(r"[01]\.\d\d .*", line) for line in scores), output
    assert scores[0].endswith("[CLS]")
    assert scores[-1].endswith("[SEP]")
    assert "дровами" in "".join(line[5:] for line in scores)
