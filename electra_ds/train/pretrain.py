"""The pretraining loop: from a run directory and a plan to a trained model, resumable at any step."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from electra_ds import runtime
from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.manifest import RunDirectory, RunRecord
from electra_ds.config.recipe import Recipe
from electra_ds.data.batches import BatchBuilder, prefetched
from electra_ds.data.segments import Split
from electra_ds.data.token_store import TokenStore
from electra_ds.engine.checkpoint import CheckpointFolder
from electra_ds.engine.engine import DeepSpeedEngine
from electra_ds.engine.step import StepResult
from electra_ds.errors import CheckpointError, ConfigError, InterruptedBySignalError, TrainingError
from electra_ds.model.electra import Electra
from electra_ds.train.metrics import Evaluator
from electra_ds.train.trackers import open_trackers
from electra_ds.train.tracking import MetricsFile, TrainingDisplay, read_metrics

# Steps in a row without a finite gradient, beyond those that a loss scale may need to come down.
_HOPELESS_SKIPS = 20
# However rarely a run logs, its losses are read back and its gradients looked at this often.
_LOOK_EVERY = 100


@dataclass(frozen=True)
class PretrainJob:
    """Everything a run needs, checked before anything long starts."""

    run: RunDirectory
    recipe: Recipe
    plan: DeepSpeedPlan
    store: TokenStore
    split: Split
    model: Electra
    """Freshly initialised; a checkpoint's weights take their place."""
    record: RunRecord
    stop_at: int
    """Step at which to save and leave; the schedule stays that of the recipe."""


def pretrain(job: PretrainJob, console: Console) -> None:
    """Train from the newest checkpoint, or from the start, to `job.stop_at`.

    Raises InterruptedBySignalError after a signal (a checkpoint is saved), TrainingError where gradients stay
    non-finite, CheckpointError where the disk is full. The caller holds the run's lock.
    """
    with runtime.process_group(), runtime.StopSignal() as stop_signal, contextlib.ExitStack() as stack:
        try:
            loop = _Loop(job, console)
            stack.push(loop.trackers.finish)
            stack.callback(loop.close)
            # Only now, since a JSON that DeepSpeed cannot run must not take the place of the one that it could.
            job.run.write_record(job.recipe, job.plan, job.record)
            job.run.clear_verdict()
            loop.run(stop_signal)
        except (InterruptedBySignalError, ConfigError):  # stopped as asked; refused, with the run as it was
            raise
        except Exception as error:
            with contextlib.suppress(CheckpointError):  # the disk may be full
                job.run.write_verdict("failed", reason=str(error) or repr(error))
            raise


