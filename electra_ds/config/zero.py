"""The `zero_optimization` section of a DeepSpeed JSON."""

from __future__ import annotations

from typing import Any

from electra_ds.config.inert import ZERO_REMOVED, is_inert_in_zero, is_offload
from electra_ds.config.suggest import did_you_mean

# Our own bucket sizes, in elements: DeepSpeed's 5e8 would be a gigabyte, more than the whole of a small model.
# 1e7 halves are the 20 MB that torch's DistributedDataParallel also gathers before it sends.
_BUCKET = 10_000_000
_ZERO_DEFAULTS: dict[int, dict[str, int]] = {
    1: {"reduce_bucket_size": _BUCKET, "allgather_bucket_size": _BUCKET},
    2: {"reduce_bucket_size": _BUCKET, "allgather_bucket_size": _BUCKET},
    3: {"reduce_bucket_size": _BUCKET, "stage3_prefetch_bucket_size": _BUCKET},
}
ZERO_KEYS = {
    "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions",
    "allgather_bucket_size", "overlap_comm", "offload_optimizer", "round_robin_gradients",
    "use_multi_rank_bucket_allreduce", "ignore_unused_parameters",
}  # fmt: skip
ZERO_3_KEYS = {
    "offload_param", "sub_group_size", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
    "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
    "stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params", "log_trace_cache_warnings",
    "stage3_allgather_sequential", "gather_16bit_weights_on_model_save",
}  # fmt: skip


def parse_zero(values: dict[str, Any], problems: list[str], inert: list[str]) -> dict[str, Any]:
    """Return the zero_optimization section with every "auto" filled in and buffers of a size for small cards.

    Keys that change nothing are left out and added to `inert`.
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
    for key, value in section.items():
        if key in ZERO_KEYS | ZERO_3_KEYS:
            if key not in known and is_offload(key, value):
                problems.append(f"zero_optimization.{key}: DeepSpeed does not offload at stage {stage}; remove it")
            elif key not in known:
                inert.append(f"zero_optimization.{key} (at stage {stage})")
        elif is_inert_in_zero(key, value):
            inert.append(f"zero_optimization.{key}")
        elif key in ZERO_REMOVED:
            problems.append(f"zero_optimization.{key}: DeepSpeed 0.19 no longer has this feature; remove the key")
        else:
            problems.append(f"zero_optimization.{key}: not supported here{did_you_mean(key, known)}")
    section = {key: value for key, value in section.items() if key in known}
    for key in _ZERO_DEFAULTS.get(stage, {}):
        size = section.get(key, "auto")
        if size != "auto" and (isinstance(size, bool) or not isinstance(size, (int, float)) or not 1 <= size < 1e15):
            problems.append(f"zero_optimization.{key}: {size!r} is not a positive number of elements")
    if section.get("overlap_comm", "auto") not in ("auto", True, False):
        problems.append(f"zero_optimization.overlap_comm: {section['overlap_comm']!r} is not true or false")
    result = {"stage": stage} | _ZERO_DEFAULTS.get(stage, {}) | without_auto(section)
    for name in ("offload_optimizer", "offload_param"):
        if name in result:
            _check_offload(name, result, problems)
    return result


def _check_offload(name: str, zero: dict[str, Any], problems: list[str]) -> None:
    section = zero[name]
    device = section.get("device", "none") if isinstance(section, dict) else section
    if device not in ("cpu", "none", None):
        problems.append(f'zero_optimization.{name}.device: {device!r} is not supported here; "cpu" and "none" are')
    elif device != "cpu":
        del zero[name]


def without_auto(values: dict[str, Any]) -> dict[str, Any]:
    """Without the values that are left to DeepSpeed's defaults."""
    return {
        key: without_auto(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value != "auto"
    }
