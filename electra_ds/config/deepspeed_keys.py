"""The keys of a DeepSpeed JSON: which of them the recipe owns, which are passed through, which have no effect.

- Keys of the recipe (batch, clipping, optimizer, schedule) may be absent or "auto"; a value must be the recipe's.
- Keys about DeepSpeed's reports and process are passed through to it.
- Keys that change nothing here are left out, and one note names them: defaults, off switches, keys of other ZeRO
  stages. A key does change something if a user would expect an effect that it does not have.

The allow-list and the defaults are those of DeepSpeed 0.19.8; tests compare them with its source.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from electra_ds.config.monitors import MONITOR_SECTIONS
from electra_ds.config.recipe import TrainingRecipe
from electra_ds.core.errors import did_you_mean

# The allow-list. A test compares it with DeepSpeed's own constants.

RESOLVED_HERE = (
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_optimization", "fp16", "bf16",
    "torch_autocast", "activation_checkpointing",
)  # fmt: skip
ALTERNATIVES = {
    "comet": "Comet is not supported; use --wandb, --tensorboard, or a csv_monitor section instead",
    "comms_logger": "it is not supported here, where nothing prints its summary; remove the key",
}
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
"""Top-level keys that have no effect here: files on NVMe, a buffer of ZeRO's oldest form, the last batch of DeepSpeed's
own loader (every batch is full here), a switch that DeepSpeed does not use, a hint about speed, and the implementation
of an offloaded optimizer, which is torch's AdamW here."""
ZERO_DEFAULTS: dict[str, Any] = {
    "compute_grad_norm": True, "cpu_offload": None, "cpu_offload_param": None, "legacy_stage1": False,
    "override_module_apply": True, "parameter_alignment": False, "save_muon_momentum_buffer_in_memory": False,
    "stage3_gather_fp16_weights_on_model_save": False, "zenflow": None, "zero_hpz_partition_size": 1,
    "zero_quantized_gradients": False, "zero_quantized_nontrainable_weights": False, "zero_quantized_weights": False,
}  # fmt: skip
ZERO_WITHOUT_EFFECT = (
    "cpu_offload_use_pin_memory", "elastic_checkpoint", "load_from_fp32_weights", "pipeline_loading_checkpoint",
)  # fmt: skip
"""Keys of `zero_optimization` without effect: a switch that DeepSpeed no longer reads, and three about its own
checkpoints. Our checkpoints load at every stage and on any number of ranks."""
SECTION_DEFAULTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "data_types": {"keep_in_fp32_modules": ("auto",)},
    "pipeline": {
        "stages": ("auto", 1), "partition": ("best",), "activation_checkpoint_interval": (0,),
        "pipe_partitioned": (True,), "grad_partitioned": (True,),
    },
    "tensor_parallel": {"autotp_size": (0, 1), "vocab_parallel_ce_backend": ("torch",)},
}  # fmt: skip
"""Values in sections that are DeepSpeed's defaults or equivalent to them."""
SECTION_SWITCHES = {
    "autotuning": ("enabled",),
    "checkpoint": ("load_universal", "use_node_local_storage"),
    "comms_logger": ("enabled",),
    "compile": ("deepcompile", "enabled"),
    "hybrid_engine": ("enabled",),
}
"""Sections without effect unless one of these switches is on, all of which are off by default."""
NOT_USED = (
    *TOP_DEFAULTS, *WITHOUT_EFFECT, *SECTION_DEFAULTS, *SECTION_SWITCHES, "data_efficiency", "datastates_ckpt",
    "expert_parallel", "weight_quantization",
)  # fmt: skip
"""Top-level keys that are not supported, but may spell out a default."""
REMOVED = (
    "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula",
    "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients",
)  # fmt: skip
"""Top-level keys of older versions that DeepSpeed 0.19 refuses with any value."""
IGNORED = ("fp32_allreduce",)
"""Top-level keys of older versions that DeepSpeed 0.19 ignores silently."""
ZERO_REMOVED: dict[str, Any] = {
    "mics_shard_size": -1, "mics_hierarchical_params_gather": False, "zeropp_loco_param": None,
}  # fmt: skip
"""Keys of `zero_optimization` that DeepSpeed 0.19 refuses, with the values that switched them off."""
ZERO_IGNORED = {"cpu_offload_params": False, "legacy_stage1": False}
"""Keys of `zero_optimization` of older versions that no longer exist or no longer have an implementation."""


