"""A recipe's networks as one transformers model, for Trainer, Accelerate, Lightning or a loop of your own.

    from electra_ds import ElectraForJointPreTraining

    model = ElectraForJointPreTraining.from_recipe("rc2020-small", tokenizer)
    loss = model(input_ids=input_ids, attention_mask=attention_mask).loss

It takes plain token ids. Masks and replacements are made in the forward pass, from the recipe's seed and the number of
forward passes before, which is saved with the weights. So a resumed run is exactly the run that was interrupted, in any
trainer and with any collator. Its import registers it with `AutoConfig` and `AutoModel`.

Shape suffixes: B rows of this process, T positions.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from transformers import (
    initialization as init,
)
from transformers.utils.generic import ModelOutput

from electra_ds.config.plugins import find_objective
from electra_ds.config.recipe import Recipe, RecipeSource, load_recipe
from electra_ds.core.errors import ConfigError, DataError
from electra_ds.data.given_tokenizer import from_transformers, load_given_tokenizer
from electra_ds.data.token_store import TokenStore, split_holdout
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.interop.init_from import read_initial_weights
from electra_ds.model.encoder import Encoder
from electra_ds.model.heads import column_keys
from electra_ds.pretraining.batches import BatchBuilder
from electra_ds.pretraining.electra import JointModel
from electra_ds.pretraining.evaluation import held_out_builder
from electra_ds.pretraining.masking import before
from electra_ds.pretraining.objectives.base import Objective, TextBatch
from electra_ds.training.optimizer import adamw_state, parameter_groups
from electra_ds.training.step import StepLosses

_EVALUATION = 0x6576616C
"""The part of the random key that tells evaluations from training steps."""


class ElectraJointConfig(PretrainedConfig):
    """The recipe of an `ElectraForJointPreTraining`, and what it must know of the tokenizer."""

    model_type = "electra_joint"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["losses"]  # Trainer would gather them in evaluations

    def __init__(
        self,
        recipe: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        pad_token_id: int = 0,
        mask_token_id: int = 0,
        special_token_ids: Sequence[int] = (),
        forward_passes_per_step: int = 1,
        **more: Any,
    ) -> None:
        """recipe: every value of a recipe. special_token_ids: of tokens that are never masked."""
        super().__init__(**more)
        self.recipe = recipe
        self.vocab_size = vocab_size
        self.pad_token_id = pad_token_id
        self.mask_token_id = mask_token_id
        self.special_token_ids = list(special_token_ids)
        self.forward_passes_per_step = forward_passes_per_step
        sizes = (recipe or {}).get("model", {})
        self.hidden_size = sizes.get("hidden_size")  # from which DeepSpeed sizes its buffers
        self.initializer_range = sizes.get("initializer_range", 0.02)
        self.tie_word_embeddings = True


@dataclass
class JointOutput(ModelOutput):
    """The result of a forward pass."""

    loss: torch.Tensor | None = None
    """fp32 scalar, the weighted sum of the losses, to be differentiated."""
    losses: dict[str, torch.Tensor] | None = None
    """fp32 scalars without gradients, each loss's mean by its name, such as `generator_loss`."""


