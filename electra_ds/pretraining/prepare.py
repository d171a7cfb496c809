"""From what the user asked for to a checked job."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from rich.console import Console

from electra_ds.config.cards import find_card
from electra_ds.config.deepspeed import (
    DeepSpeedPlan,
    cut_for,
    default_ds_config,
    read_deepspeed_json,
    resolve,
    with_micro_batch,
)
from electra_ds.config.hardware import cannot_use, check_gpu, look, notes_at_start
from electra_ds.config.monitors import FolderMonitor, Monitors, wandb_mode_of_environment
from electra_ds.config.recipe import Recipe, TrainingRecipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.config.run_record import (
    Compile,
    FinetuneSettings,
    Record,
    RunRecord,
    RunSettings,
    TrackingSettings,
    WandbMode,
)
from electra_ds.core import devices
from electra_ds.core.errors import ConfigError
from electra_ds.core.program import command
from electra_ds.core.ranks import Ranks
from electra_ds.core.terminal import note, say, say_command
from electra_ds.data.build import trained_from
from electra_ds.data.segments import split_holdout
from electra_ds.data.token_store import TokenStore, recorded_store
from electra_ds.pretraining.batches import objective_of
from electra_ds.pretraining.objectives.base import Objective
from electra_ds.pretraining.pretrain import PretrainJob
from electra_ds.pretraining.probe import fitting_plan, free_bytes, kernels_of
from electra_ds.training.engine import check_plan, wants_fp16
from electra_ds.training.trackers import check_tracking

SettingsT = TypeVar("SettingsT", RunSettings, FinetuneSettings)
RecordT = TypeVar("RecordT", bound=Record)


@dataclass(frozen=True)
class Options:
    """Command-line values that are None where they were not given."""

    data: Path | None = None
    """Where a resumed pretraining's token store is now."""
    ds_config: str | None = None
    micro_batch: int | Literal["auto"] | None = None
    stop_at: int | None = None
    threads: int | None = None
    log_every: int | None = None
    eval_every: int | None = None
    save_every: int | None = None
    keep: int | None = None
    eval_windows: int | None = None
    compile: Compile | None = None
    keep_at: list[int] | None = None
    stop_on_collapse: bool | None = None
    wandb: WandbMode | None = None
    wandb_project: str | None = None
    wandb_entity: str | None = None
    wandb_group: str | None = None
    tensorboard: bool | None = None

    def settings(self, defaults: SettingsT) -> SettingsT:
        """The defaults with what was given put in their place."""
        given = {name: getattr(self, name) for name in asdict(defaults) if getattr(self, name) is not None}
        return replace(defaults, **given)

    def tracking(self, before: TrackingSettings, monitors: Monitors, run: RunDirectory) -> TrackingSettings:
        """What was recorded, then the sections that a DeepSpeed JSON enables, then what was given here.

        WANDB_MODE decides the mode where only the JSON asks for wandb, as it does in DeepSpeed.
        Raises ConfigError if a value would have no effect.
        """
        new: dict[str, Any] = {}
        if monitors.wandb is not None:
            section = monitors.wandb
            given = {"wandb_project": section.project, "wandb_entity": section.team, "wandb_group": section.group}
            new = {"wandb": wandb_mode_of_environment() or "online"} | {
                name: value for name, value in given.items() if value is not None
            }
        if self.tensorboard is not None:
            new["tensorboard"] = "tensorboard" if self.tensorboard else None
        if monitors.tensorboard is not None and self.tensorboard is not False:
            new["tensorboard"] = _folder(monitors.tensorboard, "tensorboard", run)
        if monitors.csv_monitor is not None:
            new["csv"] = _folder(monitors.csv_monitor, "csv_monitor", run)
        for name in ("wandb", "wandb_project", "wandb_entity", "wandb_group"):
            if getattr(self, name) is not None:
                new[name] = getattr(self, name)
        settings = replace(before, **new)
        if settings.wandb == "off" and (self.wandb_project or self.wandb_entity or self.wandb_group):
            raise ConfigError(
                "--wandb-project, --wandb-entity and --wandb-group say where wandb puts the run, but wandb is off. "
                "Add --wandb online or --wandb offline."
            )
        return settings


