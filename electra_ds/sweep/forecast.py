"""The cost of a sweep before it runs: each kind of trial's steps, time and memory, and how many share a card."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoConfig

from electra_ds.config.cards import Card, find_card, has_slow_fp16, peak_flops
from electra_ds.config.deepspeed import DeepSpeedPlan, default_ds_config, read_deepspeed_json, resolve
from electra_ds.config.deepspeed_sections import precision_section
from electra_ds.config.finetune_recipe import FinetuneRecipe, Finetuning
from electra_ds.config.hardware import driver_gpus
from electra_ds.config.overrides import load_recipe
from electra_ds.config.recipe import Recipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.core.errors import ConfigError, ElectraError
from electra_ds.core.terminal import say
from electra_ds.finetuning.glue import OFFICIAL_ROWS
from electra_ds.pretraining.electra import encoder_configs
from electra_ds.pretraining.flops import encoder_flops
from electra_ds.pretraining.memory import (
    CONTEXT_BYTES,
    FRAGMENTATION,
    Kernels,
    count_parameters,
    saved_bytes,
    training_state,
)
from electra_ds.pretraining.run_time import CPU_SLOWER, RunTime, cpu_rate, pretraining_flops, time_of_steps
from electra_ds.pretraining.step_time import (
    BANDWIDTH_EFFICIENCY,
    LAUNCH_S,
    OPERATIONS,
    PRODUCT_EFFICIENCY,
    TRAFFIC_OF_SAVED,
    StepTime,
)  # fmt: skip
from electra_ds.report.forecast import GIB, device_budget, forecast
from electra_ds.report.tables import Table, print_table
from electra_ds.sweep.folder import ENDED, SweepFolder
from electra_ds.sweep.options import check_arguments
from electra_ds.sweep.processes import this_machine, trials_at_once
from electra_ds.sweep.run import Sweep, corpus_note, open_sweep
from electra_ds.sweep.spec import SweepSpec
from electra_ds.sweep.trials import CheckArguments, Trial, counted, ends, expand, value_text

_SQUAD_ROWS = {"squad1": 87_599, "squad2": 130_319}
_START_S = 8.0
"""The time until a trial's first step, most of it Python's imports (docs/sweeps.md)."""
_MEASURED = "measured in this folder"
_cpu_rate = cache(cpu_rate)


@dataclass(frozen=True)
class Cost:
    """The cost of one trial, or the range of several."""

    steps: tuple[int, int] | None
    time: RunTime | None
    bases: tuple[str, ...]
    """The sources of the time."""
    needed_bytes: int | None = None
    on_a_card: int | None = None
    """How many trials fit into the memory of a card."""


def plan_sweep(
    sweep: Sweep | None, folder: str | Path | None = None, *, overrides: Sequence[str] = (), local: bool = False,
    address: str | None = None, check: CheckArguments = check_arguments, console: Console | None = None,
) -> None:  # fmt: skip
    """Print the trials of a sweep and what they cost, and run nothing. The arguments are those of `run_sweep`."""
    console = console or Console()
    spec, found = open_sweep(sweep, folder, overrides)
    trials = [*expand(spec, check, found.now if sweep is None else None), *found.suggested_before(spec)]
    at_once, problem = 1, ""
    if address is None:
        try:
            slots = trials_at_once(spec.resources, [this_machine()])
            at_once = 1 if local else slots
        except ConfigError as error:  # the sweep may be meant for another machine
            problem = f"On this machine it would be refused: {error}"
    if trials:
        print_table(_trial_table(trials, found), console)
    rows = list(_rows(trials, spec, found))
    print_table(_cost_table(rows, has_cards=spec.resources.gpus > 0), console)
    for line in [*_cost_lines(rows, spec, at_once), problem, corpus_note(spec)]:
        if line:
            say(console, line)


class SweepForecast:
    """Predicts what the trials of a sweep cost."""

    def __init__(self, spec: SweepSpec, folder: SweepFolder) -> None:
        self._spec, self._folder = spec, folder
        self._known: dict[str, Cost] = {}

    def cost(self, trial: Trial) -> Cost:
        recipes = [each.recipe.model_dump(mode="json", exclude={"seed"}) for each in (trial, trial.pretraining) if each]
        key = json.dumps([trial.stage, recipes, trial.stop_at, trial.options], default=str)
        if key not in self._known:
            try:
                self._known[key] = self._pretraining(trial) if trial.stage == "pretrain" else self._finetuning(trial)
            except (ElectraError, OverflowError):  # the trial itself will report it
                self._known[key] = Cost(None, None, ("unknown",))
        return self._known[key]

    @cached_property
    def _card_here(self) -> Card | None:
        gpus = driver_gpus()
        return find_card(gpus[0].name) if gpus else None

    def _card(self, trial: Trial) -> Card | None:
        if not self._spec.resources.gpus:
            return None
        name = trial.options.get("ds_config")
        if name is None and trial.pretraining is not None:
            name = trial.pretraining.options.get("ds_config")
        return (find_card(Path(name).stem) if isinstance(name, str) else None) or self._card_here

    def _pretraining(self, trial: Trial) -> Cost:
        recipe, card, name = trial.recipe, self._card(trial), trial.options.get("ds_config")
        assert isinstance(recipe, Recipe)
        values, name = (read_deepspeed_json(name), name) if name else default_ds_config(card is not None, card)
        found = forecast(recipe, values, name, card=card, world_size=self._spec.resources.workers)
        steps = trial.stop_at or recipe.schedule.total_steps
        flops = pretraining_flops(recipe, found.vocab_size)
        return self._cost(steps, found.time, flops, card, found.needed_bytes)

    def _finetuning(self, trial: Trial) -> Cost:
        """Return the cost if all inputs are as long as they may be."""
        recipe, card, rows = trial.recipe, self._card(trial), _examples(trial)
        assert isinstance(recipe, FinetuneRecipe)
        like = self._encoder(trial, recipe.data.max_length)
        layers = 1 if like is None else like.model.num_hidden_layers
        training = Finetuning(recipe, rows or 1, layers)
        if like is None:
            steps = None if rows is None else (training.schedule.total_steps, training.schedule.total_steps)
            return Cost(steps, None, ("its encoder is not here yet",))
        vocab_size, plan = like.tokenizer.vocab_size, self._plan(trial, training, card)
        kernels: Kernels = "cpu" if card is None else "cuda"
        batch = plan.batch
        saved = saved_bytes(like, vocab_size, batch.micro_batch_size, plan.precision.name, kernels).discriminator
        state = training_state(count_parameters(like, vocab_size).discriminator, plan)
        used = state.weights + state.gradients + state.optimizer + max(state.update, saved) + state.buffers
        needed = used if card is None else round(used * (1 + FRAGMENTATION)) + CONTEXT_BYTES
        lengths = [like.data.sequence_length] * (recipe.global_batch_size // batch.world_size)
        flops = encoder_flops(encoder_configs(like, vocab_size, 0)[1], lengths)
        peak, time = None if card is None else peak_flops(card, plan.precision.name), None
        if card is not None and peak is not None:
            traffic = TRAFFIC_OF_SAVED * saved / (card.bandwidth_gb_s * 1e9 * BANDWIDTH_EFFICIENCY)
            host = (OPERATIONS[0] * layers + OPERATIONS[2]) * batch.gradient_accumulation_steps * LAUNCH_S
            time = StepTime(flops / (peak * PRODUCT_EFFICIENCY), traffic, host)
        return self._cost(None if rows is None else training.schedule.total_steps, time, flops, card, needed)

    def _cost(self, steps: int | None, time: StepTime | None, flops: float, card: Card | None, needed: int) -> Cost:
        """Return the cost of so many steps; what is free on a CPU changes by the moment and is no card's budget."""
        fit = None if card is None else int(device_budget(card, None)[0] // needed)
        if steps is None:
            return Cost(None, None, ("the number of examples is not known yet",), needed, fit)
        if card is not None:
            basis = f"roofline, {card.name}" if time is not None else f"{card.name} lacks the precision"
            return Cost((steps, steps), _with_start(time_of_steps(time, steps)), (basis,), needed, fit)
        if not flops:
            return Cost((steps, steps), None, ("the objective does not say",), needed, fit)
        seconds = steps * flops / (_cpu_rate(self._spec.resources.cpus) * self._spec.resources.workers)
        span = RunTime(seconds * CPU_SLOWER[0], seconds * CPU_SLOWER[1])
        return Cost((steps, steps), _with_start(span), ("arithmetic, this CPU",), needed, fit)

    def _plan(self, trial: Trial, training: Finetuning, card: Card | None) -> DeepSpeedPlan:
        chosen = trial.options.get("ds_config")
        values = read_deepspeed_json(chosen) if chosen else precision_section("fp32" if card is None else "fp16")
        return resolve(
            values, training, world_size=self._spec.resources.workers, source=str(chosen or "the default"),
            auto_fp16=card is not None and not has_slow_fp16(card.name),
        )  # fmt: skip

    def _encoder(self, trial: Trial, length: int) -> Recipe | None:
        """Return a recipe whose discriminator is as large as the trial's encoder; None if that is not here."""
        recipe: Recipe | None
        if trial.pretraining is not None:
            assert isinstance(trial.pretraining.recipe, Recipe)
            recipe = trial.pretraining.recipe
        else:
            recipe = _recipe_like(str(self._folder.now(trial.stage, trial.options)["model"]))
        if recipe is None:
            return None
        return recipe.model_copy(update={"data": recipe.data.model_copy(update={"sequence_length": length})})


def _with_start(time: RunTime | None) -> RunTime | None:
    return None if time is None else RunTime(time.low_s + _START_S, time.high_s + _START_S)


def _examples(trial: Trial) -> int | None:
    """Return the size of the training set; None for the user's own files, which nobody has counted."""
    task, most = str(trial.options.get("task")), trial.options.get("max_train_examples")
    rows = _SQUAD_ROWS.get(task) or OFFICIAL_ROWS.get(task, {}).get("train")
    if rows is None:
        return None
    doubled = isinstance(trial.recipe, FinetuneRecipe) and trial.recipe.data.double_unordered
    return min(rows, int(most or rows)) * (2 if doubled else 1)


@cache
def _recipe_like(model: str) -> Recipe | None:
    run = RunDirectory(Path(model))
    try:
        if run.exists():
            return run.read_recipe()
        config: Any = AutoConfig.from_pretrained(model, local_files_only=True)
        sizes = {
            "embedding_size": getattr(config, "embedding_size", config.hidden_size), "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads,
            "intermediate_size": getattr(config, "intermediate_size", None) or config.hidden_dim,
        }  # fmt: skip
        changes = [f"model.{name}={value}" for name, value in sizes.items()]
        return load_recipe("tiny", [*changes, f"tokenizer.vocab_size={config.vocab_size}"])
    except (ElectraError, OSError, ValueError, KeyError, AttributeError):
        return None


# --- tables


@dataclass(frozen=True)
class _Row:
    """Trials that cost the same."""

    stage: str
    of: str
    trials: int
    left: int
    """How many of them are to be run."""
    cost: Cost


def _rows(trials: Sequence[Trial], spec: SweepSpec, folder: SweepFolder) -> Iterator[_Row]:
    found = SweepForecast(spec, folder)
    groups: dict[tuple[str, Cost], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.stage, found.cost(trial)), []).append(trial)
    for (stage, cost), group in groups.items():
        files = [folder.trial(trial.key) for trial in group]
        records = [each.record() for each in files if each.has_succeeded]
        times = [record.seconds for record in records if record is not None]
        if times:
            mean = sum(times) / len(times)
            cost = replace(cost, time=RunTime(mean, mean), bases=(_MEASURED,))
        left = sum(folder.state_of(trial)[0] not in ENDED for trial in group)
        yield _Row(stage, _in_common(group), len(group), left, cost)
    if spec.is_suggested and (left := spec.search.samples - len(trials)) > 0:
        yield _Row(spec.last_stage, "what Optuna suggests", left, left, _range([found.cost(end) for end in ends(spec)]))


