"""GLUE in its official files and in the Hub's layout, and the user's own files."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from electra_ds.core.errors import DataError
from electra_ds.finetuning.glue import GLUE, OFFICIAL_ROWS, load_glue
from electra_ds.finetuning.load_task import load_glue_hub
from electra_ds.finetuning.metrics import score
from electra_ds.finetuning.own_files import LABEL_COLUMNS, PAIR_COLUMNS, TEXT_COLUMNS, load_own
from electra_ds.finetuning.tables import read_tsv
from electra_ds.finetuning.tasks.examples import Examples, Task, TaskData
from tests.data_files import DataFiles
from tests.glue_files import (
    FOLDERS,
    STS_HEADER,
    Row,
    official_table,
    rows_for,
    sets_of,
    write_official,
    write_tsv,
)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """`datasets` keeps what it prepared; not in the user's own cache."""
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


def check_rows(examples: Examples, rows: Sequence[Row], task: Task, *, labelled: bool) -> None:
    assert len(examples) == len(rows) > 0
    assert examples.texts == [a for a, _, _ in rows]
    assert examples.pairs == ([b for _, b, _ in rows] if task.is_pair else None)
    if not labelled:
        assert examples.labels is None
        return
    assert examples.labels is not None
    assert examples.labels.dtype == (np.int64 if task.labels else np.float64)
    assert examples.labels.tolist() == [y for _, _, y in rows]


def check_all(data: TaskData, name: str, all_rows: dict[str, list[Row]]) -> None:
    assert list(data.sets) == list(all_rows)
    for set_name, examples in data.sets.items():
        check_rows(examples, all_rows[set_name], GLUE[name], labelled=set_name == "train" or set_name in data.dev)
        assert examples.ids == [str(index) for index in range(len(examples))]
    assert all(key.startswith("dev") for key in data.dev)
    assert not any(key.startswith("dev") for key in data.test)


# --- the tasks


def test_tasks_agree_with_each_other_and_with_the_benchmark() -> None:
    assert list(GLUE) == list(OFFICIAL_ROWS) == list(FOLDERS)
    for name, task in GLUE.items():
        assert task.name == name
        assert tuple(score(task.metrics, [0, 1], [0, 1])) == task.metrics
        assert (task.kind == "regression") == (name == "sts-b") == (not task.labels)
        assert len(task.written) == len(task.labels)
        assert set(task.submission) == {s for s in OFFICIAL_ROWS[name] if s.startswith("test") or s == "ax"}
        assert hash(task) == hash(GLUE[name])
    files = {file for task in GLUE.values() for file in task.submission.values()}
    assert files == {
        "CoLA.tsv", "SST-2.tsv", "MRPC.tsv", "STS-B.tsv", "QQP.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "QNLI.tsv",
        "RTE.tsv", "WNLI.tsv", "AX.tsv",
    }  # fmt: skip


def test_predictions_are_written_as_the_benchmark_asks() -> None:
    for name in ("cola", "sst-2", "mrpc", "qqp", "wnli"):
        assert [GLUE[name].written_prediction(index) for index in (0, 1)] == ["0", "1"]
    assert [GLUE["mnli"].written_prediction(i) for i in range(3)] == ["entailment", "neutral", "contradiction"]
    for name in ("qnli", "rte"):
        assert [GLUE[name].written_prediction(np.int64(i)) for i in range(2)] == ["entailment", "not_entailment"]
    scores = [GLUE["sts-b"].written_prediction(score) for score in (-0.2, 0, 3.14159, np.float32(5.1))]
    assert scores == ["0.000", "0.000", "3.142", "5.000"]


def test_select_takes_rows_in_the_order_asked_for() -> None:
    examples = Examples(["a", "b", "c"], ["A", "B", "C"], ["x", "y", "z"], np.array([0, 1, 2]))
    chosen = examples.select(np.array([2, 0, 2]))
    assert (chosen.ids, chosen.texts, chosen.pairs) == (["c", "a", "c"], ["C", "A", "C"], ["z", "x", "z"])
    assert chosen.labels is not None
    assert chosen.labels.tolist() == [2, 0, 2]
    assert len(Examples(["a"], ["A"], None, None).select([])) == 0


# --- official files


