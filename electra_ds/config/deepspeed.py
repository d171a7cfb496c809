"""The DeepSpeed JSON: how a recipe's mathematics is run.

The file stays a real DeepSpeed config. Keys that the recipe owns (batch size, clipping, optimizer, schedule)
may be absent or "auto" and are filled in; a concrete value that contradicts the recipe is an error.
DeepSpeed itself ignores unknown top-level keys, reads `"stage": "auto"` as 0 and a missing clipping as 1.0,
so every such case is caught here first, and all problems are reported together.
"""

from __future__ import annotations

import copy
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from electra_ds.config.recipe import Recipe
from electra_ds.errors import ConfigError

OWNED_BY_RECIPE = ("train_batch_size", "gradient_clipping", "optimizer", "scheduler")
RESOLVED_HERE = (
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_optimization", "fp16", "bf16",
    "torch_autocast",
)  # fmt: skip
HANDED_ON: dict[str, type] = {
    "comms_logger": dict,
    "disable_python_gc": bool,
    "dump_state": bool,
    "flops_profiler": dict,
    "log_level": str,
    "memory_breakdown": bool,
    "steps_per_print": int,
    "timers": dict,
    "wall_clock_breakdown": bool,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
}
NOT_USED = (
    "activation_checkpointing", "aio", "autotuning", "bfloat16", "checkpoint", "comet", "communication_data_type",
    "compile", "csv_monitor", "data_efficiency", "data_types", "dataloader_drop_last", "datastates_ckpt",
    "disable_allgather", "expert_parallel", "gradient_allreduce_op", "gradient_predivide_factor", "hybrid_engine",
    "managed_gradient_accumulation", "pipeline", "prescale_gradients", "seq_parallel_communication_data_type",
    "tensor_parallel", "tensorboard", "use_data_before_expert_parallelism", "wandb", "weight_quantization",
)  # fmt: skip

_PRECISION_KEYS = {
    "fp16": {
        "enabled", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis",
        "min_loss_scale",
    },
    "bf16": {"enabled"},
    "torch_autocast": {"enabled", "dtype"},
}  # fmt: skip
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
    "stage3_allgather_sequential",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "auto_cast", "fp16_master_weights_and_grads", "check_grad_overflow", "immediate_grad_update",
    "bf16_master_weights_and_grads", "bf16_optimizer_states", "lower_precision_safe_modules",
}  # fmt: skip


@dataclass(frozen=True)
class LossScaling:
    """DeepSpeed's dynamic loss scaling, its names and its defaults."""

    initial_scale: float = 2.0**16
    is_dynamic: bool = True
    window: int = 1000
    """Steps without overflow after which the scale doubles."""
    hysteresis: int = 2
    """Overflows that are needed to halve the scale."""
    consecutive_hysteresis: bool = False
    """Whether a good step restores the hysteresis."""
    min_scale: float = 1.0


@dataclass(frozen=True)
class Precision:
    """`fp16` and `bf16`: half weights with fp32 masters. `autocast-…`: torch.autocast over fp32 weights."""

    name: Literal["fp32", "bf16", "fp16", "autocast-bf16", "autocast-fp16"]
    loss_scaling: LossScaling | None = None


