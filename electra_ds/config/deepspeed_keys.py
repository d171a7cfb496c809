"""The keys of a DeepSpeed JSON: their spelling, which the recipe owns, which are passed through, which have no effect.

- Keys that the recipe owns (batch, clipping, optimizer, schedule) may be absent or "auto"; any other value must match.
- Keys about DeepSpeed's reports and process are passed through to DeepSpeed, which checks their values.
- Keys that change nothing here are left out, and one note lists them: defaults, off switches, keys of other ZeRO
  stages. A key from which a user would expect an effect that it does not have is an error instead.

The allow-list and the defaults are those of DeepSpeed 0.19.8; tests compare them with its source.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from electra_ds.config.monitors import MONITOR_SECTIONS
from electra_ds.config.sections import TrainingRecipe
from electra_ds.core.errors import did_you_mean


@dataclass
class Findings:
    """The problems and notes that the functions below collect about a file."""

    problems: list[str] = field(default_factory=list)
    """Errors, because of which the file is rejected."""
    notes: list[str] = field(default_factory=list)
    """Notes for the user on how the file was interpreted."""
    inert: list[str] = field(default_factory=list)
    """Keys that change nothing and are left out."""


# Spelling: comments, whole numbers written as floats, older names and unfilled templates. Afterwards every key and
# value has one spelling.

_PYTHON = re.compile("(True|False|None),?")
"""HJSON, which DeepSpeed reads, treats a bare word as text up to the end of the line, including the comma."""
_PLACEHOLDER = re.compile("[A-Z][A-Z0-9]*(_[A-Z0-9]+)+,?")
"""Placeholders such as CONFIG_BATCH_SIZE in Megatron-DeepSpeed's templates, which its scripts fill in."""
UNSET_BY_NULL = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print", "log_level",
    "bf16",
)  # fmt: skip
"""Keys that DeepSpeed treats as absent when they are null."""
ZERO_OLD_NAMES = {
    "cpu_offload": "offload_optimizer",
    "cpu_offload_param": "offload_param",
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
}
"""Deprecated switches, which DeepSpeed reads as the newer keys."""


def is_comment(key: str) -> bool:
    """Return whether a key is only a comment. DeepSpeed ignores such keys at the top level."""
    return key.startswith(("_", "//", "#"))


def normalize_spelling(values: dict[str, Any], found: Findings) -> dict[str, Any]:
    """Return the mapping without comments, unreadable values and older names, as DeepSpeed reads it."""
    values = _plain(values, "", found)
    values = {key: value for key, value in values.items() if value is not None or key not in UNSET_BY_NULL}
    renamed = []
    if "bfloat16" in values:
        values.setdefault("bf16", values.pop("bfloat16"))
        renamed.append("bfloat16 as bf16")
    zero = values.get("zero_optimization")
    if isinstance(zero, bool):
        zero = values["zero_optimization"] = {"stage": int(zero)}
        renamed.append(f"zero_optimization as stage {zero['stage']}")
    for old, new in ZERO_OLD_NAMES.items():
        if isinstance(zero, dict) and zero.get(old) is True:
            del zero[old]
            zero.setdefault(new, {"device": "cpu"} if new.startswith("offload") else True)
            renamed.append(f"zero_optimization.{old} as {new}")
    if renamed:
        found.notes.append(f"read as DeepSpeed reads older names: {', '.join(renamed)}")
    return values


