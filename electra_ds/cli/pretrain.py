"""`electra-ds pretrain`."""

from __future__ import annotations

import argparse
import contextlib
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from electra_ds.cli.arguments import (
    DEFAULT_RECIPE,
    add_command,
    add_launcher_arguments,
    add_overrides,
    add_plan_arguments,
    add_tracking,
    positive,
)
from electra_ds.cli.stores import CORPUS_ARGUMENTS, add_corpus_arguments, open_store
from electra_ds.config.shipped import recipe_names
from electra_ds.errors import ConfigError

if TYPE_CHECKING:
    from electra_ds.cli.arguments import Commands
    from electra_ds.config.recipe import Recipe
    from electra_ds.train.init_from import Beginning
    from electra_ds.train.pretrain import PretrainJob

_STARTED = time.monotonic()  # what a time limit counts from
_EPILOG = """\
examples:
  bin/pretrain --ds-config ds_configs/cpu.json --recipe tiny
      a first run, on documentation text that every machine has
  bin/pretrain --ds-config ds_configs/gtx1060-6gb.json --corpus my_texts/
      the reproduction study's ELECTRA-Small on your own text, on a 6 GB card
  bin/pretrain --ds-config ds_configs/gtx1060-6gb.json --corpus 'hub:wikimedia/wikipedia#20231101.sw' --corpus news/
      a dataset of the Hugging Face Hub, and a folder
  bin/pretrain --ds-config gtx1060-6gb --recipe electra-small --set generator.width_multiplier=1 \\
      --init-from google/electra-small-generator google/electra-small-discriminator --corpus my_texts/
      goes on from published weights, with their own vocabulary; that generator is as large as its discriminator
  bin/pretrain --ds-config cpu --recipe tiny --wandb offline --tensorboard
      with curves to watch; ds_configs/cpu.json is known by its name too
  bin/pretrain --ds-config ds_configs/cpu.json --recipe tiny --set optimizer.learning_rate=1e-3 seed=3
  bin/pretrain --resume runs/tiny-20260101-120000
  bin/pretrain --resume runs/tiny-20260101-120000 --ds-config ds_configs/rtx3090-24gb.json
      the same run goes on under another DeepSpeed JSON: same batch, schedule, data, masks and samples

several GPUs, several nodes:
  torchrun --nproc_per_node 4 bin/pretrain --ds-config ds_configs/zero1.json
  deepspeed --num_gpus 4 bin/pretrain --ds-config ds_configs/zero1.json
  srun --ntasks-per-node 4 --gpus-per-task 1 --kill-on-bad-exit=1 bin/pretrain --ds-config ds_configs/zero1.json

Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint at the next step and leave; a second one, 5 s later or more, leaves at
once.
"""


def add_pretrain(commands: Commands) -> None:
    """The parser of `pretrain`."""
    command = add_command(commands, "pretrain", "Pretrain generator and discriminator.", _EPILOG)
    command.set_defaults(handler=_pretrain)
    what = command.add_argument_group("what to train")
    what.add_argument("--recipe", metavar="NAME|FILE", help=f"{', '.join(recipe_names())}, or a YAML file")
    add_overrides(what, "schedule.total_steps=5000 model.hidden_size=256")
    what.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this directory")
    what.add_argument(
        "--init-from", nargs="+", metavar="SOURCE",
        help="begin with the weights of transformers' ELECTRA: a generator and a discriminator, each a folder or a "
        "name on the Hub, a folder that bin/export made, or a discriminator alone",
    )  # fmt: skip
    add_corpus_arguments(what, default_note="default: the built-in corpus")
    what.add_argument("--data", type=Path, metavar="STORE", help="a token store that bin/build-data made")
    add_launcher_arguments(command)
    how = command.add_argument_group("how to run it")
    add_plan_arguments(
        how, "runs/RECIPE-TIME",
        "sequences at a time, in place of the JSON's; auto: the largest that fits, found by trying on a GPU",
    )  # fmt: skip
    how.add_argument(
        "--compile", choices=("auto", "on", "off"),
        help="torch.compile, and CUDA graphs without accumulation; auto: on GPUs of compute capability 7.0 and above",
    )  # fmt: skip
    how.add_argument("--eval-every", type=positive, metavar="STEPS", help="default: a tenth of it, at most 5000")
    how.add_argument("--save-every", type=positive, metavar="STEPS", help="default: a tenth of it, at most 2000")
    how.add_argument("--keep", type=positive, metavar="N", help="checkpoints to retain (default: 3)")
    how.add_argument(
        "--keep-at", nargs="+", type=positive, metavar="STEP", help="steps whose checkpoints stay, whatever --keep says"
    )
    how.add_argument(
        "--stop-on-collapse", action="store_true", default=None,
        help="end the run where the discriminator stays at chance while the generator gets better",
    )  # fmt: skip
    how.add_argument("--eval-windows", type=positive, metavar="N", help="held-out sequences (default: 512)")
    add_tracking(command.add_argument_group("where to watch it (metrics.jsonl is always written)"))


