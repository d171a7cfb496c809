"""Turn the options of a finetuning into a checked job. `training/prepare.py` has what every run needs."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from electra_ds.config.finetune_recipe import FinetuneRecipe, Finetuning, recipe_source
from electra_ds.config.names import TASKS
from electra_ds.config.options import FinetuneOptions, TaskSource
from electra_ds.config.plugins import METRIC, find
from electra_ds.config.run_directory import RunDirectory, read_where_it_is
from electra_ds.config.run_record import FinetuneRecord, FinetuneSettings
from electra_ds.core import devices
from electra_ds.core.errors import CheckpointError, ConfigError, DataError
from electra_ds.core.program import command
from electra_ds.core.ranks import Ranks
from electra_ds.core.terminal import log_command
from electra_ds.data.build import ShowProgress
from electra_ds.finetuning.advice import advice
from electra_ds.finetuning.encoder_source import EncoderSource, finetuned_encoder, read_encoder
from electra_ds.finetuning.finetune import SCORES, FinetuneJob
from electra_ds.finetuning.heads import check_layers
from electra_ds.finetuning.load_task import LoadedTask, recorded_task
from electra_ds.finetuning.metrics import BUILT_IN
from electra_ds.finetuning.tasks.base import FinetuneTask
from electra_ds.finetuning.tasks.find import task_class
from electra_ds.pretraining.run_time import RunTime, finetuning_time
from electra_ds.training import prepare
from electra_ds.training.checkpoint import CheckpointFolder, open_checkpoint
from electra_ds.training.checkpoints import kept_checkpoint

_log = logging.getLogger(__name__)

_SAVE_EVERY = 500
_EVALUATIONS = 10
"""The number of evaluations in a run that schedule.min_steps makes longer. Other runs have one per epoch."""


def tokenised_task(
    kind: type[FinetuneTask],
    data: LoadedTask,
    encoder: EncoderSource,
    recipe: FinetuneRecipe,
    max_train: int | None,
    show_progress: ShowProgress,
) -> FinetuneTask:
    """Return the task as the encoder's inputs. Raises ConfigError if the encoder takes only shorter inputs."""
    if recipe.data.max_length > encoder.max_length:
        raise ConfigError(
            f"data.max_length is {recipe.data.max_length}, but {encoder.name} takes {encoder.max_length} tokens. "
            f"Add --set data.max_length={encoder.max_length}"
        )
    sizes = data.sizes
    left_out = max(0, sizes["train"] - max_train) if max_train else 0
    with show_progress() as progress:
        progress.begin("tokenising", sum(sizes.values()) - left_out)
        return kind(
            data,
            encoder.tokenizer,
            recipe,
            has_segments=encoder.has_segments,
            max_train=max_train,
            progress=progress.add,
        )


def prepare_new(
    options: FinetuneOptions,
    recipe: FinetuneRecipe,
    data: LoadedTask,
    encoder: EncoderSource,
    run: RunDirectory,
    ranks: Ranks,
    show_progress: ShowProgress,
) -> FinetuneJob:
    """Return a job for a new run. Raises ConfigError if recipe, JSON, task and model do not fit together."""
    _check_metrics(recipe, options.task)
    check_layers([f"encoder.{name}" for name in encoder.tensors], recipe.optimizer)
    kind = task_class(options.task)
    task = tokenised_task(kind, data, encoder, recipe, options.max_train_examples, show_progress)
    training = Finetuning(recipe, len(task.train), encoder.num_layers)
    plan = prepare.plan_new(options, training, run, ranks)
    said = (*encoder.notes, *advice(training, encoder, task, keeps_weights=not options.discard_weights))
    plan = replace(plan, notes=(*plan.notes, *(note.rstrip(".") for note in (*data.notes, *said))))
    record = FinetuneRecord(
        task=task.name,
        task_kind=None if options.task in TASKS else options.task,
        source=options.source(),
        data_fingerprint=data.fingerprint,
        num_examples=len(task.train),
        model=encoder.name,
        model_fingerprint=encoder.fingerprint,
        has_random_weights=bool(options.random_init),
        recipe_source=recipe_source(options.recipe_or_default()),
        changes=_changes(options),
        test_sets=list(task.test),
        parameters={"encoder": sum(tensor.numel() for tensor in encoder.tensors.values())},
        **prepare.new_record(options, plan, _default_settings(training), run, ranks),
    )
    _check_test(record, task, data.source)
    if options.random_init:
        encoder = replace(encoder, tensors={})
    stop_at = prepare.stop_at(options, training)
    return FinetuneJob(run, training, plan, record, encoder, task, stop_at, data.source)


