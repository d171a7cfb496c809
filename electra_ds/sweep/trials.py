"""A sweep as the list of its trials, each a command line that anybody can run by hand. No torch and no Ray here."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from electra_ds.config.deepspeed import read_deepspeed_json
from electra_ds.config.finetune_recipe import FinetuneRecipe, load_finetune_recipe
from electra_ds.config.overrides import load_recipe, parse_value
from electra_ds.config.recipe import Recipe
from electra_ds.core.errors import ConfigError, DataError, did_you_mean
from electra_ds.sweep.domains import Domain, Value, computed
from electra_ds.sweep.options import HOW, OPTIONS, key_problem, metrics_of, missing_path, words
from electra_ds.sweep.spec import PretrainStage, Stage, SweepSpec, listed

_LONGEST_LABEL = 80
_MOST_TRIALS = 20_000
_EXAMPLE = {"pretrain": "rc2020-small", "finetune": "rc2020"}
CheckArguments = Callable[[str, Sequence[str]], None]
"""Raises ConfigError if a command, `pretrain` or `finetune`, does not take these arguments, and DataError if its
examples will not do. Where None stands in its place, nothing is to be run: neither is looked at."""
Now = Callable[[str, Mapping[str, Value]], dict[str, Value]]
"""A function that gives a stage's options with their inputs where they are now. None: no input has moved."""