def _range(costs: Sequence[Cost]) -> Cost:
    """Return the range of several costs, with the most memory and the fewest trials on a card."""
    steps = [cost.steps for cost in costs if cost.steps is not None]
    times = [cost.time for cost in costs if cost.time is not None]
    return Cost(
        (min(low for low, _ in steps), max(high for _, high in steps)) if steps else None,
        RunTime(min(each.low_s for each in times), max(each.high_s for each in times))
        if len(times) == len(costs) else None,
        tuple(dict.fromkeys(basis for cost in costs for basis in cost.bases)),
        max((cost.needed_bytes for cost in costs if cost.needed_bytes), default=None),
        min((cost.on_a_card for cost in costs if cost.on_a_card is not None), default=None),
    )  # fmt: skip


def _cost_table(rows: Sequence[_Row], *, has_cards: bool) -> Table:
    columns = ["stage", "of", "trials", "steps", "each", "memory", *(["fit a card"] if has_cards else [])]
    table = Table("cost", columns, text_columns=2)
    for row in rows:
        cost, needed = row.cost, row.cost.needed_bytes
        memory = "" if needed is None else f"{needed / GIB:.1f} GiB" if needed >= GIB else f"{needed / 2**20:.0f} MiB"
        steps = "–".join(dict.fromkeys(f"{count:,}" for count in cost.steps or ()))
        fit = ["" if cost.on_a_card is None else str(cost.on_a_card)] if has_cards else []
        table.rows.append([row.stage, row.of, f"{row.trials:,}", steps, str(cost.time or "?"), memory, *fit])
    return table


