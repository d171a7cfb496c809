"""The recipe: every value that changes the mathematics of a run, and nothing else.

How the same mathematics is run (precision, micro-batch, ZeRO stage) belongs to the DeepSpeed JSON, see
`config/deepspeed.py`. Recipes are YAML files; those in `electra_ds/recipes/` can be given by name.

The module has the recipe types of the objectives, then reading a recipe, which may extend another. The sections of a
recipe are in `config/sections.py`, overrides of its values in `config/values.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pydantic
from pydantic import Field, model_validator
from typing_extensions import TypeVar

from electra_ds.config.names import RECIPES, shipped_names, shipped_text
from electra_ds.config.option import Options
from electra_ds.config.plugins import find_objective
from electra_ds.config.sections import (
    CopySection,
    DataSection,
    DiscriminatorSection,
    FrozenGeneratorSection,
    GeneratorSection,
    GeneratorSizeSection,
    MaskingSection,
    MlmMaskingSection,
    ModelSection,
    OptimizerSection,
    PredictionSection,
    ScheduleSection,
    Section,
    StartedDiscriminatorSection,
    TemperatureSection,
    TokenizerSection,
)
from electra_ds.config.values import (
    RECIPE_KEYS,
    apply_overrides,
    as_overrides,
    load_yaml,
    merge,
    parse_value,
    values_yaml,
)
from electra_ds.core.errors import ConfigError, did_you_mean

OptionsT = TypeVar("OptionsT", bound=Options)
RecipeT = TypeVar("RecipeT", bound=Section, default="Recipe")


class Recipe(Section):
    """The recipe of a pretraining with any objective. An objective's own subclass adds the sections that it needs."""

    METRICS: ClassVar[tuple[str, ...]] = ()
    """The metrics that a sweep can optimise, the main one first. Empty: the objective is imported to find them."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")
    """Name of the recipe, which the default run directory contains."""
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of weights, data order, masks, samples and dropout."""
    objective: str = "electra"
    """The name of a registered objective, or `module:Class` for one that is not registered."""
    global_batch_size: int = Field(ge=1, le=1_000_000_000)
    """Sequences in one optimizer step, over all ranks and accumulation steps."""
    tokenizer: TokenizerSection
    data: DataSection
    model: ModelSection
    optimizer: OptimizerSection
    schedule: ScheduleSection

    @property
    def num_hidden_layers(self) -> int:
        return self.model.num_hidden_layers

    @property
    def required_weights(self) -> str | None:
        """A network whose weights a new run needs, from --init-from or from `first_recipe`, such as `generator`."""
        return None

    @property
    def instead_of_weights(self) -> str:
        """The override with which a new run needs no `required_weights`, for messages."""
        return ""

    def first_recipe(self) -> Recipe | None:
        """Return the recipe of the run that first trains the `required_weights` if `--init-from` does not give them."""
        return None

    @model_validator(mode="after")
    def _sequence_fits_positions(self) -> Recipe:
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} exceeds "
                f"model.max_position_embeddings {self.model.max_position_embeddings}"
            )
        return self


class MlmRecipe(Recipe):
    """The recipe of the objective `mlm`."""

    METRICS = ("mlm_accuracy", "mlm_loss", "mlm_masked_loss", "unigram_loss", "mlm_gain")
    masking: MlmMaskingSection


GENERATOR_METRICS = (
    "generator_loss", "generator_masked_loss", "unigram_loss", "generator_gain", "generator_accuracy",
    "generator_sampled_accuracy", "replaced_share",
)  # fmt: skip


DISCRIMINATOR_METRICS = (
    "discriminator_auc", "discriminator_loss", "discriminator_accuracy", "discriminator_precision",
    "discriminator_recall", "discriminator_f1", "discriminator_logit_std", *GENERATOR_METRICS,
)  # fmt: skip


