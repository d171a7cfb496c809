"""Sizes of published weights beside a recipe's: the overrides that are named make it fit, or none does."""

from __future__ import annotations

from typing import Any

import pytest

from electra_ds.config.recipe import load_recipe
from electra_ds.core.errors import ConfigError
from electra_ds.interop.pretrained import KnownSizes, NetworkSizes, check_fit

SMALL_GOOGLE = {
    "embedding_size": 128, "hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 4,
    "intermediate_size": 1024, "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}  # fmt: skip
BASE_GOOGLE = SMALL_GOOGLE | {
    "embedding_size": 768, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
}  # fmt: skip
BASE_GENERATOR = BASE_GOOGLE | {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
LARGE_GOOGLE = BASE_GOOGLE | {
    "embedding_size": 1024, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096,
}  # fmt: skip
LARGE_GENERATOR = LARGE_GOOGLE | {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
BASE_SET = "model.embedding_size=768 model.hidden_size=768 model.num_attention_heads=12 model.intermediate_size=3072"
LARGE_SET = (
    "model.embedding_size=1024 model.hidden_size=1024 model.num_hidden_layers=24 model.num_attention_heads=16 "
    "model.intermediate_size=4096"
)


def fit(
    recipe: str, discriminator: dict[str, Any] | None, generator: dict[str, Any] | None, sharing: str = "all"
) -> None:
    section, *overrides = recipe.split()
    known = KnownSizes(generator and NetworkSizes("G", generator), discriminator and NetworkSizes("D", discriminator))
    check_fit(load_recipe(section, overrides), known, sharing)


@pytest.mark.parametrize(
    ("recipe", "discriminator", "generator", "added"),
    [
        # The released ELECTRA-Small has a generator of its discriminator's size: google-research/electra issue 39.
        ("electra-small", SMALL_GOOGLE, SMALL_GOOGLE, "generator.width_multiplier=1.0"),
        ("electra-small", SMALL_GOOGLE, SMALL_GOOGLE | {"hidden_size": 64, "num_attention_heads": 1,
         "intermediate_size": 256}, ""),
        ("electra-small", BASE_GOOGLE, BASE_GENERATOR, f"{BASE_SET} generator.width_multiplier=0.333"),
        ("electra-small", LARGE_GOOGLE, LARGE_GENERATOR, LARGE_SET),
        ("electra-small", SMALL_GOOGLE | {"max_position_embeddings": 64, "layer_norm_eps": 1e-6}, None,
         "model.max_position_embeddings=64 model.layer_norm_eps=1e-06 data.sequence_length=64"),
        ("electra-small generator.sharing=all generator.width_multiplier=1", SMALL_GOOGLE, SMALL_GOOGLE |
         {"num_hidden_layers": 3}, "generator.depth_multiplier=0.25 generator.sharing=embeddings"),
        # The rule gives three heads to 192 columns.
        ("electra-small", SMALL_GOOGLE, SMALL_GOOGLE | {"hidden_size": 192, "num_attention_heads": 2,
         "intermediate_size": 768}, "generator.width_multiplier=0.75 generator.num_attention_heads=2"),
        # The rule gives one head to 64 columns.
        ("electra-small", SMALL_GOOGLE, SMALL_GOOGLE | {"hidden_size": 64, "intermediate_size": 256},
         "generator.num_attention_heads=4"),
        ("electra-small generator.num_attention_heads=4", SMALL_GOOGLE, SMALL_GOOGLE | {"hidden_size": 64,
         "num_attention_heads": 1, "intermediate_size": 256}, "generator.num_attention_heads=1"),
        ("electra-small generator.width_multiplier=1", SMALL_GOOGLE, SMALL_GOOGLE | {"intermediate_size": 512},
         "generator.intermediate_size=512"),
        ("electra-small", None, BASE_GENERATOR, "model.embedding_size=768 generator.width_multiplier=1.0"),
    ],
)  # fmt: skip
def test_the_overrides_that_are_named_make_the_recipe_fit(
    recipe: str, discriminator: dict[str, Any] | None, generator: dict[str, Any] | None, added: str
) -> None:
    if added:
        with pytest.raises(ConfigError) as refused:
            fit(recipe, discriminator, generator, "embeddings")
        assert str(refused.value).splitlines()[-1] == f"Add: --set {added}"
    fit(f"{recipe} {added}", discriminator, generator, "embeddings")


@pytest.mark.parametrize(
    ("discriminator", "generator", "message"),
    [
        (SMALL_GOOGLE | {"hidden_act": "relu"}, None, r"No recipe can have\n  hidden_act relu as in D.*has gelu$"),
        (SMALL_GOOGLE | {"type_vocab_size": 1}, None, r"No recipe can have\n  type_vocab_size 1 as in D.*has 2$"),
        (SMALL_GOOGLE, BASE_GOOGLE, r"hidden_size 768 as in G.*give D alone\.$"),
        (BASE_GOOGLE, BASE_GENERATOR | {"embedding_size": 8}, r"embedding_size 8 as in G.*give D alone\.$"),
        (SMALL_GOOGLE | {"hidden_size": 4, "num_attention_heads": 1}, None, "changed to fit the weights, is not valid"),
    ],
)
def test_sizes_out_of_reach_are_said_to_be(
    discriminator: dict[str, Any], generator: dict[str, Any] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        fit("electra-small", discriminator, generator)
