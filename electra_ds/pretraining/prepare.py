"""Turning the options of a pretraining into a checked job, with a micro-batch that fits the device's memory.

The preparations that all kinds of runs share are in `training/prepare.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import psutil
import torch

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.options import PretrainOptions
from electra_ds.config.recipe import JointRecipe, Recipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.config.run_record import RunRecord, RunSettings
from electra_ds.config.sections import GeneratorSection
from electra_ds.core import devices
from electra_ds.core.errors import ConfigError, DataError
from electra_ds.core.program import command
from electra_ds.core.ranks import Ranks
from electra_ds.core.terminal import log_command
from electra_ds.data.build import trained_from
from electra_ds.data.token_store import TokenStore, recorded_store, split_holdout
from electra_ds.pretraining.batches import objective_of
from electra_ds.pretraining.memory import (
    CONTEXT_BYTES,
    CPU_SHARE,
    FRAGMENTATION,
    Kernels,
)
from electra_ds.pretraining.objectives.base import Objective
from electra_ds.pretraining.pretrain import PretrainJob
from electra_ds.training import prepare
from electra_ds.training.step import set_up_model

_log = logging.getLogger(__name__)
DEFAULT_EVAL_WINDOWS = 512


def default_settings(total_steps: int) -> RunSettings:
    """Return the default settings of a run with this many steps."""
    tenth = max(1, total_steps // 10)
    return RunSettings(
        log_every=10,
        eval_every=min(5000, tenth),
        save_every=min(2000, tenth),
        keep=3,
        eval_windows=DEFAULT_EVAL_WINDOWS,
    )


def prepare_new(
    options: PretrainOptions,
    recipe: Recipe,
    plan: DeepSpeedPlan,
    store: TokenStore,
    run: RunDirectory,
    ranks: Ranks,
    initialised_from: Sequence[str] = (),
) -> PretrainJob:
    """Return a job for a new run. Raises DataError if the corpus is too small for a held-out part.

    initialised_from: the sources of the initial weights, which `interop.init_from.write_first_checkpoint` writes.
    """
    split, objective = split_holdout(store.documents, recipe.data, recipe.seed), objective_of(recipe, store.tokenizer)
    record = RunRecord(
        store=str(store.path.resolve()),
        store_fingerprint=store.info.fingerprint,
        parameters=objective.parameter_counts(),
        initialised_from=list(initialised_from),
        replacements_fingerprint=_read_by(objective, store),
        **prepare.new_record(options, plan, default_settings(recipe.schedule.total_steps), run, ranks),
    )
    objective.check_store(store, record.settings.eval_windows)
    return PretrainJob(run, recipe, plan, store, split, record, prepare.stop_at(options, recipe))


def plan_resume(options: PretrainOptions, run: RunDirectory, ranks: Ranks) -> DeepSpeedPlan:
    """Return the plan for resuming a run, from its own DeepSpeed JSON or the given one. Raises CheckpointError if there
    is no such run."""
    run.check_resumable("pretrain")
    return prepare.plan_of_run(options, run, run.read_record(), run.read_recipe(), ranks)


def prepare_resume(options: PretrainOptions, plan: DeepSpeedPlan, run: RunDirectory, ranks: Ranks) -> PretrainJob:
    """Return a job that resumes a run."""
    recipe, record = run.read_recipe(), run.read_record()
    remedy = f"give its new location: {command('pretrain')} --resume {run.path} --data STORE"
    record = prepare.resumed_record(record, options, plan, run, ranks)
    store = recorded_store(record, run.path, options.data, remedy)
    record = replace(record, store=str(store.path.resolve()))
    split, objective = split_holdout(store.documents, recipe.data, recipe.seed), objective_of(recipe, store.tokenizer)
    objective.check_store(store, record.settings.eval_windows)
    if record.replacements_fingerprint not in (None, _read_by(objective, store)):
        raise DataError(
            f"The replacements in {store.path} are not those that {run.path} was started with: they were drawn with "
            f"another recipe or another generator. Restore the original replacements, or give the location of the "
            f"store that has them: {command('pretrain')} --resume {run.path} --data STORE."
        )
    return PretrainJob(run, recipe, plan, store, split, record, prepare.stop_at(options, recipe))


def _read_by(objective: Objective[Any], store: TokenStore) -> str | None:
    """Return the fingerprint of a store's replacements, if the objective reads them."""
    return store.replacements.fingerprint if objective.reads_replacements and store.replacements else None


