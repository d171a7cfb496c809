"""The sections of a pretraining recipe, with what they check."""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator


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
    """AdamW with decoupled weight decay, or another rule; without decay of biases and LayerNorm."""

    rule: str = Field(default="adamw", exclude_if=lambda rule: rule == "adamw")
    """`adamw`, or an update rule of your own by registered name or as `module:Class` (docs/plugins.md)."""
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