def _check_metrics(recipe: FinetuneRecipe, task: str | None) -> None:
    """Raise ConfigError or PluginError for further metrics that cannot be computed."""
    kind = task_class(task)
    if recipe.metrics and not kind.has_own_metrics:
        raise ConfigError(
            f"--task {task} does not support additional metrics, but the recipe has metrics: {list(recipe.metrics)}. "
            f"Remove them."
        )
    names = [find(METRIC, name) and name.rpartition(":")[2] for name in recipe.metrics]
    if taken := [name for name in names if name in BUILT_IN or names.count(name) > 1]:
        raise ConfigError(f"metrics: the name '{taken[0]}' is used twice. Rename the class, or register another name.")


def _changes(options: FinetuneOptions) -> list[str]:
    """Return the changes that distinguish this run from others of the same recipe, apart from the seed."""
    changes = sorted(override for override in options.overrides or () if override.partition("=")[0] != "seed")
    if options.max_train_examples is not None:
        changes.append(f"{options.max_train_examples} training examples")
    return changes


def is_finished(options: FinetuneOptions, run: RunDirectory, ranks: Ranks) -> bool:
    """Return True if nothing is left to do: the run is finished, and no test set remains to be predicted.

    Call it on all ranks; they agree on the answer. Raises CheckpointError if there is no such run.
    """
    if not prepare.is_finished(run, "finetune", ranks):
        return False
    with ranks.fail_together():
        has_predicted = run.read_record(FinetuneRecord).settings.predict_test
    return ranks.broadcast(has_predicted or not options.predict_test)


def say_finished(run: RunDirectory) -> None:
    """Log that nothing is left to train, and where the results are."""
    record, recipe = run.read_record(FinetuneRecord), run.read_recipe(FinetuneRecipe)
    _log.info(f"The run {run.path} is finished: nothing is left to train. Its scores are in {run.path / SCORES}.")
    log_command(_log, "Several runs together:", f"{command('report')} RUN RUN …")
    with contextlib.suppress(CheckpointError):  # raised if the weights are gone
        config, _ = finetuned_encoder(kept_checkpoint(run.path))
        kind = task_class(record.loaded_as)
        log_command(_log, "As a transformers model:", _how_to_export(run, recipe, config, kind))
        if record.test_sets and not record.settings.predict_test:
            predict = f"{command('finetune')} --resume {run.path} --predict-test"
            log_command(_log, "To predict the test sets:", predict)


def prepare_resume(
    options: FinetuneOptions, run: RunDirectory, ranks: Ranks, show_progress: ShowProgress
) -> FinetuneJob:
    """Return a job that resumes a run. Raises DataError if its examples or its initial model have changed."""
    run.check_resumable("finetune")
    recipe, record = run.read_recipe(FinetuneRecipe), run.read_record(FinetuneRecord)
    changed = options.eval_every is not None and options.eval_every != record.settings.eval_every
    if changed and (record.settings.best or record.settings.early_stopping is not None):
        raise ConfigError(
            "--eval-every cannot change: --best and --early-stopping choose from its evaluations. Leave it out."
        )
    if options.best and not record.settings.best:
        raise ConfigError(
            "--best must be given when a run starts: the weights of earlier evaluations were not kept. Leave it out."
        )
    source = _source_now(options, record)
    encoder = _encoder_again(run, record, options.model)
    training = Finetuning(recipe, record.num_examples, encoder.num_layers)
    plan = prepare.plan_of_run(options, run, record, training, ranks)
    places = "--data-dir DIR" if record.source.hub is None else "--hub FOLDER"
    places = places if record.source.train is None else "--train FILE --dev FILE"
    remedy = f"say where they are now: {command('finetune')} --resume {run.path} {places}"
    data, source = recorded_task(record, run.path, source, remedy)
    record = prepare.resumed_record(replace(record, source=source), options, plan, run, ranks)
    kind = task_class(record.loaded_as)
    task = tokenised_task(kind, data, encoder, recipe, record.settings.max_train_examples, show_progress)
    if len(task.train) != record.num_examples:
        raise CheckpointError(
            f"{run.path / 'run.json'} says {record.num_examples:,} training inputs, but there are {len(task.train):,}: "
            f"it was edited, or the tokenizer or the program has changed. Restore it, or start a new run."
        )
    _check_test(record, task, data.source)
    stop_at = prepare.stop_at(options, training)
    return FinetuneJob(run, training, plan, record, encoder, task, stop_at, data.source)


