"""What a sweep's folder says: states of trials, cells over seeds, tables, forecasts, and who waits for whom."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import shutil
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

import electra_ds
from electra_ds.api.reports import run_sweep
from electra_ds.core.errors import ConfigError
from electra_ds.data.build import build_store
from electra_ds.data.corpus import open_corpus
from electra_ds.finetuning.glue import GLUE
from electra_ds.report.tables import Line, Table, print_report
from electra_ds.sweep.folder import MetricsTail, SweepFolder, as_result
from electra_ds.sweep.forecast import plan_sweep
from electra_ds.sweep.processes import Node, arguments_of, status_of, trials_at_once
from electra_ds.sweep.results import cells, report_sweep, results
from electra_ds.sweep.spec import Resources, SweepSpec
from electra_ds.sweep.sweep_file import parse_sweep
from electra_ds.sweep.trials import Trial, expand, suggested
from tests.helpers import small_recipe
from tests.report.test_scores import document, sets_of
from tests.sweep.test_spec import MODEL, pretraining

FEW = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


def made(values: dict[str, Any]) -> tuple[SweepSpec, list[Trial]]:
    spec = parse_sweep(values, "test")
    return spec, expand(spec, check=False)


def both(pretraining_seeds: list[int], finetuning_seeds: list[int]) -> dict[str, Any]:
    values = pretraining(seeds=pretraining_seeds)
    task = {"task": {"grid": ["cola", "rte"]}}
    return values | {"finetune": {"recipe": "rc2020", "space": task, "seeds": finetuning_seeds}}


def pretend(folder: SweepFolder, trial: Trial, value: float | None, status: str = "done", **details: Any) -> None:
    """The files that a run leaves behind."""
    folder.trial(trial.key).begin(trial, ["electra-ds", trial.stage], Resources())
    folder.trial(trial.key).end(0 if status != "failed" else 1)
    run = folder.trial(trial.key).run.path
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "status.json").write_text(json.dumps({"status": status, "step": 9} | details))
    if value is None:
        return
    if trial.stage == "pretrain":
        line = {"kind": "eval", "step": 9, "discriminator_auc": value, "generator_accuracy": value / 2}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    else:
        task = str(trial.options["task"])
        (run / "scores.json").write_text(json.dumps(document(task, trial.seed, sets_of(task, value))))


def told(folder: SweepFolder, trials: list[Trial], spec: SweepSpec, width: int = 160) -> str:
    return shown(report_sweep(folder, trials, spec).parts, width)


def shown(parts: Iterable[Table | Line], width: int = 160) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    print_report(parts, console)
    return console.export_text()


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    found = SweepFolder(tmp_path / "sweep")
    found.make()
    return found


# --- cells


@FEW
@given(data=st.data(), pretrainings=st.integers(1, 3), finetunings=st.integers(1, 4))
def test_variance_is_nested_where_there_are_several_pretrainings(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, pretrainings: int, finetunings: int
) -> None:
    spec, trials = made(both(list(range(pretrainings)), list(range(finetunings))))
    folder = SweepFolder(tmp_path_factory.mktemp("sweep"))
    folder.write(spec)
    values: dict[str, dict[int, list[float]]] = {}
    for trial in trials:
        value = data.draw(st.floats(0, 1).map(lambda share: round(share, 3)))
        pretend(folder, trial, value)
        if trial.stage == "finetune":
            values.setdefault(trial.options["task"], {}).setdefault(trial.values["pretrain.seed"], []).append(value)
    found = cells(results(folder, trials), "finetune", ["score"]).set_index("task")
    for task, by_encoder in values.items():
        row = found.loc[task]
        if pretrainings == 1:
            (only,) = by_encoder.values()
            assert row["n"] == len(only)
            assert row["mean"] == pytest.approx(statistics.mean(only))
            assert len(only) == 1 or row["std"] == pytest.approx(statistics.stdev(only), abs=1e-9)
            assert row["median"] == pytest.approx(statistics.median(only))
        else:
            means = [statistics.mean(each) for each in by_encoder.values()]
            assert row["n"] == pretrainings
            assert row["std"] == pytest.approx(statistics.stdev(means), abs=1e-9)
            if finetunings > 1:
                inner = statistics.mean(statistics.stdev(each) for each in by_encoder.values())
                assert row["std_finetuning"] == pytest.approx(inner, abs=1e-9)
        every = [value for of_encoder in by_encoder.values() for value in of_encoder]
        assert (row["low"], row["high"]) == (min(every), max(every))


def test_what_the_spread_is_over_is_said(folder: SweepFolder) -> None:
    spec, trials = made(both([0], [0, 1, 2]))
    for trial in trials:
        pretend(folder, trial, 0.5 + trial.seed / 10)
    text = told(folder, trials, spec)
    assert "over finetuning seeds only, without the spread of pretraining" in text
    assert "60.00 ± 10.00" in text
    assert "AVG" not in text  # six of its tasks are not there
    nested_spec, nested = made(both([0, 1], [0, 1, 2]))
    for trial in nested:
        if not folder.trial(trial.key).run.path.exists():
            pretend(folder, trial, 0.4 + trial.seed / 10)
    assert "over pretraining seeds of the means over their finetuning seeds" in told(folder, nested, nested_spec)


def test_glues_means_are_over_the_seeds_that_have_all_tasks(folder: SweepFolder) -> None:
    tasks = [task for task in GLUE if task != "ax"]
    spec, trials = made(
        {"name": "x", "finetune": {"recipe": "rc2020", "model": MODEL, "space": {"task": {"grid": tasks}},
                                   "seeds": [0, 1, 2]}}
    )  # fmt: skip
    for trial in trials:
        if (trial.seed, trial.options["task"]) != (2, "qqp"):
            pretend(folder, trial, 0.5 + 0.02 * trial.seed)
    text = told(folder, trials, spec, width=200)
    assert "AVG" in text
    assert "51.00 ± 1.41" in text
    assert "26 done, 1 waiting of 27 trials" in text


def test_scores_are_shown_next_to_their_baseline_and_warnings_are_printed(folder: SweepFolder) -> None:
    tasks = [task for task in GLUE if task != "ax"]
    values = {"name": "x", "finetune": {"recipe": "rc2020", "model": MODEL, "space": {"task": {"grid": tasks}}}}
    spec, trials = made(values)
    for trial in trials:
        pretend(folder, trial, 0.5)
        path = folder.trial(trial.key).run.path / "scores.json"
        scores = json.loads(path.read_text())
        for of_set in scores["sets"].values():
            of_set |= {"baseline": dict.fromkeys(of_set["metrics"], 0.125), "warning": "all are 'x'"}
        path.write_text(json.dumps(scores))
    text = told(folder, trials, spec, width=240)
    (line,) = [line.split() for line in text.splitlines() if line.split()[:1] == ["baseline"]]
    # of nine tasks and AVG; GLUE counts WNLI as its majority class: (8 x 12.5 + 56.338) / 9
    assert line[1:] == ["12.50"] * (len(tasks) + 1) + ["17.37"]
    assert all(f"Warning: {trial.key}: all are 'x'" in text for trial in trials)
    table = pd.read_csv(folder.path / "cells.csv")
    assert (table[table["metric"] == "accuracy"]["baseline"] == 0.125).all()


def test_scores_on_your_own_examples_are_shown_next_to_their_baseline(folder: SweepFolder, tmp_path: Path) -> None:
    files = {name: str(tmp_path / f"{name}.csv") for name in ("train", "dev")}
    spec, (trial,) = made({"name": "x", "finetune": {"recipe": "own", "model": MODEL} | files})
    pretend(folder, trial, None)
    scores = document("train", trial.seed, {"dev": {"accuracy": 0.5, "mse": 2.0}}, recipe="own")
    scores["sets"]["dev"]["baseline"] = {"accuracy": 0.125, "mse": 3.0}
    (folder.trial(trial.key).run.path / "scores.json").write_text(json.dumps(scores))
    lines = [line.split() for line in told(folder, [trial], spec, width=90).splitlines()]
    assert ["metric", "mean", "±", "std", "baseline", "n", "min–max"] in lines
    assert ["accuracy", "50.00", "12.50", "1", "50.00–50.00"] in lines
    assert ["mse", "2.0000", "3.0000", "1", "2.0000–2.0000"] in lines


def test_the_best_cell_comes_first_where_the_sweep_goes_by_a_metric(folder: SweepFolder) -> None:
    values = pretraining(space={"optimizer.learning_rate": {"grid": [1e-4, 2e-4, 3e-4]}})
    for mode, order in (("max", ["0.0002", "0.0001", "0.0003"]), ("min", ["0.0003", "0.0001", "0.0002"])):
        spec, trials = made(values | {"metric": {"name": "discriminator_auc", "mode": mode}})
        for trial in trials:
            if not folder.trial(trial.key).run.path.exists():
                pretend(folder, trial, {1e-4: 0.6, 2e-4: 0.9, 3e-4: 0.5}[trial.values["optimizer.learning_rate"]])
        text = told(folder, trials, spec, width=90)
        assert re.findall(r"(0\.000\d)\s+discriminator_auc", text) == order


# --- states


def test_the_folder_says_how_far_each_trial_is(folder: SweepFolder) -> None:
    spec, trials = made(pretraining(seeds=list(range(6))))
    done, collapsed, failed, refused, begun, waiting = trials
    pretend(folder, done, 0.7)
    pretend(folder, collapsed, 0.5, "collapsed", collapsed_at=4)
    pretend(folder, failed, None, "failed", reason="it broke")
    folder.trial(refused.key).refuse(refused, spec.resources, "no such file")
    folder.trial(begun.key).begin(begun, ["electra-ds"], spec.resources)
    found = [folder.trial(trial.key).state() for trial in trials]
    assert found == [
        ("done", ""), ("collapsed", "at step 4"), ("failed", "it broke"), ("failed", "no such file"),
        ("unfinished", ""), ("waiting", ""),
    ]  # fmt: skip
    text = told(folder, trials, spec)
    assert "it broke" in text
    assert "no such file" in text
    assert (folder.path / "curves.png").exists()
    folder.trial(failed.key).clear_failure()
    assert folder.trial(failed.key).record() is not None
    assert not (folder.trial(failed.key).run.path / "status.json").exists()
    assert folder.trial(done.key).state() == ("done", "")
    assert folder.trial(waiting.key).state() == ("waiting", "")


def test_nothing_is_finetuned_of_a_pretraining_that_failed(folder: SweepFolder) -> None:
    _, trials = made(both([0, 1], [0]))
    good, bad = (trial for trial in trials if trial.stage == "pretrain")
    pretend(folder, good, 0.7, "collapsed")
    pretend(folder, bad, 0.7, "failed")
    for trial in trials:
        if trial.stage == "finetune":
            assert folder.can_begin(trial) == (trial.pretraining is good)


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "5", '{"status": ["done"]}', '{"status": "splendid"}', "\x00"],
    ids=range(7),
)
def test_damaged_records_are_trials_that_were_begun(folder: SweepFolder, damage: str) -> None:
    spec, (trial, *_) = made(pretraining())
    pretend(folder, trial, 0.7)
    (folder.trial(trial.key).run.path / "status.json").write_text(damage)
    assert folder.trial(trial.key).state()[0] == "unfinished"
    (folder.path / "trials" / f"{trial.key}.json").write_text(damage)
    assert folder.trial(trial.key).record() is None
    assert "unfinished" in told(folder, [trial], spec)


def test_what_stopped_by_itself_is_done_with_and_what_a_signal_stopped_is_not(folder: SweepFolder) -> None:
    _, trials = made(pretraining(seeds=[0, 1, 2]))
    for trial, reason in zip(trials, ("--stop-at 9", "ended by the scheduler", "SIGTERM"), strict=True):
        pretend(folder, trial, 0.7, "stopped", reason=reason)
    assert [folder.trial(trial.key).state()[0] for trial in trials] == ["stopped", "stopped", "unfinished"]


def test_a_pretraining_that_goes_on_ends_and_keeps_what_it_would_have(folder: SweepFolder) -> None:
    values = both([0], [0])
    values["pretrain"] |= {"stop_at_share": 0.5, "checkpoints": [0.25, 0.5], "stop_on_collapse": True}
    spec, trials = made(values)
    new = arguments_of(trials[0], folder, spec)
    pretend(folder, trials[0], 0.5, "collapsed", collapsed_at=2600)
    folder.trial(trials[0].key).run.write_status("collapsed", step=3000, collapsed_at=2600)
    resumed = arguments_of(trials[0], folder, spec)
    total = trials[0].recipe.schedule.total_steps  # type: ignore[union-attr]
    for words in (["--stop-at", str(total // 2)], ["--keep-at", str(total // 4), str(total // 2)]):
        for arguments in (new, resumed):
            start = arguments.index(words[0])
            assert arguments[start : start + len(words)] == words
    (folder.trial(trials[0].key).run.checkpoints / f"step-{total // 4:08d}").mkdir(parents=True)
    assert folder.state_of(trials[-1]) == ("skipped", "its encoder collapsed before step 6000")
    assert [folder.can_begin(trial) for trial in trials[1:]] == [trial.checkpoint == total // 4 for trial in trials[1:]]
    assert "collapsed: at step 2600" in told(folder, trials, spec)


def test_what_a_scheduler_ended_is_in_no_cell(folder: SweepFolder) -> None:
    _, trials = made(pretraining(seeds=[0, 1, 2]))
    for trial, reason in zip(trials, ("--stop-at 9", "--stop-at 9", "ended by the scheduler"), strict=True):
        pretend(folder, trial, 0.9 if "scheduler" in reason else 0.5, "stopped", reason=reason)
    (row,) = cells(results(folder, trials), "pretrain", ["discriminator_auc"]).to_dict("records")
    assert (row["n"], row["mean"]) == (2, 0.5)


def test_a_finetuning_that_a_scheduler_ended_has_its_last_evaluation(folder: SweepFolder) -> None:
    values = {"recipe": "rc2020", "model": MODEL, "task": "sts-b"}
    _, trials = made({"name": "x", "finetune": values})
    pretend(folder, trials[0], None, "stopped", reason="ended by the scheduler")
    lines = [{"kind": "eval", "step": step, "spearman": step / 10, "pearson": 0.1} for step in (2, 4)]
    folder.trial(trials[0].key).run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row,) = results(folder, trials).to_dict("records")
    assert (row["metric.step"], row["metric.score"], row["metric.spearman"], row["metric.pearson"]) == (
        4,
        0.4,
        0.4,
        0.1,
    )
    assert cells(results(folder, trials), "finetune", ["spearman"]).empty


def test_glues_means_are_nested_as_cells_are(folder: SweepFolder) -> None:
    values = both([0, 1], [0, 1, 2])
    values["finetune"]["space"] = {"task": {"grid": [task for task in GLUE if task != "ax"]}}
    spec, trials = made(values)
    for trial in trials:
        pretend(folder, trial, 0.5 + 0.1 * trial.values.get("pretrain.seed", 0) + 0.01 * trial.seed)
    assert "56.00 ± 7.07" in told(folder, trials, spec, width=240)


def test_one_process_at_a_time_is_at_a_trial(folder: SweepFolder) -> None:
    with folder.trial("x").held() as first, folder.trial("x").held() as second:
        assert (first, second) == (True, False)
    with folder.trial("x").held() as again:
        assert again


@pytest.mark.parametrize(
    "line",
    ['{"kind": "eval", "step": 5, "discriminator_auc": "x"}', '{"kind": "eval", "step": 5, "discriminator_auc": [1]}',
     '{"kind": "eval", "step": 99999999999999999999999999, "discriminator_auc": true}', "\x00"],
    ids=range(4),
)  # fmt: skip
def test_damaged_metrics_are_left_out(folder: SweepFolder, line: str) -> None:
    spec, trials = made(pretraining(seeds=[0, 1]))
    for trial in trials:
        pretend(folder, trial, 0.7)
    with folder.trial(trials[0].key).run.metrics.open("a") as file:
        file.write(line + "\n")
    assert "2 done of 2 trials" in told(folder, trials, spec)


def test_a_finetuning_whose_scores_are_gone_is_named(folder: SweepFolder) -> None:
    spec, trials = made(both([0], [0]))
    for trial in trials:
        pretend(folder, trial, 0.7)
    (folder.trial(trials[-1].key).run.path / "scores.json").write_text("{")
    assert f"{trials[-1].key} done: it is done, but its scores cannot be read" in told(folder, trials, spec)


def test_values_of_several_types_make_a_table(folder: SweepFolder) -> None:
    spec, trials = made(
        pretraining(space={"init_from": {"grid": [None, [MODEL, MODEL]]}, "eval_every": {"grid": [None, 5]}})
    )
    for trial in trials:
        pretend(folder, trial, 0.7)
    assert "4 done" in told(folder, trials, spec)
    assert len(pd.read_parquet(folder.path / "results.parquet")) == 4


def test_a_sweep_of_which_nothing_has_begun_makes_a_table(folder: SweepFolder) -> None:
    values = pretraining(space={"optimizer.learning_rate": {"uniform": [1e-4, 1e-3]}})
    search = {"search": {"kind": "optuna", "samples": 2}, "metric": {"name": "discriminator_auc"}}
    spec, trials = made(values | search)
    assert trials == []
    assert "0 trials" in told(folder, trials, spec)


def test_a_wandb_run_is_of_the_sweeps_group(folder: SweepFolder) -> None:
    for given_, words in (
        ({"wandb": True}, ["--wandb", "offline", "--wandb-group", "x"]),
        ({"wandb": "online", "wandb_group": "mine"}, ["--wandb", "online", "--wandb-group", "mine"]),
        ({"wandb": False}, ["--wandb", "off"]),
        ({}, []),
    ):
        spec, (trial, *_) = made(pretraining(**given_))
        arguments = arguments_of(trial, folder, spec)
        assert [word for word in arguments if word.startswith("--wandb") or word in words] == words


# --- what a run writes


@FEW
@given(cuts=st.lists(st.integers(0, 400), max_size=6), cut_back=st.integers(0, 10))
def test_each_line_is_followed_once_and_after_a_cut_from_the_beginning(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], cut_back: int
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    follower = MetricsTail(path)
    assert follower.lines() == []
    text = "".join(json.dumps({"kind": "eval", "step": step, "x": 1.5}) + "\n" for step in range(1, 11))
    steps = []
    for cut in [*sorted(cuts), len(text)]:
        path.write_text(text[:cut]) if not path.exists() else os.truncate(path, 0) or path.open("w").write(text[:cut])
        steps += [line["step"] for line in follower.lines()]
    assert steps == list(range(1, 11))
    kept = path.with_suffix(".tmp")
    kept.write_text("".join(text.splitlines(keepends=True)[:cut_back]))
    kept.replace(path)
    assert [line["step"] for line in follower.lines()] == list(range(1, cut_back + 1))


def test_an_evaluation_has_the_names_of_the_table() -> None:
    line = {"kind": "eval", "step": 3, "dev_matched/accuracy": 0.5, "dev_mismatched/accuracy": 0.25}
    assert as_result("finetune", line) == {"step": 3, "score": 0.5, "accuracy": 0.5, "accuracy_mismatched": 0.25}
    assert as_result("pretrain", {"kind": "eval", "step": 3, "unigram_loss": 6.0}) == {"step": 3, "unigram_loss": 6.0}


# --- room, cost, time


@given(
    workers=st.integers(1, 4), cpus=st.integers(1, 4), gpus=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    nodes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=3),
)  # fmt: skip
def test_as_many_trials_as_fit_and_an_error_where_none_does(
    workers: int, cpus: int, gpus: float, nodes: list[tuple[int, int]]
) -> None:
    if workers > 1 and 0 < gpus < 1:
        return
    resources = Resources(workers=workers, cpus=cpus, gpus=gpus)
    places = 0
    for of_node, cards in nodes:  # one worker after the other
        free, shares = of_node, [1.0] * cards
        while free >= cpus and (not gpus or any(share >= gpus for share in shares)):
            free -= cpus
            if gpus:
                index = next(index for index, share in enumerate(shares) if share >= gpus)
                shares[index] -= gpus
            places += 1
    there = [Node(*node) for node in nodes]
    if places < workers:
        with pytest.raises(ConfigError, match=r"Lower it: --set resources\."):
            trials_at_once(resources, there)
    else:
        assert trials_at_once(resources, there) == places // workers


def test_a_dry_run_says_what_trials_cost_and_what_is_not_known(folder: SweepFolder) -> None:
    values = both([0], [0, 1]) | {"resources": {"gpus": 0.05}}
    values["pretrain"] |= {"recipe": "rc2020-small", "ds_config": "gtx1060-6gb", "stop_at_share": 0.25}
    spec, trials = made(values)
    text = shown(plan_sweep(spec, folder.path, local=True))
    assert re.search(r"pretrain .* 1 waiting +250,000 +[\d.]+–[\d.]+ d +2\.4 GiB", text)  # as bin/plan says
    assert re.search(r"In total .* d with 1 at once, not counting trials whose cost is unknown\.", text)
    assert "Cost unknown for 4 trials: none like them has run in this folder yet." in text
    for trial in (trials[0], trials[1]):
        pretend(folder, trial, 0.7)
    text = shown(plan_sweep(spec, folder.path, local=True))
    assert re.search(r"pretrain .* 1 done +250,000 +0\S* s, measured +2\.4 GiB", text)
    assert re.search(r"cola .* 1 done, 1 waiting +0\S* s, measured", text)
    assert "Cost unknown for 2 trials" in text


def test_what_optuna_may_suggest_costs_nobody_knows_what(folder: SweepFolder) -> None:
    values = pretraining(space={"model.num_hidden_layers": {"randint": [1, 5]}})
    search = {"search": {"kind": "optuna", "samples": 2}, "metric": {"name": "discriminator_auc"}}
    spec, trials = made(values | search)
    assert trials == []
    text = shown(plan_sweep(spec, folder.path, local=True))
    assert "Cost unknown for 2 trials" in text
    assert "0 trials" not in text


def test_the_accuracy_of_always_answering_original_stands_next_to_the_discriminators(folder: SweepFolder) -> None:
    spec, trials = made(pretraining(seeds=[0, 1]) | {"metric": {"name": "discriminator_accuracy"}})
    for trial, replaced in zip(trials, (0.2, 0.3), strict=True):
        pretend(folder, trial, 0.7)
        line = {"kind": "eval", "step": 9, "discriminator_accuracy": 0.8, "replaced_share": replaced}
        folder.trial(trial.key).run.metrics.write_text(json.dumps(line) + "\n")
    lines = told(folder, trials, spec, 80).splitlines()
    (place,) = (number for number, line in enumerate(lines) if "discriminator_accuracy" in line)
    assert "always_original_accuracy" in lines[place + 1]
    assert re.search(r" 0\.75\d* ± ", lines[place + 1])  # the mean of 1 - 0.2 and 1 - 0.3


@pytest.mark.parametrize("width", [80, 120])
def test_a_long_name_over_a_column_is_broken_at_its_underscores(folder: SweepFolder, width: int) -> None:
    space = {"generator.width_multiplier": {"grid": [0.25, 1.0]}}
    spec, trials = made(pretraining(space=space, seeds=[0, 1]))
    for trial in trials:
        pretend(folder, trial, 0.7)
    words = re.findall(r"[a-z_]+", told(folder, trials, spec, width))
    assert {"width_", "multiplier", "discriminator_auc"} <= set(words)


def test_a_cost_that_is_not_known_is_said_to_be_unknown_and_not_nothing(folder: SweepFolder) -> None:
    stage = {"recipe": "rc2020", "model": "nobody/none", "task": "rte", "seeds": [0, 1]}
    spec, _trials = made({"name": "x", "finetune": stage})
    text = shown(plan_sweep(spec, folder.path, local=True))
    assert "Cost unknown for 2 trials" in text
    assert "In all" not in text


def test_what_a_killed_rank_leaves_is_no_status_and_a_refusal_to_resume_is_one(folder: SweepFolder) -> None:
    spec, (trial,) = made(pretraining(seeds=[0]))
    pretend(folder, trial, 0.5, "failed", reason="a rank died without an error message")
    folder.trial(trial.key).begin(trial, ["electra-ds"], spec.resources)
    folder.trial(trial.key).end(-9)
    assert folder.trial(trial.key).state()[0] == "unfinished"
    folder.trial(trial.key).run.write_status("stopped", step=4, reason="SIGTERM")
    assert folder.trial(trial.key).state() == ("unfinished", "SIGTERM")
    folder.trial(trial.key).log.write_text("electra-ds pretrain: the JSON cannot be run here\n")
    folder.trial(trial.key).begin(trial, ["electra-ds"], spec.resources)
    folder.trial(trial.key).end(2)
    assert folder.trial(trial.key).state() == ("failed", "electra-ds pretrain: the JSON cannot be run here")
    assert status_of([0, -9, 1]) == -9
    assert status_of([0, 3, 0]) == 3


def test_how_to_resume_is_said_and_whether_it_is_being_run(folder: SweepFolder) -> None:
    spec, trials = made(pretraining(seeds=[0, 1, 2, 3]))
    folder.write(spec)
    pretend(folder, trials[0], 0.5)
    pretend(folder, trials[3], 0.5)
    pretend(folder, trials[1], None, "failed", reason="it broke")
    assert f"Resume it with: electra-ds sweep --resume {folder.path}\n" in told(folder, trials, spec)
    pretend(folder, trials[2], 0.5, "stopped", reason="--stop-at 9")
    text = told(folder, trials, spec)
    assert "1 stopped as planned" in text
    assert "Go on with" not in text
    assert f"Run what failed again: electra-ds sweep --resume {folder.path} --retry-failed\n" in text
    (folder.trial(trials[2].key).run.path / "status.json").unlink()
    shutil.rmtree(folder.trial(trials[3].key).run.path)  # begun, and has written nothing yet
    assert not folder.is_being_run()
    with folder.locked():
        assert folder.is_being_run()
        text = shown(report_sweep(folder, trials, spec, is_running=True).parts)
    assert f"begun: {trials[2].label}, at step 9." in text
    assert f"begun: {trials[3].label}." in text
    assert "The sweep is running." in text
    assert "--resume" not in text


# --- from Python


def test_a_finished_sweep_is_not_run_again_from_python_and_gives_its_results(
    folder: SweepFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, trials = made(both([0], [0, 1]))
    folder.write(spec)
    for trial in trials:
        pretend(folder, trial, 0.7)
    outcome = run_sweep(None, folder.path)
    assert outcome.is_complete
    assert set(outcome.results["trial"]) == {trial.key for trial in trials}
    text = capsys.readouterr().out
    assert f"x: 5 trials, 5 done before; in {folder.path}. The sweep is finished: nothing is left to run." in text
    assert str(electra_ds.report_runs(folder.path)) == str(outcome.report)
    assert str(outcome.report.tables[0].columns[0]) in str(outcome.report)


def test_what_there_is_no_room_for_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for change, remedy in (("cpus=1000", "cpus=1"), ("workers=1000", "workers=1"), ("gpus=1", "gpus=0, to train on")):
        with pytest.raises(ConfigError, match=f"Lower it: --set resources.{remedy}"):
            run_sweep(pretraining(ds_config="cpu") | {"resources": dict([change.split("=")])}, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_sweep_from_python_is_refused_before_anything_is_written(folder: SweepFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Give a sweep to run, or the folder of one to resume"):
        run_sweep(None)
    with pytest.raises(ConfigError, match=r"pretrain\.seds: unknown key; did you mean 'seeds'"):
        run_sweep(pretraining(seds=[1]), tmp_path / "new")
    with pytest.raises(ConfigError, match=r"pretrain\.recipe: There is no recipe 'tyni'"):
        run_sweep(pretraining(recipe="tyni"), tmp_path / "new")
    space = {"space": {"optimizer.learning_rate": {"uniform": [1e-4, 1e-3]}}, "ds_config": "cpu"}
    suggested_by = {"search": {"kind": "optuna"}, "metric": {"name": "discriminator_auc"}}
    with pytest.raises(ConfigError, match="leave out --local"):
        run_sweep(pretraining(**space) | suggested_by, tmp_path / "new", local=True)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match=r"--address ray://h:10001 .* ray job submit --address http://HOST:8265 -- "):
        run_sweep(pretraining(ds_config="cpu"), tmp_path / "new", address="ray://h:10001")
    assert not (tmp_path / "new").exists()
    folder.write(made(pretraining())[0])
    with pytest.raises(ConfigError, match="holds a sweep already"):
        run_sweep(pretraining(), folder.path)


# --- token stores


def _build(corpus: Path, out: Path, done: Callable[[], Any]) -> None:
    build_store(open_corpus([corpus]), small_recipe().tokenizer, out, workers=1)
    done()


def test_processes_that_need_one_store_wait_for_the_first(corpus_folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    count = context.Semaphore(0)
    several = [
        context.Process(target=_build, args=(corpus_folder, tmp_path / "store", count.release)) for _ in range(4)
    ]
    for one in several:
        one.start()
    for one in several:
        one.join(120)
    assert [one.exitcode for one in several] == [0] * 4
    assert sum(count.acquire(block=False) for _ in range(5)) == 4
    assert not (tmp_path / "store.partial").exists()


def test_what_is_suggested_twice_is_one_trial() -> None:
    spec, _ = made(pretraining())
    first, again = (suggested(spec, {"optimizer.learning_rate": 1e-3}, check=False) for _ in range(2))
    assert first.key == again.key
    assert pd.notna(first.seed)
