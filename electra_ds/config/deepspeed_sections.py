"""The sections of a DeepSpeed JSON about precision, ZeRO and activation checkpointing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from electra_ds.config.deepspeed_keys import UNUSED_IN_ZERO, Findings, Unused
from electra_ds.core.errors import did_you_mean

# Precision

PRECISION_KEYS = {
    "fp16": {
        "enabled", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis",
        "min_loss_scale",
    },
    "bf16": {"enabled"},
    "torch_autocast": {"enabled", "dtype"},
}  # fmt: skip
UNUSED_IN_PRECISION: dict[str, Any] = {
    "auto_cast": False, "fp16_master_weights_and_grads": False, "check_grad_overflow": True,
    "immediate_grad_update": False, "bf16_master_weights_and_grads": False, "bf16_optimizer_states": False,
    "lower_precision_safe_modules": None,
}  # fmt: skip
"""Unsupported keys with DeepSpeed's defaults, which are accepted."""


@dataclass(frozen=True)
class LossScaling:
    """Settings of loss scaling, with DeepSpeed's names and defaults."""

    initial_scale: float = 2.0**16
    is_dynamic: bool = True
    window: int = 1000
    """Steps without overflow after which the scale doubles."""
    hysteresis: int = 2
    """Number of overflows after which the scale is halved."""
    consecutive_hysteresis: bool = False
    """True if a good step restores the hysteresis."""
    min_scale: float = 1.0


@dataclass(frozen=True)
class Precision:
    """`fp16` and `bf16`: half weights with fp32 masters. `autocast-…`: torch.autocast over fp32 weights."""

    name: Literal["fp32", "bf16", "fp16", "autocast-bf16", "autocast-fp16"]
    loss_scaling: LossScaling | None = None


