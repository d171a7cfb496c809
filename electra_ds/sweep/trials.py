"""Expand a sweep into its trials, each of which is a command line that you can run by hand. Imports neither torch nor
Ray."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from electra_ds.config.deepspeed import read_deepspeed_json
from electra_ds.config.finetune_recipe import FinetuneRecipe, load_finetune_recipe
from electra_ds.config.recipe import Recipe, load_recipe
from electra_ds.config.values import as_overrides
from electra_ds.core.errors import ConfigError, DataError, did_you_mean
from electra_ds.sweep.options import (
    HOW,
    OPTIONS,
    check_options,
    key_problem,
    metrics_of,
    missing_path,
    recipe_keys,
    words,
)
from electra_ds.sweep.spec import PretrainStage, Stage, SweepSpec, Value
from electra_ds.sweep.sweep_file import listed

_LONGEST_LABEL = 80
_MOST_TRIALS = 20_000
_EXAMPLE = {"pretrain": "rc2020-small", "finetune": "rc2020"}
Relocate = Callable[[str, Mapping[str, Value]], dict[str, Value]]
"""A function that returns a stage's options with the current places of their inputs. None: no input has moved."""


_YOUNGER_THAN_KEYS = {
    "generator": ("intermediate_size", "learning_rate", "beta1", "beta2", "total_steps", "max_grad_norm", "recipe")
}
"""Recipe keys that did not exist when trials got their keys. They are left out while they are null, so that the folders
of sweeps that were run before are still found."""


