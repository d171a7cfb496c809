"""Pretraining with any objective, from a run directory and a plan to a trained model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.recipe import Recipe
from electra_ds.config.run_directory import RunDirectory, read_metrics
from electra_ds.config.run_record import RunRecord
from electra_ds.core import devices
from electra_ds.core.errors import CheckpointError
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import Split, TokenStore
from electra_ds.pretraining.batches import BatchBuilder, objective_of
from electra_ds.pretraining.engine import PretrainingEngine
from electra_ds.pretraining.evaluation import Evaluator
from electra_ds.training.callbacks import Callback, Metrics
from electra_ds.training.loop import TrainingLoop, train
from electra_ds.training.preemption import Preemption
from electra_ds.training.step_log import Throughput, joint_peak_flops

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainJob:
    """Everything that a pretraining needs, checked before anything slow starts."""

    command: ClassVar[str] = "pretrain"

    run: RunDirectory
    recipe: Recipe
    plan: DeepSpeedPlan
    store: TokenStore
    split: Split
    record: RunRecord
    stop_at: int

    @property
    def total_steps(self) -> int:
        return self.recipe.schedule.total_steps

    def record_files(self, plan: DeepSpeedPlan) -> dict[str, str]:
        files = self.run.record_files(self.recipe, plan, self.record)
        return files | {"tokenizer.json": self.store.tokenizer.backend.to_str()}


def pretrain(job: PretrainJob, ranks: Ranks, preemption: Preemption, callbacks: Sequence[Callback] = ()) -> bool:
    """Train a job; see `loop.train`."""
    return train(lambda: PretrainLoop(job, ranks, callbacks), job, ranks, preemption)


class PretrainLoop(TrainingLoop):
    """Pretraining with the recipe's objective."""

    job: PretrainJob

    def __init__(self, job: PretrainJob, ranks: Ranks, callbacks: Sequence[Callback] = ()) -> None:
        recipe, plan, store = job.recipe, job.plan, job.store
        with ranks.fail_together():
            device = devices.device(ranks.launch)
            builder = BatchBuilder(store, job.split.train, recipe, recipe.seed)
            self.evaluator = Evaluator(store, job.split, recipe, job.record.settings.eval_windows, ranks)
        self.objective = objective_of(recipe, store.tokenizer)
        peak = joint_peak_flops(device, plan.precision.name, plan.batch.world_size)
        super().__init__(job, ranks, builder, Throughput(device, peak, self.objective.flops), callbacks)
        self._evaluations: list[Mapping[str, Any]] = []
        """All evaluations of the run, on the main rank, which detects a collapse."""
        self._collapsed_at: int | None = None

    def start(self, stack: contextlib.ExitStack) -> None:
        super().start(stack)
        if self.ranks.is_main:
            lines = read_metrics(self.job.run.metrics)
            self._evaluations = [line for line in lines if line["kind"] == "eval" and line["step"] <= self.step]
        self._look_for_collapse()
        if isinstance(self.engine, PretrainingEngine) and self.engine.is_compiled:
            _log.info("The first step compiles the forward pass, which takes a minute.")

    def make_engine(self) -> PretrainingEngine:
        model = self.objective.build_model()
        return PretrainingEngine(model, self.job.recipe, self.plan, self.device, self.job.record.settings.compile)

    def shown(self, values: Metrics) -> str:
        return self.objective.progress(values)

    def check_fresh(self) -> None:
        """Raise CheckpointError if checkpoints were lost: without one, the run would start from scratch."""
        sources = self.job.record.initialised_from
        if sources:
            raise CheckpointError(
                f"The run {self.job.run.path} started from the weights of {' and '.join(sources)}, but its checkpoints "
                f"are gone. Put them back into {self.checkpoints.folder}, or start a new run."
            )
        reached = max((line["step"] for line in read_metrics(self.job.run.metrics)), default=0)
        # The settings before this start, which may change them.
        settings = self.job.run.read_record().settings if self.job.run.exists() else self.job.record.settings
        # The first checkpoint is published before the second save begins, and before the status becomes stopped.
        if reached > 2 * settings.save_every or self.job.run.status() == "stopped":
            raise CheckpointError(
                f"The run {self.job.run.path} had reached step {reached}, but its checkpoints are gone. "
                f"Put them back into {self.checkpoints.folder}, or start a new run."
            )

    def evaluate(self) -> Mapping[str, float]:
        metrics = self.evaluator(self._engine.evaluate, self.device, self.evaluation_rows)
        _log.info(f"held out at step {self.step}: {self.objective.describe(metrics)}")
        if self._collapsed_at is None:
            self._evaluations.append(metrics | {"step": self.step})
            collapsed_at = self._look_for_collapse()
            if collapsed_at is not None:
                hint = "" if self.early_status else " --stop-on-collapse would end the run here."
                _log.info(f"{self.objective.describe_collapse(collapsed_at, self._evaluations)}{hint}")
        return metrics

    def _look_for_collapse(self) -> int | None:
        """Return the step of the collapse, if any, the same on all ranks."""
        found = self.objective.collapsed_at(self._evaluations) if self.ranks.is_main else None
        self._collapsed_at = self.ranks.broadcast(found)
        if self._collapsed_at is not None and self.job.record.settings.stop_on_collapse:
            self.early_status = "collapsed"
        return self._collapsed_at

    @property
    def keep_at(self) -> Collection[int]:
        return self.job.record.settings.keep_at

    def final_status_details(self) -> dict[str, Any]:
        return {} if self._collapsed_at is None else {"collapsed_at": self._collapsed_at}
