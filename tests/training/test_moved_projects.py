"""A project whose folders were moved resumes: runs find their inputs next to them, or where an option says."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from electra_ds.cli import main
from electra_ds.config.options import PretrainOptions
from electra_ds.config.run_directory import RunDirectory, places_of
from electra_ds.config.run_record import FinetuneRecord
from electra_ds.core.errors import ConfigError, DataError
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from electra_ds.interop.export_finetuned import export_finetuned
from electra_ds.pretraining import prepare
from electra_ds.report.run_report import report_run
from electra_ds.sweep.folder import SweepFolder
from electra_ds.sweep.processes import arguments_of
from electra_ds.sweep.spec import SweepSpec
from electra_ds.sweep.sweep_file import parse_sweep
from electra_ds.sweep.trials import expand
from tests.finetune_runs import (
    arguments_of as finetune_arguments,
)
from tests.finetune_runs import finetune, scores_of, tiny_electra, write_glue
from tests.helpers import SMALL

OWN = "text,label\n" + "".join(f"a {word} film,{label}\n" for word, label in (("good", 1), ("bad", 0)) * 8)


def command(*arguments: object) -> str:
    """What a command of ours prints in this process; it has to succeed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main([*map(str, arguments)])
    return printed.getvalue()


def begin_pretraining(project: Path, store: TokenStore, steps: int = 2) -> Path:
    """A project with a token store and a run on it, at step 2 of 4."""
    shutil.copytree(store.path, project / "stores" / "mine")
    run = project / "runs" / "one"
    command(
        "pretrain", "--ds-config", "cpu", "--recipe", "tiny", "--data", project / "stores" / "mine", "--run-dir", run,
        "--threads", 1, "--eval-windows", 8, "--stop-at", steps, "--set", *SMALL, "schedule.total_steps=4",
        "schedule.warmup_steps=1",
    )  # fmt: skip
    return run


# --- where something may be


def test_what_moved_with_the_folder_is_found_first_and_the_recorded_path_last(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for place in (old / "stores" / "x", new / "stores" / "x", new / "runs" / "a", new / "x", new / "runs" / "x"):
        place.mkdir(parents=True)
    found = list(places_of(str(old / "stores" / "x"), new / "runs" / "a"))
    assert found == [new / "runs" / "x", new / "stores" / "x", new / "x", old / "stores" / "x"]
    assert next(places_of(str(old / "stores" / "x"), old / "runs" / "a")) == old / "stores" / "x"
    assert list(places_of(str(old / "gone"), new / "runs" / "a")) == []


def test_a_run_behind_a_link_finds_what_lies_next_to_the_link_and_next_to_the_run(tmp_path: Path) -> None:
    (tmp_path / "disk" / "runs" / "a").mkdir(parents=True)
    (tmp_path / "project" / "stores" / "x").mkdir(parents=True)
    (tmp_path / "disk" / "stores" / "y").mkdir(parents=True)
    (tmp_path / "project" / "runs").symlink_to(tmp_path / "disk" / "runs")
    run = tmp_path / "project" / "runs" / "a"
    assert next(places_of("/gone/stores/x", run)) == tmp_path / "project" / "stores" / "x"
    assert next(places_of("/gone/stores/y", run)) == tmp_path / "disk" / "stores" / "y"


# --- pretraining


@pytest.fixture(scope="module")
def project(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project") / "before"
    begin_pretraining(folder, store)
    return folder


def test_a_pretraining_resumes_where_runs_and_stores_were_moved_together(project: Path, tmp_path: Path) -> None:
    moved = tmp_path / "after"
    shutil.copytree(project, moved)
    hidden = project.rename(project.with_name("elsewhere"))
    try:
        assert "is finished" not in command("pretrain", "--resume", moved / "runs" / "one", "--stop-at", 3)
    finally:
        hidden.rename(project)
    assert RunDirectory(moved / "runs" / "one").read_record().store == str(moved / "stores" / "mine")


def test_a_copy_reads_its_own_store_and_not_the_originals(project: Path, tmp_path: Path, process_group: Ranks) -> None:
    copy = Path(shutil.copytree(project, tmp_path / "copy"))
    run = RunDirectory(copy / "runs" / "one")
    plan = prepare.plan_resume(PretrainOptions(), run, process_group)
    assert prepare.prepare_resume(PretrainOptions(), plan, run, process_group).store.path == copy / "stores" / "mine"


def test_a_store_that_is_elsewhere_is_named_by_an_option_and_checked(
    project: Path, tmp_path: Path, process_group: Ranks
) -> None:
    (tmp_path / "after" / "runs").mkdir(parents=True)
    run = RunDirectory(Path(shutil.copytree(project / "runs" / "one", tmp_path / "after" / "runs" / "one")))
    store = Path(shutil.copytree(project / "stores" / "mine", tmp_path / "big disk" / "other name"))
    record = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps(record | {"store": "/gone/stores/mine"}))

    def resume(data: Path | None) -> prepare.PretrainJob:
        options = PretrainOptions(data=data)
        return prepare.prepare_resume(options, prepare.plan_resume(options, run, process_group), run, process_group)

    with pytest.raises(DataError, match=rf"neither at /gone/stores/mine nor .*--resume {run.path} --data STORE"):
        resume(None)
    job = resume(store)
    assert (job.store.path, job.record.store) == (store, str(store))
    info = json.loads((store / "store.json").read_text())
    (store / "store.json").write_text(json.dumps(info | {"corpus_fingerprint": "0" * 64}))
    with pytest.raises(DataError, match=r"is not the one that .* was started on"):
        resume(store)


def test_a_report_finds_the_store_that_was_moved_and_takes_its_place_by_an_option(
    project: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(project, tmp_path / "after"))
    run = RunDirectory(moved / "runs" / "one")
    record = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps(record | {"store": "/gone/stores/mine"}))
    report_run(run)
    (run.path / "summary.txt").unlink()
    elsewhere = (moved / "stores" / "mine").rename(tmp_path / "elsewhere")
    shown = str(report_run(run))
    assert "discriminator AUC" in shown  # the table needs no store
    assert "Warning: " in shown
    assert f"report {run.path} --data STORE" in shown
    assert (run.path / "summary.txt").is_file()
    with pytest.raises(DataError):
        report_run(run, tmp_path / "nowhere")
    (run.path / "samples.txt").unlink()
    command("report", run.path, "--data", elsewhere)
    assert (run.path / "samples.txt").is_file()


