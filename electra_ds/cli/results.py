"""`electra-ds report` and `electra-ds export`: what a run has come to."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from electra_ds.cli.arguments import add_command

if TYPE_CHECKING:
    from electra_ds.cli.arguments import Commands

_EXPORT_EPILOG = """\
example:
  bin/export runs/tiny-20260101-120000 --out my-electra
      then: AutoModel.from_pretrained("my-electra/discriminator")
"""


def add_report(commands: Commands) -> None:
    """The parser of `report`."""
    command = add_command(
        commands, "report", "Summarise a run: table, curves, sample sentences.", "example:\n  bin/report runs/tiny-…\n"
    )
    command.set_defaults(handler=_report)
    command.add_argument("run", type=Path, metavar="RUN", help="a run directory, finished or not")


def add_export(commands: Commands) -> None:
    """The parser of `export`."""
    command = add_command(
        commands, "export", "Write generator and discriminator as transformers folders.", _EXPORT_EPILOG
    )
    command.set_defaults(handler=_export)
    command.add_argument("run", type=Path, metavar="RUN", help="a run directory, or one of its checkpoints")
    command.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/export")


def _report(options: argparse.Namespace) -> None:
    from rich.console import Console

    from electra_ds.config.manifest import RunDirectory
    from electra_ds.report.run_report import report_run

    report_run(RunDirectory(options.run), Console())


def _export(options: argparse.Namespace) -> None:
    from electra_ds.train.export import export_run

    print(export_run(options.run, options.out))
