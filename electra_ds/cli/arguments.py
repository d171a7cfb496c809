"""The common part of the commands' parsers.

As in every module of `cli`, code that needs torch, numpy or another large package is imported inside the handlers, so
that --help and errors in arguments appear immediately.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from electra_ds.config.option import Options, add_options
from electra_ds.core.errors import did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    Commands: TypeAlias = argparse._SubParsersAction["Parser"]

OptionsT = TypeVar("OptionsT", bound=Options)
_NARROWEST = 80
_OF_A_FILE = 120


class Parser(argparse.ArgumentParser):
    """A parser that answers unknown arguments with the usage of their command, and with similar options."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Exit if the parser of a single command does not know an argument.

        It looks for unknown options first, because a required option that seems to be missing may only be misspelt.
        """
        words = sys.argv[1:] if args is None else args
        if self._subparsers is not None:
            return super().parse_known_args(words, namespace)
        known = self._option_string_actions
        before = [*itertools.takewhile(lambda word: word != "--", words)]
        unknown = [word for word in before if word.startswith("--") and word.partition("=")[0] not in known]
        if not unknown or {"-h", "--help"} & {*before}:
            namespace, unknown = super().parse_known_args(words, namespace)
        if unknown:
            shown = [name for name, action in known.items() if action.help != argparse.SUPPRESS]
            hints = [word + did_you_mean(word.partition("=")[0], shown) for word in unknown]
            self.error(f"unrecognized arguments: {' '.join(hints)}")
        return namespace, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Suggest the command that is meant by a misspelt one."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            known = ", ".join(action.choices)
            hint = did_you_mean(value, action.choices) or f"; the commands are {known}"
            raise argparse.ArgumentError(None, f"there is no command {value!r}{hint}")
        super()._check_value(action, value)


def add_command(commands: Commands, name: str, summary: str, epilog: str) -> Parser:
    """Add and return a parser whose --help shows the epilog unchanged."""
    command: Parser = commands.add_parser(
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