def is_off(value: Any) -> bool:
    """Return whether a section or a switch is off: false, null, "auto", or an object in which nothing is enabled."""
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
    """Return whether an unsupported key of `zero_optimization` only spells out a default or an off switch."""
    if key in ZERO_WITHOUT_EFFECT:
        return value in (True, False, None, "auto")
    off = ZERO_DEFAULTS | ZERO_REMOVED | ZERO_IGNORED
    if key not in off:
        return False
    if type(value) is type(off[key]) and value == off[key]:  # true is not 1
        return True
    return off[key] is not True and is_off(value)


def is_offload(key: str, value: Any) -> bool:
    """Return whether a key asks for offloading, which is an error at a stage that does not offload.

    A device that is absent or "auto", as in files that accelerate completes, is DeepSpeed's default: none.
    """
    device = value.get("device", "none") if isinstance(value, dict) else value
    return key in ("offload_optimizer", "offload_param") and device not in ("none", "auto", None, False)


def check_keys(values: dict[str, Any], problems: list[str]) -> list[str]:
    """Return the keys that change nothing, and add unknown and unsupported ones to `problems`."""
    known = (*OWNED_BY_RECIPE, *RESOLVED_HERE, *PASSED_THROUGH, *MONITOR_SECTIONS)
    inert = []
    for key in values:
        if key in (*ALTERNATIVES, *NOT_USED, *REMOVED, *IGNORED) and is_inert(key, values[key]):
            inert.append(key)
        elif key in ALTERNATIVES:
            problems.append(f"{key}: {ALTERNATIVES[key]}")
        elif key in (*REMOVED, *IGNORED):
            problems.append(f"{key}: DeepSpeed 0.19 no longer has this feature; remove the key")
        elif key in NOT_USED:
            problems.append(f"{key}: this DeepSpeed feature is not supported here; remove the key")
        elif key not in known:
            problems.append(f"{key}: unknown key, which DeepSpeed would ignore{did_you_mean(key, known)}")
    return inert


# The keys that are passed through to DeepSpeed

PASSED_THROUGH: dict[str, type[Any]] = {
    "disable_python_gc": bool,
    "dump_state": bool,
    "flops_profiler": dict,
    "log_level": str,
    "memory_breakdown": bool,
    "steps_per_print": int,
    "timers": dict,
    "wall_clock_breakdown": bool,
    "zero_allow_untested_optimizer": bool,
}
_JSON_TYPES = {dict: "object", bool: "boolean", int: "whole number", str: "string"}
_FLOPS_PROFILER: dict[str, tuple[type, ...]] = {
    "enabled": (bool,), "recompute_fwd_factor": (int, float), "profile_step": (int,), "module_depth": (int,),
    "top_modules": (int,), "detailed": (bool,), "output_file": (str, type(None)),
}  # fmt: skip
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
_LEVEL = "warning"
"""DeepSpeed's default."""
NEVER = 2**31 - 1
"""The `steps_per_print` of a run whose file does not set it: the progress bar reports, not DeepSpeed."""


def parse_passed_through(values: dict[str, Any], problems: list[str], notes: list[str]) -> dict[str, Any]:
    """Return the keys that DeepSpeed gets unchanged.

    Errors are added to `problems`, and keys that will print nothing to `notes`.
    """
    given: dict[str, Any] = {key: values[key] for key in PASSED_THROUGH if values.get(key, "auto") != "auto"}
    before = len(problems)
    for key, value in given.items():
        if type(value) is not PASSED_THROUGH[key]:
            problems.append(f"{key}: {value!r} is not of type {_JSON_TYPES[PASSED_THROUGH[key]]}")
        elif key == "log_level" and value.lower() not in _LOG_LEVELS:
            problems.append(f"log_level: {value!r} is not one of {', '.join(_LOG_LEVELS)}")
        elif key == "steps_per_print" and value < 1:
            problems.append(f"steps_per_print: {value} is not a positive whole number")
    profiler = given.get("flops_profiler")
    for key, value in profiler.items() if isinstance(profiler, dict) else ():
        if key not in _FLOPS_PROFILER:
            problems.append(f"flops_profiler.{key}: unknown key")
        elif value != "auto" and type(value) not in _FLOPS_PROFILER[key]:
            problems.append(f"flops_profiler.{key}: {value!r} is of the wrong type")
    if len(problems) == before:
        _note_silent_keys(given, notes)
    return given


