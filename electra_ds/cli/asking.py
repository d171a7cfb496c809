"""The question before a run that is predicted to take years."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from electra_ds.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from electra_ds.core.ranks import Ranks
    from electra_ds.pretraining.run_time import RunTime


def ask_before_years(
    options: argparse.Namespace, predict: Callable[[], RunTime | None], shorter: str, ranks: Ranks
) -> None:
    """Ask on a terminal whether to start a run that may take a year or more; elsewhere refuse it with a ConfigError.

    To be called by all ranks. --yes and --time-limit, after which a run ends anyway, answer it. predict: measures this
    machine, so it is called only where its answer matters. shorter: how to make the run shorter.
    """
    with ranks.together():
        if not ranks.is_main or options.yes or options.time_limit:
            return
        time = predict()
        if time is None or not time.may_take_years:
            return
        found = f"This run is predicted to take {time} on this machine."
        if ranks.world_size == 1 and sys.stdin.isatty() and sys.stdout.isatty():
            try:
                answer = input(f"{found} Start it anyway? [y/N] ")
            except EOFError:
                answer = ""
            if answer.strip().lower() in ("y", "yes"):
                return
            raise ConfigError(f"The run was not started. {shorter}")
        raise ConfigError(f"{found} {shorter} To start it anyway, add --yes.")


def say_dry_run(time: RunTime | None, steps: int, console: Console) -> None:
    """The end of a dry run."""
    from electra_ds.core.terminal import say

    if time is not None and time.may_take_years:
        say(console, "Such a run starts only with --yes, or after you confirm it on a terminal.")
    told = "not predicted for this GPU, whose rates are not known" if time is None else f"predicted to take {time}"
    say(console, f"time: {steps:,} steps, {told}\nDry run: nothing was written and nothing was started.")
