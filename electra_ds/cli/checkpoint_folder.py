"""`electra-ds checkpoint ls`, `verify` and `prune`: a run's checkpoints as they lie on the disk."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from electra_ds.cli.arguments import add_command, positive, wide_console
from electra_ds.core.errors import CheckpointError
from electra_ds.core.program import command

if TYPE_CHECKING:
    from electra_ds.cli.arguments import Commands

_LS_EPILOG = """\
examples:
  bin/checkpoint ls runs/tiny-20260101-120000
  bin/checkpoint ls runs/tiny-20260101-120000 --json | jq '.[-1].step'

Only sizes are looked at here; `verify` reads every byte.
"""
_VERIFY_EPILOG = """\
examples:
  bin/checkpoint verify runs/tiny-20260101-120000
  bin/checkpoint verify runs/tiny-20260101-120000/checkpoints/latest

The exit status is 0 where all of them are whole, and 2 where one is not.
"""
_PRUNE_EPILOG = """\
examples:
  bin/checkpoint prune runs/tiny-20260101-120000 --keep 1 --dry-run
  bin/checkpoint prune runs/tiny-20260101-120000 --keep 1 --damaged

The newest whole checkpoint always stays. A copy that you keep under a name of your own is never touched.
"""


def add_ls(actions: Commands) -> None:
    """The parser of `checkpoint ls`."""
    action = add_command(actions, "ls", "List a run's checkpoints.", _LS_EPILOG)
    action.set_defaults(handler=_ls)
    action.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    action.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")


def add_verify(actions: Commands) -> None:
    """The parser of `checkpoint verify`."""
    action = add_command(actions, "verify", "Read every byte of checkpoints and compare hashes.", _VERIFY_EPILOG)
    action.set_defaults(handler=_verify)
    action.add_argument("run", type=Path, metavar="RUN|CHECKPOINT", help="a run directory, or one of its checkpoints")


def add_prune(actions: Commands) -> None:
    """The parser of `checkpoint prune`."""
    action = add_command(actions, "prune", "Remove old checkpoints and what killed saves left behind.", _PRUNE_EPILOG)
    action.set_defaults(handler=_prune)
    action.add_argument("run", type=Path, metavar="RUN", help="a run directory that nobody trains in")
    action.add_argument("--keep", type=positive, metavar="N", help="how many stay (default: as many as the run keeps)")
    action.add_argument("--damaged", action="store_true", help="also those that were set aside as damaged")
    action.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")


def _ls(options: argparse.Namespace) -> None:
    from datetime import datetime

    from rich.markup import escape
    from rich.table import Table

    from electra_ds.core.terminal import say_command
    from electra_ds.training.checkpoints import listed, set_aside

    found = listed(options.run)
    console = wide_console()
    if options.json:
        console.print_json(data=[checkpoint._asdict() for checkpoint in found])
        return
    table = Table("checkpoint", box=None, pad_edge=False)
    for column in ("tokens", "saved", "size", "precision", "ZeRO", "ranks"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("state")
    for checkpoint in found:
        saved = "" if checkpoint.saved is None else f"{datetime.fromisoformat(checkpoint.saved).astimezone():%m-%d %R}"
        tokens = "" if checkpoint.tokens is None else f"{checkpoint.tokens / 1e6:,.1f} M"
        known = (checkpoint.precision, checkpoint.stage, checkpoint.ranks)
        state = f"[red]damaged: {escape(checkpoint.problem)}[/]" if checkpoint.problem else "complete"
        cells = ("" if value is None else escape(str(value)) for value in known)
        table.add_row(checkpoint.name, tokens, saved, _size(checkpoint.bytes), *cells, state)
    console.print(table if found else "No checkpoint yet.")
    aside = set_aside(options.run)
    if aside:
        remove = f"{command('checkpoint')} prune {options.run} --damaged"
        say_command(console, f"{len(aside)} set aside as damaged. To remove them:", remove)


def _verify(options: argparse.Namespace) -> None:
    from rich.markup import escape

    from electra_ds.training.checkpoints import to_verify, verify

    console = wide_console()
    paths = to_verify(options.run)
    wrong = []
    for path in paths:
        try:
            with console.status(f"reading {escape(path.name)} …"):
                problem = verify(path)
        except FileNotFoundError:
            console.print(f"{path.name}: pruned meanwhile", highlight=False, markup=False)
            continue
        if problem is None:
            console.print(f"{path.name}: whole", highlight=False, markup=False)
        else:
            wrong.append(problem)
            console.print(f"[red]{escape(path.name)}: damaged[/]", highlight=False)
    if wrong:
        told = "\n  ".join(wrong)
        rest = "A resumed run takes the newest complete one and sets these aside." if len(wrong) < len(paths) else ""
        raise CheckpointError(f"{len(wrong)} of {len(paths)} checkpoint(s) damaged:\n  {told}\n{rest}".rstrip())


def _prune(options: argparse.Namespace) -> None:
    from electra_ds.training.checkpoints import prune

    console = wide_console()
    verb, count = "would remove" if options.dry_run else "removing", 0
    for path, why in prune(options.run, options.keep, damaged=options.damaged, dry=options.dry_run):
        console.print(f"{verb} {path.name} ({why})", highlight=False, markup=False)
        count += 1
    if not count:
        console.print("Nothing to remove.")


def _size(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 10**9 else f"{number / 1e6:.1f} MB"
