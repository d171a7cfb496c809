"""A sweep's trials: what they are called, what they run, and what stays the same when a sweep grows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from electra_ds.cli import build_parser
from electra_ds.config.finetune_recipe import FinetuneRecipe, load_finetune_recipe
from electra_ds.config.names import SWEEPS, shipped_names
from electra_ds.config.recipe import Recipe, load_recipe
from electra_ds.core.errors import ConfigError
from electra_ds.sweep.options import KINDS
from electra_ds.sweep.sweep_file import load_sweep, parse_sweep
from electra_ds.sweep.trials import Trial, expand, suggested
from tests.finetune_runs import write_glue
from tests.sweep.test_spec import (
    FINETUNE,
    MODEL,
    REPOSITORY,
    finetuning,
    pretraining,
    trials_of,
    what_it_needs,
)

RATE, WIDTH = "optimizer.learning_rate", "generator.width_multiplier"
FEW = settings(max_examples=12)


def parsed(trial: Trial) -> Any:
    """By the command's own parser."""
    return KINDS[trial.stage].parsed(build_parser().parse_args([trial.stage, *trial.arguments(2)]))


def recipe_by_hand(trial: Trial) -> Recipe | FinetuneRecipe:
    """As the command's handler resolves it."""
    options = parsed(trial)
    if trial.stage == "pretrain":
        return load_recipe(options.recipe, options.recipe_overrides())
    return load_finetune_recipe(options.recipe, options.task or "", options.recipe_overrides())


def keys(trials: Sequence[Trial]) -> set[str]:
    return {trial.key for trial in trials}


# --- the command line


@pytest.mark.parametrize("name", shipped_names(SWEEPS))
def test_the_command_of_every_shipped_trial_gives_its_recipe(name: str) -> None:
    trials = expand(load_sweep(name, what_it_needs(name)))
    for trial in trials[:: 1 + len(trials) // 25]:
        options = parsed(trial)
        assert recipe_by_hand(trial) == trial.recipe
        assert (options.threads, options.stop_at) == (2, trial.stop_at)
        for key, value in trial.options.items():
            assert getattr(options, key) == value
    assert len(keys(trials)) == len(trials)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,110}", key) for key in keys(trials))


rates = st.floats(1e-300, 1e300)
printable = st.characters(exclude_categories=["C", "Z"])
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,8}", fullmatch=True)


@FEW
@given(rate=rates, name=names, text=st.text(printable, max_size=20), yes=st.booleans(), seed=st.integers(0, 2**63 - 1))
def test_every_constant_arrives_in_the_recipe_of_the_command(
    rate: float, name: str, text: str, yes: bool, seed: int
) -> None:
    constants = {RATE: rate, "name": name, "description": text, "optimizer.bias_correction": yes}
    (trial,) = trials_of(pretraining(set=constants, seeds=[seed]))
    recipe = trial.recipe
    assert isinstance(recipe, Recipe)
    assert (recipe.optimizer.learning_rate, recipe.name, recipe.description, recipe.seed) == (rate, name, text, seed)
    assert recipe.optimizer.bias_correction == yes
    assert recipe_by_hand(trial) == recipe


