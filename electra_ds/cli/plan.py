"""`electra-ds plan`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from electra_ds.cli.arguments import add_command, add_overrides, micro_batch, positive, wide_console
from electra_ds.config.shipped import (
    CPU_RECIPE,
    DS_CONFIG_NOTE,
    GPU_RECIPE,
    RECIPE_NOTE,
    ds_config_names,
    recipe_names,
)
from electra_ds.core.errors import ConfigError
from electra_ds.core.launcher import detect
from electra_ds.core.program import command as command_of

if TYPE_CHECKING:
    from electra_ds.cli.arguments import Commands
    from electra_ds.config.cards import Card

_EPILOG = """\
examples:
  bin/plan                                                what bin/pretrain would run on this machine
  bin/plan --recipe rc2020-small --ds-config gtx1060-6gb
      memory by part, the micro-batch that fits a GTX 1060, days, and what the card cannot do
  bin/plan --card "RTX 4090"                              the default recipe and JSON of bin/pretrain on such a card
  bin/plan --card cpu --recipe mini                       time and memory on this machine's CPU
  bin/plan --ds-config gtx1060-6gb --card "RTX 2060"      the same JSON on another card
  bin/plan --ds-config zero1 --card "RTX 3090" --ranks 4  each of four cards
  bin/plan --ds-config gtx1060-6gb --memory-gb 3.5        a card of which so much is free
  bin/plan --all --recipe rc2020-small                    every card; without --recipe, every recipe too

Nothing is trained and no GPU is needed. Memory is computed from the sizes of tensors. Time is a range: on a card, the
roofline of a step times the factors by which published runs differ from such rooflines; on this machine's CPU, the time
of the recipe's FLOPs at a rate that is measured in a fifth of a second. The exit status is 1 if the plan does not fit.
"""


def add_plan(commands: Commands) -> None:
    """The parser of `plan`."""
    command = add_command(commands, "plan", "Predict what fits on a GPU or this CPU, and how long it takes.", _EPILOG)
    command.set_defaults(handler=_plan)
    command.add_argument(
        "--recipe", metavar="NAME|FILE",
        help=f"{', '.join(recipe_names())}, or a YAML file ({RECIPE_NOTE})",
    )  # fmt: skip
    add_overrides(command, "data.sequence_length=512")
    command.add_argument(
        "--ds-config", metavar="NAME|FILE",
        help=f"{', '.join(ds_config_names())}, or a DeepSpeed JSON ({DS_CONFIG_NOTE})",
    )  # fmt: skip
    where = command.add_mutually_exclusive_group()
    where.add_argument(
        "--card",
        metavar="NAME",
        help="a GPU, here or not, such as 'GTX 1060 6GB', RTX4090, 'RTX 5070 Ti', A6000, L4, L40S or A10; or cpu for "
        "this machine's (default: the card that the JSON is named after, else this machine)",
    )
    where.add_argument(
        "--memory-gb",
        type=_gib,
        metavar="N",
        help="plan for a GPU with so much free memory, in GiB as nvidia-smi shows",
    )
    command.add_argument(
        "--vocab-size", type=positive, metavar="N", help="pieces of your tokenizer (default: the recipe's)"
    )
    command.add_argument(
        "--micro-batch", type=micro_batch, metavar="N|auto", help="in place of the JSON's; auto: the largest that fits"
    )
    command.add_argument("--ranks", type=positive, metavar="N", default=1, help="cards (default: 1)")
    command.add_argument("--all", action="store_true", help="a table of every card and every recipe")
    command.add_argument("--json", action="store_true", help="print it as JSON")


def _gib(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GiB")
    return value


def _plan(options: argparse.Namespace) -> None:
    only_one = ("ds_config", "card", "memory_gb", "vocab_size", "micro_batch")
    if options.all and (any(getattr(options, name) for name in only_one) or options.ranks > 1):
        raise ConfigError(
            "--all shows every card alone with its own JSON; with it only --recipe and --set may be given."
        )
    if options.overrides and options.all and options.recipe is None:
        raise ConfigError("--all shows every recipe as it is shipped; say which one --set changes with --recipe.")

    from electra_ds.config.deepspeed import default_ds_config, read_deepspeed_json, with_micro_batch
    from electra_ds.config.overrides import load_recipe
    from electra_ds.report.forecast import forecast, forecast_all
    from electra_ds.report.forecast_tables import as_json, print_forecast, print_forecasts

    console = wide_console()
    if options.all:
        names = recipe_names() if options.recipe is None else [options.recipe]
        forecasts = forecast_all([load_recipe(name, options.overrides) for name in names])
        if options.json:
            console.print_json(data=[as_json(found) for of_card in forecasts for found in of_card])
        else:
            print_forecasts(forecasts, console)
        return
    card = _card(options)
    has_gpu = card is not None or options.memory_gb is not None
    recipe = load_recipe(options.recipe or (GPU_RECIPE if has_gpu else CPU_RECIPE), options.overrides)
    values, source = default_ds_config(has_gpu, card)
    if options.ds_config is not None:
        values, source = read_deepspeed_json(options.ds_config), options.ds_config
    found = forecast(
        recipe,
        with_micro_batch(values, options.micro_batch),
        source,
        card=card,
        memory_gib=options.memory_gb,
        vocab_size=options.vocab_size,
        world_size=options.ranks,
    )
    if options.json:
        console.print_json(data=as_json(found))
    else:
        print_forecast(found, console)
    if not found.fits:
        raise SystemExit(1)


def _card(options: argparse.Namespace) -> Card | None:
    from electra_ds.config.cards import cards_like, find_card

    if options.memory_gb is not None or (options.card or "").lower() == "cpu":
        return None
    if options.card is None and options.ds_config is None:
        return _card_here()
    if options.card is None:
        card = find_card(Path(options.ds_config).stem)
        if card is None and Path(options.ds_config).stem != "cpu":
            raise ConfigError(
                f"{options.ds_config} is not named after a card; say which one with --card or --memory-gb."
            )
        return card
    card = find_card(options.card)
    if card is None:
        near = ", ".join(f"'{card.name}'" for card in cards_like(options.card))
        raise ConfigError(
            f"No card '{options.card}' is known. {f'The nearest names are {near}. ' if near else ''}"
            f"{command_of('plan')} --all lists every card; for another one, give its free memory with --memory-gb."
        )
    return card


def _card_here() -> Card | None:
    """Return this machine's GPU, or None if it has none."""
    from electra_ds.config.cards import find_card
    from electra_ds.core import devices

    device = devices.device(detect(os.environ))
    if device.type == "cpu":
        return None
    card = find_card(devices.device_name(device))
    if card is None:
        raise ConfigError(
            f"The rates of this machine's {devices.device_name(device)} are not known. Give its memory with "
            f"--memory-gb, or another card with --card."
        )
    return card