@dataclass(frozen=True)
class BatchPlan:
    """How the recipe's global batch is cut."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    world_size: int

    def __str__(self) -> str:
        return f"{self.micro_batch_size} x {self.gradient_accumulation_steps} x {self.world_size} rank(s)"


@dataclass(frozen=True)
class DeepSpeedPlan:
    """A DeepSpeed JSON resolved against a recipe and a world size."""

    document: dict[str, Any]
    """The resolved JSON, every value concrete."""
    batch: BatchPlan
    precision: Precision
    stage: Literal[0, 1, 2, 3] = 0
    notes: tuple[str, ...] = ()
    """What was read otherwise than the file says, to be told to the user."""

    def engine_config(self) -> dict[str, Any]:
        """What `deepspeed.initialize` is given.

        At stage 0 precision, loss scaling and clipping are left out: our optimizer does them, since DeepSpeed
        0.19.8 divides by a loss scale that it never applied (deepspeedai/DeepSpeed#8393). Autocast is left out at
        every stage: the model switches it on itself, and DeepSpeed's would leak into later engines.
        """
        config = copy.deepcopy(self.document)
        config.pop("torch_autocast", None)
        if self.stage == 0:
            for key in ("fp16", "bf16"):
                config.pop(key, None)
            config["gradient_clipping"] = 0.0
        if self.stage < 3:  # our losses are normalised over all ranks; stage 3 can only average
            config["gradient_allreduce_op"] = "sum"
        if self.stage:
            config["zero_force_ds_cpu_optimizer"] = False  # offloading runs torch's AdamW, nothing is compiled
        return config


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """The raw mapping of a JSON file. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"There is no DeepSpeed JSON at {path}. The project's own are in ds_configs/.")
    try:
        values = json.loads(path.read_text("utf8"), object_pairs_hook=_without_duplicates)
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a JSON object, not {type(values).__name__}.")
    return values


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"the key {', '.join(twice)} stands twice")
    return dict(pairs)


def resolve(values: dict[str, Any], recipe: Recipe, *, world_size: int, on_cpu: bool, source: str) -> DeepSpeedPlan:
    """Fill in, check and solve the batch plan. ConfigError lists every problem at once."""
    problems: list[str] = []
    document = _without_auto({key: value for key, value in values.items() if key in HANDED_ON})
    _check_keys(values, problems)
    notes: list[str] = []
    _check_recipe_owned(values, recipe, problems, notes)
    zero = _zero(values, on_cpu, problems, notes)
    precision = _precision(values, zero["stage"], on_cpu, problems)
    batch = _batch_plan(values, recipe.global_batch_size, world_size, problems)
    if problems:
        raise ConfigError(f"{source} cannot be used with recipe {recipe.name}:\n  " + "\n  ".join(problems))
    assert precision is not None
    assert batch is not None
    document |= {
        "train_batch_size": recipe.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "gradient_clipping": recipe.optimizer.max_grad_norm,
        "zero_optimization": zero,
    }
    document.setdefault("steps_per_print", 2**31 - 1)  # the progress bar reports, not DeepSpeed
    for name in _PRECISION_KEYS:
        if isinstance(values.get(name), dict) and name.replace("torch_", "") == precision.name.split("-")[0]:
            document[name] = _without_auto(values[name]) | {"enabled": True}
    return DeepSpeedPlan(document, batch, precision, zero["stage"], tuple(notes))