def test_options_of_every_kind_become_arguments(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    given_options = {
        "corpus": [[str(tmp_path), str(tmp_path / "a")], ["hub:x/y"]], "init_from": ["a/b", "c/d"], "compile": False,
        "wandb": False, "tensorboard": False, "streaming": True, "cased": False, "keep": 3, "micro_batch": "auto",
        "revision": None, "strip_accents": False, "allow_unknown": True,
    }  # fmt: skip
    (trial,) = trials_of(pretraining(**given_options))
    options = parsed(trial)
    assert options.corpus == given_options["corpus"]
    assert options.init_from == given_options["init_from"]
    assert (options.compile, options.wandb, options.tensorboard) == ("off", "off", False)
    assert (options.streaming, options.cased, options.keep, options.micro_batch) == (True, False, 3, "auto")
    assert (options.strip_accents, options.allow_unknown) == (False, True)
    assert options.revision is None


def test_a_share_of_the_schedule_is_a_step_of_it() -> None:
    changes = {"set": {"schedule.total_steps": 1000}, "checkpoints": [0.5, 0.0625, 0.25], "stop_at_share": 0.5}
    values = pretraining(**changes) | {"finetune": {"recipe": "rc2020", "task": "rte", "seeds": [3, 4]}}
    first, *others = trials_of(values)
    assert isinstance(first.recipe, Recipe)
    assert first.recipe.schedule.total_steps == 1000
    assert (parsed(first).stop_at, parsed(first).keep_at) == (500, [62, 250, 500])
    assert [(trial.checkpoint, trial.seed) for trial in others] == [(s, n) for n in (3, 4) for s in (62, 250, 500)]
    assert all(trial.pretraining is first for trial in others)
    assert others[0].values == {"pretrain.seed": 0, "pretrain.step": 62, "seed": 3}
    (whole,) = trials_of(pretraining(stop_at_share=1.0))
    assert whole.stop_at is None
    assert whole.digest == trials_of(pretraining())[0].digest


# --- names that stay


def digest(**changes: Any) -> str:
    return trials_of(finetuning(**changes))[0].digest


def test_a_key_is_the_same_in_every_process() -> None:
    code = (
        "from electra_ds.sweep.sweep_file import load_sweep; "
        "from electra_ds.sweep.trials import expand; "
        "print([trial.key for trial in expand(load_sweep('pretrain_lr'))])"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, env=os.environ | {"PYTHONHASHSEED": seed}, check=True,
            capture_output=True, text=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert told == {f"{[trial.key for trial in expand(load_sweep('pretrain_lr'))]}\n"}


def test_a_key_that_was_given_once_stays() -> None:
    """Folders of sweeps that were run are found by it."""
    (trial,) = trials_of(finetuning(space={RATE: {"grid": [1e-4]}}, seeds=[3]))
    assert trial.key == "learning_rate=0.0001-s3-529a080e867b"
    (pretrained,) = trials_of(pretraining(space={WIDTH: {"grid": [0.5]}}))
    assert pretrained.key == "width_multiplier=0.5-s0-0aa81f5aa570"


@given(st.permutations([*FINETUNE.items(), ("best", True), ("keep", 2)]), st.permutations([(RATE, 1e-4), ("seed", 1)]))
def test_a_digest_does_not_know_the_order_of_options(options: list[Any], others: list[Any]) -> None:
    constants = {key: value for key, value in [*others, ("head.dropout", 0.2)] if key != "seed"}
    one = trials_of({"name": "x", "finetune": dict(options) | {"set": constants}})
    two = trials_of(finetuning(best=True, keep=2, set={"head.dropout": 0.2, RATE: 1e-4}))
    assert one[0].digest == two[0].digest
    assert one[0].key == two[0].key


@pytest.mark.parametrize(
    "changes",
    [
        {"ds_config": "cpu"}, {"micro_batch": 4}, {"log_every": 3}, {"save_every": 3}, {"keep": 9},
        {"wandb": "offline"}, {"tensorboard": True}, {"discard_weights": True}, {"eval_every": 7},
        {"wandb_group": "a"}, {"best": False},
        {"set": {"description": "other", "name": "other"}}, {"set": {RATE: 3e-4}}, {"max_train_examples": None},
    ],
    ids=str,
)  # fmt: skip
def test_how_it_is_run_and_what_it_is_called_leave_the_digest(changes: dict[str, Any]) -> None:
    assert digest(**changes) == digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "rte"}, {"model": "google/electra-base-discriminator"}, {"max_train_examples": 10}, {"seeds": [1]},
        {"set": {RATE: 2e-4}}, {"recipe": "original"}, {"best": True}, {"random_init": True},
    ],
    ids=str,
)  # fmt: skip
def test_what_the_outcome_depends_on_changes_the_digest(changes: dict[str, Any]) -> None:
    assert digest(**changes) != digest()


def test_a_digest_knows_the_pretraining_and_its_checkpoint() -> None:
    def digests(**changes: Any) -> list[str]:
        both = pretraining(**changes) | {"finetune": {"recipe": "rc2020", "task": "rte"}}
        return [trial.digest for trial in trials_of(both) if trial.stage == "finetune"]

    found = [
        *digests(), *digests(seeds=[1]), *digests(set={RATE: 1e-4}), *digests(stop_at_share=0.5),
        *digests(checkpoints=[0.25, 0.5]),
    ]  # fmt: skip
    assert len(set(found)) == 6
    assert digests(log_every=7) == digests()


