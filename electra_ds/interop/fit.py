"""Check whether a recipe's two networks have the sizes that weights were made for, and name overrides that fix it.

The number of heads, the layer-norm epsilon, the activation and the position type do not change the shape of any tensor.
With values other than those of its training a network computes something else, and nothing else shows it. So they come
from a config.json or a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from electra_ds.config.overrides import apply_overrides, load_recipe
from electra_ds.config.recipe import Recipe, electra_recipe, validate_recipe
from electra_ds.core.errors import ConfigError, DataError
from electra_ds.interop.pretrained import SIZES, read_sizes
from electra_ds.pretraining.electra import encoder_configs

PARTS = ("generator", "discriminator")
SHARINGS = ("none", "tokens", "embeddings", "all")
"""Values of generator.sharing; each shares what those before it do."""
_SHARED = {"all": "", "embeddings": "embeddings.", "tokens": "embeddings.word_embeddings."}
_MOST_DECIMALS = 9


@dataclass(frozen=True)
class NetworkSizes:
    """The sizes of a network by their names in config.json, `hidden_act` among them, and where they come from."""

    name: str
    sizes: Mapping[str, Any]


class KnownSizes(NamedTuple):
    """The sizes of the two networks, as far as they are known."""

    generator: NetworkSizes | None = None
    discriminator: NetworkSizes | None = None


def recipe_sizes(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return the sizes of a recipe's generator and discriminator, by their names in config.json."""
    configs = encoder_configs(recipe, vocab_size=1, pad_token_id=0)
    return {part: asdict(config) | {"hidden_act": "gelu"} for part, config in zip(PARTS, configs, strict=True)}


