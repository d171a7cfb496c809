"""Writes DeepSpeed's own checkpoint of a run, by a DeepSpeed engine as anybody would set it up.

Unlike in training, DeepSpeed owns precision and loss scale at stage 0 too, since that is what will load it there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint.constants import (
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.monitors import MONITOR_SECTIONS
from electra_ds.config.recipe import Recipe
from electra_ds.pretraining.electra import Electra
from electra_ds.training.checkpoint import Checkpoint
from electra_ds.training.engine import check_plan, close_deepspeed
from electra_ds.training.optimizer import MOMENTS, adamw_state
from electra_ds.training.schedule import learning_rate_at
from electra_ds.training.zero import ZeroAdamW, torch_adamw


def native_config(plan: DeepSpeedPlan) -> dict[str, Any]:
    """The JSON for a plain DeepSpeed script: the resolved one, without monitors and what only our engine needs.

    Autocast is left out, as its checkpoints are those of fp32.
    """
    config = copy.deepcopy(plan.document)
    for key in ("torch_autocast", *MONITOR_SECTIONS):
        config.pop(key, None)
    if plan.stage:
        config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW where the optimizer is offloaded
    return config


def write_native(
    checkpoint: Checkpoint, model: Electra, recipe: Recipe, plan: DeepSpeedPlan, device: torch.device, folder: Path
) -> str:
    """Write `folder/TAG/…` and `folder/latest`, each rank its part; returns the tag.

    To be called by all ranks, as `native_engine` is.
    """
    tag = f"global_step{checkpoint.state['step']}"
    with native_engine(checkpoint, model, recipe, plan, device) as engine:
        engine.save_checkpoint(str(folder), tag=tag, client_state=_for_ds_to_universal(plan.stage))
    return tag


def _for_ds_to_universal(stage: int) -> dict[str, Any]:
    """Return what ds_to_universal needs at stages 1 and 2 and DeepSpeed leaves to the caller; it takes no stage 0."""
    if stage not in (1, 2):
        return {}
    return {UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}}


@contextmanager
def native_engine(
    checkpoint: Checkpoint, model: Electra, recipe: Recipe, plan: DeepSpeedPlan, device: torch.device
) -> Iterator[Any]:
    """DeepSpeed's engine with a checkpoint's state in it, closed at the end.

    model: its weights are of no account. Raises ConfigError if the device cannot run the plan's precision.
    """
    check_plan(plan, device, "the DeepSpeed JSON")
    model.to(device)
    optimizer = torch_adamw(model.named_parameters(), recipe.optimizer)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=native_config(plan), dist_init_required=False
    )
    try:
        step, counters = checkpoint.state["step"], checkpoint.state["optimizer"]
        if plan.stage:
            _fill_zero(engine, recipe, plan, checkpoint)
        else:
            _fill_whole(engine, recipe, checkpoint.tensors, counters)
        peak = recipe.optimizer.learning_rate
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, learning_rate=peak, **recipe.schedule.model_dump())
        engine.global_steps = step
        engine.global_samples = step * recipe.global_batch_size
        engine.skipped_steps = int(counters["skipped_steps"])
        yield engine
    finally:
        close_deepspeed(engine)


def _fill_zero(engine: Any, recipe: Recipe, plan: DeepSpeedPlan, checkpoint: Checkpoint) -> None:
    """Stages 1 to 3. The loss scaler, which is saved as an object, keeps its own rules rather than those of training
    here."""
    scaler = engine.optimizer.loss_scaler
    rules = {
        name: getattr(scaler, name) for name in ("scale_window", "raise_error_at_min_scale") if hasattr(scaler, name)
    }
    ours = ZeroAdamW(engine, recipe.optimizer, plan.precision.loss_scaling)
    ours.load(checkpoint.tensors, checkpoint.state["optimizer"])
    vars(scaler).pop("raise_error_at_min_scale", None)
    for name, value in rules.items():
        setattr(scaler, name, value)


@torch.no_grad()
def _fill_whole(
    engine: Any, recipe: Recipe, tensors: Mapping[str, torch.Tensor], counters: Mapping[str, float]
) -> None:
    """Stage 0: torch's AdamW alone in fp32; in half precision FP16_UnfusedOptimizer with fp32 masters around it."""
    wrapper = engine.optimizer if isinstance(engine.optimizer, FP16_UnfusedOptimizer) else None
    optimizer = engine.optimizer if wrapper is None else wrapper.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    parameters = [group["params"] for group in optimizer.param_groups] if wrapper is None else wrapper.fp16_groups
    for group, masters in zip(parameters, (group["params"] for group in optimizer.param_groups), strict=True):
        for parameter, master in zip(group, masters, strict=True):
            name = names[parameter]
            master.copy_(tensors[f"master/{name}"])
            parameter.copy_(master)
            state = adamw_state(
                master, bias_correction=recipe.optimizer.bias_correction, taken_steps=counters["taken_steps"]
            )
            for key in MOMENTS:
                state[key].copy_(tensors[f"{key}/{name}"])
            optimizer.state[master] = state
    if wrapper is not None and wrapper.loss_scale_config.dynamic_loss_scale and counters["is_scaled"]:
        scaling = wrapper.loss_scale_config
        scaling.cur_scale = counters["loss_scale"]
        scaling.cur_iter, scaling.last_overflow_iter = int(counters["good_steps"]), -1
