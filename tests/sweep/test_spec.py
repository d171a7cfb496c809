"""A sweep's file: what it may say, and what is told of one that cannot be run."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from electra_ds.cli import build_parser
from electra_ds.config.names import SWEEPS, shipped_names, shipped_text
from electra_ds.config.plugins import find_objective
from electra_ds.config.recipe import OUR_RECIPES, Recipe
from electra_ds.config.values import load_yaml
from electra_ds.core.errors import ConfigError
from electra_ds.pretraining.objectives.electra import ElectraObjective
from electra_ds.pretraining.objectives.electra_evaluation import ALWAYS_ORIGINAL
from electra_ds.sweep.options import INSTEAD, OPTIONS, metrics_of
from electra_ds.sweep.spec import Domain, SweepSpec
from electra_ds.sweep.sweep_file import load_sweep, parse_sweep, sweep_yaml
from electra_ds.sweep.trials import Trial, expand

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = "google/electra-small-discriminator"
FINETUNE = {"recipe": "rc2020", "model": MODEL, "task": "mrpc"}
PRETRAIN = {"recipe": "tiny", "ds_config": "cpu"}
shares = st.floats(0, 1, exclude_max=True)


def finetuning(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "finetune": FINETUNE | changes}


def pretraining(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "pretrain": PRETRAIN | changes}


def trials_of(values: dict[str, Any]) -> list[Trial]:
    return expand(parse_sweep(values, "x.yaml"))


# --- what is shipped


def what_it_needs(name: str) -> list[str]:
    values = yaml.safe_load(shipped_text(SWEEPS, name))
    needs = []
    if ("pretrain" not in values and "variants" not in values["finetune"]) or name.endswith("finetuning"):
        needs.append(f"finetune.model={MODEL}")
    return needs


@pytest.mark.parametrize("name", shipped_names(SWEEPS))
def test_every_shipped_sweep_expands_and_says_what_it_lacks(name: str) -> None:
    needs = what_it_needs(name)
    spec = load_sweep(name, needs)
    assert spec.name == name.replace("_", "-")
    assert spec.description
    assert expand(spec)
    text = shipped_text(SWEEPS, name)
    for need in needs:
        key = need.partition("=")[0]
        assert f"--set {key}=" in text
        with pytest.raises(ConfigError, match=f"{key}: is missing"):
            expand(load_sweep(name, [other for other in needs if other != need]))
    assert needs or "You need not set anything" in text


def test_the_shipped_sweeps_have_the_studys_sizes() -> None:
    count = {name: len(expand(load_sweep(name, what_it_needs(name)))) for name in shipped_names(SWEEPS)}
    assert count["glue_seeds"] == 9 * 5
    assert count["glue_checkpoints"] == 1 + 6 * 9 * 5
    assert count["generator_size"] == 5 * (1 + 9 * 5)
    assert count["smoke"] <= 6


def test_a_whole_sweep_is_checked_without_torch_and_ray() -> None:
    code = (
        "import sys; "
        "from electra_ds.sweep.sweep_file import load_sweep; "
        "from electra_ds.sweep.trials import expand; expand(load_sweep('smoke')); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'transformers', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


# --- the tables


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_every_option_of_a_command_is_known_or_the_sweeps_own(stage: str) -> None:
    (commands,) = (each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction))
    there = {action.dest for action in commands.choices[stage]._actions} - {"help", "local_rank", "deepspeed"}
    assert there - INSTEAD.keys() == OPTIONS[stage]


def test_the_metrics_of_pretraining_are_those_of_its_evaluation() -> None:
    metrics = metrics_of("pretrain", {"recipe": "tiny"}, {})
    assert metrics[0] == "discriminator_auc"
    assert set(metrics) == set(ElectraObjective.metric_labels) - {ALWAYS_ORIGINAL}


@pytest.mark.parametrize(("name", "recipe"), OUR_RECIPES.items())
def test_a_recipes_metrics_are_known_before_its_objective_is_imported(name: str, recipe: type[Recipe]) -> None:
    objective = find_objective(name)
    assert objective.recipe_type is recipe
    assert recipe.METRICS[0] == objective.main_metric
    assert set(recipe.METRICS) == set(objective.metric_labels) - {ALWAYS_ORIGINAL}


# --- domains

numbers = st.floats(-1e12, 1e12)


@given(st.sampled_from(["uniform", "loguniform", "quniform", "randint"]), numbers, numbers, shares)
def test_a_drawn_number_lies_within_its_bounds(kind: str, low: float, high: float, share: float) -> None:
    if kind == "loguniform":
        low, high = abs(low) + 1e-9, abs(high) + 1e-9
    if kind in ("randint", "quniform"):
        low, high = round(low), round(high)
    assume(low < high)
    bounds = [low, high, 1] if kind == "quniform" else [low, high]
    domain = Domain.model_validate({kind: bounds})
    value = domain.at(share)
    assert low <= value <= high
    if kind == "randint":
        assert type(value) is int
        assert value < high
    if kind == "quniform":
        assert value == int(value)
    assert json.loads(json.dumps(value)) == value
    assert all(low <= end <= high for end in domain.ends())


@given(st.lists(st.integers(), min_size=1, unique=True), shares)
def test_every_choice_is_drawn_by_its_share(values: list[int], share: float) -> None:
    domain = Domain.model_validate({"choice": values})
    assert domain.at(share) in values
    assert [domain.at((index + 0.5) / len(values)) for index in range(len(values))] == values


# --- overrides


def test_overrides_reach_every_part_of_the_file() -> None:
    spec = load_sweep(
        "glue_seeds",
        [
            f"finetune.model={MODEL}", "finetune.seeds=[0,1]", "finetune.set.schedule.epochs=5",
            "finetune.space.task={grid: [mrpc]}", "finetune.space.optimizer.learning_rate={uniform: [1e-4, 3e-4]}",
            "finetune.variants.short.data.max_length=64", "finetune.discard_weights=null", "resources.gpus=0.5",
            "metric=null", "search.samples=2", "finetune.set.head.hidden_size=null",
        ],
    )  # fmt: skip
    stage = spec.finetune
    assert stage is not None
    assert stage.seeds == [0, 1]
    assert stage.set == {"schedule.epochs": 5, "head.hidden_size": None}
    assert stage.model_dump()["space"] == {
        "task": {"grid": ["mrpc"]},
        "optimizer.learning_rate": {"uniform": [1e-4, 3e-4]},
    }
    assert stage.variants == {"short": {"data.max_length": 64}}
    assert stage.options == {"recipe": "rc2020", "model": MODEL}
    assert (spec.metric, spec.resources.gpus, spec.search.samples) == (None, 0.5, 2)


def test_a_sweep_can_be_called_otherwise() -> None:
    assert load_sweep("smoke", ["name=mine", "description=of mine"]).name == "mine"


def test_an_override_takes_a_variant_or_a_stage_away() -> None:
    spec = load_sweep("glue_baselines", ["finetune.variants.roberta-base=null"])
    assert spec.finetune is not None
    assert "roberta-base" not in spec.finetune.variants
    assert "bert-base" in spec.finetune.variants
    assert load_sweep("generator_size", ["finetune=null"]).finetune is None


def test_an_override_changes_one_of_two_places_that_share_an_anchor(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "name: x\npretrain: {recipe: tiny, ds_config: cpu, set: &same {optimizer.beta2: 0.9}}\n"
        "finetune: {recipe: rc2020, task: mrpc, set: *same}\n"
    )
    spec = load_sweep(str(path), ["pretrain.set.optimizer.beta2=0.5"])
    assert spec.finetune is not None
    assert spec.finetune.set == {"optimizer.beta2": 0.9}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("finetune.seeds", "written key=value"),
        ("finetune..seeds=1", "written key=value"),
        ("=1", "written key=value"),
        ("name.x=1", "name is not a section"),
        ("finetune.seeds.x=1", "finetune.seeds.x: unknown key"),
        ("finetune.schedule.epochs=5", "finetune.schedule.epochs: is the recipe's; write it under set"),
        ("finetune.set.epochs=5", "finetune.set.epochs: unknown key; did you mean 'schedule.epochs'"),
        ("finetune.seeds=[0", "not valid YAML"),
        ("finetun.seeds=[0]", "finetun: unknown key; did you mean 'finetune'"),
        ("pretrain.set.generator.recipe.seed=5", "generator.recipe takes a whole recipe, such as {extends: tiny-mlm, "),
        ("schedule.epochs=5", "is a key of a recipe; write it as finetune.set.schedule.epochs"),
        ("seed=5", "seed: unknown key"),
    ],
)
def test_a_bad_override_is_told(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_sweep("glue_seeds", [f"finetune.model={MODEL}", override])


# --- a file and back

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["C"]))
)
texts = st.sampled_from(["5e-4", "1E5", "-.5e+3", "null", "yes", "07", "2020-01-01", "a: b", "=", "~", "1_0", "0x1f"])


@given(st.dictionaries(st.sampled_from(["data.max_length", "head.dropout", "name"]), scalars | texts | st.lists(texts)))
def test_a_sweep_written_in_full_is_read_as_the_same(constants: dict[str, Any]) -> None:
    spec = parse_sweep(finetuning(set=constants, space={"data.doc_stride": {"grid": [None, "5e-4"]}}), "x")
    again = parse_sweep(load_yaml_text(sweep_yaml(spec)), "again")
    assert again == spec
    assert sweep_yaml(again) == sweep_yaml(spec)


def load_yaml_text(text: str) -> dict[str, Any]:
    values = load_yaml(text, "the sweep")
    assert isinstance(values, dict)
    return values


@pytest.mark.parametrize("name", shipped_names(SWEEPS))
def test_a_shipped_sweep_written_in_full_is_read_as_the_same(name: str) -> None:
    spec = load_sweep(name)
    assert parse_sweep(load_yaml_text(sweep_yaml(spec)), name) == spec


def test_paths_are_made_absolute_where_they_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("runs/a", "glue", "texts", "tiny"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "own.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    spec = parse_sweep(
        {
            "name": "x",
            "pretrain": PRETRAIN
            | {"ds_config": "own.json", "corpus": [["texts"], ["hub:a/b#c@d"], ["builtin"]], "tokenizer": MODEL},
            "finetune": {
                "recipe": "rc2020", "data_dir": "glue", "text": "glue",
                "variants": {"a": {"model": "runs/a"}, "b": {"model": MODEL}},
                "space": {"task": {"grid": ["mrpc"]}, "revision": {"grid": ["runs/a"]}},
            },
        },
        "x.yaml",
    )  # fmt: skip
    first, second = spec.pretrain, spec.finetune
    assert first is not None
    assert second is not None
    here = str(tmp_path)
    assert first.options == {
        "recipe": "tiny", "ds_config": f"{here}/own.json", "tokenizer": MODEL,
        "corpus": [[f"{here}/texts"], ["hub:a/b#c@d"], ["builtin"]],
    }  # fmt: skip
    assert second.options == {"recipe": "rc2020", "data_dir": f"{here}/glue", "text": "glue"}
    assert second.variants == {"a": {"model": f"{here}/runs/a"}, "b": {"model": MODEL}}
    assert second.space["revision"].values == ["runs/a"]
    monkeypatch.chdir("/")
    assert parse_sweep(load_yaml_text(sweep_yaml(spec)), "again") == spec


# --- what is wrong

RANDOM = {"optimizer.beta2": {"uniform": [0.9, 0.99]}}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("nothing", {"name": "x"}, "there is nothing to run; write pretrain, finetune or both"),
    ("no name", {"finetune": FINETUNE}, "name: is missing"),
    ("name", finetuning() | {"name": "../x"}, "name: String should match"),
    ("top key", finetuning() | {"metrics": {}}, "metrics: unknown key; did you mean 'metric'?"),
    (
        "inner key", finetuning() | {"metric": {"name": "score", "mdoe": "max"}},
        "metric.mdoe: unknown key; did you mean 'mode'?",
    ),
    ("number as text", finetuning() | {"resources": {"gpus": "all"}}, "resources.gpus: Input should be a valid number"),
    ("yes", finetuning() | {"retries": True}, "retries must be a number, not True"),
    ("yes gpus", finetuning() | {"resources": {"gpus": True}}, "resources: gpus must be a number, not True"),
    ("gpus", finetuning() | {"resources": {"gpus": 2}}, "resources: gpus 2 is more than the one GPU"),
    ("shared", finetuning() | {"resources": {"gpus": 0.5, "workers": 2}}, "gpus 0.5 of 2 workers would share a GPU"),
    ("cpus", finetuning() | {"resources": {"cpus": 0}}, "resources.cpus: Input should be greater than or equal to 1"),
    ("no mapping", finetuning() | {"finetune": 3}, "finetune: Input should be"),
    ("option", finetuning(recpie="x"), "finetune.recpie: unknown key; did you mean 'recipe'?"),
    ("section key", finetuning(sedes=[1]), "finetune.sedes: unknown key; did you mean 'seeds'?"),
    ("other's", finetuning(stop_at_share=0.5), "finetune.stop_at_share: unknown key"),
    (
        "recipe key", finetuning(**{"head.pooling": "mean"}),
        "finetune.head.pooling: is the recipe's; write it under set",
    ),
    (
        "section", finetuning(head={"pooling": "mean"}),
        "finetune.head: is a section of the recipe; write dotted keys, such",
    ),
    ("ours", finetuning(seed=3), "finetune.seed: is the sweep's to set; write seeds: [0, 1]"),
    ("ours set", finetuning(set={"seed": 3}), "finetune.set.seed: is the sweep's to set"),
    ("ours space", pretraining(space={"stop_at": {"grid": [1]}}), "pretrain.space.stop_at: is the sweep's to set"),
    (
        "set key", finetuning(set={"schedule.epoch": 3}),
        "finetune.set.schedule.epoch: unknown key; did you mean 'schedule",
    ),
    (
        "set option", finetuning(set={"task": "rte"}),
        "finetune.set.task: is an option of the command; write it as finetune.task",
    ),
    ("set domain", finetuning(set={"head.dropout": {"grid": [0]}}), "takes one value, not {"),
    ("option domain", finetuning(task={"grid": ["rte"]}), "takes one value, not {"),
    (
        "option list", finetuning(task=["rte"]),
        "finetune.task: takes one value, not ['rte']; to vary it, write task: {grid",
    ),
    ("task", finetuning(task="mrcp"), "finetune.task: there is no task 'mrcp'; did you mean 'mrpc'?"),
    ("number", finetuning(max_train_examples=-3), "max_train_examples: '-3' is not a positive whole number"),
    ("JSON", pretraining(micro_batch="many"), "pretrain.micro_batch: 'many' is not a positive whole number"),
    ("flag", finetuning(best="no"), "finetune.best: 'no' is neither True nor False"),
    ("yes option", finetuning(keep=True), "finetune.keep: 'True' is not a positive whole number"),
    ("name number", finetuning(model=3), "finetune.model: is a name or a path, not 3"),
    ("space key", finetuning(space={"lr": {"grid": [1]}}), "finetune.space.lr: unknown key"),
    (
        "constant", finetuning(space={"head.dropout": 0.1}),
        "finetune.space.head.dropout: 0.1 does not vary; write it under set",
    ),
    ("empty", finetuning(space={"head.dropout": {"grid": []}}), "finetune.space.head.dropout: the grid is empty"),
    ("twice", finetuning(space={"head.dropout": {"grid": [0, 0.1, 0]}}), "dropout: 0 is listed twice; leave one out"),
    ("no list", finetuning(space={"head.dropout": {"grid": 1}}), "grid takes a list, such as grid: [1, 2], not 1"),
    ("mapping", finetuning(space={"head.dropout": {"grid": [{}]}}), "write settings that go together under variants"),
    ("kind", finetuning(space={"head.dropout": {"gird": [1]}}), "gird is not a domain; did you mean 'grid'?"),
    ("kinds", finetuning(space={"head.dropout": {"grid": [1], "choice": [2]}}), "grid, choice is not a domain"),
    ("none", finetuning(space={"head.dropout": {}}), "nothing is not a domain"),
    ("bounds", finetuning(space={"head.dropout": {"uniform": [1]}}), "the second greater, such as uniform: [0.0, 0.3]"),
    ("bound yes", finetuning(space={"head.dropout": {"uniform": [0, True]}}), "uniform takes two numbers"),
    ("bound nan", finetuning(space={"head.dropout": {"uniform": [0, math.nan]}}), "uniform takes two numbers"),
    (
        "order", finetuning(space={"head.dropout": {"uniform": [1, 0]}}),
        "uniform takes two numbers",
    ),
    ("log", finetuning(space={"head.dropout": {"loguniform": [0, 1]}}), "loguniform takes two numbers above 0"),
    ("randint", finetuning(space={"head.dropout": {"randint": [0, 1.5]}}), "randint takes two integers"),
    ("steps", finetuning(space={"head.dropout": {"quniform": [0, 1, 2]}}), "takes two multiples of a third number"),
    (
        "multiples", finetuning(space={"head.dropout": {"quniform": [0.05, 1, 0.1]}}),
        "takes two multiples of a third number",
    ),
    ("both", finetuning(set={"head.dropout": 0}, space={"head.dropout": {"grid": [1]}}), "is listed under set too"),
    ("both option", finetuning(space={"task": {"grid": ["rte"]}}), "finetune.space.task: is listed next to space too"),
    ("variant key", finetuning(variants={"a": {"lr": 1}}), "finetune.variants.a.lr: unknown key"),
    (
        "variant domain", finetuning(variants={"a": {"head.dropout": {"grid": [1]}}}),
        "variants.a.head.dropout: takes one value, not {'grid': [1]}",
    ),
    ("variant name", finetuning(variants={"a.b": {}}), "finetune.variants.a.b.[key]: String should match"),
    ("no variant", finetuning(variants={"a": None}), "finetune.variants.a: Input should be a valid dictionary"),
    (
        "variant space", finetuning(variants={"a": {"head.dropout": 0}}, space={"head.dropout": {"grid": [1]}}),
        "under space too",
    ),
    ("seeds", finetuning(seeds=[0, "a"]), "finetune.seeds.1: Input should be a valid integer"),
    ("seed yes", finetuning(seeds=[True]), "finetune.seeds.0: Input should be a valid integer"),
    ("seed half", finetuning(seeds=[0.5]), "finetune.seeds.0: Input should be a valid integer"),
    ("seed below", finetuning(seeds=[-1]), "finetune.seeds.0: Input should be greater than or equal to 0"),
    ("no seeds", finetuning(seeds=[]), "finetune.seeds: is empty"),
    ("seed alone", finetuning(seeds=3), "finetune.seeds: must be a list, in brackets"),
    ("seed twice", finetuning(seeds=[1, 2, 1]), "finetune.seeds: 1 is listed twice; leave one out"),
    ("share", pretraining(stop_at_share=1.5), "pretrain.stop_at_share: Input should be less than or equal to 1"),
    ("shares twice", pretraining(checkpoints=[0.5, 0.5]), "pretrain.checkpoints: 0.5 is listed twice"),
    (
        "late", pretraining(checkpoints=[0.5], stop_at_share=0.25),
        "pretrain.checkpoints: 0.5 comes after stop_at_share, 0.25",
    ),
    (
        "no metric", finetuning() | {"scheduler": {"kind": "asha"}},
        "metric: scheduler needs one; write metric: {name: score}",
    ),
    (
        "no metric 2", pretraining(space=RANDOM) | {"search": {"kind": "optuna"}},
        "write metric: {name: discriminator_auc}",
    ),
    (
        "nothing suggested", finetuning() | {"search": {"kind": "optuna"}, "metric": {"name": "score"}},
        "Optuna needs domains such as uniform or choice",
    ),
    (
        "optuna grid",
        pretraining(space=RANDOM, variants={"a": {}})
        | {"search": {"kind": "optuna"}, "metric": {"name": "generator_loss"}},
        "Optuna needs domains such as uniform or choice here, not a grid or variants",
    ),
    ("samples", finetuning() | {"search": {"samples": 3}}, "search.samples: 3, but no space has a random value"),
    ("samples yes", finetuning() | {"search": {"samples": True}}, "search: samples must be a number"),
    (
        "tasks of variants",
        finetuning(variants={"a": {}, "b": {"task": "rte"}})
        | {"metric": {"name": "score"}, "scheduler": {"kind": "median"}},
        "finetune.variants.b.task: scheduler compares the trials' scores",
    ),
    (
        "tasks",
        {
            "name": "x", "finetune": {"recipe": "rc2020", "model": MODEL, "space": {"task": {"grid": ["rte", "mrpc"]}}},
            "metric": {"name": "score"}, "scheduler": {"kind": "asha"},
        },
        "finetune.space.task: scheduler compares the trials' scores, and those of different tasks cannot be compared",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_bad_file_is_told_with_the_key_and_what_to_do(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_sweep(values, "x.yaml")
    first, *lines = str(error.value).splitlines()
    assert first == "The sweep x.yaml is not valid:"
    assert message in lines[0]
    assert len(lines) == 1, lines


def test_every_problem_of_a_file_is_told_at_once() -> None:
    values = finetuning(seeds=[True], recpie="x", space={"head.dropout": {"grid": []}, "a": {"grid": [1]}}) | {
        "pretrain": {"stop_at_share": 2}, "retry": 1, "metric": {"mode": "best"},
    }  # fmt: skip
    with pytest.raises(ConfigError) as error:
        parse_sweep(values, "x.yaml")
    for key in (
        "finetune.seeds.0", "finetune.recpie", "finetune.space.head.dropout", "finetune.space.a",
        "pretrain.stop_at_share", "retry", "metric.name", "metric.mode",
    ):  # fmt: skip
        assert f"\n  {key}: " in str(error.value)


words = st.text(max_size=8) | st.sampled_from(["set", "space", "variants", "seeds", "recipe", "grid", "task"])
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)


@given(anything, st.sampled_from(["pretrain", "finetune"]))
def test_whatever_a_stage_is_there_is_a_sweep_or_a_message(given_stage: Any, name: str) -> None:
    try:
        spec = parse_sweep({"name": "x", name: given_stage}, "x.yaml")
    except ConfigError as error:
        told = str(error)
    else:
        assert isinstance(spec, SweepSpec)
        return
    assert told.startswith("The sweep x.yaml is not valid:\n  ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "must be a mapping, not list"),
        ("a: [\n", "not valid YAML"),
        ("name: x\nname: y\n", "the key name appears twice"),
    ],
)
def test_a_broken_file_is_told(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_sweep(str(path))


def test_a_sweep_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'glue_seeds'"):
        load_sweep("glue_seed")
    with pytest.raises(ConfigError, match="Cannot read the sweep"):
        load_sweep(str(tmp_path))
