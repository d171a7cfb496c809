"""What the commands' parsers have in common.

As in every module of this package, what needs torch, numpy or another large package is imported inside the handlers,
so that --help and bad arguments answer at once.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from electra_ds.config.shipped import DS_CONFIG_NOTE, GPU_RECIPE, ds_config_names
from electra_ds.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]
    Group: TypeAlias = argparse._ActionsContainer

_NARROWEST = 80
_OF_A_FILE = 120
DEFAULT_RECIPE = GPU_RECIPE
"""The default of commands whose result may be used on another machine."""


def add_command(commands: Commands, name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    """A parser whose --help shows the epilog as it is written."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return command


def add_overrides(group: Group, example: str) -> None:
    """--set, as `options.overrides`."""
    group.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides",
        help=f"override the recipe, e.g. --set {example}",
    )  # fmt: skip


def add_seed(group: Group, what: str) -> None:
    """--seed, as `options.seed`."""
    group.add_argument("--seed", type=_seed, metavar="S", help=f"{what}; the same as --set seed=S (default: 0)")


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def with_seed(options: argparse.Namespace) -> list[str]:
    """The recipe's overrides, --seed among them."""
    return [*options.overrides, *([] if options.seed is None else [f"seed={options.seed}"])]


def check_seed(options: argparse.Namespace) -> None:
    """Raise ConfigError if --seed and --set give different seeds."""
    from electra_ds.config.overrides import parse_value

    others = [value for key, _, value in (each.partition("=") for each in options.overrides) if key == "seed"]
    if options.seed is not None and any(parse_value(other) != options.seed for other in others):
        raise ConfigError(f"--seed {options.seed} and --set seed={others[-1]} differ. Give one of them.")


def wide_console() -> Console:
    """The terminal, taken to have at least the columns that our tables need; a file has more."""
    from rich.console import Console

    console = Console()
    least = _NARROWEST if console.is_terminal or "COLUMNS" in os.environ else _OF_A_FILE
    return console if console.width >= least else Console(width=least)


def positive(text: str) -> int:
    """The argument as a whole number above 0."""
    value = int(text) if text.lstrip("+").isdigit() else 0
    if not 1 <= value < 10**15:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def micro_batch(text: str) -> int | Literal["auto"]:
    """A whole number above 0, or auto."""
    return "auto" if text == "auto" else positive(text)


def duration_s(text: str) -> float:
    """Seconds of `90m`, `3.5h`, `2d`, `300s`, or Slurm's `[D-]HH:MM:SS`."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text):
        return float(match[1]) * units[match[2]]
    if match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90m, 3.5h or 23:55:00")


def add_launcher_arguments(command: argparse.ArgumentParser) -> None:
    """What the deepspeed launcher adds, and what people who know its scripts give."""
    command.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    command.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)


def add_plan_arguments(how: Group, run_dir: str, micro_batch_help: str) -> None:
    """How any training is run. run_dir: where a run lives by default."""
    how.add_argument(
        "--ds-config", "--deepspeed_config", metavar="NAME|FILE",
        help=f"{', '.join(ds_config_names())}, or a DeepSpeed JSON ({DS_CONFIG_NOTE})",
    )  # fmt: skip
    how.add_argument("--micro-batch", type=micro_batch, metavar="N|auto", help=micro_batch_help)
    how.add_argument("--run-dir", type=Path, metavar="DIR", help=f"where the run lives (default: {run_dir})")
    how.add_argument("--stop-at", type=positive, metavar="STEP", help="save and leave at this step of the schedule")
    how.add_argument(
        "--time-limit", type=duration_s, metavar="TIME",
        help="save and leave after this time, e.g. 90m, 3.5h or 23:55:00, and leave the file `requeue` in the run",
    )  # fmt: skip
    how.add_argument(
        "--dry-run", action="store_true",
        help="check everything that can be checked without training, show what would run, and write nothing",
    )  # fmt: skip
    how.add_argument(
        "--yes", action="store_true", help="start even a run that is predicted to take a year or more, without asking"
    )
    how.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's choice)")
    how.add_argument("--log-every", type=positive, metavar="STEPS", help="default: 10")


def add_tracking(group: Group) -> None:
    """Where a run's numbers go."""
    group.add_argument(
        "--wandb", choices=("off", "online", "offline"),
        help="Weights & Biases; offline needs no account and is uploaded later by `wandb sync` (default: off)",
    )  # fmt: skip
    group.add_argument("--wandb-project", metavar="NAME", help="default: electra_ds")
    group.add_argument("--wandb-entity", metavar="NAME", help="the user or team (default: that of the account)")
    group.add_argument("--wandb-group", metavar="NAME", help="shows runs together")
    group.add_argument(
        "--tensorboard", action=argparse.BooleanOptionalAction, help="write RUN/tensorboard (default: no)"
    )