def _plain(value: Any, place: str, found: Findings) -> Any:
    if isinstance(value, dict):
        result = {}
        for key, each in value.items():
            inner = f"{place}.{key}" if place else key
            if is_comment(key):
                continue
            if isinstance(each, str) and (problem := _text_problem(each, inner)):
                found.problems.append(f"{inner}: {problem}")
            else:
                result[key] = _plain(each, inner, found)
        return result
    if isinstance(value, list):
        return [_plain(each, place, found) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text_problem(text: str, place: str) -> str | None:
    if _PYTHON.fullmatch(text):
        return f"{text!r} is text to a JSON parser; write true, false or null, in lower case and without quotes"
    is_free_text = place.partition(".")[0] in (*MONITOR_SECTIONS, "flops_profiler")
    if _PLACEHOLDER.fullmatch(text) and not is_free_text:
        return f"{text!r} is a template's placeholder; replace it with a value"
    return None


# Keys that are not supported here, but may be off or set to their defaults


@dataclass(frozen=True)
class Unused:
    """DeepSpeed keys that are not supported here."""

    defaults: dict[str, Any]
    """Each key with DeepSpeed's default, which is accepted. For a section, a dict of its switches, which are off by
    default, each with the values that also mean off; the section's other keys have no effect without them."""
    without_effect: tuple[str, ...]
    """Keys that have no effect here with any value."""
    removed: dict[str, Any]
    """Keys of older versions that DeepSpeed 0.19 rejects or ignores, with the values that switched them off."""

    def check(self, place: str, key: str, value: Any, known: Iterable[str], found: Findings) -> None:
        """Check a key that is not one of the `known` ones, which are supported."""
        unsupported = self.defaults | self.removed
        if key in self.without_effect or (key in unsupported and is_default(value, unsupported[key])):
            found.inert.append(place)
        elif key in self.removed:
            found.problems.append(f"{place}: DeepSpeed 0.19 no longer has this feature; remove the key")
        elif key in self.defaults:
            found.problems.append(f"{place}: this DeepSpeed feature is not supported here; remove the key")
        else:
            found.problems.append(f"{place}: unknown key{did_you_mean(key, known)}")


def is_default(value: Any, default: Any) -> bool:
    """Return whether a value equals a default of `Unused` or is off: false, null, "auto", or an object in which nothing
    is enabled."""
    if isinstance(default, dict) and isinstance(value, dict):
        return all(is_off(value.get(name)) or value[name] in harmless for name, harmless in default.items())
    if default is True:
        return value in (True, None, "auto")
    return is_off(value) or bool(value == default)


def is_off(value: Any) -> bool:
    """Return whether a section or a switch is off."""
    if isinstance(value, dict):
        switches = list(_switches(value))
        return all(map(is_off, switches or value.values()))
    return value is None or value is False or value == "auto"


def _switches(section: dict[str, Any]) -> Iterator[Any]:
    """Yield the values of `enabled` in a section and its subsections."""
    for key, value in section.items():
        if key == "enabled":
            yield value
        elif isinstance(value, dict):
            yield from _switches(value)


UNUSED = Unused(
    defaults={
        "autotuning": {"enabled": ()},
        "checkpoint": {"load_universal": (), "use_node_local_storage": ()},
        "comet": None,
        "comms_logger": {"enabled": ()},
        "communication_data_type": None,
        "compile": {"deepcompile": (), "enabled": ()},
        "data_efficiency": None,
        "data_types": {"grad_accum_dtype": ()},
        "datastates_ckpt": None,
        "expert_parallel": None,
        "gradient_allreduce_op": "mean",
        "gradient_predivide_factor": 1.0,
        "hybrid_engine": {"enabled": ()},
        "managed_gradient_accumulation": True,
        "pipeline": {"stages": (1,), "activation_checkpoint_interval": (0,)},
        "prescale_gradients": False,
        "seq_parallel_communication_data_type": "fp32",
        "sequence_parallel_size": 1,
        "tensor_parallel": {"autotp_size": (0, 1), "tp": ()},
        "use_data_before_expert_parallelism": False,
        "weight_quantization": None,
    },
    # NVMe files, a buffer of the original ZeRO, the last batch of DeepSpeed's own loader (every batch is full here), a
    # switch that DeepSpeed does not use, a hint about speed, and the implementation of an offloaded optimizer, which is
    # torch's AdamW here.
    without_effect=(
        "aio",
        "allgather_size",
        "dataloader_drop_last",
        "disable_allgather",
        "vocabulary_size",
        "zero_force_ds_cpu_optimizer",
    ),
    removed=dict.fromkeys(
        (
            "amp",
            "compression_training",
            "curriculum_learning",
            "eigenvalue",
            "elasticity",
            "fp32_allreduce",
            "graph_harvesting",
            "nebula",
            "progressive_layer_drop",
            "quantize_training",
            "sparse_attention",
            "sparse_gradients",
        )
    ),
)
"""Unsupported keys at the top level."""
UNUSED_IN_ZERO = Unused(
    defaults={
        "compute_grad_norm": True,
        "cpu_offload": None,
        "cpu_offload_param": None,
        "override_module_apply": True,
        "parameter_alignment": False,
        "save_muon_momentum_buffer_in_memory": False,
        "stage3_gather_fp16_weights_on_model_save": False,
        "zenflow": None,
        "zero_hpz_partition_size": 1,
        "zero_quantized_gradients": False,
        "zero_quantized_nontrainable_weights": False,
        "zero_quantized_weights": False,
    },
    # A switch that DeepSpeed no longer reads, and three for its own checkpoints. Our checkpoints load at every stage
    # and on any number of ranks.
    without_effect=(
        "cpu_offload_use_pin_memory",
        "elastic_checkpoint",
        "load_from_fp32_weights",
        "pipeline_loading_checkpoint",
    ),
    removed={
        "cpu_offload_params": False,
        "legacy_stage1": False,
        "mics_hierarchical_params_gather": False,
        "mics_shard_size": -1,
        "zeropp_loco_param": None,
    },
)
"""Unsupported keys in `zero_optimization`."""

# Keys that are passed through to DeepSpeed

PASSED_THROUGH: dict[str, type[Any]] = {
    "disable_python_gc": bool, "dump_state": bool, "flops_profiler": dict, "log_level": str, "memory_breakdown": bool,
    "steps_per_print": int, "timers": dict, "wall_clock_breakdown": bool, "zero_allow_untested_optimizer": bool,
}  # fmt: skip
_JSON_TYPES = {dict: "object", bool: "boolean", int: "whole number", str: "string"}
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
NEVER = 2**31 - 1
"""The `steps_per_print` of a run whose file does not set it, since the progress bar reports in DeepSpeed's place."""


def parse_passed_through(values: dict[str, Any], found: Findings) -> dict[str, Any]:
    """Return the keys that are passed to DeepSpeed unchanged."""
    given = {key: values[key] for key in PASSED_THROUGH if values.get(key, "auto") != "auto"}
    for key, value in given.items():
        if type(value) is not PASSED_THROUGH[key]:
            found.problems.append(f"{key}: {value!r} is not of type {_JSON_TYPES[PASSED_THROUGH[key]]}")
        elif key == "steps_per_print" and value < 1:
            found.problems.append(f"{key}: {value} is not a positive whole number")
        elif key == "log_level" and value.lower() not in _LOG_LEVELS:
            found.problems.append(f"{key}: {value!r} is not one of {', '.join(_LOG_LEVELS)}")
    return given


# Keys that the recipe owns

OWNED_BY_RECIPE = ("train_batch_size", "gradient_clipping", "optimizer", "scheduler")
RESOLVED_HERE = (
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_optimization", "fp16", "bf16",
    "torch_autocast", "activation_checkpointing",
)  # fmt: skip
"""The keys that this package reads itself."""
KNOWN = (*OWNED_BY_RECIPE, *RESOLVED_HERE, *PASSED_THROUGH, *MONITOR_SECTIONS)
"""The allow-list of top-level keys, in addition to `UNUSED`. A test compares it with DeepSpeed's own constants."""
_IMPLEMENTATION = ("torch_adam", "foreach", "fused", "set_grad_none")
"""Optimizer parameters that select an implementation and do not change results."""
_OPEN_SCHEDULE: dict[str, Any] = {"warmup_min_lr": 0, "last_batch_iteration": -1, "warmup_type": "linear"}
"""Scheduler values that still leave the schedule to the recipe: DeepSpeed's defaults and "linear"."""


def check_recipe_owned(values: dict[str, Any], recipe: TrainingRecipe, found: Findings) -> None:
    """Check that the keys owned by the recipe do not contradict it."""
    given: dict[str, Any] = {key: values[key] for key in ("train_batch_size", "gradient_clipping") if key in values}
    for name, is_ours in (("optimizer", _is_adamw), ("scheduler", _is_recipes_schedule)):
        section = values.get(name, "auto")
        if section == "auto":
            continue
        params = section.get("params", {}) if isinstance(section, dict) else None
        if params == "auto":
            params = {}
        if not isinstance(params, dict):
            found.problems.append(f"{name}: must be an object with type and params")
        elif is_ours(section.get("type", "auto"), params, recipe, found):
            given |= {f"{name}.{key}": value for key, value in section.items() if key not in ("type", "params")}
            given |= {f"{name}.params.{key}": value for key, value in params.items() if key not in _IMPLEMENTATION}
    owners = _owners(recipe)
    for key, value in given.items():
        place, _, name = key.rpartition(".")
        if key not in owners:
            known = [other.rpartition(".")[2] for other in owners if other.rpartition(".")[0] == place]
            found.problems.append(f"{key}: unknown key{did_you_mean(name, known)}")
        elif value != "auto" and value != owners[key][0]:
            ours, owner = owners[key]
            found.problems.append(
                f'{key}: {value!r} contradicts the recipe ({owner} is {ours!r}); write "auto" or remove the key, '
                f"and change the recipe instead"
            )


def _owners(recipe: TrainingRecipe) -> dict[str, tuple[Any, str]]:
    """Return the allowed value of each key, and the part of the recipe that owns it."""
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


def _is_adamw(kind: Any, params: dict[str, Any], recipe: TrainingRecipe, found: Findings) -> bool:
    """Return whether to check the parameters too. For another optimizer that would only repeat the problem."""
    if recipe.optimizer.rule != "adamw":
        found.problems.append(
            f"optimizer: the recipe's optimizer.rule is {recipe.optimizer.rule}, which a DeepSpeed JSON cannot name; "
            f"remove the section"
        )
        return False
    if str(kind).lower() in ("adam", "adamw", "auto"):  # for DeepSpeed both are AdamW, unless adam_w_mode is false
        return True
    found.problems.append(
        f"optimizer.type: {kind!r} is not the recipe's optimizer (Adam or AdamW); remove the section, or write AdamW "
        f'with params "auto"'
    )
    return False


def _is_recipes_schedule(kind: Any, params: dict[str, Any], recipe: TrainingRecipe, found: Findings) -> bool:
    """Return whether to check the parameters too.

    A scheduler whose numbers are all "auto", as in transformers' files, means the recipe's schedule. One with numbers
    must match the recipe, which only WarmupDecayLR can: WarmupLR stays at its peak after the warm-up.
    """
    schedule = f"the recipe's {recipe.schedule.kind} schedule"
    is_open = all(value in ("auto", _OPEN_SCHEDULE.get(key, "auto")) for key, value in params.items())
    if is_open and kind in ("WarmupLR", "WarmupDecayLR"):
        found.notes.append(f"scheduler {kind} sets no numbers, so {schedule} is used")
        return True
    is_linear = recipe.schedule.kind == params.get("warmup_type") == "linear"
    if (is_open and kind == "auto") or (kind == "WarmupDecayLR" and is_linear):
        return True
    found.problems.append(
        f"scheduler: {kind} with these params contradicts {schedule}; remove the section, or write WarmupDecayLR with "
        f'params "auto"'
    )
    return False
