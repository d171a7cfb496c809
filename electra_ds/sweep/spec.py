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

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from electra_ds.config.overrides import parse_value
from electra_ds.config.recipe import Section, load_yaml
from electra_ds.config.shipped import SWEEPS, shipped_names, shipped_text
from electra_ds.core.errors import ConfigError, did_you_mean
from electra_ds.sweep.domains import Domain, parse_domain
from electra_ds.sweep.options import (
    INSTEAD,
    NAMED,
    OPTIONS,
    RECIPE_KEYS,
    full_path,
    key_problem,
    nearest,
    value_problem,
    with_folder,
)

STAGES = ("pretrain", "finetune")
_MOST_PROBLEMS = 10
_PLAINLY = {"missing": "is missing", "too_short": "is empty", "list_type": "must be a list, in brackets"}
"""For pydantic's own words."""
_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*")

Change = Callable[[str, str, Any], Any]
"""(stage, option, its value) to another value."""


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {value}")
    return value


_Share = Annotated[float, BeforeValidator(_no_boolean), Field(gt=0, le=1)]


class Stage(Section):
    """Trials of one command. Any other key is one of its options: `recipe`, `data_dir`, `max_train_examples`."""

    model_config = ConfigDict(extra="allow")

    set: dict[str, Any] = Field(default={})
    """The recipe's dotted keys that are the same in every trial."""
    space: dict[str, Any] = Field(default={})
    """What varies: a dotted key of the recipe or an option, and a domain such as `grid: [1, 2]`."""
    variants: dict[str, dict[str, Any]] = Field(default={})
    """Settings that go together, by a name for tables; every variant is run."""
    seeds: list[Annotated[int, Field(strict=True, ge=0, lt=2**63)]] = Field(default=[0], min_length=1)

    @property
    def options(self) -> dict[str, Any]:
        """Of the command, the same in every trial."""
        return dict(self.model_extra or {})

    @property
    def domains(self) -> dict[str, Domain]:
        """Of what varies, in the order of the file."""
        found = {key: parse_domain(value) for key, value in self.space.items()}
        return {key: domain for key, domain in found.items() if domain is not None}


class PretrainStage(Stage):
    stop_at_share: _Share | None = None
    """Every trial ends at this share of its schedule, which stays as long as it is."""
    checkpoints: list[_Share] = Field(default=[])
    """Shares of the schedule; the checkpoints there are kept and each of them finetuned. None: the last alone."""
    stop_on_collapse: bool = False
    """Whether a trial ends once its discriminator has collapsed."""


class FinetuneStage(Stage):
    pass


class Search(Section):
    kind: Literal["random", "optuna"] = "random"
    """Where values come from that are no grid: drawn, or suggested by Optuna, which learns from what was scored."""
    samples: int = Field(default=1, ge=1, le=100_000)
    """How many times random values are drawn, each for every cell of the grid and every seed."""
    seed: int = Field(default=0, ge=0, lt=2**63)


class Metric(Section):
    name: str
    """Of an evaluation in metrics.jsonl: `discriminator_auc`, `spearman`. `score` is a finetuning's first one."""
    mode: Literal["max", "min"] = "max"


class Scheduler(Section):
    kind: Literal["asha", "median"]
    grace_steps: int = Field(default=1, ge=1)
    """Steps that every trial gets before it may be ended."""
    reduction_factor: float = Field(default=4.0, gt=1)
    """ASHA: one in so many continues from each rung to the next."""


_LEAST_SHARE = 0.01


