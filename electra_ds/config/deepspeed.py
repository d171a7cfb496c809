"""The DeepSpeed JSON: how a recipe's mathematics is run.

The file stays a real DeepSpeed config. Keys that the recipe owns (batch size, clipping, optimizer, schedule)
may be absent or "auto" and are filled in; a concrete value that contradicts the recipe is an error.
DeepSpeed itself ignores unknown top-level keys, reads `"stage": "auto"` as 0 and a missing clipping as 1.0,
so every such case is caught here first, and all problems are reported together.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import hjson

from electra_ds.config.activations import parse_activations
from electra_ds.config.inert import REMOVED, is_inert
from electra_ds.config.monitors import MONITOR_SECTIONS, Monitors, parse_monitors
from electra_ds.config.overrides import dotted_values
from electra_ds.config.precision import PRECISION_KEYS, Precision, parse_precision
from electra_ds.config.recipe import TrainingRecipe
from electra_ds.config.shipped import DS_CONFIGS, ds_config_names, shipped_text
from electra_ds.config.suggest import did_you_mean
from electra_ds.config.zero import parse_zero, without_auto
from electra_ds.errors import ConfigError

OWNED_BY_RECIPE = ("train_batch_size", "gradient_clipping", "optimizer", "scheduler")
_CUT = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
RESOLVED_HERE = (*_CUT, "zero_optimization", "fp16", "bf16", "torch_autocast", "activation_checkpointing")
HANDED_ON: dict[str, type] = {
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
    "aio", "autotuning", "bfloat16", "checkpoint", "communication_data_type", "compile",
    "data_efficiency", "data_types", "dataloader_drop_last", "datastates_ckpt",
    "disable_allgather", "expert_parallel", "gradient_allreduce_op", "gradient_predivide_factor", "hybrid_engine",
    "managed_gradient_accumulation", "pipeline", "prescale_gradients", "seq_parallel_communication_data_type",
    "tensor_parallel", "use_data_before_expert_parallelism", "weight_quantization",
)  # fmt: skip
INSTEAD = {
    "comet": "Comet is not supported; use --wandb, --tensorboard, or a csv_monitor section instead",
    "comms_logger": "it is not supported here, where nothing prints its summary; remove the key",
}


@dataclass(frozen=True)
class BatchPlan:
    """How the recipe's global batch is cut."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    world_size: int

    def cut(self, size: int) -> BatchPlan:
        """The same batch over the same ranks in other micro-batches. `size` divides each rank's share."""
        steps, rest = divmod(self.micro_batch_size * self.gradient_accumulation_steps, size)
        assert not rest
        return BatchPlan(size, steps, self.world_size)

    def others(self) -> list[BatchPlan]:
        """Every such cut, the largest micro-batch first."""
        sizes = _divisors(self.micro_batch_size * self.gradient_accumulation_steps)
        return [self.cut(size) for size in reversed(sizes)]

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
    stage: Literal[0, 1, 2, 3] = 0
    checkpointed_layers: int = 0
    """Layers of each encoder that are computed again in the backward pass, the first ones."""
    notes: tuple[str, ...] = ()
    """To be told to the user: what was read otherwise than the file says, and what the machine makes of it."""
    is_micro_batch_open: bool = field(default=False, compare=False)
    """Whether the file leaves the cut of the batch to us; until that is decided, each rank takes its share at once."""
    given_batch: dict[str, int] | None = field(default=None, compare=False)
    """Micro-batch and accumulation as far as the user gave them, by their keys in the JSON: these stay on any number of
    ranks, and the others are chosen again. None where nobody knows any more who chose them."""

    def with_micro_batch(self, size: int) -> DeepSpeedPlan:
        """The same with the batch cut otherwise. `size` divides each rank's share of it."""
        batch = self.batch.cut(size)
        document = self.document | {
            "train_micro_batch_size_per_gpu": batch.micro_batch_size,
            "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        }
        given = self.given_batch and {key: document[key] for key in self.given_batch}
        return replace(self, document=document, batch=batch, is_micro_batch_open=False, given_batch=given)

    def engine_config(self) -> dict[str, Any]:
        """What `deepspeed.initialize` is given.

        At stage 0 precision, loss scaling and clipping are left out: our optimizer does them, since DeepSpeed
        0.19.8 divides by a loss scale that it never applied (deepspeedai/DeepSpeed#8393). Autocast is left out at
        every stage: the model switches it on itself, and DeepSpeed's would leak into later engines.
        """
        config = copy.deepcopy(self.document)
        for key in ("torch_autocast", *MONITOR_SECTIONS):
            config.pop(key, None)
        if self.stage == 0:
            for key in ("fp16", "bf16"):
                config.pop(key, None)
            config["gradient_clipping"] = 0.0
        if self.stage < 3:  # our losses are normalised over all ranks; stage 3 can only average
            config["gradient_allreduce_op"] = "sum"
        if self.stage:
            config["zero_force_ds_cpu_optimizer"] = False  # offloading runs torch's AdamW, nothing is compiled
        return config


def read_deepspeed_json(name_or_path: str) -> dict[str, Any]:
    """Return the raw mapping of a shipped file, by its name, or of a JSON file.

    As in DeepSpeed itself the file may be HJSON: comments and trailing commas are allowed, and so is a byte-order
    mark. Raises ConfigError where it cannot be read, with line and column, or holds a key twice.
    """
    names = ds_config_names()
    path = Path(name_or_path)
    if name_or_path not in names and not path.is_file():
        raise ConfigError(
            f"There is no DeepSpeed JSON at {path}: neither a file nor one of {', '.join(names)}, "
            f"which are those in ds_configs/{did_you_mean(path.stem, names)}"
        )
    try:
        if name_or_path in names:
            text = shipped_text(DS_CONFIGS, name_or_path)
        else:
            text = path.read_text("utf-8-sig")
        if not text.strip():
            raise ValueError("it is empty")
        values = hjson.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a JSON object, not {type(values).__name__}.")
    return values


def with_micro_batch(values: dict[str, Any], size: int | Literal["auto"] | None) -> dict[str, Any]:
    """The raw mapping with the micro-batch of the command line, where there is one, in place of the file's."""
    return values if size is None else values | {"train_micro_batch_size_per_gpu": size, _CUT[1]: "auto"}


def cut_for(values: dict[str, Any], given: dict[str, int] | None, share: int) -> dict[str, Any]:
    """Return a run's resolved JSON with the batch left to be cut again, for another number of ranks.

    given: as `DeepSpeedPlan.given_batch`. Where that is not known, the micro-batch stays as far as it divides `share`,
    the sequences of a rank: it takes no more memory than before.
    """
    if given is None:
        before = values[_CUT[0]]
        given = {_CUT[0]: max(size for size in _divisors(share) if size <= before)}
    return values | dict.fromkeys(_CUT, "auto") | given


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"the key {', '.join(twice)} stands twice")
    return dict(pairs)


