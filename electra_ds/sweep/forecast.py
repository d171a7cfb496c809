"""What a sweep will cost, before it runs: each kind of trial's steps, time and memory, and how many share a card."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoConfig

from electra_ds.config.cards import Card, find_card, has_slow_fp16, peak_flops
from electra_ds.config.deepspeed import DeepSpeedPlan, default_ds_config, read_deepspeed_json, resolve
from electra_ds.config.deepspeed_sections import precision_section
from electra_ds.config.finetune_recipe import FinetuneRecipe, Finetuning
from electra_ds.config.hardware import driver_gpus
from electra_ds.config.overrides import load_recipe
from electra_ds.config.recipe import Recipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.core.errors import ElectraError
from electra_ds.core.terminal import say
from electra_ds.finetuning.glue import OFFICIAL_ROWS
from electra_ds.pretraining.electra import encoder_configs
from electra_ds.pretraining.flops import encoder_flops
from electra_ds.pretraining.memory import CONTEXT_BYTES, FRAGMENTATION, count_parameters, saved_bytes, training_state
from electra_ds.pretraining.run_time import CPU_SLOWER, cpu_rate, pretraining_flops, span
from electra_ds.pretraining.step_time import (
    BANDWIDTH_EFFICIENCY,
    LAUNCH_S,
    OPERATIONS,
    PRODUCT_EFFICIENCY,
    SLOWER,
    TRAFFIC_OF_SAVED,
)  # fmt: skip
from electra_ds.report.forecast import GIB, device_budget, forecast
from electra_ds.sweep.folder import ENDED, SUCCEEDED, SweepFolder
from electra_ds.sweep.spec import SweepSpec
from electra_ds.sweep.trials import Trial, counted, value_text

_SQUAD_ROWS = {"squad1": 87_599, "squad2": 130_319}
_START_S = 8.0
"""Until a trial's first step, most of it Python's imports (docs/sweeps.md)."""
_MEASURED = "measured in this folder"


@dataclass(frozen=True)
class Cost:
    """Of one trial."""

    steps: int | None
    seconds: tuple[float, float] | None
    """From the fastest to the slowest that is likely."""
    basis: str
    """Where the time comes from."""
    needed_bytes: int | None = None
    budget_bytes: float | None = None

    @property
    def together(self) -> int | None:
        """Trials whose memory a card has room for."""
        if not self.needed_bytes or not self.budget_bytes:
            return None
        return int(self.budget_bytes // self.needed_bytes)


class _Sizes(NamedTuple):
    """A pretraining recipe whose discriminator is as large as an encoder, and the encoder's vocabulary."""

    recipe: Recipe
    vocab_size: int