class ElectraForJointPreTraining(PreTrainedModel):
    """The networks that a recipe's objective trains: for ELECTRA, a generator and a discriminator.

    `network` is the module that the engines of this package train. Every objective works, except one that reads its
    replacements from a token store.
    """

    config_class = ElectraJointConfig
    base_model_prefix = "network"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # each loss is a mean over its own positions, so Trainer must average micro-batches

    def __init__(self, config: ElectraJointConfig) -> None:
        """Build the networks, with random weights that depend only on the recipe's seed.

        Raises ConfigError if the recipe is not valid or its objective cannot be used here.
        """
        super().__init__(config)
        if not config.recipe:
            raise ConfigError(
                "These weights have no recipe, so they are not those of an ElectraForJointPreTraining. To begin with "
                "them, use ElectraForJointPreTraining.from_recipe(..., init_from=[FOLDER])."
            )
        recipe = load_recipe(config.recipe)
        _check_objective(recipe)
        self.objective: Objective[Any] = Objective.of(recipe, config.vocab_size or 0, config.pad_token_id)
        self.network = self.objective.build_model()
        self._frozen = [name for name, each in self.network.named_parameters() if not each.requires_grad]
        self.gradient_checkpointing = False
        for parameter in self.network.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # or transformers would draw them again
        self.register_buffer("num_forward_passes", torch.zeros((), dtype=torch.int64))
        self.num_forward_passes: torch.Tensor
        self._tied_weights_keys = _tied(self)
        self._keys_to_ignore_on_save = list(self._tied_weights_keys)  # or Trainer would warn of them when it resumes
        self.post_init()

    @classmethod
    def from_recipe(
        cls,
        recipe: RecipeSource,
        tokenizer: PreTrainedTokenizerBase | Tokenizer | str | Path,
        overrides: Sequence[str] | Mapping[str, Any] = (),
        *,
        init_from: str | Path | Sequence[str | Path] = (),
        forward_passes_per_step: int = 1,
    ) -> Self:
        """Return a model with random weights, or with those of trained networks.

        Args:
            recipe: a shipped name such as `rc2020-small`, a path, a mapping that may say `extends`, or a `Recipe`. Its
                batch, optimizer and schedule are your trainer's to set (`training_arguments`).
            tokenizer: a fast tokenizer of transformers, or the path of one.
            overrides: changed values of the recipe by dotted key.
            init_from: at most one generator and one discriminator, each a run, a transformers folder or a name on the
                Hub. The objective fast-electra needs a generator.
            forward_passes_per_step: the micro-batches of an optimizer step, if your trainer accumulates gradients.
                `training_arguments` divides the batch by it, and what depends on the step, such as the temperature of
                fast-electra, follows it.

        Raises:
            ConfigError: the recipe is not valid, or the weights do not fit it.
            DataError: the tokenizer cannot be used, or the weights cannot be read.
        """
        found = load_recipe(recipe, overrides)
        _check_objective(found)
        ours = _tokenizer(tokenizer)
        if found.required_weights is not None and not init_from:
            of_pretrain = " Only electra_ds.pretrain trains one by generator.recipe." if found.first_recipe() else ""
            raise ConfigError(
                f"The objective {found.objective} needs a trained {found.required_weights}: give a masked language "
                f"model as `init_from`.{of_pretrain}"
            )
        config = ElectraJointConfig(
            recipe=found.model_dump(mode="json"),
            vocab_size=ours.vocab_size,
            pad_token_id=ours.pad_id,
            mask_token_id=ours.mask_id,
            special_token_ids=np.flatnonzero(ours.is_special).tolist(),
            forward_passes_per_step=forward_passes_per_step,
        )
        model = cls(config)
        if init_from:
            sources = [init_from] if isinstance(init_from, str | Path) else init_from
            weights = read_initial_weights([str(each) for each in sources], found)
            weights.check_vocabulary(ours)
            model.network.load_state_dict(weights.load(found, ours).state_dict())
        return model

    @classmethod
    def from_pretrained(cls, *given: Any, **settings: Any) -> Any:
        """Return a saved model, in evaluation mode like every model that transformers loads.

        Raises DataError if the folder lacks some of its weights.
        """
        wants_info = settings.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*given, output_loading_info=True, **settings)
        model, info = loaded
        untouched = {name for name, tensor in model.state_dict().items() if tensor.is_meta}
        missing = sorted(untouched | {*info["missing_keys"]} - {*model._tied_weights_keys})
        if missing:
            raise DataError(f"The weights of {model.name_or_path} lack {', '.join(missing[:5])}.")
        for name in model._frozen:
            model.network.get_parameter(name).requires_grad_(False)
        return (model, info) if wants_info else model

    @property
    def recipe(self) -> Recipe:
        return self.objective.recipe

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        return_loss: bool = True,
    ) -> JointOutput:
        """Mask the text, draw replacements, and return the losses.

        Each loss is a mean over the positions of these rows that it counts. In training, random numbers depend on the
        recipe's seed, the number of forward passes before, and the process's rank. In evaluations they depend on the
        seed and the rows, so that the same batches always get the same masks.

        Args:
            input_ids: int64 [B, T], the original tokens with [CLS] and [SEP], padded on the right.
            attention_mask: [B, T], 1 at tokens and 0 at padding. Without it, all rows are full.
            token_type_ids: [B, T], 1 in a second segment, as a tokenizer makes it.
            return_loss: no effect. Trainer reports the loss of evaluations only if it finds this argument.

        Raises:
            DataError: rows are empty, padded on the left, too long for the model or have ids outside its vocabulary, or
                the mask has another shape.
        """
        text, device = self._text(input_ids, attention_mask, token_type_ids), input_ids.device
        if self.training:
            step, part = self._place()
            batch = self.objective.make_batch(replace(text, part=part), self.recipe.seed, step)
        else:
            batch = self.objective.make_batch(text, self.recipe.seed ^ _EVALUATION, _hash_of(text.ids_BT))
        uses_autocast = torch.is_autocast_enabled(device.type)
        self.network.autocast_dtype = torch.get_autocast_dtype(device.type) if uses_autocast else None
        losses = StepLosses(batch.loss_terms)
        loss = losses.add(self.network(batch.micro_batch(0, batch.num_sequences).to(device)))
        return JointOutput(loss=loss, losses=losses.means())

    def _place(self) -> tuple[int, int]:
        """Count a forward pass, and return its step and the part of the step's batch that this process computes."""
        step, index = divmod(int(self.num_forward_passes), self.config.forward_passes_per_step)
        self.num_forward_passes += 1
        if not torch.distributed.is_initialized():
            return step, index
        return step, index * torch.distributed.get_world_size() + torch.distributed.get_rank()

    def _text(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, token_type_ids: torch.Tensor | None
    ) -> TextBatch:
        config, most = self.config, self.recipe.model.max_position_embeddings
        ids_BT = input_ids.cpu().numpy().astype(np.int64)
        if not ids_BT.size:
            raise DataError("The batch is empty.")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise DataError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}, but input_ids {tuple(input_ids.shape)}."
            )
        rows, width = ids_BT.shape
        lengths_B = np.full(rows, width) if attention_mask is None else attention_mask.sum(1).cpu().numpy()
        is_token_BT = before(lengths_B, width)
        if not lengths_B.all():
            raise DataError("A row has no tokens. Leave out empty texts.")
        if attention_mask is not None and (attention_mask.bool().cpu().numpy() != is_token_BT).any():
            raise DataError('Rows must be padded on the right: set padding_side="right" in the tokenizer.')
        if width > most:
            raise DataError(f"Rows have {width} tokens, but the model has {most} positions. Truncate the text.")
        for outside in ids_BT[(ids_BT < 0) | (ids_BT >= config.vocab_size)][:1]:
            raise DataError(f"The text has id {outside}, but the model has the {config.vocab_size} pieces from 0.")
        second_BT = None if token_type_ids is None else (token_type_ids.cpu().numpy() == 1) & is_token_BT
        return TextBatch(
            ids_BT=np.where(is_token_BT, ids_BT, config.pad_token_id),
            lengths_B=lengths_B.astype(np.int64),
            second_segment_BT=second_BT if second_BT is not None and second_BT.any() else None,
            maskable_BT=is_token_BT & ~np.isin(ids_BT, config.special_token_ids),
            mask_token_id=config.mask_token_id,
        )

    def make_optimizer(self, *, fused: bool | None = None) -> torch.optim.AdamW:
        """Return AdamW with the recipe's settings, for your trainer's own schedule and clipping.

        The generator's own learning rate and betas apply to its group. fused: as in torch. Raises ConfigError if the
        recipe has own clipping or an own schedule of the generator, which only electra_ds.pretrain supports.
        """
        section = self.recipe.optimizer
        if section.rule != "adamw":
            raise ConfigError(
                f"optimizer.rule={section.rule} is supported only by electra_ds.pretrain. Give your trainer an "
                f"optimizer of its own, or remove the rule from the recipe."
            )
        rates = type(self.objective).rates(self.recipe)
        groups = parameter_groups(self.network.named_parameters(), section.weight_decay, rates)
        for group in groups:
            if group.pop("clipped_to") is not None or group.pop("schedule_ends") is not None:
                raise ConfigError(
                    "generator.max_grad_norm and generator.total_steps are supported only by electra_ds.pretrain. "
                    "Remove them from the recipe."
                )
            group["lr"] = section.learning_rate * group.pop("lr_scale")
        optimizer = torch.optim.AdamW(
            groups, section.learning_rate, (section.beta1, section.beta2), section.epsilon, fused=fused
        )
        if not section.bias_correction:
            optimizer.register_step_pre_hook(_leave_out_correction)
        return optimizer

    def training_arguments(self) -> dict[str, Any]:
        """Return the recipe's batch, optimizer, schedule and seed as keyword arguments of `TrainingArguments`.

        The batch is divided among processes, and into `forward_passes_per_step` micro-batches.

        Raises ConfigError if Trainer does not have the recipe's schedule, if the batch cannot be divided among the
        processes of a launcher such as torchrun, or if several GPUs have no launcher.
        """
        recipe, accumulation = self.recipe, self.config.forward_passes_per_step
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes == 1 and (gpus := torch.cuda.device_count()) > 1:
            raise ConfigError(
                f"Without a launcher Trainer would give each of the {gpus} GPUs a whole batch. Start the script with "
                f"torchrun --nproc_per_node {gpus}, or set CUDA_VISIBLE_DEVICES=0."
            )
        rows, rest = divmod(recipe.global_batch_size, processes * accumulation)
        if rest:
            raise ConfigError(
                f"global_batch_size {recipe.global_batch_size} is not a multiple of {processes} process(es) times "
                f"{accumulation} forward pass(es)."
            )
        if recipe.schedule.kind != "linear":
            raise ConfigError(f"Trainer does not have the schedule {recipe.schedule.kind}: set schedule.kind=linear.")
        return {
            "max_steps": recipe.schedule.total_steps,
            "warmup_steps": recipe.schedule.warmup_steps,
            "lr_scheduler_type": "linear",
            "per_device_train_batch_size": rows,
            "per_device_eval_batch_size": rows,
            "gradient_accumulation_steps": accumulation,
            "learning_rate": recipe.optimizer.learning_rate,
            "weight_decay": recipe.optimizer.weight_decay,
            "adam_beta1": recipe.optimizer.beta1,
            "adam_beta2": recipe.optimizer.beta2,
            "adam_epsilon": recipe.optimizer.epsilon,
            "max_grad_norm": recipe.optimizer.max_grad_norm,
            "seed": recipe.seed % 2**32,
        }

    def networks(self) -> dict[str, PreTrainedModel]:
        """Return copies of the trained networks as plain transformers models, such as `discriminator` and `generator`.

        They no longer need this package: `model.networks()["discriminator"].save_pretrained("my-electra")`. At ZeRO
        stage 3 all ranks must call it.
        """
        whole: AbstractContextManager[Any] = nullcontext()
        if any(hasattr(parameter, "ds_id") for parameter in self.network.parameters()):
            from electra_ds.training.zero import gathered

            whole = gathered(self.network.parameters())
        with whole:
            return {name: export.model for name, export in self.objective.exports(self.network).items()}

    def get_input_embeddings(self) -> torch.nn.Module:
        """Return the token table of the first network."""
        encoders = (module for module in self.network.modules() if isinstance(module, Encoder))
        for encoder in encoders:
            return encoder.embeddings.word_embeddings
        return super().get_input_embeddings()

    # What transformers calls.

    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, JointModel):
            init.copy_(module.column_keys_V, column_keys(self.config.vocab_size))
        if module is self:
            init.zeros_(self.num_forward_passes)

    def _set_gradient_checkpointing(self, enable: bool = True, *settings: Any, **more: Any) -> None:
        self.gradient_checkpointing = enable
        self.network.set_up(None, self.recipe.num_hidden_layers if enable else 0)