def _folder(monitor: FolderMonitor, default: str, run: RunDirectory) -> str:
    """output_path/job_name as in DeepSpeed; where they are not given, in the run's folder and under its name."""
    if not monitor.output_path:
        return str(Path(default) / monitor.job_name)
    return str(Path(monitor.output_path).resolve() / (monitor.job_name or run.path.resolve().name))


def default_settings(total_steps: int) -> RunSettings:
    tenth = max(1, total_steps // 10)
    return RunSettings(log_every=10, eval_every=min(5000, tenth), save_every=min(2000, tenth), keep=3, eval_windows=512)


def plan_new(options: Options, recipe: Recipe, run: RunDirectory, ranks: Ranks) -> DeepSpeedPlan:
    """The DeepSpeed JSON resolved for a new run, checked before its data is built. Raises ConfigError."""
    run.check_free()
    _stop_at(options, recipe)
    plan = plan_for(options, recipe, ranks)
    if ranks.is_main:
        check_tracking(options.tracking(TrackingSettings(), plan.monitors, run), run, is_new=True)
    return plan


def plan_for(options: Options, recipe: TrainingRecipe, ranks: Ranks) -> DeepSpeedPlan:
    """The DeepSpeed JSON of a new run, or the default one of this machine, resolved. Raises ConfigError."""
    if options.ds_config:
        return resolved_plan(options, read_deepspeed_json(options.ds_config), options.ds_config, recipe, ranks)
    device = devices.device(ranks.launch)
    values, source = default_ds_config(device.type == "cuda", find_card(devices.device_name(device)))
    plan = resolved_plan(options, values, source, recipe, ranks)
    return replace(plan, notes=(f"without --ds-config this run uses {source}", *plan.notes))


def resolved_plan(
    options: Options, values: dict[str, Any], source: str, recipe: TrainingRecipe, ranks: Ranks
) -> DeepSpeedPlan:
    """A DeepSpeed JSON resolved for the device of these ranks. Raises ConfigError if it cannot be run there."""
    device = devices.device(ranks.launch)
    hardware = look(torch)
    check_gpu(hardware, device.index)
    values = with_micro_batch(values, options.micro_batch)
    auto_fp16 = wants_fp16(device)
    plan = resolve(values, recipe, world_size=ranks.world_size, auto_fp16=auto_fp16, source=source)
    check_plan(plan, device, source, cannot_use(hardware))
    notes = notes_at_start(hardware, device.index, plan.precision.name)
    made_for = find_card(Path(source).stem)
    if device.type == "cpu" and made_for is not None and not notes:
        notes = [f"{Path(source).stem} is made for a {made_for.name}; there is no GPU here, so the CPU trains"]
    return replace(plan, notes=(*plan.notes, *notes))


def plan_of_run(
    options: Options, run: RunDirectory, record: Record, recipe: TrainingRecipe, ranks: Ranks
) -> DeepSpeedPlan:
    """The plan of a run that is resumed, or of one of its checkpoints: the JSON that is given, or else its own.

    Of its own, what we chose of the batch's cut is chosen again on another number of ranks, and on another device where
    that depends on its memory; what the user gave stays. Raises ConfigError.
    """
    if options.ds_config:
        return resolved_plan(options, read_deepspeed_json(options.ds_config), options.ds_config, recipe, ranks)
    values, source = run.read_deepspeed_json(), str(run.path / "deepspeed.json")
    if options.micro_batch is not None:
        return resolved_plan(options, values, source, recipe, ranks)
    given, is_same_number = record.given_batch, ranks.world_size == record.world_size
    if not is_same_number and recipe.global_batch_size % ranks.world_size == 0:
        values = cut_for(values, given, recipe.global_batch_size // ranks.world_size)
    plan = resolved_plan(options, values, source, recipe, ranks)
    is_open = given == {} and not _is_as_recorded(record, ranks)
    notes = plan.notes
    if given is None and not is_same_number:
        notes = (
            *notes,
            f"the run's record does not say who chose its micro-batch, so it is kept as far as it divides the batch "
            f"({plan.batch}); --micro-batch auto chooses it again",
        )
    return replace(plan, given_batch=given, is_micro_batch_open=is_open, notes=notes)


def _is_as_recorded(record: Record, ranks: Ranks) -> bool:
    """Return whether a run resumes with as many ranks as it had, on the same kind of device."""
    device = devices.device_name(devices.device(ranks.launch))
    return ranks.world_size == record.world_size and device == record.device


def record_again(record: RecordT, options: Options, ranks: Ranks, settings: Any, tracking: TrackingSettings) -> RecordT:
    """A run's record for where it is resumed. The number of threads is set, and chosen again where we chose it and
    ranks or device are others."""
    is_given = options.threads is not None
    is_chosen_again = record.threads_given is False and not _is_as_recorded(record, ranks)
    threads = options.threads if is_given or is_chosen_again else record.threads
    return replace(
        record,
        device=devices.device_name(devices.device(ranks.launch)),
        threads=devices.set_threads(threads, ranks.launch),
        threads_given=is_given or record.threads_given,
        world_size=ranks.world_size,
        settings=settings,
        tracking=tracking,
    )


def prepare_new(
    options: Options,
    recipe: Recipe,
    plan: DeepSpeedPlan,
    store: TokenStore,
    run: RunDirectory,
    ranks: Ranks,
    initialised_from: Sequence[str] = (),
) -> PretrainJob:
    """A job for a new run. Raises DataError if the corpus is too small to hold out from.

    initialised_from: where the weights come from that `adopt.write_first_checkpoint` will be given.
    """
    split = split_holdout(store.documents, recipe.data, recipe.seed)
    record = RunRecord(
        store=str(store.path.resolve()),
        store_fingerprint=store.info.fingerprint,
        parameters=objective_of(recipe, store.tokenizer).parameter_counts(),
        device=devices.device_name(devices.device(ranks.launch)),
        threads=devices.set_threads(options.threads, ranks.launch),
        threads_given=options.threads is not None,
        world_size=ranks.world_size,
        settings=options.settings(default_settings(recipe.schedule.total_steps)),
        command=sys.argv,
        tracking=options.tracking(TrackingSettings(), plan.monitors, run),
        initialised_from=list(initialised_from),
    )
    return PretrainJob(run, recipe, plan, store, split, record, _stop_at(options, recipe))


def is_finished(run: RunDirectory, kind: Literal["pretrain", "finetune"], ranks: Ranks) -> bool:
    """Return whether a run has reached the end of its schedule. To be called by all ranks, which agree on it.

    Raises CheckpointError if there is no such run.
    """
    with ranks.together():
        run.check_resumable(kind)
    return ranks.broadcast(run.status() == "done")


def say_finished(run: RunDirectory, console: Console) -> None:
    """Print that nothing is left to train, and where the results are."""
    step = run.status_details().get("step")
    say(console, f"The run {run.path} is finished, at step {step}: nothing is left to train.")
    say_command(console, "Its report:", f"{command('report')} {run.path}")
    say_command(console, "As transformers models:", f"{command('export')} {run.path}")


def plan_resume(options: Options, run: RunDirectory, ranks: Ranks) -> DeepSpeedPlan:
    """Return the plan to resume a run with: its own DeepSpeed JSON, or another. Raises CheckpointError if there is
    none."""
    run.check_resumable("pretrain")
    recipe = run.read_recipe()
    return plan_of_run(options, run, run.read_record(), recipe, ranks)


def prepare_resume(options: Options, plan: DeepSpeedPlan, run: RunDirectory, ranks: Ranks) -> PretrainJob:
    """Return a job that resumes a run."""
    recipe, record = run.read_recipe(), run.read_record()
    # The run's own JSON spoke at the start; what was said then, --wandb off for instance, is in the record.
    tracking = options.tracking(record.tracking, plan.monitors if options.ds_config else Monitors(), run)
    if ranks.is_main:
        check_tracking(tracking, run, is_new=False)
    remedy = f"say where it is now: {command('pretrain')} --resume {run.path} --data STORE"
    store = recorded_store(record, run.path, options.data, remedy)
    record = replace(record, store=str(store.path.resolve()))
    record = record_again(record, options, ranks, options.settings(record.settings), tracking)
    split = split_holdout(store.documents, recipe.data, recipe.seed)
    return PretrainJob(run, recipe, plan, store, split, record, _stop_at(options, recipe))


def with_fitting_micro_batch(job: PretrainJob, options: Options, ranks: Ranks) -> PretrainJob:
    """The job with a micro-batch that fits, where its JSON leaves that to us, and with a note on what was found.

    To be called by all ranks, which agree on it. Raises ConfigError on all of them where not even one sequence fits.
    """
    return replace(job, plan=fitted(job.plan, job.recipe, job.store.tokenizer.vocab_size, options, ranks))


def fitted(plan: DeepSpeedPlan, recipe: Recipe, vocab_size: int, options: Options, ranks: Ranks) -> DeepSpeedPlan:
    """The plan of `with_fitting_micro_batch`, for a run that may have no token store yet."""
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


def hold(run: RunDirectory, ranks: Ranks, held: contextlib.ExitStack, *, is_new: bool) -> None:
    """Lock the run for this job, and see that all ranks have it before them. Raises CheckpointError or ConfigError."""
    with ranks.together():
        if ranks.is_main:
            held.enter_context(run.locked(is_new=is_new))
    mark = ranks.broadcast(run.mark())
    with ranks.together():
        run.check_shared(mark)


def _stop_at(options: Options, recipe: Recipe) -> int:
    total = recipe.schedule.total_steps
    if options.stop_at is not None and options.stop_at > total:
        raise ConfigError(f"--stop-at {options.stop_at} is beyond schedule.total_steps {total}.")
    return options.stop_at or total


def announce(job: PretrainJob, console: Console) -> None:
    """What is about to run, in a few lines."""
    recipe, info = job.recipe, job.store.info
    data = (
        f"data: {info.num_tokens:,} tokens in {info.num_documents:,} documents ({job.store.path}), "
        f"{job.split.holdout.num_tokens:,} of them held out by {job.split.held_out_by}"
    )
    sources = job.record.initialised_from
    notes = list(job.plan.notes)
    if not sources and trained_from(job.store.path) != recipe.tokenizer:
        notes.append(f"the tokenizer is the store's, {info.vocab_size:,} pieces, not one of the recipe's kind and size")
    seen = recipe.schedule.total_steps * recipe.global_batch_size * recipe.data.sequence_length
    if seen > 200 * info.num_tokens:
        notes.append(f"this schedule reads the corpus some {seen // info.num_tokens:,} times over")
    device, threads = job.record.device, job.record.threads
    if busy := devices.busy_note(device, threads):
        notes.append(busy)
    plan = replace(job.plan, notes=tuple(notes))
    where = devices.shown_threads(device, threads)
    show_run(recipe, job.record.parameters, data, where, plan, job.run, console, sources)


def show_run(
    recipe: Recipe,
    parameters: Mapping[str, int],
    data: str,
    device: str,
    plan: DeepSpeedPlan,
    run: RunDirectory,
    console: Console,
    sources: Sequence[str] = (),
) -> None:
    """The lines of `announce`. data: a line about the text; sources: of the first weights."""
    parts = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in parameters.items())
    say(
        console,
        f"{recipe.name}: {parts} parameters; {recipe.schedule.total_steps:,} steps of {recipe.global_batch_size} x "
        f"{recipe.data.sequence_length} tokens\n"
        f"{data}\n"
        f"{device}, {plan.precision.name}, ZeRO stage {plan.stage}, micro-batch x accumulation = {plan.batch}\n"
        + "".join(f"first weights: {source}\n" for source in sources)
        + f"run directory: {run.path}",
    )  # fmt: skip
    for each in plan.notes:
        note(console, each)
