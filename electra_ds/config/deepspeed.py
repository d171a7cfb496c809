"""The DeepSpeed JSON: how a recipe's mathematics is run.

The file stays a real DeepSpeed config. Keys that the recipe owns (batch size, clipping, optimizer, schedule)
may be absent or "auto" and are filled in; a concrete value that contradicts the recipe is an error.
DeepSpeed itself ignores unknown top-level keys, reads `"stage": "auto"` as 0 and a missing clipping as 1.0,
so every such case is caught here first, and all problems are reported together.
"""

from __future__ import annotations

import copy
import difflib
import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from electra_ds.config.monitors import MONITOR_SECTIONS, Monitors, parse_monitors
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
    "activation_checkpointing", "aio", "autotuning", "bfloat16", "checkpoint", "communication_data_type",
    "compile", "data_efficiency", "data_types", "dataloader_drop_last", "datastates_ckpt",
    "disable_allgather", "expert_parallel", "gradient_allreduce_op", "gradient_predivide_factor", "hybrid_engine",
    "managed_gradient_accumulation", "pipeline", "prescale_gradients", "seq_parallel_communication_data_type",
    "tensor_parallel", "use_data_before_expert_parallelism", "weight_quantization",
)  # fmt: skip
INSTEAD = {"comet": "Comet is not supported; use --wandb, --tensorboard, or a csv_monitor section instead"}

