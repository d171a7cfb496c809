"""AVG, GLUE and intervals, and the published tables made anew from their inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from electra_ds.core.errors import ConfigError
from electra_ds.report.glue_score import (
    AVERAGE_METRICS,
    GLUE_METRICS,
    WNLI_MAJORITY,
    PublishedScores,
    average,
    find_published,
    glue,
    missing_metrics,
    published_tables,
)
from electra_ds.report.scores import difference_interval, spread
from tests.helpers import REPOSITORY, SHARED_DATA

ROUNDED = 0.05 + 1e-9  # half of the last printed digit
STUDY = next(table for table in published_tables() if table.rows[0].name == "mercier2021").rows
ROWS = [row for table in published_tables() for row in table.rows]
COMPLETE = [row for row in STUDY if len(row.tasks) == 8]
PAGE = (REPOSITORY / "docs" / "glue-scores.md").read_text("utf8")

shares = st.floats(0, 1)
all_metrics = st.fixed_dictionaries(
    {task: st.fixed_dictionaries(dict.fromkeys(names, shares)) for task, names in GLUE_METRICS.items()}
)


def printed_sum(row: PublishedScores) -> float:
    """Of the eight printed columns, which have one decimal."""
    assert row.column_mean is not None
    return round(8 * row.column_mean, 1)


def binary_f1_range(accuracy: float, positive: float) -> tuple[float, float]:
    """What F1 can be at an accuracy and a share of positive labels: all errors are positives missed, or none is."""
    wrong = 1 - accuracy
    found = positive - wrong  # with every error a missed positive
    return 2 * found / (2 * found + wrong), 2 * positive / (2 * positive + wrong)


@given(all_metrics)
def test_means_are_the_sums_written_out(metrics: dict[str, dict[str, float]]) -> None:
    m = metrics
    eight = (
        m["cola"]["matthews"] + m["sst-2"]["accuracy"] + m["mrpc"]["accuracy"] + m["sts-b"]["spearman"]
        + m["qqp"]["accuracy"] + m["mnli"]["accuracy"] + m["qnli"]["accuracy"] + m["rte"]["accuracy"]
    ) / 8  # fmt: skip
    found = average(metrics)
    assert found is not None
    assert math.isclose(found, eight, abs_tol=1e-12)

    tasks = (
        m["cola"]["matthews"] + m["sst-2"]["accuracy"] + (m["mrpc"]["accuracy"] + m["mrpc"]["f1"]) / 2
        + (m["sts-b"]["pearson"] + m["sts-b"]["spearman"]) / 2 + (m["qqp"]["accuracy"] + m["qqp"]["f1"]) / 2
        + (m["mnli"]["accuracy"] + m["mnli"]["accuracy_mismatched"]) / 2 + m["qnli"]["accuracy"] + m["rte"]["accuracy"]
    )  # fmt: skip
    for wnli, value in (("own", m["wnli"]["accuracy"]), ("majority", 40 / 71)):
        score = glue(metrics, wnli)  # type: ignore[arg-type]
        assert score is not None
        assert math.isclose(score, (tasks + value) / 9, abs_tol=1e-12)


@given(all_metrics, st.data())
def test_what_is_missing_is_named(metrics: dict[str, dict[str, float]], data: st.DataObject) -> None:
    task = data.draw(st.sampled_from(sorted(metrics)))
    metric = data.draw(st.sampled_from(sorted(metrics[task])))
    rest = metrics | {task: {name: value for name, value in metrics[task].items() if name != metric}}
    assert missing_metrics(rest, GLUE_METRICS) == [f"{task} {metric}"]
    assert glue(rest, "own") is None
    assert (glue(rest) is None) == (task != "wnli")
    assert (average(rest) is None) == (AVERAGE_METRICS.get(task) == metric)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="a fact of the published file, which is not beside this checkout")
def test_wnli_dev_has_forty_of_its_seventy_one_rows_in_one_class() -> None:
    path = SHARED_DATA / "glue" / "WNLI" / "dev.tsv"
    labels = [line.split("\t")[-1] for line in path.read_text("utf8").splitlines()[1:]]
    assert (labels.count("0"), len(labels)) == WNLI_MAJORITY


@pytest.mark.parametrize("row", STUDY, ids=lambda row: row.name)
def test_the_studys_avg_is_that_of_qqp_accuracy_and_not_of_the_printed_column(row: PublishedScores) -> None:
    assert row.average is not None
    printed = row.tasks["qqp"]["f1"]
    total, implied = printed_sum(row), row.implied["qqp"]["accuracy"]
    assert abs((total - printed + implied) / 8 - row.average) <= ROUNDED
    assert abs(total / 8 - row.average) > 4 * ROUNDED  # eight columns and AVG, each rounded, cannot add up to it
    assert abs(8 * row.average - (total - printed) - implied) <= ROUNDED  # the implied value is AVG's
    low, high = binary_f1_range(implied / 100, 14_885 / 40_430)  # QQP dev: duplicates, pairs
    assert 100 * low < printed < 100 * high
    others = [row.tasks["qqp"]["accuracy"] for row in ROWS if row.name.endswith("small-owt")]
    assert min(others) - 1 < implied < max(others) + 0.5
    assert min(others) - 1 > printed


@pytest.mark.parametrize("row", COMPLETE, ids=lambda row: row.name)
def test_the_column_means_are_those_of_the_columns(row: PublishedScores) -> None:
    columns = [value for metrics in row.tasks.values() for value in metrics.values()]
    assert len(columns) == 8
    assert math.isclose(sum(columns), printed_sum(row))
    metrics = {task: {name: value / 100 for name, value in found.items()} for task, found in row.tasks.items()}
    assert average(metrics) is None
    metrics["qqp"]["accuracy"] = row.implied["qqp"]["accuracy"] / 100
    found = average(metrics)
    assert found is not None
    assert row.average is not None
    assert abs(100 * found - row.average) <= ROUNDED


def test_other_rows_equal_the_mean_of_their_columns() -> None:
    compared = 0
    for row in ROWS:
        if row in STUDY:
            continue
        found = average({task: {name: v / 100 for name, v in metrics.items()} for task, metrics in row.tasks.items()})
        means = [row.average, row.column_mean, 100 * found if found is not None else None]
        told = [mean for mean in means if mean is not None]
        if len(told) > 1:
            assert max(told) - min(told) <= ROUNDED, row.name
            compared += 1
    assert compared == 5 + 12  # rows that the study quotes; rows whose columns are at hand


@pytest.mark.parametrize("row", STUDY, ids=lambda row: row.name)
def test_the_studys_glue_counts_wnli_by_its_majority_class(row: PublishedScores) -> None:
    """GLUE's nine tasks from AVG's eight: only MRPC and QQP differ, by half of (F1 - accuracy)."""
    assert row.average is not None
    assert row.glue is not None
    wnli = 100 * 40 / 71
    qqp = (row.tasks["qqp"]["f1"] - row.implied["qqp"]["accuracy"]) / 2
    if "mrpc" in row.implied:
        mrpc = (row.implied["mrpc"]["f1"] - row.tasks["mrpc"]["accuracy"]) / 2
        assert abs((8 * row.average + wnli + qqp + mrpc) / 9 - row.glue) <= 2 * ROUNDED
    assert abs((8 * row.average + wnli) / 9 - row.glue) <= 0.2  # the two differences nearly cancel
    # the F1 that the printed value implies is one that the printed accuracy allows; rounding moves it by up to 1.8
    implied = row.tasks["mrpc"]["accuracy"] + 2 * (9 * row.glue - 8 * row.average - wnli - qqp)
    low, high = binary_f1_range(row.tasks["mrpc"]["accuracy"] / 100, 279 / 408)  # MRPC dev: equivalent, pairs
    assert 100 * low - 1.8 < implied < 100 * high + 1.8
    assert abs((8 * row.average + 65.07) / 9 - row.glue) > 0.7  # nor is it the majority of test


def test_the_studys_best_row_through_glue_itself() -> None:
    row = STUDY[0]
    metrics = {task: {name: value / 100 for name, value in found.items()} for task, found in row.tasks.items()}
    for task, found in row.implied.items():
        metrics[task] |= {name: value / 100 for name, value in found.items()}
    metrics["sts-b"]["pearson"] = metrics["sts-b"]["spearman"]
    metrics["mnli"]["accuracy_mismatched"] = metrics["mnli"]["accuracy"]
    score = glue(metrics)
    assert score is not None
    # (53.5 + 88.7 + (87.6 + 91.6) / 2 + 85.2 + (89.4 + 86.1) / 2 + 80.2 + 87.5 + 61.5 + 56.34) / 9 = 76.70
    assert abs(100 * score - 76.70) < 0.005
    assert abs(100 * score - row.glue) <= ROUNDED  # type: ignore[operator]


def test_published_rows_have_names_of_their_own_and_sources() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    for table in published_tables():
        assert table.source
        for row in table.rows:
            assert set(row.std) <= set(row.tasks)
            values = [value for found in row.tasks.values() for value in found.values()]
            assert all(1 < value <= 100 for value in values)
            assert find_published(row.name) == (table, row)
    with pytest.raises(ConfigError, match=r"called 'mercier'. The names are: .*mercier2021"):
        find_published("mercier")


def page_rows(columns: int) -> dict[str, list[str]]:
    """Cells by the first one, of the page's tables with so many further columns."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:1] == "|"]
    return {cells[0].strip("`"): cells[1:] for cells in lines if len(cells) == columns + 1 and cells[0][:1] == "`"}