@pytest.mark.parametrize(("end", "bom"), [("\n", False), ("\r\n", True)])
@pytest.mark.parametrize("name", GLUE)
def test_official_files_load_as_written(tmp_path: Path, name: str, end: str, bom: bool) -> None:
    all_rows = write_official(tmp_path / "glue", name, end, bom)
    data = load_glue(name, tmp_path / "glue")
    assert data.task == GLUE[name]
    check_all(data, name, all_rows)
    own = load_glue(name, tmp_path / "glue" / FOLDERS[name])
    assert own.fingerprint == data.fingerprint
    assert str(tmp_path) in data.source
    assert len(data.notes) == len(all_rows)
    assert all(re.fullmatch(rf"{name}: \w+ has 12 rows, officially [\d,]+\.", note) for note in data.notes)


def test_folders_are_found_in_any_case_and_spelling(tmp_path: Path) -> None:
    write_official(tmp_path, "sst-2")
    expected = load_glue("sst-2", tmp_path).fingerprint
    for spelling in ("sst2", "Sst-2"):
        (tmp_path / "SST-2").rename(tmp_path / spelling)
        assert load_glue("sst-2", tmp_path).fingerprint == expected
        (tmp_path / spelling).rename(tmp_path / "SST-2")
    (tmp_path / "SST-2").rename(tmp_path / "anything")
    assert load_glue("sst-2", tmp_path / "anything").fingerprint == expected


def test_rows_of_qqp_that_lack_a_column_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = rows_for("qqp", "train", 4)
    header, table = official_table("qqp", "train", rows)
    broken = [["7", "1", "2", "Why", "a break"], ["in a question?", "0"], [*table[0][:5], ""]]
    write_tsv(tmp_path / "QQP" / "train.tsv", (header, [table[0], *broken, *table[1:]]))
    data = load_glue("qqp", tmp_path)
    assert data.train is not None
    check_rows(data.train, rows, GLUE["qqp"], labelled=True)
    assert data.train.ids == ["0", "4", "5", "6"]
    assert data.notes[0].partition(": ")[2] == "rows left out because they have no label: 3."
    path = tmp_path / "QQP" / "train.tsv"
    path.write_bytes(path.read_bytes().replace(b"Why\ta break\n", b"Why\ta break\r"))  # a CR alone ends a line too
    assert load_glue("qqp", tmp_path).fingerprint == data.fingerprint