class _Fp16(BaseModel):
    """The numbers of an fp16 section; a loss_scale of 0 is dynamic."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    loss_scale: float = Field(default=0, ge=0, le=2.0**100)
    initial_scale_power: int = Field(default=16, ge=0, le=100)
    loss_scale_window: int = Field(default=1000, ge=1)
    hysteresis: int = Field(default=2, ge=1)
    consecutive_hysteresis: bool = False
    min_loss_scale: float = Field(default=1.0, ge=2.0**-24, le=2.0**100)


def precision_section(name: str) -> dict[str, Any]:
    """Return the part of a DeepSpeed JSON that selects bf16 or fp16; it is empty for fp32."""
    return {} if name == "fp32" else {name: {"enabled": True}}


def parse_precision(values: dict[str, Any], stage: int, auto_fp16: bool, found: Findings) -> Precision | None:
    """Return the enabled precision, or None after an error."""
    before = len(found.problems)
    sections = {}
    for name in PRECISION_KEYS:
        if isinstance(values.get(name, {}), dict):
            sections[name] = values.get(name, {})
        else:
            found.problems.append(f'{name}: must be an object such as {{"enabled": true}}')
    # In transformers "auto" leaves the choice to the user, so an explicitly enabled precision takes precedence.
    is_chosen = any(section.get("enabled") is True for section in sections.values())
    enabled: list[str] = []
    for name, section in sections.items():
        on = section.get("enabled", False)
        of_loss_scale = tuple(PRECISION_KEYS["fp16"]) if name == "bf16" else ()
        unused = Unused(UNUSED_IN_PRECISION, without_effect=of_loss_scale, removed={})
        for key, value in section.items():
            if key not in PRECISION_KEYS[name] and section.get("enabled") is not False:
                unused.check(f"{name}.{key}", key, value, PRECISION_KEYS[name], found)
        if on == "auto":
            on = name == "fp16" and auto_fp16 and not is_chosen
            meant = "on" if on else "off, since another precision is chosen" if is_chosen else "off"
            found.notes.append(f'{name}.enabled is "auto", which here means {meant}')
        if not isinstance(on, bool):
            found.problems.append(f'{name}.enabled: {on!r} is not true, false or "auto"')
        elif on:
            enabled.append(name)
    if len(enabled) > 1:
        found.problems.append(f"{', '.join(enabled)}: only one precision can be enabled")
    if len(found.problems) > before:
        return None
    if not enabled:
        return Precision("fp32")
    section = sections[enabled[0]]
    if enabled[0] == "bf16":
        return Precision("bf16")
    if enabled[0] == "torch_autocast":
        return _autocast_precision(section, stage, found)
    return Precision("fp16", _loss_scaling(section, found))


def _autocast_precision(section: dict[str, Any], stage: int, found: Findings) -> Precision | None:
    dtype = str(section.get("dtype", "bfloat16")).removeprefix("torch.")
    if dtype in ("bfloat16", "bf16"):
        return Precision("autocast-bf16")
    if dtype in ("float16", "fp16", "half"):
        if stage:
            found.problems.append(
                f"torch_autocast: float16 has no working loss scale at stage {stage}; use fp16 or bfloat16"
            )
        return Precision("autocast-fp16", LossScaling())
    found.problems.append(f"torch_autocast.dtype: {section['dtype']!r} is not bfloat16 or float16")
    return None


def _loss_scaling(section: dict[str, Any], found: Findings) -> LossScaling | None:
    try:
        given = _Fp16.model_validate(without_auto(section))
    except pydantic.ValidationError as error:
        found.problems += [f"fp16.{each['loc'][0]}: {each['input']!r}: {each['msg']}" for each in error.errors()]
        return None
    return LossScaling(
        initial_scale=given.loss_scale or 2.0**given.initial_scale_power,
        is_dynamic=not given.loss_scale,
        window=given.loss_scale_window,
        hysteresis=given.hysteresis,
        consecutive_hysteresis=given.consecutive_hysteresis,
        min_scale=given.min_loss_scale,
    )


# ZeRO

# Default bucket sizes, in elements. DeepSpeed's 5e8 would be a gigabyte, more than an entire small model.
# 1e7 half-precision elements are 20 MB, close to the bucket size of torch's DistributedDataParallel.
_BUCKET = 10_000_000
_ZERO_DEFAULTS: dict[int, dict[str, int]] = {
    1: {"reduce_bucket_size": _BUCKET, "allgather_bucket_size": _BUCKET},
    2: {"reduce_bucket_size": _BUCKET, "allgather_bucket_size": _BUCKET},
    3: {"reduce_bucket_size": _BUCKET, "stage3_prefetch_bucket_size": _BUCKET},
}
OFFLOADS = ("offload_optimizer", "offload_param")
_FLAGS = {
    "contiguous_gradients", "reduce_scatter", "allgather_partitions", "overlap_comm", "round_robin_gradients",
    "use_multi_rank_bucket_allreduce", "ignore_unused_parameters",
}  # fmt: skip
_SIZES = {"reduce_bucket_size", "allgather_bucket_size"}
_STAGE_3_FLAGS = {
    "stage3_gather_16bit_weights_on_model_save", "stage3_use_all_reduce_for_fetch_params", "log_trace_cache_warnings",
    "stage3_allgather_sequential", "memory_efficient_linear", "enable_sanity_checks",
}  # fmt: skip
_STAGE_3_SIZES = {
    "sub_group_size", "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_module_granularity_threshold",
}  # fmt: skip
ZERO_KEYS = {"stage", "offload_optimizer", *_FLAGS, *_SIZES}
ZERO_3_KEYS = {"offload_param", *_STAGE_3_FLAGS, *_STAGE_3_SIZES}
CPU_ADAM_DEFAULTS: dict[str, Any] = {"ratio": 1, "super_offload": False}
"""Keys of an offload section that work only with DeepSpeed's CPU Adam, with their defaults."""