def test_the_page_prints_the_published_numbers() -> None:
    rows = page_rows(10)
    for row in ROWS:
        if len(row.tasks) < 8:
            continue
        columns = []
        for task, metric in AVERAGE_METRICS.items():
            other = "" if metric in row.tasks[task] else " (F1)"
            columns.append(number(row.tasks[task]["f1" if other else metric]) + other)
        mean = row.average if row.average is not None else row.column_mean
        assert mean is not None
        assert rows.pop(row.name) == [*columns, number(mean), number(row.glue) if row.glue is not None else "–"]
    assert not rows


def test_the_page_prints_the_arithmetic() -> None:
    rows = page_rows(5)
    for row in STUDY:
        numbers = [row.column_mean, row.average, row.tasks["qqp"]["f1"], row.implied["qqp"]["accuracy"], row.glue]
        assert rows.pop(row.name) == [number(value) for value in numbers if value is not None]
    assert not rows


def number(value: float) -> str:
    return f"{value:.1f}" if round(value, 1) == value else f"{value:.2f}"


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12))
def test_spread_is_the_textbook_one(values: list[float]) -> None:
    found = spread(values)
    mean = math.fsum(values) / len(values)
    assert math.isclose(found.mean, mean, abs_tol=1e-12)
    assert (found.n, found.low, found.high) == (len(values), min(values), max(values))
    ordered = sorted(values)
    assert math.isclose(found.median, (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2, abs_tol=1e-12)
    if len(values) == 1:
        assert found.std is None
    else:
        assert found.std is not None
        squares = math.fsum((value - mean) ** 2 for value in values)
        assert math.isclose(found.std, math.sqrt(squares / (len(values) - 1)), abs_tol=1e-9)


def test_interval_is_welchs_by_hand() -> None:
    a, b = [0.79, 0.80, 0.78, 0.81, 0.795], [0.76, 0.79, 0.75]
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    for confidence in (0.9, 0.95):
        half = stats.t.ppf((1 + confidence) / 2, freedom) * math.sqrt(va + vb)
        difference, low, high = difference_interval(a, b, confidence)
        assert np.allclose([difference, low, high], [np.mean(a) - np.mean(b) + x for x in (0, -half, half)])  # type: ignore[list-item]


@pytest.mark.parametrize(("a", "b"), [([0.5], [0.4]), ([0.5, 0.6], [0.4]), ([0.5, 0.5], [0.5, 0.5])])
def test_no_interval_where_nothing_is_known_of_the_spread(a: list[float], b: list[float]) -> None:
    difference, low, high = difference_interval(a, b)
    assert (low, high) == (None, None)
    assert math.isclose(difference, np.mean(a) - np.mean(b), abs_tol=1e-12)


def test_one_side_without_spread_still_has_an_interval() -> None:
    difference, low, high = difference_interval([0.5, 0.5, 0.5], [0.4, 0.45, 0.5])
    assert low is not None
    assert high is not None
    assert low < difference < high