def test_mnli_without_a_gold_label_as_json_lines_and_with_the_diagnostic_set_inside(tmp_path: Path) -> None:
    folder, rows = tmp_path / "MNLI", rows_for("mnli", "dev_matched", 6)
    header, table = official_table("mnli", "dev_matched", rows)
    write_tsv(folder / "dev_matched.tsv", (header, [*table[:2], [*table[2][:-1], "-"], *table[2:]]))
    write_tsv(folder / "diagnostic.tsv", official_table("mnli", "ax", rows))
    data = load_glue("mnli", folder)
    check_rows(data.dev["dev_matched"], rows, GLUE["mnli"], labelled=True)
    check_rows(data.test["ax"], rows, GLUE["mnli"], labelled=False)
    assert list(data.sets) == ["dev_matched", "ax"]
    assert "because they have no label: 1" in data.notes[0]
    (folder / "dev_matched.tsv").unlink()
    records = [{"premise": a, "hypothesis": b, "label": GLUE["mnli"].labels[int(y)]} for a, b, y in rows]
    (folder / "dev_matched.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    from_json = load_glue("mnli", folder)
    assert from_json.fingerprint == data.fingerprint
    assert not any("no label" in note for note in from_json.notes)
    (folder / "test_matched.jsonl").write_text(json.dumps({"sentence1": "a", "sentence2": "b"}) + "\n")
    assert load_glue("mnli", folder).test["test_matched"].pairs == ["b"]
    (folder / "train.jsonl").write_text('{"premise": "a", "hypothesis": "b", "label": "neutral"}\n{"premise": "a"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl, row 2: 'label' is missing"):
        load_glue("mnli", folder)


def test_the_diagnostic_set_is_labelled_where_its_file_is(tmp_path: Path) -> None:
    write_official(tmp_path, "mnli")
    rows = rows_for("mnli", "ax")
    assert load_glue("mnli", tmp_path).test["ax"].labels is None
    write_tsv(tmp_path / "diagnostic" / "diagnostic-full.tsv", official_table("mnli", "labelled ax", rows))
    data = load_glue("mnli", tmp_path)
    check_rows(data.test["ax"], rows, GLUE["mnli"], labelled=True)
    assert data.test["test_matched"].labels is None


def test_the_rest_of_a_row_with_too_many_columns_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "test.tsv").write_text("index\tsentence1\tsentence2\n7\ta\tb\tc\n\n9\td\te\n")
    data = load_glue("rte", tmp_path)
    assert data.test["test"].ids == ["7", "9"]
    assert data.train is None
    assert data.dev == {}
    assert data.test["test"].pairs == ["b", "e"]


def test_a_class_that_train_or_a_dev_set_that_mnli_lacks_is_reported(tmp_path: Path) -> None:
    rows = [row for row in rows_for("mnli", "train") if row[2] != 1]
    write_tsv(tmp_path / "train.tsv", official_table("mnli", "train", rows))
    write_tsv(tmp_path / "dev_matched.tsv", official_table("mnli", "dev_matched", rows_for("mnli", "dev_matched")))
    data = load_glue("mnli", tmp_path)
    assert data.notes[-1] == "No example of train has the label 'neutral': it will not be predicted."
    assert "mnli: there is no dev_mismatched set, so it is not scored." in data.notes


def test_folders_without_the_task_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no GLUE task 'col'; did you mean 'cola'"):
        load_glue("col", tmp_path)
    with pytest.raises(DataError, match=r"The folder .* does not exist"):
        load_glue("cola", tmp_path / "nowhere")
    for name in GLUE:
        with pytest.raises(DataError, match=f"holds no files of {name}. It needs .*tsv.*, in it or in its subfolder"):
            load_glue(name, tmp_path)
    write_tsv(tmp_path / "diagnostic" / "diagnostic.tsv", official_table("mnli", "ax", rows_for("mnli", "ax")))
    (tmp_path / "MNLI").mkdir()
    with pytest.raises(DataError, match=r"It needs train.tsv, train.jsonl, dev_matched.tsv"):
        load_glue("mnli", tmp_path)
    write_official(tmp_path, "wnli")
    with pytest.raises(DataError, match=r"WNLI is the folder of wnli, not of rte"):
        load_glue("rte", tmp_path / "WNLI")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rte", b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\ta\tb\n", r"row 2: the label ''"),
        ("rte", b"index\tsentence1\tlabel\n", r"no column 'sentence2' \(did you mean 'sentence1'\?\); its columns"),
        ("rte", b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n", r"row 1: the label '1' is not one of entail"),
        ("cola", b"gj04\t1\t\tfine\ngj04\t2\t\tbad\n", r"train\.tsv, row 2: the label '2' is not one of 0, 1"),
        ("cola", b"index\tsentence\n0\tx\n", r"expected 4 and found 2"),
        ("cola", b"gj04\t1\t\tfine\ngj04\t1\t\t\xff\n", r"train\.tsv is not UTF-8"),
        ("sst-2", b"", r"train\.tsv is empty"),
        ("wnli", b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\t\n", r"row 1: the label '' is not one of 0, 1"),
        ("sts-b", ("\t".join(STS_HEADER) + "\tscore\n" + "x\t" * 9 + "5.1\n").encode(), r"'5.1' is not a score from 0"),
        ("sts-b", ("\t".join(STS_HEADER) + "\tscore\n" + "x\t" * 9 + "nan\n").encode(), r"'nan' is not a score from"),
    ],
)  # fmt: skip
def test_broken_official_files_are_refused_with_their_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / "train.tsv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_glue(name, tmp_path)


FIELDS = st.text(st.characters(exclude_characters="\t\n\r\0", exclude_categories=["Cs"]), max_size=12)


@given(st.lists(st.tuples(FIELDS, FIELDS), max_size=20), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_any_text_survives_a_tsv(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], end: str, bom: bool
) -> None:
    path = tmp_path_factory.mktemp("tsv") / "a.tsv"
    write_tsv(path, (["a", "b"], [list(row) for row in rows]), end, bom)
    table = read_tsv(path, wanted=["b", "a", "c"])
    assert list(zip(table.column("a"), table.column("b"), strict=True)) == rows


