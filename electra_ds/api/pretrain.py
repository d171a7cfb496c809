"""Pretrain a model: a run, from its options to its report."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from electra_ds.api.launch import RunFirst, RunStart, launch
from electra_ds.api.run import Run
from electra_ds.api.stores import find_store, open_or_build_store
from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.names import CPU_RECIPE, GPU_RECIPE
from electra_ds.config.options import PretrainOptions
from electra_ds.config.recipe import Recipe, RecipeSource, given_options, load_recipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.core import devices
from electra_ds.core.errors import ConfigError, InterruptedBySignalError
from electra_ds.core.launcher import detect
from electra_ds.core.program import command
from electra_ds.data.token_store import TokenStore
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.pretraining.objectives.base import Objective
from electra_ds.pretraining.prepare import (
    announce,
    check_clipping,
    description_of,
    plan_resume,
    plan_with_fitting_micro_batch,
    prepare_new,
    prepare_resume,
    say_finished,
    with_fitting_micro_batch,
)
from electra_ds.pretraining.pretrain import PretrainJob
from electra_ds.pretraining.pretrain import pretrain as train
from electra_ds.pretraining.run_time import RunTime
from electra_ds.training import prepare
from electra_ds.training.callbacks import Callback, Progress
from electra_ds.training.checkpoint import CheckpointFolder
from electra_ds.training.preemption import Preemption

if TYPE_CHECKING:
    from electra_ds.interop.init_from import InitialWeights

_log = logging.getLogger(__name__)
_OF_BOTH_RUNS = (
    "ds_config", "micro_batch", "threads", "log_every", "eval_every", "save_every", "keep", "eval_windows", "compile",
    "yes", "time_limit", "callback", "wandb", "wandb_project", "wandb_entity", "wandb_group", "tensorboard",
)  # fmt: skip
"""Options that the generator's run takes over from this run."""


def pretrain(
    recipe: RecipeSource | None = None,
    *,
    ds_config: str | Path | None = None,
    corpus: str | Path | Sequence[Any] | None = None,
    data: str | Path | None = None,
    run_dir: str | Path | None = None,
    resume: str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    seed: int | None = None,
    options: PretrainOptions | None = None,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    **more: Any,
) -> Run:
    """Pretrain with the recipe's objective, or resume a run, and return the run once it has ended or stopped.

    Under a launcher such as torchrun every rank must call it. One process may call it several times in a row.

    Args:
        recipe: a shipped name such as `tiny`, a path, a mapping that may say `extends: tiny`, or a `Recipe`.
            By default rc2020-small with a GPU and tiny without one.
        ds_config: a shipped DeepSpeed JSON such as `cpu`, or a path. By default the one for this hardware.
        corpus: text files or folders, `hub:NAME#CONFIG@SPLIT`, or a list of sources, each a list of these.
            By default the built-in corpus.
        data: a finished token store, instead of a corpus; with `resume`, the new location of the run's own store.
        run_dir: the directory of the new run. By default runs/RECIPE-TIME.
        resume: the directory of a run to resume, with its own recipe and data.
        overrides: changed values of the recipe by dotted key, `{"schedule.total_steps": 400}`.
        seed: the seed of weights, data order, masks, samples and dropout.
        options: the command's options; keyword arguments take precedence.
        callbacks: called while the run trains, to monitor, log or stop it (`electra_ds.Callback`).
        quiet: print nothing.
        more: any other field of `PretrainOptions`, such as `stop_at=100`, `save_every=50` or `init_from=[...]`.

    Raises:
        ConfigError: options, recipe or DeepSpeed JSON cannot be used; the message lists each problem.
        DataError: the text cannot be read, or there is too little of it.
        CheckpointError: the run cannot be resumed or written.
        TrainingError: training cannot continue.
        InterruptedBySignalError: a signal stopped the run, after a checkpoint was saved.

    Examples:
        >>> import electra_ds
        >>> run = electra_ds.pretrain("tiny", data="stores/small", overrides={"schedule.total_steps": 4}, quiet=True)
        >>> run.status
        'done'
    """
    named = {
        "recipe": recipe,
        "ds_config": ds_config,
        "corpus": corpus,
        "data": data,
        "run_dir": run_dir,
        "resume": resume,
        "overrides": overrides,
        "seed": seed,
    }
    start = PretrainStart(given_options(PretrainOptions, options, named | more))
    return launch(start, quiet=quiet, callbacks=callbacks)


