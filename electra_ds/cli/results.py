"""Studies and the results of runs: `electra-ds sweep`, `report` and `export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from electra_ds.cli.arguments import add_handled, wide_console
from electra_ds.config.commands import ExportOptions, ReportOptions, SweepOptions
from electra_ds.core.errors import ConfigError
from electra_ds.core.program import command

if TYPE_CHECKING:
    from electra_ds.cli.arguments import Commands

_SWEEP_HELP = """\
examples:
  bin/sweep smoke
      a few minutes on a CPU: four small pretrainings, two at a time
  bin/sweep sweeps/glue_seeds.yaml --set finetune.model=runs/mini-20260101-120000 finetune.data_dir=glue/
      nine tasks, five seeds each, as many at once as fit on the machine
  bin/sweep glue_seeds --set finetune.model=google/electra-small-discriminator --dry-run
      list the trials that would run, and their cost
  bin/sweep glue_seeds --set finetune.model=RUN resources.gpus=0.25 --local
      one after the other, without Ray
  bin/sweep --resume runs/sweep-glue-seeds
      run the missing trials after a kill or a failure
  bin/sweep --resume runs/sweep-glue-seeds --set finetune.seeds=[0,1,2,3,4,5,6,7,8,9]
      run only the new seeds
  bin/sweep status runs/sweep-glue-seeds
  bin/report runs/sweep-glue-seeds

A sweep is a YAML file that says what its trials run, what varies between them, and which resources a trial gets. See
docs/sweeps.md.
"""
_EXPORT_HELP = """\
examples:
  bin/export runs/tiny-20260101-120000 --out my-electra
      then: AutoModel.from_pretrained("my-electra/discriminator")
  bin/export runs/mrpc-original-s0-20260101-120000 --out my-mrpc
      a run of bin/finetune; then: pipeline("text-classification", model="my-mrpc")
  bin/export runs/mrpc-rc2020-s0-20260101-120000 --encoder-only
      without its head: transformers has no class for heads with mean pooling
  bin/export runs/tiny-20260101-120000 --push-to-hub me/my-electra --license apache-2.0 --language en
      uploads me/my-electra-discriminator and me/my-electra-generator; first: hf auth login
  bin/export runs/tiny-20260101-120000 --to deepspeed --ds-config my_zero2.json --out native
      then: engine.load_checkpoint("native") in a DeepSpeed script with our model; see native/README.md
  torchrun --nproc_per_node 4 bin/export runs/tiny-20260101-120000 --to deepspeed --ds-config my_zero2.json --out native
      the same for 4 ranks; DeepSpeed then needs 4 ranks to load it
"""
_REPORT_HELP = """\
examples:
  bin/report runs/tiny-20260101-120000
      a pretraining: table, curves, sample sentences
  bin/report runs/mrpc-rc2020-s* runs/cola-rc2020-s*
      finetunings: mean and standard deviation of each task over its seeds, AVG and GLUE
  bin/report runs/*-rc2020-s0-* --submission glue.zip
  bin/report runs/sweep-glue-seeds
      a sweep: its tables and plots, as in bin/sweep status; its individual runs are in runs/sweep-glue-seeds/runs/
"""


def add_results(commands: Commands) -> None:
    """Add the parsers of `sweep`, `report` and `export`."""
    add_handled(commands, "sweep", SweepOptions, _SWEEP_HELP, _sweep)
    add_handled(commands, "report", ReportOptions, _REPORT_HELP, _report)
    add_handled(commands, "export", ExportOptions, _EXPORT_HELP, _export)


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
        sweep,
        folder,
        overrides=overrides,
        retry_failed=bool(options.retry_failed),
        local=bool(options.local),
        address=options.address,
        time_limit_s=options.time_limit,
    )
    print_report(outcome.report.parts, console)
    if not outcome.is_complete:
        raise SystemExit(1)


def _report(options: ReportOptions) -> None:
    from electra_ds.api.reports import report_runs
    from electra_ds.api.run import Run
    from electra_ds.report.tables import print_report

    given = [name for name in ("compare", "csv", "submission") if getattr(options, name)]
    is_sweep = len(options.run) == 1 and (options.run[0] / "sweep.yaml").is_file()
    runs = [] if is_sweep else [Run(path) for path in options.run]
    if is_sweep or any(run.kind == "finetune" for run in runs):
        if options.data is not None:
            raise ConfigError(
                f"--data is for a run of {command('pretrain')}, whose report draws samples from its store."
            )
        found = report_runs(options.run, compare=options.compare or (), csv=options.csv, submission=options.submission)
    elif len(runs) > 1 or given:
        what = f"--{given[0]} is" if given else "several runs at a time are"
        raise ConfigError(
            f"{what} for runs of {command('finetune')}, but {runs[0].path} is a run of {command('pretrain')}."
        )
    else:
        found = runs[0].report(options.data)
    print_report(found.parts, wide_console())


def _export(options: ExportOptions) -> None:
    from electra_ds.api.export import run_export

    if told := run_export(options):
        print(told)
