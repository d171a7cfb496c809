"""The training loop of every run: steps, reports, checkpoints, what memory allows, and resuming at any step."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from rich.console import Console

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
from electra_ds.core.terminal import note, say, say_command, warn, with_command
from electra_ds.training.checkpoint import CheckpointFolder, open_checkpoint
from electra_ds.training.engine import Engine
from electra_ds.training.preemption import Preemption, StopRequest
from electra_ds.training.prefetch import Builder, prefetched
from electra_ds.training.recorded import check_same_recipe
from electra_ds.training.saver import CheckpointSaver
from electra_ds.training.step import StepBatch
from electra_ds.training.throughput import Throughput
from electra_ds.training.trackers import RunLog, open_trackers
from electra_ds.training.tracking import MetricsFile, TrainingDisplay

_Evaluated = TypeVar("_Evaluated")
# Steps in a row without a finite gradient, beyond those that a loss scale may need to come down.
_HOPELESS_SKIPS = 20
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
        """Of the schedule."""

    @property
    def stop_at(self) -> int:
        """Step at which to save and leave; the schedule stays that of the recipe."""

    def record_files(self, plan: DeepSpeedPlan) -> dict[str, str]:
        """What travels in each checkpoint, whose run has this plan by now: whoever has one needs nothing else."""


def train(make_loop: Callable[[], TrainingLoop], job: Job, ranks: Ranks, time_limit_s: float | None = None) -> bool:
    """Train from the newest checkpoint, or from the start, to `job.stop_at`; False where the time limit came first.

    To be called by all ranks. Raises InterruptedBySignalError after a signal (a checkpoint is saved), TrainingError
    where gradients stay non-finite, CheckpointError if the disk is full. The main rank's caller holds the run's
    lock.
    """
    with Preemption(ranks, time_limit_s) as preemption, contextlib.ExitStack() as stack:
        try:
            loop = make_loop()
            if loop.log is not None:
                stack.push(loop.log.finish)
            stack.callback(loop.close)
            if ranks.is_main:
                # Only now, since a JSON that DeepSpeed cannot run must not take the place of the one that it could.
                job.run.write_record(job.recipe, job.plan, job.record)
                job.run.clear_status()
            return loop.run(preemption)
        except (InterruptedBySignalError, ConfigError, FailedElsewhereError):
            raise  # stopped as asked; refused, with the run as it was; told by the rank that failed
        except Exception as error:
            if devices.is_out_of_memory(error):  # outside of a step
                error = TrainingError(
                    f"Memory ran out beside the steps, as in an evaluation: {str(error).splitlines()[0]} Close what "
                    f"else uses it, or take a smaller --micro-batch, and resume: "
                    f"{command(job.command)} --resume {job.run.path}"
                )
            with contextlib.suppress(CheckpointError):  # the disk may be full
                if not is_lost_connection(error):
                    job.run.write_status("failed", reason=str(error) or repr(error))
                elif job.run.status() is None:
                    job.run.write_status("failed", reason="a rank died without a word")
            raise error


class TrainingLoop(ABC):
    """Trains from the newest checkpoint, or from the start. All ranks make it and run it together."""

    def __init__(self, job: Job, ranks: Ranks, console: Console, builder: Builder, throughput: Throughput) -> None:
        """builder: of the batch of any step."""
        self.job, self.ranks, self.console = job, ranks, console
        self.builder, self.throughput = builder, throughput
        self.plan = job.plan
        """The job's, or with smaller micro-batches once memory has run out."""
        self.evaluation_rows = job.plan.batch.micro_batch_size
        """Examples that an evaluation takes at a time."""
        with ranks.together():
            self.device = devices.device(ranks.launch)
            self.engine = self._make_engine()
        self.record_files = job.record_files(self.plan)
        self.checkpoints = CheckpointFolder(job.run.checkpoints, job.record.settings.keep, self.keep_at)
        self.saver = CheckpointSaver(self.checkpoints, ranks)
        self.step = self.tokens = 0
        self._resume()
        self._evaluated = 0
        """The last step of an evaluation, as far as this rank knows; the main rank does."""
        self.ends_early: Status | None = None
        """Set by an evaluation after which there is nothing more to train for: what the run has come to."""
        with ranks.together():
            self.log = self._open_log() if ranks.is_main else None
        self._unread: deque[tuple[int, dict[str, torch.Tensor], dict[str, float]]] = deque()

    @abstractmethod
    def make_engine(self) -> Engine:
        """For `self.plan`, with the weights that training begins with."""

    def _make_engine(self) -> Engine:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # what was tried before does not count
        return self.make_engine()

    @abstractmethod
    def evaluate(self, display: TrainingDisplay) -> Mapping[str, float]:
        """Evaluate, say the outcome, and return it by name. To be called by all ranks, as all that follow."""

    @abstractmethod
    def shown(self, values: Mapping[str, float | None]) -> str:
        """A step's losses, for the progress bar."""

    @abstractmethod
    def check_fresh(self) -> None:
        """On the main rank, where there is no checkpoint. Raises CheckpointError if one must have been lost."""

    @property
    def keep_at(self) -> Collection[int]:
        """Steps whose checkpoints are kept for good."""
        return ()

    def about_the_end(self) -> dict[str, Any]:
        """What status.json says beside the status and the step."""
        return {}

    def finish(self) -> None:  # noqa: B027  # pretraining has nothing to do there
        """What is done after the last evaluation, before the run is said to be done."""

    def _open_log(self) -> RunLog:
        job = self.job
        config = {"recipe": job.recipe.model_dump(mode="json"), "deepspeed": job.plan.document}
        metrics = MetricsFile(job.run.metrics, self.step)
        self._evaluated = metrics.evaluated
        if metrics.reached > self.step:
            again = metrics.reached - self.step
            say(self.console, f"The {again:,} steps after that are repeated.")
        return RunLog(
            metrics, open_trackers(job.record.tracking, job.run, config, self.step, metrics.reached, self.console)
        )

    def _resume(self) -> None:
        """Resume from the newest complete checkpoint, which all ranks verify together, each a share of its files."""
        with self.ranks.together():
            path, damaged = self.checkpoints.latest_valid(self.ranks)
        with self.ranks.together():
            if self.ranks.is_main:
                for problem in damaged.values():
                    warn(self.console, f"{problem} Falling back to the one before.")
                if path is None:
                    self.check_fresh()
                self.checkpoints.tidy(damaged)
        if path is None:
            return
        with self.ranks.together():
            checkpoint = open_checkpoint(path)
            checkpoint.check(self.engine.optimizer.shapes(), self.engine.optimizer.trained())
            check_same_recipe(checkpoint, self.job.recipe, self.job.run)
            if checkpoint.state["step"] > self.job.stop_at:
                raise ConfigError(
                    f"The run is at step {checkpoint.state['step']} already, beyond --stop-at {self.job.stop_at}. "
                    f"Give a later step, or leave --stop-at out to train to the end."
                )
        self.engine.optimizer.load(checkpoint.tensors, checkpoint.state["optimizer"])
        self.step, self.tokens = checkpoint.state["step"], checkpoint.state["tokens"]
        say(self.console, f"Resuming from {path}, step {self.step}.")

    def run(self, preemption: Preemption) -> bool:
        """Train; False where the time limit came before `stop_at`."""
        job, settings = self.job, self.job.record.settings
        with TrainingDisplay(self.console, job.stop_at, self.step) as display:
            # A run that died between its early end and its status has nothing more to train for.
            stop_at = self.step if self.ends_early is not None else job.stop_at
            for step, batch in prefetched(self.builder, self.step, stop_at):
                result = self._train_step(batch, step)
                self.step = step + 1
                self.tokens += batch.num_tokens
                self.throughput.count(batch)
                known = {"learning_rate": self.engine.learning_rate(step), "tokens_seen": float(self.tokens)}
                self._unread.append((self.step, result, known))
                if self.step % min(settings.log_every, _LOOK_EVERY) == 0 or self.step == job.stop_at:
                    self._log(display)
                if self.step % settings.eval_every == 0 and self.step < job.stop_at:
                    self._evaluate(display)
                    if self.ends_early is not None:
                        break
                if self._is_to_be_saved() and self.step < job.stop_at:
                    with self.throughput.paused():
                        self._save()
                request = preemption.decide(save_failed=self.saver.has_failed)
                if request is not None and self.step < job.stop_at:
                    self._log(display)
                    return self._stopped(request)
            self._save()
            if self.ranks.broadcast(self._evaluated) < self.step:  # it is not where a kill came after it
                self._evaluate(display)
        self.saver.finish()
        status: Status = self.ends_early or ("done" if self.step >= job.total_steps else "stopped")
        if status != "stopped":
            self.finish()
        if self.ranks.is_main:
            reason = {"reason": f"--stop-at {job.stop_at}"} if status == "stopped" else {}
            job.run.write_status(status, step=self.step, **reason, **self.about_the_end())
        return True

    def _is_to_be_saved(self) -> bool:
        return self.step % self.job.record.settings.save_every == 0 or self.step in self.keep_at

    def _train_step(self, batch: StepBatch, step: int) -> dict[str, torch.Tensor]:
        """One optimiser step; where memory runs out, the same step in smaller micro-batches."""
        while True:
            try:
                return self.engine.train_step(batch, step)
            except RuntimeError as error:
                if not devices.is_out_of_memory(error):
                    raise
                smaller = self._smaller_plan(step, error)
            self._continue_with(smaller)  # outside of the handler, which holds on to the failed step's tensors

    def _smaller_plan(self, step: int, error: RuntimeError) -> DeepSpeedPlan:
        """Return the plan with half the micro-batch, or the next smaller one that divides the batch. Raises
        TrainingError if the step cannot be done again."""
        batch = self.plan.batch
        sizes = [cut.micro_batch_size for cut in batch.others() if 2 * cut.micro_batch_size <= batch.micro_batch_size]
        ran_out = f"Memory ran out in step {step + 1} with micro-batch {batch.micro_batch_size}"
        if not sizes:
            raise TrainingError(
                f"{ran_out}, and there is no smaller one. Close what else uses the memory, or add an "
                f"activation_checkpointing section to the DeepSpeed JSON. {self._how_to_resume(' --micro-batch auto')}"
            ) from error
        if batch.world_size > 1 or not self.engine.optimizer.is_whole:
            why = "the other ranks wait in the middle of it" if batch.world_size > 1 else "its update had begun"
            raise TrainingError(
                f"{ran_out}, and the step cannot be done again, since {why}. "
                f"{self._how_to_resume(f' --micro-batch {sizes[0]}')}"
            ) from error
        return self.plan.with_micro_batch(sizes[0])

    def _how_to_resume(self, arguments: str = "") -> str:
        saved = self._saved()
        begin = f"From {saved[-1].name} on" if saved else "No checkpoint was saved yet, so from the start"
        return f"{begin}: {command(self.job.command)} --resume {self.job.run.path}{arguments}"

    def _continue_with(self, plan: DeepSpeedPlan) -> None:
        """Make the engine anew under another plan, as a checkpoint would, through the CPU's memory."""
        self.saver.close()  # whose copy would be a second one
        optimizer = self.engine.optimizer
        tensors, counters = optimizer.snapshot(), optimizer.counters()
        self.engine.close()
        del optimizer, self.engine
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
        note(
            self.console,
            f"memory ran out in step {self.step + 1}, which is repeated; from here on micro-batch x accumulation = "
            f"{plan.batch}, and global batch, masks and samples stay as they were",
        )
        try:
            self.job.run.write_record(self.job.recipe, plan, self.job.record)
        except CheckpointError as error:
            size = plan.batch.micro_batch_size
            warn(self.console, f"{error} Give --micro-batch {size} when you resume this run.")

    def _stopped(self, request: StopRequest) -> bool:
        """Save and leave: False for the time limit, InterruptedBySignalError for a signal."""
        run = self.job.run
        self._save()
        self.saver.finish()
        with self.ranks.together():  # launchers end the others once the first has left, so all is written before
            if self.ranks.is_main:
                run.write_status("stopped", step=self.step, reason=request.reason)
                run.mark_requeue(request.reason)
        resume = f"{command(self.job.command)} --resume {run.path}"
        message = f"{request.reason}: saved {self.checkpoints.path(self.step)}. Resume it with:"
        if request.signum is not None:
            raise InterruptedBySignalError(with_command(message, resume), request.signum)
        say_command(self.console, message, resume)
        return False

    def _log(self, display: TrainingDisplay) -> None:
        """Read back the steps since the last call, write them, and see whether training still moves."""
        optimizer = self.engine.optimizer
        rates = self.throughput.read()
        loss_scale, skipped = optimizer.loss_scale.item(), int(optimizer.skipped_steps.item())
        memory = {}
        if self.device.type == "cuda":
            memory["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 3)
        values = self._write_unread(skipped_steps=skipped, loss_scale=loss_scale, **rates, **memory)
        if values:  # else nothing has happened since the last line
            numbers = f"{self.shown(values)}  {_shown_rates(**rates)}"
            display.update(self.step, numbers + (f"  skipped {skipped}" if skipped else ""))
        with self.ranks.together():
            self._check_progress(int(optimizer.consecutive_skips.item()))

    def _write_unread(self, **extra: float) -> dict[str, float | None]:
        """Write a line for each step whose losses are still on the device; returns the last one's values."""
        values: dict[str, float | None] = {}
        with self.ranks.together():
            for step, values in self._read_back():
                if self.log is not None:
                    self.log.write("train", step, values | (extra if step == self.step else {}))
        return values

    def _read_back(self) -> list[tuple[int, dict[str, float | None]]]:
        """(step, its numbers) of the unread steps: one sum over ranks, one wait for the device."""
        if not self._unread:
            return []
        steps, results, known = zip(*self._unread, strict=True)
        self._unread.clear()
        norms = torch.stack([result.pop("grad_norm") for result in results]).tolist()
        losses = self.ranks.sum(torch.stack([torch.stack([*result.values()]) for result in results])).tolist()
        names = [*results[0], "grad_norm"]
        return [
            (step, dict(zip(names, map(_finite, (*loss, norm)), strict=True)) | of_step)
            for step, loss, norm, of_step in zip(steps, losses, norms, known, strict=True)
        ]

    def _check_progress(self, consecutive_skips: int) -> None:
        scaling = self.job.plan.precision.loss_scaling
        allowed = _HOPELESS_SKIPS
        if scaling is not None and scaling.is_dynamic:
            allowed += scaling.hysteresis + int(math.log2(max(1.0, scaling.initial_scale)))
        if consecutive_skips < allowed:
            return
        saved = self._saved()
        last = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"
        raise TrainingError(
            f"The gradients have not been finite for {consecutive_skips} steps (now at step {self.step}); the weights "
            f"were left as they were, and {last}. Lower optimizer.learning_rate, or use bf16 or fp32 in place of fp16."
        )

    def _evaluate(self, display: TrainingDisplay) -> None:
        with self.throughput.paused():
            values = self.in_memory(lambda: self.evaluate(display))
            with self.ranks.together():
                if self.log is not None:
                    self.log.write("eval", self.step, {name: _finite(value) for name, value in values.items()})
        self._evaluated = self.step

    def in_memory(self, evaluate: Callable[[], _Evaluated]) -> _Evaluated:
        """In fewer rows at a time where memory runs out, which its numbers do not depend on."""
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

    def _save(self) -> None:
        """Begin to save a checkpoint at the step that is done."""
        self.saver.save(self.engine.optimizer, self._state(), self.record_files)

    def _saved(self) -> list[Path]:
        """The checkpoints there are, with the one that is being written."""
        self.saver.close()
        return self.checkpoints.paths()

    def _state(self) -> dict[str, object]:
        """What a checkpoint says beside what the optimizer tells."""
        self._write_unread()  # what comes before a checkpoint must not be lost to a kill after it
        if self.log is not None:
            self.log.flush()
        return {"step": self.step, "tokens": self.tokens, "precision": self.job.plan.precision.name}

    def close(self) -> None:
        self.saver.close()
        if "engine" in vars(self):  # it is not while it is made anew
            self.engine.close()


def _finite(value: float) -> float | None:
    """JSON knows no nan."""
    return value if math.isfinite(value) else None


def _shown_rates(tokens_per_s: float, mfu: float | None = None) -> str:
    return f"{tokens_per_s:,.0f} tokens/s" + ("" if mfu is None else f"  MFU {mfu:.1%}")
