"""The `zero_optimization` section of a DeepSpeed JSON."""

from __future__ import annotations

from typing import Any

from electra_ds.config.inert import ZERO_DEFAULTS, ZERO_REMOVED, ZERO_UNREAD, is_inert_in_zero, is_offload
from electra_ds.core.errors import did_you_mean

# Our own bucket sizes, in elements: DeepSpeed's 5e8 would be a gigabyte, more than the whole of a small model.
# 1e7 halves are the 20 MB that torch's DistributedDataParallel also gathers before it sends.
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
_FLAGS_3 = {
    "stage3_gather_16bit_weights_on_model_save", "stage3_use_all_reduce_for_fetch_params", "log_trace_cache_warnings",
    "stage3_allgather_sequential", "memory_efficient_linear", "enable_sanity_checks",
}  # fmt: skip
_SIZES_3 = {
    "sub_group_size": _COUNT, "stage3_max_live_parameters": _COUNT, "stage3_max_reuse_distance": _COUNT,
    "stage3_prefetch_bucket_size": _BUFFER, "stage3_param_persistence_threshold": _COUNT,
    "stage3_model_persistence_threshold": _COUNT, "stage3_module_granularity_threshold": _COUNT,
}  # fmt: skip
ZERO_KEYS = {"stage", "offload_optimizer", *_FLAGS, *_SIZES}
ZERO_3_KEYS = {"offload_param", *_FLAGS_3, *_SIZES_3}
OFFLOADS = ("offload_optimizer", "offload_param")
OF_DEEPSPEEDS_ADAM: dict[str, Any] = {"ratio": 1, "super_offload": False}
"""Keys of an offload section that work only with DeepSpeed's CPU Adam, with their defaults."""


def parse_zero(values: dict[str, Any], problems: list[str], notes: list[str], inert: list[str]) -> dict[str, Any]:
    """Return the zero_optimization section with every "auto" filled in and buffers of a size for small cards.

    Keys that change nothing are left out and added to `inert`; `notes` says which of them another stage would use.
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
        elif key in (*ZERO_REMOVED, *ZERO_UNREAD):
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
    for key, default in OF_DEEPSPEEDS_ADAM.items():
        if section.get(key, default) != default:
            problems.append(f"{place}.{key}: needs DeepSpeed's own Adam, and torch's AdamW runs here; remove the key")


def _check_type(key: str, value: Any, problems: list[str]) -> None:
    """Check the type at every stage: a value of the wrong type is a mistake even if the key has no effect."""
    if value in ("auto", None):
        return
    if key in _FLAGS | _FLAGS_3:
        if value not in (True, False):
            problems.append(f"zero_optimization.{key}: {value!r} is not true or false")
    elif key in _SIZES | _SIZES_3:
        allowed, in_words = (_SIZES | _SIZES_3)[key]
        if type(value) is not int or value not in allowed:
            problems.append(f"zero_optimization.{key}: {value!r} is not a whole number of elements {in_words}")


def without_auto(values: dict[str, Any]) -> dict[str, Any]:
    """Without the values that are left to DeepSpeed's defaults."""
    return {
        key: without_auto(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value != "auto"
    }
