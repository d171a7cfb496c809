"""Keys of a DeepSpeed JSON that change nothing here: defaults, off switches, and keys of other ZeRO stages.

They are left out, and one note names them. A key is not inert if it would change the mathematics, or if a user would
expect an effect that it does not have. The defaults are those of DeepSpeed 0.19.8; a test compares them.
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
    """Return whether a section or a switch is off: false, null, or an object in which nothing is enabled."""
    if isinstance(value, dict):
        if "enabled" in value:
            nested = [each for each in value.values() if isinstance(each, dict)]
            return not value["enabled"] and all(map(is_off, nested))
        return all(map(is_off, value.values()))
    return value is None or value is False


def is_inert(key: str, value: Any) -> bool:
    """Return whether an unsupported top-level key only spells out DeepSpeed's default or an off switch."""
    if key == "checkpoint":  # checkpoints here are our own
        asked = ("load_universal", "use_node_local_storage")
        return isinstance(value, dict) and not any(value.get(each, False) for each in asked)
    if key == "tensor_parallel" and isinstance(value, dict):
        return value.get("autotp_size", 0) in (0, 1)
    if key in TOP_DEFAULTS:
        return value in (None, "auto", TOP_DEFAULTS[key])
    return key == _ONLY_FOR_NVME or value == "auto" or is_off(value)


def is_inert_in_zero(key: str, value: Any) -> bool:
    """Return the same for a key of `zero_optimization`."""
    off = ZERO_DEFAULTS | ZERO_REMOVED
    if key not in off:
        return False
    if type(value) is type(off[key]) and value == off[key]:  # true is no 1
        return True
    return off[key] is not True and (value == "auto" or is_off(value))


def is_offload(key: str, value: Any) -> bool:
    """Return whether a key asks for offloading. A user who asked for it must be told where a stage has none."""
    device = value.get("device", "none") if isinstance(value, dict) else value
    return key in ("offload_optimizer", "offload_param") and device not in ("none", None)