# --- finetuning


def own_files(folder: Path) -> dict[str, Path]:
    folder.mkdir(parents=True)
    for name in ("train", "dev", "test"):
        (folder / f"{name}.csv").write_text(OWN)
    return {name: folder / f"{name}.csv" for name in ("train", "dev", "test")}


def begin_finetuning(project: Path, kind: str, *, has_checkpoint: bool) -> Path:
    """A project with a model, examples and a run on them, at step 1."""
    run = project / "runs" / "one"
    model = tiny_electra(project / "models" / "mine")
    if kind == "official":
        write_glue(project / "data" / "glue")
        arguments = finetune_arguments(model, project / "data" / "glue", "mrpc", run, stop_at=1)
    else:
        arguments = finetune_arguments(model, None, "", run, **own_files(project / "data" / "own"), stop_at=1)
    finetune(*arguments)
    if not has_checkpoint:
        shutil.rmtree(run / "checkpoints")
        (run / "status.json").unlink()
    return run


@pytest.mark.slow
@pytest.mark.parametrize("has_checkpoint", [True, False])
@pytest.mark.parametrize("kind", ["official", "own"])
def test_a_finetuning_resumes_where_its_project_was_moved(kind: str, has_checkpoint: bool, tmp_path: Path) -> None:
    begin_finetuning(tmp_path / "before", kind, has_checkpoint=has_checkpoint)
    project = (tmp_path / "before").rename(tmp_path / "after")
    finetune("--resume", project / "runs" / "one")
    record = RunDirectory(project / "runs" / "one").read_record(FinetuneRecord)
    assert str(tmp_path / "before") not in json.dumps(record.source.__dict__)
    assert scores_of(project / "runs" / "one")["task"] == record.task


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["official", "own"])
def test_a_finetuning_takes_the_new_places_of_its_model_and_examples_and_checks_them(kind: str, tmp_path: Path) -> None:
    run = begin_finetuning(tmp_path / "before", kind, has_checkpoint=False)
    data = (tmp_path / "before" / "data").rename(tmp_path / "other data")
    model = (tmp_path / "before" / "models" / "mine").rename(tmp_path / "my model")
    run = run.rename(tmp_path / "moved")
    said = finetune("--resume", run, status=2)
    assert f"finetune --resume {run} --model FOLDER" in said
    other = tiny_electra(tmp_path / "other model", seed=9)
    assert "is not the one that" in finetune("--resume", run, "--model", other, status=2)
    said = finetune("--resume", run, "--model", model, status=2)
    where = {"official": "--data-dir DIR", "own": "--train FILE --dev FILE"}[kind]
    assert f"finetune --resume {run} {where}" in said
    wrong = {"official": ("--dev", data), "own": ("--data-dir", data)}[kind]
    assert "does not fit this run" in finetune("--resume", run, "--model", model, *wrong, status=2)
    places: list[Any] = ["--data-dir", data / "glue"]
    if kind == "own":
        (data / "own" / "train.csv").rename(data / "own" / "reviews.csv")
        files = {"train": "reviews.csv", "dev": "dev.csv", "test": "test.csv"}
        places = [part for name, file in files.items() for part in (f"--{name}", data / "own" / file)]
    finetune("--resume", run, "--model", model, *places, "--stop-at", 2)
    assert "leave out --model" in finetune("--resume", run, "--model", model, status=2)
    finetune("--resume", run)  # the record has the new places
    assert scores_of(run)["task"] == RunDirectory(run).read_record(FinetuneRecord).task
    changed = next((data / "own").glob("dev.csv")) if kind == "own" else data / "glue" / "MRPC" / "dev.tsv"
    changed.write_text(changed.read_text().replace("film", "play"))
    (run / "status.json").unlink()
    assert "has changed since" in finetune("--resume", run, *places, status=2)


