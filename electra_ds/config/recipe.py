"""The recipe: every value that changes the mathematics of a run, and nothing else.

How the same mathematics is run (precision, micro-batch, ZeRO stage) belongs to the DeepSpeed JSON, see
`config/deepspeed.py`. Recipes are YAML files; those in `electra_ds/recipes/` can be given by name.

The module has the sections and what they check, then reading a recipe that may extend another, then overrides of its
values by dotted key.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, field_validator, model_validator
from typing_extensions import TypeVar

from electra_ds.config.names import RECIPES, find_objective, shipped_names, shipped_text
from electra_ds.config.option import Options
from electra_ds.core.errors import ConfigError, did_you_mean


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml's, where there is one
    """A YAML loader that reads 5e-4 as a number; YAML 1.1 reads it as a string, because it has no dot."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    twice = sorted({str(key) for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"the key {', '.join(twice)} appears twice (line {node.start_mark.line + 1})")
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(text: str, what: str) -> Any:
    """Return the values in a YAML text. Raises ConfigError, which names the text as `what`."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is not valid YAML: {error}") from error


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_no_booleans(cls, values: Any) -> Any:
        """Reject booleans for numbers: pydantic would accept `yes`, which YAML reads as true, as 1."""
        if isinstance(values, dict):
            for name, field in cls.model_fields.items():
                kinds = get_args(field.annotation) or (field.annotation,)
                if isinstance(values.get(name), bool) and {int, float} & set(kinds):
                    raise ValueError(f"{name} must be a number, not {values[name]}")
        return values

    @classmethod
    def dotted_keys(cls) -> list[str]:
        """Return every key; keys inside sections are dotted, such as `model.hidden_size`."""
        keys = []
        for name, field in cls.model_fields.items():
            section = field.annotation
            if isinstance(section, type) and issubclass(section, Section):
                keys += [f"{name}.{inner}" for inner in section.model_fields]
            else:
                keys.append(name)
        return keys


OptionsT = TypeVar("OptionsT", bound=Options)
RecipeT = TypeVar("RecipeT", bound=Section, default="Recipe")


class TokenizerSection(Section):
    kind: Literal["byte-level-bpe", "wordpiece"]
    """Algorithm of the tokenizer that `build-data` trains if you give no finished one."""
    vocab_size: int = Field(ge=300)
    """Size of the trained vocabulary, including special tokens. A finished tokenizer has its own size."""
    lowercase: bool = False
    """True to lower-case text and strip accents before tokenising (WordPiece only)."""
    max_training_characters: int = Field(default=1_000_000_000, ge=1)
    """Maximum number of characters to train the tokenizer on: the first ones of each source, in equal shares."""

    @model_validator(mode="after")
    def _lowercase_is_wordpiece(self) -> TokenizerSection:
        if self.lowercase and self.kind != "wordpiece":
            raise ValueError("lowercase: true needs kind: wordpiece (byte-level BPE leaves the text unchanged)")
        return self


class DataSection(Section):
    sequence_length: int = Field(ge=8)
    """Tokens in one training sequence, including [CLS] and [SEP]."""
    document_sampling: Literal["auto", "epoch", "length"] = "auto"
    """`epoch`: each document once per epoch. `length`: documents in proportion to their length.
    `auto`: `length` if the corpus has fewer than 10,000 documents that span several windows each."""
    segments: Literal["one", "two"] = "one"
    """`one`: a random window of a document. `two`: complete lines packed into two segments, as in the original's
    build_pretraining_dataset.py; `document_sampling` then has no effect, and every example occurs once per epoch."""
    corpus_weights: list[PositiveFloat] | None = Field(default=None, min_length=1)
    """Proportions in which training sequences come from the token store's corpora, one number for each; null weights
    all text equally. Proportions are accurate to 1/1024."""
    holdout_by: Literal["auto", "document", "span"] = "auto"
    """The held-out part for evaluation: complete documents, or one contiguous span of each long document.
    `auto`: `span` if there are fewer than 1,000 documents."""
    holdout_fraction: float = Field(default=0.02, gt=0, lt=0.5)
    """Share of the corpus's tokens to hold out."""
    holdout_max_tokens: int = Field(default=1_000_000, ge=1)
    """Maximum size of the held-out part, in tokens."""


