"""The sections of a sweep's file: the commands of its trials, what varies, and the resources. Imports no torch or Ray.

A stage names the options of a command, as on its command line, and what varies over its trials:

    finetune:
      recipe: rc2020
      data_dir: glue/
      set: {schedule.epochs: 5}
      space:
        task: {grid: [mrpc, sts-b]}
        optimizer.learning_rate: {loguniform: [1e-5, 1e-3]}
      seeds: [0, 1, 2, 3, 4]

`sweep_file.py` reads such a file and checks more than its types.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_serializer, model_validator

from electra_ds.config.sections import Section
from electra_ds.core.errors import did_you_mean

STAGES = ("pretrain", "finetune")
Value = Any
"""A scalar or a list, as YAML has it."""
_LISTS = ("grid", "choice")
_RANGES = {
    "uniform": ("two numbers, the second greater", "[0.0, 0.3]"),
    "loguniform": ("two numbers above 0, the second greater", "[1e-5, 1e-3]"),
    "quniform": ("two multiples of a third number, and that number", "[0.0, 0.3, 0.1]"),
    "randint": ("two integers, the second greater", "[8, 33]"),
}
"""The values that each kind of domain takes, and an example."""
DOMAINS = (*_LISTS, *_RANGES)


def _unique(values: list[Value]) -> list[Value]:
    if twice := [each for index, each in enumerate(values) if each in values[:index]]:
        raise ValueError(f"{twice[0]!r} is listed twice; leave one out")
    return values


_Share = Annotated[float, Field(strict=True, gt=0, le=1)]
_Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
_VariantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_+-]*$")]


class Domain(Section):
    """The values of one key, in Ray Tune's terms. In a file, a mapping from the kind to its values."""

    kind: str
    values: list[Value]
    """The values to choose from, or the bounds of a range."""

    @model_validator(mode="before")
    @classmethod
    def _of_mapping(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            raise ValueError(f"{given!r} does not vary; write it under set, next to space, or as {{grid: [...]}}")
        kind = str(next(iter(given), ""))
        if len(given) != 1 or kind not in DOMAINS:
            names = ", ".join(map(str, given)) or "nothing"
            known = did_you_mean(kind, DOMAINS) or "."
            if kind == "sample":
                raise ValueError("sample is no longer a domain; write combinations of values under variants")
            raise ValueError(f"{names} is not a domain{known} Write one of {', '.join(DOMAINS)}, such as grid: [1, 2]")
        if not isinstance(given[kind], list):
            raise ValueError(f"{kind} takes a list, such as {kind}: [1, 2], not {given[kind]!r}")
        return {"kind": kind, "values": given[kind]}

    @model_serializer
    def _as_mapping(self) -> dict[str, list[Value]]:
        return {self.kind: list(self.values)}

    @model_validator(mode="after")
    def _check_values(self) -> Domain:
        if self.kind in _RANGES:
            if not self._is_range():
                what, example = _RANGES[self.kind]
                raise ValueError(f"{self.kind} takes {what}, such as {self.kind}: {example}, not {self.values}")
            return self
        if not self.values:
            raise ValueError(f"the {self.kind} is empty, so there is nothing to run; add values")
        if any(isinstance(each, Mapping) for each in self.values):
            raise ValueError(f"a {self.kind} holds plain values; write settings that go together under variants")
        _unique(self.values)
        return self

    def _is_range(self) -> bool:
        kinds = (int,) if self.kind == "randint" else (int, float)
        if len(self.values) != (3 if self.kind == "quniform" else 2):
            return False
        if not all(type(each) in kinds and math.isfinite(each) for each in self.values):
            return False
        low, high, *quanta = self.values
        if any(quantum <= 0 for quantum in quanta) or low >= high:
            return False
        multiples = [bound / quantum for quantum in quanta for bound in (low, high)]
        return all(math.isclose(each, round(each)) for each in multiples) and (low > 0 or self.kind != "loguniform")

    @property
    def is_random(self) -> bool:
        return self.kind != "grid"

    def at(self, share: float) -> Value:
        """Return the quantile of a random domain at `share`, which is at least 0 and below 1.

        Numbers have six digits, as on the command line. `randint` excludes its upper bound.
        """
        if self.kind == "choice":
            return self.values[int(share * len(self.values))]
        low, high = self.values[:2]
        if self.kind == "randint":
            return low + min(int(share * (high - low)), high - low - 1)
        if self.kind == "quniform":
            quantum = self.values[2]
            value = float(f"{round((low + share * (high - low)) / quantum) * quantum:.12g}")
        elif self.kind == "loguniform":
            value = float(f"{math.exp(math.log(low) + share * (math.log(high) - math.log(low))):.6g}")
        else:
            value = float(f"{low + share * (high - low):.6g}")
        return float(min(max(low, value), high))

    def ends(self) -> list[Value]:
        """Return representative values, which can be validated before anything is drawn."""
        if self.kind == "randint":
            return [self.values[0], self.values[1] - 1]
        return self.values if self.kind in _LISTS else self.values[:2]


class Stage(Section):
    """The trials of one command. Any other key is one of its options, such as `recipe` or `data_dir`."""

    model_config = ConfigDict(extra="allow")

    set: dict[str, Any] = Field(default={})
    """The recipe's dotted keys that are the same in every trial."""
    space: dict[str, Domain] = Field(default={})
    """The keys that vary, each with a domain such as `grid: [1, 2]`: dotted keys of the recipe, or options."""
    variants: dict[_VariantName, dict[str, Any]] = Field(default={})
    """Settings that go together, by the name that tables show. Every variant is run."""
    seeds: Annotated[list[_Seed], AfterValidator(_unique)] = Field(default=[0], min_length=1)

    @property
    def options(self) -> dict[str, Any]:
        """The command's options that are the same in every trial."""
        return dict(self.model_extra or {})


class PretrainStage(Stage):
    stop_at_share: _Share | None = None
    """Every trial ends at this share of its schedule, whose length does not change."""
    checkpoints: Annotated[list[_Share], AfterValidator(_unique)] = Field(default=[])
    """Shares of the schedule whose checkpoints are kept and finetuned. None: only the last one."""
    stop_on_collapse: bool = False
    """End a trial once its training has collapsed."""


class Search(Section):
    kind: Literal["random", "optuna"] = "random"
    """The source of values outside grids: random draws, or suggestions by Optuna, which learns from the scores."""
    samples: int = Field(default=1, ge=1, le=100_000)
    """The number of random draws. Each is used for every cell of the grid and every seed."""
    seed: int = Field(default=0, ge=0, lt=2**63)


class Metric(Section):
    name: str
    """A metric in metrics.jsonl, such as `discriminator_auc` or `spearman`. `score` is a finetuning's first metric."""
    mode: Literal["max", "min"] = "max"


class Scheduler(Section):
    kind: Literal["asha", "median"]
    grace_steps: int = Field(default=1, ge=1)
    """The number of steps that every trial gets before it may be ended."""
    reduction_factor: float = Field(default=4.0, gt=1)
    """For ASHA: one in this many trials continues from each rung to the next."""


class Resources(Section):
    """The resources of one trial."""

    workers: int = Field(default=1, ge=1, le=4096)
    """The number of ranks."""
    cpus: int = Field(default=1, ge=1)
    """The number of CPUs, and so of threads, of each worker."""
    gpus: float = Field(default=0.0, ge=0)
    """The number of GPUs of each worker. Below 1, several trials share a card, and its memory must hold them all."""

    @model_validator(mode="after")
    def _is_countable(self) -> Resources:
        if self.gpus > 1:
            raise ValueError(f"gpus {self.gpus:g} is more than the one GPU that a worker uses; raise workers")
        if self.workers > 1 and 0 < self.gpus < 1:
            raise ValueError(f"gpus {self.gpus:g} of {self.workers} workers would share a GPU; each needs its own")
        return self


class SweepSpec(Section):
    """A sweep, as `parse_sweep` returns it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")
    description: str = ""
    pretrain: PretrainStage | None = None
    finetune: Stage | None = None
    """It finetunes the encoder of each trial of `pretrain` if there is one, else `model`."""
    search: Search = Search()
    metric: Metric | None = None
    """The metric that a scheduler, Optuna and the order of the table use."""
    scheduler: Scheduler | None = None
    resources: Resources = Resources()
    retries: int = Field(default=2, ge=0)
    """The number of times a killed trial is resumed. A trial that fails by itself is not resumed."""

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages of this sweep, in the order they run."""
        return {name: stage for name in STAGES if (stage := getattr(self, name)) is not None}

    @property
    def last_stage(self) -> str:
        """The name of the stage to which a scheduler, Optuna and the metric apply."""
        return list(self.stages)[-1]

    @property
    def is_suggested(self) -> bool:
        """True if Optuna suggests the trials."""
        return self.search.kind == "optuna"
