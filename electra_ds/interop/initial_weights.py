"""A run that begins with weights from elsewhere: they become its first checkpoint, and training continues from that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from electra_ds.pretraining.pretrain import PretrainJob
from electra_ds.training.checkpoint import CheckpointFolder
from electra_ds.training.optimizer import FRESH_COUNTERS


def write_first_checkpoint(
    job: PretrainJob,
    tensors: Mapping[str, torch.Tensor],
    *,
    step: int = 0,
    tokens: int = 0,
    counters: Mapping[str, float] = FRESH_COUNTERS,
) -> Path:
    """Write a checkpoint of these tensors and the run's record; returns the checkpoint's path.

    For the main rank, which holds the run. tensors: fp32, `master/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME` for every
    parameter of `Electra`; counters: as `MasterAdamW.counters` gives them. Raises CheckpointError if the folder
    cannot be written, or already holds a checkpoint.
    """
    state = {"step": step, "tokens": tokens, "precision": "fp32", "optimizer": dict(counters)}
    path = CheckpointFolder(job.run.checkpoints, job.record.settings.keep).save(
        tensors, state, job.record_files(job.plan)
    )
    # Last: a run is there only once it has what it begins with, or a resumed one would begin with random weights.
    job.run.write_record(job.recipe, job.plan, job.record)
    return path