def with_fitting_micro_batch(job: PretrainJob, options: PretrainOptions, ranks: Ranks) -> PretrainJob:
    """Return the job with a micro-batch that fits, if its JSON leaves the choice open, and a note about it.

    All ranks must call it, and agree on the result. Raises ConfigError on all of them if not even one sequence fits.
    """
    vocab_size = job.store.tokenizer.vocab_size
    return replace(job, plan=plan_with_fitting_micro_batch(job.plan, job.recipe, vocab_size, options, ranks))


def plan_with_fitting_micro_batch(
    plan: DeepSpeedPlan, recipe: Recipe, vocab_size: int, options: PretrainOptions, ranks: Ranks
) -> DeepSpeedPlan:
    """Return the plan of `with_fitting_micro_batch`, for a run that may have no token store yet."""
    device = devices.device(ranks.launch)
    free = free_bytes(device, ranks)
    note = None
    if ranks.broadcast(plan.is_micro_batch_open):  # the others' devices may have other names
        fitting = fitting_plan(recipe, vocab_size, plan, device, ranks)
        if fitting.batch != plan.batch or options.micro_batch == "auto":
            share = "each rank's entire share" if fitting.batch == plan.batch else "the largest that fits"
            note = (
                f"micro-batch {fitting.batch.micro_batch_size} is {share}, with {free / 2**30:.1f} GiB of free memory"
            )
        plan = fitting
    else:
        needed = Objective.of(recipe, vocab_size).needed_bytes(plan, kernels_of(device)) or 0
        if needed > free:
            note = (
                f"a step is predicted to take {needed / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB are free; "
                f"--micro-batch auto finds a size that fits"
            )
    return plan if note is None else replace(plan, notes=(*plan.notes, note))


def check_clipping(recipe: Recipe, plan: DeepSpeedPlan) -> None:
    """Raise ConfigError if the generator has a clipping norm of its own at a ZeRO stage that has none for parts."""
    section = recipe.generator if isinstance(recipe, JointRecipe) else None
    if plan.stage and isinstance(section, GeneratorSection) and section.max_grad_norm is not None:
        raise ConfigError(
            f"generator.max_grad_norm needs ZeRO stage 0, but the DeepSpeed JSON has stage {plan.stage}, where "
            f"DeepSpeed clips all gradients together. Use stage 0, or set generator.max_grad_norm=null."
        )


def announce(job: PretrainJob) -> None:
    """Log what is about to run, in a few lines."""
    recipe, record, info = job.recipe, job.record, job.store.info
    data = (
        f"data: {info.num_tokens:,} tokens in {info.num_documents:,} documents ({job.store.path}), "
        f"{job.split.holdout.num_tokens:,} of them held out by {job.split.held_out_by}"
    )
    notes = list(job.plan.notes)
    if not record.initialised_from and trained_from(job.store.path) != recipe.tokenizer:
        notes.append(
            f"the tokenizer is the store's, with {info.vocab_size:,} tokens, not of the recipe's kind and size"
        )
    seen = recipe.schedule.total_steps * recipe.global_batch_size * recipe.data.sequence_length
    if seen > 200 * info.num_tokens:
        notes.append(
            f"this schedule passes over the corpus about {seen // info.num_tokens:,} times, so the model may overfit: "
            f"use more text or fewer steps if the held-out losses rise"
        )
    what = description_of(recipe, record.parameters, data, record.initialised_from)
    plan = replace(job.plan, notes=tuple(notes))
    prepare.announce(what, record.device, record.threads, plan, job.run)


def description_of(recipe: Recipe, parameters: Mapping[str, int], data: str, sources: Sequence[str] = ()) -> str:
    """Return the lines about model and data for `announce`. data: a line about the text. sources: of the weights."""
    parts = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in parameters.items())
    lines = [
        f"{recipe.name}: {parts} parameters; {recipe.schedule.total_steps:,} steps of {recipe.global_batch_size} x "
        f"{recipe.data.sequence_length} tokens",
        data,
        *(f"initial weights: {source}" for source in sources),
    ]
    return "\n".join(lines)


