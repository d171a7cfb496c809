"""`electra-ds report` and `electra-ds export`: what a run has come to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from electra_ds.cli.arguments import add_handled, wide_console
from electra_ds.config.tool_options import ExportOptions, ReportOptions
from electra_ds.core.errors import ConfigError
from electra_ds.core.program import command

if TYPE_CHECKING:
    from electra_ds.cli.arguments import Commands

_EXPORT_EPILOG = """\
examples:
  bin/export runs/tiny-20260101-120000 --out my-electra
      then: AutoModel.from_pretrained("my-electra/discriminator")
  bin/export runs/mrpc-original-s0-20260101-120000 --out my-mrpc
      a run of bin/finetune; then: pipeline("text-classification", model="my-mrpc")
  bin/export runs/mrpc-rc2020-s0-20260101-120000 --encoder-only
      without its head, which transformers cannot hold where it pools by the mean
  bin/export runs/tiny-20260101-120000 --to deepspeed --ds-config my_zero2.json --out native
      then: engine.load_checkpoint("native") in a DeepSpeed script around our model; native/README.md shows one
  torchrun --nproc_per_node 4 bin/export runs/tiny-20260101-120000 --to deepspeed --ds-config my_zero2.json --out native
      the same for 4 ranks, which DeepSpeed then needs to load it
"""
_REPORT_EPILOG = """\
examples:
  bin/report runs/tiny-20260101-120000
      a pretraining: table, curves, sample sentences
  bin/report runs/mrpc-rc2020-s* runs/cola-rc2020-s*
      finetunings: mean and standard deviation of each task over its seeds, AVG and GLUE
  bin/report runs/*-rc2020-s0-* --submission glue.zip
  bin/report runs/sweep-glue-seeds
      a sweep: its tables and pictures, as bin/sweep status shows them; its single runs are runs/sweep-glue-seeds/runs/*
"""


def add_report(commands: Commands) -> None:
    """Add the parser of `report`."""
    add_handled(commands, "report", ReportOptions, _REPORT_EPILOG, _report)


def add_export(commands: Commands) -> None:
    """Add the parser of `export`."""
    add_handled(commands, "export", ExportOptions, _EXPORT_EPILOG, _export)


def _report(options: ReportOptions) -> None:
    from electra_ds.api.reports import report_runs
    from electra_ds.config.run_directory import RunDirectory
    from electra_ds.report.tables import print_report

    given = [name for name in ("compare", "csv", "submission") if getattr(options, name)]
    is_sweep = len(options.run) == 1 and (options.run[0] / "sweep.yaml").is_file()
    runs = [] if is_sweep else [RunDirectory(path) for path in options.run]
    if is_sweep or any(run.kind() == "finetune" for run in runs):
        if options.data is not None:
            raise ConfigError(
                f"--data is for a run of {command('pretrain')}, whose report draws samples from its store."
            )
        found = report_runs(options.run, compare=options.compare or (), csv=options.csv, submission=options.submission)
        print_report(found.parts, wide_console())
        return
    if len(runs) > 1 or given:
        what = f"--{given[0]} is" if given else "several runs at a time are"
        raise ConfigError(
            f"{what} for runs of {command('finetune')}, and {runs[0].path} is one of {command('pretrain')}."
        )

    from rich.console import Console

    from electra_ds.report.run_report import report_run

    report_run(runs[0], Console(), options.data)


def _export(options: ExportOptions) -> None:
    from electra_ds.api.export import exported

    if told := exported(options):
        print(told)
