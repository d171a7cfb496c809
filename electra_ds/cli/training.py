"""`electra-ds pretrain` and `electra-ds finetune`."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from electra_ds.cli.arguments import add_handled
from electra_ds.config.names import TASKS
from electra_ds.config.options import FinetuneOptions, PretrainOptions, RunOptions
from electra_ds.config.plugins import TASK

if TYPE_CHECKING:
    from electra_ds.cli.arguments import Commands

_OptionsT = TypeVar("_OptionsT", bound=RunOptions)
_STARTED = time.monotonic()
_PRETRAIN_HELP = """\
examples:
  bin/pretrain --recipe tiny
      a first run, on documentation text that every machine has
  bin/pretrain --recipe rc2020-small --corpus my_texts/ --dry-run
      show what would run here, and how long it would take
  bin/pretrain --ds-config ds_configs/gtx1060-6gb.json --corpus my_texts/
      the reproduction study's ELECTRA-Small on your own text, on a 6 GB card
  bin/pretrain --ds-config ds_configs/gtx1060-6gb.json --corpus 'hub:wikimedia/wikipedia#20231101.sw' --corpus news/
      a dataset on the Hugging Face Hub, and a folder
  bin/pretrain --ds-config gtx1060-6gb --recipe electra-small --set generator.width_multiplier=1 \\
      --init-from google/electra-small-generator google/electra-small-discriminator --corpus my_texts/
      continue from published weights, with their vocabulary; that generator is as wide as its discriminator
  bin/pretrain --ds-config cpu --recipe tiny --wandb offline --tensorboard
      with curves to watch; `cpu` is short for ds_configs/cpu.json
  bin/pretrain --ds-config ds_configs/cpu.json --recipe tiny --set optimizer.learning_rate=1e-3 --seed 3
  bin/pretrain --resume runs/tiny-20260101-120000
  bin/pretrain --resume runs/tiny-20260101-120000 --ds-config ds_configs/rtx3090-24gb.json
      continue the run with another DeepSpeed JSON, and the same batch, schedule, data, masks and samples

several GPUs, several nodes:
  torchrun --nproc_per_node 4 bin/pretrain --ds-config ds_configs/zero1.json
  deepspeed --num_gpus 4 bin/pretrain --ds-config ds_configs/zero1.json
  srun --ntasks-per-node 4 --gpus-per-task 1 --kill-on-bad-exit=1 bin/pretrain --ds-config ds_configs/zero1.json

Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint after the current step and exit; a second signal, at least 5 s later,
exits immediately.
"""
_FINETUNE_HELP = f"""\
examples:
  bin/finetune --model runs/mini-20260101-120000 --task mrpc --data-dir glue/ --seed 3
      glue/ holds the folders of gluebenchmark.com's downloads: CoLA, MRPC, STS-B, …
  bin/finetune --model google/electra-small-discriminator --task sts-b
      model and data from the Hugging Face Hub
  bin/finetune --model export/discriminator --task cola --data-dir glue/ --recipe original
  bin/finetune --model google-bert/bert-base-uncased --task squad1 --data-dir squad/ --set optimizer.learning_rate=1e-4
  bin/finetune --model runs/mini-20260101-120000 --train reviews.csv --dev held_out.csv --text review --label stars
      your own classification or regression, CSV, TSV or JSON lines
  bin/finetune --model runs/mini-20260101-120000 --task token-classification --train train.conll --dev dev.conll
  bin/finetune --resume runs/mrpc-rc2020-s3-20260101-120000
  bin/report runs/mrpc-* runs/cola-*
      mean and standard deviation over the seeds, AVG and GLUE

tasks: {", ".join(TASKS)}
kinds of tasks for your own examples: {", ".join(TASK.ours)} (docs/tasks.md)
AX, GLUE's diagnostic set, has no training examples: mnli with --predict-test predicts it.

recipes: own trains for at least 500 steps, however few examples there are. bin/export can write transformers models
with the head of own, and with that of original except for SQuAD. rc2020 averages over the tokens, which no class of
transformers does, so bin/export writes only the encoder of its models.

A run's scores are in RUN/scores.json, its predictions in RUN/predictions/, and with --predict-test those for the test
sets in RUN/submission/, in the format that GLUE's site accepts; bin/report --submission zips them.
"""


def add_training(commands: Commands) -> None:
    """Add the parsers of `pretrain` and `finetune`."""
    add_handled(commands, "pretrain", PretrainOptions, _PRETRAIN_HELP, _pretrain)
    add_handled(commands, "finetune", FinetuneOptions, _FINETUNE_HELP, _finetune)


def _pretrain(options: PretrainOptions) -> None:
    if options.recipe is not None:
        from electra_ds.config.recipe import load_recipe

        load_recipe(options.recipe, options.recipe_overrides())  # reject an invalid recipe before importing torch

    from electra_ds.api.pretrain import pretrain

    pretrain(options=_from_start(options))


def _finetune(options: FinetuneOptions) -> None:
    if options.resume is None:
        from electra_ds.config.finetune_recipe import load_finetune_recipe

        # Reject an invalid recipe before importing torch.
        load_finetune_recipe(options.recipe_or_default(), options.task or "", options.recipe_overrides())

    from electra_ds.api.finetune import finetune

    finetune(options=_from_start(options))


def _from_start(options: _OptionsT) -> _OptionsT:
    """Return the options with the time limit counted from the start of this process, imports included."""
    if options.time_limit is None:
        return options
    return replace(options, time_limit=options.time_limit - (time.monotonic() - _STARTED))
