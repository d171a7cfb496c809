"""Find what the tensors of a checkpoint do not show about its two networks.

The number of heads, the layer-norm epsilon, the activation and the position type do not change the shape of any tensor.
With values other than those of its training a network computes something else, and nothing else shows it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from electra_ds.config.overrides import load_recipe
from electra_ds.config.recipe import Recipe, electra_recipe
from electra_ds.core.errors import ConfigError, DataError
from electra_ds.interop.fit import Wanted, check_fit
from electra_ds.interop.pretrained import SIZES, read_sizes
from electra_ds.pretraining.electra import encoder_configs

_PARTS = ("generator", "discriminator")
_HIDDEN = ("num_attention_heads", "layer_norm_eps", "hidden_act")


class Known(NamedTuple):
    """The sizes of the networks, as far as they are known."""

    generator: Wanted | None = None
    discriminator: Wanted | None = None


def find_known(folder: Path, given: Mapping[str, Path | None], export: Path | None, recipe: Recipe) -> Known:
    """Return what is known about the networks of the checkpoint in `folder`, and check the recipe against it.

    given: a config.json, or the folder that it is in, for `generator` and `discriminator`; it comes before the recipe
    that our own export has next to the checkpoint, and that before config.json files of transformers next to and above
    it whose visible sizes are the recipe's. Raises ConfigError if the recipe differs, DataError for a bad config.
    """
    found: dict[str, Wanted] = {}
    for part, path in given.items():
        if path is not None:
            found[part] = _given(part, path)
    if export is not None:
        found = _of_recipe(export / "recipe.yaml") | found
    for part, wanted in _around(folder, recipe) if len(found) < len(_PARTS) else ():
        found.setdefault(part, wanted)
    known = Known(**found)
    check_fit(recipe, known.discriminator, known.generator, electra_recipe(recipe).generator.sharing, takes_one=False)
    return known


def told(recipe: Recipe, known: Known) -> list[str]:
    """Return lines of the import's summary: what was checked for each network, against what, and what is assumed."""
    checked, assumed = [], []
    for part, wanted, sizes in zip(_PARTS, known, _sizes(recipe), strict=True):
        heads = sizes["num_attention_heads"]
        line = (
            f"{part}: {heads} head(s) of {sizes['hidden_size'] // heads}, layer_norm_eps {sizes['layer_norm_eps']:g}, "
            f"{sizes['hidden_act']}, absolute positions"
        )
        if wanted is None:
            assumed.append(f"  assumed  {line}")
        else:
            checked.append(f"  checked  {line}, as in {wanted.name}")
    if not assumed:
        return checked
    return [
        *checked, *assumed,
        "           These are the recipe's values. The tensors do not show them, and with values other than in its "
        "training the model computes something else.",
        "           Give the models' config.json to have it checked (--generator-config, --discriminator-config), "
        "or change it by --set generator.num_attention_heads=N model.num_attention_heads=N model.layer_norm_eps=X",
    ]  # fmt: skip


def _given(part: str, path: Path) -> Wanted:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"There is no config.json at {path}. --{part}-config takes one, or the folder that it is in.")
    kind, sizes = read_sizes(file)
    if kind not in (None, part):
        raise ConfigError(f"{file} is a {kind}'s by its architectures, but it is given as --{part}-config.")
    return Wanted(str(file), sizes)


def _of_recipe(file: Path) -> dict[str, Wanted]:
    names = (*SIZES, "hidden_act")
    return {
        part: Wanted(str(file), {name: sizes[name] for name in names})
        for part, sizes in zip(_PARTS, _sizes(load_recipe(str(file), [])), strict=True)
    }


def _around(folder: Path, recipe: Recipe) -> Iterator[tuple[str, Wanted]]:
    """Yield configs next to and above the checkpoint that are an ELECTRA's and have the recipe's visible sizes."""
    ours = dict(zip(_PARTS, _sizes(recipe), strict=True))
    for place in (folder, *folder.resolve().parents[:2]):
        named = [(part, place / part / "config.json") for part in _PARTS]
        named += [(part, place / f"{part}_config.json") for part in _PARTS]
        for part, file in (*named, (None, place / "config.json")):
            if not _is_electra(file):
                continue
            kind, sizes = read_sizes(file)
            for one in _PARTS if kind is None and part is None else (kind or part,):
                if all(sizes[name] == ours[str(one)][name] for name in sizes if name not in _HIDDEN):
                    yield str(one), Wanted(str(file), sizes)


def _is_electra(file: Path) -> bool:
    try:
        values = json.loads(file.read_text("utf8"))
    except (OSError, ValueError, RecursionError):  # somebody else's file, or none
        return False
    return isinstance(values, dict) and values.get("model_type") == "electra"


def _sizes(recipe: Recipe) -> list[dict[str, Any]]:
    """Return the sizes of generator and discriminator, by their names in config.json."""
    configs = encoder_configs(recipe, vocab_size=1, pad_token_id=0)
    return [asdict(config) | {"hidden_act": "gelu"} for config in configs]
