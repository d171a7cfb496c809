"""The sections of a DeepSpeed JSON about precision, ZeRO and activation checkpointing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from electra_ds.config.deepspeed_keys import ZERO_DEFAULTS, ZERO_IGNORED, ZERO_REMOVED, is_inert_in_zero, is_offload
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
_WITHOUT_EFFECT: dict[str, Any] = {
    "auto_cast": False, "fp16_master_weights_and_grads": False, "check_grad_overflow": True,
    "immediate_grad_update": False, "bf16_master_weights_and_grads": False, "bf16_optimizer_states": False,
    "lower_precision_safe_modules": None,
}  # fmt: skip
"""Keys that are not supported, with DeepSpeed's defaults, which may be spelled out."""


@dataclass(frozen=True)
class LossScaling:
    """Settings of dynamic loss scaling, with DeepSpeed's names and defaults."""

    initial_scale: float = 2.0**16
    is_dynamic: bool = True
    window: int = 1000
    """Steps without overflow after which the scale doubles."""
    hysteresis: int = 2
    """Number of overflows after which the scale is halved."""
    consecutive_hysteresis: bool = False
    """Whether a good step restores the hysteresis."""
    min_scale: float = 1.0


@dataclass(frozen=True)
class Precision:
    """`fp16` and `bf16`: half weights with fp32 masters. `autocast-…`: torch.autocast over fp32 weights."""

    name: Literal["fp32", "bf16", "fp16", "autocast-bf16", "autocast-fp16"]
    loss_scaling: LossScaling | None = None


def precision_section(name: str) -> dict[str, Any]:
    """Return the part of a DeepSpeed JSON that selects bf16 or fp16; it is empty for fp32."""
    return {} if name == "fp32" else {name: {"enabled": True}}


def parse_precision(
    values: dict[str, Any], stage: int, auto_fp16: bool, problems: list[str], notes: list[str]
) -> Precision | None:
    """Return the enabled precision. Errors are added to `problems`, and decisions that were made here to `notes`."""
    enabled: list[str] = []
    without_scale: list[str] = []
    before = len(problems)
    for name, known in PRECISION_KEYS.items():
        section = values.get(name, {})
        if not isinstance(section, dict):
            problems.append(f'{name}: must be an object such as {{"enabled": true}}')
            continue
        is_on = section.get("enabled", False) is not False
        for key in section:
            if key in _WITHOUT_EFFECT:
                if is_on and section[key] not in ("auto", None, _WITHOUT_EFFECT[key]):
                    problems.append(f"{name}.{key}: is not supported here; remove it")
            elif name == "bf16" and key in PRECISION_KEYS["fp16"] - known:
                without_scale += [f"bf16.{key}"] if section.get("enabled") is True else []
            elif key not in known:
                problems.append(f"{name}.{key}: unknown key{did_you_mean(key, known)}")
        on = section.get("enabled", False)
        if on == "auto":
            on = name == "fp16" and auto_fp16 and not _is_precision_chosen(values)
            meant = "on" if on else "off, since another precision is chosen" if _is_precision_chosen(values) else "off"
            notes.append(f'{name}.enabled is "auto", which here means {meant}')
        if not isinstance(on, bool):
            problems.append(f'{name}.enabled: {on!r} is not true, false or "auto"')
        elif on:
            enabled.append(name)
    if without_scale:
        notes.append(f"bf16 has no loss scale, so these are left out: {', '.join(without_scale)}")
    if len(enabled) > 1:
        problems.append(f"{', '.join(enabled)}: only one precision can be enabled")
    if len(problems) > before:
        return None
    if not enabled:
        return Precision("fp32")
    section = values[enabled[0]]
    if enabled[0] == "bf16":
        return Precision("bf16")
    if enabled[0] == "torch_autocast":
        return _autocast_precision(section, stage, problems)
    return Precision("fp16", _loss_scaling(section, problems))


def _is_precision_chosen(values: dict[str, Any]) -> bool:
    """Return whether a precision is switched on explicitly; "auto" is transformers' "as the user says"."""
    sections = (values.get(name) for name in PRECISION_KEYS)
    return any(isinstance(section, dict) and section.get("enabled") is True for section in sections)


def _autocast_precision(section: dict[str, Any], stage: int, problems: list[str]) -> Precision | None:
    dtype = str(section.get("dtype", "bfloat16")).removeprefix("torch.")
    if dtype in ("bfloat16", "bf16"):
        return Precision("autocast-bf16")
    if dtype in ("float16", "fp16", "half"):
        if stage:
            problems.append(
                f"torch_autocast: float16 has no working loss scale at stage {stage}; take fp16 or bfloat16"
            )
        return Precision("autocast-fp16", LossScaling())
    problems.append(f"torch_autocast.dtype: {section['dtype']!r} is not bfloat16 or float16")
    return None