@dataclass(frozen=True)
class Trial:
    """One run of one command."""

    stage: str
    """`pretrain` or `finetune`."""
    values: dict[str, Value]
    """What tells it from the others: variant, what varies, seed; of a pretrained encoder first its own, after
    `pretrain.`."""
    options: dict[str, Value]
    settings: dict[str, Value]
    """The recipe's dotted keys that the recipe is changed by."""
    seed: int
    recipe: Recipe | FinetuneRecipe = field(repr=False)
    """Resolved."""
    stop_at: int | None = None
    """Step of the schedule at which it ends."""
    keep_at: tuple[int, ...] = ()
    """Steps whose checkpoints are kept for the finetunings."""
    stop_on_collapse: bool = False
    pretraining: Trial | None = None
    """Whose encoder it finetunes."""
    checkpoint: int | None = None
    """The step of that, or the last one."""

    @cached_property
    def key(self) -> str:
        """Its folder's name: for people, and by a digest the same for what gives the same outcome and no other."""
        label = re.sub(r"[^A-Za-z0-9._=+-]+", "_", self.label)[:_LONGEST_LABEL].strip("-._")
        return f"{label}-{self.digest[:12]}"

    @property
    def label(self) -> str:
        return "-".join(_shown(self.values)) or self.stage

    @cached_property
    def digest(self) -> str:
        """Of all that the outcome depends on. How it is run and what things are called do not count."""
        own = {name: words(name, value) for name, value in self.options.items() if name not in HOW | {"recipe"}}
        if self.stage == "finetune" and not (self.options.get("best") or self.options.get("early_stopping")):
            own.pop("eval_every", None)
        told = {
            "stage": self.stage, "options": {name: given for name, given in own.items() if given},
            "recipe": self.recipe.model_dump(mode="json", exclude={"name", "description"}), "stop_at": self.stop_at,
            "stop_on_collapse": self.stop_on_collapse, "checkpoint": self.checkpoint,
            "pretraining": self.pretraining.digest if self.pretraining else None,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def arguments(self, threads: int) -> list[str]:
        """Of the command, for a new run; without its directory and without a model that is pretrained first."""
        given = [word for name, value in self.options.items() for word in words(name, value)]
        given += ["--seed", str(self.seed)]
        if changes := _overrides(self.settings):
            given += ["--set", *changes]
        collapse = ["--stop-on-collapse"] if self.stop_on_collapse else []
        return [*given, *self.ending(), *collapse, "--threads", str(threads)]

    def ending(self) -> list[str]:
        """Of the command, for a new run and for one that goes on: where it ends, and what it keeps for others."""
        stop = ["--stop-at", str(self.stop_at)] if self.stop_at is not None else []
        return [*stop, *(["--keep-at", *map(str, self.keep_at)] if self.keep_at else [])]


def _shown(values: Mapping[str, Value]) -> Iterator[str]:
    for name, value in values.items():
        short = name.rpartition(".")[2]
        if short in ("task", "variant"):
            yield str(value)
        elif short == "seed":
            yield f"s{value}" if name == "seed" else f"p{value}"
        else:
            text = value_text(value)
            yield f"{short}={Path(text).name or text}"


def value_text(value: Any) -> str:
    """For labels and tables."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def counted(trials: int) -> str:
    return f"{trials:,} trial{'' if trials == 1 else 's'}"


def _overrides(settings: Mapping[str, Value]) -> list[str]:
    return [f"{key}={_as_yaml(value)}" for key, value in settings.items()]


def _as_yaml(value: Value) -> str:
    """What `parse_value` reads as this value."""
    if isinstance(value, str):
        try:
            if parse_value(value) == value:
                return value
        except ConfigError:
            pass
    text = json.dumps(value, ensure_ascii=False, default=str)
    return "".join(char if " " <= char <= "~" else f"\\U{ord(char):08x}" for char in text)


def expand(spec: SweepSpec, check: CheckArguments | None, now: Now | None = None) -> list[Trial]:
    """Every trial of a sweep, pretrainings first; of one by Optuna those that it does not suggest. Raises ConfigError,
    before anything is run, with every recipe, option, path and metric that will not do.

    Random values are drawn by the search's seed, the key and the number of the sample, so every seed and every cell of
    the grid has the same ones, and more samples leave the earlier ones as they were.
    """
    _check_size(spec)
    trials: list[Trial] = []
    problems: dict[str, None] = {}
    for name, stage in spec.stages.items():
        encoders = [(None, None)] if name == "pretrain" or spec.pretrain is None else _encoders(trials)
        is_suggested = spec.search.kind == "optuna" and name == _last(spec)
        for picked in _corners(stage) if is_suggested else _cells(stage, spec):
            trial, found = _tried(spec, name, picked, check, now)
            problems |= dict.fromkeys(found)
            if trial is not None and not is_suggested:
                trials += [_of(trial, seed, *encoder) for seed in stage.seeds for encoder in encoders]
    if not problems:
        problems = dict.fromkeys(_same(trials))
    _raise(spec, list(problems))
    return trials


def suggested(
    spec: SweepSpec, values: Mapping[str, Value], check: CheckArguments | None, now: Now | None = None
) -> Trial:
    """The trial of what somebody suggests for a sweep of one stage; without a `seed` it has the stage's first one.
    Raises ConfigError if it is none."""
    ((name, stage),) = spec.stages.items()
    varying = {key: value for key, value in values.items() if key != "seed"}
    problems = [f"{name}.{key}: {problem}" for key in varying if (problem := key_problem(name, key))]
    trial, found = (None, []) if problems else _tried(spec, name, varying, check, now)
    _raise(spec, [*problems, *found])
    assert trial is not None
    return _of(trial, values.get("seed", stage.seeds[0]), None, None)


def ends(spec: SweepSpec) -> list[Trial]:
    """At the ends of what Optuna may suggest, for what its trials cost; none where it suggests nothing."""
    if spec.search.kind != "optuna":
        return []
    (stage,) = spec.stages.values()
    return [suggested(spec, corner, None) for corner in _corners(stage)]


def recorded(spec: SweepSpec, values: Sequence[Mapping[str, Value]]) -> list[Trial]:
    """The trials of what Optuna has suggested before, in that order; what no longer is one is left out."""
    if spec.search.kind != "optuna":
        return []
    found = {}
    for each in values:
        with contextlib.suppress(ConfigError):
            trial = suggested(spec, each, None)
            found[trial.key] = trial
    return list(found.values())


def _raise(spec: SweepSpec, problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError(listed(f"The sweep {spec.name} cannot be run:", problems))


def _last(spec: SweepSpec) -> str:
    return list(spec.stages)[-1]


# --- what varies


def _check_size(spec: SweepSpec) -> None:
    total, encoders = 0, 1
    for stage in spec.stages.values():
        domains = stage.domains.values()
        samples = spec.search.samples if any(domain.is_random for domain in domains) else 1
        grid = math.prod(len(domain.values) for domain in domains if domain.kind == "grid")
        count = max(1, len(stage.variants)) * grid * samples * len(stage.seeds) * encoders
        total += count
        if isinstance(stage, PretrainStage):
            encoders = count * max(1, len(stage.checkpoints))
    if total > _MOST_TRIALS:
        raise ConfigError(
            f"The sweep {spec.name} has {total:,} trials, and {_MOST_TRIALS:,} is the most: its grids, variants, "
            f"samples, seeds and checkpoints multiply. Shorten one of them."
        )


def _cells(stage: Stage, spec: SweepSpec) -> Iterator[dict[str, Value]]:
    """What each trial but for its seed is given; samples that are drawn alike come once."""
    domains = stage.domains
    grids = {key: domain.values for key, domain in domains.items() if domain.kind == "grid"}
    drawn = list(_samples(domains, spec))
    for variant in stage.variants or [None]:
        for values in itertools.product(*grids.values()):
            cell = dict(zip(grids, values, strict=True))
            for sample in drawn:
                found = cell | sample
                named = {} if variant is None else {"variant": variant}
                yield named | {key: found[key] for key in domains if key in found}


def _samples(domains: Mapping[str, Domain], spec: SweepSpec) -> Iterator[dict[str, Value]]:
    random = {key: domain for key, domain in domains.items() if domain.is_random}
    seen = set()
    for number in range(spec.search.samples if random else 1):
        sample = {key: domain.at(_share(key, spec.search.seed, number)) for key, domain in random.items()}
        told = json.dumps(sample, default=str)
        if told not in seen:
            seen.add(told)
            yield sample


def _share(key: str, seed: int, sample: int) -> float:
    """From 0 to below 1, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{sample}/{key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _corners(stage: Stage) -> list[dict[str, Value]]:
    """The ends of what a searcher may suggest, so that bounds are known to be sound beforehand."""
    ends = {key: domain.ends() for key, domain in stage.domains.items() if domain.kind != "sample"}
    count = max(map(len, ends.values()))
    return [{key: values[min(index, len(values) - 1)] for key, values in ends.items()} for index in range(count)]


def _encoders(pretrainings: Sequence[Trial]) -> list[tuple[Trial | None, int | None]]:
    return [(trial, step) for trial in pretrainings for step in trial.keep_at or (None,)]


# --- one trial


def _tried(
    spec: SweepSpec, name: str, picked: dict[str, Value], check: CheckArguments | None, now: Now | None
) -> tuple[Trial | None, list[str]]:
    """The trial of a stage's first seed, without an encoder; else what is wrong with it, each with its key."""
    stage = spec.stages[name]
    where = _Places(name, stage, picked)
    options, settings = where.given()
    for key, domain in stage.domains.items():
        if domain.kind == "sample":
            try:
                value = computed(domain.values[0], {**options, **settings})
            except ConfigError as error:
                return None, [f"{where(key)}: {error}"]
            picked[key] = (options if key in OPTIONS[name] else settings)[key] = value
    missing = _missing(spec, name, options, where)
    here = options if now is None else now(name, options)
    lost = [] if check is None else [*_lost(name, here, where, now), *_ds_config_problems(options, where)]
    problems = [*missing, *lost, *_metric_problems(spec, name, options)]
    try:
        recipe = None if options.get("recipe") is None else _recipe(name, options, settings, stage.seeds[0])
    except ConfigError as error:
        problems += _recipe_problems(error, where, settings)
        recipe = None
    if recipe is None:
        return None, problems
    trial = Trial(name, picked, options, settings, stage.seeds[0], recipe)
    if isinstance(stage, PretrainStage) and isinstance(recipe, Recipe):
        trial, found = _placed(trial, stage, recipe.schedule.total_steps)
        problems += found
    arguments = replace(trial, options=here).arguments(spec.resources.cpus)
    try:
        if check is not None and not missing:
            check(name, ["--model", "RUN", *arguments] if _is_pretrained(spec, name) else arguments)
    except ConfigError as error:
        problems.append(_argument_problem(str(error), where))
    except DataError as error:
        if not lost:
            problems.append(f"{where('task' if options.get('task') else 'train')}: {error}")
    return (None if problems else trial), problems


class _Places:
    """Where in the file a trial's keys stand."""

    def __init__(self, name: str, stage: Stage, picked: Mapping[str, Value]) -> None:
        self._name, self._stage, self._picked = name, stage, picked
        self._variant = stage.variants.get(str(picked.get("variant")), {})

    def __call__(self, key: str) -> str:
        if key in self._stage.space:
            return f"{self._name}.space.{key}"
        if key in self._variant:
            return f"{self._name}.variants.{self._picked['variant']}.{key}"
        return f"{self._name}.set.{key}" if key in self._stage.set else f"{self._name}.{key}"

    def given(self) -> tuple[dict[str, Value], dict[str, Value]]:
        """(options, settings of the recipe)."""
        varying = {key: value for key, value in self._picked.items() if key != "variant"}
        values = self._stage.options | self._stage.set | self._variant | varying
        known = OPTIONS[self._name]
        return (
            {key: value for key, value in values.items() if key in known},
            {key: value for key, value in values.items() if key not in known},
        )


def _is_pretrained(spec: SweepSpec, name: str) -> bool:
    return name == "finetune" and spec.pretrain is not None


def _missing(spec: SweepSpec, name: str, options: Mapping[str, Value], where: _Places) -> list[str]:
    """What must be given and is not, or must not and is."""
    problems = []
    if options.get("recipe") is None:
        problems.append(f"{name}.recipe: is missing; write one such as recipe: {_EXAMPLE[name]}")
    if name == "finetune":
        has_model = options.get("model") is not None
        if _is_pretrained(spec, name) and has_model:
            problems.append(f"{where('model')}: is what pretrain makes; leave out one of the two")
        if not _is_pretrained(spec, name) and not has_model:
            problems.append("finetune.model: is missing; give a run, a transformers folder or a name on the Hub")
        if options.get("task") is None and (options.get("train") is None or options.get("dev") is None):
            problems.append("finetune.task: is missing; write one, or train and dev with examples of your own")
    return problems


def _lost(name: str, options: Mapping[str, Value], where: _Places, now: Now | None) -> list[str]:
    """Files and folders that are not there; of the recipe its loading tells."""
    found = {key: missing_path(name, key, value) for key, value in options.items() if key != "recipe"}
    remedy = "" if now is None else ", nor at the same place relative to the sweep; put it back there, or make a link"
    return [f"{where(key)}: {problem}{remedy}" for key, problem in found.items() if problem]


def _ds_config_problems(options: Mapping[str, Value], where: _Places) -> list[str]:
    try:
        if options.get("ds_config") is not None:
            _known_ds_config(options["ds_config"])
    except ConfigError as error:
        return [f"{where('ds_config')}: {error}"]
    return []


@cache
def _known_ds_config(name_or_path: str) -> None:
    read_deepspeed_json(name_or_path)


def _metric_problems(spec: SweepSpec, name: str, options: Mapping[str, Value]) -> list[str]:
    there = metrics_of(name, options)
    if spec.metric is None or name != _last(spec) or spec.metric.name in there:
        return []
    return [
        f"metric.name: {spec.metric.name} is not reported by {options.get('task') or name}"
        f"{did_you_mean(spec.metric.name, there) or ', which reports ' + ', '.join(there)}"
    ]


def _recipe(
    name: str, options: Mapping[str, Value], settings: Mapping[str, Value], seed: int
) -> Recipe | FinetuneRecipe:
    overrides = [*_overrides(settings), f"seed={seed}"]
    if name == "pretrain":
        return load_recipe(options["recipe"], overrides)
    return load_finetune_recipe(options["recipe"], options.get("task") or "", overrides)


def _recipe_problems(error: ConfigError, where: _Places, settings: Mapping[str, Value]) -> list[str]:
    """A recipe's problems, under the sweep's keys where they are about those."""
    first, *rest = str(error).splitlines()
    problems = []
    for line in rest:
        key, _, problem = line.strip().partition(": ")
        given = f", and is {settings[key]!r}" if key in settings else ""
        problems.append(f"{where(key)}: {problem}{given}")
    return problems or [f"{where('recipe')}: {first}"]


def _argument_problem(message: str, where: _Places) -> str:
    """An argparse message under the sweep's key."""
    if found := re.fullmatch(r"argument --([\w-]+)[^:]*: (.*)", message, re.DOTALL):
        return f"{where(found[1].replace('-', '_'))}: {found[2]}"
    return f"{where('')[:-1]}: {message}"


def _placed(trial: Trial, stage: PretrainStage, total_steps: int) -> tuple[Trial, list[str]]:
    """A pretraining with the steps at which it ends and keeps checkpoints."""
    stop_at, *keep_at = [max(1, round(share * total_steps)) for share in (stage.stop_at_share or 1, *stage.checkpoints)]
    problems = []
    if len({*keep_at}) < len(keep_at):
        problems.append(f"pretrain.checkpoints: of {total_steps:,} steps some are the same, {keep_at}; leave some out")
    placed = replace(
        trial, stop_at=stop_at if stop_at < total_steps else None, keep_at=tuple(sorted(keep_at)),
        stop_on_collapse=stage.stop_on_collapse,
    )  # fmt: skip
    return placed, problems


def _of(trial: Trial, seed: int, pretraining: Trial | None, checkpoint: int | None) -> Trial:
    """The same trial by another seed, of an encoder that is pretrained before it."""
    values: dict[str, Value] = {}
    if pretraining is not None:
        values |= {f"pretrain.{key}": value for key, value in pretraining.values.items()}
        if checkpoint is not None:
            values["pretrain.step"] = checkpoint
    return replace(
        trial, values=values | trial.values | {"seed": seed}, seed=seed, pretraining=pretraining, checkpoint=checkpoint,
        recipe=trial.recipe.model_copy(update={"seed": seed}),
    )  # fmt: skip


def _same(trials: Sequence[Trial]) -> Iterator[str]:
    """A message for each trial that another is, too."""
    first: dict[str, Trial] = {}
    for trial in trials:
        other = first.setdefault(trial.digest, trial)
        if other is not trial:
            yield f"{trial.stage}: {other.label} and {trial.label} are the same run, which would count twice"
