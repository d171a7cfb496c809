"""Read the scores.json files that finetuning runs write, and group those that belong together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from electra_ds.core.errors import CheckpointError, ConfigError
from electra_ds.report.glue_score import TaskMetrics

BOUNDED = {
    "accuracy", "f1", "f1_macro", "f1_micro", "precision", "recall", "matthews", "pearson", "spearman", "mrr",
    "accuracy_at_1", "recall_at_10",
    "exact", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1", "best_exact", "best_f1",
}  # fmt: skip
"""Shares and correlations, which tables show in percent. Any other metric keeps its own unit."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class ScoredSet(_Record):
    rows: int = Field(gt=0)
    metrics: dict[str, FiniteFloat]
    baseline: dict[str, float] = {}
    """The scores of one prediction for every row; empty for SQuAD 1.1 and in runs that did not record them."""
    warning: str = ""
    """The warning about a model that is no better than one prediction for every row."""


class Scores(_Record):
    """The content of scores.json."""

    format: Literal[1]
    task: str
    recipe: str
    recipe_source: str
    """`shipped`, or a fingerprint of the user's own file."""
    changes: list[str]
    """The changes to that recipe."""
    seed: int
    model: str
    model_fingerprint: str
    data_fingerprint: str
    step: int
    chosen: str
    """The evaluation whose weights were scored, such as `last`."""
    sets: dict[str, ScoredSet]

    @property
    def full_recipe(self) -> str:
        """The recipe's name with its source and changes."""
        name = self.recipe if self.recipe_source == "shipped" else f"{self.recipe} ({self.recipe_source})"
        return " ".join([name, *(["with", ", ".join(self.changes)] if self.changes else [])])

    def dev_metrics(self) -> dict[str, float]:
        """Return the metrics of the development sets, under the names in `glue_score`."""
        return self._of_dev(lambda scored: scored.metrics)

    def dev_baselines(self) -> dict[str, float]:
        """Return the baselines of the development sets, under the same names."""
        return self._of_dev(lambda scored: scored.baseline)

    def _of_dev(self, values: Callable[[ScoredSet], dict[str, float]]) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, suffix in (("dev", ""), ("dev_matched", ""), ("dev_mismatched", "_mismatched")):
            if name in self.sets:
                found |= {metric + suffix: value for metric, value in values(self.sets[name]).items()}
        return found

    @property
    def warnings(self) -> list[str]:
        return [scored.warning for scored in self.sets.values() if scored.warning]


@dataclass(frozen=True)
class ScoredRun:
    path: Path
    scores: Scores


@dataclass(frozen=True)
class Group:
    """The runs of one pretrained model and one recipe."""

    name: str
    recipe: str
    tasks: dict[str, dict[int, ScoredRun]]
    """{task: {seed: run}}, with seeds in ascending order."""

    def seeds(self, task: str) -> set[int]:
        return set(self.tasks.get(task, {}))

    def of_seed(self, seed: int) -> TaskMetrics:
        return {task: runs[seed].scores.dev_metrics() for task, runs in self.tasks.items() if seed in runs}

    def means(self) -> TaskMetrics:
        """Return the mean of each metric that all seeds of the task have."""
        return self._means(Scores.dev_metrics)

    def baselines(self) -> TaskMetrics:
        """Return the means of the baselines, which are equal for all seeds scored on the same rows."""
        return self._means(Scores.dev_baselines)

    def _means(self, values: Callable[[Scores], dict[str, float]]) -> TaskMetrics:
        found = {}
        for task, runs in self.tasks.items():
            seeds = [values(run.scores) for run in runs.values()]
            shared = [metric for metric in seeds[0] if all(metric in metrics for metrics in seeds)]
            found[task] = {metric: sum(metrics[metric] for metrics in seeds) / len(seeds) for metric in shared}
        return found


def read_run(path: Path) -> ScoredRun:
    """Read the scores of one run. Raises CheckpointError if its scores.json is missing or damaged."""
    file = path / "scores.json"
    try:
        return ScoredRun(path, Scores.model_validate_json(file.read_bytes()))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} has no scores.json: it is not a finetuning run, or has not finished. Finish it, or leave it out."
        ) from None
    except OSError as error:
        raise CheckpointError(f"Cannot read {file}: {error.strerror}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        if "metrics" in first["loc"] and (first["input"] is None or first["type"] == "finite_number"):
            raise CheckpointError(
                f"{file}: {first['loc'][-1]} is not a finite number. The finetuning has failed: repeat it, or leave "
                f"the run out."
            ) from error
        place = "".join(f"{each}: " for each in first["loc"])
        raise CheckpointError(
            f"{file} is damaged, or of another version: {place}{first['msg']}. Finetune it again, or leave it out."
        ) from error


def read_scores(paths: Sequence[Path]) -> tuple[list[ScoredRun], list[str]]:
    """Return (runs, notes).

    A run that is given twice, or copied, counts once. Runs that have not finished are left out if others have. Raises
    CheckpointError if a run cannot be read or none has finished, and ConfigError if the scores of two runs with the
    same model, recipe, task and seed differ.
    """
    if not paths:
        raise ConfigError("There are no runs to report. Give the directories of finetuning runs.")
    runs: dict[tuple, ScoredRun] = {}
    given = list({path.resolve(): path for path in paths}.values())
    finished = [
        path for path in given if (path / "scores.json").exists()
    ] or given  # if none has, reading them reports it
    notes = [f"{path} has not finished and is left out" for path in given if path not in finished]
    for run in map(read_run, finished):
        scores = run.scores
        key = (scores.model, scores.model_fingerprint, scores.full_recipe, scores.task, scores.seed)
        first = runs.setdefault(key, run)
        if first.scores != scores:
            raise ConfigError(
                f"{first.path} and {run.path} are both {scores.task} of {scores.model} by {scores.full_recipe}, seed "
                f"{scores.seed}, and their scores differ. Leave one out."
            )
        if first is not run:
            notes.append(f"{run.path} repeats {first.path} and is counted once")
    return list(runs.values()), notes


def group_runs(runs: Sequence[ScoredRun]) -> list[Group]:
    """Group runs by model and recipe, in the order given.

    Models with one name but different weights are different models, told apart by their fingerprints.
    """
    weights: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        weights[run.scores.model].add(run.scores.model_fingerprint)
    found: dict[tuple[str, str], dict[str, dict[int, ScoredRun]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        scores = run.scores
        name = scores.model
        if len(weights[name]) > 1:
            name = f"{name} (weights {scores.model_fingerprint[:12]})"
        found[name, scores.full_recipe][scores.task][scores.seed] = run
    return [
        Group(name, recipe, {task: dict(sorted(of_seed.items())) for task, of_seed in tasks.items()})
        for (name, recipe), tasks in found.items()
    ]