class SweepForecast:
    def __init__(self, spec: SweepSpec, folder: SweepFolder) -> None:
        self._spec, self._folder = spec, folder
        gpus = driver_gpus() if spec.resources.gpus else ()
        self._here = find_card(gpus[0].name) if gpus else None
        self._flops_per_s: float | None = None
        self._known: dict[str, Cost] = {}
        self._encoders: dict[str, _Sizes | None] = {}

    def cost(self, trial: Trial) -> Cost:
        key = json.dumps(
            [trial.stage, trial.recipe.model_dump(mode="json", exclude={"seed"}), trial.stop_at, trial.options,
             trial.pretraining and trial.pretraining.recipe.model_dump(mode="json", exclude={"seed"})], default=str
        )  # fmt: skip
        if key not in self._known:
            try:
                self._known[key] = self._pretraining(trial) if trial.stage == "pretrain" else self._finetuning(trial)
            except (ElectraError, OverflowError):  # as the trial itself will say
                self._known[key] = Cost(None, None, "unknown")
        return self._known[key]

    def measured(self, trials: Sequence[Trial]) -> float | None:
        """Mean seconds of those of the given trials that have ended in this folder."""
        times = [
            record.seconds for trial in trials
            if self._folder.state(trial.key)[0] in SUCCEEDED and (record := self._folder.record(trial.key)) is not None
        ]  # fmt: skip
        return sum(times) / len(times) if times else None

    def _card(self, trial: Trial) -> Card | None:
        if not self._spec.resources.gpus:
            return None
        name = trial.options.get("ds_config")
        if name is None and trial.pretraining is not None:
            name = trial.pretraining.options.get("ds_config")
        return (find_card(Path(name).stem) if isinstance(name, str) else None) or self._here

    def _pretraining(self, trial: Trial) -> Cost:
        recipe, card = trial.recipe, self._card(trial)
        assert isinstance(recipe, Recipe)
        name = trial.options.get("ds_config")
        values, name = (read_deepspeed_json(name), name) if name else default_ds_config(card is not None, card)
        found = forecast(recipe, values, name, card=card, world_size=self._spec.resources.workers)
        steps = trial.stop_at or recipe.schedule.total_steps
        memory = _memory_of(found.needed_bytes, card)
        if card is not None:
            days = None if found.time is None else found.time.days(steps)
            return Cost(steps, days and (86_400 * days[0], 86_400 * days[1]), f"roofline, {card.name}", **memory)
        flops = pretraining_flops(recipe, found.vocab_size)
        return Cost(steps, self._on_cpu(steps * flops), "arithmetic, this CPU", **memory)

    def _finetuning(self, trial: Trial) -> Cost:
        """Inputs counted as long as they may be."""
        recipe, card = trial.recipe, self._card(trial)
        assert isinstance(recipe, FinetuneRecipe)
        sizes, rows = self._encoder(trial, recipe.data.max_length), _examples(trial)
        if recipe.data.double_unordered and rows is not None:
            rows *= 2
        layers = 1 if sizes is None else sizes.recipe.model.num_hidden_layers
        training = Finetuning(recipe, rows or 1, layers)
        plan = self._plan(trial, training, card)
        steps = None if rows is None else training.schedule.total_steps
        if sizes is None:
            return Cost(steps, None, "its encoder is not here yet")
        like = sizes.recipe
        config = encoder_configs(like, sizes.vocab_size, 0)[1]
        saved = saved_bytes(
            like, sizes.vocab_size, plan.batch.micro_batch_size, plan.precision.name, "cpu" if card is None else "cuda"
        ).discriminator
        parameters = count_parameters(like, sizes.vocab_size).discriminator
        state = training_state(parameters, plan)
        used = state.weights + state.gradients + state.optimizer + max(state.update, saved) + state.buffers
        needed = used if card is None else round(used * (1 + FRAGMENTATION)) + CONTEXT_BYTES
        memory = _memory_of(needed, card)
        if steps is None:
            return Cost(None, None, "the number of examples is not known yet", **memory)
        of_rank = recipe.global_batch_size // plan.batch.world_size
        flops = encoder_flops(config, [like.data.sequence_length] * of_rank)
        if card is None:
            return Cost(steps, self._on_cpu(steps * flops), "arithmetic, this CPU", **memory)
        peak = peak_flops(card, plan.precision.name)
        if peak is None:
            return Cost(steps, None, f"{card.name} lacks {plan.precision.name}", **memory)
        host = (OPERATIONS[0] * layers + OPERATIONS[2]) * plan.batch.gradient_accumulation_steps * LAUNCH_S
        traffic = TRAFFIC_OF_SAVED * saved / (card.bandwidth_gb_s * 1e9 * BANDWIDTH_EFFICIENCY)
        step = max(flops / (peak * PRODUCT_EFFICIENCY) + traffic, host)
        low, high = (step * steps * factor for factor in SLOWER)
        return Cost(steps, (low, high), f"roofline, {card.name}, inputs of full length", **memory)

    def _plan(self, trial: Trial, training: Finetuning, card: Card | None) -> DeepSpeedPlan:
        chosen = trial.options.get("ds_config")
        values = read_deepspeed_json(chosen) if chosen else precision_section("fp32" if card is None else "fp16")
        return resolve(
            values, training, world_size=self._spec.resources.workers, source=str(chosen or "the default"),
            auto_fp16=card is not None and not has_slow_fp16(card.name),
        )  # fmt: skip

    def _encoder(self, trial: Trial, length: int) -> _Sizes | None:
        """None where it is not here."""
        if trial.pretraining is not None:
            recipe = trial.pretraining.recipe
            assert isinstance(recipe, Recipe)
            return _Sizes(_resized(recipe, length), recipe.tokenizer.vocab_size)
        model = str(self._folder.now(trial.stage, trial.options)["model"])
        key = f"{model}/{length}"
        if key not in self._encoders:
            self._encoders[key] = _found_encoder(model, length)
        return self._encoders[key]

    def _on_cpu(self, flops: float) -> tuple[float, float]:
        if self._flops_per_s is None:
            self._flops_per_s = cpu_rate(self._spec.resources.cpus)
        rate = self._flops_per_s * self._spec.resources.workers
        return flops / rate * CPU_SLOWER[0], flops / rate * CPU_SLOWER[1]