def say_finished(run: RunDirectory) -> None:
    """Log that nothing is left to train, and where the results are."""
    step = run.status_details().get("step")
    _log.info(f"The run {run.path} is finished, at step {step}: nothing is left to train.")
    log_command(_log, "Its report:", f"{command('report')} {run.path}")
    log_command(_log, "As transformers models:", f"{command('export')} {run.path}")


def kernels_of(device: torch.device) -> Kernels:
    return "cuda" if device.type == "cuda" else "cpu"


def free_bytes(device: torch.device, ranks: Ranks) -> int:
    """Return the bytes that a run may use: a GPU's free memory, or this rank's share of the free CPU memory."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0] + CONTEXT_BYTES
        )  # predictions include the context, which exists already
    return int(CPU_SHARE * psutil.virtual_memory().available / ranks.launch.local_size)


def fitting_plan(
    recipe: Recipe, vocab_size: int, plan: DeepSpeedPlan, device: torch.device, ranks: Ranks
) -> DeepSpeedPlan:
    """Return the plan with the largest micro-batch for which every rank has memory. All ranks must call it.

    On a GPU, sizes are tried. The memory is predicted on a CPU, where running out of memory kills the process, at ZeRO
    stage 3, whose ranks must run a model together, and for an objective without a `longest_micro_batch`. The plan's
    micro-batch stays for an objective that does not predict its memory. Raises ConfigError if not even one sequence
    fits.
    """
    objective: Objective[Any] = Objective.of(recipe, vocab_size)
    kernels = kernels_of(device)
    if objective.needed_bytes(plan, kernels) is None:
        return plan
    is_tried = device.type == "cuda" and plan.stage < 3 and objective.longest_micro_batch(1) is not None
    budget = free_bytes(device, ranks)

    def fits(candidate: DeepSpeedPlan) -> bool:
        if is_tried:
            return fits_in_memory(objective, candidate, device)
        return (objective.needed_bytes(candidate, kernels) or 0) <= budget

    fitting = largest_fitting(plan, fits, ranks)
    if fitting is None:
        raise ConfigError(
            "Not even one sequence fits into the free memory. Close other programs that use it, shard over more cards "
            "(--ds-config zero3-offload), or add an activation_checkpointing section to the DeepSpeed JSON. "
            f"{command('plan')} shows how much each part takes."
        )
    return fitting


def largest_fitting(plan: DeepSpeedPlan, fits: Callable[[DeepSpeedPlan], bool], ranks: Ranks) -> DeepSpeedPlan | None:
    """Return the plan with the largest micro-batch that fits on every rank; None if none does."""
    return plan.with_largest_micro_batch(lambda candidate: all(ranks.gather(fits(candidate))))


def fits_in_memory(objective: Objective[Any], plan: DeepSpeedPlan, device: torch.device) -> bool:
    """Return whether a forward and backward pass over the plan's longest micro-batch fits, next to the rest of a step.

    Empty tensors take the place of the optimizer's state, of buffers and of memory that the allocator cannot use.
    """
    try:
        _pass(objective, plan, device)
    except RuntimeError as error:
        if not devices.is_out_of_memory(error):
            raise
        return False
    finally:
        devices.release_memory(device)
    return True


def _pass(objective: Objective[Any], plan: DeepSpeedPlan, device: torch.device) -> None:
    peak = objective.peak_memory(plan, "cuda")
    micro_batch = objective.longest_micro_batch(plan.batch.micro_batch_size)
    assert peak is not None
    assert micro_batch is not None
    model = objective.build_model()
    model.to(device, set_up_model(model, plan)).train()
    elsewhere = peak.update.optimizer + peak.update.buffers + round(peak.allocated_bytes * FRAGMENTATION)
    stand_in = torch.empty(elsewhere, dtype=torch.uint8, device=device)
    for _ in range(min(2, plan.batch.gradient_accumulation_steps)):  # the second runs while the first's gradients exist
        output = model(micro_batch.to(device))
        torch.stack([*output.losses.values()]).sum().backward()
        del output
    torch.empty(peak.update.workspace, dtype=torch.uint8, device=device)
    del stand_in