class _Loop:
    def __init__(self, job: PretrainJob, console: Console) -> None:
        self.job, self.console = job, console
        recipe, plan, store = job.recipe, job.plan, job.store
        self.settings = job.record.settings
        self.device = runtime.device()
        self.builder = BatchBuilder(store, job.split.train, recipe, recipe.seed)
        self.evaluator = Evaluator(store, job.split, recipe, self.settings.eval_windows, plan.batch.micro_batch_size)
        self.engine = DeepSpeedEngine(job.model, recipe, plan, self.device)
        self.checkpoints = CheckpointFolder(job.run.checkpoints, self.settings.keep)
        self.record_files = job.run.record_files(recipe, plan, job.record) | {
            "tokenizer.json": store.tokenizer.backend.to_str()
        }
        self.step = self.tokens = 0
        self._resume()
        if self.step > job.stop_at:
            raise ConfigError(f"The run is at step {self.step} already, beyond --stop-at {job.stop_at}.")
        self.metrics = MetricsFile(job.run.metrics, self.step)
        self.trackers = open_trackers(
            job.record.tracking,
            job.run,
            {"recipe": recipe.model_dump(mode="json"), "deepspeed": plan.document},
            resume_step=self.step,
            reached=self.metrics.reached,
            console=console,
        )
        self._unread: deque[tuple[int, StepResult, dict[str, float]]] = deque()
        self._clock = time.monotonic()
        self._clock_tokens = self.tokens

    def _resume(self) -> None:
        checkpoint, damaged = self.checkpoints.load_latest()
        for problem in damaged.values():
            self.console.print(
                f"[yellow]Warning:[/] {problem} Falling back to the one before.", highlight=False, soft_wrap=True
            )
        self.checkpoints.tidy(damaged)
        if checkpoint is None:
            self._check_fresh()
            return
        self.engine.optimizer.load(checkpoint.tensors, checkpoint.state["optimizer"])
        self.step, self.tokens = checkpoint.state["step"], checkpoint.state["tokens"]
        self.console.print(
            f"Going on from {checkpoint.path}, step {self.step}.", highlight=False, markup=False, soft_wrap=True
        )

    def _check_fresh(self) -> None:
        """Without a checkpoint a run starts anew, which must not happen to one whose checkpoints were lost."""
        metrics = self.job.run.metrics
        reached = max((line["step"] for line in read_metrics(metrics)), default=0) if metrics.exists() else 0
        if reached > self.settings.save_every:
            raise CheckpointError(
                f"The run {self.job.run.path} had reached step {reached}, but its checkpoints are gone. "
                f"Put them back into {self.checkpoints.folder}, or start a new run."
            )

    def run(self, stop_signal: runtime.StopSignal) -> None:
        job, settings = self.job, self.settings
        total = job.recipe.schedule.total_steps
        with TrainingDisplay(self.console, job.stop_at, self.step) as display:
            for step, batch in prefetched(self.builder, self.step, job.stop_at):
                result = self.engine.train_step(batch, step)
                self.step = step + 1
                self.tokens += batch.num_tokens
                known = {"learning_rate": self.engine.optimizer.param_groups[0]["lr"], "tokens_seen": self.tokens}
                self._unread.append((self.step, result, known))
                if self.step % min(settings.log_every, _LOOK_EVERY) == 0 or self.step == job.stop_at:
                    self._log(display)
                if self.step % settings.eval_every == 0 and self.step < job.stop_at:
                    self._evaluate(display)
                if self.step % settings.save_every == 0 and self.step < job.stop_at:
                    self._save()
                if stop_signal.received is not None and self.step < job.stop_at:
                    self._log(display)
                    raise self._interrupted(stop_signal.received)
            self._save()
            self._evaluate(display)
        if self.step >= total:
            job.run.write_verdict("done", step=self.step)
        else:
            job.run.write_verdict("stopped", step=self.step, reason=f"--stop-at {job.stop_at}")

    def _interrupted(self, received: signal.Signals) -> InterruptedBySignalError:
        path = self._save()
        self.job.run.write_verdict("stopped", step=self.step, reason=received.name)
        return InterruptedBySignalError(
            f"{received.name}: saved {path}. Go on with: bin/pretrain --resume {self.job.run.path}", received
        )

    def _log(self, display: TrainingDisplay) -> None:
        """Read back the steps since the last call, write them, and see whether training still moves."""
        optimizer = self.engine.optimizer
        now = time.monotonic()
        tokens_per_s = (self.tokens - self._clock_tokens) / max(now - self._clock, 1e-9)
        self._clock, self._clock_tokens = now, self.tokens
        loss_scale, skipped = optimizer.loss_scale.item(), int(optimizer.skipped_steps.item())
        values = self._write_unread(skipped_steps=skipped, loss_scale=loss_scale, tokens_per_s=round(tokens_per_s))
        generator, discriminator = values.get("generator_loss"), values.get("discriminator_loss")
        numbers = f"generator {_shown(generator)}  discriminator {_shown(discriminator)}  {tokens_per_s:,.0f} tokens/s"
        display.update(self.step, numbers + (f"  skipped {skipped}" if skipped else ""))
        self._check_progress(int(optimizer.consecutive_skips.item()))

    def _write_unread(self, **extra: float) -> dict[str, float | None]:
        """Write a line for each step whose losses are still on the device; returns the last one's values."""
        values: dict[str, float | None] = {}
        while self._unread:
            step, result, known = self._unread.popleft()
            values = {name: _finite(tensor.item()) for name, tensor in result._asdict().items()}
            line = values | known | (extra if not self._unread else {})
            self.metrics.write("train", step, line)
            self.trackers.write("train", step, line)
        return values

    def _check_progress(self, consecutive_skips: int) -> None:
        scaling = self.job.plan.precision.loss_scaling
        allowed = _HOPELESS_SKIPS
        if scaling is not None and scaling.is_dynamic:
            allowed += scaling.hysteresis + int(math.log2(max(1.0, scaling.initial_scale)))
        if consecutive_skips < allowed:
            return
        saved = self.checkpoints.paths()
        last = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"
        raise TrainingError(
            f"The gradients have not been finite for {consecutive_skips} steps (now at step {self.step}); the weights "
            f"were left as they were, and {last}. Lower optimizer.learning_rate, or use bf16 or fp32 in place of fp16."
        )

    def _evaluate(self, display: TrainingDisplay) -> None:
        started = time.monotonic()
        evaluation = self.evaluator(self.engine.module, self.device)
        values = {name: _finite(value) for name, value in evaluation._asdict().items()}
        self.metrics.write("eval", self.step, values)
        self.trackers.write("eval", self.step, values)
        display.say(
            f"held out at step {self.step}: generator {evaluation.generator_masked_loss:.3f} nats at [MASK] "
            f"({evaluation.generator_gain:+.3f} over unigram), discriminator AUC {evaluation.discriminator_auc:.3f}"
        )
        self._clock += time.monotonic() - started

    def _save(self) -> Path:
        started = time.monotonic()
        self._write_unread()  # what comes before a checkpoint must not be lost to a kill after it
        self.trackers.flush()
        optimizer = self.engine.optimizer
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "precision": self.job.plan.precision.name,
            "optimizer": optimizer.counters(),
        }
        path = self.checkpoints.save(optimizer.tensors(), state, self.record_files)
        self._clock += time.monotonic() - started
        return path

    def close(self) -> None:
        self.metrics.close()
        self.engine.close()


def _finite(value: float) -> float | None:
    """JSON knows no nan."""
    return value if math.isfinite(value) else None


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"
