"""Finetune an encoder on a task: a run, from its options to its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from electra_ds.api.launch import RunFirst, RunStart, launch
from electra_ds.api.run import Run
from electra_ds.config.finetune_recipe import FinetuneRecipe, Finetuning, load_finetune_recipe
from electra_ds.config.options import FinetuneOptions
from electra_ds.config.recipe import RecipeSource, given_options
from electra_ds.finetuning.encoder_source import EncoderSource, read_encoder
from electra_ds.finetuning.finetune import FinetuneJob, discard_weights
from electra_ds.finetuning.finetune import finetune as train
from electra_ds.finetuning.load_task import LoadedTask, load_task
from electra_ds.finetuning.prepare import (
    announce,
    check_same_examples,
    is_finished,
    prepare_new,
    prepare_resume,
    run_time,
    say_end,
    say_finished,
)
from electra_ds.finetuning.tasks.find import task_class
from electra_ds.pretraining.run_time import RunTime
from electra_ds.training import prepare
from electra_ds.training.callbacks import Callback
from electra_ds.training.preemption import Preemption


def finetune(
    model: str | Path | Run | None = None,
    task: str | None = None,
    *,
    recipe: RecipeSource | None = None,
    ds_config: str | Path | None = None,
    data_dir: str | Path | None = None,
    train: str | Path | None = None,
    dev: str | Path | None = None,
    run_dir: str | Path | None = None,
    resume: str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    seed: int | None = None,
    options: FinetuneOptions | None = None,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    **more: Any,
) -> Run:
    """Finetune an encoder on a task, or resume a finetuning, and return the run, whose results are in `scores`.

    Args:
        model: a `Run` or its directory, a transformers folder, or a name on the Hub.
        task: a task of GLUE or SQuAD such as `mrpc`, or a kind of task such as `token-classification` for your own
            examples. Without one, `train` and `dev` are a classification or a regression.
        recipe: a shipped name such as `rc2020`, a path, a mapping, or a `FinetuneRecipe`. The default is `rc2020` for
            GLUE and SQuAD, and `own` otherwise.
        ds_config: a shipped DeepSpeed JSON such as `cpu`, or a path. By default the one for this hardware.
        data_dir: the folder with the task's official files. By default they come from the Hub.
        train: your own training examples: CSV, TSV or JSON lines.
        dev: your own examples to evaluate on.
        run_dir: the directory of the new run. By default runs/TASK-RECIPE-sSEED-TIME.
        resume: the directory of a run to resume.
        overrides: changed values of the recipe by dotted key, `{"schedule.epochs": 5}`.
        seed: the seed of the head, the order of the examples and dropout.
        options: the command's options; keyword arguments take precedence.
        callbacks: called while the run trains, to monitor, log or stop it (`electra_ds.Callback`).
        quiet: print nothing.
        more: any other field of `FinetuneOptions`, such as `label="stars"`, `best=True` or `predict_test=True`.

    Raises:
        ConfigError: options, recipe, task and model do not fit together; the message lists each problem.
        DataError: the examples or the model cannot be read.
        CheckpointError: the run cannot be resumed or written.
        TrainingError: training cannot continue.
        InterruptedBySignalError: a signal stopped the run, after a checkpoint was saved.

    Examples:
        >>> import electra_ds
        >>> tuned = electra_ds.finetune(
        ...     "runs/mine", train="train.csv", dev="dev.csv", seed=3, quiet=True,
        ...     overrides={"schedule.min_steps": 4, "data.max_length": 32},
        ... )
        >>> list(tuned.scores["sets"])
        ['dev']
    """
    named = {
        "model": model.path if isinstance(model, Run) else model,
        "task": task,
        "recipe": recipe,
        "ds_config": ds_config,
        "data_dir": data_dir,
        "train": train,
        "dev": dev,
        "run_dir": run_dir,
        "resume": resume,
        "overrides": overrides,
        "seed": seed,
    }
    start = FinetuneStart(given_options(FinetuneOptions, options, named | more))
    return launch(start, quiet=quiet, callbacks=callbacks)


class FinetuneStart(RunStart[FinetuneOptions]):
    """The start of a finetuning."""

    kind = "finetune"
    recipe: FinetuneRecipe
    job: FinetuneJob

    def __init__(self, options: FinetuneOptions) -> None:
        if options.test is not None:
            options = replace(options, predict_test=True)
        options.check()
        super().__init__(options)
        if self.is_new:
            source = options.recipe_or_default()
            self.recipe = load_finetune_recipe(source, options.task or "", options.recipe_overrides())

    def default_path(self) -> Path:
        options = self.options
        assert options.task is not None or options.train is not None
        names = [str(options.task).rpartition(":")[2]] if options.task is not None else []
        task = "-".join([*names, *([Path(str(options.train)).stem] if options.train is not None else [])])
        return Path("runs") / f"{task}-{self.recipe.name}-s{self.recipe.seed}-{datetime.now():%Y%m%d-%H%M%S}"

    def is_finished(self) -> bool:
        return is_finished(self.options, self.run, self.ranks)

    def say_finished(self) -> None:
        say_finished(self.run)

    def check(self) -> None:
        if self.is_new:
            data, encoder = self._read_in_turns()
        with self.ranks.fail_together():
            self.job = (
                prepare_new(self.options, self.recipe, data, encoder, self.run, self.ranks, self.show_progress)
                if self.is_new
                else prepare_resume(self.options, self.run, self.ranks, self.show_progress)
            )
        check_same_examples(self.job, self.ranks)

    def _read_in_turns(self) -> tuple[LoadedTask, EncoderSource]:
        """Read the task and the encoder, on the main rank first, so that the others find what it downloads."""
        for is_turn in (self.ranks.is_main, not self.ranks.is_main):
            with self.ranks.fail_together():
                if is_turn:
                    read = self._read()
        return read

    def _read(self) -> tuple[LoadedTask, EncoderSource]:
        self.run.check_free()
        data, encoder = load_task(self.options.task, self.options.source()), read_encoder(str(self.options.model))
        count = task_class(self.options.task).training_inputs(data, self.recipe, self.options.max_train_examples)
        if count is not None:  # a JSON that cannot be used is refused before tokenising begins
            prepare.plan_for(self.options, Finetuning(self.recipe, count, encoder.num_layers), self.ranks)
        return data, encoder

    def show(self) -> None:
        announce(self.job)

    def run_time(self) -> RunTime | None:
        return run_time(self.job, self.ranks)

    @property
    def stop_at(self) -> int:
        return self.job.stop_at

    def train(self, preemption: Preemption, run_first: RunFirst) -> bool:
        announce(self.job)
        return train(self.job, self.ranks, preemption, self.callbacks)

    def say_end(self) -> None:
        if self.run.status() == "done":
            say_end(self.job)
            if self.job.record.settings.discard_weights:
                discard_weights(self.run)