class PretrainStart(RunStart[PretrainOptions]):
    """The start of a pretraining."""

    kind = "pretrain"
    recipe: Recipe
    plan: DeepSpeedPlan
    job: PretrainJob

    def __init__(self, options: PretrainOptions) -> None:
        super().__init__(options)
        if self.is_new:
            self.recipe = load_recipe(options.recipe or default_recipe(), options.recipe_overrides())
        self.first_recipe: Recipe | None = None
        """The recipe of the run that makes a new run's generator."""
        self.first_plan: DeepSpeedPlan | None = None
        """The plan of that run."""
        self.weights: InitialWeights | None = None
        self.vocab_size: int | None = None
        """The tokenizer's vocabulary size, once known."""

    def default_path(self) -> Path:
        return Path("runs") / f"{self.recipe.name}-{datetime.now():%Y%m%d-%H%M%S}"

    def say_finished(self) -> None:
        say_finished(self.run)

    def check(self) -> None:
        options, run, ranks = self.options, self.run, self.ranks
        with ranks.fail_together():
            if self.is_new:
                self.plan = prepare.plan_new(options, self.recipe, run, ranks)
                if not options.recipe:
                    self.plan = replace(self.plan, notes=(_of_default(self.recipe), *self.plan.notes))
            else:
                self.plan = plan_resume(options, run, ranks)
                self.recipe = run.read_recipe()
            check_clipping(self.recipe, self.plan)
            if self.is_new and not options.init_from:
                self.first_recipe = self.recipe.first_recipe()
            if self.first_recipe is not None:
                self.first_plan = prepare.plan_for(options, self.first_recipe, ranks)

    def show(self) -> None:
        run, ranks = self.run, self.ranks
        found: TokenStore | tuple[Path, int] | None = None
        with ranks.fail_together():
            if self.is_new:
                check = self._read_weights()
                found = find_store(self.options, self.recipe, self.show_progress, check)
        if not isinstance(found, tuple):
            self._prepare(found, self._shown_sources())
            announce(self._with_notes_on_weights())
            return
        path, self.vocab_size = found
        self.plan = plan_with_fitting_micro_batch(self.plan, self.recipe, self.vocab_size, self.options, ranks)
        sizes = Objective.of(self.recipe, self.vocab_size).parameter_counts()
        data = f"data: this would first build the token store {path}"
        device = devices.device_name(devices.device(ranks.launch))
        threads = devices.set_threads(self.options.threads, ranks.launch)
        what = description_of(self.recipe, sizes, data, self._shown_sources())
        prepare.announce(what, device, threads, self.plan, run)

    def run_time(self) -> RunTime | None:
        size = self.vocab_size or self.recipe.tokenizer.vocab_size
        device, threads = devices.device(self.ranks.launch), self.options.threads

        def time_of(recipe: Recipe, plan: DeepSpeedPlan, steps: int) -> RunTime | None:
            objective: Objective[Any] = Objective.of(recipe, size)
            return objective.run_time(plan, device, steps=steps, threads=threads)

        found = time_of(self.recipe, self.plan, self.stop_at)
        if self.first_recipe is None or self.first_plan is None or found is None:
            return found
        before = time_of(self.first_recipe, self.first_plan, self.first_recipe.schedule.total_steps)
        return None if before is None else before + found

    @property
    def stop_at(self) -> int:
        return prepare.stop_at(self.options, self.recipe)

    @property
    def num_steps(self) -> int:
        return self.stop_at + (0 if self.first_recipe is None else self.first_recipe.schedule.total_steps)

    def build(self) -> None:
        ranks, store = self.ranks, None
        with ranks.fail_together():
            if ranks.is_main and self.is_new:
                check = self._read_weights()
                store = open_or_build_store(self.options, self.recipe, self.show_progress, check)
        path = ranks.broadcast(store and store.path.resolve())
        sources = ranks.broadcast(self._sources())
        with ranks.fail_together():
            if store is None and self.is_new:
                store = TokenStore(path)
        self._prepare(store, sources)

    def train(self, preemption: Preemption, run_first: RunFirst) -> bool:
        if self._needs_a_run_first() and not self._run_first(run_first):
            return False
        with self.ranks.fail_together():
            if self.weights is not None:
                from electra_ds.interop.init_from import write_first_checkpoint

                write_first_checkpoint(self.job, self.weights.tensors(self.recipe, self.job.store.tokenizer))
                self.job = self._with_notes_on_weights()
                self.weights = None  # frees their memory
        announce(self.job)
        return train(self.job, self.ranks, preemption, self.callbacks)

    def say_end(self) -> None:
        from electra_ds.report.run_report import report_run

        _log.info(report_run(self.run))

    def _prepare(self, store: TokenStore | None, sources: Sequence[str]) -> None:
        """Create the job, with a micro-batch that fits. store, sources: a new run's store and sources of weights."""
        with self.ranks.fail_together():
            if store is None:
                self.job = prepare_resume(self.options, self.plan, self.run, self.ranks)
            else:
                self.job = prepare_new(self.options, self.recipe, self.plan, store, self.run, self.ranks, sources)
        self.job = with_fitting_micro_batch(self.job, self.options, self.ranks)
        self.plan, self.vocab_size = self.job.plan, self.job.store.tokenizer.vocab_size

    # --- the run that makes a generator

    def _needs_a_run_first(self) -> bool:
        """Return whether the generator has yet to be pretrained, or its pretraining to be resumed; all ranks get the
        same answer."""
        run, sources = self.run, [Path(each) for each in self.job.record.initialised_from]
        first = run.generator
        is_ours = sources == [first.path.resolve()] or (
            first.exists() and [each.name for each in sources] == [first.path.name]  # it was moved
        )
        has_begun = run.metrics.exists() or bool(CheckpointFolder(run.checkpoints, keep=1).paths())
        return self.ranks.broadcast(is_ours and not has_begun)

    def _run_first(self, run_first: RunFirst) -> bool:
        """Pretrain the generator and read its weights; return False if it was stopped before its end."""
        ranks, run, first = self.ranks, self.run, self.run.generator
        with ranks.fail_together():
            options = self._first_options()
            if ranks.is_main:
                run.clear_status()
        _log.info(f"Pretraining the generator first, in {first.path}.")
        try:
            run_first(PretrainStart(options), _RecordedWithGenerator(self.job))
        except InterruptedBySignalError:
            with ranks.fail_together():  # launchers kill the other ranks once one exits
                self._end_with(first)
            raise
        except Exception:
            self._end_with(first)
            raise
        is_done = ranks.broadcast(first.status() == "done")
        with ranks.fail_together():
            self._end_with(first)
            if is_done and ranks.is_main:
                self.weights = self._weights_of([str(first.path)])
        return is_done

    def _first_options(self) -> PretrainOptions:
        """Return the options of the generator's run; those in `_OF_BOTH_RUNS` are this run's."""
        ours = {name: getattr(self.options, name) for name in _OF_BOTH_RUNS}
        ours["data"] = self.job.store.path
        first, recipe = self.run.generator, self.first_recipe
        if first.exists():
            if recipe is not None and first.read_recipe() != recipe:
                raise ConfigError(f"{first.path} holds a generator of another recipe. Choose another --run-dir.")
            return PretrainOptions(resume=first.path, **ours)
        assert recipe is not None  # this run is recorded after the generator's
        return PretrainOptions(recipe=recipe.model_dump(), run_dir=first.path, **ours)

    def _end_with(self, first: RunDirectory) -> None:
        """Give this run the status of the generator's run if that has not reached its end."""
        status = first.status() if self.ranks.is_main else None
        if status in ("stopped", "failed") and self.run.exists():
            reason = f"the pretraining of the generator in {first.path} has {status}"
            self.run.write_status(status, step=0, reason=reason)
            if first.is_to_be_requeued():
                self.run.mark_requeue(reason)

    # --- the weights of init_from

    def _read_weights(self) -> Callable[[Tokenizer], None] | None:
        """Read the initial weights, whose tokenizer is the default one; return a function that checks a tokenizer."""
        if not self.options.init_from:
            required = self.recipe.required_weights
            if required is not None and self.first_recipe is None:
                other = f", or --set {self.recipe.instead_of_weights}" if self.recipe.instead_of_weights else ""
                raise ConfigError(
                    f"The objective {self.recipe.objective} needs a trained {required}: give a masked language model "
                    f"with --init-from, as a run, a folder, or a name on the Hub{other}."
                )
            return None
        self.weights = self._weights_of(self.options.init_from)
        if self.options.tokenizer is None and self.options.data is None:
            self.options = replace(self.options, tokenizer=self.weights.own_tokenizer())
        return self.weights.check_vocabulary

    def _weights_of(self, sources: Sequence[str]) -> InitialWeights:
        from electra_ds.interop.init_from import read_initial_weights

        return read_initial_weights(sources, self.recipe)

    def _sources(self) -> Sequence[str]:
        if self.weights is not None:
            return self.weights.names
        return () if self.first_recipe is None else [str(self.run.generator.path.resolve())]

    def _shown_sources(self) -> Sequence[str]:
        """Return the sources as a dry run shows them, which makes no generator."""
        first, sources = self.first_recipe, self._sources()
        if first is None:
            return sources
        return [f"{sources[0]}, pretrained first for {first.schedule.total_steps:,} steps with the recipe {first.name}"]

    def _with_notes_on_weights(self) -> PretrainJob:
        job = self.job
        if self.weights is None:
            return job
        notes = (*job.plan.notes, *self.weights.notes(job.recipe, job.store.tokenizer))
        return replace(job, plan=replace(job.plan, notes=notes))


class _RecordedWithGenerator(Callback):
    """Records a run once that of its generator is recorded, so that either can be resumed by the outer one's folder."""

    def __init__(self, job: PretrainJob) -> None:
        self._job = job

    def on_start(self, progress: Progress) -> None:
        if not self._job.run.exists():
            self._job.run.write_record(self._job.recipe, self._job.plan, self._job.record)


def default_recipe() -> str:
    """Return the name of this machine's default recipe."""
    return CPU_RECIPE if devices.device(detect(os.environ)).type == "cpu" else GPU_RECIPE


def _of_default(recipe: Recipe) -> str:
    has_gpu = "with a GPU" if recipe.name == GPU_RECIPE else "without a GPU"
    return f"{recipe.name} is the default recipe {has_gpu}; {command('recipes')} shows the others"