@pytest.mark.parametrize(
    ("name", "sets"),
    [
        ("cola", ("train", "dev", "test")), ("mrpc", ("train", "dev", "test")), ("sts-b", ("train", "dev", "test")),
        ("wnli", ("train", "dev", "test")), ("qnli", ("dev", "test")), ("mnli", ("dev_matched",)),
    ],
)  # fmt: skip
def test_published_files_are_read_whole(data_files: DataFiles, name: str, sets: tuple[str, ...]) -> None:
    data = load_glue(name, data_files.glue)
    assert tuple(data.sets) == sets
    absent = ["mnli: there is no dev_mismatched set, so it is not scored."]
    counted = [note for note in data.notes if "officially" not in note]
    assert counted == (absent if name == "mnli" else [])
    assert len(data.notes) - len(counted) == (0 if data_files.is_real else len(sets))
    for set_name, examples in data.sets.items():
        assert len(examples) == OFFICIAL_ROWS[name][set_name] or not data_files.is_real
        has_header = name != "mnli" and (name, set_name) not in {("cola", "train"), ("cola", "dev")}
        file = f"{FOLDERS[name]}/{set_name}.{'jsonl' if name == 'mnli' else 'tsv'}"
        assert len(examples) == data_files.rows(file, header=has_header)
        assert examples.ids == [str(index) for index in range(len(examples))]
        assert all(examples.texts)
        assert examples.pairs is None or all(examples.pairs)
        assert (examples.labels is None) == (set_name == "test")
        if examples.labels is not None and data.task.labels:
            assert set(examples.labels.tolist()) == set(range(len(data.task.labels)))


# --- the Hub's layout


HUB_TEXTS = {
    "cola": ("sentence",), "sst-2": ("sentence",), "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"), "ax": ("premise", "hypothesis"), "qnli": ("question", "sentence"),
}  # fmt: skip


def write_hub(
    folder: Path, tasks: Sequence[str], names: Sequence[str] | None = None
) -> dict[str, dict[str, list[Row]]]:
    """The tasks in Parquet, as nyu-mll/glue has them; of its real configuration "ax" has only a test set."""
    card, written = ["---", "configs:"], {}
    for name in tasks:
        config, task = name.replace("-", ""), GLUE["mnli" if name == "ax" else name]
        wanted = ["test"] if name == "ax" else [s for s in sets_of(name) if s != "ax"]
        written[name] = {set_name: rows_for(task.name, set_name) for set_name in wanted}
        card += [f"- config_name: {config}", "  data_files:"]
        for set_name, rows in written[name].items():
            split = set_name.replace("dev", "validation")
            texts = HUB_TEXTS.get(name, ("sentence1", "sentence2"))
            hidden = set_name.startswith("test") and name != "mrpc"  # MRPC's are there
            if task.labels:
                label: Any = datasets.ClassLabel(names=list(names or task.labels))
            else:
                label = datasets.Value("float32")
            features = {column: datasets.Value("string") for column in texts}
            rows_of = {column: [row[i] for row in rows] for i, column in enumerate(texts)}
            rows_of |= {"label": [-1 if hidden else y for _, _, y in rows], "idx": list(range(len(rows)))}
            table = datasets.Dataset.from_dict(
                rows_of, datasets.Features(features | {"label": label, "idx": datasets.Value("int32")})
            )
            path = folder / config / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            table.to_parquet(str(path))
            card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return written


def test_the_hubs_layout_gives_the_same_data_as_the_official_files(tmp_path: Path) -> None:
    write_hub(tmp_path / "hub", [name for name in GLUE if name != "mnli"])
    for name in GLUE:
        if name == "mnli":
            continue
        write_official(tmp_path / "files", name)
        files, hub = load_glue(name, tmp_path / "files"), load_glue_hub(name, str(tmp_path / "hub"))
        assert hub.task == files.task
        assert list(hub.sets) == list(files.sets)
        assert hub.fingerprint == files.fingerprint, name
        assert hub.source == f"hub:{tmp_path / 'hub'}#{name.replace('-', '')}"
        for set_name, examples in hub.sets.items():
            assert examples.ids == files.sets[set_name].ids


