"""The zip for gluebenchmark.com, of prediction files that are written here."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from electra_ds.core.errors import CheckpointError, ConfigError
from electra_ds.report.glue_score import SUBMISSION_ROWS, zip_submission
from electra_ds.report.scores import report_scores
from electra_ds.report.tables import print_report

SMALL = ["AX.tsv", "CoLA.tsv", "MRPC.tsv", "RTE.tsv", "STS-B.tsv", "WNLI.tsv"]
# How a row of each file looks at gluebenchmark.com.
WORDS = {
    "CoLA.tsv": "1", "SST-2.tsv": "0", "MRPC.tsv": "1", "STS-B.tsv": "3.125", "QQP.tsv": "0", "MNLI-m.tsv": "neutral",
    "MNLI-mm.tsv": "contradiction", "QNLI.tsv": "not_entailment", "RTE.tsv": "entailment", "WNLI.tsv": "1",
    "AX.tsv": "entailment",
}  # fmt: skip


def lines_of(name: str) -> list[str]:
    return ["index\tprediction", *(f"{index}\t{WORDS[name]}" for index in range(SUBMISSION_ROWS[name]))]


def write(run: Path, name: str, lines: list[str] | None = None) -> Path:
    (run / "submission").mkdir(parents=True, exist_ok=True)
    path = run / "submission" / name
    path.write_text("\n".join(lines if lines is not None else lines_of(name)) + "\n", "utf8")
    return path


def names_in(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        return file.namelist()


def test_all_eleven_files(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in WORDS]
    files = [write(run, run.name) for run in runs]
    out = tmp_path / "submission.zip"
    assert zip_submission(runs, out) == [f"{out} has 11 of 11 files; none is missing"]
    assert names_in(out) == list(SUBMISSION_ROWS)
    with zipfile.ZipFile(out) as file:
        assert {path.name: file.read(path.name) for path in files} == {path.name: path.read_bytes() for path in files}
    first = out.read_bytes()
    zip_submission(list(reversed(runs)), out)
    assert out.read_bytes() == first


@given(st.sets(st.sampled_from(SMALL), min_size=1))
@settings(max_examples=20)
def test_what_is_missing_is_named(tmp_path_factory: pytest.TempPathFactory, names: set[str]) -> None:
    folder = tmp_path_factory.mktemp("runs")
    for name in names:
        write(folder / "run", name)
    out = folder / "out.zip"
    notes = zip_submission([folder / "run"], out)
    held = names | {"WNLI.tsv"}
    assert set(names_in(out)) == held
    missing = ", ".join(name for name in SUBMISSION_ROWS if name not in held)
    assert notes[-1] == f"{out} has {len(held)} of 11 files; the site refuses it without {missing}"
    assert len(notes) == (1 if "WNLI.tsv" in names else 2)


def test_wnli_is_filled_with_its_larger_class(tmp_path: Path) -> None:
    write(tmp_path / "run", "RTE.tsv")
    notes = zip_submission([tmp_path / "run"], tmp_path / "out.zip")
    assert notes[0] == "WNLI.tsv answers 0, the larger class, to all 146: no run predicted it"
    with zipfile.ZipFile(tmp_path / "out.zip") as file:
        lines = file.read("WNLI.tsv").decode("utf8").splitlines()
    assert lines == ["index\tprediction", *(f"{index}\t0" for index in range(146))]
    with zipfile.ZipFile(tmp_path / "out.zip") as file:  # and such a file is one that would be taken
        file.extract("WNLI.tsv", tmp_path / "again" / "submission")
    assert zip_submission([tmp_path / "again"], tmp_path / "again.zip")


@given(st.sampled_from(SMALL), st.data())
@settings(max_examples=60)
def test_broken_files_are_refused_and_no_zip_appears(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    lines = lines_of(name)
    row = data.draw(st.integers(1, len(lines) - 1))
    break_it = data.draw(st.sampled_from(["drop", "twice", "swap", "short", "long", "header", "empty", "blank"]))
    if break_it == "drop" and row < len(lines) - 1:
        del lines[row]
    elif break_it == "twice":
        lines.insert(row, lines[row])
    elif break_it == "swap" and row > 1:
        lines[row - 1], lines[row] = lines[row], lines[row - 1]
    elif break_it == "long":
        lines.append(f"{len(lines) - 1}\t{WORDS[name]}")
    elif break_it == "header":
        del lines[0]
    elif break_it == "empty":
        lines = []
    elif break_it == "blank":
        lines.append("")
    else:
        lines = lines[:row]
    folder = tmp_path_factory.mktemp("runs")
    path = write(folder / "run", name, lines)
    write(folder / "other", next(other for other in SMALL if other != name))
    with pytest.raises(CheckpointError) as caught:
        zip_submission([folder / "other", folder / "run"], folder / "out.zip")
    assert str(path) in str(caught.value)
    assert "Predict the official test set again" in str(caught.value)
    assert sorted(found.name for found in folder.iterdir()) == ["other", "run"]


@given(st.lists(st.sampled_from(SMALL), min_size=2, max_size=4))
@settings(max_examples=20)
def test_a_file_is_brought_by_one_run(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    folder = tmp_path_factory.mktemp("runs")
    runs = [folder / str(index) for index in range(len(names))]
    for run, name in zip(runs, names, strict=True):
        write(run, name)
    out = folder / "out.zip"
    if len(set(names)) == len(names):
        zip_submission([*runs, runs[0]], out)  # the same run twice is no second one
        assert set(names_in(out)) == {*names, "WNLI.tsv"}
        return
    with pytest.raises(ConfigError, match=r"are the same file of a submission. Give one run for each task"):
        zip_submission(runs, out)
    assert not out.exists()


def test_other_files_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "run", "WNLI.tsv")
    other = tmp_path / "run" / "submission" / "mine.tsv"
    other.write_text("anything", "utf8")
    notes = zip_submission([tmp_path / "run"], tmp_path / "out.zip")
    assert notes[0] == f"{other} is not one of GLUE's files and is left out"
    assert names_in(tmp_path / "out.zip") == ["WNLI.tsv"]


def test_nothing_to_gather(tmp_path: Path) -> None:
    for runs in ([], [tmp_path], [tmp_path / "nowhere"]):
        with pytest.raises(ConfigError, match="has predictions for a GLUE test set"):
            zip_submission(runs, tmp_path / "out.zip")


def test_an_older_zip_stays_where_the_new_one_cannot_be_written(tmp_path: Path) -> None:
    path = write(tmp_path / "run", "WNLI.tsv")
    out = tmp_path / "out.zip"
    zip_submission([tmp_path / "run"], out)
    before = out.read_bytes()
    path.write_text("broken", "utf8")
    with pytest.raises(CheckpointError):
        zip_submission([tmp_path / "run"], out)
    assert out.read_bytes() == before
    write(tmp_path / "run", "WNLI.tsv")
    for place, message in ((tmp_path, "not an ordinary file"), (tmp_path / "nowhere" / "out.zip", "No such file")):
        with pytest.raises(CheckpointError, match=f"Cannot write .*{message}"):
            zip_submission([tmp_path / "run"], place)
    assert not list(tmp_path.glob(".*"))


def test_the_report_writes_it_too(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out.zip"
    write(run, "RTE.tsv")
    (run / "scores.json").write_text(json.dumps({
        "format": 1, "task": "rte", "recipe": "rc2020", "recipe_source": "shipped", "changes": [],
        "seed": 1, "model": "m", "model_fingerprint": "f",
        "data_fingerprint": "d", "step": 1, "chosen": "last",
        "sets": {"dev": {"rows": 277, "metrics": {"accuracy": 0.5}}},
    }), "utf8")  # fmt: skip
    console = Console(width=200, record=True)
    print_report(report_scores([run], submission=out).parts, console)
    text = console.export_text()
    assert "WNLI.tsv answers 0, the larger class, to all 146: no run predicted it." in text
    assert "out.zip has 2 of 11 files; the site refuses it without CoLA.tsv, SST-2.tsv" in text
    assert names_in(out) == ["RTE.tsv", "WNLI.tsv"]
