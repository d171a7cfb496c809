"""The command options that a sweep's stage may set, by their names in its file. Imports neither torch nor Ray, unless a
recipe has an objective of another package."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_origin

from electra_ds.config.finetune_recipe import FinetuneRecipe
from electra_ds.config.names import DS_CONFIGS, FINETUNE_RECIPES, RECIPES, SQUAD_TASKS, shipped_names
from electra_ds.config.option import options_of, value_type
from electra_ds.config.options import FinetuneOptions, PretrainOptions, RunOptions, TaskSource
from electra_ds.config.plugins import TASK, find, find_objective
from electra_ds.config.recipe import ElectraRecipe, named_values, recipe_type
from electra_ds.config.values import inner_key_problem, values_yaml
from electra_ds.core.errors import ConfigError, DataError, did_you_mean
from electra_ds.core.files import is_hub_model
from electra_ds.finetuning.glue import GLUE

KINDS: dict[str, type[RunOptions]] = {"pretrain": PretrainOptions, "finetune": FinetuneOptions}
_KNOWN = options_of(PretrainOptions) | options_of(FinetuneOptions)
"""An option that both commands have is the same in both."""
HOW = frozenset(name for name, of in _KNOWN.items() if of.is_how)
"""The options that do not affect a trial's outcome."""
OPTIONS = {
    stage: frozenset(name for name, of in options_of(kind).items() if not of.instead) for stage, kind in KINDS.items()
}
"""The options that a stage may set."""
INSTEAD = {name: of.instead for name, of in _KNOWN.items() if of.instead}
"""The advice for options that the sweep sets itself."""
NAMED = frozenset(name for name, of in _KNOWN.items() if of.names)
"""The options whose value is a name, a path, or a list of these."""
SCORE = "score"
"""The first metric of a finetuning, on the first development set."""
INPUTS = "inputs"
"""The subfolder of a sweep for copies of recipes and DeepSpeed JSON files."""
_CORPUS = ("builtin", "hub:")
_SHIPPED = {("pretrain", "recipe"): RECIPES, ("finetune", "recipe"): FINETUNE_RECIPES}


# --- keys and values


