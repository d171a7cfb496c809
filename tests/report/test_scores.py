"""The report of finetuning runs, of scores.json files that are written here."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

import electra_ds
from electra_ds.cli import main
from electra_ds.core.errors import CheckpointError, ConfigError
from electra_ds.report.glue_score import AVERAGE_METRICS, GLUE_METRICS
from electra_ds.report.score_files import group_runs, read_run, read_scores
from electra_ds.report.scores import means, report_scores
from electra_ds.report.tables import print_report


def document(task: str, seed: int, sets: dict[str, dict[str, float]], **changes: Any) -> dict[str, Any]:
    return {
        "format": 1, "task": task, "recipe": "rc2020", "recipe_source": "shipped", "changes": [],
        "seed": seed, "model": "runs/mini",
        "model_fingerprint": "f1" * 32, "data_fingerprint": "d1" * 32, "step": 345, "chosen": "last",
        "sets": {name: {"rows": 408, "metrics": found, "confusion": [[1, 2], [3, 4]]} for name, found in sets.items()},
    } | changes  # fmt: skip


def write(folder: Path, name: str, content: dict[str, Any]) -> Path:
    run = folder / name
    run.mkdir(parents=True)
    (run / "scores.json").write_text(json.dumps(content), "utf8")
    return run


def sets_of(task: str, value: float) -> dict[str, dict[str, float]]:
    if task == "mnli":
        return {"dev_matched": {"accuracy": value}, "dev_mismatched": {"accuracy": value}}
    return {"dev": dict.fromkeys(GLUE_METRICS[task], value)}


def write_glue(folder: Path, values: dict[str, dict[int, float]], **changes: Any) -> list[Path]:
    """values: {task: {seed: what all its metrics are}}."""
    return [
        write(folder, f"{task}-{seed}", document(task, seed, sets_of(task, value), **changes))
        for task, seeds in values.items()
        for seed, value in seeds.items()
    ]


def told(runs: list[Path], **options: Any) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    print_report(report_scores(runs, **options).parts, console)
    return console.export_text()


def row(text: str, *head: str) -> str:
    """The table row that begins with these cells, single-spaced."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return next(line for line in lines if line.startswith(" ".join(head) + " "))


EIGHT = list(AVERAGE_METRICS)


def test_a_task_over_its_seeds(tmp_path: Path) -> None:
    values = [(0.80, 0.86), (0.84, 0.88), (0.88, 0.93)]
    runs = [
        write(tmp_path, f"{seed}", document("mrpc", seed, {"dev": {"accuracy": accuracy, "f1": f1}}))
        for seed, (accuracy, f1) in enumerate(values)
    ]
    text = told(runs)
    assert "runs/mini, recipe rc2020" in text
    assert row(text, "mrpc", "accuracy") == "mrpc accuracy 84.00 ± 4.00 3 84.00 80.00–88.00"
    assert row(text, "mrpc", "f1") == "mrpc f1 89.00 ± 3.61 3 88.00 86.00–93.00"  # sqrt((3^2 + 1^2 + 4^2) / 2) = 3.606
    assert "over finetuning seeds only" in text
    assert "AVG lacks cola matthews, sst-2 accuracy, sts-b spearman, qqp accuracy" in text