class Resources(Section):
    """What one trial gets."""

    workers: int = Field(default=1, ge=1, le=4096)
    """Ranks of its DeepSpeed world."""
    cpus: int = Field(default=1, ge=1)
    """Of each worker, and its CPU threads."""
    gpus: float = Field(default=0.0, ge=0, le=1e6)
    """Of each worker; below 1 several trials share a card, whose memory must do for all of them."""

    @model_validator(mode="after")
    def _is_countable(self) -> Resources:
        if 0 < self.gpus < _LEAST_SHARE:
            raise ValueError(f"gpus {self.gpus:g} would have more than {1 / _LEAST_SHARE:.0f} trials share a GPU")
        if self.gpus > 1:
            raise ValueError(f"gpus {self.gpus:g} is more than the one GPU that a worker uses; raise workers")
        if self.workers > 1 and 0 < self.gpus < 1:
            raise ValueError(f"gpus {self.gpus:g} of {self.workers} workers would share a GPU; each needs a whole one")
        return self


class SweepSpec(Section):
    """Made by `parse_sweep`, which checks more than the types."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")
    description: str = ""
    pretrain: PretrainStage | None = None
    finetune: FinetuneStage | None = None
    """After `pretrain`: of each of its trials, or of `model`."""
    search: Search = Search()
    metric: Metric | None = None
    """What a scheduler, Optuna and the table's order go by."""
    scheduler: Scheduler | None = None
    resources: Resources = Resources()
    retries: int = Field(default=2, ge=0)
    """How often a trial that was killed is begun again where it was. One that fails by itself is not."""

    @property
    def stages(self) -> dict[str, Stage]:
        """Those there are, in their order."""
        return {name: stage for name in STAGES if (stage := getattr(self, name)) is not None}

    def with_options(self, change: Change) -> SweepSpec:
        """With every value of its commands' options changed, wherever it stands."""
        return SweepSpec.model_validate(_with_options(self.model_dump(), change))


def load_sweep(name_or_path: str, overrides: Sequence[str] = ()) -> SweepSpec:
    """A shipped sweep or a file, with `finetune.seeds=[0, 1]` and the like applied. Raises ConfigError, which lists
    every problem."""
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
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise ConfigError(f"Cannot read the sweep {name_or_path}: {error}") from error
    values = load_yaml(text, f"The sweep {name_or_path}")
    if not isinstance(values, dict):
        raise ConfigError(f"The sweep {name_or_path} must be a mapping, not {type(values).__name__}.")
    values = _with_options(values, partial(with_folder, Path(name_or_path).parent))
    for override in overrides:
        _put(values, override)
    return parse_sweep(values, name_or_path)


def parse_sweep(values: dict[str, Any], source: str) -> SweepSpec:
    """A sweep from a raw mapping, its paths in full. Raises ConfigError, which lists every problem with its key."""
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
    """A message with the first of many problems."""
    more = [f"and {len(problems) - _MOST_PROBLEMS} more"] if len(problems) > _MOST_PROBLEMS else []
    return "\n  ".join([first, *problems[:_MOST_PROBLEMS], *more])


class _Dumper(yaml.SafeDumper):
    """Quotes a text such as 5e-4, which `load_yaml` would read as a number."""


_Dumper.add_implicit_resolver("number", re.compile(r"[-+]?[\d.]+[eE][-+]?\d+$"), list("-+.0123456789"))


def sweep_yaml(spec: SweepSpec) -> str:
    """The sweep in full, as `load_sweep` reads it."""
    return yaml.dump(spec.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _put(values: dict[str, Any], override: str) -> None:
    """`stage.option=value`; what comes after `set.`, `space.` or a variant's name is one dotted key.

    null takes away what stands there, but for `set.KEY`, where it is a value.
    """
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"{override!r}: an override is written key=value, e.g. finetune.seeds=[0,1]")
    parts = path.split(".")
    homes = [f"{stage}.set.{path}" for stage in STAGES if stage in values and path in RECIPE_KEYS[stage]]
    if homes and len(parts) > 1:
        raise ConfigError(f"{override!r}: is a key of a recipe; write it as {' or '.join(homes)}")
    if parts[0] in STAGES:  # a recipe's key is one, for all its dots
        whole = {"set": 2, "space": 2, "variants": 3}.get(parts[1] if len(parts) > 1 else "", 1)
        parts = [*parts[:whole], *filter(None, [".".join(parts[whole:])])]
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
    """A sweep's raw mapping with its options changed. What is no mapping where one should be stays as it is."""
    return {key: _stage_with_options(key, value, change) if key in STAGES else value for key, value in values.items()}


