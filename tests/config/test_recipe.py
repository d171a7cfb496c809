from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from electra_ds.cli import main
from electra_ds.config.finetune_recipe import load_finetune_recipe
from electra_ds.config.names import FINETUNE_RECIPES, RECIPES, finetune_recipe_names, recipe_names, shipped_text
from electra_ds.config.recipe import ElectraRecipe, load_recipe, recipe_yaml, validate_recipe
from electra_ds.config.values import parse_value
from electra_ds.core.errors import ConfigError


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


def test_a_value_of_the_generators_recipe_cannot_be_changed_alone() -> None:
    override = "generator.recipe.schedule.total_steps=400"
    told = r"generator.recipe takes a whole recipe, such as {extends: tiny-mlm, schedule: {total_steps: ...}}"
    with pytest.raises(ConfigError, match=told):
        load_recipe("tiny-two-stage", [override])


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("schedule.total_steps=400", "schedule.epochs"),
        ("max_steps=400", "schedule.epochs"),
        ("schedule.warmup_steps=4", "schedule.warmup_share"),
        ("data.sequence_length=64", "data.max_length"),
        ("max_seq_length=64", "data.max_length"),
    ],
)
def test_a_value_that_finetuning_lacks_is_refused_with_the_one_that_takes_its_place(
    override: str, nearest: str
) -> None:
    with pytest.raises(ConfigError, match=f"unknown key; did you mean '{nearest}'"):
        load_finetune_recipe("rc2020", "rte", [override])


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
    path.write_text(recipe_yaml(load_recipe("tiny")).replace("total_steps: 12000", "total_steps: 1.2e4"))
    assert load_recipe(str(path)) == load_recipe("tiny")


# --- warm-up as a share


def test_the_warm_up_of_shipped_recipes_is_as_long_as_it_was() -> None:
    steps = {name: load_recipe(name).schedule.warmup_steps for name in recipe_names()}
    expected = {name: 240 if name.startswith("tiny") else 10_000 for name in recipe_names()}
    assert steps == expected | {"mini": 1000, "tiny-generator": 70, "tiny-two-stage": 360}