class GeneratorSizes(NamedTuple):
    """The sizes in which a generator can differ from the network that reads its replacements."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int


class JointRecipe(Recipe):
    """The recipe of an objective with a generator; `model` is the network that reads its replacements."""

    generator: GeneratorSizeSection
    masking: MaskingSection

    @model_validator(mode="after")
    def _generators_schedule_is_within_the_other(self) -> JointRecipe:
        end = self.generator.total_steps if isinstance(self.generator, GeneratorSection) else None
        if end is not None and not self.schedule.warmup_steps < end <= self.schedule.total_steps:
            raise ValueError(
                f"generator.total_steps {end} must be above schedule.warmup_steps {self.schedule.warmup_steps} and at "
                f"most schedule.total_steps {self.schedule.total_steps}"
            )
        return self

    @property
    def sharing(self) -> str:
        """The weights that the two networks share; a frozen generator shares none."""
        return self.generator.sharing if isinstance(self.generator, GeneratorSection) else "none"

    @property
    def generator_sizes(self) -> GeneratorSizes:
        """The generator's sizes, by the rule of google-research/electra `get_generator_config`.

        hidden = round(multiplier * hidden), feed-forward 4 * hidden, heads = max(1, hidden // 64), unless the recipe
        sets the last two. If the other network's heads are narrower than 64, their size replaces 64.
        """
        model, generator = self.model, self.generator
        head_size = min(64, model.hidden_size // model.num_attention_heads)
        wanted = round(model.hidden_size * generator.width_multiplier)
        heads = generator.num_attention_heads or max(1, wanted // head_size)
        hidden = -(-wanted // heads) * heads  # rounded up to a multiple of the heads
        return GeneratorSizes(
            hidden_size=hidden,
            num_hidden_layers=max(1, round(model.num_hidden_layers * generator.depth_multiplier)),
            num_attention_heads=heads,
            intermediate_size=generator.intermediate_size or 4 * hidden,
        )


class ReplaceMlmRecipe(JointRecipe):
    """The recipe of the objective `replace-mlm`."""

    METRICS = ("prediction_accuracy", "prediction_loss", "prediction_gain", *GENERATOR_METRICS)
    generator: GeneratorSection
    prediction: PredictionSection = PredictionSection()


class AllTokensMlmRecipe(JointRecipe):
    """The recipe of the objective `all-tokens-mlm`."""

    METRICS = (
        "prediction_accuracy", "prediction_loss", "copy_auc", "copy_loss", *GENERATOR_METRICS,
    )  # fmt: skip
    generator: GeneratorSection
    prediction: CopySection = CopySection()


class ElectraRecipe(JointRecipe):
    """The recipe of the objectives `electra` and `electra-15`; `model` is the discriminator."""

    METRICS = DISCRIMINATOR_METRICS
    generator: GeneratorSection
    discriminator: DiscriminatorSection


class FastElectraRecipe(JointRecipe):
    """The recipe of the objective `fast-electra`; `generator` has the sizes of the frozen auxiliary model."""

    METRICS: ClassVar[tuple[str, ...]] = DISCRIMINATOR_METRICS
    generator: FrozenGeneratorSection
    discriminator: StartedDiscriminatorSection
    temperature: TemperatureSection = TemperatureSection()

    @model_validator(mode="before")
    @classmethod
    def _generators_recipe_is_complete(cls, values: Any) -> Any:
        """Replace its name or file by its values, so that a run's recipe depends on no other file."""
        generator = values.get("generator") if isinstance(values, dict) else None
        if isinstance(generator, dict) and isinstance(generator.get("recipe"), str | Mapping):
            return values | {"generator": generator | {"recipe": named_values(generator["recipe"])}}
        return values

    @property
    def required_weights(self) -> str | None:
        return "generator"

    @property
    def instead_of_weights(self) -> str:
        return "generator.recipe=RECIPE"

    def first_recipe(self) -> MlmRecipe | None:
        """Return the recipe of the generator's own run, or None if `generator.recipe` is not set.

        Raises ConfigError if that recipe is not valid, or has an objective other than `mlm`.
        """
        if self.generator.recipe is None:
            return None
        values = load_recipe(self.generator.recipe).model_dump()
        if values["name"] == _GIVEN:
            values["name"] = f"{self.name}-generator"
        values |= {"seed": self.seed, "tokenizer": self.tokenizer.model_dump(), "data": self.data.model_dump()}
        values["model"] = self.model.model_dump() | self.generator_sizes._asdict()
        first = validate_recipe(values, f"{values['name']}, as the generator of {self.name},")
        if not isinstance(first, MlmRecipe):
            raise ConfigError(
                f"generator.recipe must be the recipe of a masked language model, but {first.name} has the objective "
                f"{first.objective}."
            )
        return first

    @model_validator(mode="after")
    def _equal_sizes_to_start_from_the_generator(self) -> FastElectraRecipe:
        if self.discriminator.starts_from != "generator":
            return self
        generator, sizes, model = self.generator, self.generator_sizes, self.model
        if (generator.width_multiplier, generator.depth_multiplier) != (1.0, 1.0):
            raise ValueError(
                "discriminator.starts_from: generator needs generator.width_multiplier: 1.0 and depth_multiplier: 1.0"
            )
        if sizes.num_attention_heads != model.num_attention_heads:
            raise ValueError(
                f"discriminator.starts_from: generator needs generator.num_attention_heads: {model.num_attention_heads}"
            )
        if sizes.intermediate_size != model.intermediate_size:
            raise ValueError(
                f"discriminator.starts_from: generator needs generator.intermediate_size: {model.intermediate_size}"
            )
        return self


class FastElectraOfflineRecipe(FastElectraRecipe):
    """The recipe of the objective `fast-electra-offline`; `generator` has the sizes of the model that drew the
    replacements."""

    METRICS = (*(name for name in DISCRIMINATOR_METRICS if name not in GENERATOR_METRICS), "replaced_share")
    generator: GeneratorSizeSection  # type: ignore[assignment]

    @property
    def required_weights(self) -> str | None:
        return None if self.discriminator.starts_from == "random" else "generator"

    @property
    def instead_of_weights(self) -> str:
        return "discriminator.starts_from=random"

    def first_recipe(self) -> None:
        return None


def joint_recipe(recipe: Recipe) -> JointRecipe:
    """Return the recipe, for code that needs a generator. Raises ConfigError if it has none."""
    if not isinstance(recipe, JointRecipe):
        raise ConfigError(
            f"This needs a recipe with a generator, but {recipe.name} has the objective {recipe.objective}."
        )
    return recipe


def electra_recipe(recipe: Recipe) -> ElectraRecipe:
    """Return the recipe, for code that works only with ELECTRA. Raises ConfigError if it has another objective."""
    if not isinstance(recipe, ElectraRecipe):
        raise ConfigError(
            f"This supports only the objectives electra and electra-15, but the recipe {recipe.name} has the objective "
            f"{recipe.objective}."
        )
    return recipe


OUR_RECIPES: dict[str, type[Recipe]] = {
    "electra": ElectraRecipe,
    "electra-15": ElectraRecipe,
    "mlm": MlmRecipe,
    "replace-mlm": ReplaceMlmRecipe,
    "all-tokens-mlm": AllTokensMlmRecipe,
    "fast-electra": FastElectraRecipe,
    "fast-electra-offline": FastElectraOfflineRecipe,
}
"""Recipe types of our objectives, whose own modules import torch, which reading a recipe should not wait for."""


def recipe_type(values: Any) -> type[Recipe]:
    """Return the recipe type of a raw mapping's objective. Raises ConfigError if there is no such objective."""
    name = values.get("objective", "electra") if isinstance(values, dict) else "electra"
    if not isinstance(name, str) or name in OUR_RECIPES:
        return OUR_RECIPES.get(name, ElectraRecipe)
    kind: type[Recipe] = find_objective(name).recipe_type
    return kind


def _defaults(kind: type[Recipe]) -> dict[str, Any]:
    """Return the default of every key inside a section, by dotted key."""
    return {
        f"{name}.{key}": of_key.default
        for name, field in kind.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        for key, of_key in field.annotation.model_fields.items()
    }


def for_objective(values: dict[str, Any], objective: Any) -> dict[str, Any]:
    """Return a recipe's raw mapping for another objective, without the sections and keys that only the old one has, and
    those that have another default there.

    Raises ConfigError if there is no such objective.
    """
    changed = values | {"objective": objective}
    before, after = _defaults(recipe_type(values)), _defaults(recipe_type(changed))
    left_out = {key for key, default in before.items() if key not in after or after[key] != default}
    sections = {key.partition(".")[0] for key in after}
    return {
        name: {key: each for key, each in value.items() if f"{name}.{key}" not in left_out}
        if isinstance(value, dict)
        else value
        for name, value in changed.items()
        if name in sections or name not in {key.partition(".")[0] for key in before}
    }


_GIVEN = "custom"
"""The name of a recipe that is given in Python without a name."""


RecipeSource = str | Path | Mapping[str, Any] | Section
"""A recipe's name, its file, its values, which may extend another recipe, or a recipe object."""


def named_values(source: RecipeSource, folder: str = RECIPES, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the raw mapping of a recipe, merged over the recipe that it `extends`. Raises ConfigError.

    source: a YAML file, the name of one shipped in `folder`, or the values themselves. A recipe that extends another
    inherits neither name nor description; without a name it is named after its file. The recipe that a file gives as
    `generator.recipe` is replaced by its values. above: the recipes that name this one, the nearest last.
    """
    if isinstance(source, Section):
        return source.model_dump()
    if isinstance(source, Mapping):
        name, values = _GIVEN, dict(source)
    else:
        name = str(source)
        files = {Path(each).resolve() for each in above if each not in shipped_names(folder)}
        if name in above or Path(name).resolve() in files:
            raise ConfigError(f"Recipe {above[0]} names itself: {' names '.join((*above, name))}.")
        values = _raw_values(name, folder, above)
        for key in RECIPE_KEYS:
            section, _, inner = key.partition(".")
            found = values.get(section)
            if isinstance(found, dict) and isinstance(within := found.get(inner), str | dict):
                if isinstance(within, str):
                    within = _beside(name, within, folder)
                elif isinstance(within.get("extends"), str):
                    within = within | {"extends": _beside(name, within["extends"], folder)}
                values[section] = found | {inner: named_values(within, folder, (*above, name))}
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"Recipe {name}: extends takes the name or the path of one recipe, not {base!r}.")
    base = _beside(name, base, folder)
    inherited = named_values(base, folder, (*above, name))
    if "objective" in values:
        inherited = for_objective(inherited, values["objective"])
    inherited = {key: value for key, value in inherited.items() if key not in ("name", "description")}
    return {"name": Path(name).stem} | merge(inherited, values)


def _beside(name: str, other: str, folder: str) -> str:
    """Return a recipe that another one names: one that is shipped, or the path of a file beside it."""
    return other if other in shipped_names(folder) else str(Path(name).parent / other)


def _raw_values(name_or_path: str, folder: str, above: tuple[str, ...]) -> dict[str, Any]:
    names = shipped_names(folder)
    if name_or_path in names:
        text = shipped_text(folder, name_or_path)
    elif Path(name_or_path).is_file():
        try:
            text = Path(name_or_path).read_text("utf8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"Cannot read the recipe {name_or_path}: {error}") from error
    else:
        named = f", which {above[-1]} names" if above else ""
        raise ConfigError(
            f"There is no recipe '{name_or_path}'{named}: it is neither a file nor one of {', '.join(names)}"
            f"{did_you_mean(name_or_path, names)}"
        )
    values = load_yaml(text, f"Recipe {name_or_path}")
    if not isinstance(values, dict):
        raise ConfigError(f"Recipe {name_or_path} must be a mapping of sections, not {type(values).__name__}.")
    return values


def shown_source(source: RecipeSource) -> str:
    """Return a recipe's name for messages."""
    if isinstance(source, Section):
        return f"'{getattr(source, 'name', _GIVEN)}'"
    return f"'{source.get('name', _GIVEN)}'" if isinstance(source, Mapping) else str(source)


def validate_recipe(values: dict[str, Any], source: str, kind: type[RecipeT] = Recipe) -> RecipeT:  # type: ignore[assignment]
    """Return a recipe from a raw mapping. ConfigError lists every problem with its dotted key.

    kind: `Recipe` means the recipe type of the objective that the mapping names.
    """
    if kind is Recipe:
        kind = recipe_type(values)  # type: ignore[assignment]
    try:
        return kind.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(f"Recipe {source} is not valid:\n" + "\n".join(_problems(error, kind))) from error


def _problems(error: pydantic.ValidationError, kind: type[Section]) -> list[str]:
    """Return a line for each problem, with its dotted key."""
    known = [*kind.model_fields, *kind.dotted_keys()]
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"unknown key{did_you_mean(key, known)}"
        elif problem["type"] == "missing":
            message = "is missing"
        lines.append(f"  {key or 'recipe'}: {message}")
    return lines


def recipe_yaml(recipe: Section) -> str:
    """Return the complete recipe, including defaults, as YAML that passes validation."""
    return values_yaml(recipe.model_dump())


def load_recipe(source: RecipeSource, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Load and check a pretraining recipe.

    source: a shipped name such as `tiny`, the path of a YAML file, or a mapping of sections, which may say
    `extends: tiny`.
    overrides: changed values by dotted key, as a mapping or as `key=value` texts.
    The recipe's type depends on the objective that it names. Raises ConfigError, which lists every problem with its
    key.

        >>> from electra_ds import load_recipe
        >>> load_recipe("tiny", {"schedule.total_steps": 400}).schedule.total_steps
        400
    """
    values, texts = named_values(source), as_overrides(overrides)
    for text in texts:
        if text.startswith("objective="):
            values = for_objective(values, parse_value(text.partition("=")[2]))
    return validate_recipe(apply_overrides(values, texts, recipe_type(values).dotted_keys()), shown_source(source))


def given_options(kind: type[OptionsT], options: OptionsT | None, given: Mapping[str, Any]) -> OptionsT:
    """Return a call's options: keyword arguments over `options`.

    Raises ConfigError for an unknown one, and for options that contradict each other.
    """
    if options is not None and not isinstance(options, kind):
        raise ConfigError(f"options must be an object of electra_ds.{kind.__name__}, not {options!r}.")
    values = {name: value for name, value in given.items() if value is not None}
    if overrides := values.pop("overrides", None):
        values["overrides"] = as_overrides(overrides)
    if isinstance(recipe := values.get("recipe"), Section):
        values["recipe"] = recipe.model_dump()
    found = kind.of(({} if options is None else options.given()) | values)
    found.check()
    return found