class NamedLosses(TrainerCallback):
    """Adds the mean of each loss to what Trainer shows and keeps: `Trainer(..., callbacks=[NamedLosses()])`.

    Trainer calls the trackers of `report_to` before it calls this. To log the losses there too, leave `report_to` empty
    and name them after it: `callbacks=[NamedLosses(), WandbCallback()]`.
    """

    def __init__(self) -> None:
        self._seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
        """The losses of forward passes in training, and in evaluations."""
        self._names: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        self._hook = model.register_forward_hook(self._add)

    def _add(self, model: torch.nn.Module, given: Any, output: JointOutput) -> None:
        assert output.losses is not None
        self._names = [*output.losses]
        self._seen[model.training].append(torch.stack([*output.losses.values()]))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        for is_training, prefix in ((True, ""), (False, "eval_")):
            if f"{prefix}loss" not in logs or not self._seen[is_training]:
                continue
            means = torch.stack(self._seen[is_training]).mean(0)
            self._seen[is_training].clear()
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(means)
                means /= torch.distributed.get_world_size()
            named = dict(zip([f"{prefix}{name}" for name in self._names], means.tolist(), strict=True))
            for shown in (logs, state.log_history[-1]):
                shown.update(named)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._hook.remove()


class StoreRows(Dataset[dict[str, torch.Tensor]]):
    """The rows of a token store on which `electra_ds.pretrain` trains, in its order, for a DataLoader.

    They are sampled without end up to the schedule's last step, so take them in order and only once: in Trainer with
    `train_sampling_strategy="sequential"`, in a DataLoader without `shuffle`. Each row is a dict of int64 [T] tensors:
    `input_ids`, `attention_mask`, and with two segments `token_type_ids`.
    """

    def __init__(
        self, recipe: RecipeSource, store: TokenStore | str | Path, *, held_out_rows: int | None = None
    ) -> None:
        """held_out_rows: take this many rows of the held-out text, for evaluations, instead of the training text.

        Raises DataError if the store is damaged or has too little text for a held-out part.
        """
        self._given = recipe, store, held_out_rows
        found = load_recipe(recipe)
        self.store = store if isinstance(store, TokenStore) else TokenStore(Path(store))
        split = split_holdout(self.store.documents, found.data, found.seed)
        if held_out_rows is None:
            self._builder = BatchBuilder(self.store, split.train, found, found.seed)
            steps, self._step_rows = found.schedule.total_steps, found.global_batch_size
        else:
            self._builder = held_out_builder(self.store, split, found)
            steps, self._step_rows = 1, held_out_rows
        self._length = steps * self._step_rows
        self._last: tuple[int, TextBatch] | None = None

    def __reduce__(self) -> Any:
        """Open the store again in another process, in place of copying it there."""
        recipe, store, held_out_rows = self._given
        return _reopened, (recipe, store.path if isinstance(store, TokenStore) else store, held_out_rows)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self._length:
            raise IndexError(f"There are {self._length:,} rows, but row {index:,} was asked for.")
        step, row = divmod(index, self._step_rows)
        if self._last is None or self._last[0] != step:
            self._last = step, self._builder.text(step, self._step_rows)
        text = self._last[1]
        found = {"input_ids": text.ids_BT[row], "attention_mask": text.is_token[row].astype(np.int64)}
        if text.second_segment_BT is not None:
            found["token_type_ids"] = text.second_segment_BT[row].astype(np.int64)
        return {name: torch.from_numpy(array) for name, array in found.items()}