def objective_name(options: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the objective of a pretraining's recipe and settings, or ELECTRA's if the recipe cannot be read."""
    recipe, values = options.get("recipe"), {}
    with contextlib.suppress(ConfigError):  # reported when the recipe is loaded
        values = named_values(recipe) if isinstance(recipe, str) else {}
    return str(settings.get("objective", values.get("objective", "electra")))


def recipe_keys(stage: str, options: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys of a stage's recipe, which for a pretraining depend on its objective."""
    if stage == "finetune":
        return FinetuneRecipe.dotted_keys()
    try:
        return recipe_type({"objective": objective_name(options, settings)}).dotted_keys()
    except ConfigError:
        return ElectraRecipe.dotted_keys()


def key_problem(stage: str, key: str, keys: Sequence[str]) -> str:
    """Return a message if a key is neither the stage's option nor one of its recipe's `keys`, else an empty text."""
    if key in INSTEAD:
        return f"is the sweep's to set; {INSTEAD[key]}"
    if key in OPTIONS[stage] or key in keys:
        return ""
    if inner := [known for known in keys if known.startswith(f"{key}.")]:
        return f"is a section of the recipe; write dotted keys, such as {inner[0]}"
    return inner_key_problem(key) or f"unknown key{nearest(key, [*OPTIONS[stage], *keys])}"


def nearest(key: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown key, with suggestions. The key may lack its section."""
    names = sorted(known)
    same_end = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return did_you_mean(same_end[0], same_end) if same_end else did_you_mean(key, names)


def value_problem(stage: str, name: str, value: Any) -> str:
    """Return a message if an option's value is wrong, else an empty text."""
    if isinstance(value, Mapping) or (
        isinstance(value, list) and get_origin(value_type(KINDS[stage], name)) is not list
    ):
        return f"takes one value, not {value}; to vary it, write {name}: {{grid: [...]}} under space"
    named = _flattened(value) if name in NAMED and value is not None else []
    if wrong := [each for each in named if not isinstance(each, str) or not each.strip()]:
        return f"is a name or a path, not {wrong[0]!r}"
    try:
        KINDS[stage].of({name: _as_given(stage, name, value)})
    except ConfigError as error:
        return str(error).splitlines()[1].strip().removeprefix(f"{name}: ")
    return ""


def check_options(stage: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError if options exclude each other, and DataError if their examples on this machine are wrong."""
    found = KINDS[stage].of({name: _as_given(stage, name, value) for name, value in options.items()})
    found.check()
    if isinstance(found, FinetuneOptions) and (problem := _examples_problem(found.task, found.source())):
        raise DataError(problem)


@cache
def _examples_problem(task: str | None, source: TaskSource) -> str:
    """Return a message if examples on this machine are wrong, which would otherwise show hours into a sweep."""
    from electra_ds.finetuning.load_task import load_task

    if source.folder is None and source.train is None:
        return ""
    try:
        load_task(task, source)
    except (ConfigError, DataError) as error:
        return str(error)
    return ""


def words(stage: str, name: str, value: Any) -> list[str]:
    """Return an option as command-line words, none for null and for a flag that is not set."""
    of, value = _KNOWN[name], _as_given(stage, name, value)
    assert of.flag is not None
    if value is None or (value is False and not of.off):
        return []
    if isinstance(value, bool):
        return [of.flag if value else of.off]
    if isinstance(value, list) and any(isinstance(each, list) for each in value):
        return [word for each in value for word in words(stage, name, each)]  # several corpora
    return [of.flag, *map(str, value if isinstance(value, list) else [value])]


def _as_given(stage: str, name: str, value: Any) -> Any:
    """Return a value as the command takes it: 8 for 8.0, a number as text where an option is text, on or off."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool):
        on = _KNOWN[name].on
        return (on if value else "off") if on else value
    is_text = isinstance(value, int | float) and value_type(KINDS[stage], name) is str
    return str(value) if is_text else value


def _flattened(value: Any) -> list[Any]:
    return [inner for each in value for inner in _flattened(each)] if isinstance(value, list) else [value]


# --- paths


def full_path(stage: str, name: str, value: Any) -> Any:
    """Return the full path of an option's path, and any other value unchanged, such as a Hub name or a shipped name."""
    with contextlib.suppress(RuntimeError):  # a user's home that does not exist
        return str(Path(value).expanduser().absolute()) if _is_path(stage, name, value) else value
    return value


def is_small_file(stage: str, name: str, value: Any) -> bool:
    """Return True for the user's own recipe or DeepSpeed JSON, of which a sweep keeps a copy."""
    return _is_settings(name) and _is_path(stage, name, value)


def own_content(stage: str, name: str, value: str) -> bytes:
    """Return a sweep's copy of such a file; a recipe that names other recipes is made complete. Raises
    ConfigError."""
    try:
        content = Path(value).read_bytes()
    except OSError as error:
        raise ConfigError(f"Cannot read {value}: {error.strerror}.") from error
    if name == "recipe" and any(key in content for key in (b"extends", b"recipe")):
        return values_yaml(named_values(value, _SHIPPED[stage, name])).encode()
    return content


def relative_path(folder: Path, stage: str, name: str, value: Any) -> Any:
    """Return the place of a sweep's copy relative to the sweep's folder, which may be moved."""
    is_kept = _is_settings(name) and isinstance(value, str) and value.startswith(f"{folder}/{INPUTS}/")
    return value.removeprefix(f"{folder}/") if is_kept else value


def absolute_path(folder: Path, stage: str, name: str, value: Any) -> Any:
    """Undo `relative_path`. Anything that is not a copy stays unchanged."""
    is_kept = _is_settings(name) and isinstance(value, str) and value.startswith(f"{INPUTS}/")
    return str(folder.absolute() / value) if is_kept and (folder / value).is_file() else value


def moved_path(home: Path, folder: Path, stage: str, name: str, value: Any) -> Any:
    """Return the current place of an input that may have moved together with a sweep's folder, once at `home`.

    It is searched for at the same place relative to the folder, and returned unchanged if it is not there.
    """
    if isinstance(value, list):
        return [moved_path(home, folder, stage, name, each) for each in value]
    if _is_settings(name) or not _is_path(stage, name, value) or not Path(value).is_absolute():
        return value
    place = Path(os.path.normpath(folder / os.path.relpath(value, home)))
    return str(place) if place.exists() else value


def missing_path(stage: str, name: str, value: Any) -> str:
    """Return a message if an option names a path that does not exist, else an empty text."""
    if isinstance(value, list):
        return next((missing for each in value if (missing := missing_path(stage, name, each))), "")
    if not _is_path(stage, name, value):
        return ""
    path, names = Path(value), _KNOWN[name].names
    if path.is_file() if names == "file" else path.is_dir() if names == "folder" else path.exists():
        return ""
    kind = f"{names} " if names in ("file", "folder") else ""
    return f"there is no {kind}{path}{'; a model of the Hub is written OWNER/NAME' if names == 'model' else ''}"


def _is_path(stage: str, name: str, value: Any) -> bool:
    if not isinstance(value, str) or not value:
        return False
    names = _KNOWN[name].names if name in _KNOWN else ""
    if names == "model":
        return not is_hub_model(value)
    if names == "corpus":
        return not value.startswith(_CORPUS)
    if names == "settings":
        folder = DS_CONFIGS if name == "ds_config" else _SHIPPED[stage, name]
        return value not in shipped_names(folder) and (Path(value).exists() or "/" in value)
    return names in ("file", "folder")


def _is_settings(name: str) -> bool:
    return name in _KNOWN and _KNOWN[name].names == "settings"


# --- metrics


def metrics_of(stage: str, options: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the metrics that every evaluation of such a trial reports, or may report for the user's own examples; the
    main one comes first."""
    if stage == "pretrain":
        name = objective_name(options, settings)
        if metrics := recipe_type({"objective": name}).METRICS:
            return metrics
        objective = find_objective(name)
        others = objective.metric_labels.keys() - {objective.main_metric, *objective.baselines.values()}
        return (objective.main_metric, *sorted(others))
    task = options.get("task")
    added = settings.get("metrics")
    more = tuple(str(name).rpartition(":")[2] for name in added) if isinstance(added, list | tuple) else ()
    if task in SQUAD_TASKS:
        return (SCORE, "exact", "f1")
    if task == "mnli":
        return (SCORE, "accuracy", "accuracy_mismatched", *more)
    if task in GLUE:
        return (SCORE, *GLUE[task].metrics, *more)
    if task is not None:
        kind = find(TASK, task)
        return (SCORE, *kind.possible_metrics, *(more if kind.has_own_metrics else ()))
    by_kind = {
        "classification": ("accuracy", "f1_macro", "f1", "matthews"),
        "regression": ("spearman", "pearson", "mse"),
    }
    wanted = options.get("label_kind")
    return (SCORE, *(name for kind, names in by_kind.items() if wanted in (None, kind) for name in names), *more)