def _memory_of(needed_bytes: int, card: Card | None) -> dict[str, Any]:
    """What is free on a CPU changes by the moment and is no card's budget."""
    return {"needed_bytes": needed_bytes, "budget_bytes": None if card is None else device_budget(card, None)[0]}


def _examples(trial: Trial) -> int | None:
    """Of the training set; None of the user's own files, which nobody has counted."""
    task, most = trial.options.get("task"), trial.options.get("max_train_examples")
    rows = _SQUAD_ROWS.get(str(task)) or OFFICIAL_ROWS.get(str(task), {}).get("train")
    return rows if most is None or rows is None else min(rows, int(most))


def _resized(recipe: Recipe, length: int) -> Recipe:
    data = recipe.data.model_copy(update={"sequence_length": length})
    return recipe.model_copy(update={"data": data})


def _found_encoder(model: str, length: int) -> _Sizes | None:
    run = RunDirectory(Path(model))
    try:
        if run.exists():
            recipe = run.read_recipe()
            return _Sizes(_resized(recipe, length), recipe.tokenizer.vocab_size)
        config = AutoConfig.from_pretrained(model, local_files_only=True).to_dict()
    except (ElectraError, OSError, ValueError, KeyError):
        return None
    hidden, layers, heads = (
        next((config[name] for name in names if name in config), None)
        for names in (("hidden_size", "dim"), ("num_hidden_layers", "n_layers"), ("num_attention_heads", "n_heads"))
    )
    inner = config.get("intermediate_size") or config.get("hidden_dim")
    if not all(isinstance(size, int) and size > 0 for size in (hidden, layers, heads, inner)):
        return None
    sizes: Mapping[str, Any] = {
        "embedding_size": config.get("embedding_size") or hidden, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": inner, "max_position_embeddings": max(length, 512),
    }  # fmt: skip
    try:
        changes = [f"model.{name}={value}" for name, value in sizes.items()]
        recipe = load_recipe("tiny", [*changes, f"data.sequence_length={length}"])
    except ElectraError:
        return None
    return _Sizes(recipe, int(config.get("vocab_size") or 30_522))


# --- shown