def _reopened(recipe: RecipeSource, store: str | Path, held_out_rows: int | None) -> StoreRows:
    return StoreRows(recipe, store, held_out_rows=held_out_rows)


def _leave_out_correction(optimizer: torch.optim.Optimizer, *step: Any) -> None:
    """Begin the state of parameters so that torch's AdamW does not correct the bias of their moments."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and not optimizer.state[parameter]:
                state = adamw_state(parameter, bias_correction=False)
                optimizer.state[parameter] = state if group["fused"] else state | {"step": state["step"].cpu()}


def _check_objective(recipe: Recipe) -> None:
    if find_objective(recipe.objective).reads_replacements:
        raise ConfigError(
            f"The objective {recipe.objective} reads replacements from a token store, which only electra_ds.pretrain "
            f"does. Use fast-electra here."
        )


def _tied(model: torch.nn.Module) -> dict[str, str]:
    """Return the parameters that are the same as another one, whose name is the value."""
    first: dict[torch.nn.Parameter, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first[each] for name, each in named if first.setdefault(each, name) != name}


def _hash_of(ids_BT: np.ndarray) -> int:
    """Return an integer that depends on all tokens."""
    return int.from_bytes(hashlib.blake2b(ids_BT.tobytes(), digest_size=7).digest())


def _tokenizer(given: PreTrainedTokenizerBase | Tokenizer | str | Path) -> Tokenizer:
    if isinstance(given, Tokenizer):
        return given
    if not isinstance(given, PreTrainedTokenizerBase):
        name, found = str(given), load_given_tokenizer(str(given))[0]
    elif isinstance(given, PreTrainedTokenizerFast):
        name = str(given.name_or_path or type(given).__name__)
        found = from_transformers(given, name)
    else:
        raise DataError(f"{type(given).__name__} is not a fast tokenizer. Load it with AutoTokenizer.")
    if found.added:
        raise DataError(
            f"The tokenizer {name} lacks {', '.join(found.added)}. Add them with its method add_special_tokens, and "
            f"save it for those who use the model."
        )
    return found


AutoConfig.register(ElectraJointConfig.model_type, ElectraJointConfig)
AutoModel.register(ElectraJointConfig, ElectraForJointPreTraining)
AutoModelForPreTraining.register(ElectraJointConfig, ElectraForJointPreTraining)
