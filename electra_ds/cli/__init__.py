"""The parser behind every bin/ script and the `electra-ds` command.

Each module has a function that adds the parsers of its commands, and the handlers that run them.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from electra_ds import __version__
from electra_ds.cli.arguments import Parser
from electra_ds.cli.checkpoint import add_checkpoint
from electra_ds.cli.preparing import add_preparing
from electra_ds.cli.results import add_results
from electra_ds.cli.training import add_training
from electra_ds.core.errors import ConfigError, ElectraError, FailedElsewhereError, InterruptedBySignalError
from electra_ds.core.launcher import Launch, detect
from electra_ds.core.program import as_called, command, missing_package

if TYPE_CHECKING:
    from electra_ds.cli.arguments import Commands

Add = Callable[["Commands"], None]
COMMANDS: tuple[Add, ...] = (add_training, add_results, add_preparing, add_checkpoint)


def build_parser(adds: Sequence[Add] = COMMANDS) -> Parser:
    """Return the parser of the complete command line. adds: functions that add the parsers of some commands."""
    parser = Parser(prog="electra-ds", description="Pretrain ELECTRA text encoders with DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"electra_ds {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in adds:
        add(commands)
    _name_as_called(parser)
    return parser


def _name_as_called(parser: argparse.ArgumentParser, name: str = "") -> None:
    """Make usage, help and examples show every command in the style in which this process was called."""
    for group in parser._action_groups:
        group.title = as_called(group.title or "")
    for action in parser._actions:
        if action.help:
            action.help = as_called(action.help)
        if isinstance(action, argparse._SubParsersAction):
            for below, subparser in action.choices.items():
                subparser.prog = command(f"{name} {below}".lstrip())
                subparser.epilog = as_called(subparser.epilog or "")
                _name_as_called(subparser, f"{name} {below}".lstrip())


def main(arguments: Sequence[str] | None = None, adds: Sequence[Add] = COMMANDS) -> None:
    """Run a command line, and turn our errors into one message and an exit status (2; 128 + N after signal N).

    The first rank of a node prints an error that all its ranks hit; a rank prints an error that only it hit.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without → must not end a run
    try:
        launch = detect(os.environ)
        speaks = launch.local_rank == 0
    except ConfigError as error:
        print(f"electra-ds: {error}", file=sys.stderr)
        sys.exit(2)
    with contextlib.nullcontext() if speaks else contextlib.redirect_stderr(io.StringIO()):
        parser = build_parser(adds)
        words = [*(sys.argv[1:] if arguments is None else arguments)]
        if not words:
            parser.print_help(sys.stderr)
            sys.exit(2)
        if adds is COMMANDS and words[0] == "bench":
            parser.error("the installed package has no benchmarks: run bin/bench in a checkout of the repository")
        options = parser.parse_args(words)
    try:
        with _log_on_terminal(speaks):
            options.handler(options)
    except FailedElsewhereError:
        _leave(2, launch)
    except InterruptedBySignalError as stop:
        if speaks:
            print(stop, file=sys.stderr)
        _end_by(stop.signum, launch)
    except ElectraError as error:
        if speaks or error.rank is not None:
            where = f" (rank {error.rank})" if error.rank else ""
            print(f"electra-ds {options.command}{where}: {error}", file=sys.stderr)
        _leave(2, launch)
    except KeyboardInterrupt:
        if speaks:
            print("Interrupted.", file=sys.stderr)
        _end_by(signal.SIGINT, launch)
    except Exception as error:
        if launch.world_size == 1:
            raise  # __main__ reports a missing package
        if isinstance(error, ModuleNotFoundError) and (told := missing_package(error)) is not None:
            if speaks:
                print(told, file=sys.stderr)
            _leave(1, launch)
        sys.excepthook(*sys.exc_info())
        _leave(1, launch)


@contextlib.contextmanager
def _log_on_terminal(speaks: bool) -> Iterator[None]:
    """Show the package's log messages on the first rank of a node."""
    from rich.console import Console

    from electra_ds.core.terminal import log_shown_on

    log = logging.getLogger("electra_ds")
    before, log.propagate = log.propagate, False  # a library that sets up logging would print everything twice
    try:
        with log_shown_on(Console(quiet=not speaks)):
            yield
    finally:
        log.propagate = before


def _end_by(signum: int, launch: Launch) -> NoReturn:
    """Exit after a signal.

    After Ctrl-C without a launcher Python terminates itself with the signal, since a loop in a shell script would
    continue after a program that exits with a status.
    """
    if signum == signal.SIGINT and launch.launcher == "none":
        sys.excepthook = lambda *error: None  # the message has been shown
        raise KeyboardInterrupt
    _leave(128 + signum, launch)


def _leave(status: int, launch: Launch) -> NoReturn:
    """Exit after an error, when other ranks may be gone or may never have started.

    A process group that was not closed has its own threads. Python may abort if it exits while one of them is active
    (2 of 300 exits of two ranks on busy cores), so only the exit functions run.
    """
    if launch.world_size > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
