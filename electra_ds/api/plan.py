"""Predict what fits on a GPU or this machine's CPU, and how long a pretraining takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from electra_ds.config.cards import Card, cards_like, find_card
from electra_ds.config.commands import PlanOptions
from electra_ds.config.deepspeed import default_ds_config, read_deepspeed_json, with_micro_batch
from electra_ds.config.names import CPU_RECIPE, GPU_RECIPE
from electra_ds.config.recipe import RecipeSource, given_options, load_recipe
from electra_ds.core import devices
from electra_ds.core.errors import ConfigError
from electra_ds.core.launcher import detect
from electra_ds.core.program import command
from electra_ds.report.forecast import Forecast, forecast


def plan(
    recipe: RecipeSource | None = None,
    *,
    ds_config: str | Path | None = None,
    card: str | None = None,
    memory_gb: float | None = None,
    vocab_size: int | None = None,
    micro_batch: int | Literal["auto"] | None = None,
    ranks: int = 1,
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> Forecast:
    """Predict the memory that a pretraining needs, by part, whether it fits, and the time it takes, as a range.

    This trains nothing and needs no GPU.

    Args:
        recipe: as in `pretrain`.
        ds_config: a shipped DeepSpeed JSON, or a path. By default the card's.
        card: the name of a GPU, installed here or not, or `cpu`. By default the card that the JSON is named after, or
            this machine.
        memory_gb: the free memory of a GPU, in GiB, instead of a card.
        vocab_size: the vocabulary size of your tokenizer. By default the recipe's.
        micro_batch: sequences at a time, instead of the JSON's value.
        ranks: the number of GPUs.
        overrides: changed values of the recipe by dotted key.

    Raises:
        ConfigError: the recipe, the JSON or the card is unknown or cannot be used.

    Examples:
        >>> import electra_ds
        >>> electra_ds.plan("rc2020-small", card="GTX 1060 6GB").fits
        True
    """
    named = {
        "recipe": recipe,
        "ds_config": ds_config,
        "card": card,
        "memory_gb": memory_gb,
        "vocab_size": vocab_size,
        "micro_batch": micro_batch,
        "ranks": ranks,
        "overrides": overrides,
    }
    return run_plan(given_options(PlanOptions, None, named))


def run_plan(options: PlanOptions) -> Forecast:
    """Return the forecast for the command's options."""
    given = None if options.ds_config is None else (read_deepspeed_json(options.ds_config), options.ds_config)
    card = _card(options)
    has_gpu = card is not None or options.memory_gb is not None
    recipe = load_recipe(options.recipe or (GPU_RECIPE if has_gpu else CPU_RECIPE), options.overrides or ())
    values, source = given or default_ds_config(has_gpu, card)
    return forecast(
        recipe,
        with_micro_batch(values, options.micro_batch),
        source,
        card=card,
        memory_gib=options.memory_gb,
        vocab_size=options.vocab_size,
        world_size=options.ranks,
    )


def _card(options: PlanOptions) -> Card | None:
    """Return the card to plan for; None for a CPU, or if only its memory is given."""
    if options.memory_gb is not None:
        return None
    name = options.card
    if name is None and options.ds_config is not None:
        name = Path(options.ds_config).stem
    if name is None:
        device = devices.device(detect(os.environ))
        name = "cpu" if device.type == "cpu" else devices.device_name(device)
    if name.lower() == "cpu":
        return None
    card = find_card(name)
    if card is None:
        near = ", ".join(f"'{card.name}'" for card in cards_like(name))
        raise ConfigError(
            f"No card '{name}' is known. {f'The nearest names are {near}. ' if near else ''}Give a known one as --card "
            f"({command('plan')} --all lists them), or its free memory as --memory-gb."
        )
    return card
