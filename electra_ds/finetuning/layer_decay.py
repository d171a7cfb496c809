"""Learning rates that fall from the head down to the embeddings, over transformers' parameter names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from electra_ds.config.finetune_recipe import FinetuneOptimizerSection
from electra_ds.core.errors import ConfigError
from electra_ds.training.optimizer import ParameterRates, Rates, pretraining_rates

_LAYER = re.compile(r"\.(?:layer|layers|h|blocks?)\.(\d+)\.")


def exponent(name: str, num_layers: int, section: FinetuneOptimizerSection) -> int:
    """How often the decay is applied to a parameter of a `TaskModel`.

    What stands neither in a layer nor among the embeddings, such as a last norm, goes with the last layer.
    """
    if name.startswith("head."):
        return 0
    match = _LAYER.search(name)
    if match is not None:
        depth = int(match[1]) + 1
    else:
        depth = 0 if "embeddings" in name else num_layers
    if section.layer_decay_exponents == "study":
        return num_layers - max(depth, 1)
    if section.layer_decay_exponents == "original":
        return num_layers + 2 - depth
    return num_layers + 1 - depth


def finetuning_rates(num_layers: int, section: FinetuneOptimizerSection) -> Rates:
    """Each parameter's learning rate over the schedule's, and whether it decays."""

    def rates(name: str) -> ParameterRates:
        scale = section.layer_decay ** exponent(name, num_layers, section)
        return ParameterRates(scale, section.weight_decay_on == "all" or pretraining_rates(name).decays)

    return rates


def check_layers(names: Iterable[str], section: FinetuneOptimizerSection) -> None:
    """Raises ConfigError if the decay is to go by layers and an encoder's names tell none."""
    if section.layer_decay < 1 and not any(_LAYER.search(name) for name in names):
        raise ConfigError(
            f"optimizer.layer_decay is {section.layer_decay}, but this model's layers cannot be told by their "
            f"parameters' names. Add --set optimizer.layer_decay=1"
        )