def most_shared(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the largest generator.sharing at which generator and discriminator of these tensors, under the names of
    `Electra.state_dict`, are equal in everything that they would share."""
    generator = {name.removeprefix("generator."): t for name, t in tensors.items() if name.startswith("generator.")}
    for sharing, prefix in _SHARED.items():
        shared = {name: tensor for name, tensor in generator.items() if name.startswith(prefix)}
        others = {name: tensors.get(f"discriminator.{name}") for name in shared}
        if all(other is not None and torch.equal(shared[name], other) for name, other in others.items()):
            return sharing
    return "none"


def check_fit(recipe: Recipe, known: KnownSizes, sharing: str, *, takes_one: bool = True) -> None:
    """Raise ConfigError if the recipe's model differs, with every difference and the overrides that fix it.

    sharing: the largest that the weights allow, see `most_shared`. takes_one: whether a discriminator may be given
    without its generator.
    """
    generator, discriminator = known
    problems = _mismatches(recipe, known)
    own = electra_recipe(recipe).generator.sharing
    is_shared_wrongly = generator is not None and SHARINGS.index(own) > SHARINGS.index(sharing)
    if generator is not None and discriminator is not None and is_shared_wrongly:
        problems.append(f"{generator.name} and {discriminator.name} differ in what generator.sharing: {own} makes one")
    if not problems:
        return
    changes = _changes(recipe, known) | ({"generator.sharing": sharing} if is_shared_wrongly else {})
    try:
        left = _mismatches(_changed(recipe, changes), known)
        advice = f"Add: {_as_argument(changes)}"
        if left:
            advice = "No recipe can have" + "".join(f"\n  {problem}" for problem in left)
            if generator is not None and discriminator is not None and takes_one:
                advice += (
                    f"\nA recipe's generator has at most the discriminator's columns and layers, a feed-forward of 4 "
                    f"times the columns, and everything else as the discriminator. Otherwise give {discriminator.name} "
                    f"alone."
                )
    except ConfigError as error:
        advice = str(error)
    lines = "".join(f"\n  {problem}" for problem in problems)
    raise ConfigError(f"The recipe {recipe.name} does not fit the weights:{lines}\n{advice}")


def _mismatches(recipe: Recipe, known: KnownSizes) -> list[str]:
    ours = recipe_sizes(recipe)
    return [
        f"{name} {value} as in {network.name}; the recipe's {part} has {ours[part][name]}"
        for part, network in zip(PARTS, known, strict=True)
        if network is not None
        for name, value in network.sizes.items()
        if value != ours[part][name]
    ]


def _changes(recipe: Recipe, known: KnownSizes) -> dict[str, Any]:
    """Return overrides, by dotted key, that bring the recipe's sizes to those of the weights as far as any do."""
    generator, discriminator = known
    model = recipe.model.model_dump()
    full = model if discriminator is None else discriminator.sizes
    changes: dict[str, Any] = {
        f"model.{name}": value for name, value in full.items() if name in model and value != model[name]
    }
    positions = full["max_position_embeddings"]
    if recipe.data.sequence_length > positions:
        changes["data.sequence_length"] = positions
    if generator is None:
        return changes
    before = electra_recipe(recipe).generator
    for heads in (before.num_attention_heads, generator.sizes["num_attention_heads"]):
        wanted = {
            "width_multiplier": _multiplier(generator.sizes["hidden_size"], full["hidden_size"]),
            "depth_multiplier": _multiplier(generator.sizes["num_hidden_layers"], full["num_hidden_layers"]),
            "num_attention_heads": heads,
        }
        needed: dict[str, Any] = {
            f"generator.{key}": value
            for key, value in wanted.items()
            if value is not None and value != getattr(before, key)
        }
        if needed and before.sharing == "all":
            needed["generator.sharing"] = "embeddings"
        try:
            if not _mismatches(_changed(recipe, changes | needed), known):
                return changes | needed
        except ConfigError:
            continue
    return changes


def _multiplier(part: int, total: int) -> float | None:
    """Return the shortest decimal in (0, 1] whose product with `total` rounds to `part`, or None if there is none."""
    for decimals in range(1, _MOST_DECIMALS):
        multiplier = round(part / total, decimals)
        if 0 < multiplier <= 1 and round(total * multiplier) == part:
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


# --- sizes that are known of a checkpoint


def find_sizes(given: Mapping[str, Path | None], export: Path | None, recipe: Recipe) -> KnownSizes:
    """Return what is known about the networks of a checkpoint, and check the recipe against it.

    given: a config.json, or the folder that it is in, for `generator` and `discriminator`; it comes before the recipe
    that our own export has next to the checkpoint. Raises ConfigError if the recipe differs, DataError for a bad
    config.
    """
    found = {part: _given(part, path) for part, path in given.items() if path is not None}
    if export is not None:
        file = export / "recipe.yaml"
        for part, sizes in recipe_sizes(load_recipe(str(file), [])).items():
            found.setdefault(part, NetworkSizes(str(file), {name: sizes[name] for name in (*SIZES, "hidden_act")}))
    known = KnownSizes(**found)
    check_fit(recipe, known, electra_recipe(recipe).generator.sharing, takes_one=False)
    return known


def _given(part: str, path: Path) -> NetworkSizes:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"There is no config.json at {path}. --{part}-config takes one, or the folder that it is in.")
    kind, sizes = read_sizes(file)
    if kind not in (None, part):
        raise ConfigError(f"{file} is a {kind}'s by its architectures, but it is given as --{part}-config.")
    return NetworkSizes(str(file), sizes)


def summary_of_sizes(recipe: Recipe, known: KnownSizes) -> list[str]:
    """Return lines of an import's summary: what was checked for each network, against what, and what is assumed."""
    checked, assumed = [], []
    for network, (part, sizes) in zip(known, recipe_sizes(recipe).items(), strict=True):
        heads = sizes["num_attention_heads"]
        line = (
            f"{part}: {heads} head(s) of {sizes['hidden_size'] // heads}, layer_norm_eps {sizes['layer_norm_eps']:g}, "
            f"{sizes['hidden_act']}, absolute positions"
        )
        if network is None:
            assumed.append(f"  assumed  {line}")
        else:
            checked.append(f"  checked  {line}, as in {network.name}")
    if not assumed:
        return checked
    return [
        *checked, *assumed,
        "           These are the recipe's values. The tensors do not show them, and with values other than in its "
        "training the model computes something else.",
        "           Give the models' config.json to have it checked (--generator-config, --discriminator-config), "
        "or change it by --set generator.num_attention_heads=N model.num_attention_heads=N model.layer_norm_eps=X",
    ]  # fmt: skip