def test_examples_are_read_again_for_an_export_where_the_project_was_moved(tmp_path: Path) -> None:
    run = tmp_path / "before" / "runs" / "one"
    model = tiny_electra(tmp_path / "before" / "models" / "mine")
    files = own_files(tmp_path / "before" / "data")
    finetune(*finetune_arguments(model, None, "", run, "head.hidden_size=null", recipe="original", **files))
    moved = (tmp_path / "before").rename(tmp_path / "after")
    (moved / "runs" / "one" / "scores.json").unlink()
    export_finetuned(moved / "runs" / "one", None)
    config = json.loads((moved / "runs" / "one" / "export" / "config.json").read_text())
    assert set(config["label2id"]) == {"0", "1"}


# --- sweeps


def write_project(project: Path, store: TokenStore) -> SweepSpec:
    shutil.copytree(store.path, project / "stores" / "mine")
    values = {
        "name": "small", "pretrain": {
            "recipe": "tiny", "ds_config": "cpu", "data": str(project / "stores" / "mine"), "seeds": [0, 1],
        },
    }  # fmt: skip
    return parse_sweep(values, "test")


def kept(folder: SweepFolder, spec: SweepSpec) -> list[str]:
    with folder.locked():
        folder.write(folder.with_own_inputs(spec))
    trials = expand(spec, check=False)
    command_line = ["electra-ds", *arguments_of(trials[0], folder, spec)]
    folder.trial(trials[0].key).begin(trials[0], command_line, spec.resources)
    return [trial.key for trial in trials]


def test_a_sweep_that_was_moved_with_its_inputs_is_the_same_sweep_and_finds_them(
    store: TokenStore, tmp_path: Path
) -> None:
    spec = write_project(tmp_path / "a", store)
    keys = kept(SweepFolder(tmp_path / "a" / "runs" / "sweep"), spec)
    for before, after in (("a", "b"), ("b", "c")):
        project = (tmp_path / before).rename(tmp_path / after)
        folder = SweepFolder(project / "runs" / "sweep")
        again = folder.read()
        trials = expand(again, folder.relocated)
        assert [trial.key for trial in trials] == keys
        words = arguments_of(trials[1], folder, again)
        assert words[words.index("--data") + 1] == str(project / "stores" / "mine")
        folder.write(again)


def test_an_input_that_did_not_move_with_its_sweep_stays_where_it_is_and_a_lost_one_is_reported(
    store: TokenStore, tmp_path: Path
) -> None:
    spec = write_project(tmp_path / "a", store)
    kept(SweepFolder(tmp_path / "a" / "runs" / "sweep"), spec)
    (tmp_path / "b" / "deep").mkdir(parents=True)
    moved = SweepFolder((tmp_path / "a" / "runs" / "sweep").rename(tmp_path / "b" / "deep" / "sweep"))
    trial = expand(moved.read(), moved.relocated)[0]
    assert str(tmp_path / "a" / "stores" / "mine") in arguments_of(trial, moved, moved.read())
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"pretrain\.data: there is no folder .*put it back there, or make a link"):
        expand(moved.read(), moved.relocated)


@pytest.fixture
def finished(store: TokenStore, tmp_path: Path) -> Callable[[], SweepFolder]:
    def make() -> SweepFolder:
        spec = write_project(tmp_path / "a", store)
        folder = SweepFolder(tmp_path / "a" / "runs" / "sweep")
        for key in kept(folder, spec):
            folder.trial(key).run.path.mkdir()
            folder.trial(key).run.write_status("done", step=1)
        return folder

    return make


def test_a_finished_sweep_needs_none_of_its_inputs_any_more(finished: Callable[[], SweepFolder]) -> None:
    folder = finished()
    shutil.rmtree(folder.path.parent.parent / "stores")
    said = command("sweep", "--resume", folder.path)
    assert "2 trials, 2 done before" in said
    assert "The sweep is finished: nothing is left to run" in said