def _loss_scaling(section: dict[str, Any], problems: list[str]) -> LossScaling:
    defaults = LossScaling()

    def number(key: str, default: float, lowest: float, highest: float, *, whole: bool) -> float:
        value = section.get(key, default)
        if value == "auto":
            return default
        kinds = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not lowest <= value <= highest:
            kind = "whole number" if whole else "number"
            problems.append(f"fp16.{key}: {value!r} is not a {kind} from {lowest:g} to {highest:g}")
            return default
        return value

    consecutive = section.get("consecutive_hysteresis", False)
    if not isinstance(consecutive, bool):
        problems.append(f"fp16.consecutive_hysteresis: {consecutive!r} is not true or false")
        consecutive = False
    static = number("loss_scale", 0, 0, 2.0**100, whole=False)
    return LossScaling(
        initial_scale=static or 2.0 ** number("initial_scale_power", 16, 0, 100, whole=True),
        is_dynamic=not static,
        window=int(number("loss_scale_window", defaults.window, 1, 1e9, whole=True)),
        hysteresis=int(number("hysteresis", defaults.hysteresis, 1, 1e9, whole=True)),
        consecutive_hysteresis=consecutive,
        min_scale=number("min_loss_scale", defaults.min_scale, 2.0**-24, 2.0**100, whole=False),
    )


# ZeRO

# Default bucket sizes, in elements. DeepSpeed's 5e8 would be a gigabyte, more than a complete small model.
# 1e7 halves are 20 MB, about as much as torch's DistributedDataParallel gathers before it sends.
_BUCKET = 10_000_000
_ZERO_DEFAULTS: dict[int, dict[str, int]] = {
    1: {"reduce_bucket_size": _BUCKET, "allgather_bucket_size": _BUCKET},
    2: {"reduce_bucket_size": _BUCKET, "allgather_bucket_size": _BUCKET},
    3: {"reduce_bucket_size": _BUCKET, "stage3_prefetch_bucket_size": _BUCKET},
}
_FLAGS = {
    "contiguous_gradients", "reduce_scatter", "allgather_partitions", "overlap_comm", "round_robin_gradients",
    "use_multi_rank_bucket_allreduce", "ignore_unused_parameters",
}  # fmt: skip
_BUFFER, _COUNT = (range(1, 10**15 + 1), "from 1 to 1e15"), (range(2**63), "from 0 on")
_SIZES = {"reduce_bucket_size": _BUFFER, "allgather_bucket_size": _BUFFER}
"""Sizes in elements, with the values that they may have."""
_STAGE_3_FLAGS = {
    "stage3_gather_16bit_weights_on_model_save", "stage3_use_all_reduce_for_fetch_params", "log_trace_cache_warnings",
    "stage3_allgather_sequential", "memory_efficient_linear", "enable_sanity_checks",
}  # fmt: skip
_STAGE_3_SIZES = {
    "sub_group_size": _COUNT, "stage3_max_live_parameters": _COUNT, "stage3_max_reuse_distance": _COUNT,
    "stage3_prefetch_bucket_size": _BUFFER, "stage3_param_persistence_threshold": _COUNT,
    "stage3_model_persistence_threshold": _COUNT, "stage3_module_granularity_threshold": _COUNT,
}  # fmt: skip
ZERO_KEYS = {"stage", "offload_optimizer", *_FLAGS, *_SIZES}
ZERO_3_KEYS = {"offload_param", *_STAGE_3_FLAGS, *_STAGE_3_SIZES}
OFFLOADS = ("offload_optimizer", "offload_param")
CPU_ADAM_DEFAULTS: dict[str, Any] = {"ratio": 1, "super_offload": False}
"""Keys of an offload section that work only with DeepSpeed's CPU Adam, with their defaults."""


def parse_zero(values: dict[str, Any], problems: list[str], notes: list[str], inert: list[str]) -> dict[str, Any]:
    """Return the zero_optimization section with every "auto" filled in and buffer sizes that suit small cards.

    Keys that change nothing are left out and added to `inert`; keys that only other stages use are added to `notes`.
    """
    section = values.get("zero_optimization", {})
    if not isinstance(section, dict):
        problems.append("zero_optimization: must be an object")
        return {"stage": 0}
    stage = section.get("stage", 0)
    if stage == "auto":
        problems.append('zero_optimization.stage: "auto" says nothing (DeepSpeed would take 0); write the stage')
    elif stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        problems.append(f"zero_optimization.stage: {stage!r} is not one of 0, 1, 2, 3")
    if stage not in (0, 1, 2, 3):
        return {"stage": 0}
    known = {0: {"stage"}, 1: ZERO_KEYS, 2: ZERO_KEYS, 3: ZERO_KEYS | ZERO_3_KEYS}[stage]
    result: dict[str, Any] = {"stage": stage} | _ZERO_DEFAULTS.get(stage, {})
    of_other_stages = []
    for key, value in section.items():
        _check_type(key, value, problems)
        if key in known and (key not in OFFLOADS or is_offload(key, value)):
            result |= without_auto({key: value}) if value is not None else {}
        elif is_offload(key, value):
            problems.append(f"zero_optimization.{key}: DeepSpeed does not offload at stage {stage}; remove it")
        elif key in (ZERO_KEYS | ZERO_3_KEYS) - known:
            of_other_stages.append(key)
        elif key in OFFLOADS or is_inert_in_zero(key, value):
            is_open = isinstance(value, dict) and value.get("device") == "auto"
            inert.append(f"zero_optimization.{key}" + (' (its device is "auto", which means none)' if is_open else ""))
        elif key in (*ZERO_REMOVED, *ZERO_IGNORED):
            problems.append(f"zero_optimization.{key}: DeepSpeed 0.19 no longer has this feature; remove the key")
        elif key in ZERO_DEFAULTS:
            problems.append(f"zero_optimization.{key}: not supported here; remove the key")
        else:
            problems.append(f"zero_optimization.{key}: not supported here{did_you_mean(key, known)}")
    if of_other_stages:
        notes.append(f"at stage {stage} these keys of zero_optimization have no effect: {', '.join(of_other_stages)}")
    for name in OFFLOADS:
        if name in result:
            _check_offload(f"zero_optimization.{name}", result[name], problems)
    return result


