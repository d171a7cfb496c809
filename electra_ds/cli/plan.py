"""`electra-ds plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from electra_ds.cli.arguments import add_handled, wide_console
from electra_ds.config.shipped import recipe_names
from electra_ds.config.tool_options import PlanOptions

if TYPE_CHECKING:
    from electra_ds.cli.arguments import Commands

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
    """Add the parser of `plan`."""
    add_handled(commands, "plan", PlanOptions, _EPILOG, _plan)


def _plan(options: PlanOptions) -> None:
    from electra_ds.api.plan import planned
    from electra_ds.config.overrides import load_recipe
    from electra_ds.report.forecast import as_json, forecast_all, forecast_report, forecasts_table

    console = wide_console()
    if options.all:
        names = recipe_names() if options.recipe is None else [options.recipe]
        forecasts = forecast_all([load_recipe(name, options.overrides or ()) for name in names])
        if options.json:
            console.print_json(data=[as_json(found) for found in forecasts])
        else:
            console.print(forecasts_table(forecasts))
        return
    found = planned(options)
    if options.json:
        console.print_json(data=as_json(found))
    else:
        for part in forecast_report(found):
            console.print(part, highlight=False)
    if not found.fits:
        raise SystemExit(1)