def print_plan(
    trials: Sequence[Trial], spec: SweepSpec, folder: SweepFolder, at_once: int, console: Console, *,
    ends: Sequence[Trial] = (), suggested: int = 0,
) -> None:  # fmt: skip
    """The list of trials, and what each kind of them costs. suggested: so many more, somewhere between `ends`."""
    found = SweepForecast(spec, folder)
    if trials:
        _print_trials(trials, folder, console)
    groups: dict[tuple[str, Cost], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.stage, found.cost(trial)), []).append(trial)
    rows = [_row(found, stage, cost, group, folder) for (stage, cost), group in groups.items()]
    if suggested:
        rows.append(_suggested_row(found, ends, suggested))
    table = Table(title="cost", title_justify="left", box=box.SIMPLE, padding=(0, 1))
    table.add_column("stage", no_wrap=True)
    table.add_column("of", overflow="fold", min_width=16)
    by_card = bool(spec.resources.gpus)
    for column in ("trials", "steps", "each", "memory", *(["fit a card"] if by_card else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        fit = ["" if row.fit is None else str(row.fit)] if by_card else []
        steps = "–".join(dict.fromkeys(f"{count:,}" for count in row.steps))
        each = "?" if row.seconds is None else span(*row.seconds)
        table.add_row(row.stage, escape(row.of), f"{row.trials:,}", steps, each, _memory(row.needed_bytes), *fit)
    console.print(table)
    told = [row for row in rows if row.seconds is not None]
    bases = dict.fromkeys(basis for row in rows for basis in row.bases)
    start = f" A start-up of {_START_S:.0f} s is in it." if set(bases) - {_MEASURED} else ""
    unknown = sum(row.left for row in rows if row.seconds is None)
    low, high = (sum(row.left * row.seconds[end] for row in told if row.seconds) / at_once for end in (0, 1))
    lines = [f"Each: {'; '.join(bases)}.{start}"] if bases else []
    if told:
        rest = ", without those whose cost is unknown" if unknown else ""
        lines.append(f"In all {span(low, high)} with {at_once} at once{rest}.")
    if unknown:
        lines.append(f"Cost unknown for {counted(unknown)}: the model or the task is not on this machine yet.")
    if crowded := _crowded([row.fit for row in rows], spec):
        lines.append(crowded)
    for line in lines:
        say(console, line)


class _Row(NamedTuple):
    """Trials that cost the same."""

    stage: str
    of: str
    trials: int
    left: int
    """Of them those that are to be run."""
    steps: Sequence[int]
    """The fewest and the most."""
    seconds: tuple[float, float] | None
    bases: Sequence[str]
    needed_bytes: int | None
    fit: int | None


def _row(found: SweepForecast, stage: str, cost: Cost, group: Sequence[Trial], folder: SweepFolder) -> _Row:
    seconds, basis = _with_start(cost.seconds), cost.basis
    if (mean := found.measured(group)) is not None:
        seconds, basis = (mean, mean), _MEASURED
    left = sum(folder.state_of(trial)[0] not in ENDED for trial in group)
    steps = () if cost.steps is None else (cost.steps,)
    return _Row(stage, _in_common(group), len(group), left, steps, seconds, [basis], cost.needed_bytes, cost.together)


def _suggested_row(found: SweepForecast, ends: Sequence[Trial], suggested: int) -> _Row:
    costs = [found.cost(trial) for trial in ends]
    times = [seconds for cost in costs if (seconds := _with_start(cost.seconds)) is not None]
    span = (min(low for low, _ in times), max(high for _, high in times)) if len(times) == len(costs) else None
    steps = [cost.steps for cost in costs if cost.steps is not None]
    return _Row(
        ends[0].stage, "what Optuna suggests", suggested, suggested, (min(steps), max(steps)) if steps else (), span,
        [cost.basis for cost in costs], max((cost.needed_bytes for cost in costs if cost.needed_bytes), default=None),
        min((cost.together for cost in costs if cost.together is not None), default=None),
    )  # fmt: skip


def _with_start(seconds: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if seconds is None else (seconds[0] + _START_S, seconds[1] + _START_S)


def _print_trials(trials: Sequence[Trial], folder: SweepFolder, console: Console) -> None:
    """A row for each cell, with its seeds and how far they are."""
    table = Table(title=counted(len(trials)), title_justify="left", box=box.SIMPLE, padding=(0, 1))
    for column in ("stage", "trials", "seeds", "state"):
        table.add_column(column, overflow="fold")
    by_cell: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        cell = {key: value for key, value in trial.values.items() if key != "seed"}
        by_cell.setdefault((trial.stage, replace(trial, values=cell).label), []).append(trial)
    for (stage, label), group in by_cell.items():
        states = Counter(folder.state_of(trial)[0] for trial in group)
        told = ", ".join(f"{count} {state}" for state, count in states.items())
        table.add_row(stage, escape(label), " ".join(str(trial.seed) for trial in group), told)
    console.print(table)


def _in_common(group: Sequence[Trial]) -> str:
    """The values that all trials of a group have, and how many of others."""
    named = []
    for key, value in group[0].values.items():
        if key.rpartition(".")[2] == "seed":
            continue
        several = len({json.dumps(trial.values.get(key), default=str) for trial in group})
        text = value_text(value)
        short = key.rpartition(".")[2]
        named.append(
            f"{several} of {short}" if several > 1 else text if short in ("task", "variant") else f"{short}={text}"
        )
    return ", ".join(named)


def _memory(number: int | None) -> str:
    if number is None:
        return ""
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / 2**20:.0f} MiB"


def _crowded(room: Sequence[int | None], spec: SweepSpec) -> str:
    """room: how many of each kind have their memory on a card."""
    share = spec.resources.gpus
    if not share:
        return ""
    side_by_side = math.floor(1 / share + 1e-9)
    fit = min((each for each in room if each is not None), default=side_by_side)
    if fit >= side_by_side:
        return ""
    advice = "no such trial fits one" if fit == 0 else f"write resources.gpus={1 / fit:.3g}"
    return f"With resources.gpus={share:g} {side_by_side} trials share a card, which has memory for {fit}: {advice}."