@dataclass(frozen=True)
class Trial:
    """One run of one command."""

    stage: str
    """`pretrain` or `finetune`."""
    values: dict[str, Value]
    """The values that distinguish it: variant, what varies, seed. Those of its pretrained encoder come first, with the
    prefix `pretrain.`."""
    options: dict[str, Value]
    settings: dict[str, Value]
    """The overrides of the recipe, by dotted key."""
    seed: int
    recipe: Recipe | FinetuneRecipe = field(repr=False)
    """The resolved recipe."""
    stop_at: int | None = None
    """The step of the schedule at which it ends."""
    keep_at: tuple[int, ...] = ()
    """The steps whose checkpoints are kept for finetuning."""
    stop_on_collapse: bool = False
    pretraining: Trial | None = None
    """The trial whose encoder it finetunes."""
    checkpoint: int | None = None
    """The step of the encoder's checkpoint; None for the last one."""

    @cached_property
    def key(self) -> str:
        """The name of its folder: a readable label, and a digest of everything that its outcome depends on."""
        label = re.sub(r"[^A-Za-z0-9._=+-]+", "_", self.label)[:_LONGEST_LABEL].strip("-._")
        return f"{label}-{self.digest[:12]}"

    @property
    def label(self) -> str:
        return "-".join(_shown(self.values)) or self.stage

    @cached_property
    def digest(self) -> str:
        """The digest of everything that the outcome depends on, without names and the way it is run."""
        own = {
            name: words(self.stage, name, value) for name, value in self.options.items() if name not in HOW | {"recipe"}
        }
        if self.stage == "finetune" and not (self.options.get("best") or self.options.get("early_stopping")):
            own.pop("eval_every", None)
        recipe = self.recipe.model_dump(mode="json", exclude={"name", "description"})
        if recipe.get("objective") == "electra":  # trial keys are older than other objectives
            del recipe["objective"]
        for section, names in _YOUNGER_THAN_KEYS.items():
            for name in names:
                if section in recipe and recipe[section].get(name) is None:
                    recipe[section].pop(name, None)
        if isinstance(self.recipe, Recipe) and (first := self.recipe.first_recipe()) is not None:
            recipe["generator"]["recipe"] = first.model_dump(mode="json", exclude={"name", "description"})
        outcome = {
            "stage": self.stage,
            "options": {name: given for name, given in own.items() if given},
            "recipe": recipe,
            "stop_at": self.stop_at,
            "stop_on_collapse": self.stop_on_collapse,
            "checkpoint": self.checkpoint,
            "pretraining": self.pretraining.digest if self.pretraining else None,
        }
        return hashlib.sha256(json.dumps(outcome, sort_keys=True).encode()).hexdigest()

    def arguments(self, threads: int) -> list[str]:
        """Return the command's arguments for a new run, without the run directory and a pretrained model."""
        given = [word for name, value in self.options.items() for word in words(self.stage, name, value)]
        given += ["--seed", str(self.seed)]
        if self.settings:
            given += ["--set", *as_overrides(self.settings)]
        collapse = ["--stop-on-collapse"] if self.stop_on_collapse else []
        return [*given, *self.ending(), *collapse, "--threads", str(threads)]

    def ending(self) -> list[str]:
        """Return the arguments for the run's end and the checkpoints it keeps, for a new or a resumed run."""
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
    """Return a value as labels and tables show it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def trials_text(trials: int) -> str:
    return f"{trials:,} trial{'' if trials == 1 else 's'}"


def expand(spec: SweepSpec, relocate: Relocate | None = None, *, check: bool = True) -> list[Trial]:
    """Return every trial of a sweep, pretrainings first, without those that Optuna suggests.

    Random values depend on the search's seed, the key and the number of the sample, so every seed and every cell of the
    grid has the same ones, and more samples leave the earlier ones unchanged. check: also check the inputs, because the
    sweep is about to run. Raises ConfigError, before anything runs, with every recipe, option, path and metric that
    cannot be used.
    """
    trials: list[Trial] = []
    problems: dict[str, None] = {}
    total = 0
    for name, stage in spec.stages.items():
        encoders: list[tuple[Trial | None, int | None]] = [(None, None)]
        if name == "finetune" and spec.pretrain is not None:
            encoders = [(trial, step) for trial in trials for step in trial.keep_at or (None,)]
        cells = _corners(stage) if spec.is_suggested else list(itertools.islice(_cells(stage, spec), _MOST_TRIALS + 1))
        total += len(cells) * len(stage.seeds) * len(encoders)
        if total > _MOST_TRIALS:
            raise ConfigError(
                f"The sweep {spec.name} has more than {_MOST_TRIALS:,} trials: its grids, variants, samples, seeds and "
                f"checkpoints multiply. Shorten one of them."
            )
        for picked in cells:
            trial, found = _Cell(spec, name, picked).trial(relocate, check=check)
            problems |= dict.fromkeys(found)
            if trial is not None and not spec.is_suggested:
                trials += [_with_seed(trial, seed, *encoder) for seed in stage.seeds for encoder in encoders]
    first: dict[str, Trial] = {}
    for trial in trials if not problems else []:
        if (other := first.setdefault(trial.digest, trial)) is not trial:
            problems[f"{trial.stage}: {other.label} and {trial.label} are the same run, which would count twice"] = None
    _raise(spec, list(problems))
    return trials


def suggested(
    spec: SweepSpec, values: Mapping[str, Value], relocate: Relocate | None = None, *, check: bool = True
) -> Trial:
    """Return the trial of a suggestion for a sweep of one stage. Its `seed` is by default the stage's first one.

    Raises ConfigError if the suggestion is not a valid trial.
    """
    ((name, stage),) = spec.stages.items()
    varying = {key: value for key, value in values.items() if key != "seed"}
    keys = recipe_keys(name, stage.options, stage.set)
    problems = [f"{name}.{key}: {problem}" for key in varying if (problem := key_problem(name, key, keys))]
    trial, found = (None, []) if problems else _Cell(spec, name, varying).trial(relocate, check=check)
    _raise(spec, [*problems, *found])
    assert trial is not None
    return _with_seed(trial, values.get("seed", stage.seeds[0]), None, None)


def _raise(spec: SweepSpec, problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError(listed(f"The sweep {spec.name} cannot be run:", problems))


# --- what varies


def _cells(stage: Stage, spec: SweepSpec) -> Iterator[dict[str, Value]]:
    """Yield the values of each trial except its seed. Equal samples come only once."""
    grids = [[(key, value) for value in each.values] for key, each in stage.space.items() if not each.is_random]
    random = {key: domain for key, domain in stage.space.items() if domain.is_random}
    drawn = {}
    for number in range(spec.search.samples if random else 1):
        sample = {key: domain.at(_share(key, spec.search.seed, number)) for key, domain in random.items()}
        drawn[json.dumps(sample)] = sample
    variants = [{"variant": name} for name in stage.variants] or [{}]
    for variant, values, sample in itertools.product(variants, itertools.product(*grids), drawn.values()):
        found = dict(values) | sample
        yield variant | {key: found[key] for key in stage.space}


def _share(key: str, seed: int, sample: int) -> float:
    """Return a number in [0, 1) that is the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{sample}/{key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _corners(stage: Stage) -> list[dict[str, Value]]:
    """Return the extreme suggestions of a searcher, so that bounds are checked before anything runs."""
    ends = {key: domain.ends() for key, domain in stage.space.items()}
    longest = max(map(len, ends.values()))
    return [{key: values[min(index, len(values) - 1)] for key, values in ends.items()} for index in range(longest)]


def _with_seed(trial: Trial, seed: int, pretraining: Trial | None, checkpoint: int | None) -> Trial:
    """Return the same trial with another seed, for an encoder that the sweep pretrains."""
    values: dict[str, Value] = {}
    if pretraining is not None:
        values |= {f"pretrain.{key}": value for key, value in pretraining.values.items()}
        if checkpoint is not None:
            values["pretrain.step"] = checkpoint
    return replace(
        trial,
        values=values | trial.values | {"seed": seed},
        seed=seed,
        pretraining=pretraining,
        checkpoint=checkpoint,
        recipe=trial.recipe.model_copy(update={"seed": seed}),
    )


# --- one checked trial


class _Cell:
    """One combination of a stage's values, which all seeds share, and the place of each value in the file."""

    def __init__(self, spec: SweepSpec, name: str, picked: dict[str, Value]) -> None:
        self._spec, self._name, self._stage, self._picked = spec, name, spec.stages[name], picked
        self._variant = self._stage.variants.get(str(picked.get("variant")), {})
        varying = {key: value for key, value in picked.items() if key != "variant"}
        values = self._stage.options | self._stage.set | self._variant | varying
        self._options = {key: value for key, value in values.items() if key in OPTIONS[name]}
        self._settings = {key: value for key, value in values.items() if key not in OPTIONS[name]}

    def _place(self, key: str) -> str:
        if key in self._stage.space:
            return f"{self._name}.space.{key}"
        if key in self._variant:
            return f"{self._name}.variants.{self._picked['variant']}.{key}"
        return f"{self._name}.set.{key}" if key in self._stage.set else f"{self._name}.{key}"

    def trial(self, relocate: Relocate | None, *, check: bool) -> tuple[Trial | None, list[str]]:
        """Return (trial of the stage's first seed, without an encoder, or None; problems, each with its key)."""
        options, stage, seed = self._options, self._stage, self._stage.seeds[0]
        problems = [*self._missing(), *self._metric_problems()]
        if check:
            here = options if relocate is None else relocate(self._name, options)
            problems += self._lost(here, has_moved=relocate is not None) or ([] if problems else self._unfit(here))
        try:
            recipe = self._recipe(seed)
        except ConfigError as error:
            return None, problems + self._recipe_problems(error)
        if check and isinstance(recipe, Recipe) and recipe.required_weights and not options.get("init_from"):
            try:
                first = recipe.first_recipe()
            except ConfigError as error:
                problems.append(f"{self._place('generator.recipe')}: {error}")
            else:
                other = recipe.instead_of_weights
                if first is None:
                    problems.append(
                        f"{self._place('init_from')}: is missing; the objective {recipe.objective} needs a trained "
                        f"{recipe.required_weights}, as a run, a folder, or a name on the Hub"
                        f"{f', or {self._name}.set.{other}' if other else ''}"
                    )
        if recipe is None or problems:
            return None, problems
        trial = Trial(self._name, self._picked, options, self._settings, seed, recipe)
        if isinstance(stage, PretrainStage) and isinstance(recipe, Recipe):
            total = recipe.schedule.total_steps
            stop_at, *keep_at = [
                max(1, round(share * total)) for share in (stage.stop_at_share or 1, *stage.checkpoints)
            ]
            trial = replace(
                trial,
                stop_at=stop_at if stop_at < total else None,
                keep_at=tuple(sorted({*keep_at})),
                stop_on_collapse=stage.stop_on_collapse,
            )
        return trial, []

    @property
    def _is_pretrained_first(self) -> bool:
        return self._name == "finetune" and self._spec.pretrain is not None

    def _missing(self) -> Iterator[str]:
        """Yield problems of missing and of forbidden keys."""
        options = self._options
        if options.get("recipe") is None:
            yield f"{self._name}.recipe: is missing; write one such as recipe: {_EXAMPLE[self._name]}"
        if self._name == "pretrain":
            return
        if self._is_pretrained_first and options.get("model") is not None:
            yield f"{self._place('model')}: is made by pretrain; leave out one of the two"
        if not self._is_pretrained_first and options.get("model") is None:
            yield "finetune.model: is missing; give a run, a transformers folder or a name on the Hub"
        if options.get("task") is None and (options.get("train") is None or options.get("dev") is None):
            yield "finetune.task: is missing; write one, or train and dev with your own examples"

    def _lost(self, options: Mapping[str, Value], *, has_moved: bool) -> list[str]:
        """Return problems of missing files and folders, except recipes, which loading reports."""
        remedy = ", nor at the same place relative to the sweep; put it back there, or make a link" if has_moved else ""
        lost = {key: missing_path(self._name, key, value) for key, value in options.items() if key != "recipe"}
        return [f"{self._place(key)}: {problem}{remedy}" for key, problem in lost.items() if problem]

    def _unfit(self, options: Mapping[str, Value]) -> list[str]:
        """Return problems of options that exclude each other, and of the files that they name."""
        place = self._name
        try:
            check_options(self._name, {"model": "RUN", **options} if self._is_pretrained_first else options)
            if options.get("ds_config") is not None:
                place = self._place("ds_config")
                read_deepspeed_json(options["ds_config"])
        except DataError as error:
            return [f"{self._place('task' if options.get('task') else 'train')}: {error}"]
        except ConfigError as error:
            return [f"{place}: {error}"]
        return []

    def _metric_problems(self) -> Iterator[str]:
        metric = self._spec.metric
        if metric is None or self._name != self._spec.last_stage:
            return
        there = metrics_of(self._name, self._options, self._settings)
        if metric.name not in there:
            known = did_you_mean(metric.name, there) or ", which reports " + ", ".join(there)
            yield f"metric.name: {metric.name} is not reported by {self._options.get('task') or self._name}{known}"

    def _recipe(self, seed: int) -> Recipe | FinetuneRecipe | None:
        overrides, given = [*as_overrides(self._settings), f"seed={seed}"], self._options.get("recipe")
        if given is None:
            return None
        if self._name == "pretrain":
            return load_recipe(given, overrides)
        return load_finetune_recipe(given, self._options.get("task") or "", overrides)

    def _recipe_problems(self, error: ConfigError) -> list[str]:
        """Return a recipe's problems, under the sweep's keys if they are about these."""
        first, *rest = str(error).splitlines()
        problems = []
        for line in rest:
            key, _, problem = line.strip().partition(": ")
            given = f", and is {self._settings[key]!r}" if key in self._settings else ""
            problems.append(f"{self._place(key)}: {problem}{given}")
        return problems or [f"{self._place('recipe')}: {first}"]