def test_a_recipe_in_a_file_is_known_by_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        f"name: own\n{(REPOSITORY / 'electra_ds/finetune_recipes/rc2020.yaml').read_text().partition(chr(10))[2]}"
    )
    assert digest(recipe=str(path)) == digest()


# --- samples

study = st.fixed_dictionaries(
    {
        "seeds": st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True),
        "dropouts": st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3]), min_size=1, max_size=3, unique=True),
        "samples": st.integers(1, 4),
        "search_seed": st.integers(0, 99),
    }
)


def random_study(seeds: list[int], dropouts: list[float], samples: int, search_seed: int) -> list[Trial]:
    space = {
        RATE: {"loguniform": [1e-5, 1e-3]}, "head.dropout": {"grid": dropouts},
        "schedule.epochs": {"uniform": [1, 9]},
    }  # fmt: skip
    return trials_of(finetuning(space=space, seeds=seeds) | {"search": {"samples": samples, "seed": search_seed}})


@FEW
@given(study, st.integers(100, 199), st.sampled_from([0.4, 0.5]))
def test_a_sweep_that_grows_keeps_its_trials(of: dict[str, Any], seed: int, dropout: float) -> None:
    before = keys(random_study(**of))
    for more in (
        {"seeds": [seed, *of["seeds"]]}, {"dropouts": [dropout, *of["dropouts"]]}, {"samples": of["samples"] + 1},
    ):  # fmt: skip
        after = keys(random_study(**of | more))
        assert before < after
    assert not before & keys(random_study(**of | {"search_seed": of["search_seed"] + 1}))


@FEW
@given(study)
def test_every_seed_and_cell_has_the_same_samples_and_each_is_another(of: dict[str, Any]) -> None:
    trials = random_study(**of)
    drawn: dict[Any, list[float]] = {}
    for trial in trials:
        drawn.setdefault((trial.seed, trial.values["head.dropout"]), []).append(trial.values[RATE])
        recipe = trial.recipe
        assert isinstance(recipe, FinetuneRecipe)
        assert recipe.optimizer.learning_rate == trial.values[RATE]
    assert len(trials) == len(of["seeds"]) * len(of["dropouts"]) * of["samples"]
    assert len({tuple(values) for values in drawn.values()}) == 1
    assert len(set(trials[0].values)) == 4
    first = next(iter(drawn.values()))
    assert len(set(first)) == len(first)


def test_samples_that_are_drawn_alike_are_one_trial() -> None:
    trials = trials_of(finetuning(space={"head.pooling": {"choice": ["first", "mean"]}}) | {"search": {"samples": 50}})
    assert sorted(trial.values["head.pooling"] for trial in trials) == ["first", "mean"]


# --- what cannot be run


def files(tmp_path: Path) -> dict[str, str]:
    for name in ("train.csv", "dev.csv"):
        (tmp_path / name).write_text("text,label\na,0\nb,1\n")
    return {name: str(tmp_path / f"{name}.csv") for name in ("train", "dev")}