def test_python_has_the_tables_and_numbers_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = write_glue(tmp_path, {"rte": {0: 0.5, 1: 0.75}, "cola": {0: 0.25}})
    for run in runs:
        (run / "run.json").write_text('{"kind": "finetune"}')
    found = electra_ds.report_runs(runs, csv=tmp_path / "scores.csv")
    assert capsys.readouterr().out == ""
    assert found.results.groupby("task")["value"].mean().to_dict() == {"cola": 0.25, "rte": 0.625}
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "scores.csv")[["task", "value"]], found.results[["task", "value"]]
    )
    (table,) = found.tables
    assert dict(zip(table["task"], table["mean ± std"], strict=True))["rte"] == "62.50 ± 17.68"
    main(["report", *map(str, runs)])
    assert row(capsys.readouterr().out, "rte", "accuracy") == row(str(found), "rte", "accuracy")
    (runs[0] / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is a run of .*pretrain, but a run of .*finetune is needed"):
        electra_ds.report_runs(runs)


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    text = told([write(tmp_path, "a", document("rte", 7, {"dev": {"accuracy": 0.6}}))])
    assert row(text, "rte", "accuracy") == "rte accuracy 60.00 1 60.00 60.00–60.00"


def test_metrics_that_are_no_shares_keep_their_unit(tmp_path: Path) -> None:
    text = told([write(tmp_path, "a", document("stars", 7, {"dev": {"mse": 1.25, "pearson": 0.5}}))])
    assert row(text, "stars", "mse") == "stars mse 1.25 1 1.25 1.25–1.25"
    assert row(text, "stars", "pearson") == "stars pearson 50.00 1 50.00 50.00–50.00"


@given(st.lists(st.lists(st.floats(0, 1), min_size=8, max_size=8), min_size=2, max_size=4))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_means_are_computed_by_seed(tmp_path_factory: pytest.TempPathFactory, seeds: list[list[float]]) -> None:
    by_task = {task: {seed: values[index] for seed, values in enumerate(seeds)} for index, task in enumerate(EIGHT)}
    runs, _ = read_scores(write_glue(tmp_path_factory.mktemp("runs"), by_task))
    (group,) = group_runs(runs)
    avg, glue = means(group)
    expected = np.mean(seeds, axis=1)
    assert np.allclose(list(avg.by_seed.values()), expected)
    assert np.allclose(list(glue.by_seed.values()), (8 * expected + 40 / 71) / 9)
    assert avg.value is not None
    assert math.isclose(avg.value, expected.mean(), abs_tol=1e-12)


def test_means_say_how_they_were_made(tmp_path: Path) -> None:
    values = {task: {1: 0.5, 2: 0.7} for task in EIGHT}
    text = told(write_glue(tmp_path / "same", values))
    assert row(text, "AVG") == "AVG 60.00 ± 14.14 2 60.00 50.00–70.00"
    assert row(text, "GLUE").startswith("GLUE 59.59 ± 12.57 2 ")  # (8 x 60 + 56.338) / 9
    assert "GLUE on dev counts WNLI as majority class, 40 of 71 on dev = 56.34." in text
    assert "own WNLI" not in text

    text = told(write_glue(tmp_path / "other", values | {"rte": {1: 0.5, 3: 0.7}}))
    assert row(text, "AVG") == "AVG 60.00 – – –"
    assert "AVG is the mean of the tasks' means and has no ±, because their seeds differ." in text

    text = told(write_glue(tmp_path / "nine", values | {"wnli": {1: 0.4, 2: 0.4}}))
    assert "GLUE, own WNLI  " in text
    assert "57.78" in text  # (8 x 60 + 40) / 9
    assert "counts WNLI as the model's own." in text


def test_groups_are_models_by_recipes_and_fingerprints(tmp_path: Path) -> None:
    dev = {"dev": {"accuracy": 0.6}}
    runs = [
        write(tmp_path, "a", document("rte", 1, dev)),
        write(tmp_path, "b", document("rte", 1, dev, recipe="clark2020")),
        write(tmp_path, "c", document("rte", 1, dev, model="runs/other")),
        write(tmp_path, "d", document("rte", 1, dev, model_fingerprint="f2" * 32)),
    ]
    groups = group_runs(read_scores(runs)[0])
    assert [(group.name, group.recipe) for group in groups] == [
        ("runs/mini (weights f1f1f1f1f1f1)", "rc2020"),
        ("runs/mini (weights f1f1f1f1f1f1)", "clark2020"),
        ("runs/other", "rc2020"),
        ("runs/mini (weights f2f2f2f2f2f2)", "rc2020"),
    ]
    assert "Differences need exactly two tables" in told(runs)


def test_two_models_differ_by_welchs_interval(tmp_path: Path) -> None:
    runs = write_glue(tmp_path / "a", {"rte": {1: 0.60, 2: 0.64}})
    runs += write_glue(tmp_path / "b", {"rte": {1: 0.50, 2: 0.52}}, model="runs/other")
    text = told(runs)
    # 62 - 51 = 11; standard error sqrt(8 / 2 + 2 / 2) = 2.236, 5**2 / (4**2 + 1**2) = 1.47 degrees of freedom
    line = next(line for line in text.splitlines() if "rte accuracy" in line and "+11.00" in line)
    low, high = (float(word) for word in line.split()[-3::2])
    assert math.isclose(low + high, 22, abs_tol=0.02)
    assert -4 < low < 0
    assert "-11.00" in told(runs[2:] + runs[:2])  # first minus second, in the order that they are given


def test_every_dev_metric_is_compared_and_no_test_metric(tmp_path: Path) -> None:
    sets = {"dev": {"accuracy": 0.8, "f1": 0.9}, "test": {"accuracy": 0.5}}
    runs = [
        write(tmp_path, f"{model}-{seed}", document("mrpc", seed, sets, model=model))
        for model in ("a", "b")
        for seed in (1, 2)
    ]
    differences = told(runs).partition("Difference")[2]
    assert ["mrpc accuracy" in differences, "mrpc f1" in differences, "test" in differences] == [True, True, False]


def test_a_run_that_has_not_finished_is_left_out_beside_one_that_has(tmp_path: Path) -> None:
    finished = write(tmp_path, "a", document("rte", 1, {"dev": {"accuracy": 0.6}}))
    begun = tmp_path / "b"
    begun.mkdir()
    (begun / "run.json").write_text("{}")
    found, notes = read_scores([begun, finished])
    assert [run.path for run in found] == [finished]
    assert notes == [f"{begun} has not finished and is left out"]
    with pytest.raises(CheckpointError, match=r"has not finished\. Finish it"):
        read_scores([begun])


def test_runs_under_other_overrides_are_of_another_recipe(tmp_path: Path) -> None:
    runs = [
        write(tmp_path, str(index), document("rte", 1, {"dev": {"accuracy": 0.1 * index}}, **changes))
        for index, changes in enumerate(
            [{}, {"changes": ["schedule.epochs=5"]}, {"changes": ["100 training examples"]}, {"recipe_source": "ab12"}]
        )
    ]
    found, _ = read_scores(runs)
    assert [group.recipe for group in group_runs(found)] == [
        "rc2020", "rc2020 with schedule.epochs=5", "rc2020 with 100 training examples", "rc2020 (ab12)",
    ]  # fmt: skip


def test_what_is_no_repetition_is_said(tmp_path: Path) -> None:
    dev = {"dev": {"accuracy": 0.6}}
    runs = [
        write(tmp_path, "a", document("rte", 1, dev, chosen="best of 10 evaluations on dev")),
        write(tmp_path, "b", document("rte", 2, {**dev, "test": {}}, data_fingerprint="d2")),
        write(tmp_path, "c", document("cola", 1, dev)),
        write(tmp_path, "d", document("cola", 2, {**dev, "test": {"accuracy": 0.5}}, step=346)),
    ]
    text = told(runs)
    assert "rte is scored at: best of 10 evaluations on dev, last; the best of several evaluations is above" in text
    assert "rte was finetuned on data that differ between seeds." in text
    assert "cola ended at steps that differ between seeds." in text
    assert "cola has sets or metrics that some seeds lack" in text
    assert "rte has sets or metrics" not in text  # a set without labels has none
    assert "cola (test)" in text


def test_a_run_counts_once(tmp_path: Path) -> None:
    content = document("rte", 1, {"dev": {"accuracy": 0.6}})
    first, copy = write(tmp_path, "first", content), write(tmp_path, "copy", content)
    runs, notes = read_scores([first, copy, first, first / "." / ".." / "first"])
    assert len(runs) == 1
    assert len(notes) == 1
    assert "first" in notes[0]
    assert "copy" in notes[0]


def test_two_results_of_one_seed_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path, "first", document("rte", 1, {"dev": {"accuracy": 0.6}}))
    second = write(tmp_path, "second", document("rte", 1, {"dev": {"accuracy": 0.7}}))
    with pytest.raises(ConfigError, match=r"first and .*second are both rte of runs/mini by rc2020, seed 1"):
        told([first, second])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no scores.json: it is not a finetuning run, or has not finished"),
        ("{", "is damaged, or of another version: Invalid JSON"),
        ("\xff", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps(document("rte", 1, {}, format=2)), "of another version: format: "),
        (json.dumps(document("rte", 1, {}, step="one")), "is damaged, or of another version: step: "),
        (json.dumps(document("rte", 1, {"dev": {"accuracy": float("nan")}})), "accuracy is not a finite number"),
        (json.dumps(document("rte", 1, {"dev": {"accuracy": None}})), "accuracy is not a finite number"),  # type: ignore[dict-item]
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "scores.json").write_bytes(content.encode("latin1"))
    with pytest.raises(CheckpointError, match=message):
        read_run(tmp_path)