def _stage_with_options(stage: str, given: Any, change: Change) -> Any:
    def each(key: str, value: Any) -> Any:
        return [each(key, inner) for inner in value] if isinstance(value, list) else change(stage, key, value)

    def changed(values: Any) -> Any:
        return {key: each(str(key), value) for key, value in values.items()} if isinstance(values, dict) else values

    def in_domain(key: str, domain: Any) -> Any:
        return {kind: each(key, values) for kind, values in domain.items()} if isinstance(domain, dict) else domain

    result = changed(given)
    if isinstance(given, dict) and isinstance(variants := given.get("variants"), dict):
        result["variants"] = {name: changed(settings) for name, settings in variants.items()}
    if isinstance(given, dict) and isinstance(space := given.get("space"), dict):
        result["space"] = {key: in_domain(str(key), domain) for key, domain in space.items()}
    return result


# --- what must hold


def _problems(error: pydantic.ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        parts = [str(part) for part in problem["loc"]]
        key, message = ".".join(parts), problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"unknown key{did_you_mean(parts[-1], _fields(parts[:-1]))}"
        elif problem["type"] in _PLAINLY:
            message = _PLAINLY[problem["type"]]
        lines.append(f"{key}: {message}" if key else message)
    return lines


def _fields(path: Sequence[str]) -> list[str]:
    sections: dict[str, type[Section]] = {
        "search": Search, "metric": Metric, "scheduler": Scheduler, "resources": Resources,
    }  # fmt: skip
    return list((sections[path[0]] if path else SweepSpec).model_fields)


def _stage_problems(name: str, given: dict[str, Any]) -> list[str]:
    """Of the keys and domains of a stage as it stands in the file."""
    sections = list((PretrainStage if name == "pretrain" else FinetuneStage).model_fields)
    options = {str(key): value for key, value in given.items() if key not in sections}
    constants, space = _mapping(given.get("set")), _mapping(given.get("space"))
    problems = {key: _option_problem(name, key, value, sections) for key, value in options.items()}
    problems |= {f"set.{key}": _set_problem(name, key, value) for key, value in constants.items()}
    for key, value in space.items():
        problem = key_problem(name, key) or _domain_problem(name, key, value)
        if not problem and (key in constants or options.get(key) is not None):
            problem = f"stands {'under set' if key in constants else 'beside space'} too; leave one out"
        problems[f"space.{key}"] = problem
    for variant, settings in _mapping(given.get("variants")).items():
        if not _VARIANT.fullmatch(variant):
            problems[f"variants.{variant}"] = "a variant's name takes letters, digits, - _ and +"
        for key, value in _mapping(settings).items():
            problem = key_problem(name, key) or ("stands under space too; leave one out" if key in space else "")
            problems[f"variants.{variant}.{key}"] = problem or _constant_problem(name, key, value)
    seeds = given.get("seeds")
    if isinstance(seeds, list) and (twice := [seed for index, seed in enumerate(seeds) if seed in seeds[:index]]):
        problems["seeds"] = f"{twice[0]} stands twice; leave one out"
    return [f"{name}.{key}: {problem}" for key, problem in problems.items() if problem]


def _option_problem(stage: str, key: str, value: Any, sections: Sequence[str]) -> str:
    if key in RECIPE_KEYS[stage] and key not in INSTEAD:
        return "is the recipe's; write it under set"
    if (problem := key_problem(stage, key)).startswith("unknown key"):
        return f"unknown key{nearest(key, [*OPTIONS[stage], *sections])}"
    return problem or value_problem(key, value)


def _set_problem(stage: str, key: str, value: Any) -> str:
    if key in OPTIONS[stage]:
        return f"is an option of the command; write it as {stage}.{key}, outside set"
    return key_problem(stage, key) or _constant_problem(stage, key, value)


def _constant_problem(stage: str, key: str, value: Any) -> str:
    if key in OPTIONS[stage]:
        return value_problem(key, value)
    return f"{value} is no value; what varies stands under space" if isinstance(value, dict) else ""


def _domain_problem(stage: str, key: str, value: Any) -> str:
    try:
        domain = parse_domain(value)
    except ConfigError as error:
        return str(error)
    if domain is None:
        where = "beside space" if key in OPTIONS[stage] else "under set"
        return f"{value!r} does not vary; write it {where}, or as {{grid: [...]}}"
    if key in OPTIONS[stage] and domain.kind in ("grid", "choice"):
        return next((problem for each in domain.values if (problem := value_problem(key, each))), "")
    return f"is a name or a path, which no {domain.kind} gives; write grid or choice" if key in NAMED else ""


def _mapping(value: Any) -> dict[str, Any]:
    return {str(key): inner for key, inner in value.items()} if isinstance(value, dict) else {}


def _problems_together(spec: SweepSpec) -> list[str]:
    """Of what each is sound by itself."""
    if not spec.stages:
        return ["there is nothing to run; write pretrain, finetune or both"]
    problems = []
    last, stage = list(spec.stages.items())[-1]
    for key, needs in (
        ("scheduler", spec.scheduler is not None),
        ("search.kind: optuna", spec.search.kind == "optuna"),
    ):
        if needs and spec.metric is None:
            problems.append(f"metric: {key} goes by one; write metric: {{name: {_METRICS[last]}}}")
    compared = "scheduler" if spec.scheduler is not None else "Optuna" if spec.search.kind == "optuna" else ""
    if compared and (place := _varies_task(stage)):
        problems.append(
            f"{last}.{place}: {compared} goes by the trials' scores, and those of different tasks cannot be compared; "
            f"sweep one task at a time"
        )
    if spec.search.kind == "optuna":
        if len(spec.stages) > 1:
            problems.append("search.kind: Optuna suggests values of one stage; pretrain first, and give finetune.model")
        if len(stage.seeds) > 1:
            problems.append(f"{last}.seeds: Optuna compares single trials; write one seed, and confirm with more later")
        if any(domain.kind == "grid" for domain in stage.domains.values()) or stage.variants:
            problems.append(f"{last}: Optuna suggests values and knows neither grid nor variants; write choice")
        if not any(domain.is_random for domain in stage.domains.values()):
            problems.append(f"{last}.space: there is nothing that Optuna could suggest, such as uniform: [0.0, 0.3]")
    elif spec.search.samples > 1 and not any(
        domain.is_random for each in spec.stages.values() for domain in each.domains.values()
    ):
        problems.append(f"search.samples: {spec.search.samples}, and no space has a random value; leave it out")
    if spec.pretrain is not None:
        problems += _checkpoint_problems(spec.pretrain)
    return problems


def _varies_task(stage: Stage) -> str:
    """Where the trials of a stage are given different tasks; empty where they are not."""
    if "task" in stage.space:
        return "space.task" if stage.domains["task"].values[1:] else ""
    return next((f"variants.{name}.task" for name, settings in stage.variants.items() if "task" in settings), "")


_METRICS = {"pretrain": "discriminator_auc", "finetune": "score"}


def _checkpoint_problems(stage: PretrainStage) -> list[str]:
    shares, end = stage.checkpoints, stage.stop_at_share or 1.0
    if len({*shares}) < len(shares):
        return [f"pretrain.checkpoints: {shares} names a share twice; leave one out"]
    if shares and max(shares) > end:
        return [f"pretrain.checkpoints: {max(shares):g} comes after stop_at_share, {end:g}, where a trial ends"]
    return []
