"""The command `doctor`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from electra_ds.cli.arguments import add_handled
from electra_ds.config.tool_options import DoctorOptions

if TYPE_CHECKING:
    from electra_ds.cli.arguments import Commands

_EPILOG = """\
example:
  bin/doctor
      versions, memory, GPUs, and one real training step in each precision; exit status 0 if pretraining can run
"""


def add_doctor(commands: Commands) -> None:
    """Add the parser of `doctor`."""
    add_handled(commands, "doctor", DoctorOptions, _EPILOG, _doctor)


def _doctor(options: DoctorOptions) -> None:
    from rich.console import Console

    from electra_ds.pretraining.doctor import doctor

    sys.exit(doctor(Console(), as_json=bool(options.json)))
