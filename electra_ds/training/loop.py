"""The training loop of every run: starting and resuming, steps, evaluations, checkpoints, and stopping.

`train` makes a loop, starts it and runs it. What a kind of run adds is a subclass of `TrainingLoop`.
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.recipe import Section
from electra_ds.config.run_directory import RunDirectory, Status
from electra_ds.config.run_record import Record
from electra_ds.core import devices
from electra_ds.core.errors import (
    CheckpointError,
    ConfigError,
    FailedElsewhereError,
    InterruptedBySignalError,
    TrainingError,
)
from electra_ds.core.program import command
from electra_ds.core.ranks import Ranks, is_lost_connection
from electra_ds.core.terminal import NOTE, log_command, with_command
from electra_ds.training.callbacks import Callback, Callbacks, Metrics, Progress
from electra_ds.training.checkpoint import CheckpointFolder, open_checkpoint
from electra_ds.training.checkpoints import check_same_recipe
from electra_ds.training.engine import Engine
from electra_ds.training.preemption import Preemption, StopRequest
from electra_ds.training.saver import CheckpointSaver
from electra_ds.training.step import Builder, StepBatch, prefetched
from electra_ds.training.step_log import StepLog, Throughput, allowed_skips, finite_values
from electra_ds.training.tracking import RunLog

_log = logging.getLogger(__name__)
_Evaluated = TypeVar("_Evaluated")
# However rarely a run logs, its losses are read back and its gradients looked at this often.
_LOOK_EVERY = 100


class Job(Protocol):
    """Everything a run needs, checked before anything long starts."""

    command: ClassVar[str]
    """The command that resumes such a run."""

    @property
    def run(self) -> RunDirectory: ...

    @property
    def recipe(self) -> Section: ...

    @property
    def plan(self) -> DeepSpeedPlan: ...

    @property
    def record(self) -> Record: ...

    @property
    def total_steps(self) -> int:
        """The steps of the schedule."""

    @property
    def stop_at(self) -> int:
        """Step at which to save and leave; the schedule stays that of the recipe."""

    def record_files(self, plan: DeepSpeedPlan) -> dict[str, str]:
        """Return the files that travel in each checkpoint, which is all that it needs. plan: the one in use by now."""


def train(make_loop: Callable[[], TrainingLoop], job: Job, ranks: Ranks, time_limit_s: float | None = None) -> bool:
    """Train from the newest checkpoint, or from the start, to `job.stop_at`; False where the time limit came first.

    To be called by all ranks. Raises InterruptedBySignalError after a signal (a checkpoint is saved), TrainingError
    where gradients stay non-finite, CheckpointError if the disk is full. The main rank's caller holds the run's
    lock.
    """
    loop = None
    try:
        with Preemption(ranks, time_limit_s) as preemption, contextlib.ExitStack() as stack:
            loop = make_loop()
            stack.callback(loop.close)
            loop.start(stack)
            if ranks.is_main:
                # Only now, since a JSON that DeepSpeed cannot run must not take the place of the one that it could.
                job.run.write_record(job.recipe, job.plan, job.record)
                job.run.clear_status()
            return loop.run(preemption)
    except (InterruptedBySignalError, ConfigError, FailedElsewhereError):
        raise  # stopped as asked; refused, with the run as it was; reported by the rank that failed
    except Exception as error:
        if devices.is_out_of_memory(error):  # outside of a step
            error = TrainingError(
                f"Memory ran out outside of the steps, as in an evaluation: {str(error).splitlines()[0]} Close what "
                f"else uses it, or take a smaller --micro-batch, and resume: "
                f"{command(job.command)} --resume {job.run.path}"
            )
        with contextlib.suppress(CheckpointError):  # the disk may be full
            if not is_lost_connection(error):
                job.run.write_status("failed", reason=str(error) or repr(error))
            elif job.run.status() is None:
                job.run.write_status("failed", reason="a rank died without a word")
        raise error
    finally:
        if loop is not None:
            loop.end()


class TrainingLoop(ABC):
    """Trains from the newest checkpoint, or from the start. All ranks make it, start it and run it together."""

    def __init__(
        self, job: Job, ranks: Ranks, builder: Builder, throughput: Throughput, callbacks: Sequence[Callback] = ()
    ) -> None:
        """builder: of the batch of any step. callbacks: called on the main rank."""
        self.job, self.ranks = job, ranks
        self.builder, self.throughput = builder, throughput
        self.callbacks = Callbacks(callbacks, ranks)
        self.plan = job.plan
        """The job's, or with smaller micro-batches once memory has run out."""
        self.evaluation_rows = job.plan.batch.micro_batch_size
        """Examples that an evaluation takes at a time."""
        self.device = devices.device(ranks.launch)
        self.checkpoints = CheckpointFolder(job.run.checkpoints, job.record.settings.keep, self.keep_at)
        self.saver = CheckpointSaver(self.checkpoints, ranks)
        self.progress = Progress(job.run.path, 0, job.stop_at, job.total_steps)
        self.tokens = 0
        self.engine: Engine | None = None
        self.ends_early: Status | None = None
        """Set by an evaluation after which there is nothing more to train for: what the run has come to."""
        self._evaluated = 0
        """The last step of an evaluation, as far as this rank knows; the main rank does."""
        self._announced: Path | None = None
        """The last checkpoint that callbacks have heard of."""

    @property
    def step(self) -> int:
        """Optimiser steps that are done."""
        return self.progress.step

    # What a kind of run says of itself.

    @abstractmethod
    def make_engine(self) -> Engine:
        """Return an engine for `self.plan`, with the weights that training begins with."""

    @abstractmethod
    def evaluate(self) -> Mapping[str, float]:
        """Evaluate, log the outcome, and return it by name. To be called by all ranks, as all that follow."""

    @abstractmethod
    def shown(self, values: Metrics) -> str:
        """Return a step's losses in a few words."""

    @abstractmethod
    def check_fresh(self) -> None:
        """Raise CheckpointError if there is no checkpoint, but one must have been lost. Called on the main rank."""

    @property
    def keep_at(self) -> Collection[int]:
        """Steps whose checkpoints are kept for good."""
        return ()

    def about_the_end(self) -> dict[str, Any]:
        """Return what status.json says besides the status and the step."""
        return {}

    def finish(self) -> None:  # noqa: B027  # pretraining has nothing to do there
        """Do what is left after the last evaluation, before the run is done."""

    # Starting and resuming.

    def start(self, stack: contextlib.ExitStack) -> None:
        """Make the engine, resume from the newest checkpoint if there is one, and open the log.

        stack: closes the log with the error that ends the run.
        """
        with self.ranks.fail_together():
            self.engine = self._make_engine()
        self.record_files = self.job.record_files(self.plan)
        self._resume(self.engine)
        with self.ranks.fail_together():
            self.log = self._open_log(stack) if self.ranks.is_main else None
        self.steps = StepLog(
            self.ranks, self.device, self.throughput, self.log, self.progress, self.callbacks, self.shown
        )

    def _make_engine(self) -> Engine:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # what was tried before does not count
        return self.make_engine()

    def _open_log(self, stack: contextlib.ExitStack) -> RunLog:
        job = self.job
        config = {"recipe": job.recipe.model_dump(mode="json"), "deepspeed": job.plan.document}
        log = RunLog(job.run, job.record.tracking, config, self.step)
        stack.push(lambda kind, error, traceback: log.finish(error))
        stack.callback(self.close)  # before the log
        self._evaluated = log.evaluated
        if log.reached > self.step:
            _log.info("The %s steps after that are repeated.", f"{log.reached - self.step:,}")
        return log

    def _resume(self, engine: Engine) -> None:
        """Resume from the newest complete checkpoint, which all ranks verify together, each a share of its files."""
        with self.ranks.fail_together():
            path, damaged = self.checkpoints.latest_valid(self.ranks)
        with self.ranks.fail_together():
            if self.ranks.is_main:
                for problem in damaged.values():
                    _log.warning("%s Falling back to the one before.", problem)
                if path is None:
                    self.check_fresh()
                self.checkpoints.tidy(damaged)
        if path is None:
            return
        with self.ranks.fail_together():
            checkpoint = open_checkpoint(path)
            checkpoint.check(engine.optimizer.shapes(), engine.optimizer.trained())
            check_same_recipe(checkpoint, self.job.recipe, self.job.run)
            if checkpoint.state["step"] > self.job.stop_at:
                raise ConfigError(
                    f"The run is at step {checkpoint.state['step']} already, beyond --stop-at {self.job.stop_at}. "
                    f"Give a later step, or leave --stop-at out to train to the end."
                )
        engine.optimizer.load(checkpoint.tensors, checkpoint.state["optimizer"])
        self.progress.step, self.tokens = checkpoint.state["step"], checkpoint.state["tokens"]
        _log.info("Resuming from %s, step %d.", path, self.step)

    # Training.

    def run(self, preemption: Preemption) -> bool:
        """Train; return False if the time limit or a callback stopped it before `stop_at`."""
        job, settings = self.job, self.job.record.settings
        with self.ranks.fail_together():
            self.callbacks.call("on_start", self.progress)
        # A run that died between its early end and its status has nothing more to train for.
        stop_at = self.step if self.ends_early is not None else job.stop_at
        for step, batch in prefetched(self.builder, self.step, stop_at):
            result = self._train_step(batch, step)
            self.progress.step = step + 1
            self.tokens += batch.num_tokens
            self.throughput.count(batch)
            known = {"learning_rate": self._engine.learning_rate(step), "tokens_seen": float(self.tokens)}
            self.steps.add(self.step, result, known)
            if self.step % min(settings.log_every, _LOOK_EVERY) == 0 or self.step == job.stop_at:
                self._report()
            if self.step % settings.eval_every == 0 and self.step < job.stop_at:
                self._evaluate()
                if self.ends_early is not None:
                    break
            is_to_be_saved = self.step % settings.save_every == 0 or self.step in self.keep_at
            if is_to_be_saved and self.step < job.stop_at:
                with self.throughput.paused():
                    self._save()
            if self.progress.stop_reason is not None:
                preemption.ask(self.progress.stop_reason)
            request = preemption.decide(save_failed=self.saver.has_failed)
            if request is not None and self.step < job.stop_at:
                self._report()
                return self._stopped(request)
        self._save()
        if self.ranks.broadcast(self._evaluated) < self.step:  # it is not if a kill came after it
            self._evaluate()
        self._finish_saving()
        status: Status = self.ends_early or ("done" if self.step >= job.total_steps else "stopped")
        if status != "stopped":
            self.finish()
        if self.ranks.is_main:
            reason = {"reason": f"--stop-at {job.stop_at}"} if status == "stopped" else {}
            job.run.write_status(status, step=self.step, **reason, **self.about_the_end())
        return True

    @property
    def _engine(self) -> Engine:
        assert self.engine is not None  # `start` has made it
        return self.engine

    def _train_step(self, batch: StepBatch, step: int) -> dict[str, torch.Tensor]:
        """Take one optimiser step; if memory runs out, the same step in smaller micro-batches."""
        while True:
            try:
                return self._engine.train_step(batch, step)
            except RuntimeError as error:
                if not devices.is_out_of_memory(error):
                    raise
                smaller = self._smaller_plan(step, error)
            self._continue_with(smaller)  # outside of the handler, which holds on to the failed step's tensors

    def _smaller_plan(self, step: int, error: RuntimeError) -> DeepSpeedPlan:
        """Return the plan with half the micro-batch, or the next smaller one that divides the batch.

        Raises TrainingError if the step cannot be done again.
        """
        batch = self.plan.batch
        sizes = [cut.micro_batch_size for cut in batch.others() if 2 * cut.micro_batch_size <= batch.micro_batch_size]
        ran_out = f"Memory ran out in step {step + 1} with micro-batch {batch.micro_batch_size}"
        if not sizes:
            raise TrainingError(
                f"{ran_out}, and there is no smaller one. Close what else uses the memory, or add an "
                f"activation_checkpointing section to the DeepSpeed JSON. {self._how_to_resume('auto')}"
            ) from error
        if batch.world_size > 1 or not self._engine.optimizer.is_whole:
            why = "the other ranks wait in the middle of it" if batch.world_size > 1 else "its update had begun"
            raise TrainingError(
                f"{ran_out}, and the step cannot be done again, since {why}. {self._how_to_resume(sizes[0])}"
            ) from error
        return self.plan.with_micro_batch(sizes[0])

    def _continue_with(self, plan: DeepSpeedPlan) -> None:
        """Make the engine anew under another plan, as a checkpoint would, through the CPU's memory."""
        self.saver.close()  # whose copy would be a second one
        optimizer = self._engine.optimizer
        tensors, counters = optimizer.snapshot(), optimizer.counters()
        self._engine.close()
        del optimizer
        self.engine = None
        devices.release_memory(self.device)
        self.plan = plan
        self.record_files = self.job.record_files(plan)
        self.evaluation_rows = plan.batch.micro_batch_size
        try:
            self.engine = self._make_engine()
            self.engine.optimizer.load(tensors, counters)
        except RuntimeError:
            if not self.checkpoints.path(self.step).exists():  # nothing that was learned is lost
                self.checkpoints.save(tensors, self._state() | {"optimizer": counters}, self.record_files)
            raise
        if self.log is not None:
            cut = {"micro_batch_size": plan.batch.micro_batch_size}
            self.log.write(
                "plan", self.step, cut | {"gradient_accumulation_steps": plan.batch.gradient_accumulation_steps}
            )
        _log.log(
            NOTE,
            f"memory ran out in step {self.step + 1}, which is repeated; from here on micro-batch x accumulation = "
            f"{plan.batch}, and global batch and random numbers stay as they were",
        )
        try:
            self.job.run.write_record(self.job.recipe, plan, self.job.record)
        except CheckpointError as error:
            size = plan.batch.micro_batch_size
            _log.warning(f"{error} Give --micro-batch {size} when you resume this run.")

    def _report(self) -> None:
        """Read back the steps since the last call, write them down, and see whether training still moves."""
        optimizer = self._engine.optimizer
        summary, skips = self.steps.report(optimizer), int(optimizer.consecutive_skips.item())
        with self.ranks.fail_together():
            if summary is not None:
                self.callbacks.call("on_report", self.progress, summary)
            self._announce_checkpoint()
            if skips >= allowed_skips(self.plan.precision.loss_scaling):
                saved = self._saved()
                last = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"
                raise TrainingError(
                    f"The gradients have not been finite for {skips} steps (now at step {self.step}); the weights were "
                    f"left as they were, and {last}. Lower optimizer.learning_rate, or use bf16 or fp32 in place of "
                    f"fp16."
                )

    # Evaluating.

    def _evaluate(self) -> None:
        with self.throughput.paused():
            metrics = finite_values(self.in_memory(self.evaluate))
            with self.ranks.fail_together():
                if self.log is not None:
                    self.log.write("eval", self.step, metrics)
                self.callbacks.call("on_evaluate", self.progress, metrics)
        self._evaluated = self.step

    def in_memory(self, evaluate: Callable[[], _Evaluated]) -> _Evaluated:
        """Evaluate fewer rows at a time if memory runs out, on which no number depends."""
        while True:
            try:
                return evaluate()
            except RuntimeError as error:
                if not devices.is_out_of_memory(error) or self.ranks.world_size > 1:
                    raise
                if self.evaluation_rows == 1:
                    self._save()
                    self.saver.finish()
                    raise
            self.evaluation_rows //= 2
            devices.release_memory(self.device)

    # Saving and stopping.

    def _save(self) -> None:
        """Begin to save a checkpoint at the step that is done."""
        self._finish_saving()  # before the copy: two of them may not fit
        self.saver.save(self._engine.optimizer, self._state(), self.record_files)

    def _finish_saving(self) -> None:
        self.saver.finish()
        with self.ranks.fail_together():
            self._announce_checkpoint()

    def _announce_checkpoint(self) -> None:
        """Tell callbacks of a checkpoint that has become complete."""
        path = self.saver.published
        if path is not None and path != self._announced:
            self._announced = path
            self.callbacks.call("on_checkpoint", self.progress, path)

    def _saved(self) -> list[Path]:
        """Return the checkpoints there are, with the one that is being written."""
        self.saver.close()
        return self.checkpoints.paths()

    def _state(self) -> dict[str, object]:
        """Return what a checkpoint says besides what the optimizer does."""
        self.steps.read()  # what comes before a checkpoint must not be lost to a kill after it
        if self.log is not None:
            self.log.flush()
        return {"step": self.step, "tokens": self.tokens, "precision": self.job.plan.precision.name}

    def _how_to_resume(self, micro_batch: int | str) -> str:
        saved = self._saved()
        begin = f"From {saved[-1].name} on" if saved else "No checkpoint was saved yet, so from the start"
        return f"{begin}: {command(self.job.command)} --resume {self.job.run.path} --micro-batch {micro_batch}"

    def _stopped(self, request: StopRequest) -> bool:
        """Save and leave: return False, or raise InterruptedBySignalError after a signal."""
        run = self.job.run
        self._save()
        self._finish_saving()
        with self.ranks.fail_together():  # launchers end the others once the first has left, so all is written before
            if self.ranks.is_main:
                run.write_status("stopped", step=self.step, reason=request.reason)
                if request.is_to_be_resumed:
                    run.mark_requeue(request.reason)
        resume = f"{command(self.job.command)} --resume {run.path}"
        message = f"{request.reason}: saved {self.checkpoints.path(self.step)}. Resume it with:"
        if request.signum is not None:
            raise InterruptedBySignalError(with_command(message, resume), request.signum)
        log_command(_log, message, resume)
        return False

    def end(self) -> None:
        """Tell callbacks that training has ended, whatever ended it."""
        self.callbacks.call("on_end", self.progress, self.job.run.status() or "stopped")

    def close(self) -> None:
        """Wait for what is being written, and free the engine."""
        self.saver.close()
        if self.engine is not None:
            self.engine.close()
            self.engine = None