def _pretrain(options: argparse.Namespace) -> None:
    check_arguments(options)

    from electra_ds.config.overrides import load_recipe

    recipe = None if options.resume else load_recipe(options.recipe or DEFAULT_RECIPE, options.overrides)

    from rich.console import Console

    from electra_ds import runtime
    from electra_ds.config.manifest import RunDirectory
    from electra_ds.data.token_store import TokenStore
    from electra_ds.train import launch
    from electra_ds.train.pretrain import pretrain

    wanted = launch.Options(**{name: getattr(options, name) for name in launch.Options.__dataclass_fields__})
    with runtime.ranks() as ranks, contextlib.ExitStack() as held:
        console = Console(quiet=not ranks.is_main)
        run = RunDirectory(ranks.from_main(_run_path(options, recipe)))
        with ranks.together():
            plan = launch.plan_new(wanted, recipe, run, ranks) if recipe else launch.plan_resume(wanted, run, ranks)
        store = beginning = None
        with ranks.together():
            if ranks.is_main and recipe:
                beginning = _read_beginning(options, recipe)
                store = open_store(options, recipe, beginning.check_vocabulary if beginning else None)
        store_path = ranks.from_main(store and store.path.resolve())
        sources = ranks.from_main(beginning.names if beginning else ())
        with ranks.together():
            if recipe:
                job = launch.prepare_new(wanted, recipe, plan, store or TokenStore(store_path), run, ranks, sources)
            else:
                job = launch.prepare_resume(wanted, plan, run, ranks)
        job = launch.with_fitting_micro_batch(job, wanted, ranks)
        launch.hold(run, ranks, held, is_new=recipe is not None)
        with ranks.together():
            if beginning:
                job = _begin(job, beginning)
        beginning = None  # which holds the weights in memory
        launch.announce(job, console)
        time_limit = None if options.time_limit is None else options.time_limit - (time.monotonic() - _STARTED)
        if pretrain(job, ranks, console, time_limit) and ranks.is_main:
            from electra_ds.report.run_report import report_run

            report_run(run, console)


def _read_beginning(options: argparse.Namespace, recipe: Recipe) -> Beginning | None:
    """The weights of --init-from, whose tokenizer takes the place of one that is not given."""
    if not options.init_from:
        return None

    from electra_ds.train.init_from import read_beginning

    beginning = read_beginning(options.init_from, recipe)
    if options.tokenizer is None and options.data is None:
        options.tokenizer = beginning.own_tokenizer()
    return beginning


def _begin(job: PretrainJob, beginning: Beginning) -> PretrainJob:
    """Make the weights the run's first checkpoint; returns the job with notes on what is not from them."""
    from electra_ds.train.adopt import begin_with

    tokenizer = job.store.tokenizer
    begin_with(job, beginning.tensors(job.recipe, tokenizer))
    notes = (*job.plan.notes, *beginning.notes(job.recipe, tokenizer))
    return replace(job, plan=replace(job.plan, notes=notes))


def _run_path(options: argparse.Namespace, recipe: Recipe | None) -> Path:
    default = Path("runs") / f"{recipe.name if recipe else ''}-{datetime.now():%Y%m%d-%H%M%S}"
    path: Path = options.resume or options.run_dir or default
    return path


def check_arguments(options: argparse.Namespace) -> None:
    """ConfigError where arguments cannot go together."""
    if options.resume is not None:
        new_run_only = ("recipe", "overrides", "init_from", "data", *CORPUS_ARGUMENTS, "run_dir")
        given = [name for name in new_run_only if getattr(options, name)]
        if given:
            flags = ", ".join("--" + name.replace("overrides", "set").replace("_", "-") for name in given)
            raise ConfigError(f"--resume takes recipe and data from the run, so {flags} cannot be given with it.")
    elif options.ds_config is None:
        raise ConfigError("Say how to run it with --ds-config, for instance: --ds-config cpu")
    elif options.init_from is not None and len(options.init_from) > 2:
        raise ConfigError(
            f"--init-from takes a generator and a discriminator, and {len(options.init_from)} models are given."
        )
    elif options.data is not None and any(getattr(options, name) for name in CORPUS_ARGUMENTS):
        raise ConfigError("--data is a finished token store; give either it or --corpus and what belongs to that.")