class ModelSection(Section):
    """The main network, in the terms of transformers' `ElectraConfig`: the discriminator, or the encoder of an
    objective without one."""

    embedding_size: int = Field(ge=8)
    hidden_size: int = Field(ge=8)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    intermediate_size: int = Field(ge=8)
    max_position_embeddings: int = Field(default=512, ge=8)
    hidden_dropout_prob: float = Field(default=0.1, ge=0, lt=1)
    attention_probs_dropout_prob: float = Field(default=0.1, ge=0, lt=1)
    initializer: Literal["normal", "truncated-normal"] = "normal"
    """Distribution of matrices and embedding tables. `normal`: a normal distribution, as in transformers.
    `truncated-normal`: the same, truncated at two standard deviations, but Glorot uniform for the projection of the
    embeddings and the dense layer of the discriminator's head (the original's code)."""
    initializer_range: float = Field(default=0.02, gt=0)
    layer_norm_eps: float = Field(default=1e-12, gt=0)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelSection:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self


class GeneratorSizeSection(Section):
    width_multiplier: float = Field(gt=0, le=1)
    """Width of the generator divided by that of the main network."""
    depth_multiplier: float = Field(default=1.0, gt=0, le=1)
    """Layers of the generator divided by those of the main network."""
    num_attention_heads: int | None = Field(default=None, ge=1)
    """Attention heads of the generator; null means the original's rule for its width."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Feed-forward size of the generator; null means four times its width, as in the original."""


class FrozenGeneratorSection(GeneratorSizeSection):
    """A frozen generator, which was trained before the discriminator."""

    recipe: dict[str, Any] | None = None
    """Recipe of the generator, a masked language model that is pretrained first, in the folder `generator` of the run,
    unless `--init-from` gives one. It is a shipped name, a file, or values such as `{extends: tiny-mlm, schedule:
    {total_steps: 4000}}`. Its seed, tokenizer, data and model are replaced by those of the run, with the sizes of the
    run's `generator` section."""

    @field_validator("recipe", mode="before")
    @classmethod
    def _is_complete(cls, source: Any) -> Any:
        """Replace a name or a file by its values, so that a run's recipe depends on no other file."""
        return named_values(source) if isinstance(source, str | Mapping) else source


class GeneratorSection(GeneratorSizeSection):
    """A generator that is trained."""

    sharing: Literal["embeddings", "tokens", "none", "all"] = "embeddings"
    """Weights that the generator shares with the main network: all embedding tables with their LayerNorm, only the
    token table, nothing, or the entire encoder (which needs both multipliers at 1)."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the softmax from which replacements are drawn."""
    loss_weight: float = Field(default=1.0, ge=0)
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the generator's own weights; null means `optimizer.learning_rate`. Weights that it shares
    have the main network's rate."""
    beta1: float | None = Field(default=None, ge=0, lt=1)
    """Decay rate of AdamW's first moment for the generator's own weights; null means `optimizer.beta1`."""
    beta2: float | None = Field(default=None, ge=0, lt=1)
    """Decay rate of AdamW's second moment for the generator's own weights; null means `optimizer.beta2`."""
    total_steps: int | None = Field(default=None, ge=1)
    """Step at which the learning rate of the generator's own weights reaches 0; they do not change after it. null means
    `schedule.total_steps`."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Norm to which the gradients of the generator's own weights are clipped, separately from the main network's (ZeRO
    stage 0 only). null clips all gradients together, so that the weight of each loss affects both networks."""

    @model_validator(mode="after")
    def _sharing_all_needs_equal_size(self) -> GeneratorSection:
        if self.sharing == "all" and (self.width_multiplier, self.depth_multiplier) != (1.0, 1.0):
            raise ValueError("sharing: all needs width_multiplier: 1.0 and depth_multiplier: 1.0")
        for name in ("num_attention_heads", "intermediate_size"):
            if self.sharing == "all" and getattr(self, name) is not None:
                raise ValueError(f"sharing: all uses the main network's sizes, so leave out {name}")
        return self


