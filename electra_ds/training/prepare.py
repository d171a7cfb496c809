"""Preparing any kind of run for its first step: a plan for this device, a record, and its folder."""

from __future__ import annotations

import contextlib
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from electra_ds.config.cards import cannot_use, check_gpu, detect_hardware, find_card, notes_at_start
from electra_ds.config.deepspeed import (
    DeepSpeedPlan,
    cut_for,
    default_ds_config,
    read_deepspeed_json,
    resolve,
    with_micro_batch,
)
from electra_ds.config.monitors import FolderMonitor, Monitors, wandb_mode_of_environment
from electra_ds.config.options import RunOptions
from electra_ds.config.run_directory import RunDirectory
from electra_ds.config.run_record import Record, Settings, TrackingSettings
from electra_ds.config.sections import TrainingRecipe
from electra_ds.core import devices
from electra_ds.core.errors import ConfigError
from electra_ds.core.ranks import Ranks
from electra_ds.core.terminal import NOTE
from electra_ds.training.engine import check_plan, wants_fp16
from electra_ds.training.optimizer import update_rule
from electra_ds.training.tracking import check_tracking

_log = logging.getLogger(__name__)

_WANDB = ("wandb", "wandb_project", "wandb_entity", "wandb_group")
RecordT = TypeVar("RecordT", bound=Record)


# --- the plan


def plan_new(options: RunOptions, recipe: TrainingRecipe, run: RunDirectory, ranks: Ranks) -> DeepSpeedPlan:
    """Return the DeepSpeed JSON resolved and checked for a new run, before its data is built. Raises ConfigError."""
    run.check_free()
    stop_at(options, recipe)
    update_rule(recipe.optimizer)
    plan = plan_for(options, recipe, ranks)
    if ranks.is_main:
        check_tracking(tracking_settings(options, TrackingSettings(), plan.monitors, run), run, is_new=True)
    return plan


def plan_for(options: RunOptions, recipe: TrainingRecipe, ranks: Ranks) -> DeepSpeedPlan:
    """Return a new run's DeepSpeed JSON, or this machine's default one, resolved. Raises ConfigError."""
    if options.ds_config:
        return resolved_plan(options, read_deepspeed_json(options.ds_config), options.ds_config, recipe, ranks)
    device = devices.device(ranks.launch)
    values, source = default_ds_config(device.type == "cuda", find_card(devices.device_name(device)))
    plan = resolved_plan(options, values, source, recipe, ranks)
    return replace(plan, notes=(f"without --ds-config this run uses {source}", *plan.notes))


def resolved_plan(
    options: RunOptions, values: dict[str, Any], source: str, recipe: TrainingRecipe, ranks: Ranks
) -> DeepSpeedPlan:
    """Return a DeepSpeed JSON resolved for these ranks' device. Raises ConfigError if it cannot be used there."""
    device = devices.device(ranks.launch)
    hardware = detect_hardware(torch)
    check_gpu(hardware, device.index)
    values = with_micro_batch(values, options.micro_batch)
    auto_fp16 = wants_fp16(device)
    plan = resolve(values, recipe, world_size=ranks.world_size, auto_fp16=auto_fp16, source=source)
    check_plan(plan, device, source, cannot_use(hardware))
    notes = notes_at_start(hardware, device.index, plan.precision.name)
    made_for = find_card(Path(source).stem)
    if device.type == "cpu" and made_for is not None and not notes:
        notes = [f"{Path(source).stem} is made for a {made_for.name}; without a GPU here, training runs on the CPU"]
    return replace(plan, notes=(*plan.notes, *notes))


