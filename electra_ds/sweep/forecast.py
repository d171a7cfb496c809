"""List a sweep's trials before it runs, with their cost: that of similar trials in its folder, or a forecast."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from electra_ds.config.cards import Card, driver_gpus, find_card
from electra_ds.config.deepspeed import default_ds_config, read_deepspeed_json
from electra_ds.config.recipe import Recipe
from electra_ds.core.errors import ConfigError, ElectraError
from electra_ds.pretraining.run_time import RunTime
from electra_ds.report.forecast import GIB, forecast
from electra_ds.report.tables import Line, Table
from electra_ds.sweep.folder import ENDED, SweepFolder
from electra_ds.sweep.processes import this_machine, trials_at_once
from electra_ds.sweep.run import corpus_note, open_sweep
from electra_ds.sweep.spec import Resources
from electra_ds.sweep.sweep_file import Sweep
from electra_ds.sweep.trials import Trial, expand, trials_text


@dataclass(frozen=True)
class Cost:
    """The cost of one trial. None stands for an unknown number."""

    steps: int | None = None
    time: RunTime | None = None
    needed_bytes: int | None = None
    is_measured: bool = False


def plan_sweep(
    sweep: Sweep | None,
    folder: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    local: bool = False,
    address: str | None = None,
) -> list[Table | Line]:
    """Return a table of a sweep's trials with their states and costs, and the total cost, without running anything.

    The arguments are those of `run_sweep`.
    """
    spec, found = open_sweep(sweep, folder, overrides)
    trials = [*expand(spec, found.relocated if sweep is None else None), *found.suggested_before(spec)]
    at_once, problem = 1, ""
    if address is None:
        try:
            at_once = trials_at_once(spec.resources, [this_machine()])
        except ConfigError as error:  # the sweep may be meant for another machine
            problem = f"This machine would refuse it: {error}"
    by_cell: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        cell = {key: value for key, value in trial.values.items() if key != "seed"}
        by_cell.setdefault((trial.stage, replace(trial, values=cell).label), []).append(trial)
    costs = {cell: _cost(group, found, spec.resources) for cell, group in by_cell.items()}
    states = {cell: Counter(found.state_of(trial)[0] for trial in group) for cell, group in by_cell.items()}
    table = Table(
        trials_text(len(trials)), ["stage", "trials", "seeds", "state", "steps", "each", "memory"], text_columns=4
    )
    for (stage, label), group in by_cell.items():
        cost, counts = costs[stage, label], states[stage, label].items()
        table.rows.append(
            [
                stage,
                label,
                " ".join(str(trial.seed) for trial in group),
                ", ".join(f"{count} {state}" for state, count in counts),
                "" if cost.steps is None else f"{cost.steps:,}",
                f"{cost.time or '?'}{', measured' if cost.is_measured else ''}",
                _memory(cost.needed_bytes),
            ]
        )
    left = [(sum(n for state, n in states[cell].items() if state not in ENDED), costs[cell].time) for cell in by_cell]
    if spec.is_suggested:
        left.append((max(0, spec.search.samples - len(trials)), None))
    lines = [*_totals(left, 1 if local else at_once), problem, corpus_note(spec)]
    return [*([table] if trials else []), *(Line(line) for line in lines if line)]


def _totals(left: Sequence[tuple[int, RunTime | None]], at_once: int) -> Iterator[str]:
    """Yield the total time of the trials left. left: (number of trials, time of each) for every cell."""
    known = [(count, time) for count, time in left if time is not None]
    unknown = sum(count for count, time in left if time is None)
    if known:
        low, high = (sum(count * time.range_s[end] for count, time in known) / at_once for end in (0, 1))
        rest = ", not counting trials whose cost is unknown" if unknown else ""
        yield f"In total {RunTime.between(low, high)} with {at_once} at once{rest}."
    if unknown:
        yield f"Cost unknown for {trials_text(unknown)}: none like them has run in this folder yet."


def _cost(group: Sequence[Trial], folder: SweepFolder, resources: Resources) -> Cost:
    """Return the cost of each trial of a cell: that of its finished trials, or else the forecast of a pretraining."""
    cost, recipe = Cost(), group[0].recipe
    if isinstance(recipe, Recipe):
        with contextlib.suppress(ElectraError, OverflowError):  # the trial itself will report it
            cost = _pretraining(group[0], recipe, resources)
    files = [folder.trial(trial.key) for trial in group]
    records = [each.record() for each in files if each.has_succeeded]
    times = [record.seconds for record in records if record is not None]
    if not times:
        return cost
    mean = sum(times) / len(times)
    return replace(cost, time=RunTime.between(mean, mean), is_measured=True)


def _pretraining(trial: Trial, recipe: Recipe, resources: Resources) -> Cost:
    name, card = trial.options.get("ds_config"), None
    if resources.gpus:
        card = find_card(Path(name).stem) if name else None
        card = card or _card_here()
    values, source = (read_deepspeed_json(name), name) if name else default_ds_config(card is not None, card)
    found = forecast(recipe, values, source, card=card, world_size=resources.workers)
    if trial.options.get("init_from"):
        found = replace(found, first=None)
    return Cost(found.steps(trial.stop_at), found.run_time(trial.stop_at, threads=resources.cpus), found.needed_bytes)


def _card_here() -> Card | None:
    gpus = driver_gpus()
    return find_card(gpus[0].name) if gpus else None


def _memory(needed_bytes: int | None) -> str:
    if needed_bytes is None:
        return ""
    return f"{needed_bytes / GIB:.1f} GiB" if needed_bytes >= GIB else f"{needed_bytes / 2**20:.0f} MiB"