class DiscriminatorSection(Section):
    loss_weight: float = Field(default=50.0, ge=0)
    """Lambda of the ELECTRA paper, eq. 4."""
    loss_on_special: bool = False
    """True to include [CLS] and [SEP] in the discriminator's loss (the original's code: yes)."""


class SelectionSection(Section):
    mlm_probability: float = Field(default=0.15, gt=0, lt=1)
    """Share of tokens selected for prediction."""
    mask_token_share: float = Field(default=0.85, gt=0, le=1)
    """Share of the selected tokens that are shown as [MASK]; the others are shown unchanged."""
    count: Literal["bernoulli", "fixed"] = "bernoulli"
    """`bernoulli`: every token is selected independently. `fixed`: a fixed number per sequence, without
    replacement: round(p * length), at most floor((p + 0.005) * sequence_length), at least 1."""


class MlmMaskingSection(SelectionSection):
    mask_token_share: float = Field(default=0.8, gt=0, le=1)
    """Share of the selected tokens that are shown as [MASK]. BERT has 0.8; ELECTRA's code trains its BERT with 0.85."""
    random_token_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the selected tokens that are shown as a random token of the vocabulary (BERT: 0.1); the rest is shown
    unchanged."""

    @model_validator(mode="after")
    def _shares_are_parts_of_one(self) -> MlmMaskingSection:
        if self.mask_token_share + self.random_token_share > 1:
            raise ValueError(
                f"mask_token_share {self.mask_token_share} and random_token_share {self.random_token_share} add up to "
                f"more than 1"
            )
        return self


class MaskingSection(SelectionSection):
    """The tokens that the generator predicts. It sees most of them as [MASK] and the others unchanged."""

    replace_at: Literal["selected", "masked"] = "selected"
    """Positions of the main network's input that get the generator's samples: every selected position (the original),
    or only those that became [MASK] (the reproduction study's code)."""


class PredictionSection(Section):
    """The prediction of original tokens by the network that reads the generator's replacements."""

    loss_weight: float = Field(default=1.0, ge=0)
    """Weight of the main network's loss; the ELECTRA paper does not give it. With 1 it counts as much as the
    generator's, since both are cross-entropies over the vocabulary."""


class CopySection(PredictionSection):
    copy_loss: Literal["joint", "separate"] = "joint"
    """How the copy probability is trained. `joint`: by the loss of the mixture of copying and predicting (ELECTRA
    paper, section 3.5). `separate`: by a cross-entropy of its own, and the mixture's loss does not backpropagate into
    it (COCO-LM)."""
    copy_loss_weight: float = Field(default=50.0, ge=0)
    """Weight of the separate cross-entropy (COCO-LM: 50)."""
    loss_on_special: bool = False
    """True to predict [CLS] and [SEP] too."""


class OptimizerSection(Section):
    """AdamW with decoupled weight decay, without decay of biases and LayerNorm."""

    learning_rate: float = Field(gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: float = Field(default=1e-6, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    bias_correction: bool = True
    """True to correct the bias of moments that start at 0 (the original's code: no)."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Global gradient norm above which gradients are scaled down to it."""


class ScheduleSection(Section):
    kind: Literal["linear", "product"] = "linear"
    """`linear`: warm-up from 0 to the learning rate, then decay to 0 at `total_steps`. `product`: the warm-up times
    a decay that begins at step 0 (the original's code)."""
    total_steps: int = Field(ge=1, le=10**12)
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises. A recipe gives either these or `warmup_share`."""
    warmup_share: float | None = Field(default=None, ge=0, lt=1, exclude=True)
    """The warm-up as a share of `total_steps`, rounded down. A resolved recipe has only `warmup_steps`."""

    @model_validator(mode="after")
    def _warmup_is_given_once_and_ends_before_the_end(self) -> ScheduleSection:
        has_steps = "warmup_steps" in self.model_fields_set
        if has_steps == (self.warmup_share is not None):
            raise ValueError("give either warmup_steps or warmup_share" + (", not both" if has_steps else ""))
        if self.warmup_share is not None:  # readers of the recipe only use steps; __dict__, since the model is frozen
            steps = min(int(self.warmup_share * self.total_steps), self.total_steps - 1)
            self.__dict__.update(warmup_steps=steps, warmup_share=None)
        if self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} must be below total_steps {self.total_steps}; "
                f"warmup_share, such as 0.01, follows total_steps"
            )
        return self


class TrainingRecipe(Protocol):
    """The part of any recipe that an engine and a DeepSpeed JSON need."""

    @property
    def name(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def global_batch_size(self) -> int: ...

    @property
    def num_hidden_layers(self) -> int: ...

    @property
    def optimizer(self) -> OptimizerSection: ...

    @property
    def schedule(self) -> ScheduleSection: ...


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


class TemperatureSection(Section):
    """The temperature of the softmax from which a frozen generator's replacements are drawn.

    It changes with u, the share of the steps that are done. Evaluations draw at temperature 1. The schedule is that of
    Fast-ELECTRA (Dong et al. 2024), whose constants could not be verified: the defaults are ours.
    """

    schedule: Literal["exponential", "linear", "polynomial", "constant"] = "exponential"
    """`exponential`: 1 + (start - 1) exp(-u / tau). `linear`: 1 + (start - 1) (1 - u). `polynomial`: 1 + (start - 1)
    (1 - u)^power. `constant`: start."""
    start: float = Field(default=2.0, gt=0)
    """Temperature of the first step. Above 1, replacements are easier to detect at first."""
    tau: float = Field(default=0.1, gt=0)
    """Time constant of the exponential schedule, as a share of the steps: after this share, 1/e of the distance to 1 is
    left."""
    power: float = Field(default=2.0, gt=0)
    """Exponent of the polynomial schedule."""

    def at(self, share: float) -> float:
        """Return the temperature when this share of the steps is done."""
        rest = {
            "exponential": math.exp(-share / self.tau),
            "linear": 1 - share,
            "polynomial": (1 - share) ** self.power,
            "constant": 1.0,
        }
        return 1 + (self.start - 1) * rest[self.schedule]


class StartedDiscriminatorSection(DiscriminatorSection):
    starts_from: Literal["random", "embeddings", "generator"] = "embeddings"
    """Initial weights of the discriminator: random, the generator's embeddings, or the generator's entire encoder; the
    last needs a generator of exactly the discriminator's sizes."""


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

    @property
    def required_weights(self) -> str | None:
        return "generator"

    def first_recipe(self) -> MlmRecipe | None:
        """Return the recipe of the generator's own run, or None if `generator.recipe` is not set.

        Raises ConfigError if that recipe is not valid, or has an objective other than `mlm`.
        """
        if self.generator.recipe is None:
            return None
        values = load_recipe(self.generator.recipe).model_dump()
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
_INSTEAD = {"warmup_steps": "warmup_share", "warmup_share": "warmup_steps", "min_steps": "epochs"}
"""A section's keys that are not inherited if the other key is given: a recipe has only one of the two warm-ups, and
explicit epochs are not raised to `min_steps`."""


def merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Merge a recipe's raw mapping over the one it extends: sections are merged key by key, other values replaced.

    A recipe within it, which is that of a generator, is a value.
    """
    result = {key: value for key, value in base.items() if _INSTEAD.get(key) not in own}
    for key, value in own.items():
        below = result.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and key != "recipe":
            result[key] = merge(below, value)
        else:
            result[key] = value
    return result


RecipeSource = str | Path | Mapping[str, Any] | Section
"""A recipe's name, its file, its values, which may extend another recipe, or a recipe object."""


def named_values(source: RecipeSource, folder: str = RECIPES, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the raw mapping of a recipe, merged over the recipe that it `extends`. Raises ConfigError.

    source: a YAML file, the name of one shipped in `folder`, or the values themselves. A recipe that extends another
    inherits neither name nor description; without a name it is named after its file. above: the recipes that extend
    this one, the nearest last.
    """
    if isinstance(source, Section):
        return source.model_dump()
    if isinstance(source, Mapping):
        name, values = _GIVEN, dict(source)
    else:
        name, values = str(source), _raw_values(str(source), folder, above)
        generator = values.get("generator")
        if isinstance(generator, dict) and isinstance(generator.get("recipe"), str):
            values["generator"] = generator | {"recipe": _beside(name, generator["recipe"], folder)}
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"Recipe {name}: extends takes the name or the path of one recipe, not {base!r}.")
    base = _beside(name, base, folder)
    above = (*above, name)
    files = {Path(each).resolve() for each in above if each not in shipped_names(folder)}
    if base in above or Path(base).resolve() in files:
        raise ConfigError(f"Recipe {above[0]} extends itself: {' extends '.join((*above, base))}.")
    inherited = named_values(base, folder, above)
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
        extended = f", which {above[-1]} extends" if above else ""
        raise ConfigError(
            f"There is no recipe '{name_or_path}'{extended}: it is neither a file nor one of {', '.join(names)}"
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


def values_yaml(values: dict[str, Any]) -> str:
    """Return a recipe's raw mapping as YAML."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


# --- overrides, such as `optimizer.learning_rate=5e-4` on the command line

_MEANT = {
    "lr": "learning_rate", "wd": "weight_decay", "batch_size": "global_batch_size", "eps": "epsilon",
    "total_steps": "epochs", "max_steps": "epochs", "sequence_length": "max_length", "max_seq_length": "max_length",
}  # fmt: skip
"""The values of a recipe that are meant by common short names, and by names that only pretraining has."""


def parse_value(text: str) -> Any:
    """Parse a value as in a recipe file. Raises ConfigError."""
    return load_yaml(text, f"The value {text!r}")


def apply_overrides(values: dict[str, Any], overrides: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    """Return a recipe's raw mapping with `key=value` overrides applied. Raises ConfigError for an unknown key."""
    given: dict[str, Any] = {}
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            problems.append(f"  {override!r}: an override is written key=value, e.g. optimizer.learning_rate=1e-3")
        elif key not in known:
            problems.append(f"  {key}: unknown key{_nearest(key, known)}")
        else:
            put_value(given, key, parse_value(text))
    if problems:
        raise ConfigError("These overrides cannot be applied:\n" + "\n".join(problems))
    return merge(values, given)


def put_value(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key in a recipe's raw mapping."""
    section, _, name = key.rpartition(".")
    target = values.setdefault(section, {}) if section else values
    if isinstance(target, dict):  # if not, the recipe's validation says so
        target[name] = value


def dotted_values(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return (dotted key, value) for every value in a nested mapping."""
    result = []
    for key, value in values.items():
        if isinstance(value, dict):
            result += dotted_values(value, f"{prefix}{key}.")
        else:
            result.append((prefix + key, value))
    return result


def _nearest(key: str, known: Sequence[str]) -> str:
    if meant := [name for name in known if name.rpartition(".")[2] == _MEANT.get(key.rpartition(".")[2])]:
        return f"; did you mean '{meant[0]}'?"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:  # the right name without its section
        near = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return f"; did you mean '{near[0]}'?" if near else ""


def as_overrides(given: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Return overrides as `key=value` texts, with values that `parse_value` can read back."""
    if isinstance(given, Mapping):
        return [f"{key}={_as_text(value)}" for key, value in given.items()]
    return [given] if isinstance(given, str) else list(given)


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        try:
            if parse_value(value) == value:
                return value
        except ConfigError:
            pass
    return json.dumps(value, ensure_ascii=False)


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
