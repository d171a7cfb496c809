"""Read a sweep's file with overrides from the command line, and find everything that is wrong with it. Imports neither
torch nor Ray."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pydantic
import yaml

from electra_ds.config.names import SWEEPS, shipped_names, shipped_text
from electra_ds.config.recipe import named_values
from electra_ds.config.values import RECIPE_KEYS, load_yaml, parse_value
from electra_ds.core.errors import ConfigError, did_you_mean
from electra_ds.sweep.options import (
    INSTEAD,
    OPTIONS,
    absolute_path,
    full_path,
    key_problem,
    metrics_of,
    nearest,
    recipe_keys,
    value_problem,
)
from electra_ds.sweep.spec import (
    DOMAINS,
    STAGES,
    Metric,
    PretrainStage,
    Resources,
    Scheduler,
    Search,
    Stage,
    SweepSpec,
)

_MOST_PROBLEMS = 10
_MESSAGES = {"missing": "is missing", "too_short": "is empty", "list_type": "must be a list, in brackets"}
"""Messages that replace pydantic's."""
_STAGE_KEYS = {"pretrain": PretrainStage.model_fields, "finetune": Stage.model_fields}
_KEYS = [key for section in (SweepSpec, Search, Metric, Scheduler, Resources) for key in section.model_fields]

Sweep = SweepSpec | Mapping[str, Any] | str | Path
"""A sweep, the content of its file, its path, or the name of a shipped sweep."""
Change = Callable[[str, str, Any], Any]
"""A function that maps (stage, option, value) to a new value."""


def as_spec(sweep: Sweep, overrides: Sequence[str] = ()) -> SweepSpec:
    """Return a sweep from any of its forms. overrides: changes, only for one given by name or path."""
    if isinstance(sweep, str | Path):
        return load_sweep(str(sweep), overrides)
    return sweep if isinstance(sweep, SweepSpec) else parse_sweep(sweep)


def load_sweep(name_or_path: str, overrides: Sequence[str] = ()) -> SweepSpec:
    """Return a shipped sweep or one from a file, with overrides such as `finetune.seeds=[0, 1]` applied.

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
    values = _with_options(values, partial(absolute_path, Path(name_or_path).parent))
    for override in overrides:
        _put(values, override)
    return parse_sweep(values, name_or_path)


def parse_sweep(values: Mapping[str, Any], source: str = "given") -> SweepSpec:
    """Return a sweep from a raw mapping, with full paths. Raises ConfigError, listing every problem with its key."""
    values = _with_options(_with_options(values, full_path), _complete_recipe)
    spec, problems = None, []
    try:
        spec = SweepSpec.model_validate(values)
    except pydantic.ValidationError as error:
        problems = [_plain(problem) for problem in error.errors()]
    for name in STAGES:
        if isinstance(values.get(name), dict):
            problems += _stage_problems(name, values[name])
    if spec is not None and not problems:
        problems = list(_problems_together(spec))
    if problems or spec is None:
        raise ConfigError(listed(f"The sweep {source} is not valid:", problems))
    return spec


def _complete_recipe(stage: str, key: str, value: Any) -> Any:
    """Return the values of a recipe in place of its file, which may be edited or moved later."""
    is_file = key in RECIPE_KEYS and isinstance(value, str) and Path(value).is_file()
    return named_values(value) if is_file else value


def listed(first: str, problems: Sequence[str]) -> str:
    """Return a message with the first of many problems."""
    more = [f"and {len(problems) - _MOST_PROBLEMS} more"] if len(problems) > _MOST_PROBLEMS else []
    return "\n  ".join([first, *problems[:_MOST_PROBLEMS], *more])


class YamlDumper(yaml.SafeDumper):
    """Quotes text such as 5e-4, which `load_yaml` would read as a number."""


YamlDumper.add_implicit_resolver("number", re.compile(r"[-+]?[\d.]+[eE][-+]?\d+$"), list("-+.0123456789"))


def sweep_yaml(spec: SweepSpec) -> str:
    """Return the full sweep as YAML that `load_sweep` reads."""
    return yaml.dump(spec.model_dump(), Dumper=YamlDumper, sort_keys=False, allow_unicode=True)


def with_options(spec: SweepSpec, change: Change) -> SweepSpec:
    """Return the sweep with `change` applied to every value of its commands' options, wherever it is set."""
    return SweepSpec.model_validate(_with_options(spec.model_dump(), change))


