"""The common part of the commands' parsers.

As in every module of `cli`, code that needs torch, numpy or another large package is imported inside the handlers, so
that --help and errors in arguments appear immediately.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from electra_ds.config.option import Options, add_options

if TYPE_CHECKING:
    from rich.console import Console

    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]

OptionsT = TypeVar("OptionsT", bound=Options)
_NARROWEST = 80
_OF_A_FILE = 120


def add_command(commands: Commands, name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    """Add and return a parser whose --help shows the epilog unchanged."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return command


def add_handled(
    commands: Commands, name: str, kind: type[OptionsT], epilog: str, handler: Callable[[OptionsT], None]
) -> None:
    """Add the parser of a command. handler: runs the command with its checked options."""

    def handle(arguments: argparse.Namespace) -> None:
        options = kind.parsed(arguments)
        options.check()
        handler(options)

    parser = add_command(commands, name, kind.__doc__ or "", epilog)
    parser.set_defaults(handler=handle)
    add_options(parser, kind)


def wide_console() -> Console:
    """Return a console with at least the columns that our tables need, and more if the output is a file."""
    from rich.console import Console

    console = Console()
    least = _NARROWEST if console.is_terminal or "COLUMNS" in os.environ else _OF_A_FILE
    return console if console.width >= least else Console(width=least)
