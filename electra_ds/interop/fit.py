"""Whether a recipe's model is the one that weights were made for, and which overrides make it so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from electra_ds.config.overrides import apply_overrides
from electra_ds.config.recipe import Recipe, electra_recipe, validate_recipe
from electra_ds.core.errors import ConfigError
from electra_ds.pretraining.electra import encoder_configs

SHARINGS = ("none", "tokens", "embeddings", "all")
"""Values of generator.sharing; each shares what those before it do."""
_SHARED = {
    "all": "",
    "embeddings": "embeddings.",
    "tokens": "embeddings.word_embeddings.",
}
_MOST_DECIMALS = 9


@dataclass(frozen=True)
class Wanted:
    """Sizes by their names in config.json, `hidden_act` among them, of the model called `name`."""

    name: str
    sizes: Mapping[str, Any]


def most_shared(tensors: Mapping[str, torch.Tensor]) -> str:
    """The largest generator.sharing at which generator and discriminator of these tensors, under the names of
    `Electra.state_dict`, are equal in all that they would share."""
    generator = {name.removeprefix("generator."): t for name, t in tensors.items() if name.startswith("generator.")}
    for sharing, prefix in _SHARED.items():
        shared = {name: tensor for name, tensor in generator.items() if name.startswith(prefix)}
        others = {name: tensors.get(f"discriminator.{name}") for name in shared}
        if all(other is not None and torch.equal(shared[name], other) for name, other in others.items()):
            return sharing
    return "none"


def check_fit(
    recipe: Recipe, discriminator: Wanted | None, generator: Wanted | None, sharing: str, *, takes_one: bool = True
) -> None:
    """Raise ConfigError if the recipe's model differs, with every difference and the overrides that fix it.

    discriminator, generator: None if nothing is known of it. sharing: the largest that the weights allow, see
    `most_shared`. takes_one: whether a discriminator may be given without its generator.
    """
    problems = [*_mismatches(recipe, discriminator, generator)]
    own = electra_recipe(recipe).generator.sharing
    is_shared_wrongly = generator is not None and SHARINGS.index(own) > SHARINGS.index(sharing)
    if generator is not None and discriminator is not None and is_shared_wrongly:
        problems.append(f"{generator.name} and {discriminator.name} differ in what generator.sharing: {own} makes one")
    if not problems:
        return
    changes = _changes(recipe, discriminator, generator) | ({"generator.sharing": sharing} if is_shared_wrongly else {})
    try:
        left = [*_mismatches(_changed(recipe, changes), discriminator, generator)]
        advice = f"Add: {_as_argument(changes)}"
        if left:
            advice = "No recipe can have" + "".join(f"\n  {problem}" for problem in left)
            advice += _alone(recipe, discriminator) if discriminator is not None and takes_one else ""
    except ConfigError as error:
        advice = str(error)
    lines = "".join(f"\n  {problem}" for problem in problems)
    raise ConfigError(f"The recipe {recipe.name} does not fit the weights:{lines}\n{advice}")


def _alone(recipe: Recipe, discriminator: Wanted) -> str:
    """Return how to give the discriminator alone if no override makes the generator fit; empty if it does not fit
    either."""
    changes = _changes(recipe, discriminator, None)
    if [*_mismatches(_changed(recipe, changes), discriminator, None)]:
        return ""
    with_them = f", with {_as_argument(changes)}" if changes else ""
    return (
        f"\nA recipe's generator has at most the discriminator's columns and layers, a feed-forward of 4 times the "
        f"columns, and everything else as the discriminator.\nGive {discriminator.name} alone{with_them}."
    )


def _mismatches(recipe: Recipe, discriminator: Wanted | None, generator: Wanted | None) -> Iterator[str]:
    configs = encoder_configs(recipe, vocab_size=1, pad_token_id=0)
    for wanted, config in zip((generator, discriminator), configs, strict=True):
        ours = asdict(config) | {"hidden_act": "gelu"}
        for name, value in (wanted.sizes if wanted else {}).items():
            if wanted is not None and value != ours[name]:
                part = "generator" if wanted is generator else "discriminator"
                yield f"{name} {value} as in {wanted.name}; the recipe's {part} has {ours[name]}"


def _changes(recipe: Recipe, discriminator: Wanted | None, generator: Wanted | None) -> dict[str, Any]:
    """Overrides, by dotted key, that bring the recipe's sizes to those of the weights as far as any do."""
    model = recipe.model.model_dump()
    whole = model if discriminator is None else discriminator.sizes
    changes: dict[str, Any] = {
        f"model.{name}": value for name, value in whole.items() if name in model and value != model[name]
    }
    positions = whole["max_position_embeddings"]
    if recipe.data.sequence_length > positions:
        changes["data.sequence_length"] = positions
    if generator is None:
        return changes
    depth = _multiplier(generator.sizes["num_hidden_layers"], whole["num_hidden_layers"])
    before = electra_recipe(recipe).generator
    for heads in (before.num_attention_heads, generator.sizes["num_attention_heads"]):
        for columns in _columns_before_rounding(generator):
            width = _multiplier(columns, whole["hidden_size"])
            wanted = {"width_multiplier": width, "depth_multiplier": depth, "num_attention_heads": heads}
            needed: dict[str, Any] = {
                f"generator.{key}": value
                for key, value in wanted.items()
                if value is not None and value != getattr(before, key)
            }
            if needed and before.sharing == "all":
                needed["generator.sharing"] = "embeddings"
            try:
                if not [*_mismatches(_changed(recipe, changes | needed), discriminator, generator)]:
                    return changes | needed
            except ConfigError:
                continue
    return changes


def _columns_before_rounding(generator: Wanted) -> range:
    """width_multiplier * hidden_size is rounded up to a multiple of the heads, so several give the same."""
    columns, heads = generator.sizes["hidden_size"], generator.sizes["num_attention_heads"]
    return range(columns, max(0, columns - heads), -1)


def _multiplier(part: int, whole: int) -> float | None:
    """The shortest decimal in (0, 1] whose product with `whole` rounds to `part`; None where there is none."""
    for decimals in range(1, _MOST_DECIMALS):
        multiplier = round(part / whole, decimals)
        if 0 < multiplier <= 1 and round(whole * multiplier) == part:
            return multiplier
    return None


def _overrides(changes: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in changes.items()]


def _as_argument(changes: Mapping[str, Any]) -> str:
    return f"--set {' '.join(_overrides(changes))}"


def _changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Raises ConfigError if no recipe may be like that."""
    values = apply_overrides(recipe.model_dump(), _overrides(changes), type(recipe).dotted_keys())
    return validate_recipe(values, f"{recipe.name}, changed to fit the weights,")
