"""`electra-ds sweep`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from electra_ds.cli import finetune, pretrain
from electra_ds.cli.arguments import add_command, duration_s, wide_console
from electra_ds.config.shipped import SWEEPS, shipped_names
from electra_ds.core.errors import ConfigError, DataError
from electra_ds.core.program import command

if TYPE_CHECKING:
    from rich.console import Console

    from electra_ds.cli.arguments import Commands
    from electra_ds.config.run_record import TaskSource

_EPILOG = """\
examples:
  bin/sweep smoke
      a few minutes on a CPU: four small pretrainings, two at a time
  bin/sweep sweeps/glue_seeds.yaml --set finetune.model=runs/mini-20260101-120000 finetune.data_dir=glue/
      nine tasks, five seeds each, as many at once as fit on the machine
  bin/sweep glue_seeds --set finetune.model=google/electra-small-discriminator --dry-run
      list what would run, and what it would cost
  bin/sweep glue_seeds --set finetune.model=RUN resources.gpus=0.25 --local
      one after the other, without Ray
  bin/sweep --resume runs/sweep-glue-seeds
      what is missing, after a kill or a failure
  bin/sweep --resume runs/sweep-glue-seeds --set finetune.seeds=[0,1,2,3,4,5,6,7,8,9]
      the new seeds alone
  bin/sweep status runs/sweep-glue-seeds
  bin/report runs/sweep-glue-seeds

A sweep is a YAML file: what its trials run, what varies over them, and what one trial gets. docs/sweeps.md explains it.
"""


def add_sweep(commands: Commands) -> None:
    """The parser of `sweep`."""
    command = add_command(commands, "sweep", "Run a study: one command over seeds, tasks, hyperparameters.", _EPILOG)
    command.set_defaults(handler=_sweep)
    command.add_argument(
        "what", nargs="*", metavar="NAME|FILE", help=f"{', '.join(shipped_names(SWEEPS))}, or a YAML file; status DIR"
    )
    command.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change the file, e.g. --set finetune.model=RUN finetune.seeds=[0,1] resources.gpus=0.5",
    )  # fmt: skip
    command.add_argument("--out", type=Path, metavar="DIR", help="where it lives (default: runs/sweep-NAME)")
    command.add_argument("--resume", type=Path, metavar="DIR", help="run what is missing in this sweep")
    command.add_argument("--retry-failed", action="store_true", help="with --resume: those that failed too")
    command.add_argument("--dry-run", action="store_true", help="list the trials and what they cost, and run nothing")
    how = command.add_argument_group("where to run it")
    how.add_argument("--local", action="store_true", help="one trial after the other, without Ray")
    how.add_argument("--address", metavar="ADDRESS", help="a Ray cluster: auto, or HOST:6379")
    how.add_argument("--storage", metavar="DIR|URI", help="where Tune keeps its records (default: DIR/tune)")
    how.add_argument("--time-limit", type=duration_s, metavar="TIME", help="save and leave after this time")


class _Strict(argparse.ArgumentParser):
    """Raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


@cache
def _strict_parser() -> argparse.ArgumentParser:
    parser = _Strict(prog="electra-ds")
    commands: Commands = parser.add_subparsers(dest="command")  # type: ignore[assignment]  # of strict parsers
    pretrain.add_pretrain(commands)
    finetune.add_finetune(commands)
    return parser


def check_arguments(stage: str, arguments: Sequence[str]) -> None:
    """Return whether a command takes these arguments and finds its examples. Raises ConfigError or DataError if not."""
    try:
        options = _strict_parser().parse_args([stage, *arguments])
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    if stage == "pretrain":
        pretrain.check_arguments(options)
        return
    finetune.check_arguments(options)
    if problem := _examples_problem(options.task, finetune.task_source(options)):
        raise DataError(problem)


@cache
def _examples_problem(task: str | None, source: TaskSource) -> str:
    """What is wrong with examples on this machine: nobody is to find out after a night that one task's are missing."""
    from electra_ds.finetuning.loaded_task import load_task

    if source.folder is None and source.train is None:
        return ""
    try:
        load_task(task, source)
    except (ConfigError, DataError) as error:
        return str(error)
    return ""


def _sweep(options: argparse.Namespace) -> None:
    _check(options)
    console = wide_console()
    if options.what[:1] == ["status"]:
        status_of_sweep(Path(options.what[1]), console)
        return
    sweep, folder = (options.what[0], options.out) if options.resume is None else (None, options.resume)
    if options.dry_run:
        from electra_ds.sweep.forecast import plan_sweep

        plan_sweep(
            sweep, folder, overrides=options.overrides, local=options.local, address=options.address,
            check=check_arguments, console=console,
        )  # fmt: skip
        return

    from electra_ds.sweep.run import run_sweep

    outcome = run_sweep(
        sweep, folder, overrides=options.overrides, retry_failed=options.retry_failed, local=options.local,
        address=options.address, storage=options.storage, time_limit_s=options.time_limit, check=check_arguments,
        console=console,
    )  # fmt: skip
    if not outcome.is_complete:
        raise SystemExit(1)


def _check(options: argparse.Namespace) -> None:
    """Raise ConfigError if arguments cannot go together."""
    if options.what[:1] == ["status"]:
        others = (options.overrides, options.out, options.resume, options.retry_failed, options.dry_run, options.local)
        if len(options.what) != 2 or any(others) or options.address or options.storage or options.time_limit:
            raise ConfigError(f"Say which sweep, and nothing else: {command('sweep')} status DIR")
        return
    if options.retry_failed and options.resume is None:
        raise ConfigError("--retry-failed is for --resume.")
    if (options.resume is None) == (not options.what) or len(options.what) > 1:
        raise ConfigError("Give one sweep to run, by name or file, or --resume DIR to continue one.")
    if options.resume is not None and options.out is not None:
        raise ConfigError("--resume names the sweep's folder, so leave out --out.")
    if options.local and (options.address or options.storage):
        raise ConfigError("--local runs without Ray, so leave out --address and --storage.")


def status_of_sweep(path: Path, console: Console) -> None:
    """Print what a sweep has come to so far, and write its tables and pictures; its inputs may be gone by now."""
    from electra_ds.sweep.folder import SweepFolder
    from electra_ds.sweep.results import report_sweep
    from electra_ds.sweep.trials import expand

    folder = SweepFolder(path)
    spec = folder.read()
    trials = [*expand(spec, None), *folder.suggested_before(spec)]
    report_sweep(folder, trials, spec, console, is_running=folder.is_being_run())
