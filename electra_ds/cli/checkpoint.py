"""`electra-ds checkpoint`: list, verify and prune a run's checkpoints, and import native DeepSpeed checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from electra_ds.cli.arguments import add_command, add_handled, wide_console
from electra_ds.config.commands import ImportOptions, ListOptions, PruneOptions, VerifyOptions
from electra_ds.core.errors import CheckpointError
from electra_ds.core.program import command

if TYPE_CHECKING:
    from electra_ds.cli.arguments import Commands

_EPILOG = """\
examples:
  bin/checkpoint ls runs/tiny-20260101-120000
  bin/checkpoint verify runs/tiny-20260101-120000
  bin/checkpoint prune runs/tiny-20260101-120000 --keep 1
  bin/checkpoint import their_checkpoint/ --run-dir runs/theirs --ds-config cpu --recipe their_recipe.yaml \\
      --data stores/theirs
  bin/checkpoint import --help
"""
_IMPORT_EPILOG = """\
examples:
  bin/checkpoint import out/ --run-dir runs/back --ds-config ds_configs/rtx3090-24gb.json
      one of our exports (bin/export --to deepspeed), perhaps trained further elsewhere, with its run's recipe and data
  bin/checkpoint import theirs/global_step40 --run-dir runs/theirs --ds-config cpu --recipe electra-small \\
      --set schedule.total_steps=100000 --data stores/theirs
      a checkpoint of another script; its ZeRO stage and number of ranks may differ from those here
  bin/pretrain --resume runs/theirs

NATIVE is a folder written by DeepSpeed's engine.save_checkpoint, or converted from one by its ds_to_universal: the
folder with the file `latest` or `latest_universal`, or one of its tag folders. Its parameters must be named as in
electra_ds's joint module, or as in a joint module of transformers' ElectraForMaskedLM and ElectraForPreTraining. These
files are pickles; only tensors and numbers are loaded from them, and no code in them is run.
"""
_LS_EPILOG = """\
examples:
  bin/checkpoint ls runs/tiny-20260101-120000
  bin/checkpoint ls runs/tiny-20260101-120000 --json | jq '.[-1].step'

`ls` only checks sizes; `verify` reads every byte.
"""
_VERIFY_EPILOG = """\
examples:
  bin/checkpoint verify runs/tiny-20260101-120000
  bin/checkpoint verify runs/tiny-20260101-120000/checkpoints/latest

The exit status is 0 if all checkpoints are complete, and 2 otherwise.
"""
_PRUNE_EPILOG = """\
examples:
  bin/checkpoint prune runs/tiny-20260101-120000 --keep 1 --dry-run
  bin/checkpoint prune runs/tiny-20260101-120000 --keep 1 --damaged

The newest complete checkpoint is always kept. Copies that you made under other names are never removed.
"""


def add_checkpoint(commands: Commands) -> None:
    """Add the parser of `checkpoint` and its actions."""
    parser = add_command(
        commands, "checkpoint", "List, verify and prune a run's checkpoints, or import one from DeepSpeed.", _EPILOG
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_handled(actions, "ls", ListOptions, _LS_EPILOG, _ls)
    add_handled(actions, "verify", VerifyOptions, _VERIFY_EPILOG, _verify)
    add_handled(actions, "prune", PruneOptions, _PRUNE_EPILOG, _prune)
    add_handled(actions, "import", ImportOptions, _IMPORT_EPILOG, _import)


def _import(options: ImportOptions) -> None:
    from electra_ds.api.export import run_import

    print(run_import(options))


def _ls(options: ListOptions) -> None:
    from datetime import datetime

    from rich.markup import escape
    from rich.table import Table

    from electra_ds.api.run import Run
    from electra_ds.core.terminal import say_command
    from electra_ds.training.checkpoints import damaged_checkpoints

    found = Run(options.run).list_checkpoints()
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
        tokens = "" if checkpoint.tokens is None else _scaled(checkpoint.tokens).rstrip()
        known = (checkpoint.precision, checkpoint.stage, checkpoint.ranks)
        state = f"[red]damaged: {escape(checkpoint.problem)}[/]" if checkpoint.problem else "complete"
        cells = ("" if value is None else escape(str(value)) for value in known)
        table.add_row(checkpoint.name, tokens, saved, f"{_scaled(checkpoint.bytes)}B", *cells, state)
    console.print(table if found else "No checkpoint yet.")
    aside = damaged_checkpoints(options.run)
    if aside:
        remove = f"{command('checkpoint')} prune {options.run} --damaged"
        say_command(console, f"{len(aside)} set aside as damaged. To remove them:", remove)


def _verify(options: VerifyOptions) -> None:
    from rich.markup import escape

    from electra_ds.api.run import Run

    console = wide_console()
    with console.status("reading the checkpoints …"):
        found = Run(options.run).verify_checkpoints()
    for path, problem in found.items():
        state = "complete" if problem is None else "[red]damaged[/]"
        console.print(f"{escape(path.name)}: {state}", highlight=False)
    wrong = list(filter(None, found.values()))
    if wrong:
        told = "\n  ".join(wrong)
        rest = "A resumed run uses the newest complete one and sets these aside." if len(wrong) < len(found) else ""
        raise CheckpointError(f"{len(wrong)} of {len(found)} checkpoint(s) damaged:\n  {told}\n{rest}".rstrip())


def _prune(options: PruneOptions) -> None:
    from electra_ds.api.run import Run

    console = wide_console()
    verb = "would remove" if options.dry_run else "removed"
    run, dry_run = Run(options.run), bool(options.dry_run)
    found = run.prune_checkpoints(options.keep, damaged=bool(options.damaged), dry_run=dry_run)
    for path, why in found.items():
        console.print(f"{verb} {path.name} ({why})", highlight=False, markup=False)
    if not found:
        console.print("Nothing to remove.")


def _scaled(number: int) -> str:
    """Return a number in the unit of its size, such as 3.1 M."""
    size, unit = next((each for each in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if number >= each[0]), (1, ""))
    return f"{number / size:.{1 if unit else 0}f} {unit}"
