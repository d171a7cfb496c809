"""DeepSpeed's own engine with a recipe's networks, for a DeepSpeed script of your own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import deepspeed
import torch
from torch import distributed
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from electra_ds.api.transformers_model import ElectraForJointPreTraining, StoreRows
from electra_ds.config.deepspeed import BatchPlan, DeepSpeedPlan
from electra_ds.config.options import PretrainOptions
from electra_ds.config.recipe import Recipe, RecipeSource, load_recipe
from electra_ds.core import devices
from electra_ds.core.compat import import_muon
from electra_ds.core.errors import ConfigError
from electra_ds.core.launcher import detect
from electra_ds.core.ranks import Ranks, kept_environment, meet
from electra_ds.data.token_store import TokenStore
from electra_ds.interop.export_deepspeed import native_config
from electra_ds.training.engine import check_plan
from electra_ds.training.optimizer import learning_rate_at
from electra_ds.training.prepare import plan_for


class Initialized(NamedTuple):
    """The results of `initialize`, in the order of `deepspeed.initialize`."""

    engine: Any
    """The `DeepSpeedEngine` around an `ElectraForJointPreTraining`."""
    optimizer: Any
    """AdamW, which DeepSpeed wraps at ZeRO stages 1 to 3."""
    loader: Loader
    scheduler: LambdaLR


class Loader:
    """This rank's micro-batches of all steps that the engine has not taken yet, as arguments of its forward pass.

    After `engine.load_checkpoint` it continues where the checkpoint was saved.
    """

    def __init__(self, rows: StoreRows, batch: BatchPlan, engine: Any) -> None:
        self._rows, self._batch, self._engine = rows, batch, engine

    def __len__(self) -> int:
        """Return the number of micro-batches that are left."""
        return len(self._left()) // self._batch.micro_batch_size

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for micro_batch in DataLoader(self._rows, self._batch.micro_batch_size, sampler=self._left()):
            yield {name: value.to(self._engine.device) for name, value in micro_batch.items()}

    def _left(self) -> _RankRows:
        batch = self._batch
        share = batch.micro_batch_size * batch.gradient_accumulation_steps
        steps = range(self._engine.global_steps, len(self._rows) // (share * batch.world_size))
        return _RankRows(steps, share, share * batch.world_size, share * distributed.get_rank())


class _RankRows(NamedTuple):
    """The numbers of a rank's rows in the given steps."""

    steps: range
    share: int
    """Rows of a step that this rank computes."""
    whole: int
    """Rows of a step."""
    first: int
    """The first of this rank's rows in a step."""

    def __len__(self) -> int:
        return len(self.steps) * self.share

    def __iter__(self) -> Iterator[int]:
        for step in self.steps:
            begin = step * self.whole + self.first
            yield from range(begin, begin + self.share)


def initialize(
    *,
    recipe: RecipeSource,
    store: TokenStore | str | Path,
    ds_config: str | Path | None = None,
    model: ElectraForJointPreTraining | None = None,
    init_from: str | Path | Sequence[str | Path] = (),
    micro_batch: int | Literal["auto"] | None = None,
) -> Initialized:
    """Return DeepSpeed's engine, optimizer, loader and learning rate schedule, like `deepspeed.initialize`.

    The script does what every DeepSpeed script does. Each of the engine's losses is a mean over its micro-batch, and
    DeepSpeed averages gradients over micro-batches and ranks. Without a launcher the process forms its own group.

    Args:
        recipe: a shipped name such as `tiny`, a path, a mapping that may say `extends`, or a `Recipe`.
        store: a token store or its path.
        ds_config: a shipped DeepSpeed JSON such as `zero1`, or a path. By default the one for this hardware. What the
            recipe sets may be absent or `"auto"`.
        model: the model to train, with this recipe. By default `ElectraForJointPreTraining.from_recipe`.
        init_from: the weights of trained networks to begin with, as in `from_recipe`.
        micro_batch: sequences at a time, instead of the JSON's value.

    Raises:
        ConfigError: the recipe or the JSON cannot be used, the model has another recipe, or the JSON has half precision
            at ZeRO stage 0, where DeepSpeed's own loss scale does not work.
        DataError: the store is damaged or has too little text.

    Examples:
        >>> import electra_ds
        >>> engine, _, loader, _ = electra_ds.initialize(recipe="tiny", store="stores/small", ds_config="cpu")
        >>> for micro_batch in loader:
        ...     loss = engine(**micro_batch).loss
        ...     _ = engine.backward(loss)
        ...     engine.step()
        ...     if engine.global_steps == 4:
        ...         break
        >>> engine.global_steps
        4
    """
    found = load_recipe(recipe)
    options = PretrainOptions(ds_config=None if ds_config is None else str(ds_config), micro_batch=micro_batch)
    with kept_environment():
        plan = _plan(found, options)
        rows = StoreRows(found, store)
        if model is None:
            model = ElectraForJointPreTraining.from_recipe(found, rows.store.tokenizer, init_from=init_from)
        elif model.recipe != found or model.config.vocab_size != rows.store.tokenizer.vocab_size:
            raise ConfigError(
                "The model has another recipe or vocabulary: give recipe=model.recipe, and its own store."
            )
        model.config.forward_passes_per_step = plan.batch.gradient_accumulation_steps
        engine, optimizer, scheduler = _initialized(model, plan)
    return Initialized(engine, optimizer, Loader(rows, plan.batch, engine), scheduler)


def _initialized(model: ElectraForJointPreTraining, plan: DeepSpeedPlan) -> tuple[Any, Any, LambdaLR]:
    """Return DeepSpeed's engine, in training mode, with its optimizer and schedule."""
    model.network.set_up(None, plan.checkpointed_layers)
    if plan.stage:
        import_muon()
    optimizer, schedule = model.make_optimizer(), model.recipe.schedule.model_dump()
    scheduler = LambdaLR(optimizer, lambda step: learning_rate_at(step, learning_rate=1.0, **schedule))
    config = native_config(plan)
    if "torch_autocast" in plan.document:
        config["torch_autocast"] = plan.document["torch_autocast"]
    engine, optimizer, _, scheduler = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config, dist_init_required=False
    )
    engine.train()
    return engine, optimizer, scheduler


def _plan(recipe: Recipe, options: PretrainOptions) -> DeepSpeedPlan:
    """Join the other ranks, and return the JSON resolved for them. Raises ConfigError as `initialize` does."""
    launch = detect(os.environ)
    meet(launch)
    plan = plan_for(options, recipe, Ranks(launch))
    check_plan(plan, devices.device(launch), "the DeepSpeed JSON")
    if plan.stage == 0 and plan.precision.name in ("fp16", "bf16"):
        raise ConfigError(
            f"DeepSpeed's own {plan.precision.name} does not work at ZeRO stage 0 (deepspeedai/DeepSpeed#8393). Use "
            f'stage 1: "zero_optimization": {{"stage": 1}}. electra_ds.pretrain has its own at stage 0.'
        )
    return plan
