"""GLUE's and SQuAD's files, trained on and scored by a tiny encoder: that they go through, not what it learns."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import BertTokenizerFast, ElectraConfig

from tests.data_files import DataFiles
from tests.finetune_runs import finetune, predictions_of, save_encoder, scores_of
from tests.helpers import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("process_group")]


@pytest.fixture(scope="module")
def encoder(data_files: DataFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = BertTokenizerFast(str(data_files.vocabulary))
    config = ElectraConfig(
        vocab_size=len(tokenizer), embedding_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    return save_encoder(tmp_path_factory.mktemp("encoder"), config, tokenizer)


def run(encoder: Path, task: str, data: Path, run_dir: Path, *arguments: str) -> dict[str, Any]:
    finetune(
        "--model", encoder, "--task", task, "--data-dir", data, "--run-dir", run_dir, "--threads", "1", "--ds-config",
        REPOSITORY / "ds_configs" / "cpu.json", "--eval-every", "1000", "--discard-weights", *arguments,
    )  # fmt: skip
    return scores_of(run_dir)


@pytest.mark.parametrize(
    ("task", "official"), [("cola", "CoLA"), ("mrpc", "MRPC"), ("sts-b", "STS-B"), ("wnli", "WNLI")]
)
def test_a_task_trains_is_scored_and_predicted(
    encoder: Path, data_files: DataFiles, tmp_path: Path, task: str, official: str
) -> None:
    scores = run(encoder, task, data_files.glue, tmp_path, "--max-train-examples", "256", "--predict-test")
    found = scores["sets"]["dev"]
    rows = data_files.rows(f"{official}/dev.tsv", header=task != "cola")
    tests = data_files.rows(f"{official}/test.tsv")
    assert found["rows"] == rows == len(predictions_of(tmp_path))
    assert all(-1 <= value <= 1 for value in found["metrics"].values())
    assert scores["sets"]["test"]["rows"] == tests
    [submission] = (tmp_path / "submission").iterdir()
    assert len(submission.read_text().splitlines()) == tests + 1
    if task != "sts-b":
        lines = predictions_of(tmp_path)
        counted = Counter((line["label"], line["prediction"]) for line in lines)
        names = found["labels"]
        assert found["confusion"] == [[counted[label, guess] for guess in names] for label in names]


@pytest.mark.parametrize(
    ("task", "official", "source", "names"),
    [
        ("qnli", "QNLI", "dev.tsv", ("train.tsv", "dev.tsv")),
        ("mnli", "MNLI", "dev_matched.jsonl", ("train.jsonl", "dev_matched.jsonl")),
    ],
)
def test_a_task_without_its_training_file_trains_on_its_dev(
    encoder: Path, data_files: DataFiles, tmp_path: Path, task: str, official: str, source: str, names: tuple[str, ...]
) -> None:
    """Which is no result, but shows that these formats are read."""
    folder = tmp_path / official
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(data_files.glue / official / source)
    rows = data_files.rows(f"{official}/{source}", header=source.endswith(".tsv"))
    scores = run(encoder, task, tmp_path, tmp_path / "run", "--max-train-examples", "256")
    assert [of["rows"] for of in scores["sets"].values()] == [rows]
    [confusion] = [np.array(of["confusion"]) for of in scores["sets"].values()]
    assert confusion.sum() == rows


def test_squad_trains_on_the_subset_and_is_scored(encoder: Path, data_files: DataFiles, tmp_path: Path) -> None:
    folder = tmp_path / "squad"
    folder.mkdir()
    (folder / "train-v1.1.json").symlink_to(data_files.squad / "train-v1.1.subset.json")
    dev = json.loads((data_files.squad / "dev-v1.1.part1.json").read_text("utf8"))
    dev["data"] = dev["data"][:1]
    (folder / "dev-v1.1.json").write_text(json.dumps(dev))
    questions = [qa["id"] for paragraph in dev["data"][0]["paragraphs"] for qa in paragraph["qas"]]
    scores = run(
        encoder, "squad1", folder, tmp_path / "run", "--max-train-examples", "256", "--set", "schedule.epochs=1"
    )
    found = scores["sets"]["dev"]
    assert found["rows"] == len(questions)
    assert 0 <= found["metrics"]["exact"] <= found["metrics"]["f1"] <= 1
    answers = json.loads((tmp_path / "run" / "predictions" / "dev.json").read_text("utf8"))
    assert list(answers) == questions
    logits = np.load(tmp_path / "run" / "predictions" / "dev-logits.npz")
    assert logits["start"].shape == logits["end"].shape == (logits["lengths"].sum(),)
