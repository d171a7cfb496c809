"""`electra-ds pretrain`."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from electra_ds.cli.arguments import (
    add_command,
    add_launcher_arguments,
    add_overrides,
    add_plan_arguments,
    add_seed,
    add_tracking,
    check_seed,
    positive,
    with_seed,
)
from electra_ds.cli.asking import ask_before_years, say_dry_run
from electra_ds.cli.stores import CORPUS_ARGUMENTS, add_corpus_arguments, gives_corpus, look_for_store, open_store
from electra_ds.config.shipped import CPU_RECIPE, GPU_RECIPE, RECIPE_NOTE, recipe_names
from electra_ds.core.errors import ConfigError
from electra_ds.core.launcher import detect
from electra_ds.core.program import command as command_of

if TYPE_CHECKING:
    from rich.console import Console

    from electra_ds.cli.arguments import Commands
    from electra_ds.config.deepspeed import DeepSpeedPlan
    from electra_ds.config.recipe import Recipe
    from electra_ds.config.run_directory import RunDirectory
    from electra_ds.core.ranks import Ranks
    from electra_ds.interop.init_from import InitialWeights
    from electra_ds.pretraining.prepare import Options
    from electra_ds.pretraining.pretrain import PretrainJob
    from electra_ds.pretraining.run_time import RunTime

_STARTED = time.monotonic()  # what a time limit counts from
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
    """The parser of `pretrain`."""
    command = add_command(commands, "pretrain", "Pretrain generator and discriminator.", _EPILOG)
    command.set_defaults(handler=_pretrain)
    what = command.add_argument_group("what to train")
    what.add_argument(
        "--recipe", metavar="NAME|FILE", help=f"{', '.join(recipe_names())}, or a YAML file ({RECIPE_NOTE})"
    )
    add_overrides(what, "schedule.total_steps=5000 model.hidden_size=256")
    add_seed(what, "of weights, data order, masks, samples and dropout")
    what.add_argument("--resume", type=Path, metavar="RUN", help="resume the run in this directory")
    what.add_argument(
        "--init-from", nargs="+", metavar="SOURCE",
        help="begin with the weights of transformers' ELECTRA: a generator and a discriminator, each a folder or a "
        "name on the Hub, a folder that bin/export made, or a discriminator alone",
    )  # fmt: skip
    add_corpus_arguments(what, default_note="default: the built-in corpus")
    what.add_argument(
        "--data", type=Path, metavar="STORE",
        help="a token store that bin/build-data made; with --resume: where the run's own store is now",
    )  # fmt: skip
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

    name = options.recipe or _default_recipe(options)
    recipe = load_recipe(name, with_seed(options)) if name else None

    from rich.console import Console

    from electra_ds.cli.progress import ConsoleDisplay
    from electra_ds.config.run_directory import RunDirectory
    from electra_ds.core.log import show_log
    from electra_ds.core.ranks import join_ranks
    from electra_ds.data.token_store import TokenStore
    from electra_ds.pretraining import prepare
    from electra_ds.pretraining.pretrain import pretrain

    wanted = prepare.Options(**{name: getattr(options, name) for name in prepare.Options.__dataclass_fields__})
    with join_ranks() as ranks, contextlib.ExitStack() as held:
        console = Console(quiet=not ranks.is_main)
        show_log(console)
        run = RunDirectory(ranks.broadcast(_run_path(options, recipe)))
        if recipe is None and prepare.is_finished(run, "pretrain", ranks):
            prepare.say_finished(run, console)
            return
        with ranks.together():
            plan = prepare.plan_new(wanted, recipe, run, ranks) if recipe else prepare.plan_resume(wanted, run, ranks)
        if recipe and not options.recipe:
            plan = replace(plan, notes=(_of_default(recipe), *plan.notes))
        if options.dry_run:
            _dry_run(options, wanted, recipe, plan, run, ranks, console)
            return
        if recipe:
            ask_before_years(options, lambda: _run_time(options, recipe, plan, ranks), _shorter(recipe), ranks)
        store = beginning = None
        with ranks.together():
            if ranks.is_main and recipe:
                beginning = _read_beginning(options, recipe)
                store = open_store(options, recipe, beginning.check_vocabulary if beginning else None)
        store_path = ranks.broadcast(store and store.path.resolve())
        sources = ranks.broadcast(beginning.names if beginning else ())
        with ranks.together():
            if recipe:
                job = prepare.prepare_new(wanted, recipe, plan, store or TokenStore(store_path), run, ranks, sources)
            else:
                job = prepare.prepare_resume(wanted, plan, run, ranks)
        job = prepare.with_fitting_micro_batch(job, wanted, ranks)
        prepare.hold(run, ranks, held, is_new=recipe is not None)
        with ranks.together():
            if beginning:
                job = _begin(job, beginning)
        beginning = None  # which holds the weights in memory
        prepare.announce(job, console)
        time_limit = None if options.time_limit is None else options.time_limit - (time.monotonic() - _STARTED)
        if pretrain(job, ranks, time_limit, [ConsoleDisplay(console)]) and ranks.is_main:
            from electra_ds.report.run_report import report_run

            report_run(run, console)


def _default_recipe(options: argparse.Namespace) -> str | None:
    """None where the recipe is the resumed run's."""
    if options.resume:
        return None

    from electra_ds.core import devices

    return CPU_RECIPE if devices.device(detect(os.environ)).type == "cpu" else GPU_RECIPE


