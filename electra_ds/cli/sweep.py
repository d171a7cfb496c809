"""`electra-ds sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from electra_ds.cli.arguments import add_handled, wide_console
from electra_ds.config.tool_options import SweepOptions

if TYPE_CHECKING:
    from rich.console import Console

    from electra_ds.cli.arguments import Commands

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
    """Add the parser of `sweep`."""
    add_handled(commands, "sweep", SweepOptions, _EPILOG, _sweep)


def _sweep(options: SweepOptions) -> None:
    console = wide_console()
    if options.what[:1] == ["status"]:
        status_of_sweep(Path(options.what[1]), console)
        return
    sweep, folder = (options.what[0], options.out) if options.resume is None else (None, options.resume)
    overrides = options.overrides or ()
    if options.dry_run:
        from electra_ds.sweep.forecast import plan_sweep

        plan_sweep(
            sweep, folder, overrides=overrides, local=bool(options.local), address=options.address, console=console
        )
        return

    from electra_ds.sweep.run import run_sweep

    outcome = run_sweep(
        sweep, folder, overrides=overrides, retry_failed=bool(options.retry_failed), local=bool(options.local),
        address=options.address, storage=options.storage, time_limit_s=options.time_limit, console=console,
    )  # fmt: skip
    if not outcome.is_complete:
        raise SystemExit(1)


def status_of_sweep(path: Path, console: Console) -> None:
    """Print what a sweep has come to so far, and write its tables and pictures; its inputs may be gone by now."""
    from electra_ds.sweep.folder import SweepFolder
    from electra_ds.sweep.results import report_sweep
    from electra_ds.sweep.trials import expand

    folder = SweepFolder(path)
    spec = folder.read()
    trials = [*expand(spec, None), *folder.suggested_before(spec)]
    report_sweep(folder, trials, spec, console, is_running=folder.is_being_run())
