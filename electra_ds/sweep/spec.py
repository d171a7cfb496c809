"""A sweep's file: what its trials run, what varies, and what one trial gets. No torch and no Ray here.

A stage is a command by its options' names, as on its command line, and what varies over its trials:

    finetune:
      recipe: rc2020
      data_dir: glue/
      set: {schedule.epochs: 5}
      space:
        task: {grid: [mrpc, sts-b]}
        optimizer.learning_rate: {loguniform: [1e-5, 1e-3]}
      seeds: [0, 1, 2, 3, 4]
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BeforeValidator, ConfigDict, Field, model_serializer, model_validator

from electra_ds.config.overrides import parse_value
from electra_ds.config.recipe import Section, load_yaml
from electra_ds.config.shipped import SWEEPS, shipped_names, shipped_text
from electra_ds.core.errors import ConfigError, did_you_mean
from electra_ds.sweep.options import (
    INSTEAD,
    NAMED,
    OPTIONS,
    full_path,
    key_problem,
    metrics_of,
    nearest,
    recipe_keys,
    value_problem,
    with_folder,
)

STAGES = ("pretrain", "finetune")
_MOST_PROBLEMS = 10
_PLAINLY = {"missing": "is missing", "too_short": "is empty", "list_type": "must be a list, in brackets"}
"""Messages in place of pydantic's."""
_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*")

Change = Callable[[str, str, Any], Any]
"""A function from (stage, option, its value) to another value."""


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {value}")
    return value


# --- what varies: `{loguniform: [1e-5, 1e-3]}`

Value = Any
"""A scalar or a list, as YAML has it."""
_LISTS = ("grid", "choice")
_BOUNDS = {
    "uniform": "[0.0, 0.3]", "loguniform": "[1e-5, 1e-3]", "quniform": "[0.0, 0.3, 0.1]", "randint": "[8, 33]",
}  # fmt: skip
KINDS = (*_LISTS, *_BOUNDS)


