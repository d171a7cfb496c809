"""Finetune an encoder with a new head on one task, from a run directory and a plan to scores and predictions.

RUN/
  scores.json         the scores of the task's sets, and the weights that they belong to
  predictions/        labels, predictions and logits of each set, or answers
  submission/         predictions for GLUE's test sets, in the official files
  best/               the checkpoint of the best evaluation, with --best
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.finetune_recipe import FinetuneRecipe, Finetuning
from electra_ds.config.run_directory import RunDirectory, read_metrics
from electra_ds.config.run_record import FinetuneRecord
from electra_ds.core import devices
from electra_ds.core.errors import CheckpointError, TrainingError
from electra_ds.core.files import complete_file
from electra_ds.core.ranks import Ranks
from electra_ds.finetuning.advice import useless_warning
from electra_ds.finetuning.encoder_source import EncoderSource
from electra_ds.finetuning.heads import TaskModel, finetuning_rates, make_encoder
from electra_ds.finetuning.inputs import TaskBatchBuilder, TaskInputs, evaluation_chunks
from electra_ds.finetuning.tasks.base import EvaluationResult, FinetuneTask, Outputs
from electra_ds.training.callbacks import Callback, Metrics
from electra_ds.training.checkpoint import CheckpointFolder, CheckpointSaver, open_checkpoint, remove
from electra_ds.training.engine import Engine
from electra_ds.training.loop import TrainingLoop, train
from electra_ds.training.preemption import Preemption
from electra_ds.training.step_log import Throughput

_log = logging.getLogger(__name__)
SCORES = "scores.json"
_FORMAT = 1
_LEAST_ROWS = 32
"""The minimum micro-batch of an evaluation, which keeps nothing for a backward pass, however small training's is."""


@dataclass(frozen=True)
class FinetuneJob:
    """Everything that a finetuning needs, checked before anything that takes long."""

    command: ClassVar[str] = "finetune"

    run: RunDirectory
    training: Finetuning
    plan: DeepSpeedPlan
    record: FinetuneRecord
    encoder: EncoderSource
    task: FinetuneTask
    stop_at: int
    examples: str = ""
    """The files or the data set of the examples, with the columns that were read."""

    @property
    def recipe(self) -> FinetuneRecipe:
        return self.training.recipe

    @property
    def total_steps(self) -> int:
        return self.training.schedule.total_steps

    def record_files(self, plan: DeepSpeedPlan) -> dict[str, str]:
        return self.run.record_files(self.recipe, plan, self.record) | self.encoder.files()


def finetune(job: FinetuneJob, ranks: Ranks, preemption: Preemption, callbacks: Sequence[Callback] = ()) -> bool:
    """Train as `loop.train` does. The top of this module lists what a finished run leaves behind."""
    return train(lambda: FinetuneLoop(job, ranks, callbacks), job, ranks, preemption)


def task_model(job: FinetuneJob) -> TaskModel:
    """Return the encoder and the head with the weights that training begins with."""
    encoder = make_encoder(job.encoder.config, job.recipe.seed)
    if job.encoder.tensors:
        encoder.load_state_dict(job.encoder.tensors, strict=True)
    return TaskModel(encoder, job.task.new_head(job.recipe, job.encoder.hidden_size, job.task.num_outputs))