def resolve(
    values: dict[str, Any], recipe: TrainingRecipe, *, world_size: int, auto_fp16: bool, source: str
) -> DeepSpeedPlan:
    """Fill in, check and solve the batch plan. ConfigError lists every problem at once.

    auto_fp16: what `"fp16": {"enabled": "auto"}` means on the device, see `runtime.wants_fp16`.
    """
    problems: list[str] = []
    document = without_auto({key: value for key, value in values.items() if key in (*HANDED_ON, *MONITOR_SECTIONS)})
    notes: list[str] = []
    inert = _check_keys(values, problems)
    _check_recipe_owned(values, recipe, problems, notes)
    zero = parse_zero(values, problems, inert)
    precision = parse_precision(values, zero["stage"], auto_fp16, problems, notes)
    if inert:
        notes.append(f"left out, since nothing depends on it here: {', '.join(inert)}")
    monitors = parse_monitors(values, problems)
    checkpointed_layers = parse_activations(values, recipe.num_hidden_layers, problems, notes)
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
    if checkpointed_layers:
        document["activation_checkpointing"] = {"number_checkpoints": checkpointed_layers}
    for name in PRECISION_KEYS:
        if isinstance(values.get(name), dict) and name.replace("torch_", "") == precision.name.split("-")[0]:
            known = {key: value for key, value in values[name].items() if key in PRECISION_KEYS[name]}
            document[name] = without_auto(known) | {"enabled": True}
    given = {key: values[key] for key in _CUT if values.get(key, "auto") != "auto"}
    return DeepSpeedPlan(
        document, batch, precision, monitors, zero["stage"], checkpointed_layers, tuple(notes), not given, given
    )


