from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from electra_ds.config.overrides import load_recipe, parse_value
from electra_ds.config.recipe import Recipe, recipe_yaml, validate_recipe
from electra_ds.config.shipped import recipe_names
from electra_ds.errors import ConfigError


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_its_full_yaml_gives_the_same_recipe(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert validate_recipe(yaml.safe_load(recipe_yaml(recipe)), "again") == recipe


def test_rc2020_small_is_table_5_of_the_study() -> None:
    recipe = load_recipe("rc2020-small")
    model, optimizer = recipe.model, recipe.optimizer
    assert (model.num_hidden_layers, model.hidden_size, model.intermediate_size) == (12, 256, 1024)
    assert (model.num_attention_heads, model.embedding_size, recipe.tokenizer.vocab_size) == (4, 128, 30522)
    assert (recipe.generator.width_multiplier, recipe.generator.depth_multiplier) == (0.25, 1.0)
    assert (recipe.masking.mlm_probability, recipe.masking.mask_token_share) == (0.15, 0.85)
    assert (optimizer.learning_rate, optimizer.epsilon, optimizer.weight_decay) == (5e-4, 1e-6, 0.01)
    assert (recipe.schedule.warmup_steps, recipe.schedule.total_steps) == (10_000, 1_000_000)
    assert (recipe.global_batch_size, recipe.data.sequence_length) == (128, 128)


def test_electra_small_is_the_originals_code() -> None:
    """configure_pretraining.py, modeling.py and optimization.py of google-research/electra."""
    recipe = load_recipe("electra-small")
    assert (recipe.tokenizer.kind, recipe.tokenizer.lowercase, recipe.tokenizer.vocab_size) == (
        "wordpiece",
        True,
        30522,
    )
    assert (recipe.data.segments, recipe.data.sequence_length, recipe.global_batch_size) == ("two", 128, 128)
    assert (recipe.optimizer.bias_correction, recipe.optimizer.max_grad_norm) == (False, 1.0)
    assert (recipe.schedule.kind, recipe.schedule.warmup_steps, recipe.schedule.total_steps) == (
        "product", 10_000, 1_000_000,
    )  # fmt: skip
    assert (recipe.masking.count, recipe.masking.replace_at) == ("fixed", "selected")
    assert recipe.discriminator.loss_on_special
    study, same = load_recipe("rc2020-small"), {"initializer"}
    assert recipe.model.model_dump(exclude=same) == study.model.model_dump(exclude=same)


@pytest.mark.parametrize("text", ["5e-4", "5E-4", "0.0005", ".0005", "5.0e-4"])
def test_a_number_in_any_notation_is_a_number(text: str) -> None:
    assert load_recipe("tiny", [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == 5e-4


def test_exponents_without_a_fraction_are_whole_numbers() -> None:
    assert load_recipe("tiny", ["schedule.total_steps=1e6"]).schedule.total_steps == 1_000_000


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_survives_an_override(value: float) -> None:
    assert float(parse_value(repr(value))) == value


@given(st.integers(min_value=-(2**63), max_value=2**63))
def test_every_integer_survives_an_override(value: int) -> None:
    assert parse_value(str(value)) == value


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("optimizer.learning_rat=1", "optimizer.learning_rate"),
        ("model.hidden=1", "model.hidden_size"),
        ("learning_rate=1", "optimizer.learning_rate"),
        ("sede=1", "seed"),
        ("optimizer.lr=1", "optimizer.learning_rate"),
        ("batch_size=1", "global_batch_size"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(override: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key; did you mean '{nearest}'"):
        load_recipe("tiny", [override])


def test_every_problem_is_in_one_message() -> None:
    bad = ["model.hidden_size=30", "model.num_attention_heads=4", "masking.mlm_probability=2", "global_batch_size=0"]
    with pytest.raises(ConfigError) as error:
        load_recipe("tiny", bad)
    for part in ("model: hidden_size 30 is not a multiple", "masking.mlm_probability", "global_batch_size"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "override", ["global_batch_size=yes", "optimizer.epsilon=.inf", "seed=1e400", "seed=-1", "name=../x"]
)
def test_what_is_no_number_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        load_recipe("tiny", [override])


def test_a_recipe_file_reads_numbers_as_the_command_line_does(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_yaml(load_recipe("tiny")).replace("total_steps: 10000", "total_steps: 1e4"))
    assert load_recipe(str(path)) == load_recipe("tiny")


def test_an_override_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="written key=value"):
        load_recipe("tiny", ["seed"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "must be a mapping"),
        ("a: [\n", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "the key seed stands twice"),
        ("name: x\nmodel: 3\n", "model"),
        ("name: x\nmodell: {}\n", "modell: unknown key; did you mean 'model"),
    ],
)
def test_a_broken_recipe_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(path), ["model.hidden_size=32"])


def test_an_unknown_recipe_names_the_ones_there_are() -> None:
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        load_recipe("tinny")


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        load_recipe("tiny").seed = 3  # type: ignore[misc]


def test_the_list_of_keys_reaches_every_section() -> None:
    assert {"seed", "model.hidden_size", "masking.replace_at", "data.holdout_by"} <= set(Recipe.dotted_keys())