def test_mnli_of_the_hub_has_the_diagnostic_set_where_it_is_there(tmp_path: Path) -> None:
    all_rows = write_hub(tmp_path / "a", ["mnli"])
    data = load_glue_hub("mnli", str(tmp_path / "a"))
    check_all(data, "mnli", all_rows["mnli"])
    all_rows = write_hub(tmp_path / "b", ["mnli", "ax"])
    data = load_glue_hub("mnli", str(tmp_path / "b"))
    check_all(data, "mnli", all_rows["mnli"] | {"ax": all_rows["ax"]["test"]})


def test_what_is_not_laid_out_as_glue_on_the_hub_is_refused(tmp_path: Path) -> None:
    write_hub(tmp_path / "a", ["rte", "cola"], ["no", "yes"])
    folder = str(tmp_path / "a")
    for name, options, message in [
        ("rte", {}, "classes are no, yes, not GLUE's entailment, not_entailment"),
        ("wnli", {}, r"Cannot read hub:.*#wnli: .*'wnli' not found"),
        ("wnlu", {}, "no GLUE task 'wnlu'; did you mean 'wnli'"),
        ("rte", {"revision": "main"}, "has no revisions"),
        ("rte", {"repository": "./nowhere"}, "The dataset folder ./nowhere does not exist"),
    ]:
        with pytest.raises(DataError, match=message):
            load_glue_hub(name, **{"repository": folder, **options})
    for number, (columns, message) in enumerate(
        [
            ({"text": ["a"], "label": [0]}, "no column 'sentence'; its columns are text, label"),
            ({"sentence": ["a"], "label": [2]}, "row 1: the label '2' is not one of 0, 1"),
            ({"sentence": ["a", "b"], "label": [0, -1]}, "row 2: the label '-1' is not one"),
            ({"sentence": ["a"], "label": [0.5]}, "row 1: the label '0.5' is not one"),
            ({"sentence": pa.array([None, "b"]), "label": [0, 1]}, "row 1: 'sentence' is missing, or not one text"),
        ]
    ):
        folder_of = tmp_path / f"broken{number}"
        (folder_of / "cola").mkdir(parents=True)
        pq.write_table(pa.table(columns), folder_of / "cola" / "train-0.parquet")
        (folder_of / "README.md").write_text("---\nconfigs:\n- config_name: cola\n  data_files: cola/*.parquet\n---\n")
        with pytest.raises(DataError, match=message):
            load_glue_hub("cola", str(folder_of))


# --- the user's own files


def write(path: Path, *lines: str) -> Path:
    path.write_bytes("\n".join([*lines, ""]).encode())
    return path


def write_rows(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    """In the form that the name says."""
    if path.suffix == ".jsonl":
        return write(path, *(json.dumps(dict(zip(header, row, strict=True))) for row in rows))
    with path.open("w", encoding="utf8", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([header, *rows])
    return path


ANY_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=15)


@given(
    st.lists(st.tuples(ANY_TEXT, ANY_TEXT, st.sampled_from(["no", "yes"])), min_size=1, max_size=12),
    st.sampled_from([".csv", ".tsv", ".jsonl"]),
)
def test_any_text_survives_every_form(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]], suffix: str
) -> None:
    folder = tmp_path_factory.mktemp("own")
    whole = [("x", "y", "no"), ("x", "y", "yes"), *rows]
    path = write_rows(folder / f"mood{suffix}", ["premise", "hypothesis", "label"], whole)
    data = load_own(path, None, None)
    assert data.train is not None
    assert data.train.texts == [a for a, _, _ in whole]
    assert data.train.pairs == [b for _, b, _ in whole]
    assert data.train.labels is not None
    assert [data.task.labels[index] for index in data.train.labels] == [label for _, _, label in whole]
    assert data.task == Task(
        "mood", "classification", ("no", "yes"), True, ("accuracy", "f1_macro", "f1", "matthews"), ("no", "yes")
    )