def _note_silent_keys(given: dict[str, Any], notes: list[str]) -> None:
    """Note keys without visible effect: DeepSpeed logs at level "info", and its default level is "warning"."""
    throughput = given.get("timers", {}).get("throughput", {})
    asked = {
        "dump_state": given.get("dump_state", False),
        "steps_per_print": given.get("steps_per_print", NEVER) < NEVER,
        "timers": isinstance(throughput, dict) and throughput.get("enabled", False) is True,
    }
    silent = [key for key, is_on in asked.items() if is_on]
    if silent and _LOG_LEVELS.index(given.get("log_level", _LEVEL).lower()) > _LOG_LEVELS.index("info"):
        notes.append(f'{", ".join(silent)}: DeepSpeed prints this only with "log_level": "info" in the file')
    if asked["timers"] and not asked["steps_per_print"]:
        notes.append(
            "timers: DeepSpeed prints the throughput every steps_per_print steps, and the file does not set it"
        )


# The keys that the recipe owns

OWNED_BY_RECIPE = ("train_batch_size", "gradient_clipping", "optimizer", "scheduler")
_OPTIMIZERS = ("adam", "adamw")
"""DeepSpeed compares these in lower case, and both mean AdamW unless `adam_w_mode` is false. It compares schedulers
as they are written."""
_REMOVED_OPTIMIZERS = ("onebitadam", "onebitlamb", "zerooneadam")
"""Optimizers that DeepSpeed 0.19 no longer has."""
SCHEDULERS = ("WarmupLR", "WarmupDecayLR")
_IMPLEMENTATION = ("torch_adam", "foreach", "fused", "set_grad_none")
"""Parameters of the optimizer that choose an implementation and change no result."""
_OPEN_SCHEDULE: dict[str, Any] = {"warmup_min_lr": 0, "last_batch_iteration": -1, "warmup_type": "linear"}
"""Values with which a scheduler still leaves its numbers to the recipe: DeepSpeed's defaults and "linear"."""


def check_recipe_owned(values: dict[str, Any], recipe: TrainingRecipe, problems: list[str], notes: list[str]) -> None:
    """Check the keys that the recipe owns.

    Contradictions are added to `problems`, each once, and settings that were left to the recipe to `notes`.
    """
    owners = _owners(recipe)
    for name in ("train_batch_size", "gradient_clipping"):
        _check(name, values.get(name, "auto"), owners, problems)
    for name, check_type in (("optimizer", _check_optimizer), ("scheduler", _check_scheduler)):
        section = values.get(name, "auto")
        if section == "auto":
            continue
        if not isinstance(section, dict) or not isinstance(section.get("params", {}), (dict, str)):
            problems.append(f"{name}: must be an object with type and params")
        elif check_type(section, recipe, problems, notes):
            for key, value in section.items():
                if key == "params" and isinstance(value, dict):
                    for parameter, each in value.items():
                        if not _is_unread(section, parameter):
                            _check(f"{name}.params.{parameter}", each, owners, problems)
                elif key != "type":
                    _check(f"{name}.{key}", value, owners, problems)


def _owners(recipe: TrainingRecipe) -> dict[str, tuple[Any, str]]:
    """Return the value that each key may have, and the part of the recipe that owns it."""
    optimizer, schedule = recipe.optimizer, recipe.schedule
    return {
        "train_batch_size": (recipe.global_batch_size, "global_batch_size"),
        "gradient_clipping": (optimizer.max_grad_norm, "optimizer.max_grad_norm"),
        "optimizer.legacy_fusion": (False, "the optimizer, which is torch's AdamW"),
        "optimizer.params.lr": (optimizer.learning_rate, "optimizer.learning_rate"),
        "optimizer.params.betas": ([optimizer.beta1, optimizer.beta2], "optimizer.beta1 and beta2"),
        "optimizer.params.eps": (optimizer.epsilon, "optimizer.epsilon"),
        "optimizer.params.weight_decay": (optimizer.weight_decay, "optimizer.weight_decay"),
        "optimizer.params.bias_correction": (optimizer.bias_correction, "optimizer.bias_correction"),
        "optimizer.params.max_grad_norm": (optimizer.max_grad_norm, "optimizer.max_grad_norm"),
        "optimizer.params.adam_w_mode": (True, "the optimizer, which is AdamW"),
        "optimizer.params.amsgrad": (False, "the optimizer, which is AdamW"),
        "optimizer.params.fp32_optimizer_states": (True, "the optimizer, whose moments are fp32"),
        "scheduler.params.warmup_min_lr": (0, "the schedule, which starts at 0"),
        "scheduler.params.warmup_max_lr": (optimizer.learning_rate, "optimizer.learning_rate"),
        "scheduler.params.warmup_num_steps": (schedule.warmup_steps, "schedule.warmup_steps"),
        "scheduler.params.total_num_steps": (schedule.total_steps, "schedule.total_steps"),
        "scheduler.params.warmup_type": ("linear", "the schedule, whose warm-up is linear"),
        "scheduler.params.last_batch_iteration": (-1, "the schedule, which counts the run's own steps"),
    }