def test_published_scores_beside_ours(tmp_path: Path) -> None:
    runs = write_glue(tmp_path, {task: {1: 0.5, 2: 0.7} for task in EIGHT})
    text = told(runs, compare=["mercier2021"])
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "cola matthews 60.00 ± 14.14 2 60.00 50.00–70.00 53.5 ± 2.47" in lines
    assert "qqp accuracy 60.00 ± 14.14 2 60.00 50.00–70.00 –" in lines
    assert "qqp f1 60.00 ± 14.14 2 60.00 50.00–70.00 86.1 ± 0.18" in lines
    assert "AVG 60.00 ± 14.14 2 60.00 50.00–70.00 79.2 ± 0.3" in lines
    assert any(line.startswith("not comparable in mercier2021: QQP is headed") for line in lines)
    assert any("mean of 5 finetuning seeds" in line for line in lines)

    text = told(runs, compare=["mercier2021", "clark2020-small-owt"])
    assert row(text, "cola", "matthews").endswith("50.00–70.00 53.5 ± 2.47 56.8")
    assert "prints no AVG; the mean of its eight columns is 80.36." in text
    assert "median over many finetuning seeds" in text
    with pytest.raises(ConfigError, match="No published scores are called 'nobody'"):
        told(runs, compare=["nobody"])