def test_all_three_sets_in_any_form_have_the_same_fingerprint(tmp_path: Path) -> None:
    rows = [("a,\tb", "x"), ('He said "no"', "y"), ("", "z"), ("line\nbreak", "x")]
    found = set()
    for suffix in (".csv", ".tsv", ".jsonl"):
        train = write_rows(tmp_path / f"train{suffix}", ["id", "text", "label"], [(f"r{a}", a, b) for a, b in rows])
        dev = write_rows(tmp_path / f"dev{suffix}", ["label", "text"], [(b, a) for a, b in rows[:3]])
        test = write_rows(
            tmp_path / f"test{suffix}", ["text", "idx"], [(a, str(7 * i)) for i, (a, _) in enumerate(rows)]
        )
        data = load_own(train, dev, test)
        found.add(data.fingerprint)
        assert data.train is not None
        assert data.train.ids[0] == "ra,\tb"
        assert data.dev["dev"].ids == ["0", "1", "2"]
        assert data.test["test"].ids == ["0", "7", "14", "21"]
        assert data.test["test"].labels is None
        assert data.task.metrics == ("accuracy", "f1_macro")
        assert data.task.written_prediction(2) == "z"
    assert len(found) == 1
    assert load_own(train, dev, None).fingerprint not in found
    changed = write_rows(tmp_path / "dev.jsonl", ["label", "text"], [("x", "a,\tb"), ("y", 'He said "no"'), ("y", "")])
    assert load_own(train, changed, test).fingerprint not in found


def labels_of(path: Path, labels: Sequence[object], **options: Any) -> TaskData:
    write(path, *(json.dumps({"text": f"t{i}", "label": label}) for i, label in enumerate(labels)))
    return load_own(path, None, None, **options)


