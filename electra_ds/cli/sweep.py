"""`electra-ds sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from electra_ds.cli.arguments import add_handled, wide_console
from electra_ds.config.tool_options import SweepOptions

if TYPE_CHECKING:
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
    from electra_ds.report.tables import print_report

    console = wide_console()
    if options.what[:1] == ["status"]:
        from electra_ds.api.reports import report_of_sweep

        print_report(report_of_sweep(Path(options.what[1])).parts, console)
        return
    sweep, folder = (options.what[0], options.out) if options.resume is None else (None, options.resume)
    overrides = options.overrides or ()
    if options.dry_run:
        from electra_ds.api.reports import plan_sweep

        planned = plan_sweep(sweep, folder, overrides=overrides, local=bool(options.local), address=options.address)
        print_report(planned, console)
        return

    from electra_ds.api.reports import run_sweep

    outcome = run_sweep(
        sweep, folder, overrides=overrides, retry_failed=bool(options.retry_failed), local=bool(options.local),
        address=options.address, time_limit_s=options.time_limit, console=console,
    )  # fmt: skip
    if not outcome.is_complete:
        raise SystemExit(1)