def test_csv_has_every_metric_of_every_run(tmp_path: Path) -> None:
    values = {"mnli": {1: 0.1 + 0.2, 2: 0.7}, "mrpc": {5: 0.25}}
    out = tmp_path / "scores.csv"
    out.write_text("older", "utf8")
    told(write_glue(tmp_path, values, model='runs/"mini", 2'), csv=out)
    with out.open(encoding="utf8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["task"], int(row["seed"]), row["set"], row["metric"]): float(row["value"]) for row in rows}
    expected = {
        (task, seed, name, metric): value
        for task, seeds in values.items()
        for seed, one in seeds.items()
        for name, metrics in sets_of(task, one).items()
        for metric, value in metrics.items()
    }
    assert found == expected
    assert len(rows) == len(expected)
    assert {row["model"] for row in rows} == {'runs/"mini", 2'}
    assert {(row["rows"], row["step"], row["chosen"]) for row in rows} == {("408", "345", "last")}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_csv_that_cannot_be_written(tmp_path: Path) -> None:
    runs = write_glue(tmp_path, {"rte": {1: 0.5}})
    for out, message in ((tmp_path / "nowhere" / "a.csv", "No such file"), (tmp_path, "it is not an ordinary file")):
        with pytest.raises(CheckpointError, match=f"Cannot write .*{message}"):
            told(runs, csv=out)


def test_names_are_no_markup(tmp_path: Path) -> None:
    dev = {"dev": {"accuracy": 0.6}}
    text = told([write(tmp_path, "a", document("[red]mine[/]", 1, dev, model="[b]", recipe="[/x]"))])
    assert "[red]mine[/]" in text
    assert "[b], recipe [/x]" in text


def with_baseline(task: str, seed: int, baseline: dict[str, float], **scored: Any) -> dict[str, Any]:
    found = document(task, seed, sets_of(task, 0.5))
    for of_set in found["sets"].values():
        of_set |= {"baseline": baseline, "baseline_prediction": "'0'"} | scored
    return found


def test_each_score_and_each_mean_is_shown_next_to_its_baseline(tmp_path: Path) -> None:
    runs = [
        write(tmp_path, task, with_baseline(task, 0, dict.fromkeys(GLUE_METRICS[task], index / 20)))
        for index, task in enumerate(EIGHT)
    ]
    text = told(runs, csv=tmp_path / "scores.csv")
    for index, task in enumerate(EIGHT):
        part = ["(matched)"] if task == "mnli" else []
        assert row(text, task, *part, AVERAGE_METRICS[task]).split()[-4] == f"{5 * index:.2f}"
    assert row(text, "AVG").split()[1:3] == ["50.00", "17.50"]  # 5 x (0 + 1 + ... + 7) / 8
    assert "baseline: the score of one prediction for every row" in text
    with (tmp_path / "scores.csv").open(newline="", encoding="utf8") as file:
        lines = list(csv.DictReader(file))
    assert {(line["task"], float(line["baseline"])) for line in lines} == {
        (task, index / 20) for index, task in enumerate(EIGHT)
    }


def test_runs_that_recorded_no_baseline_are_reported_without_one(tmp_path: Path) -> None:
    old = write(tmp_path, "old", document("rte", 0, {"dev": {"accuracy": 0.6}}))
    assert "baseline" not in told([old])
    new = write(tmp_path, "new", with_baseline("cola", 0, {"matthews": 0.0}))
    text = told([old, new])
    assert row(text, "rte", "accuracy") == "rte accuracy 60.00 – 1 60.00 60.00–60.00"
    assert row(text, "cola", "matthews") == "cola matthews 50.00 0.00 1 50.00 50.00–50.00"


def test_a_model_that_is_no_better_than_its_baseline_gets_a_warning_with_its_seeds(tmp_path: Path) -> None:
    runs = [
        write(tmp_path, str(seed), with_baseline("rte", seed, {"accuracy": 0.5}, **({"warning": why} if why else {})))
        for seed, why in enumerate(["All are 'x'.", "", "All are 'x'."])
    ]
    assert "Warning: rte, seeds 0, 2: All are 'x'." in told(runs)
