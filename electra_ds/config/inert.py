"""Keys of a DeepSpeed JSON that change nothing here: defaults, off switches, and keys of other ZeRO stages.

They are left out, and one note names them. A key is not inert if it would change the mathematics, or if a user would
expect an effect that it does not have. The defaults are those of DeepSpeed 0.19.8; a test compares them.
The tables come first; the functions that read them follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

TOP_DEFAULTS: dict[str, Any] = {
    "communication_data_type": None, "gradient_allreduce_op": "mean", "gradient_predivide_factor": 1.0,
    "managed_gradient_accumulation": True,
    "prescale_gradients": False, "seq_parallel_communication_data_type": "fp32", "sequence_parallel_size": 1,
    "use_data_before_expert_parallelism": False,
}  # fmt: skip
WITHOUT_EFFECT = (
    "aio", "allgather_size", "dataloader_drop_last", "disable_allgather", "vocabulary_size",
    "zero_force_ds_cpu_optimizer",
)  # fmt: skip
"""Top-level keys on which nothing depends here: files on NVMe, a buffer of ZeRO's oldest form, the last batch of
DeepSpeed's own loader (every batch is full here), a switch that DeepSpeed reads and does not use, a hint about speed,
and whose AdamW an offloaded optimizer is, which is torch's here."""
ZERO_DEFAULTS: dict[str, Any] = {
    "compute_grad_norm": True, "cpu_offload": None, "cpu_offload_param": None, "legacy_stage1": False,
    "override_module_apply": True, "parameter_alignment": False, "save_muon_momentum_buffer_in_memory": False,
    "stage3_gather_fp16_weights_on_model_save": False, "zenflow": None, "zero_hpz_partition_size": 1,
    "zero_quantized_gradients": False, "zero_quantized_nontrainable_weights": False, "zero_quantized_weights": False,
}  # fmt: skip
ZERO_WITHOUT_EFFECT = (
    "cpu_offload_use_pin_memory", "elastic_checkpoint", "load_from_fp32_weights", "pipeline_loading_checkpoint",
)  # fmt: skip
"""Such keys of `zero_optimization`: a switch that DeepSpeed no longer reads, and three about its own checkpoints. Our
checkpoints load at every stage and on any number of ranks."""
SECTION_DEFAULTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "data_types": {"keep_in_fp32_modules": ("auto",)},
    "pipeline": {
        "stages": ("auto", 1), "partition": ("best",), "activation_checkpoint_interval": (0,),
        "pipe_partitioned": (True,), "grad_partitioned": (True,),
    },
    "tensor_parallel": {"autotp_size": (0, 1), "vocab_parallel_ce_backend": ("torch",)},
}  # fmt: skip
"""Values in sections that are DeepSpeed's defaults, or mean what the defaults mean."""
SECTION_SWITCHES = {
    "autotuning": ("enabled",),
    "checkpoint": ("load_universal", "use_node_local_storage"),
    "comms_logger": ("enabled",),
    "compile": ("deepcompile", "enabled"),
    "hybrid_engine": ("enabled",),
}
"""Sections in which nothing has an effect unless one of these is on. None of them is on by default."""
REMOVED = (
    "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula",
    "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients",
)  # fmt: skip
"""Top-level keys of older versions that DeepSpeed 0.19 refuses, whatever they say."""
UNREAD = ("fp32_allreduce",)
"""Top-level keys of older versions that DeepSpeed 0.19 no longer reads and does not mention."""
ZERO_REMOVED: dict[str, Any] = {
    "mics_shard_size": -1, "mics_hierarchical_params_gather": False, "zeropp_loco_param": None,
}  # fmt: skip
"""Keys of `zero_optimization` that it refuses, with the values that switched them off."""
ZERO_UNREAD = {"cpu_offload_params": False, "legacy_stage1": False}
"""Keys of `zero_optimization` of older versions that no longer exist, or whose old implementation is gone."""


def is_off(value: Any) -> bool:
    """Return whether a section or a switch is off: false, null, left open, or an object in which nothing is enabled."""
    if isinstance(value, dict):
        switches = list(_switches(value))
        return all(map(is_off, switches or value.values()))
    return value is None or value is False or value == "auto"


def _switches(section: dict[str, Any]) -> Iterator[Any]:
    """Yield the values of `enabled` in a section and in the sections inside it."""
    for key, value in section.items():
        if key == "enabled":
            yield value
        elif isinstance(value, dict):
            yield from _switches(value)


def is_inert(key: str, value: Any) -> bool:
    """Return whether an unsupported top-level key only spells out DeepSpeed's default or an off switch."""
    if key in WITHOUT_EFFECT:
        return True
    if key in TOP_DEFAULTS:
        return value in (None, "auto", TOP_DEFAULTS[key])
    if key in SECTION_SWITCHES and isinstance(value, dict):
        return all(is_off(value.get(switch)) for switch in SECTION_SWITCHES[key])
    if key in SECTION_DEFAULTS and isinstance(value, dict):
        defaults = SECTION_DEFAULTS[key]
        return all(is_off(each) or each in defaults.get(name, ()) for name, each in value.items())
    return is_off(value)


def is_inert_in_zero(key: str, value: Any) -> bool:
    """Return the same for a key of `zero_optimization`."""
    if key in ZERO_WITHOUT_EFFECT:
        return value in (True, False, None, "auto")
    off = ZERO_DEFAULTS | ZERO_REMOVED | ZERO_UNREAD
    if key not in off:
        return False
    if type(value) is type(off[key]) and value == off[key]:  # true is no 1
        return True
    return off[key] is not True and is_off(value)


def is_offload(key: str, value: Any) -> bool:
    """Return whether a key asks for offloading. A user who asked for it must learn if a stage does not offload.

    If the device is left open, as in files that accelerate completes, it is DeepSpeed's default: none.
    """
    device = value.get("device", "none") if isinstance(value, dict) else value
    return key in ("offload_optimizer", "offload_param") and device not in ("none", "auto", None, False)