BOTH = {"finetune": {"recipe": "rc2020", "task": "rte"}}
BAD: list[tuple[str, dict[str, Any], list[str]]] = [
    ("no model", finetuning(model=None), ["finetune.model: is missing; give a run, a transformers folder or a name"]),
    ("no task", finetuning(task=None), ["finetune.task: is missing; write one, or train and dev"]),
    ("no recipe", finetuning(recipe=None), ["finetune.recipe: is missing; write one such as recipe: rc2020"]),
    ("two models", pretraining() | {"finetune": FINETUNE}, ["finetune.model: is made by pretrain; leave out one"]),
    ("recipe", finetuning(recipe="rc202"), ["finetune.recipe: There is no recipe 'rc202'", "did you mean 'rc2020'"]),
    ("hub", finetuning(hub="a/b", data_dir="/tmp"), ["finetune: --hub and --revision are for datasets on the Hub"]),
    ("own", finetuning(text="review"), ["finetune: --text is for your own examples"]),
    (
        "value", pretraining(set={"generator.width_multiplier": 2}),
        ["pretrain.set.generator.width_multiplier: Input should be less than or equal to 1, and is 2"],
    ),
    (
        "yes", pretraining(set={"schedule.total_steps": True}),
        ["pretrain.schedule: total_steps must be a number, not True"],
    ),
    (
        "word", pretraining(set={"schedule.total_steps": "many"}),
        ["pretrain.set.schedule.total_steps: Input should be a valid integer", "and is 'many'"],
    ),
    (
        "grid", finetuning(space={"head.dropout": {"grid": [0.1, 1.5, -1]}}, seeds=[0, 1, 2]),
        ["finetune.space.head.dropout: Input should be less than 1, and is 1.5",
         "finetune.space.head.dropout: Input should be greater than or equal to 0, and is -1"],
    ),
    (
        "variant", finetuning(variants={"good": {}, "bad": {"head.pooling": "max"}}),
        ["finetune.variants.bad.head.pooling: Input should be 'first' or 'mean', and is 'max'"],
    ),
    (
        "together", pretraining(space={"model.num_attention_heads": {"grid": [2, 3]}}),
        ["pretrain.model: hidden_size 64 is not a multiple of num_attention_heads 3"],
    ),
    (
        "metric", pretraining() | {"metric": {"name": "discriminator_acu"}},
        ["metric.name: discriminator_acu is not reported by pretrain; did you mean 'discriminator_auc'?"],
    ),
    (
        "metric of no task", finetuning() | {"metric": {"name": "bleu"}},
        ["metric.name: bleu is not reported by mrpc, which reports score, accuracy, f1"],
    ),
    (
        "metric of one task",
        {"name": "x", "metric": {"name": "accuracy"},
         "finetune": {"recipe": "rc2020", "model": MODEL, "space": {"task": {"grid": ["mrpc", "mnli", "cola"]}}}},
        ["accuracy is not reported by cola, which"],
    ),
    ("metric of the first", pretraining() | BOTH | {"metric": {"name": "discriminator_auc"}}, ["not reported by rte"]),
    (
        "same", pretraining(variants={"a": {}, "b": {"optimizer.beta2": 0.98}}),
        ["pretrain: a-s0 and b-s0 are the same run, which would count twice"],
    ),
    (
        "all at once",
        finetuning(model="/nowhere/run", set={"head.dropout": 2}, data_dir="/nowhere") | {"metric": {"name": "bleu"}},
        ["finetune.model: there is no /nowhere/run", "finetune.data_dir: there is no folder /nowhere",
         "finetune.set.head.dropout: Input should be less than 1, and is 2", "metric.name: bleu is not reported by"],
    ),
    (
        "both stages", pretraining(set={RATE: -1}) | {"finetune": BOTH["finetune"] | {"set": {"head.dropout": 2}}},
        ["pretrain.set.optimizer.learning_rate: Input should be greater than 0", "finetune.set.head.dropout: Input"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "messages"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_what_cannot_be_run_is_told_before_anything_is(values: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        trials_of(values)
    first, *lines = str(error.value).splitlines()
    assert first == "The sweep x cannot be run:"
    for message in messages:
        assert message in str(error.value)
    assert len(lines) <= len(messages)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data_dir", "/nowhere/glue", "there is no folder /nowhere/glue"),
        ("model", "/nowhere/run", "there is no /nowhere/run; a model of the Hub is written OWNER/NAME"),
        ("model", "electra", "no .*electra; a model of the Hub is written OWNER/NAME"),
        ("model", "runs/missing", "no .*/runs/missing; a model of the Hub"),
        ("recipe", "/nowhere/recipe.yaml", "no recipe '/nowhere/recipe.yaml'"),
        ("ds_config", "/nowhere/ds.json", "there is no /nowhere/ds.json"),
    ],
)
def test_a_path_that_is_not_there_is_told(
    key: str, value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"finetune.{key}: [Tt]here is .*{message.removeprefix('there is ')}"):
        trials_of(finetuning(**{key: value}))


def test_own_examples_that_are_not_there_are_told(tmp_path: Path) -> None:
    there = files(tmp_path)
    own = {"recipe": "rc2020", "model": MODEL, **there}
    assert trials_of({"name": "x", "finetune": own, "metric": {"name": "f1_macro"}})
    for key in ("train", "dev", "test"):
        with pytest.raises(ConfigError, match=f"finetune.{key}: there is no file {tmp_path}/none.csv"):
            trials_of({"name": "x", "finetune": own | {key: f"{tmp_path}/none.csv"}})
    for key in ("data", "corpus", "tokenizer"):
        with pytest.raises(ConfigError, match=f"pretrain.{key}: there is no .*{tmp_path}/none"):
            trials_of(pretraining(**{key: f"{tmp_path}/none"}))


def test_examples_that_will_not_do_are_told_of_every_task(tmp_path: Path) -> None:
    glue = write_glue(tmp_path)
    (glue / "MRPC" / "train.tsv").unlink()
    (glue / "STS-B" / "dev.tsv").write_text("no table\n")
    shutil.rmtree(glue / "CoLA")
    tasks = {"task": {"grid": ["rte", "mrpc", "sts-b", "cola"]}}
    values = {"name": "x", "finetune": {"recipe": "rc2020", "model": MODEL, "data_dir": str(glue), "space": tasks}}
    with pytest.raises(ConfigError) as told:
        trials_of(values)
    assert [line.split(":")[0].strip() for line in str(told.value).splitlines()[1:]] == ["finetune.space.task"] * 3
    for words in ("no training examples of mrpc", "STS-B/dev.tsv", "holds no files of cola"):
        assert words in str(told.value)
    (tmp_path / "dev.csv").write_text("text,label\na,0\n")
    (tmp_path / "train.csv").write_text("text,label\na,0\n")
    own = {"train": str(tmp_path / "train.csv"), "dev": str(tmp_path / "dev.csv")}
    with pytest.raises(ConfigError, match=r"finetune.train: .*every row has the label '0'"):
        trials_of({"name": "x", "finetune": {"recipe": "rc2020", "model": MODEL} | own})


def test_a_sweep_of_too_many_trials_is_refused_at_once() -> None:
    space = {key: {"grid": list(range(100))} for key in ("data.max_length", "data.doc_stride", "data.n_best")}
    with pytest.raises(ConfigError, match="has more than 20,000 trials: its grids"):
        trials_of(finetuning(space=space))


def test_the_first_problems_stand_for_many() -> None:
    with pytest.raises(ConfigError, match=r"\n  and 21 more$"):
        trials_of(finetuning(space={"head.dropout": {"grid": list(range(1, 32))}}))


# --- Optuna

SUGGESTED = {"search": {"kind": "optuna", "samples": 9}, "metric": {"name": "score"}}


def test_what_optuna_suggests_is_checked_by_its_bounds_before_and_by_itself() -> None:
    space = {RATE: {"loguniform": [1e-5, 1e-3]}, "head.dropout": {"uniform": [0, 0.3]}}
    values = finetuning(space=space, seeds=[7]) | SUGGESTED
    spec = parse_sweep(values, "x")
    assert trials_of(values) == []
    trial = suggested(spec, {RATE: 1e-4, "head.dropout": 0.25})
    assert recipe_by_hand(trial) == trial.recipe
    assert (trial.seed, trial.values) == (7, {RATE: 1e-4, "head.dropout": 0.25, "seed": 7})
    with pytest.raises(ConfigError, match=r"finetune.space.head.dropout: .* less than 1, and is 2"):
        suggested(spec, {RATE: 1e-4, "head.dropout": 2})
    with pytest.raises(ConfigError, match=r"finetune.space.head.dropout: .* less than 1, and is 1.5"):
        trials_of(finetuning(space=space | {"head.dropout": {"uniform": [0, 1.5]}}) | SUGGESTED)


def test_what_is_suggested_may_name_a_seed_and_no_unknown_key() -> None:
    spec = parse_sweep(finetuning(), "x")
    assert suggested(spec, {"seed": 3}).seed == 3
    with pytest.raises(ConfigError, match=r"finetune.head.dropuot: unknown key; did you mean 'head.dropout'"):
        suggested(spec, {"head.dropuot": 0.1})