def _of_default(recipe: Recipe) -> str:
    has_gpu = "with a GPU" if recipe.name == GPU_RECIPE else "without a GPU"
    return f"{recipe.name} is the default recipe {has_gpu}; {command_of('recipes')} shows the others"


def _run_time(
    options: argparse.Namespace, recipe: Recipe, plan: DeepSpeedPlan, ranks: Ranks, vocab_size: int | None = None
) -> RunTime | None:
    from electra_ds.core import devices
    from electra_ds.pretraining.run_time import pretraining_time

    steps = options.stop_at or recipe.schedule.total_steps
    size, device = vocab_size or recipe.tokenizer.vocab_size, devices.device(ranks.launch)
    return pretraining_time(recipe, size, plan, device, steps=steps, threads=options.threads)


def _shorter(recipe: Recipe) -> str:
    smaller = "" if recipe.name == CPU_RECIPE else f" a smaller recipe, such as --recipe {CPU_RECIPE},"
    return f"Choose{smaller or ' smaller sizes'} or fewer steps with --set schedule.total_steps=N."


def _dry_run(
    options: argparse.Namespace, wanted: Options, recipe: Recipe | None, plan: DeepSpeedPlan, run: RunDirectory,
    ranks: Ranks, console: Console,
) -> None:  # fmt: skip
    """Check what can be checked without training or building a store, and say what would run. Writes nothing."""
    from electra_ds.core import devices
    from electra_ds.data.token_store import TokenStore
    from electra_ds.pretraining import prepare
    from electra_ds.pretraining.objectives.base import Objective

    with ranks.together():
        beginning = _read_beginning(options, recipe) if recipe else None
        found = look_for_store(options, recipe, beginning.check_vocabulary if beginning else None) if recipe else None
        if recipe is None:
            job = prepare.prepare_resume(wanted, plan, run, ranks)
        elif isinstance(found, TokenStore):
            names = beginning.names if beginning else ()
            job = prepare.prepare_new(wanted, recipe, plan, found, run, ranks, names)
            if beginning:
                plan = replace(plan, notes=(*plan.notes, *beginning.notes(recipe, found.tokenizer)))
                job = replace(job, plan=plan)
        else:
            job = None
    if job is not None:
        job = prepare.with_fitting_micro_batch(job, wanted, ranks)
        prepare.announce(job, console)
        recipe, plan, vocab_size = job.recipe, job.plan, job.store.tokenizer.vocab_size
    else:
        assert recipe is not None
        assert isinstance(found, tuple)
        path, vocab_size = found
        plan = prepare.fitted(plan, recipe, vocab_size, wanted, ranks)
        prepare.show_run(
            recipe, Objective.of(recipe, vocab_size).parameter_counts(),
            f"data: the token store {path} would be built first",
            devices.shown_threads(
                devices.device_name(devices.device(ranks.launch)), devices.set_threads(wanted.threads, ranks.launch)
            ),
            plan, run, console, beginning.names if beginning else (),
        )  # fmt: skip
    steps = options.stop_at or recipe.schedule.total_steps
    say_dry_run(_run_time(options, recipe, plan, ranks, vocab_size), steps, console)


def _read_beginning(options: argparse.Namespace, recipe: Recipe) -> InitialWeights | None:
    """The weights of --init-from, whose tokenizer takes the place of one that is not given."""
    if not options.init_from:
        return None

    from electra_ds.interop.init_from import read_initial_weights

    beginning = read_initial_weights(options.init_from, recipe)
    if options.tokenizer is None and options.data is None:
        options.tokenizer = beginning.own_tokenizer()
    return beginning


def _begin(job: PretrainJob, beginning: InitialWeights) -> PretrainJob:
    """Make the weights the run's first checkpoint; returns the job with notes on what is not from them."""
    from electra_ds.interop.init_from import write_first_checkpoint

    tokenizer = job.store.tokenizer
    write_first_checkpoint(job, beginning.tensors(job.recipe, tokenizer))
    notes = (*job.plan.notes, *beginning.notes(job.recipe, tokenizer))
    return replace(job, plan=replace(job.plan, notes=notes))


def _run_path(options: argparse.Namespace, recipe: Recipe | None) -> Path:
    default = Path("runs") / f"{recipe.name if recipe else ''}-{datetime.now():%Y%m%d-%H%M%S}"
    path: Path = options.resume or options.run_dir or default
    return path


def check_arguments(options: argparse.Namespace) -> None:
    """Raise ConfigError if arguments cannot go together."""
    if options.resume is not None:
        new_run_only = ("recipe", "overrides", "seed", "init_from", *CORPUS_ARGUMENTS, "run_dir")
        given = [name for name in new_run_only if getattr(options, name) not in (None, [])]
        if given:
            flags = ", ".join("--" + name.replace("overrides", "set").replace("_", "-") for name in given)
            raise ConfigError(f"--resume takes recipe and data from the run, so {flags} cannot be given with it.")
        return
    check_seed(options)
    if options.init_from is not None and len(options.init_from) > 2:
        raise ConfigError(
            f"--init-from takes a generator and a discriminator, and {len(options.init_from)} models are given."
        )
    elif options.data is not None and gives_corpus(options):
        raise ConfigError("--data is a finished token store; give either it or --corpus and what belongs to that.")
