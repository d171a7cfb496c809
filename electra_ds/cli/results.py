"""`electra-ds report` and `electra-ds export`: what a run has come to."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from electra_ds.cli.arguments import add_command, wide_console
from electra_ds.cli.sweep import status_of_sweep
from electra_ds.core.errors import CheckpointError, ConfigError
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
    """The parser of `report`."""
    command = add_command(
        commands,
        "report",
        "Summarise a pretraining, a sweep, or the scores of finetunings over seeds and tasks.",
        _REPORT_EPILOG,
    )
    command.set_defaults(handler=_report)
    command.add_argument(
        "run", type=Path, nargs="+", metavar="RUN", help="run directories, finished or not, or a sweep's folder"
    )
    command.add_argument(
        "--data", type=Path, metavar="STORE", help="where a pretraining's token store is now, if it has moved"
    )
    scores = command.add_argument_group("for runs of bin/finetune")
    scores.add_argument(
        "--compare", nargs="+", action="extend", default=[], metavar="NAME",
        help="published rows to show beside them, such as mercier2021 and clark2020-small-owt; docs/glue-scores.md has "
        "the others",
    )  # fmt: skip
    scores.add_argument("--csv", type=Path, metavar="FILE", help="write every run's scores there")
    scores.add_argument("--submission", type=Path, metavar="FILE", help="write the zip for gluebenchmark.com there")


def add_export(commands: Commands) -> None:
    """The parser of `export`."""
    command = add_command(
        commands, "export", "Write a model as transformers folders, or a run for DeepSpeed.", _EXPORT_EPILOG
    )
    command.set_defaults(handler=_export)
    command.add_argument("run", type=Path, metavar="RUN", help="a run directory, or one of its checkpoints")
    command.add_argument(
        "--to", choices=("transformers", "deepspeed"), default="transformers",
        help="transformers (default): generator and discriminator, or a finetuned model with its head, to load with "
        "from_pretrained. deepspeed: a pretraining's weights and optimizer as DeepSpeed's own checkpoint",
    )  # fmt: skip
    command.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/export, or RUN/native for DeepSpeed")
    command.add_argument(
        "--ds-config", metavar="NAME|FILE", help="whose ZeRO stage and precision DeepSpeed gets (default: the run's)"
    )
    command.add_argument(
        "--encoder-only", action="store_true", help="of a finetuned model the encoder, to load with AutoModel"
    )


def _report(options: argparse.Namespace) -> None:
    from electra_ds.config.run_directory import RunDirectory

    given = [name for name in ("compare", "csv", "submission") if getattr(options, name)]
    if len(options.run) == 1 and (options.run[0] / "sweep.yaml").is_file() and not given and options.data is None:
        status_of_sweep(options.run[0], wide_console())
        return
    runs = [RunDirectory(path) for path in options.run]
    of_finetuning = [run for run in runs if run.kind() == "finetune"]
    if of_finetuning:
        if options.data is not None:
            raise ConfigError(
                f"--data is for a run of {command('pretrain')}, whose report draws samples from its store."
            )
        for run in runs:
            run.check_kind("finetune")

        from electra_ds.report.scores import report_scores

        report_scores(
            options.run, wide_console(), compare=options.compare, csv=options.csv, submission=options.submission
        )
        return
    if len(runs) > 1 or given:
        what = f"--{given[0]} is" if given else "several runs at a time are"
        raise ConfigError(
            f"{what} for runs of {command('finetune')}, and {runs[0].path} is one of {command('pretrain')}."
        )

    from rich.console import Console

    from electra_ds.report.run_report import report_run

    report_run(runs[0], Console(), options.data)


def _export(options: argparse.Namespace) -> None:
    is_finetuned = _is_finetuned(options.run)
    if options.encoder_only and not is_finetuned:
        raise ConfigError(
            f"--encoder-only is for runs of {command('finetune')}. The export of a pretraining has its encoder in "
            f"the folder discriminator."
        )
    if options.to == "deepspeed":
        if is_finetuned:
            raise ConfigError(
                f"--to deepspeed is for runs of {command('pretrain')}, and {options.run} is one of "
                f"{command('finetune')}."
            )
        _export_native(options)
        return
    if options.ds_config is not None:
        raise ConfigError("--ds-config is for --to deepspeed; transformers' folders know no DeepSpeed JSON.")
    if is_finetuned:
        from electra_ds.interop.export_finetuned import export_finetuned

        print(export_finetuned(options.run, options.out, encoder_only=options.encoder_only))
        return

    from electra_ds.interop.export import export_run

    print(export_run(options.run, options.out))


def _is_finetuned(run_or_checkpoint: Path) -> bool:
    from electra_ds.config.run_directory import RunDirectory

    try:
        return RunDirectory(run_or_checkpoint).kind() == "finetune"
    except CheckpointError:  # what is wrong with it, the export says
        return False


def _export_native(options: argparse.Namespace) -> None:
    from electra_ds.core.ranks import join_ranks
    from electra_ds.interop.export_deepspeed import export_deepspeed

    with join_ranks() as ranks:
        told = export_deepspeed(options.run, options.out, options.ds_config, ranks)
        if ranks.is_main:
            print(told)