_PRECISION_KEYS = {
    "fp16": {
        "enabled", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis",
        "min_loss_scale",
    },
    "bf16": {"enabled"},
    "torch_autocast": {"enabled", "dtype"},
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
    monitors: Monitors

    def engine_config(self) -> dict[str, Any]:
        """What `deepspeed.initialize` is given at stage 0.

        Precision, loss scaling and clipping are left out: our optimizer does them, since DeepSpeed 0.19.8
        divides by a loss scale that it never applied (deepspeedai/DeepSpeed#8393).
        """
        config = copy.deepcopy(self.document)
        for key in (*_PRECISION_KEYS, *MONITOR_SECTIONS, "optimizer", "scheduler"):
            config.pop(key, None)
        config["gradient_clipping"] = 0.0
        return config


def ds_config_names() -> list[str]:
    """Names of the DeepSpeed JSON files that come with the package."""
    folder = importlib.resources.files("electra_ds") / "ds_configs"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def read_deepspeed_json(name_or_path: str) -> dict[str, Any]:
    """The raw mapping of a shipped file's name or of a JSON file. Raises ConfigError."""
    names = ds_config_names()
    path = Path(name_or_path)
    if name_or_path not in names and not path.is_file():
        near = difflib.get_close_matches(path.stem, names, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ConfigError(
            f"There is no DeepSpeed JSON at {path}: neither a file nor one of {', '.join(names)}, "
            f"which are those in ds_configs/.{hint}"
        )
    try:
        if name_or_path in names:
            text = (importlib.resources.files("electra_ds") / "ds_configs" / f"{name_or_path}.json").read_text("utf8")
        else:
            text = path.read_text("utf8")
        values = json.loads(text, object_pairs_hook=_without_duplicates)
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
    document = _without_auto({key: value for key, value in values.items() if key in (*HANDED_ON, *MONITOR_SECTIONS)})
    _check_keys(values, problems)
    _check_recipe_owned(values, recipe, problems)
    _check_zero(values, problems)
    precision = _precision(values, on_cpu, problems)
    monitors = parse_monitors(values, problems)
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
        "zero_optimization": {"stage": 0},
    }
    document.setdefault("steps_per_print", 2**31 - 1)  # the progress bar reports, not DeepSpeed
    for name in _PRECISION_KEYS:
        if isinstance(values.get(name), dict) and name.replace("torch_", "") == precision.name.split("-")[0]:
            document[name] = _without_auto(values[name]) | {"enabled": True}
    return DeepSpeedPlan(document, batch, precision, monitors)


def _without_auto(values: dict[str, Any]) -> dict[str, Any]:
    """Without the values that are left to DeepSpeed's defaults."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value != "auto"
    }


def _check_keys(values: dict[str, Any], problems: list[str]) -> None:
    known = (*OWNED_BY_RECIPE, *RESOLVED_HERE, *HANDED_ON, *MONITOR_SECTIONS)
    for key in values:
        if key in INSTEAD:
            problems.append(f"{key}: {INSTEAD[key]}")
        elif key in NOT_USED:
            problems.append(f"{key}: this DeepSpeed feature is not supported here; remove the key")
        elif key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            problems.append(f"{key}: unknown key" + (f"; did you mean '{near[0]}'?" if near else ""))
        elif key in HANDED_ON and values[key] != "auto" and type(values[key]) is not HANDED_ON[key]:
            problems.append(f"{key}: {values[key]!r} is not of type {_JSON_TYPES[HANDED_ON[key]]}")
        elif key == "steps_per_print" and values[key] != "auto" and values[key] < 1:
            problems.append(f"steps_per_print: {values[key]} is not a positive whole number")


_JSON_TYPES = {dict: "object", bool: "boolean", int: "whole number", str: "string"}


def _check_recipe_owned(values: dict[str, Any], recipe: Recipe, problems: list[str]) -> None:
    optimizer, schedule = recipe.optimizer, recipe.schedule
    owners: dict[str, tuple[Any, str]] = {
        "train_batch_size": (recipe.global_batch_size, "global_batch_size"),
        "gradient_clipping": (optimizer.max_grad_norm, "optimizer.max_grad_norm"),
        "optimizer.params.lr": (optimizer.learning_rate, "optimizer.learning_rate"),
        "optimizer.params.betas": ([optimizer.beta1, optimizer.beta2], "optimizer.beta1 and beta2"),
        "optimizer.params.eps": (optimizer.epsilon, "optimizer.epsilon"),
        "optimizer.params.weight_decay": (optimizer.weight_decay, "optimizer.weight_decay"),
        "optimizer.params.torch_adam": (True, "the optimizer, which is torch's AdamW"),
        "optimizer.params.adam_w_mode": (True, "the optimizer, which is AdamW"),
        "scheduler.params.warmup_min_lr": (0, "the schedule, which starts at 0"),
        "scheduler.params.warmup_max_lr": (optimizer.learning_rate, "optimizer.learning_rate"),
        "scheduler.params.warmup_num_steps": (schedule.warmup_steps, "schedule.warmup_steps"),
        "scheduler.params.total_num_steps": (schedule.total_steps, "schedule.total_steps"),
        "scheduler.params.warmup_type": ("linear", "the schedule, which is linear"),
    }
    types = {"optimizer.type": ("Adam", "AdamW"), "scheduler.type": ("WarmupDecayLR",)}
    owned = {name: values[name] for name in OWNED_BY_RECIPE if name in values}
    for name in ("optimizer", "scheduler"):
        if name in owned and owned[name] != "auto" and not isinstance(owned[name], dict):
            problems.append(f"{name}: must be an object with type and params")
            del owned[name]
    for key, value in _flattened(owned):
        if value == "auto":
            continue
        if key in types:
            if value not in types[key]:
                problems.append(f"{key}: {value!r} is not what the recipe runs ({' or '.join(types[key])})")
        elif key not in owners:
            problems.append(f"{key}: unknown key")
        elif not _same(value, owners[key][0]):
            ours, owner = owners[key]
            problems.append(
                f'{key}: {value!r} contradicts the recipe ({owner} is {ours!r}); write "auto" or leave it out, '
                f"and change the recipe instead"
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


def _check_zero(values: dict[str, Any], problems: list[str]) -> None:
    section = values.get("zero_optimization", {})
    if not isinstance(section, dict):
        problems.append("zero_optimization: must be an object")
        return
    stage = section.get("stage", 0)
    if stage == "auto":
        problems.append('zero_optimization.stage: "auto" says nothing (DeepSpeed would take 0); write the stage')
    elif stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        problems.append(f"zero_optimization.stage: {stage!r} is not one of 0, 1, 2, 3")
    elif stage:
        problems.append(f"zero_optimization.stage: only stage 0 is supported so far, not {stage}")
    for key in section:
        if key != "stage":
            problems.append(f"zero_optimization.{key}: has no effect at stage 0; remove it")


def _precision(values: dict[str, Any], on_cpu: bool, problems: list[str]) -> Precision | None:
    enabled = []
    before = len(problems)
    for name, known in _PRECISION_KEYS.items():
        section = values.get(name, {})
        if not isinstance(section, dict):
            problems.append(f'{name}: must be an object such as {{"enabled": true}}')
            continue
        for key in section:
            if key in _WITHOUT_EFFECT:
                problems.append(f"{name}.{key}: has no effect at stage 0 here; remove it")
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
        return _autocast_precision(section, problems)
    return Precision("fp16", _loss_scaling(section, problems))


def _autocast_precision(section: dict[str, Any], problems: list[str]) -> Precision | None:
    dtype = str(section.get("dtype", "bfloat16")).removeprefix("torch.")
    if dtype in ("bfloat16", "bf16"):
        return Precision("autocast-bf16")
    if dtype in ("float16", "fp16", "half"):
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