def parse_zero(values: dict[str, Any], found: Findings) -> dict[str, Any]:
    """Return the zero_optimization section without "auto" values, and with buffer sizes that suit small cards."""
    section = values.get("zero_optimization", {})
    if not isinstance(section, dict):
        found.problems.append("zero_optimization: must be an object")
        return {"stage": 0}
    stage = section.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        found.problems.append(f"zero_optimization.stage: {stage!r} is not one of 0, 1, 2, 3; write the stage")
        return {"stage": 0}
    known = {0: {"stage"}, 1: ZERO_KEYS, 2: ZERO_KEYS, 3: ZERO_KEYS | ZERO_3_KEYS}[stage]
    result: dict[str, Any] = {"stage": stage} | _ZERO_DEFAULTS.get(stage, {})
    of_other_stages = []
    given = {}
    for key, value in section.items():
        if f"stage3_{key}" in ZERO_3_KEYS:  # DeepSpeed also accepts these names without stage3_
            key = f"stage3_{key}"
        name = f"zero_optimization.{key}"
        if key in OFFLOADS and not _is_offload(value):
            if key in known:
                found.inert.append(name)
            else:
                of_other_stages.append(key)
        elif key in OFFLOADS and key not in known:
            found.problems.append(f"{name}: DeepSpeed does not offload at stage {stage}; remove it")
        elif key in OFFLOADS:
            given[key] = value
            if not isinstance(value, dict) or value["device"] != "cpu" or not _is_without_cpu_adam(value):
                found.problems.append(
                    f'{name}: {value!r} is not supported here; write {{"device": "cpu"}}, without keys of DeepSpeed\'s '
                    f"own Adam ({', '.join(CPU_ADAM_DEFAULTS)})"
                )
        elif key not in ZERO_KEYS | ZERO_3_KEYS:
            UNUSED_IN_ZERO.check(name, key, value, known, found)
        elif key not in known:
            of_other_stages.append(key)
        elif value is not None:
            given[key] = value
            is_size = key in {"stage", *_SIZES, *_STAGE_3_SIZES}
            is_valid = type(value) is int if is_size else isinstance(value, int) and value in (0, 1)
            if value != "auto" and not is_valid:
                found.problems.append(f"{name}: {value!r} is not {'a whole number' if is_size else 'true or false'}")
    if of_other_stages:
        found.notes.append(
            f"at stage {stage} these keys of zero_optimization have no effect: {', '.join(of_other_stages)}"
        )
    return result | without_auto(given)


def _is_offload(value: Any) -> bool:
    """Return whether the value of an offload key asks for offloading.

    An absent device, or "auto" as in files that accelerate fills in, means DeepSpeed's default: none.
    """
    device = value.get("device", "none") if isinstance(value, dict) else value
    return device not in ("none", "auto", None, False)


def _is_without_cpu_adam(section: dict[str, Any]) -> bool:
    return all(section.get(key, default) == default for key, default in CPU_ADAM_DEFAULTS.items())


def without_auto(values: dict[str, Any]) -> dict[str, Any]:
    """Return the mapping without the values "auto", which leave a key to DeepSpeed's default."""
    return {
        key: without_auto(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value != "auto"
    }


# Activation checkpointing. The model uses torch's, not `deepspeed.checkpointing`, so only the number of layers matters
# here, and the switches of DeepSpeed's implementation do not.

_LAYERS = "number_checkpoints"
_FOR_MODEL_PARALLELISM = ("partition_activations", "contiguous_memory_optimization")
"""DeepSpeed ignores these without model parallelism."""
_SWITCHES = (*_FOR_MODEL_PARALLELISM, "cpu_checkpointing", "synchronize_checkpoint_boundary", "profile")


def parse_activations(values: dict[str, Any], num_layers: int, found: Findings) -> int:
    """Return how many layers of each encoder the backward pass recomputes.

    Return 0 without the section or if everything in it is off, and all layers if it has no number. num_layers: the
    discriminator's number of layers, which is at least the generator's.
    """
    name = "activation_checkpointing"
    if name not in values:
        return 0
    section = {} if values[name] == "auto" else values[name]
    if not isinstance(section, dict):
        found.problems.append(f'{name}: must be an object such as {{"{_LAYERS}": {num_layers}}}')
        return 0
    for key, value in section.items():
        if key not in (_LAYERS, *_SWITCHES):
            found.problems.append(f"{name}.{key}: unknown key{did_you_mean(key, (_LAYERS, *_SWITCHES))}")
        elif key in _FOR_MODEL_PARALLELISM and value is True:
            found.notes.append(f"{name}.{key} has no effect, since no model is split over ranks here")
        elif key in _SWITCHES and value not in (False, None, "auto"):
            found.problems.append(f"{name}.{key}: is not supported here; remove it")
    count = section.get(_LAYERS)
    if count == 0 or (section and all(value in (None, False) for value in section.values())):
        found.notes.append(f"{name} is off, so the backward pass recomputes no layer")
        return 0
    if count in (None, "auto"):  # null is DeepSpeed's own default
        found.notes.append(f"{name} sets no number, so the backward pass recomputes all {num_layers} layers")
        return num_layers
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        found.problems.append(f"{name}.{_LAYERS}: {count!r} is not a positive whole number")
        return 0
    if count > num_layers:
        found.notes.append(f"{name}.{_LAYERS} is {count}, which is treated as all of the recipe's {num_layers}")
    return min(count, num_layers)