def _check_test(record: FinetuneRecord, task: FinetuneTask, source: str) -> None:
    if record.settings.predict_test and not task.test:
        raise ConfigError(f"--predict-test: {source} has no test set of {task.name}.")


def check_same_examples(job: FinetuneJob, ranks: Ranks) -> None:
    """Raise DataError if the ranks have read different examples. Call it on all ranks."""
    counts = (len(job.task.train), [len(inputs) for inputs in (job.task.dev | job.task.test).values()])
    found = ranks.gather((job.record.data_fingerprint, counts))
    with ranks.fail_together():
        if any(other != found[0] for other in found):
            raise DataError("The ranks have read different examples. Put the files where all ranks see the same ones.")


def _source_now(options: FinetuneOptions, record: FinetuneRecord) -> TaskSource:
    """Return a run's source with the places that the user gave.

    Raises ConfigError for options that do not fit the run.
    """
    is_own = record.source.train is not None
    paths = {"folder": options.data_dir, "train": options.train, "dev": options.dev, "test": options.test}
    given: dict[str, Any] = {name: str(path.absolute()) for name, path in paths.items() if path is not None}
    if options.hub is not None:
        name, mark, config = options.hub.partition("#")
        is_local = Path(name).is_dir()
        if not mark:
            _, mark, config = (record.source.hub or "").partition("#")
        given["hub"] = f"{Path(name).absolute() if is_local else name}{mark}{config}"
    fitting = {"train", "dev", "test"} if is_own else {"hub"} if record.task_kind else {"hub", "folder"}
    wrong = [name for name in given if name not in fitting]
    if wrong:
        of = "your own examples" if is_own else "a data set" if record.task_kind else f"official files of {record.task}"
        flag = wrong[0].replace("folder", "data-dir")
        raise ConfigError(f"--{flag} does not fit this run, which uses {of}.")
    if "hub" in given and "folder" in given:
        raise ConfigError("Give either --data-dir or --hub, not both.")
    if "hub" in given:
        given |= {"folder": None, "revision": None if is_local else record.source.revision}
    elif "folder" in given:
        given |= {"hub": None, "revision": None}
    return replace(record.source, **given)


def _encoder_again(run: RunDirectory, record: FinetuneRecord, given: str | None) -> EncoderSource:
    """Return a run's configuration and tokenizer, and its initial model if it has no checkpoint.

    given: the place of the initial model, if the user gave one.
    """
    newest, _ = CheckpointFolder(run.checkpoints, keep=1).latest_valid()
    if newest is not None:
        if given is not None:
            raise ConfigError(f"The weights of {run.path} are in its checkpoints, so leave out --model.")
        config, tokenizer = finetuned_encoder(open_checkpoint(newest))
        return EncoderSource(record.model, config, tokenizer, {}, record.model_fingerprint)
    remedy = f"{command('finetune')} --resume {run.path} --model FOLDER"

    def read(place: str | Path) -> EncoderSource:
        encoder = read_encoder(str(place))
        if encoder.fingerprint != record.model_fingerprint:
            raise DataError(
                f"The model {place} is not the one that {run.path} began with, or has changed since, and the run has "
                f"no checkpoint yet. If the original is elsewhere, say where: {remedy}. Otherwise start a new run."
            )
        return encoder

    if given is not None or not Path(record.model).is_absolute():  # a name on the Hub
        encoder = read(given or record.model)
    else:
        missing = (
            f"The model that {run.path} began with is neither at {record.model} nor at the same place relative to the "
            f"run, and the run has no checkpoint yet. If it has moved, say where it is now: {remedy}"
        )
        encoder = read_where_it_is(record.model, run.path, read, missing)
    encoder = replace(encoder, name=record.model)
    return replace(encoder, tensors={}) if record.has_random_weights else encoder