def _without_auto(values: dict[str, Any]) -> dict[str, Any]:
    """Without the values that are left to DeepSpeed's defaults."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value != "auto"
    }


def _check_keys(values: dict[str, Any], problems: list[str]) -> None:
    known = (*OWNED_BY_RECIPE, *RESOLVED_HERE, *HANDED_ON)
    for key in values:
        if key in NOT_USED:
            problems.append(f"{key}: this DeepSpeed feature is not supported here; remove the key")
        elif key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            problems.append(f"{key}: unknown key" + (f"; did you mean '{near[0]}'?" if near else ""))
        elif key in HANDED_ON and values[key] != "auto" and type(values[key]) is not HANDED_ON[key]:
            problems.append(f"{key}: {values[key]!r} is not of type {_JSON_TYPES[HANDED_ON[key]]}")
        elif key == "steps_per_print" and values[key] != "auto" and values[key] < 1:
            problems.append(f"steps_per_print: {values[key]} is not a positive whole number")


_JSON_TYPES = {dict: "object", bool: "boolean", int: "whole number", str: "string"}


def _check_recipe_owned(values: dict[str, Any], recipe: Recipe, problems: list[str], notes: list[str]) -> None:
    optimizer, schedule = recipe.optimizer, recipe.schedule
    owners: dict[str, tuple[Any, str]] = {
        "train_batch_size": (recipe.global_batch_size, "global_batch_size"),
        "gradient_clipping": (optimizer.max_grad_norm, "optimizer.max_grad_norm"),
        "optimizer.params.lr": (optimizer.learning_rate, "optimizer.learning_rate"),
        "optimizer.params.betas": ([optimizer.beta1, optimizer.beta2], "optimizer.beta1 and beta2"),
        "optimizer.params.eps": (optimizer.epsilon, "optimizer.epsilon"),
        "optimizer.params.weight_decay": (optimizer.weight_decay, "optimizer.weight_decay"),
        "optimizer.params.bias_correction": (optimizer.bias_correction, "optimizer.bias_correction"),
        "optimizer.params.torch_adam": (True, "the optimizer, which is torch's AdamW"),
        "optimizer.params.adam_w_mode": (True, "the optimizer, which is AdamW"),
        "scheduler.params.warmup_min_lr": (0, "the schedule, which starts at 0"),
        "scheduler.params.warmup_max_lr": (optimizer.learning_rate, "optimizer.learning_rate"),
        "scheduler.params.warmup_num_steps": (schedule.warmup_steps, "schedule.warmup_steps"),
        "scheduler.params.total_num_steps": (schedule.total_steps, "schedule.total_steps"),
        "scheduler.params.warmup_type": ("linear", "the schedule, whose warm-up is linear"),
    }
    owned = {name: values[name] for name in OWNED_BY_RECIPE if name in values}
    for name in ("optimizer", "scheduler"):
        if name in owned and owned[name] != "auto" and not isinstance(owned[name], dict):
            problems.append(f"{name}: must be an object with type and params")
            del owned[name]
    if isinstance(owned.get("scheduler"), dict):
        _check_scheduler(owned["scheduler"], recipe, problems, notes)
    for key, value in _flattened(owned):
        if value == "auto" or key == "scheduler.type":
            continue
        if key == "optimizer.type":
            if value not in ("Adam", "AdamW"):
                problems.append(f"{key}: {value!r} is not what the recipe runs (Adam or AdamW)")
        elif key not in owners:
            problems.append(f"{key}: unknown key")
        elif not _same(value, owners[key][0]):
            ours, owner = owners[key]
            problems.append(
                f'{key}: {value!r} contradicts the recipe ({owner} is {ours!r}); write "auto" or leave it out, '
                f"and change the recipe instead"
            )


def _check_scheduler(section: dict[str, Any], recipe: Recipe, problems: list[str], notes: list[str]) -> None:
    """A scheduler whose numbers are all "auto", as in transformers' files, stands for the recipe's own schedule;
    one with numbers must be the recipe's."""
    kind, params = section.get("type", "auto"), section.get("params", {})
    schedule = f"the recipe's {recipe.schedule.kind} schedule"
    if kind not in ("WarmupLR", "WarmupDecayLR", "auto"):
        problems.append(f"scheduler.type: {kind!r} is not {schedule}; remove the section, or WarmupDecayLR")
    elif not isinstance(params, dict) or all(value == "auto" for value in params.values()):
        if kind != "auto":
            notes.append(f"scheduler {kind} leaves its numbers to the recipe, so {schedule} is run")
    elif kind == "WarmupLR":
        problems.append(
            f"scheduler.type: WarmupLR stays at its peak after the warm-up, which contradicts {schedule}; "
            f'make its params "auto" or remove the section'
        )
    elif recipe.schedule.kind != "linear":
        problems.append(f"scheduler.type: {kind} contradicts {schedule}; remove the section")
    elif params.get("warmup_type", "log") in ("log", "auto"):
        problems.append(
            'scheduler.params.warmup_type: DeepSpeed\'s default, "log", contradicts the recipe, whose warm-up is '
            'linear; write "linear", or make all params "auto"'
        )