class Domain(Section):
    """The values of one key; in a file, a mapping from the kind to its values."""

    kind: str
    values: list[Value]
    """The values to choose from, or the bounds of a range."""

    @model_validator(mode="before")
    @classmethod
    def _of_mapping(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            raise ValueError(f"{given!r} does not vary; write it under set, next to space, or as {{grid: [...]}}")
        kind = str(next(iter(given), ""))
        if kind == "sample":
            raise ValueError("sample, an expression of other values, was removed; write the combinations as variants")
        if len(given) != 1 or kind not in KINDS:
            names = ", ".join(map(str, given)) or "nothing"
            known = did_you_mean(kind, KINDS) or "."
            raise ValueError(f"{names} is no domain{known} Write one of {', '.join(KINDS)}, such as grid: [1, 2]")
        if not isinstance(given[kind], list):
            example = _BOUNDS.get(kind, "[1, 2]")
            raise ValueError(f"{kind} takes a list, such as {kind}: {example}, and not {given[kind]!r}")
        return {"kind": kind, "values": given[kind]}

    @model_serializer
    def _as_mapping(self) -> dict[str, list[Value]]:
        return {self.kind: list(self.values)}

    @model_validator(mode="after")
    def _is_sound(self) -> Domain:
        check = _check_list if self.kind in _LISTS else _check_bounds
        check(self.kind, self.values)
        return self

    @property
    def is_random(self) -> bool:
        return self.kind != "grid"

    def at(self, share: float) -> Value:
        """Return the value of a random domain below which `share`, from 0 to below 1, of its values lie.

        Numbers have six digits, which are what a command line shows of them. `randint` leaves its upper bound out.
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
        """Return values that stand for all: what can be validated before anything is drawn."""
        if self.kind == "randint":
            return [self.values[0], self.values[1] - 1]
        return self.values if self.kind in _LISTS else self.values[:2]


def _check_list(kind: str, given: list[Value]) -> None:
    if not given:
        raise ValueError(f"the {kind} is empty, so there is nothing to run; write values into it")
    if twice := [each for index, each in enumerate(given) if each in given[:index]]:
        raise ValueError(f"{twice[0]!r} is listed twice in the {kind}; leave one out")
    if any(isinstance(each, Mapping) for each in given):
        raise ValueError(f"a {kind} holds plain values; write settings that go together under variants")


def _check_bounds(kind: str, given: list[Value]) -> None:
    count = 3 if kind == "quniform" else 2
    kinds = (int,) if kind == "randint" else (int, float)
    if len(given) != count or not all(type(each) in kinds and math.isfinite(each) for each in given):
        what = "whole numbers" if kind == "randint" else "numbers"
        raise ValueError(f"{kind} takes {count} {what}, such as {kind}: {_BOUNDS[kind]}, and not {given}")
    low, high, *quantum = given
    if not low < high:
        raise ValueError(f"{kind} goes from {low} to {high}, and the second must be greater")
    if kind == "loguniform" and low <= 0:
        raise ValueError(f"loguniform begins at {low}, and only numbers above 0 have a logarithm")
    if quantum and not 0 < quantum[0] <= high - low:
        raise ValueError(f"quniform's steps of {quantum[0]} do not lie between 0 and {high - low:g}")
    if quantum and not all(math.isclose(bound / quantum[0], round(bound / quantum[0])) for bound in (low, high)):
        raise ValueError(f"quniform's bounds {low} and {high} are no multiples of its steps of {quantum[0]}")


# --- the sections

_Share = Annotated[float, BeforeValidator(_no_boolean), Field(gt=0, le=1)]


class Stage(Section):
    """Trials of one command. Any other key is one of its options: `recipe`, `data_dir`, `max_train_examples`."""

    model_config = ConfigDict(extra="allow")

    set: dict[str, Any] = Field(default={})
    """The recipe's dotted keys that are the same in every trial."""
    space: dict[str, Domain] = Field(default={})
    """The keys that vary, dotted keys of the recipe or options, each with a domain such as `grid: [1, 2]`."""
    variants: dict[str, dict[str, Any]] = Field(default={})
    """Settings that go together, by a name for tables; every variant is run."""
    seeds: list[Annotated[int, Field(strict=True, ge=0, lt=2**63)]] = Field(default=[0], min_length=1)

    @property
    def options(self) -> dict[str, Any]:
        """The command's options that are the same in every trial."""
        return dict(self.model_extra or {})

    @property
    def is_random(self) -> bool:
        """True if values are drawn at random."""
        return any(domain.is_random for domain in self.space.values())


class PretrainStage(Stage):
    stop_at_share: _Share | None = None
    """Every trial ends at this share of its schedule, which stays as long as it is."""
    checkpoints: list[_Share] = Field(default=[])
    """Shares of the schedule; the checkpoints there are kept and each of them finetuned. None: the last alone."""
    stop_on_collapse: bool = False
    """End a trial once its discriminator has collapsed."""


class FinetuneStage(Stage):
    pass


class Search(Section):
    kind: Literal["random", "optuna"] = "random"
    """The source of values that are no grid: drawn at random, or suggested by Optuna, which learns from the scores."""
    samples: int = Field(default=1, ge=1, le=100_000)
    """How many times random values are drawn, each for every cell of the grid and every seed."""
    seed: int = Field(default=0, ge=0, lt=2**63)


class Metric(Section):
    name: str
    """A number of an evaluation in metrics.jsonl: `discriminator_auc`, `spearman`. `score` is a finetuning's first."""
    mode: Literal["max", "min"] = "max"


class Scheduler(Section):
    kind: Literal["asha", "median"]
    grace_steps: int = Field(default=1, ge=1)
    """Steps that every trial gets before it may be ended."""
    reduction_factor: float = Field(default=4.0, gt=1)
    """ASHA: one in so many continues from each rung to the next."""


class Resources(Section):
    """The resources of one trial."""

    workers: int = Field(default=1, ge=1, le=4096)
    """Ranks of its DeepSpeed world."""
    cpus: int = Field(default=1, ge=1)
    """CPUs of each worker, which are its threads."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of each worker; below 1 several trials share a card, whose memory must do for all of them."""

    @model_validator(mode="after")
    def _is_countable(self) -> Resources:
        if 0 < self.gpus < 0.01:
            raise ValueError(f"gpus {self.gpus:g} would have more than 100 trials share a GPU")
        if self.gpus > 1:
            raise ValueError(f"gpus {self.gpus:g} is more than the one GPU that a worker uses; raise workers")
        if self.workers > 1 and 0 < self.gpus < 1:
            raise ValueError(f"gpus {self.gpus:g} of {self.workers} workers would share a GPU; each needs its own")
        return self


class SweepSpec(Section):
    """A sweep as `parse_sweep` makes it, which checks more than the types."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")
    description: str = ""
    pretrain: PretrainStage | None = None
    finetune: FinetuneStage | None = None
    """After `pretrain` it finetunes the encoder of each of its trials, else `model`."""
    search: Search = Search()
    metric: Metric | None = None
    """The metric by which a scheduler, Optuna and the order of the table go."""
    scheduler: Scheduler | None = None
    resources: Resources = Resources()
    retries: int = Field(default=2, ge=0)
    """How often a trial that was killed is resumed. One that fails by itself is not."""

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages of this sweep, in the order they run."""
        return {name: stage for name in STAGES if (stage := getattr(self, name)) is not None}

    @property
    def last_stage(self) -> str:
        """The name of the stage that a scheduler, Optuna and the metric are about."""
        return list(self.stages)[-1]

    @property
    def is_suggested(self) -> bool:
        """True if Optuna suggests the trials."""
        return self.search.kind == "optuna"

    def with_options(self, change: Change) -> SweepSpec:
        """Return the sweep with every value of its commands' options changed, wherever it stands."""
        return SweepSpec.model_validate(_with_options(self.model_dump(), change))


def load_sweep(name_or_path: str, overrides: Sequence[str] = ()) -> SweepSpec:
    """Return a shipped sweep or one from a file, with `finetune.seeds=[0, 1]` and the like applied.

    Raises ConfigError, which lists every problem.
    """
    names = shipped_names(SWEEPS)
    if name_or_path in names:
        text = shipped_text(SWEEPS, name_or_path)
    else:
        try:
            text = Path(name_or_path).read_text("utf8")
        except FileNotFoundError:
            raise ConfigError(
                f"There is no sweep '{name_or_path}': neither a file nor one of {', '.join(names)}"
                f"{did_you_mean(name_or_path, names)}"
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"Cannot read the sweep {name_or_path}: {error}") from error
    values = load_yaml(text, f"The sweep {name_or_path}")
    if not isinstance(values, dict):
        raise ConfigError(f"The sweep {name_or_path} must be a mapping, not {type(values).__name__}.")
    values = _with_options(values, partial(with_folder, Path(name_or_path).parent))
    for override in overrides:
        _put(values, override)
    return parse_sweep(values, name_or_path)


def parse_sweep(values: dict[str, Any], source: str) -> SweepSpec:
    """Return a sweep from a raw mapping, its paths in full. Raises ConfigError, which lists every problem with its
    key."""
    values = _with_options(values, full_path)
    spec, problems = None, []
    try:
        spec = SweepSpec.model_validate(values)
    except pydantic.ValidationError as error:
        problems = _problems(error)
    for name in STAGES:
        if isinstance(values.get(name), dict):
            problems += _stage_problems(name, values[name])
    if spec is not None and not problems:
        problems = _problems_together(spec)
    if problems or spec is None:
        raise ConfigError(listed(f"The sweep {source} is not valid:", problems))
    return spec


def listed(first: str, problems: Sequence[str]) -> str:
    """Return a message with the first of many problems."""
    more = [f"and {len(problems) - _MOST_PROBLEMS} more"] if len(problems) > _MOST_PROBLEMS else []
    return "\n  ".join([first, *problems[:_MOST_PROBLEMS], *more])


class YamlDumper(yaml.SafeDumper):
    """Quotes a text such as 5e-4, which `load_yaml` would read as a number."""


YamlDumper.add_implicit_resolver("number", re.compile(r"[-+]?[\d.]+[eE][-+]?\d+$"), list("-+.0123456789"))


def sweep_yaml(spec: SweepSpec) -> str:
    """Return the sweep in full, as `load_sweep` reads it."""
    return yaml.dump(spec.model_dump(), Dumper=YamlDumper, sort_keys=False, allow_unicode=True)


def _put(values: dict[str, Any], override: str) -> None:
    """Apply `stage.option=value`; what comes after `set.`, `space.` or a variant's name is one dotted key.

    null removes a key, but for `set.KEY`, where it is a value.
    """
    path, equals, text = override.partition("=")
    parts = path.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{override!r}: an override is written key=value, e.g. finetune.seeds=[0,1]")
    homes = [f"{stage}.set.{path}" for stage in STAGES if stage in values and path in _keys(stage, values[stage])]
    if homes and len(parts) > 1:
        raise ConfigError(f"{override!r}: is a key of a recipe; write it as {' or '.join(homes)}")
    if parts[0] in STAGES:  # a recipe's key is one, for all its dots
        sections = {"set": 2, "space": 2, "variants": 3}.get(parts[1] if len(parts) > 1 else "", 1)
        parts = [*parts[:sections], *filter(None, [".".join(parts[sections:])])]
    target = values
    for depth, part in enumerate(parts[:-1]):
        inner = target.get(part)
        if inner is not None and not isinstance(inner, dict):
            raise ConfigError(f"{override!r}: {'.'.join(parts[: depth + 1])} is no section of the sweep.")
        target[part] = dict(inner or {})  # a copy, since an anchor of YAML's may have it stand elsewhere too
        target = target[part]
    value = parse_value(text)
    if value is None and (len(parts) < 3 or parts[1] != "set"):
        target.pop(parts[-1], None)
    else:
        target[parts[-1]] = value


def _with_options(values: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """Return a sweep's raw mapping with its options changed. What is no mapping where one should be stays as it is."""

    def changed(stage: str, settings: Any) -> Any:
        """Apply `change` to each value, or to each element of a list."""

        def each(key: str, value: Any) -> Any:
            return [each(key, inner) for inner in value] if isinstance(value, list) else change(stage, key, value)

        if not isinstance(settings, dict):
            return settings
        return {key: each(str(key), value) for key, value in settings.items()}

    result = dict(values)
    for stage in STAGES:
        if not isinstance(given := values.get(stage), dict):
            continue
        result[stage] = changed(stage, given)
        if isinstance(variants := given.get("variants"), dict):
            result[stage]["variants"] = {name: changed(stage, settings) for name, settings in variants.items()}
        if isinstance(space := given.get("space"), dict):
            result[stage]["space"] = {
                key: {kind: changed(stage, {key: drawn})[key] for kind, drawn in domain.items()}
                if isinstance(domain, dict) else domain
                for key, domain in space.items()
            }  # fmt: skip
    return result


# --- what must hold


_SECTIONS: dict[str, type[Section]] = {
    "search": Search, "metric": Metric, "scheduler": Scheduler, "resources": Resources,
}  # fmt: skip


def _problems(error: pydantic.ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        parts = [str(part) for part in problem["loc"]]
        key, message = ".".join(parts), problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            known = _SECTIONS[parts[0]] if len(parts) > 1 else SweepSpec
            message = f"unknown key{did_you_mean(parts[-1], known.model_fields)}"
        message = _PLAINLY.get(problem["type"], message)
        lines.append(f"{key}: {message}" if key else message)
    return lines


def _stage_problems(name: str, given: dict[str, Any]) -> list[str]:
    """Return the problems of a stage's keys and values as they stand in the file."""
    problems, keys = [], _keys(name, given)
    for place, key, value in _settings(name, given):
        problem = _key_problem(name, place, key, keys)
        if place == "space":
            problem = problem or _space_problem(name, key, value, given)
        elif place.startswith("variants") and key in _mapping(given.get("space")):
            problem = problem or "is listed under space too; leave one out"
        elif key in OPTIONS[name] or isinstance(value, dict):
            problem = problem or value_problem(key, value)
        if problem:
            problems.append(f"{name}.{place}.{key}: {problem}" if place else f"{name}.{key}: {problem}")
    for variant in _mapping(given.get("variants")):
        if not _VARIANT.fullmatch(variant):
            problems.append(f"{name}.variants.{variant}: a variant's name takes letters, digits, - _ and +")
    seeds = given.get("seeds")
    if isinstance(seeds, list) and (twice := [seed for index, seed in enumerate(seeds) if seed in seeds[:index]]):
        problems.append(f"{name}.seeds: {twice[0]} is listed twice; leave one out")
    return problems


def _space_problem(name: str, key: str, domain: Any, given: Mapping[str, Any]) -> str:
    """Return what keeps an option or a recipe's key from varying so; `Domain` has checked the rest."""
    if key in _mapping(given.get("set")) or given.get(key) is not None:
        return f"is listed {'next to space' if key in given else 'under set'} too; leave one out"
    for kind, values in _mapping(domain).items():
        if kind not in ("grid", "choice") and key in NAMED:
            return f"is a name or a path, which no {kind} gives; write grid or choice"
        if key in OPTIONS[name] and isinstance(values, list):
            return next(filter(None, (value_problem(key, each) for each in values)), "")
    return ""


def _settings(name: str, given: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield (place, key, value) of every setting of a stage; the place of an option is empty."""
    sections = (PretrainStage if name == "pretrain" else FinetuneStage).model_fields
    places = {"": {str(key): value for key, value in given.items() if key not in sections}}
    places |= {place: _mapping(given.get(place)) for place in ("set", "space")}
    variants = _mapping(given.get("variants"))
    places |= {f"variants.{variant}": _mapping(settings) for variant, settings in variants.items()}
    return ((place, key, value) for place, settings in places.items() for key, value in settings.items())


def _keys(stage: str, given: Any) -> list[str]:
    """Return the dotted keys of a stage's recipe."""
    values = _mapping(given)
    return recipe_keys(stage, values, _mapping(values.get("set")))


def _key_problem(stage: str, place: str, key: str, keys: Sequence[str]) -> str:
    if place == "" and key in keys and key not in INSTEAD:
        return "is the recipe's; write it under set"
    if place == "set" and key in OPTIONS[stage]:
        return f"is an option of the command; write it as {stage}.{key}, outside set"
    problem = key_problem(stage, key, keys)
    if place == "" and problem.startswith("unknown key"):
        sections = (PretrainStage if stage == "pretrain" else FinetuneStage).model_fields
        return f"unknown key{nearest(key, [*OPTIONS[stage], *sections])}"
    return problem


def _mapping(value: Any) -> dict[str, Any]:
    return {str(key): inner for key, inner in value.items()} if isinstance(value, dict) else {}


def _problems_together(spec: SweepSpec) -> list[str]:
    """Return the problems of parts that are each sound by themselves."""
    if not spec.stages:
        return ["there is nothing to run; write pretrain, finetune or both"]
    last, stage, problems = spec.last_stage, spec.stages[spec.last_stage], []
    compared = [*(["scheduler"] if spec.scheduler is not None else []), *(["Optuna"] if spec.is_suggested else [])]
    if compared and spec.metric is None:
        name = "score" if last == "finetune" else metrics_of(last, stage.options, stage.set)[-1]
        problems.append(f"metric: {compared[0]} needs one; write metric: {{name: {name}}}")
    if compared and (place := _varies_task(stage)):
        problems.append(
            f"{last}.{place}: {compared[0]} compares the trials' scores, and those of different tasks cannot be "
            f"compared; sweep one task at a time"
        )
    if spec.is_suggested:
        if len(spec.stages) > 1:
            problems.append("search.kind: Optuna suggests values of one stage; pretrain first, and give finetune.model")
        if len(stage.seeds) > 1:
            problems.append(f"{last}.seeds: Optuna compares single trials; write one seed, and confirm with more later")
        if not all(domain.is_random for domain in stage.space.values()) or stage.variants:
            problems.append(f"{last}: Optuna suggests values and knows neither grid nor variants; write choice")
        if not stage.is_random:
            problems.append(f"{last}.space: there is nothing that Optuna could suggest, such as uniform: [0.0, 0.3]")
    elif spec.search.samples > 1 and not any(each.is_random for each in spec.stages.values()):
        problems.append(f"search.samples: {spec.search.samples}, and no space has a random value; leave it out")
    if spec.pretrain is not None:
        shares, end = spec.pretrain.checkpoints, spec.pretrain.stop_at_share or 1.0
        if len({*shares}) < len(shares):
            problems.append(f"pretrain.checkpoints: {shares} names a share twice; leave one out")
        elif shares and max(shares) > end:
            problems.append(f"pretrain.checkpoints: {max(shares):g} comes after stop_at_share, {end:g}")
    return problems


def _varies_task(stage: Stage) -> str:
    """Return where the trials of a stage are given different tasks; empty where they are not."""
    if "task" in stage.space:
        return "space.task" if len(stage.space["task"].values) > 1 else ""
    return next((f"variants.{name}.task" for name, settings in stage.variants.items() if "task" in settings), "")