def _check_keys(values: dict[str, Any], problems: list[str]) -> list[str]:
    """Return the keys that change nothing."""
    known = (*OWNED_BY_RECIPE, *RESOLVED_HERE, *HANDED_ON, *MONITOR_SECTIONS)
    inert = []
    for key in values:
        if key in (*INSTEAD, *NOT_USED, *REMOVED) and is_inert(key, values[key]):
            inert.append(key)
        elif key in INSTEAD:
            problems.append(f"{key}: {INSTEAD[key]}")
        elif key in REMOVED:
            problems.append(f"{key}: DeepSpeed 0.19 no longer has this feature; remove the key")
        elif key in NOT_USED:
            problems.append(f"{key}: this DeepSpeed feature is not supported here; remove the key")
        elif key not in known:
            problems.append(f"{key}: unknown key{did_you_mean(key, known)}")
        elif key in HANDED_ON and values[key] != "auto" and type(values[key]) is not HANDED_ON[key]:
            problems.append(f"{key}: {values[key]!r} is not of type {_JSON_TYPES[HANDED_ON[key]]}")
        elif key == "log_level" and values[key] != "auto" and values[key] not in _LOG_LEVELS:
            problems.append(f"log_level: {values[key]!r} is not one of {', '.join(_LOG_LEVELS)}")
        elif key == "steps_per_print" and values[key] != "auto" and values[key] < 1:
            problems.append(f"steps_per_print: {values[key]} is not a positive whole number")
    profiler = values.get("flops_profiler")
    for key, value in profiler.items() if isinstance(profiler, dict) else ():
        if key not in _FLOPS_PROFILER:
            problems.append(f"flops_profiler.{key}: unknown key")
        elif value != "auto" and type(value) not in _FLOPS_PROFILER[key]:
            problems.append(f"flops_profiler.{key}: {value!r} is of the wrong type")
    return inert


_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
_FLOPS_PROFILER: dict[str, tuple[type, ...]] = {
    "enabled": (bool,), "recompute_fwd_factor": (int, float), "profile_step": (int,), "module_depth": (int,),
    "top_modules": (int,), "detailed": (bool,), "output_file": (str, type(None)),
}  # fmt: skip
_JSON_TYPES = {dict: "object", bool: "boolean", int: "whole number", str: "string"}


def _check_recipe_owned(values: dict[str, Any], recipe: TrainingRecipe, problems: list[str], notes: list[str]) -> None:
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
    for key, value in dotted_values(owned):
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


def _check_scheduler(section: dict[str, Any], recipe: TrainingRecipe, problems: list[str], notes: list[str]) -> None:
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


def _divisors(number: int) -> list[int]:
    """Ascending."""
    low = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*low, *(number // size for size in low)})


def _same(value: Any, ours: Any) -> bool:
    if isinstance(ours, list):
        return isinstance(value, list) and len(value) == len(ours) and all(map(_same, value, ours))
    if isinstance(ours, (bool, str)) or isinstance(value, bool):
        return bool(value == ours)
    return isinstance(value, (int, float)) and abs(value - ours) <= 1e-12 * abs(ours)


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
        nearest = min(_divisors(per_rank), key=lambda size: abs(size - micro))
        problems.append(
            f"train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps {accumulation} x {world_size} "
            f"rank(s) is {micro * accumulation * world_size}, but global_batch_size (recipe) is {global_batch}. "
            f'Give --micro-batch {nearest}, or write micro-batch {nearest} and accumulation "auto" in the JSON'
        )
        return None
    return BatchPlan(micro, accumulation, world_size)
