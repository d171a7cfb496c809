"""The command `doctor`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from electra_ds.cli.arguments import add_command

if TYPE_CHECKING:
    from electra_ds.cli.arguments import Commands

_EPILOG = """\
example:
  bin/doctor
      versions, memory, GPUs, and one real training step in each precision; exit status 0 if pretraining can run
"""


def add_doctor(commands: Commands) -> None:
    """Add the parser of `doctor`."""
    description = "Report whether this machine can pretrain, and how to fix what is wrong."
    command = add_command(commands, "doctor", description, _EPILOG)
    command.set_defaults(handler=_doctor)
    command.add_argument("--json", action="store_true", help="print the report as JSON")


def _doctor(options: argparse.Namespace) -> None:
    from rich.console import Console

    from electra_ds.pretraining.doctor import doctor

    sys.exit(doctor(Console(), as_json=options.json))