class FinetuneLoop(TrainingLoop):
    job: FinetuneJob

    def __init__(self, job: FinetuneJob, ranks: Ranks, callbacks: Sequence[Callback] = ()) -> None:
        builder = TaskBatchBuilder(
            job.task.train, job.recipe.global_batch_size, job.recipe.seed, job.training.optimizer.loss
        )
        throughput = Throughput(devices.device(ranks.launch), None, lambda batch: 0.0)
        super().__init__(job, ranks, builder, throughput, callbacks)
        self.evaluation_rows = max(self.evaluation_rows, _LEAST_ROWS)
        self._best_folder = CheckpointFolder(job.run.path / "best", keep=1)
        self._best_saver = CheckpointSaver(self._best_folder, ranks)
        self._best_step = 0
        self._results: dict[str, EvaluationResult] = {}
        """The results of the last evaluation, on the main rank."""
        self._history: list[tuple[int, float]] = []
        """(step, the score that decides which evaluation is best) of each evaluation."""

    def start(self, stack: contextlib.ExitStack) -> None:
        super().start(stack)
        job, ranks = self.job, self.ranks
        with ranks.fail_together():
            if ranks.is_main and self._best_folder.folder.is_dir():
                self._forget_later_best()
        self._history = ranks.broadcast(self._earlier_evaluations())
        with ranks.fail_together():
            if job.record.settings.best and self._history and not self._best_folder.paths():
                raise self._best_is_gone()
        if self._history and self._history[-1][0] == self.step and self._is_patience_spent():
            self.early_status = "done"

    def _best_is_gone(self, *problems: str) -> CheckpointError:
        why = "".join(f": {problem.rstrip('.')}" for problem in problems)
        return CheckpointError(
            f"The best evaluation's weights are gone from {self._best_folder.folder}{why}. Put them back, or start a "
            f"new run."
        )

    def _forget_later_best(self) -> None:
        """Remove the weights kept by evaluations after this step, which will be repeated."""
        for path in self._best_folder.paths():
            if path.name > self._best_folder.path(self.step).name:
                try:
                    remove(path)
                except OSError as error:
                    raise CheckpointError(f"Cannot remove {path}: {error.strerror}.") from error
        self._best_folder.tidy(())

    def make_engine(self) -> Engine:
        training = self.job.training
        rates = finetuning_rates(training.num_hidden_layers, training.optimizer)
        return Engine(task_model(self.job), training, self.plan, self.device, rates)

    def shown(self, values: Metrics) -> str:
        loss = values.get("loss")
        return f"loss {'not finite' if loss is None else f'{loss:.4f}'}"

    def check_fresh(self) -> None:
        if self.job.run.status() in ("stopped", "done"):
            raise CheckpointError(
                f"The run {self.job.run.path} was trained before, but its checkpoints are gone. "
                f"Put them back into {self.checkpoints.folder}, or start a new run."
            )

    # --- evaluation

    def evaluate(self) -> Mapping[str, float]:
        task = self.job.task
        self._results = self._results_of(task.dev)
        for name, result in self._results.items():
            constant = "" if result.constant is None else f"; every prediction is {result.constant}"
            _log.info(f"{name} at step {self.step}: {task.shown(result.metrics, result.baseline)}{constant}")
        scores = self.ranks.broadcast({name: result.metrics for name, result in self._results.items()})
        if self._is_scheduled(self.step):
            self._choose(scores[next(iter(task.dev))][task.chosen_by])
        if len(scores) == 1:
            return dict(next(iter(scores.values())))
        return {f"{name}/{metric}": value for name, metrics in scores.items() for metric, value in metrics.items()}

    def _is_scheduled(self, step: int) -> bool:
        """Return True if an uninterrupted run is evaluated at this step.

        Other evaluations, such as those of --stop-at, choose nothing, so a stopped run ends like an uninterrupted one.
        """
        return step % self.job.record.settings.eval_every == 0 or step == self.job.total_steps

    def _results_of(self, sets: Mapping[str, TaskInputs]) -> dict[str, EvaluationResult]:
        """Return the results of each set on the main rank. The other ranks only compute their share."""
        results = {}
        for name, inputs in sets.items():
            outputs = self._outputs(inputs)
            if self.ranks.is_main:
                results[name] = self.job.task.evaluate(name, outputs)
        return results

    def _outputs(self, inputs: TaskInputs) -> Outputs:
        """Return the head's scores of each input, in order, on every rank. The ranks share the work."""
        chunks, world_size = evaluation_chunks(inputs, self.evaluation_rows), self.ranks.world_size
        own: list[list[dict[str, np.ndarray]]] = []
        for turn in range(-(-len(chunks) // world_size)):
            index = turn * world_size + self.ranks.rank
            # At stage 3 all ranks run the model together, so a rank with nothing left repeats its last share.
            rows = chunks[min(index, len(chunks) - 1)]
            scores = self._engine.evaluate(inputs.micro_batch(rows, with_labels=False)).scores
            arrays = {name: tensor.cpu().numpy() for name, tensor in scores.items()}
            if index < len(chunks):
                own.append([{name: array[row] for name, array in arrays.items()} for row in range(len(rows))])
        shares = self.ranks.gather(own)
        outputs: list[Any] = [None] * len(inputs)
        for index, rows in enumerate(chunks):
            for row, scores_of_row in zip(rows.tolist(), shares[index % world_size][index // world_size], strict=True):
                outputs[row] = scores_of_row
        if not all(np.isfinite(array).all() for row in outputs for array in row.values()):
            raise TrainingError(
                f"The model's scores are not finite at step {self.step}, so training has diverged and nothing can be "
                f"scored. Lower optimizer.learning_rate, or check the initial weights."
            )
        return outputs

    def _choose(self, score: float) -> None:
        """Keep the weights if they are the best so far, and decide whether to stop."""
        before = [(step, earlier) for step, earlier in self._history if step < self.step]
        self._history = [*before, (self.step, score)]
        if self.job.record.settings.best and (not before or score > max(earlier for _, earlier in before)):
            self._best_saver.save(self._engine.optimizer, self._state(), self.record_files)
            self._best_saver.finish()
        self.early_status = "done" if self._is_patience_spent() else None

    def _is_patience_spent(self) -> bool:
        """Return True if the last --early-stopping evaluations were no better than the best one before them."""
        patience, scores = self.job.record.settings.early_stopping, [score for _, score in self._history]
        return patience is not None and len(scores) - 1 - scores.index(max(scores)) >= patience

    def _earlier_evaluations(self) -> list[tuple[int, float]]:
        """Return the run's history so far from metrics.jsonl, on the main rank."""
        task = self.job.task
        name = task.chosen_by if len(task.dev) == 1 else f"{next(iter(task.dev))}/{task.chosen_by}"
        path = self.job.run.metrics
        lines = read_metrics(path) if self.ranks.is_main and path.exists() else []
        scores = [(line["step"], line.get(name)) for line in lines if line["kind"] == "eval"]
        return [
            (step, float(score))
            for step, score in scores
            if isinstance(score, int | float) and self._is_scheduled(step)
        ]

    # --- the end

    def finish(self) -> None:
        """Score and predict with the weights that were kept, and write the results."""
        settings = self.job.record.settings
        if settings.best:
            self._load_best()
        if settings.best or not self.ranks.broadcast(bool(self._results)):
            self._results = self.with_fewer_rows(lambda: self._results_of(self.job.task.dev))
        tested = self.with_fewer_rows(lambda: self._results_of(self.job.task.test)) if settings.predict_test else {}
        with self.ranks.fail_together():
            if self.ranks.is_main:
                self._write(self._results | tested)

    def _load_best(self) -> None:
        with self.ranks.fail_together():
            path, damaged = self._best_folder.latest_valid(self.ranks)
            if path is None:
                raise self._best_is_gone(*damaged.values())
            checkpoint = open_checkpoint(path)
            checkpoint.check(self._engine.optimizer.shapes(), self._engine.optimizer.trained())
        self._engine.optimizer.load(checkpoint.tensors, checkpoint.state["optimizer"])
        self._best_step = int(checkpoint.state["step"])

    def _write(self, results: Mapping[str, EvaluationResult]) -> None:
        job, best = self.job, self.job.record.settings.best
        chosen = f"best of {len(self._history)} evaluations on {next(iter(job.task.dev))}" if best else "last"
        if self.early_status is not None:
            chosen += f", stopped after {job.record.settings.early_stopping} evaluations without a better one"
        scores = {
            "format": _FORMAT,
            "task": job.record.task,
            "recipe": job.recipe.name,
            "recipe_source": job.record.recipe_source,
            "changes": job.record.changes,
            "seed": job.recipe.seed,
            "model": f"{job.record.model} (random weights)" if job.record.has_random_weights else job.record.model,
            "model_fingerprint": job.record.model_fingerprint,
            "data_fingerprint": job.record.data_fingerprint,
            "training_examples": job.record.num_examples,
            "step": self._best_step if best else self.step,
            "chosen": chosen,
            "sets": {name: self._written(name, result) for name, result in results.items()},
        }
        files = {name: content for result in results.values() for name, content in result.files.items()}
        for name, content in (files | {SCORES: (json.dumps(scores, indent=2) + "\n").encode()}).items():
            (job.run.path / name).parent.mkdir(exist_ok=True)
            with complete_file(job.run.path / name) as temporary:
                temporary.write_bytes(content)

    def _written(self, name: str, result: EvaluationResult) -> dict[str, Any]:
        """Return the content of scores.json for a set."""
        metrics = {key: value if math.isfinite(value) else None for key, value in result.metrics.items()}
        entry: dict[str, Any] = {"rows": result.rows, "metrics": metrics}
        if result.baseline:
            entry |= {"baseline": result.baseline, "baseline_prediction": result.baseline_prediction}
        if result.constant is not None or result.is_beaten:
            job, steps = self.job, self._best_step or self.step
            entry["warning"] = useless_warning(name, result, steps, job.training, job.encoder, job.task)
        return entry | result.details


def discard_weights(run: RunDirectory) -> None:
    """Remove the checkpoints of a finished run. Raises CheckpointError if they cannot be removed."""
    for folder in (run.checkpoints, run.path / "best"):
        try:
            if folder.is_dir():
                shutil.rmtree(folder)
        except OSError as error:
            raise CheckpointError(f"Cannot remove {folder}: {error.strerror}.") from error
