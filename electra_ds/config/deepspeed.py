"""The DeepSpeed JSON, which decides how a recipe's mathematics is run.

The file stays a real DeepSpeed config. Keys that the recipe owns (batch size, clipping, optimizer, schedule)
may be absent or "auto" and are filled in; a concrete value that contradicts the recipe is an error.
DeepSpeed itself ignores unknown top-level keys, reads `"stage": "auto"` as 0 and a missing clipping as 1.0,
so this module catches every such case first and reports all problems together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import hjson

from electra_ds.config.cards import Card
from electra_ds.config.deepspeed_keys import (
    KNOWN,
    NEVER,
    UNUSED,
    Findings,
    check_recipe_owned,
    is_comment,
    normalize_spelling,
    parse_passed_through,
)
from electra_ds.config.deepspeed_sections import (
    PRECISION_KEYS,
    Precision,
    parse_activations,
    parse_precision,
    parse_zero,
    without_auto,
)
from electra_ds.config.monitors import MONITOR_SECTIONS, Monitors, parse_monitors
from electra_ds.config.names import DS_CONFIGS, ds_config_names, shipped_text
from electra_ds.config.sections import TrainingRecipe
from electra_ds.core.errors import ConfigError, did_you_mean

_ANY_GPU = {"fp16": {"enabled": "auto"}, "zero_optimization": {"stage": 0}}
_CUT = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@dataclass(frozen=True)
class BatchPlan:
    """The division of the recipe's global batch into micro-batches, accumulation steps and ranks."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    world_size: int

    def with_micro_batch(self, size: int) -> BatchPlan:
        """Return the plan with micro-batches of another size, which must divide each rank's share."""
        steps, rest = divmod(self.micro_batch_size * self.gradient_accumulation_steps, size)
        assert not rest
        return BatchPlan(size, steps, self.world_size)

    def alternatives(self) -> list[BatchPlan]:
        """Return this plan with each possible micro-batch size, largest first."""
        sizes = _divisors(self.micro_batch_size * self.gradient_accumulation_steps)
        return [self.with_micro_batch(size) for size in reversed(sizes)]

    def __str__(self) -> str:
        return f"{self.micro_batch_size} x {self.gradient_accumulation_steps} x {self.world_size} rank(s)"