def _default_settings(training: Finetuning) -> FinetuneSettings:
    epoch = math.ceil(training.num_examples / training.global_batch_size)
    eval_every = max(epoch, training.recipe.schedule.min_steps // _EVALUATIONS)
    return FinetuneSettings(log_every=10, eval_every=eval_every, save_every=_SAVE_EVERY, keep=1)


def announce(job: FinetuneJob) -> None:
    """Log a few lines about the run that is about to start."""
    recipe, record, schedule = job.recipe, job.record, job.training.schedule
    epochs = recipe.schedule.epochs
    if schedule.total_steps > job.training.steps_of_epochs:
        epochs = round(schedule.total_steps * recipe.global_batch_size / len(job.task.train))
    began = "random weights of the shape of " if record.has_random_weights else ""
    sets = ", ".join(f"{name} {len(inputs):,}" for name, inputs in (job.task.dev | job.task.test).items())
    what = (
        f"{job.task.name}, recipe {recipe.name}, seed {recipe.seed}: {began}{record.model}, "
        f"{record.parameters['encoder'] / 1e6:.2f} M parameters\n"
        f"data: {len(job.task.train):,} training inputs; {sets}; {job.examples}\n"
        f"{schedule.total_steps:,} steps of {recipe.global_batch_size} ({epochs:g} epoch{'' if epochs == 1 else 's'})"
    )
    prepare.announce(what, record.device, record.threads, job.plan, job.run)


def run_time(job: FinetuneJob, ranks: Ranks) -> RunTime | None:
    """Return the predicted duration of the run, or None for a GPU whose rates are not known."""
    train, encoder, batch = job.task.train, job.encoder, job.recipe.global_batch_size
    config = encoder.config.to_dict()
    table = int(config.get("vocab_size") or 0) * int(config.get("embedding_size") or encoder.hidden_size)
    return finetuning_time(
        max(0, job.record.parameters["encoder"] - table),
        encoder.num_layers,
        batch * float(train.lengths.mean()),
        job.plan,
        devices.device(ranks.launch),
        steps=job.stop_at,
        threads=job.record.threads,
    )


def say_end(job: FinetuneJob) -> None:
    """Log the scores of a finished run, and what can be done with it."""
    scores = json.loads((job.run.path / SCORES).read_text("utf8"))
    for name, of_set in scores["sets"].items():
        if of_set["metrics"]:
            baseline, unit = of_set.get("baseline", {}), of_set.get("unit", "rows")
            of = f"\n  baseline: {of_set['baseline_prediction']} for every {unit[:-1]}" if baseline else ""
            _log.info(f"{name}, {of_set['rows']:,} {unit}: {job.task.shown(of_set['metrics'], baseline)}{of}")
            if "warning" in of_set:
                _log.warning(of_set["warning"])
    _log.info(f"The run is in {job.run.path}: {SCORES}, predictions/, metrics.jsonl.")
    log_command(_log, "Several runs together:", f"{command('report')} RUN RUN …")
    if not job.record.settings.discard_weights:
        export = _how_to_export(job.run, job.recipe, job.encoder.config, type(job.task))
        log_command(_log, "As a transformers model:", export)


def _how_to_export(
    run: RunDirectory, recipe: FinetuneRecipe, config: PretrainedConfig, kind: type[FinetuneTask]
) -> str:
    without_head = kind.why_not_exportable(recipe, config) is not None
    return f"{command('export')} {run.path}{' --encoder-only' if without_head else ''}"