def _flattened(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    result = []
    for key, value in values.items():
        if isinstance(value, dict):
            result += _flattened(value, f"{prefix}{key}.")
        else:
            result.append((prefix + key, value))
    return result


def _same(value: Any, ours: Any) -> bool:
    if isinstance(ours, list):
        return isinstance(value, list) and len(value) == len(ours) and all(map(_same, value, ours))
    if isinstance(ours, (bool, str)) or isinstance(value, bool):
        return bool(value == ours)
    return isinstance(value, (int, float)) and abs(value - ours) <= 1e-12 * abs(ours)


def _zero(values: dict[str, Any], on_cpu: bool, problems: list[str], notes: list[str]) -> dict[str, Any]:
    """The zero_optimization section with every "auto" filled in and buffers of a size for small cards."""
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
    for key in section:
        if key not in ZERO_KEYS | ZERO_3_KEYS:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            problems.append(f"zero_optimization.{key}: not supported here{hint}")
        elif key not in known:
            problems.append(f"zero_optimization.{key}: has no effect at stage {stage}; remove it")
    result = {"stage": stage} | _ZERO_DEFAULTS.get(stage, {}) | _without_auto(section)
    for name in ("offload_optimizer", "offload_param"):
        if name in result:
            _check_offload(name, result, on_cpu, problems, notes)
    return result


def _check_offload(name: str, zero: dict[str, Any], on_cpu: bool, problems: list[str], notes: list[str]) -> None:
    section = zero[name]
    device = section.get("device", "none") if isinstance(section, dict) else section
    if device not in ("cpu", "none", None):
        problems.append(f'zero_optimization.{name}.device: {device!r} is not supported here; "cpu" and "none" are')
    elif not isinstance(section, dict) or device in ("none", None):
        del zero[name]
    elif on_cpu:
        notes.append(f"zero_optimization.{name} is left out: without a GPU all memory is the CPU's already")
        del zero[name]


def _precision(values: dict[str, Any], stage: int, on_cpu: bool, problems: list[str]) -> Precision | None:
    enabled = []
    before = len(problems)
    for name, known in _PRECISION_KEYS.items():
        section = values.get(name, {})
        if not isinstance(section, dict):
            problems.append(f'{name}: must be an object such as {{"enabled": true}}')
            continue
        for key in section:
            if key in _WITHOUT_EFFECT:
                if section[key]:
                    problems.append(f"{name}.{key}: is not supported here; remove it")
            elif key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                problems.append(f"{name}.{key}: unknown key" + (f"; did you mean '{near[0]}'?" if near else ""))
        on = section.get("enabled", False)
        if on == "auto":  # transformers' convention; on a GPU fp16 is the project's default
            on = name == "fp16" and not on_cpu
        if not isinstance(on, bool):
            problems.append(f'{name}.enabled: {on!r} is not true, false or "auto"')
        elif on:
            enabled.append(name)
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


def _batch_plan(values: dict[str, Any], global_batch: int, world_size: int, problems: list[str]) -> BatchPlan | None:
    """Micro-batch x accumulation x ranks = global batch. With neither given, each rank takes its share at once."""

    def given(key: str) -> int | None:
        value = values.get(key, "auto")
        if value == "auto":
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            problems.append(f"{key}: {value!r} is not a positive whole number")
        return value

    before = len(problems)
    micro, accumulation = given("train_micro_batch_size_per_gpu"), given("gradient_accumulation_steps")
    if len(problems) > before:
        return None
    per_rank, rest = divmod(global_batch, world_size)
    if rest:
        problems.append(f"global_batch_size {global_batch} (recipe) cannot be split over {world_size} ranks")
        return None
    if micro is None and accumulation is None:
        micro, accumulation = per_rank, 1
    elif micro is None and accumulation is not None:
        micro = max(1, per_rank // accumulation)
    elif accumulation is None and micro is not None:
        micro = min(micro, per_rank)
        accumulation = per_rank // micro
    assert micro is not None
    assert accumulation is not None
    if micro * accumulation != per_rank:
        divisors = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
        nearest = min(divisors, key=lambda size: abs(size - micro))
        problems.append(
            f"train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps {accumulation} x {world_size} "
            f"rank(s) is {micro * accumulation * world_size}, but global_batch_size (recipe) is {global_batch}. "
            f'For instance: micro-batch {nearest} and accumulation "auto"'
        )
        return None
    return BatchPlan(micro, accumulation, world_size)