@pytest.mark.parametrize(("overrides", "steps"), [
    (["schedule.total_steps=4000"], 80),
    (["schedule.total_steps=7"], 0),
    (["schedule.warmup_steps=7"], 7),
    (["schedule.warmup_share=0.5"], 6000),
    (["schedule.warmup_share=0.3", "schedule.total_steps=9"], 2),
    (["schedule.warmup_share=0.9999999999999999", "schedule.total_steps=1e12"], 10**12 - 1),
])  # fmt: skip
def test_a_share_of_the_steps_is_resolved_to_steps_and_either_takes_the_others_place(
    overrides: list[str], steps: int
) -> None:
    recipe = load_recipe("tiny", overrides)
    assert recipe.schedule.warmup_steps == steps
    assert "warmup_share" not in recipe_yaml(recipe)
    assert validate_recipe(yaml.safe_load(recipe_yaml(recipe)), "again") == recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.warmup_steps=7", "schedule.warmup_share=0.1"], "schedule: give either .*, not both"),
        (["schedule.warmup_share=null"], "schedule: give either warmup_steps or warmup_share"),
        (["schedule.warmup_share=1"], "schedule.warmup_share: .*less than 1"),
        (["schedule.warmup_share=yes"], "warmup_share must be a number"),
        (["schedule.warmup_steps=12000"], "must be below total_steps 12000; warmup_share, such as 0.01, follows"),
    ],
)
def test_a_warm_up_is_given_exactly_once(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("tiny", overrides)


# --- recipes that extend another


@pytest.mark.parametrize(("base", "parent"), [("tiny", "tiny"), ("../base.yaml", "mini"), ("base2.yaml", "mini")])
def test_a_recipe_extends_a_shipped_one_or_a_file_beside_it(tmp_path: Path, base: str, parent: str) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (tmp_path / "base.yaml").write_text(shipped_text(RECIPES, "mini"))
    (folder / "base2.yaml").write_text("extends: ../base.yaml\n")
    (folder / "mine.yaml").write_text(
        f"extends: {base}\ndata: {{sequence_length: 48}}\nschedule: {{total_steps: 50, warmup_steps: 3}}\n"
    )
    same = load_recipe(parent, ["data.sequence_length=48", "schedule.total_steps=50", "schedule.warmup_steps=3"])
    recipe = load_recipe(str(folder / "mine.yaml"))
    assert recipe == same.model_copy(update={"name": "mine", "description": ""})
    assert "extends" not in recipe_yaml(recipe)
    assert load_recipe(str(folder / "mine.yaml"), ["name=x", "seed=5"]).seed == 5


def test_a_finetuning_recipe_extends_another_task_by_task(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "extends: rc2020\nname: ours\noptimizer: {learning_rate: 1e-3}\nby_task: {rte: {data.max_length: 64}}\n"
    )
    recipe, shipped = load_finetune_recipe(str(path), "rte"), load_finetune_recipe("rc2020", "rte")
    assert (recipe.name, recipe.schedule.epochs, recipe.data.max_length) == ("ours", 10, 64)
    assert recipe.optimizer.learning_rate == 1e-3
    assert recipe.head == shipped.head
    assert load_finetune_recipe(str(path), "mrpc").data.max_length == 128


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: mine.yaml\n", "names itself"),
        ("extends: other.yaml\n", "mine.yaml names .*other.yaml names .*mine.yaml"),
        ("extends: tinny\n", "There is no recipe .*tinny', which .*mine.yaml names"),
        ("extends: [tiny, mini]\n", "extends takes the name or the path of one recipe"),
        ("extends: broken.yaml\n", "must be a mapping"),
        ("extends: tiny\nmodel: {hidden: 3}\n", "model.hidden: unknown key"),
        ("extends: tiny\nschedule: {warmup_share: 0.1, warmup_steps: 3}\n", "not both"),
    ],
)
def test_a_recipe_that_cannot_be_extended_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text("extends: mine.yaml\n")
    (tmp_path / "broken.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(tmp_path / "mine.yaml"))


# --- the command that prints them


@pytest.mark.parametrize("name", [*recipe_names(), *finetune_recipe_names()])
def test_every_shipped_recipe_is_printed_in_full_and_loads_back(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["recipes", name])
    text = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(text)
    # What stands there as a comment is written out, too: the values are those that the recipe has anyway.
    _, marker, defaults = text.partition("# Left at their defaults:\n")
    assert marker
    overrides = [line.removeprefix("#   ").replace(": ", "=", 1) for line in defaults.splitlines()]
    if name in recipe_names():
        assert load_recipe(str(tmp_path / "printed.yaml")) == load_recipe(name)
        assert load_recipe(str(tmp_path / "printed.yaml"), overrides) == load_recipe(name)
        assert text.startswith(shipped_text(RECIPES, name))
        return
    for task in ("rte", "squad2", ""):
        assert load_finetune_recipe(str(tmp_path / "printed.yaml"), task) == load_finetune_recipe(name, task)
    assert text.startswith(shipped_text(FINETUNE_RECIPES, name))


def test_the_list_of_recipes_has_a_line_for_each_and_names_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    for name in (*recipe_names(), *finetune_recipe_names()):
        [line] = [line for line in lines if line.split()[0] == name]
        assert len(line.split()) > 4
    for name, default in (("tiny", "without a GPU"), ("rc2020-small", "with a GPU"), ("rc2020", "default")):
        assert any(line.split()[0] == name and default in line for line in lines)


def test_the_list_of_recipes_breaks_between_words_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["recipes"])
    in_a_file = capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal for rich
    monkeypatch.setenv("COLUMNS", "80")
    main(["recipes"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.split() == in_a_file.split()


def test_an_unknown_recipe_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["recipes", "tinny"])
    assert leaving.value.code == 2
    assert "did you mean 'tiny'?" in capsys.readouterr().err


def test_an_override_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="written key=value"):
        load_recipe("tiny", ["seed"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "must be a mapping"),
        ("a: [\n", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "the key seed appears twice"),
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
    assert {"seed", "model.hidden_size", "masking.replace_at", "data.holdout_by"} <= set(ElectraRecipe.dotted_keys())


def test_another_objective_has_its_own_defaults_in_place_of_inherited_ones_that_mean_something_else() -> None:
    """BERT masks 80 % of the selected tokens, a generator of ELECTRA 85 %."""
    recipe = load_recipe({"extends": "electra-small", "objective": "mlm"})
    assert (recipe.masking.mask_token_share, recipe.masking.random_token_share) == (0.8, 0.1)  # type: ignore[attr-defined]
    assert recipe.masking.count == "fixed"  # type: ignore[attr-defined]
    kept = load_recipe({"extends": "electra-small", "objective": "replace-mlm"})
    assert kept.masking.mask_token_share == 0.85  # type: ignore[attr-defined]