def plan_of_run(
    options: RunOptions, run: RunDirectory, record: Record, recipe: TrainingRecipe, ranks: Ranks
) -> DeepSpeedPlan:
    """Return the plan for resuming a run, or for one of its checkpoints: from the given JSON, or else the run's own.

    With the run's own JSON, the micro-batch and accumulation that we chose are chosen again on another number of ranks,
    and on another device if they depend on its memory; values that the user gave stay. Raises ConfigError.
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
            f"the run's record does not say who chose its micro-batch, so it stays the same if it divides the batch "
            f"({plan.batch}); --micro-batch auto chooses it again",
        )
    return replace(plan, given_batch=given, is_micro_batch_open=is_open, notes=notes)


def _is_as_recorded(record: Record, ranks: Ranks) -> bool:
    """Return whether a run resumes with the same number of ranks on the same kind of device."""
    device = devices.device_name(devices.device(ranks.launch))
    return ranks.world_size == record.world_size and device == record.device


def stop_at(options: RunOptions, recipe: TrainingRecipe) -> int:
    """Return the step at which to save and exit. Raises ConfigError if it is beyond the schedule."""
    total = recipe.schedule.total_steps
    if options.stop_at is not None and options.stop_at > total:
        raise ConfigError(f"--stop-at {options.stop_at} is beyond the schedule's {total} steps.")
    return options.stop_at or total


# --- the record


def new_record(
    options: RunOptions, plan: DeepSpeedPlan, defaults: Settings, run: RunDirectory, ranks: Ranks
) -> dict[str, Any]:
    """Return the fields that the records of all new runs have, and set the number of threads. defaults: settings for
    options that are not given."""
    return {
        "device": devices.device_name(devices.device(ranks.launch)),
        "threads": devices.set_threads(options.threads, ranks.launch),
        "threads_given": options.threads is not None,
        "world_size": ranks.world_size,
        "settings": options.settings(defaults),
        "command": sys.argv,
        "tracking": tracking_settings(options, TrackingSettings(), plan.monitors, run),
    }


def resumed_record(
    record: RecordT, options: RunOptions, plan: DeepSpeedPlan, run: RunDirectory, ranks: Ranks
) -> RecordT:
    """Return a resumed run's updated record. Raises ConfigError if a requested tracker cannot be used.

    This sets the number of threads. If we chose it, it is chosen again on another number of ranks or device.
    """
    # The record already contains the settings of the run's own JSON and the options at its start, such as --wandb off.
    monitors = plan.monitors if options.ds_config else Monitors()
    tracking = tracking_settings(options, record.tracking, monitors, run)
    if ranks.is_main:
        check_tracking(tracking, run, is_new=False)
    is_given = options.threads is not None
    is_chosen_again = record.threads_given is False and not _is_as_recorded(record, ranks)
    threads = options.threads if is_given or is_chosen_again else record.threads
    return replace(
        record,
        device=devices.device_name(devices.device(ranks.launch)),
        threads=devices.set_threads(threads, ranks.launch),
        threads_given=is_given or record.threads_given,
        world_size=ranks.world_size,
        settings=options.settings(record.settings),
        tracking=tracking,
    )


def tracking_settings(
    options: RunOptions, before: TrackingSettings, monitors: Monitors, run: RunDirectory
) -> TrackingSettings:
    """Return the tracking settings: options override a DeepSpeed JSON's sections, which override the recorded ones.

    WANDB_MODE decides the mode if only the JSON enables wandb, as in DeepSpeed. Raises ConfigError if a value would
    have no effect.
    """
    wandb: dict[str, Any] = {}
    if monitors.wandb is not None:
        section, mode = monitors.wandb, wandb_mode_of_environment() or "online"
        wandb = dict(zip(_WANDB, (mode, section.project, section.team, section.group), strict=True))
    given = {name: getattr(options, name) for name in _WANDB if getattr(options, name) is not None}
    new = {name: value for name, value in (wandb | given).items() if value is not None}
    if options.tensorboard is not None:
        new["tensorboard"] = "tensorboard" if options.tensorboard else None
    if monitors.tensorboard is not None and options.tensorboard is not False:
        new["tensorboard"] = _folder(monitors.tensorboard, "tensorboard", run)
    if monitors.csv_monitor is not None:
        new["csv"] = _folder(monitors.csv_monitor, "csv_monitor", run)
    settings = replace(before, **new)
    if settings.wandb == "off" and given.keys() - {"wandb"}:
        raise ConfigError(
            "--wandb-project, --wandb-entity and --wandb-group have no effect, because wandb is off. "
            "Add --wandb online or --wandb offline."
        )
    return settings


def _folder(monitor: FolderMonitor, default: str, run: RunDirectory) -> str:
    """Return output_path/job_name as in DeepSpeed, or by default a folder in the run directory."""
    if not monitor.output_path:
        return str(Path(default) / monitor.job_name)
    return str(Path(monitor.output_path).resolve() / (monitor.job_name or run.path.resolve().name))


# --- the run directory and messages


def is_finished(run: RunDirectory, kind: Literal["pretrain", "finetune"], ranks: Ranks) -> bool:
    """Return whether a run has reached the end of its schedule, the same on all ranks, which must all call it.

    Raises CheckpointError if there is no such run.
    """
    with ranks.fail_together():
        run.check_resumable(kind)
    return ranks.broadcast(run.status() == "done")


def lock_run(run: RunDirectory, ranks: Ranks, held: contextlib.ExitStack, *, is_new: bool) -> None:
    """Lock the run for this job, and check that all ranks see it. Raises CheckpointError or ConfigError."""
    with ranks.fail_together():
        if ranks.is_main:
            held.enter_context(run.locked(is_new=is_new))
    owner = ranks.broadcast(run.owner())
    with ranks.fail_together():
        run.check_shared(owner)


def announce(what: str, device: str, threads: int, plan: DeepSpeedPlan, run: RunDirectory) -> None:
    """Log what is about to run, and the notes on its plan. what: lines about model and data."""
    _log.info(
        f"{what}\n{devices.shown_threads(device, threads)}, {plan.precision.name}, ZeRO stage {plan.stage}, "
        f"micro-batch x accumulation = {plan.batch}\nrun directory: {run.path}",
    )
    busy = devices.busy_note(device, threads)
    for each in (*plan.notes, *([busy] if busy else [])):
        _log.log(NOTE, each)