@dataclass(frozen=True)
class DeepSpeedPlan:
    """A DeepSpeed JSON resolved against a recipe and a world size."""

    document: dict[str, Any]
    """The resolved JSON, in which every value is concrete."""
    batch: BatchPlan
    precision: Precision
    monitors: Monitors
    stage: Literal[0, 1, 2, 3] = 0
    checkpointed_layers: int = 0
    """The number of layers of each encoder, from the first, that the backward pass recomputes."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how the file was interpreted."""
    is_micro_batch_open: bool = field(default=False, compare=False)
    """True if the file leaves the micro-batch open; until it is chosen, each rank's share is one micro-batch."""
    given_batch: dict[str, int] | None = field(default=None, compare=False)
    """The micro-batch and accumulation that the user gave, by their keys in the JSON. They stay the same on any number
    of ranks, and the missing ones are chosen again. None if it is unknown who chose them."""

    def with_micro_batch(self, size: int) -> DeepSpeedPlan:
        """Return the plan with micro-batches of another size, which must divide each rank's share."""
        batch = self.batch.with_micro_batch(size)
        document = self.document | {
            "train_micro_batch_size_per_gpu": batch.micro_batch_size,
            "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        }
        given = self.given_batch and {key: document[key] for key in self.given_batch}
        return replace(self, document=document, batch=batch, is_micro_batch_open=False, given_batch=given)

    def with_largest_micro_batch(self, fits: Callable[[DeepSpeedPlan], bool]) -> DeepSpeedPlan | None:
        """Return the plan with the largest micro-batch that fits; None if not even one sequence does."""
        candidates = (self.with_micro_batch(batch.micro_batch_size) for batch in self.batch.alternatives())
        return next(filter(fits, candidates), None)

    def with_smaller_micro_batch(self) -> DeepSpeedPlan | None:
        """Return the plan with half the micro-batch, or the next smaller one that divides the batch; None at 1."""
        most = self.batch.micro_batch_size // 2
        return self.with_largest_micro_batch(lambda plan: plan.batch.micro_batch_size <= most)

    def engine_config(self) -> dict[str, Any]:
        """Return the configuration for `deepspeed.initialize`.

        At stage 0 precision, loss scaling and clipping are left out and done by our optimizer, since DeepSpeed
        0.19.8 divides by a loss scale that it never applied (deepspeedai/DeepSpeed#8393). Autocast is left out at
        every stage: the model enables it itself, and DeepSpeed's would leak into later engines.
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
            config["zero_force_ds_cpu_optimizer"] = False  # offloading uses torch's AdamW, so nothing is compiled
            config["zero_allow_untested_optimizer"] = True  # a recipe's own update rule
        return config


def read_deepspeed_json(name_or_path: str) -> dict[str, Any]:
    """Return the raw mapping of a shipped file, given by name, or of a JSON file.

    As in DeepSpeed, the file may be HJSON: comments and trailing commas are allowed, and so is a byte-order mark.
    Raises ConfigError if the file cannot be read, with line and column, or contains a key twice.
    """
    names = ds_config_names()
    path = Path(name_or_path)
    if name_or_path not in names and not path.is_file():
        raise ConfigError(
            f"There is no DeepSpeed JSON {path}: it is neither a file nor one of the shipped {', '.join(names)} "
            f"in ds_configs/{did_you_mean(path.stem, names)}"
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


def default_ds_config(has_gpu: bool, card: Card | None) -> tuple[dict[str, Any], str]:
    """Return the DeepSpeed JSON to use if the user gives none, and its name. card: None for an unknown GPU."""
    if not has_gpu:
        return read_deepspeed_json("cpu"), "cpu"
    if card is not None and card.ds_config is not None:
        return read_deepspeed_json(card.ds_config), card.ds_config
    return _ANY_GPU, "the default JSON for any GPU"


def with_micro_batch(values: dict[str, Any], size: int | Literal["auto"] | None) -> dict[str, Any]:
    """Return the raw mapping with the command line's micro-batch, if any, in place of the file's."""
    return values if size is None else values | {"train_micro_batch_size_per_gpu": size, _CUT[1]: "auto"}


def cut_for(values: dict[str, Any], given: dict[str, int] | None, share: int) -> dict[str, Any]:
    """Return a run's resolved JSON with the batch left open, to be planned again for another number of ranks.

    given: as `DeepSpeedPlan.given_batch`. If unknown, the micro-batch becomes the largest one that divides `share`, a
    rank's sequences, and is no larger than before, so that it needs no more memory.
    """
    if given is None:
        before = values[_CUT[0]]
        given = {_CUT[0]: max(size for size in _divisors(share) if size <= before)}
    return values | dict.fromkeys(_CUT, "auto") | given


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs if not is_comment(key)]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"the key {', '.join(twice)} appears twice")
    return dict(pairs)


def resolve(
    values: dict[str, Any], recipe: TrainingRecipe, *, world_size: int, auto_fp16: bool, source: str
) -> DeepSpeedPlan:
    """Check a DeepSpeed JSON against a recipe and fill in what it leaves open. ConfigError lists every problem.

    auto_fp16: the meaning of `"fp16": {"enabled": "auto"}` on the device, see `wants_fp16`.
    """
    found = Findings()
    values = normalize_spelling(values, found)
    for key, value in values.items():
        if key not in KNOWN:
            UNUSED.check(key, key, value, KNOWN, found)
    check_recipe_owned(values, recipe, found)
    zero = parse_zero(values, found)
    precision = parse_precision(values, zero["stage"], auto_fp16, found)
    if found.inert:
        found.notes.append(f"left out, because it has no effect here: {', '.join(found.inert)}")
    monitors = parse_monitors(values, found.problems)
    checkpointed_layers = parse_activations(values, recipe.num_hidden_layers, found)
    document = parse_passed_through(values, found)
    document |= {key: values[key] for key in MONITOR_SECTIONS if key in values}
    batch = _batch_plan(values, recipe.global_batch_size, world_size, found)
    if found.problems:
        raise ConfigError(f"{source} cannot be used with recipe {recipe.name}:\n  " + "\n  ".join(found.problems))
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
        document, batch, precision, monitors, zero["stage"], checkpointed_layers, tuple(found.notes), not given, given
    )


def _divisors(number: int) -> list[int]:
    """Return the divisors of a number in ascending order."""
    low = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*low, *(number // size for size in low)})


def _batch_plan(values: dict[str, Any], global_batch: int, world_size: int, found: Findings) -> BatchPlan | None:
    """Solve micro-batch x accumulation x ranks = global batch. With neither given, accumulation is 1."""

    def given(key: str) -> int | None:
        value = values.get(key, "auto")
        if value == "auto":
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            found.problems.append(f"{key}: {value!r} is not a positive whole number")
        return value

    before = len(found.problems)
    micro, accumulation = given("train_micro_batch_size_per_gpu"), given("gradient_accumulation_steps")
    if len(found.problems) > before:
        return None
    per_rank, rest = divmod(global_batch, world_size)
    if rest:
        found.problems.append(f"global_batch_size {global_batch} (recipe) cannot be split over {world_size} ranks")
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
        found.problems.append(
            f"train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps {accumulation} x {world_size} "
            f"rank(s) is {micro * accumulation * world_size}, but global_batch_size (recipe) is {global_batch}. "
            f'Give --micro-batch {nearest}, or write micro-batch {nearest} and accumulation "auto" in the JSON'
        )
        return None
    return BatchPlan(micro, accumulation, world_size)