def _with_options(values: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """Apply `change` in the same way to a sweep's raw mapping."""

    def changed(stage: str, key: str, value: Any) -> Any:
        """Apply `change` to each value below a key. The values of a domain belong to the domain's key."""
        if isinstance(value, list):
            return [changed(stage, key, each) for each in value]
        if isinstance(value, dict):
            return {
                inner: changed(stage, key if inner in DOMAINS else str(inner), each) for inner, each in value.items()
            }
        return change(stage, key, value)

    return {key: changed(key, "", value) if key in STAGES else value for key, value in values.items()}


def _put(values: dict[str, Any], override: str) -> None:
    """Apply `stage.option=value`. Everything after `set.`, `space.` or a variant's name is one dotted key.

    null removes a key, except in `set.KEY`, where it is a value.
    """
    path, equals, text = override.partition("=")
    parts = path.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{override!r}: an override is written key=value, e.g. finetune.seeds=[0,1]")
    homes = [f"{stage}.set.{path}" for stage in STAGES if stage in values and path in _keys(stage, values[stage])]
    if homes and len(parts) > 1:
        raise ConfigError(f"{override!r}: is a key of a recipe; write it as {' or '.join(homes)}")
    if parts[0] in STAGES:  # a recipe's key is one key, despite its dots
        sections = {"set": 2, "space": 2, "variants": 3}.get(parts[1] if len(parts) > 1 else "", 1)
        parts = [*parts[:sections], *filter(None, [".".join(parts[sections:])])]
    target = values
    for depth, part in enumerate(parts[:-1]):
        inner = target.get(part)
        if inner is not None and not isinstance(inner, dict):
            raise ConfigError(f"{override!r}: {'.'.join(parts[: depth + 1])} is not a section of the sweep.")
        target[part] = dict(inner or {})  # a copy, since a YAML anchor may use it elsewhere too
        target = target[part]
    value = parse_value(text)
    if value is None and (len(parts) < 3 or parts[1] != "set"):
        target.pop(parts[-1], None)
    else:
        target[parts[-1]] = value


# --- checks


def _plain(problem: Any) -> str:
    """Return a problem that pydantic found, with its key."""
    parts = [str(part) for part in problem["loc"]]
    message = _MESSAGES.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    if problem["type"] == "extra_forbidden":
        message = f"unknown key{did_you_mean(parts[-1], _KEYS)}"
    return ": ".join(filter(None, [".".join(parts), message]))


def _stage_problems(name: str, given: dict[str, Any]) -> list[str]:
    """Return the problems of a stage's keys and values in the file.

    A variant may choose its own objective. The variant, `set` and `space` may then set that objective's keys; a key
    that some trial does not have is reported when the sweep is expanded.
    """
    shared = _keys(name, given)
    of_variants = {
        f"variants.{variant}.": _keys(name, given | {"set": _mapping(given.get("set")) | _mapping(own)} | _mapping(own))
        for variant, own in _mapping(given.get("variants")).items()
    }
    anywhere = list(dict.fromkeys([*shared, *itertools.chain.from_iterable(of_variants.values())]))
    keys = {"set.": anywhere, "space.": anywhere} | of_variants
    return [
        f"{name}.{place}{key}: {problem}"
        for place, key, value in _settings(name, given)
        if (
            problem := _key_problem(name, place, key, keys.get(place, shared))
            or _value_problem(name, place, key, value, given)
        )
    ]


def _settings(name: str, given: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield (place, key, value) of every setting of a stage. The place of an option is empty."""
    places: dict[str, Any] = {"": {key: value for key, value in given.items() if key not in _STAGE_KEYS[name]}}
    places |= {f"{place}.": given.get(place) for place in ("set", "space")}
    places |= {f"variants.{variant}.": settings for variant, settings in _mapping(given.get("variants")).items()}
    return ((place, key, value) for place, values in places.items() for key, value in _mapping(values).items())


def _mapping(value: Any) -> dict[str, Any]:
    return {str(key): inner for key, inner in value.items()} if isinstance(value, dict) else {}


def _keys(stage: str, given: Any) -> list[str]:
    """Return the dotted keys of a stage's recipe."""
    values = _mapping(given)
    return recipe_keys(stage, values, _mapping(values.get("set")))


def _key_problem(stage: str, place: str, key: str, keys: Sequence[str]) -> str:
    if place == "" and key in keys and key not in INSTEAD:
        return "is the recipe's; write it under set"
    if place == "set." and key in OPTIONS[stage]:
        return f"is an option of the command; write it as {stage}.{key}, outside set"
    problem = key_problem(stage, key, keys)
    if place == "" and problem.startswith("unknown key"):
        return f"unknown key{nearest(key, [*OPTIONS[stage], *_STAGE_KEYS[stage]])}"
    return problem


def _value_problem(stage: str, place: str, key: str, value: Any, given: Mapping[str, Any]) -> str:
    values = [value]
    if place == "space.":
        if key in _mapping(given.get("set")) or given.get(key) is not None:
            return f"is listed {'next to space' if key in given else 'under set'} too; leave one out"
        values = [each for drawn in _mapping(value).values() if isinstance(drawn, list) for each in drawn]
    elif isinstance(value, dict) and key not in RECIPE_KEYS:
        return f"takes one value, not {value}; to vary it, write it under space"
    elif place.startswith("variants") and key in _mapping(given.get("space")):
        return "is listed under space too; leave one out"
    problems = (value_problem(stage, key, each) for each in values if key in OPTIONS[stage])
    return next(filter(None, problems), "")


def _problems_together(spec: SweepSpec) -> Iterator[str]:
    """Yield the problems between parts that are each valid alone."""
    if not spec.stages:
        yield "there is nothing to run; write pretrain, finetune or both"
        return
    last, stage = spec.last_stage, spec.stages[spec.last_stage]
    compared = "scheduler" if spec.scheduler is not None else "Optuna" if spec.is_suggested else ""
    if compared and spec.metric is None:
        name = metrics_of(last, stage.options, stage.set)[0]
        yield f"metric: {compared} needs one; write metric: {{name: {name}}}"
    if compared and (place := _varies_task(stage)):
        yield (
            f"{last}.{place}: {compared} compares the trials' scores, and those of different tasks cannot be "
            f"compared; sweep one task at a time"
        )
    if spec.is_suggested:
        if len(spec.stages) > 1:
            yield "search.kind: Optuna suggests values for one stage only; pretrain first, and give finetune.model"
        if len(stage.seeds) > 1:
            yield f"{last}.seeds: Optuna compares single trials; write one seed, and confirm with more later"
        if not all(domain.is_random for domain in stage.space.values()) or stage.variants or not stage.space:
            yield f"{last}.space: Optuna needs domains such as uniform or choice here, not a grid or variants"
    elif spec.search.samples > 1 and not any(
        domain.is_random for each in spec.stages.values() for domain in each.space.values()
    ):
        yield f"search.samples: {spec.search.samples}, but no space has a random value; leave it out"
    if spec.pretrain is not None and spec.pretrain.checkpoints:
        last_share, end = max(spec.pretrain.checkpoints), spec.pretrain.stop_at_share or 1
        if last_share > end:
            yield f"pretrain.checkpoints: {last_share:g} comes after stop_at_share, {end:g}"


def _varies_task(stage: Stage) -> str:
    """Return the place in the file at which a stage's trials get different tasks; empty if they do not."""
    if "task" in stage.space:
        return "space.task" if len(stage.space["task"].values) > 1 else ""
    return next((f"variants.{name}.task" for name, settings in stage.variants.items() if "task" in settings), "")
