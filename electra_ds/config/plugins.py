"""Parts that come by name, ours and those of other packages.

A package registers a part with an entry point in the group of its kind:

    [project.entry-points."electra_ds.objectives"]
    my-objective = "my_package.objective:MyObjective"

A part that is not registered is given by its place, `my_package.objective:MyObjective`.
"""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from electra_ds.core.errors import ElectraError, PluginError, did_you_mean


@dataclass(frozen=True)
class Kind:
    """One kind of part. Each part is a class."""

    name: str
    """Such as `objective`."""
    base: str
    """The class that it is a subclass of, for messages."""
    guide: str
    """The page that says how to write one."""
    method: str
    """A method or attribute that every class of this kind has, by which it is recognised without importing the base."""
    needs: tuple[str, ...] = ()
    """Further attributes that it must have."""
    ours: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Our own, in the form of entry points, so that a checkout finds them even if it is not installed."""

    @property
    def group(self) -> str:
        """The group of its entry points."""
        return f"electra_ds.{self.name}s"


_OBJECTIVES = "electra_ds.pretraining.objectives"
OBJECTIVE = Kind(
    "objective",
    "electra_ds.Objective",
    "docs/objectives.md",
    "recipe_type",
    ("metric_labels", "main_metric", "key_metrics", "encoder"),
    {
        "electra": f"{_OBJECTIVES}.electra:ElectraObjective",
        "electra-15": f"{_OBJECTIVES}.electra_15:Electra15Objective",
        "mlm": f"{_OBJECTIVES}.mlm:MlmObjective",
        "replace-mlm": f"{_OBJECTIVES}.replace_mlm:ReplaceMlmObjective",
        "all-tokens-mlm": f"{_OBJECTIVES}.all_tokens_mlm:AllTokensMlmObjective",
        "fast-electra": f"{_OBJECTIVES}.fast_electra:FastElectraObjective",
        "fast-electra-offline": f"{_OBJECTIVES}.fast_electra_offline:FastElectraOfflineObjective",
    },
)
_TASKS = "electra_ds.finetuning.tasks"
TASK = Kind(
    "task",
    "electra_ds.FinetuneTask",
    "docs/tasks.md",
    "evaluate",
    ("load", "new_head"),
    {
        "question-answering": f"{_TASKS}.question_answering:QuestionAnsweringTask",
        "token-classification": f"{_TASKS}.token_classification:TokenClassificationTask",
        "multi-label": f"{_TASKS}.multi_label:MultiLabelTask",
        "multiple-choice": f"{_TASKS}.multiple_choice:MultipleChoiceTask",
        "sentence-embeddings": f"{_TASKS}.sentence_embeddings:SentenceEmbeddingsTask",
    },
)
"""Kinds of tasks of the user's own; those of GLUE and SQuAD have fixed names besides."""
READER = Kind("reader", "electra_ds.Source", "docs/corpora.md", "documents", ("signature", "description"))
METRIC = Kind("metric", "electra_ds.Metric", "docs/tasks.md", "score")
OPTIMIZER = Kind("optimizer", "electra_ds.UpdateRule", "docs/plugins.md", "update")
CALLBACK = Kind("callback", "electra_ds.Callback", "docs/python.md", "on_evaluate")
KINDS = (OBJECTIVE, TASK, READER, METRIC, OPTIMIZER, CALLBACK)


class Part(NamedTuple):
    """A registered name."""

    kind: Kind
    name: str
    places: tuple[str, ...]
    """The `module:Class` of each package that registers it; a package that is installed twice counts once."""
    problem: str
    """Why it cannot be used; empty if it can."""


def parts() -> Iterator[Part]:
    """Yield every registered part, once it was loaded to find its problems."""
    for kind in KINDS:
        for name, places in sorted(_registered(kind).items()):
            problem = ""
            try:
                find(kind, name)
            except PluginError as error:
                problem = str(error)
            yield Part(kind, name, tuple(sorted(places)), problem)


@cache
def find(kind: Kind, name: str) -> Any:
    """Return the class of a part.

    name: a registered name, or `module:Class`. Raises PluginError if no package or several packages register the name,
    if its module cannot be imported, or if it is no such class.
    """
    if ":" in name:
        return _load(kind, name, name)
    registered = _registered(kind)
    if name not in registered:
        there = f"The registered ones are {', '.join(sorted(registered))}" if registered else "None is registered"
        raise PluginError(
            f"There is no {kind.name} {name!r}{did_you_mean(name, registered) or '.'} {there}; install the package "
            f"that registers it, or write package.module:Class."
        )
    found = registered[name]
    if len(found) > 1:
        raise PluginError(
            f"Two packages register {_an(kind)} {name!r}: {' and '.join(sorted(found))}. Uninstall one of them, or "
            f"write the one you want as package.module:Class."
        )
    return _load(kind, next(iter(found)), name)


def find_objective(name: str) -> Any:
    """Return the class of an objective, a subclass of `pretraining.objectives.base.Objective`. Raises PluginError."""
    return find(OBJECTIVE, name)


def registered_names(kind: Kind) -> list[str]:
    """Return the names of a kind of part, ours and those of installed packages."""
    return sorted(_registered(kind))


def _registered(kind: Kind) -> dict[str, set[str]]:
    """Return the places that register each name."""
    found = {name: {value} for name, value in kind.ours.items()}
    for entry in entry_points(group=kind.group):
        found.setdefault(entry.name, set()).add(entry.value)
    return found


def _load(kind: Kind, value: str, name: str) -> Any:
    module_name, _, attribute = value.partition(":")
    what, source = f"The {kind.name} {name!r}", "" if value == name else f" from {value}"
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever it raises, other parts must work
        absent = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        advice = ". Install its package, or put its folder on PYTHONPATH." if absent else _place(error)
        raise PluginError(f"{what} cannot be loaded{source}: {_message(error)}{advice}") from error
    found = getattr(module, attribute, None)
    if found is None:
        hint = did_you_mean(attribute, dir(module)) or "."
        raise PluginError(f"{what} cannot be loaded{source}: {module_name} has no {attribute}{hint}")
    if not isinstance(found, type) or not hasattr(found, kind.method):
        raise PluginError(f"{what} is not a subclass of {kind.base} ({kind.guide}).")
    missing = [*getattr(found, "__abstractmethods__", ()), *(name for name in kind.needs if not hasattr(found, name))]
    if missing:
        raise PluginError(f"{what} lacks {', '.join(sorted(missing))} ({kind.guide}).")
    return found


def _message(error: Exception) -> str:
    if isinstance(error, SyntaxError):
        return f"{error.msg} ({error.filename}, line {error.lineno})"
    said = str(error).rstrip(".")
    return said if isinstance(error, ImportError | ElectraError) else f"{type(error).__name__}: {said}"


def _place(error: Exception) -> str:
    """Return the place of an error in the package that raised it, for the end of a message."""
    if isinstance(error, SyntaxError):
        return "."
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    own = [frame for frame in frames if f"{os.sep}electra_ds{os.sep}" not in frame.filename]
    return f" ({own[-1].filename}, line {own[-1].lineno})." if own else "."


def _an(kind: Kind) -> str:
    return f"{'an' if kind.name[0] in 'aeiou' else 'a'} {kind.name}"