def test_the_kind_and_the_order_of_classes_come_from_the_labels(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    assert labels_of(path, ["10", "9", "-1"]).task.labels == ("-1", "9", "10")
    assert labels_of(path, [10, 9, 10]).task.labels == ("9", "10")
    assert labels_of(path, ["10", "9", "b"]).task.labels == ("10", "9", "b")
    assert labels_of(path, [True, False]).task.labels == ("false", "true")
    assert labels_of(path, [*range(20)]).task.kind == "classification"
    many = labels_of(path, [*range(21)])
    assert (many.task.kind, many.task.score_range, many.task.labels) == ("regression", (0.0, 20.0), ())
    assert many.task.metrics == ("spearman", "pearson", "mse")
    assert labels_of(path, [*range(21)], kind="classification").task.labels[-1] == "20"
    scores = labels_of(path, [1, 2.5, -3])
    assert scores.train is not None
    assert scores.train.labels is not None
    assert scores.train.labels.dtype == np.float64
    assert scores.train.labels.tolist() == [1, 2.5, -3]
    assert scores.task.score_range == (-3.0, 2.5)
    assert scores.task.written_prediction(7.25) == "7.25"
    assert labels_of(path, [1, 2], kind="regression").task.kind == "regression"
    assert labels_of(path, ["0.5", "x"]).task.kind == "classification"


def test_columns_are_chosen_by_their_names_or_as_asked_for(tmp_path: Path) -> None:
    def read(header: Sequence[str], **options: Any) -> tuple[str, str | None, float]:
        rows = [[f"{name}-{label}" if name not in LABEL_COLUMNS else label for name in header] for label in "01"]
        data = load_own(write_rows(tmp_path / "a.csv", header, rows), None, None, **options)
        assert data.train is not None
        assert data.train.labels is not None
        pair = data.train.pairs[0] if data.train.pairs else None
        return data.train.texts[0], pair, float(data.train.labels[1])

    for name in TEXT_COLUMNS:
        for label in LABEL_COLUMNS:
            assert read([label, name, "other"]) == (f"{name}-0", None, 1)
    for name in PAIR_COLUMNS:
        assert read(["label", name, "text"]) == ("text-0", f"{name}-0", 1)
    assert read(["question", "sentence", "label"]) == ("question-0", "sentence-0", 1)
    assert read(["text", "sentence", "label"]) == ("text-0", None, 1)
    assert read(["premise", "hypothesis", "label"], text="hypothesis") == ("hypothesis-0", None, 1)
    assert read(["x", "y", "score", "label"], text="y", pair="x", label="score") == ("y-0", "x-0", 1)
    assert read(["text", "label", "z"], pair="z") == ("text-0", "z-0", 1)
    for options, message in [
        ({"text": "txt"}, "no column 'txt' .did you mean 'text'.*; its columns are text, label, z"),
        ({"text": "z", "pair": "z"}, "must be different columns"),
        ({"text": "label"}, "no label column; its columns are text, label, z"),
        ({"text": "txt", "label": "lable"}, "no column 'txt'.*; no column 'lable' .did you mean 'label'"),
        ({"text": "a", "pair": "a"}, "no column 'a'; its columns are text, label, z"),
    ]:
        with pytest.raises(DataError, match=message):
            read(["text", "label", "z"], **options)
    with pytest.raises(
        DataError, match="no column 'c'; no text column; no label column; its columns are a, b"
    ) as caught:
        read(["a", "b"], pair="c")
    assert "--text COLUMN" in str(caught.value)
    assert "--label COLUMN" in str(caught.value)


def test_all_columns_that_a_file_lacks_are_named_together(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", "text,text2,label", "a,b,0", "c,d,1")
    other = write(tmp_path / "other.csv", "words,label", "a,0")
    with pytest.raises(
        DataError, match=r"other\.csv: no column 'text'; no column 'text2'; its columns are words, label"
    ):
        load_own(train, None, other)
    bare = write(tmp_path / "bare.csv", "words", "a")
    with pytest.raises(
        DataError, match="no column 'text'; no column 'text2'; no column 'label'; its columns are words"
    ):
        load_own(train, bare, None)
    write(tmp_path / "train.tsv", "index\tx", "0\ta")
    with pytest.raises(DataError, match="no column 'sentence1'; no column 'sentence2'; no column 'label'; its columns"):
        load_glue("rte", tmp_path)


def test_a_test_file_may_have_labels_or_something_in_their_place(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", "text,label", "a,0", "b,1")
    for label, expected in (("1", [1, 1]), ("", None), ("-1", None), ("?", None)):
        test = write(tmp_path / "test.csv", "text,label", f"a,{label}", f"b,{label}")
        labels = load_own(train, None, test).test["test"].labels
        assert (None if labels is None else labels.tolist()) == expected
    negative = write(tmp_path / "train.csv", "text,label", "a,-1", "b,1")
    test = write(tmp_path / "test.csv", "text,label", "a,-1")
    labels = load_own(negative, None, test).test["test"].labels
    assert labels is not None
    assert labels.tolist() == [0]


def test_the_name_of_an_own_task_says_what_it_is_and_is_never_a_published_one(tmp_path: Path) -> None:
    lines = ("text,label", "a,no", "b,yes")
    for path, name in (
        ("reviews.csv", "reviews"), ("stars/train.csv", "stars"), ("cola.csv", "own-cola"),
        ("rte/train.csv", "own-rte"), ("SQuAD1.csv", "own-SQuAD1"),
    ):  # fmt: skip
        (tmp_path / path).parent.mkdir(exist_ok=True)
        assert load_own(write(tmp_path / path, *lines), None, None).task.name == name


def test_a_class_that_dev_lacks_is_reported(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", "text,label", "a,x", "b,y", "c,z")
    dev = write(tmp_path / "dev.csv", "text,label", "a,y")
    assert load_own(train, dev, None).notes == (
        "No example of dev has the label 'x', 'z': its scores say nothing about it.",
    )
    assert load_own(train, train, None).notes == ()


BROKEN: list[tuple[str, dict[str, str], str]] = [
    ("no text column", {"train.csv": "body,label\na,0\n"}, r"no text column; its columns are body, label\. Name"),
    ("no label column", {"train.csv": "text,mark\na,0\n"}, r"no label column; its columns are text, mark\. Name"),
    ("dev lacks it", {"train.csv": "text,label\na,0\nb,1\n", "dev.csv": "text,mark\na,0\n"},
     r"dev\.csv: no column 'label'; its columns are text, mark"),
    ("unknown label", {"train.csv": "text,label\na,yes\nb,no\n", "dev.csv": "text,label\na,no\nb,yess\n"},
     r"dev\.csv, row 2: the label 'yess' is not one of the training labels, 'no', 'yes'; did you mean 'yes'"),
    ("unknown label in test", {"train.csv": "text,label\na,yes\nb,no\n", "test.csv": "text,label\na,no\nb,maybe\n"},
     r"test\.csv, row 2: the label 'maybe'"),
    ("header only", {"train.csv": "text,label\n"}, r"train\.csv has no rows"),
    ("empty", {"train.csv": ""}, r"train\.csv is empty"),
    ("empty JSON", {"train.jsonl": "\n"}, r"no text column; no label column; its columns are none"),
    ("dev header only", {"train.csv": "text,label\na,0\nb,1\n", "dev.csv": "text,label\n"}, r"dev\.csv has no rows"),
    ("one class", {"train.csv": "text,label\na,0\nb,0\n"}, r"every row has the label '0', so there is nothing"),
    ("one score", {"train.csv": "text,label\na,0.5\nb,0.50\n"}, r"every row has the label '0.5'"),
    ("no score", {"train.csv": "text,score\na,0.5\nb,1.5\n", "dev.csv": "text,score\na,0.5\nb,high\n"},
     r"dev\.csv, row 2: the label 'high' is not a finite number"),
    ("infinite", {"train.csv": 'text,score\n"a\nb",0.5\n\nb,inf\n'}, r"row 2: the label 'inf' is not a finite"),
    ("NaN", {"train.jsonl": '{"text": "a", "score": 0.5}\n{"text": "b", "score": NaN}\n'},
     r"row 2: the label 'NaN' is not a finite"),
    ("no label", {"train.csv": "text,label\na,0\nb,\n"}, r"train\.csv, row 2: the label 'label' is empty"),
    ("null label", {"train.jsonl": '{"text": "a", "label": 0}\n{"text": "b", "label": null}\n'},
     r"row 2: the label 'label' is empty"),
    ("broken JSON", {"train.jsonl": '{"text": "a", "label": 0}\n\n{"text": \n'}, r"line 3: not an object"),
    ("no object", {"train.jsonl": '["a", 0]\n'}, r"line 1: not an object"),
    ("key missing", {"train.jsonl": '{"text": "a", "label": 0}\n{"label": 1}\n'}, r"row 2: 'text' is missing"),
    ("list", {"train.jsonl": '{"text": "a", "label": [0]}\n'}, r"row 1: 'label' is missing, or not one text"),
    ("not UTF-8", {"train.csv": "text,label\na,0\n\udcff,1\n"}, r"train\.csv is not UTF-8"),
    ("too few", {"train.csv": 'text,label\n"a\nb",0\nb\n'}, r"line 4: 1 field\(s\), but the first line has 2"),
    ("too many", {"train.tsv": "text\tlabel\na\t0\nb\t1\tx\n"}, r"line 3: 3 field\(s\), but the first line has 2"),
    ("too many in the first", {"train.csv": "text,label\na,0,x\n"}, r"line 2: 3 field\(s\), but the first line has 2"),
    ("open quote", {"train.tsv": 'text\tlabel\na\t0\n"b\t1\nc\t1\n'}, r"train\.tsv: .*unexpected end of data"),
    ("empty text", {"train.csv": "text,label\n,0\n ,1\n"}, r"the column 'text' is empty in every row"),
    ("list in lines", {"train.json": '[\n{"text": "a", "label": 0}\n]\n'}, r"not an object .* with: jq -c '\.\[\]'"),
    ("list in a line", {"train.json": '[{"text": "a", "label": 0}]\n'}, r"not an object .* with: jq -c '\.\[\]'"),
    ("foreign name", {"train.xlsx": "x"}, r"a file of examples must end in \.csv, \.tsv, \.jsonl"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_broken_files_are_refused_with_their_place(tmp_path: Path, files: dict[str, str], message: str) -> None:
    paths = {}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode("utf8", "surrogateescape"))
        paths[Path(name).stem] = tmp_path / name
    with pytest.raises(DataError, match=message):
        load_own(paths["train"], paths.get("dev"), paths.get("test"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot read .*nowhere\.csv: No such file"):
        load_own(tmp_path / "nowhere.csv", None, None)


def test_a_long_text_is_no_hindrance(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", "text,label", "a,0", f"{'word ' * 50_000},1")
    data = load_own(path, None, None)
    assert data.train is not None
    assert len(data.train.texts[1]) == 250_000
