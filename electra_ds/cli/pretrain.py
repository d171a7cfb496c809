"""`electra-ds pretrain`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from electra_ds.cli.arguments import add_handled, confirm, from_start
from electra_ds.config.options import PretrainOptions

if TYPE_CHECKING:
    from electra_ds.cli.arguments import Commands

_EPILOG = """\
examples:
  bin/pretrain --recipe tiny
      a first run, on documentation text that every machine has
  bin/pretrain --recipe rc2020-small --corpus my_texts/ --dry-run
      what would run here, and how long it would take
  bin/pretrain --ds-config ds_configs/gtx1060-6gb.json --corpus my_texts/
      the reproduction study's ELECTRA-Small on your own text, on a 6 GB card
  bin/pretrain --ds-config ds_configs/gtx1060-6gb.json --corpus 'hub:wikimedia/wikipedia#20231101.sw' --corpus news/
      a dataset of the Hugging Face Hub, and a folder
  bin/pretrain --ds-config gtx1060-6gb --recipe electra-small --set generator.width_multiplier=1 \\
      --init-from google/electra-small-generator google/electra-small-discriminator --corpus my_texts/
continues from published weights, with their own vocabulary; that generator is as large as its discriminator
  bin/pretrain --ds-config cpu --recipe tiny --wandb offline --tensorboard
      with curves to watch; ds_configs/cpu.json is known by its name too
  bin/pretrain --ds-config ds_configs/cpu.json --recipe tiny --set optimizer.learning_rate=1e-3 --seed 3
  bin/pretrain --resume runs/tiny-20260101-120000
  bin/pretrain --resume runs/tiny-20260101-120000 --ds-config ds_configs/rtx3090-24gb.json
the same run continues under another DeepSpeed JSON: same batch, schedule, data, masks and samples

several GPUs, several nodes:
  torchrun --nproc_per_node 4 bin/pretrain --ds-config ds_configs/zero1.json
  deepspeed --num_gpus 4 bin/pretrain --ds-config ds_configs/zero1.json
  srun --ntasks-per-node 4 --gpus-per-task 1 --kill-on-bad-exit=1 bin/pretrain --ds-config ds_configs/zero1.json

Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint at the next step and leave; a second one, 5 s later or more, leaves at
once.
"""


def add_pretrain(commands: Commands) -> None:
    """Add the parser of `pretrain`."""
    add_handled(commands, "pretrain", PretrainOptions, _EPILOG, _pretrain)


def _pretrain(options: PretrainOptions) -> None:
    if options.recipe is not None:
        from electra_ds.config.overrides import load_recipe

        load_recipe(options.recipe, options.recipe_overrides())  # one that cannot be used does not wait for torch

    from electra_ds.api.launch import launch
    from electra_ds.api.pretrain import PretrainStart

    launch(PretrainStart(from_start(options)), confirm=confirm)