def _check_offload(place: str, section: Any, problems: list[str]) -> None:
    if not isinstance(section, dict):
        problems.append(f'{place}: must be an object such as {{"device": "cpu"}}')
        return
    if section["device"] != "cpu":
        problems.append(f'{place}.device: {section["device"]!r} is not supported here; "cpu" and "none" are')
    for key, default in CPU_ADAM_DEFAULTS.items():
        if section.get(key, default) != default:
            problems.append(f"{place}.{key}: needs DeepSpeed's own Adam, and torch's AdamW runs here; remove the key")


def _check_type(key: str, value: Any, problems: list[str]) -> None:
    """Check a value's type at every stage: a wrong type is a mistake even if the key has no effect."""
    if value in ("auto", None):
        return
    if key in _FLAGS | _STAGE_3_FLAGS:
        if value not in (True, False):
            problems.append(f"zero_optimization.{key}: {value!r} is not true or false")
    elif key in _SIZES | _STAGE_3_SIZES:
        allowed, in_words = (_SIZES | _STAGE_3_SIZES)[key]
        if type(value) is not int or value not in allowed:
            problems.append(f"zero_optimization.{key}: {value!r} is not a whole number of elements {in_words}")


def without_auto(values: dict[str, Any]) -> dict[str, Any]:
    """Return the mapping without the values "auto", which leave a key to DeepSpeed's default."""
    return {
        key: without_auto(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value != "auto"
    }


# Activation checkpointing. The model calls torch's, not `deepspeed.checkpointing`, so only the number of layers has a
# meaning here, and the switches of DeepSpeed's implementation have none.

_LAYERS = "number_checkpoints"
_FOR_MODEL_PARALLELISM = ("partition_activations", "contiguous_memory_optimization")
"""DeepSpeed ignores these without model parallelism."""
_SWITCHES = (*_FOR_MODEL_PARALLELISM, "cpu_checkpointing", "synchronize_checkpoint_boundary", "profile")


def parse_activations(values: dict[str, Any], num_layers: int, problems: list[str], notes: list[str]) -> int:
    """Return how many layers of each encoder are computed again in the backward pass.

    0 without the section or if everything in it is off; all layers if it has no number. Errors are added to
    `problems`, and decisions that were made here to `notes`. num_layers: the discriminator's number of layers, which
    is at least the generator's.
    """
    name = "activation_checkpointing"
    section = values.get(name)
    if name not in values:
        return 0
    if section == "auto":
        section = {}
    if not isinstance(section, dict):
        problems.append(f'{name}: must be an object such as {{"{_LAYERS}": {num_layers}}}')
        return 0
    _check_switches(name, section, problems, notes)
    count = section.get(_LAYERS)
    if count == 0 or (section and all(value in (None, False) for value in section.values())):
        notes.append(f"{name} is off, so no layer is computed again in the backward pass")
        return 0
    if count in (None, "auto"):  # null is DeepSpeed's own default
        notes.append(f"{name} names no number, so all {num_layers} layers are computed again in the backward pass")
        return num_layers
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        problems.append(
            f"{name}.{_LAYERS}: {count!r} is not a positive whole number; to compute no layer again, remove the section"
        )
        return 0
    if count > num_layers:
        notes.append(f"{name}.{_LAYERS} is {count}, which means all of the recipe's {num_layers}")
    return min(count, num_layers)


def _check_switches(name: str, section: dict[str, Any], problems: list[str], notes: list[str]) -> None:
    for key, value in section.items():
        if key not in (_LAYERS, *_SWITCHES):
            problems.append(f"{name}.{key}: unknown key{did_you_mean(key, (_LAYERS, *_SWITCHES))}")
        elif key in _SWITCHES and value not in (True, False, None, "auto"):
            problems.append(f"{name}.{key}: {value!r} is not true or false")
        elif key in _FOR_MODEL_PARALLELISM and value is True:
            notes.append(f"{name}.{key} has no effect, since no model is split over ranks here")
        elif key in _SWITCHES and value is True:
            problems.append(f"{name}.{key}: is not supported here; remove it")