def _is_unread(section: dict[str, Any], parameter: str) -> bool:
    """Return whether a parameter only chooses the optimizer's implementation. `adam_w_mode` has no effect on AdamW."""
    decided = parameter == "adam_w_mode" and str(section.get("type")).lower() == "adamw"
    return decided or parameter in _IMPLEMENTATION


def _check(key: str, value: Any, owners: dict[str, tuple[Any, str]], problems: list[str]) -> None:
    if value == "auto":
        return
    if key not in owners:
        known = [name.rpartition(".")[2] for name in owners if name.rpartition(".")[0] == key.rpartition(".")[0]]
        problems.append(f"{key}: unknown key{did_you_mean(key.rpartition('.')[2], known)}")
    elif not _same(value, owners[key][0]):
        ours, owner = owners[key]
        problems.append(
            f'{key}: {value!r} contradicts the recipe ({owner} is {ours!r}); write "auto" or leave it out, '
            f"and change the recipe instead"
        )


def _same(value: Any, ours: Any) -> bool:
    if isinstance(ours, list):
        return isinstance(value, list) and len(value) == len(ours) and all(map(_same, value, ours))
    if isinstance(ours, (bool, str)) or isinstance(value, bool):
        return bool(value == ours)
    return isinstance(value, (int, float)) and abs(value - ours) <= 1e-12 * abs(ours)


def _is_open(parameter: str, value: Any) -> bool:
    return value == "auto" or (parameter in _OPEN_SCHEDULE and _same(value, _OPEN_SCHEDULE[parameter]))


def _check_optimizer(section: dict[str, Any], recipe: TrainingRecipe, problems: list[str], notes: list[str]) -> bool:
    """Return whether to check the parameters, too: those of another optimizer would only repeat the problem."""
    kind = section.get("type", "auto")
    name = kind.lower() if isinstance(kind, str) else kind
    if name in (*_OPTIMIZERS, "auto"):
        return True
    remedy = 'remove the section, or write AdamW with params "auto"'
    if name in _REMOVED_OPTIMIZERS:
        problems.append(f"optimizer.type: DeepSpeed 0.19 no longer has {kind}, and the recipe runs AdamW; {remedy}")
    else:
        problems.append(f"optimizer.type: {kind!r} is not the recipe's optimizer (Adam or AdamW); {remedy}")
    return False


def _check_scheduler(section: dict[str, Any], recipe: TrainingRecipe, problems: list[str], notes: list[str]) -> bool:
    """Return whether to check the parameters of a scheduler, too.

    A scheduler whose numbers are all "auto", as in transformers' files, stands for the recipe's schedule. One with
    numbers must match the recipe.
    """
    kind, params = section.get("type", "auto"), section.get("params", {})
    schedule = f"the recipe's {recipe.schedule.kind} schedule"
    if kind not in (*SCHEDULERS, "auto"):
        problems.append(
            f"scheduler.type: {kind!r} is not {schedule}; remove the section, or write WarmupDecayLR"
            f"{did_you_mean(str(kind), SCHEDULERS)}"
        )
    elif not isinstance(params, dict) or all(_is_open(key, value) for key, value in params.items()):
        if kind != "auto":
            notes.append(f"scheduler {kind} leaves its numbers to the recipe, so {schedule} is used")
    elif kind == "WarmupLR":
        problems.append(
            f"scheduler.type: WarmupLR stays at its peak after the warm-up, which contradicts {schedule}; "
            f'make its params "auto" or remove the section'
        )
        return False
    elif recipe.schedule.kind != "linear":
        problems.append(f"scheduler.type: {kind} contradicts {schedule}; remove the section")
        return False
    elif params.get("warmup_type", "log") in ("log", "auto"):
        problems.append(
            'scheduler.params.warmup_type: DeepSpeed\'s default, "log", contradicts the recipe, whose warm-up is '
            'linear; write "linear", or make all params "auto"'
        )
        return False
    return kind in (*SCHEDULERS, "auto")
