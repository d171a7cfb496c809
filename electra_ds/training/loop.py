"""The training loop of every run: starting and resuming, steps, evaluations, checkpoints, and stopping.

`train` creates a loop, starts it and runs it. Each kind of run is a subclass of `TrainingLoop`.
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.run_directory import RunDirectory, Status
from electra_ds.config.run_record import Record
from electra_ds.config.sections import Section
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
from electra_ds.training.checkpoint import CheckpointFolder, CheckpointSaver, open_checkpoint
from electra_ds.training.checkpoints import check_same_recipe
from electra_ds.training.engine import Engine
from electra_ds.training.preemption import Preemption, StopRequest
from electra_ds.training.step import Builder, StepBatch, prefetched
from electra_ds.training.step_log import StepLog, Throughput, allowed_skips, finite_values
from electra_ds.training.tracking import RunLog

_log = logging.getLogger(__name__)
_Evaluated = TypeVar("_Evaluated")
# Read losses back and check gradients at least this often, however rarely a run logs.
_CHECK_EVERY = 100


class Job(Protocol):
    """Everything that a run needs, checked before anything slow starts."""

    command: ClassVar[str]
    """The command that resumes this kind of run."""

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
        """The number of steps in the schedule."""

    @property
    def stop_at(self) -> int:
        """The step at which to save and exit; it does not change the schedule."""

    def record_files(self, plan: DeepSpeedPlan) -> dict[str, str]:
        """Return the files to store in each checkpoint, so that it is self-contained. plan: the current one."""


def train(make_loop: Callable[[], TrainingLoop], job: Job, ranks: Ranks, preemption: Preemption) -> bool:
    """Train from the newest checkpoint, or from the start, to `job.stop_at`; return False if it stopped before that.

    All ranks must call it, and on the main rank the caller must hold the run's lock. preemption: already entered.

    Raises InterruptedBySignalError after a signal (a checkpoint is saved), TrainingError if gradients stay non-finite,
    and CheckpointError if the disk is full.
    """
    loop = None
    try:
        with contextlib.ExitStack() as stack:
            loop = make_loop()
            stack.callback(loop.close)
            loop.start(stack)
            if ranks.is_main:
                # Not earlier: a JSON that DeepSpeed cannot run must not replace the one that worked.
                job.run.write_record(job.recipe, job.plan, job.record)
                job.run.clear_status()
            return loop.run(preemption)
    except (InterruptedBySignalError, ConfigError, FailedElsewhereError):
        raise  # stopped on request; rejected, with the run unchanged; reported by the rank that failed
    except Exception as error:
        if devices.is_out_of_memory(error):  # outside a step
            error = TrainingError(
                f"Memory ran out outside the steps, for example in an evaluation: {str(error).splitlines()[0]} Close "
                f"other programs that use it, or choose a smaller --micro-batch, and resume: "
                f"{command(job.command)} --resume {job.run.path}"
            )
        with contextlib.suppress(CheckpointError):  # the disk may be full
            if not is_lost_connection(error):
                job.run.write_status("failed", reason=str(error) or repr(error))
            elif job.run.status() is None:
                job.run.write_status("failed", reason="a rank died without an error message")
        raise error
    finally:
        if loop is not None:
            loop.end()


class TrainingLoop(ABC):
    """Trains from the newest checkpoint, or from the start. All ranks create, start and run it together."""

    def __init__(
        self, job: Job, ranks: Ranks, builder: Builder, throughput: Throughput, callbacks: Sequence[Callback] = ()
    ) -> None:
        """builder: builds the batch of any step. callbacks: called on the main rank."""
        self.job, self.ranks = job, ranks
        self.builder, self.throughput = builder, throughput
        self.callbacks = Callbacks(callbacks, ranks)
        self.plan = job.plan
        """The job's plan, or one with smaller micro-batches after memory ran out."""
        self.evaluation_rows = job.plan.batch.micro_batch_size
        """The number of examples that an evaluation processes at a time."""
        self.device = devices.device(ranks.launch)
        self.checkpoints = CheckpointFolder(job.run.checkpoints, job.record.settings.keep, self.keep_at)
        self.progress = Progress(job.run.path, 0, job.stop_at, job.total_steps)
        self.saver = CheckpointSaver(
            self.checkpoints, ranks, lambda path: self.callbacks.call("on_checkpoint", self.progress, path)
        )
        self.tokens = 0
        self.engine: Engine | None = None
        self.early_status: Status | None = None
        """The run's final status, set by an evaluation that decides to end the run early."""
        self._evaluated = 0
        """The step of the last evaluation; only the main rank knows it after a resume."""

    @property
    def step(self) -> int:
        """The number of completed optimizer steps."""
        return self.progress.step

    # What a subclass defines.

    @abstractmethod
    def make_engine(self) -> Engine:
        """Return an engine for `self.plan`, with the initial weights."""

    @abstractmethod
    def evaluate(self) -> Mapping[str, float]:
        """Evaluate, log the metrics and return them by name. All ranks must call it, and the methods below."""

    @abstractmethod
    def shown(self, values: Metrics) -> str:
        """Return a short text with a step's losses."""

    @abstractmethod
    def check_fresh(self) -> None:
        """Raise CheckpointError if a checkpoint must have been lost. Called on the main rank if none is found."""

    @property
    def keep_at(self) -> Collection[int]:
        """The steps whose checkpoints are always retained."""
        return ()

    def final_status_details(self) -> dict[str, Any]:
        """Return further entries for status.json, next to the status and the step."""
        return {}

    def finish(self) -> None:  # noqa: B027  # pretraining has nothing to do here
        """Do the remaining work after the last evaluation, before the run is done."""

    # Starting and resuming.

    def start(self, stack: contextlib.ExitStack) -> None:
        """Create the engine, resume from the newest checkpoint if there is one, and open the log.

        stack: closes the log, passing it the error that ends the run.
        """
        with self.ranks.fail_together():
            self.engine = self._make_engine()
        self.record_files = self.job.record_files(self.plan)
        self.progress.step, self.tokens = _resume(self.engine, self.checkpoints, self.job, self.ranks, self.check_fresh)
        with self.ranks.fail_together():
            self.log = self._open_log(stack) if self.ranks.is_main else None
        self.steps = StepLog(
            self.ranks, self.device, self.throughput, self.log, self.progress, self.callbacks, self.shown
        )

    def _make_engine(self) -> Engine:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # leave out earlier trials of micro-batch sizes
        return self.make_engine()

    def _open_log(self, stack: contextlib.ExitStack) -> RunLog:
        job = self.job
        config = {"recipe": job.recipe.model_dump(mode="json"), "deepspeed": job.plan.document}
        log = RunLog(job.run, job.record.tracking, config, self.step)
        stack.push(lambda kind, error, traceback: log.finish(error))
        stack.callback(self.close)  # before the log
        self._evaluated = log.evaluated
        if log.reached > self.step:
            _log.info("Repeating the %s steps after that.", f"{log.reached - self.step:,}")
        return log

    # Training.

    def run(self, preemption: Preemption) -> bool:
        """Train; return False if the time limit or a callback stopped it before `stop_at`."""
        job, settings = self.job, self.job.record.settings
        with self.ranks.fail_together():
            self.callbacks.call("on_start", self.progress)
        # A run that died after deciding to end early, but before writing its status, does not train any further.
        stop_at = self.step if self.early_status is not None else job.stop_at
        for step, batch in prefetched(self.builder, self.step, stop_at):
            result = self._train_step(batch, step)
            self.progress.step = step + 1
            self.tokens += batch.num_tokens
            self.throughput.count(batch)
            known = {"learning_rate": self._engine.learning_rate(step), "tokens_seen": float(self.tokens)}
            self.steps.add(self.step, result, known)
            if self.step % min(settings.log_every, _CHECK_EVERY) == 0 or self.step == job.stop_at:
                self._report()
            if self.step % settings.eval_every == 0 and self.step < job.stop_at:
                self._evaluate()
                if self.early_status is not None:
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
        if self.ranks.broadcast(self._evaluated) < self.step:  # false if a killed run had already evaluated
            self._evaluate()
        self.saver.finish()
        status: Status = self.early_status or ("done" if self.step >= job.total_steps else "stopped")
        if status != "stopped":
            self.finish()
        if self.ranks.is_main:
            reason = {"reason": f"--stop-at {job.stop_at}"} if status == "stopped" else {}
            job.run.write_status(status, step=self.step, **reason, **self.final_status_details())
        return True

    @property
    def _engine(self) -> Engine:
        assert self.engine is not None  # `start` has created it
        return self.engine

    def _train_step(self, batch: StepBatch, step: int) -> dict[str, torch.Tensor]:
        """Take one optimizer step; if memory runs out, repeat it with smaller micro-batches."""
        while True:
            try:
                return self._engine.train_step(batch, step)
            except RuntimeError as error:
                if not devices.is_out_of_memory(error):
                    raise
                can_repeat = self._engine.optimizer.can_repeat_step
                smaller = _smaller_plan(self.plan, can_repeat, step, self._how_to_resume, error)
            self._continue_with(smaller)  # outside the handler, which keeps the failed step's tensors alive

    def _continue_with(self, plan: DeepSpeedPlan) -> None:
        """Recreate the engine with another plan, passing its state through CPU memory, as with a checkpoint."""
        self.saver.close()  # its copy and the one below might not fit together
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
            if not self.checkpoints.path(self.step).exists():  # keep what was learned
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
            f"{plan.batch}; global batch and random numbers stay the same",
        )
        try:
            self.job.run.write_record(self.job.recipe, plan, self.job.record)
        except CheckpointError as error:
            size = plan.batch.micro_batch_size
            _log.warning(f"{error} Give --micro-batch {size} when you resume this run.")

    def _report(self) -> None:
        """Read back the steps since the last call, log them, and check that gradients are still finite."""
        optimizer = self._engine.optimizer
        summary, skips = self.steps.report(optimizer), int(optimizer.consecutive_skips.item())
        with self.ranks.fail_together():
            if summary is not None:
                self.callbacks.call("on_report", self.progress, summary)
            self.saver.announce()
            if skips >= allowed_skips(self.plan.precision.loss_scaling):
                saved = self.saver.saved()
                last = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"
                raise TrainingError(
                    f"The gradients have not been finite for {skips} steps (now at step {self.step}); the weights are "
                    f"unchanged since then, and {last}. Lower optimizer.learning_rate, or use bf16 or fp32 instead of "
                    f"fp16."
                )

    # Evaluating.

    def _evaluate(self) -> None:
        with self.throughput.paused():
            metrics = finite_values(self.with_fewer_rows(self.evaluate))
            with self.ranks.fail_together():
                if self.log is not None:
                    self.log.write("eval", self.step, metrics)
                self.callbacks.call("on_evaluate", self.progress, metrics)
        self._evaluated = self.step

    def with_fewer_rows(self, evaluate: Callable[[], _Evaluated]) -> _Evaluated:
        """Evaluate, with fewer rows at a time if memory runs out, which does not change the result."""
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
        """Start saving a checkpoint of the current step."""
        self.saver.save(self._engine.optimizer, self._state(), self.record_files)

    def _state(self) -> dict[str, object]:
        """Return the contents of state.json, except for the optimizer's counters."""
        self.steps.read()  # a kill after the checkpoint must not lose the steps before it
        if self.log is not None:
            self.log.flush()
        return {"step": self.step, "tokens": self.tokens, "precision": self.job.plan.precision.name}

    def _how_to_resume(self, micro_batch: int | str) -> str:
        saved = self.saver.saved()
        begin = f"Resume from {saved[-1].name}" if saved else "No checkpoint was saved yet, so start again"
        return f"{begin}: {command(self.job.command)} --resume {self.job.run.resumed} --micro-batch {micro_batch}"

    def _stopped(self, request: StopRequest) -> bool:
        """Save and stop: return False, or raise InterruptedBySignalError after a signal."""
        run = self.job.run
        self._save()
        self.saver.finish()
        with self.ranks.fail_together():  # launchers kill the other ranks once one exits, so write everything first
            if self.ranks.is_main:
                run.write_status("stopped", step=self.step, reason=request.reason)
                if request.is_to_be_resumed:
                    run.mark_requeue(request.reason)
        resume = f"{command(self.job.command)} --resume {run.resumed}"
        message = f"{request.reason}: saved {self.checkpoints.path(self.step)}. Resume it with:"
        if request.signum is not None:
            raise InterruptedBySignalError(with_command(message, resume), request.signum)
        log_command(_log, message, resume)
        return False

    def end(self) -> None:
        """Call the callbacks at the end of training, whatever ended it."""
        self.callbacks.call("on_end", self.progress, self.job.run.status() or "stopped")

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and free the engine."""
        self.saver.close()
        if self.engine is not None:
            self.engine.close()
            self.engine = None


def _resume(
    engine: Engine, folder: CheckpointFolder, job: Job, ranks: Ranks, check_fresh: Callable[[], None]
) -> tuple[int, int]:
    """Load the newest complete checkpoint into the engine; return its step and tokens seen, 0 and 0 without one.

    Each rank verifies a share of the files. Damaged checkpoints are set aside.
    """
    with ranks.fail_together():
        path, damaged = folder.latest_valid(ranks)
    with ranks.fail_together():
        if ranks.is_main:
            for problem in damaged.values():
                _log.warning("%s Falling back to the checkpoint before it.", problem)
            if path is None:
                check_fresh()
            folder.tidy(damaged)
    if path is None:
        return 0, 0
    with ranks.fail_together():
        checkpoint = open_checkpoint(path)
        checkpoint.check(engine.optimizer.shapes(), engine.optimizer.trained())
        check_same_recipe(checkpoint, job.recipe, job.run)
        step, tokens = checkpoint.state["step"], checkpoint.state["tokens"]
        if step > job.stop_at:
            raise ConfigError(
                f"The run is already at step {step}, beyond --stop-at {job.stop_at}. Give a later step, or leave out "
                f"--stop-at to train to the end."
            )
    engine.optimizer.load(checkpoint.tensors, checkpoint.state["optimizer"])
    if step > 0:  # the checkpoint of step 0 has the weights that the run was given
        _log.info("Resuming from %s, step %d.", path, step)
    return step, tokens


def _smaller_plan(
    plan: DeepSpeedPlan, can_repeat: bool, step: int, how_to_resume: Callable[[int | str], str], error: RuntimeError
) -> DeepSpeedPlan:
    """Return the plan with at most half the micro-batch. Raises TrainingError if the step cannot be repeated."""
    batch, smaller = plan.batch, plan.with_smaller_micro_batch()
    ran_out = f"Memory ran out in step {step + 1} with micro-batch {batch.micro_batch_size}"
    if smaller is None:
        raise TrainingError(
            f"{ran_out}, and there is no smaller one. Close other programs that use the memory, or add an "
            f"activation_checkpointing section to the DeepSpeed JSON. {how_to_resume('auto')}"
        ) from error
    if batch.world_size > 1 or not can_repeat:
        why = "other ranks are in the middle of it" if batch.world_size > 1 else "its update had already begun"
        resume = how_to_resume(smaller.batch.micro_batch_size)
        raise TrainingError(f"{ran_out}, and the step cannot be repeated, since {why}. {resume}") from error
    return smaller
