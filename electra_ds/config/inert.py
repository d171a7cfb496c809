"""What a DeepSpeed JSON may spell out although it changes nothing here: defaults, off switches, keys of other stages.

Such keys are left out, and one note names them. What would change the mathematics, or what a user would expect to
have an effect that it has not, is not inert. The defaults are those of DeepSpeed 0.19.8; a test compares them.
"""

from __future__ import annotations

from typing import Any

TOP_DEFAULTS: dict[str, Any] = {
    "communication_data_type": None, "dataloader_drop_last": False, "disable_allgather": False,
    "gradient_allreduce_op": "mean", "gradient_predivide_factor": 1.0, "managed_gradient_accumulation": True,
    "prescale_gradients": False, "seq_parallel_communication_data_type": "fp32",
    "use_data_before_expert_parallelism": False,
}  # fmt: skip
ZERO_DEFAULTS: dict[str, Any] = {
    "compute_grad_norm": True, "cpu_offload": None, "cpu_offload_param": None, "cpu_offload_use_pin_memory": None,
    "elastic_checkpoint": False, "enable_sanity_checks": False, "legacy_stage1": False, "load_from_fp32_weights": True,
    "memory_efficient_linear": True, "override_module_apply": True, "parameter_alignment": False,
    "pipeline_loading_checkpoint": False, "save_muon_momentum_buffer_in_memory": False, "zenflow": None,
    "zero_hpz_partition_size": 1, "zero_quantized_gradients": False, "zero_quantized_nontrainable_weights": False,
    "zero_quantized_weights": False,
}  # fmt: skip
REMOVED = (
    "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula",
    "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients",
)  # fmt: skip
"""Top-level keys of older versions that DeepSpeed 0.19 refuses, whatever they say."""
ZERO_REMOVED: dict[str, Any] = {
    "mics_shard_size": -1, "mics_hierarchical_params_gather": False, "zeropp_loco_param": None,
}  # fmt: skip
"""The same in `zero_optimization`, with the values that switched them off."""
_ONLY_FOR_NVME = "aio"


def is_off(value: Any) -> bool:
    """Whether a section or a switch is spelled out to be off: false, null, or an object in which nothing is enabled."""
    if isinstance(value, dict):
        if "enabled" in value:
            nested = [each for each in value.values() if isinstance(each, dict)]
            return not value["enabled"] and all(map(is_off, nested))
        return all(map(is_off, value.values()))
    return value is None or value is False


def is_inert(key: str, value: Any) -> bool:
    """Whether a top-level key that is not supported here says no more than DeepSpeed's default or an off switch."""
    if key == "checkpoint":  # checkpoints here are our own
        asked = ("load_universal", "use_node_local_storage")
        return isinstance(value, dict) and not any(value.get(each, False) for each in asked)
    if key == "tensor_parallel" and isinstance(value, dict):
        return value.get("autotp_size", 0) in (0, 1)
    if key in TOP_DEFAULTS:
        return value in (None, "auto", TOP_DEFAULTS[key])
    return key == _ONLY_FOR_NVME or value == "auto" or is_off(value)


def is_inert_in_zero(key: str, value: Any) -> bool:
    """The same of a key in `zero_optimization`."""
    if key in ZERO_REMOVED and value == ZERO_REMOVED[key]:
        return True
    if key in ZERO_DEFAULTS and type(value) is type(ZERO_DEFAULTS[key]) and value == ZERO_DEFAULTS[key]:
        return True
    if key in ZERO_DEFAULTS and ZERO_DEFAULTS[key] is True:
        return False
    return key in (*ZERO_DEFAULTS, *ZERO_REMOVED) and (value == "auto" or is_off(value))


def is_offload(key: str, value: Any) -> bool:
    """Whether a key asks for offloading, which a user would miss where a stage has none."""
    device = value.get("device", "none") if isinstance(value, dict) else value
    return key in ("offload_optimizer", "offload_param") and device not in ("none", None)