def _cost_lines(rows: Sequence[_Row], spec: SweepSpec, at_once: int) -> Iterator[str]:
    bases = dict.fromkeys(basis for row in rows for basis in row.cost.bases)
    if bases:
        start = f" A start-up of {_START_S:.0f} s is in it." if set(bases) - {_MEASURED} else ""
        yield f"Each: {'; '.join(bases)}.{start}"
    known = [(row.left, row.cost.time) for row in rows if row.cost.time is not None]
    unknown = sum(row.left for row in rows if row.cost.time is None)
    if known:
        low, high = (sum(left * time[end] for left, time in known) / at_once for end in (0, 1))
        rest = ", without those whose cost is unknown" if unknown else ""
        yield f"In all {RunTime(low, high)} with {at_once} at once{rest}."
    if unknown:
        yield f"Cost unknown for {counted(unknown)}: the model or the task is not on this machine yet."
    share = spec.resources.gpus
    fit = min((row.cost.on_a_card for row in rows if row.cost.on_a_card is not None), default=None)
    if share and fit is not None and fit < (wanted := math.floor(1 / share + 1e-9)):
        advice = "no such trial fits one" if fit == 0 else f"write resources.gpus={1 / fit:.3g}"
        yield f"With resources.gpus={share:g} {wanted} trials share a card, which has memory for {fit}: {advice}."


def _trial_table(trials: Sequence[Trial], folder: SweepFolder) -> Table:
    """Return a table with a row for each cell, its seeds, and the states of its trials."""
    table = Table(counted(len(trials)), ["stage", "trials", "seeds", "state"], text_columns=4)
    by_cell: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        cell = {key: value for key, value in trial.values.items() if key != "seed"}
        by_cell.setdefault((trial.stage, replace(trial, values=cell).label), []).append(trial)
    for (stage, label), group in by_cell.items():
        states = Counter(folder.state_of(trial)[0] for trial in group)
        counts = ", ".join(f"{count} {state}" for state, count in states.items())
        table.rows.append([stage, label, " ".join(str(trial.seed) for trial in group), counts])
    return table


def _in_common(group: Sequence[Trial]) -> str:
    """Return the values that all trials of a group share, and how many different values of the others there are."""
    named = []
    for key, value in group[0].values.items():
        short = key.rpartition(".")[2]
        several = len({json.dumps(trial.values.get(key), default=str) for trial in group})
        text = value_text(value) if short in ("task", "variant") else f"{short}={value_text(value)}"
        if short != "seed":
            named.append(f"{several} of {short}" if several > 1 else text)
    return ", ".join(named)
