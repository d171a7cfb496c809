"""From the options of a pretraining to a checked job; what every run needs is in `training/prepare.py`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.options import PretrainOptions
from electra_ds.config.recipe import Recipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.config.run_record import RunRecord, RunSettings
from electra_ds.core import devices
from electra_ds.core.log import log_command
from electra_ds.core.program import command
from electra_ds.core.ranks import Ranks
from electra_ds.data.build import trained_from
from electra_ds.data.token_store import TokenStore, recorded_store, split_holdout
from electra_ds.pretraining.batches import objective_of
from electra_ds.pretraining.objectives.base import Objective
from electra_ds.pretraining.pretrain import PretrainJob
from electra_ds.pretraining.probe import fitting_plan, free_bytes, kernels_of
from electra_ds.training import prepare

_log = logging.getLogger(__name__)


def default_settings(total_steps: int) -> RunSettings:
    """Return the settings of a run of so many steps for which none are given."""
    tenth = max(1, total_steps // 10)
    return RunSettings(log_every=10, eval_every=min(5000, tenth), save_every=min(2000, tenth), keep=3, eval_windows=512)


def prepare_new(
    options: PretrainOptions,
    recipe: Recipe,
    plan: DeepSpeedPlan,
    store: TokenStore,
    run: RunDirectory,
    ranks: Ranks,
    initialised_from: Sequence[str] = (),
) -> PretrainJob:
    """Return a job for a new run. Raises DataError if the corpus is too small to hold out from.

    initialised_from: the sources of the weights that `initial_weights.write_first_checkpoint` will be given.
    """
    split = split_holdout(store.documents, recipe.data, recipe.seed)
    record = RunRecord(
        store=str(store.path.resolve()),
        store_fingerprint=store.info.fingerprint,
        parameters=objective_of(recipe, store.tokenizer).parameter_counts(),
        initialised_from=list(initialised_from),
        **prepare.new_record(options, plan, default_settings(recipe.schedule.total_steps), run, ranks),
    )
    return PretrainJob(run, recipe, plan, store, split, record, prepare.stop_at(options, recipe))


def plan_resume(options: PretrainOptions, run: RunDirectory, ranks: Ranks) -> DeepSpeedPlan:
    """Return the plan to resume a run with: its own DeepSpeed JSON, or another. Raises CheckpointError if there is
    none."""
    run.check_resumable("pretrain")
    return prepare.plan_of_run(options, run, run.read_record(), run.read_recipe(), ranks)


def prepare_resume(options: PretrainOptions, plan: DeepSpeedPlan, run: RunDirectory, ranks: Ranks) -> PretrainJob:
    """Return a job that resumes a run."""
    recipe, record = run.read_recipe(), run.read_record()
    remedy = f"say where it is now: {command('pretrain')} --resume {run.path} --data STORE"
    record = prepare.record_again(record, options, plan, run, ranks)
    store = recorded_store(record, run.path, options.data, remedy)
    record = replace(record, store=str(store.path.resolve()))
    split = split_holdout(store.documents, recipe.data, recipe.seed)
    return PretrainJob(run, recipe, plan, store, split, record, prepare.stop_at(options, recipe))


def with_fitting_micro_batch(job: PretrainJob, options: PretrainOptions, ranks: Ranks) -> PretrainJob:
    """Return the job with a micro-batch that fits, where its JSON leaves that to us, and with a note on what was found.

    To be called by all ranks, which agree on it. Raises ConfigError on all of them where not even one sequence fits.
    """
    return replace(job, plan=fitted(job.plan, job.recipe, job.store.tokenizer.vocab_size, options, ranks))


def fitted(
    plan: DeepSpeedPlan, recipe: Recipe, vocab_size: int, options: PretrainOptions, ranks: Ranks
) -> DeepSpeedPlan:
    """Return the plan of `with_fitting_micro_batch`, for a run that may have no token store yet."""
    device = devices.device(ranks.launch)
    free = free_bytes(device, ranks)
    note = None
    if ranks.broadcast(plan.is_micro_batch_open):  # the others' devices may have other names
        fitting = fitting_plan(recipe, vocab_size, plan, device, ranks)
        if fitting.batch != plan.batch or options.micro_batch == "auto":
            share = "each rank's whole share" if fitting.batch == plan.batch else "the largest that fits"
            note = f"micro-batch {fitting.batch.micro_batch_size} is {share}, of {free / 2**30:.1f} GiB that are free"
        plan = fitting
    else:
        kernels = kernels_of(device)
        objective: Objective[Any] = Objective.of(recipe, vocab_size)
        peak = objective.peak_memory(plan, kernels)
        needed = 0 if peak is None else peak.needed_bytes(kernels)
        if needed > free:
            note = (
                f"a step is predicted to take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; "
                f"--micro-batch auto finds what fits"
            )
    return plan if note is None else replace(plan, notes=(*plan.notes, note))


def announce(job: PretrainJob) -> None:
    """Print what is about to run, in a few lines."""
    recipe, record, info = job.recipe, job.record, job.store.info
    data = (
        f"data: {info.num_tokens:,} tokens in {info.num_documents:,} documents ({job.store.path}), "
        f"{job.split.holdout.num_tokens:,} of them held out by {job.split.held_out_by}"
    )
    notes = list(job.plan.notes)
    if not record.initialised_from and trained_from(job.store.path) != recipe.tokenizer:
        notes.append(f"the tokenizer is the store's, {info.vocab_size:,} pieces, not one of the recipe's kind and size")
    seen = recipe.schedule.total_steps * recipe.global_batch_size * recipe.data.sequence_length
    if seen > 200 * info.num_tokens:
        notes.append(f"this schedule reads the corpus some {seen // info.num_tokens:,} times over")
    what = described(recipe, record.parameters, data, record.initialised_from)
    plan = replace(job.plan, notes=tuple(notes))
    prepare.announce(what, record.device, record.threads, plan, job.run)


def described(recipe: Recipe, parameters: Mapping[str, int], data: str, sources: Sequence[str] = ()) -> str:
    """Return the lines about model and data of `announce`. data: a line about the text; sources: of the first
    weights."""
    parts = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in parameters.items())
    lines = [
        f"{recipe.name}: {parts} parameters; {recipe.schedule.total_steps:,} steps of {recipe.global_batch_size} x "
        f"{recipe.data.sequence_length} tokens",
        data,
        *(f"first weights: {source}" for source in sources),
    ]
    return "\n".join(lines)


def say_finished(run: RunDirectory) -> None:
    """Print that nothing is left to train, and where the results are."""
    step = run.status_details().get("step")
    _log.info(f"The run {run.path} is finished, at step {step}: nothing is left to train.")
    log_command(_log, "Its report:", f"{command('report')} {run.path}")
    log_command(_log, "As transformers models:", f"{command('export')} {run.path}")
