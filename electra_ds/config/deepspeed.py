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
from electra_ds.config.handed_on import HANDED_ON, NEVER, parse_handed_on
from electra_ds.config.inert import REMOVED, UNREAD, is_inert
from electra_ds.config.monitors import MONITOR_SECTIONS, Monitors, parse_monitors
from electra_ds.config.precision import PRECISION_KEYS, Precision, parse_precision
from electra_ds.config.recipe import TrainingRecipe
from electra_ds.config.recipe_owned import OWNED_BY_RECIPE, check_recipe_owned
from electra_ds.config.shipped import DS_CONFIGS, ds_config_names, shipped_text
from electra_ds.config.spelling import as_read, is_comment
from electra_ds.config.zero import parse_zero, without_auto
from electra_ds.core.errors import ConfigError, did_you_mean

_CUT = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
RESOLVED_HERE = (*_CUT, "zero_optimization", "fp16", "bf16", "torch_autocast", "activation_checkpointing")
NOT_USED = (
    "aio", "allgather_size", "autotuning", "checkpoint", "communication_data_type", "compile",
    "data_efficiency", "data_types", "dataloader_drop_last", "datastates_ckpt",
    "disable_allgather", "expert_parallel", "gradient_allreduce_op", "gradient_predivide_factor", "hybrid_engine",
    "managed_gradient_accumulation", "pipeline", "prescale_gradients", "seq_parallel_communication_data_type",
    "sequence_parallel_size", "tensor_parallel", "use_data_before_expert_parallelism", "vocabulary_size",
    "weight_quantization", "zero_force_ds_cpu_optimizer",
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
    mark. Raises ConfigError if it cannot be read, with line and column, or holds a key twice.
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
    keys = [key for key, _ in pairs if not is_comment(key)]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"the key {', '.join(twice)} stands twice")
    return dict(pairs)


def resolve(
    values: dict[str, Any], recipe: TrainingRecipe, *, world_size: int, auto_fp16: bool, source: str
) -> DeepSpeedPlan:
    """Fill in, check and solve the batch plan. ConfigError lists every problem at once.

    auto_fp16: what `"fp16": {"enabled": "auto"}` means on the device, see `wants_fp16`.
    """
    problems: list[str] = []
    notes: list[str] = []
    values = as_read(values, problems, notes)
    inert = _check_keys(values, problems)
    check_recipe_owned(values, recipe, problems, notes)
    zero = parse_zero(values, problems, notes, inert)
    precision = parse_precision(values, zero["stage"], auto_fp16, problems, notes)
    if inert:
        notes.append(f"left out, since nothing depends on it here: {', '.join(inert)}")
    monitors = parse_monitors(values, problems)
    checkpointed_layers = parse_activations(values, recipe.num_hidden_layers, problems, notes)
    document = parse_handed_on(values, problems, notes)
    document |= {key: values[key] for key in MONITOR_SECTIONS if key in values}
    batch = _batch_plan(values, recipe.global_batch_size, world_size, problems)
    if problems:
        raise ConfigError(f"{source} cannot be used with recipe {recipe.name}:\n  " + "\n  ".join(problems))
    assert precision is not None
    assert batch is not None
    document = without_auto(document) | {
        "train_batch_size": recipe.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "gradient_clipping": recipe.optimizer.max_grad_norm,
        "zero_optimization": zero,
    }
    document.setdefault("steps_per_print", NEVER)
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
        if key in (*INSTEAD, *NOT_USED, *REMOVED, *UNREAD) and is_inert(key, values[key]):
            inert.append(key)
        elif key in INSTEAD:
            problems.append(f"{key}: {INSTEAD[key]}")
        elif key in (*REMOVED, *UNREAD):
            problems.append(f"{key}: DeepSpeed 0.19 no longer has this feature; remove the key")
        elif key in NOT_USED:
            problems.append(f"{key}: this DeepSpeed feature is not supported here; remove the key")
        elif key not in known:
            problems.append(f"{key}: unknown key, which DeepSpeed would ignore{did_you_mean(key, known)}")
    return inert


def _divisors(number: int) -> list[int]:
    """Ascending."""
    low = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*low, *(number // size for size in low)})


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
