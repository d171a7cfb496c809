"""Read ELECTRA weights in a transformers folder, find out which network they are, and check a recipe's sizes.

The number of heads, the layer-norm epsilon, the activation and the position type do not change the shape of any tensor.
A network with values other than those of its training computes something else without any sign of it, so these values
come from a config.json or a recipe.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining, PreTrainedModel

from electra_ds.config.recipe import Recipe, electra_recipe, joint_recipe, load_recipe, validate_recipe
from electra_ds.config.values import apply_overrides
from electra_ds.core.errors import ConfigError, DataError
from electra_ds.core.program import command
from electra_ds.data.given_tokenizer import load_given_tokenizer
from electra_ds.data.hub import explain_errors
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.finetuning.encoder_source import check_complete, load_weights, silent_transformers
from electra_ds.pretraining.convert import from_discriminator_tensors, from_generator_tensors, refuse_other_frameworks
from electra_ds.pretraining.electra import encoder_configs
from electra_ds.pretraining.evaluation import load_model
from electra_ds.training.checkpoints import newest_checkpoint

Kind = Literal["generator", "discriminator"]
PARTS = ("generator", "discriminator")
SHARINGS = ("none", "tokens", "embeddings", "all")
"""The values of generator.sharing. Each shares everything that the previous ones do."""
_SHARED = {"all": "", "embeddings": "embeddings.", "tokens": "embeddings.word_embeddings."}
_MOST_DECIMALS = 9
_ALIKE = ("embedding_size", "max_position_embeddings", "layer_norm_eps")
"""Sizes that a recipe has for both networks."""
SIZES = (
    "embedding_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size", "layer_norm_eps",
)  # fmt: skip
_CLASSES: dict[Kind, type[PreTrainedModel]] = {
    "generator": ElectraForMaskedLM, "discriminator": ElectraForPreTraining,
}  # fmt: skip
_HEADS: dict[Kind, tuple[str, ...]] = {
    "generator": ("generator_predictions.", "generator_lm_head."), "discriminator": ("discriminator_predictions.",),
}  # fmt: skip
_TABLE, _DECODER = "electra.embeddings.word_embeddings.weight", "generator_lm_head.weight"


@dataclass(frozen=True)
class Pretrained:
    """A generator or a discriminator."""

    name: str
    """The name that the user gave."""
    kind: Kind
    has_head: bool
    """False for an encoder alone, which is taken to be a discriminator's."""
    sizes: dict[str, Any]
    """The values of SIZES and `hidden_act`."""
    vocab_size: int
    """The number of rows of the token table."""
    tensors: dict[str, torch.Tensor]
    """fp32 tensors, under the names of `Electra.state_dict`."""
    tokenizer: Tokenizer | None
    """None if the folder has neither tokenizer.json nor vocab.txt."""
    tokenizer_source: str
    """The --tokenizer argument for it."""


def read_pretrained(name: str, folder: Path) -> Pretrained:
    """Read the model in a folder that transformers wrote. The names of its weights show which of the two it is.

    Raises DataError with the model's name if it is not an ELECTRA, if it is damaged or incomplete, or if a pickle holds
    anything but tensors.
    """
    refuse_other_frameworks(folder, name)
    values = _read_config(name, folder)
    config = _config_of(values, name)
    is_generator = _kind_of(values) == "generator"
    kind: Kind = "generator" if is_generator else "discriminator"
    other: Kind = "discriminator" if is_generator else "generator"
    model, problems = load_weights(_CLASSES[kind], folder, config, name)
    has_other_head = any(key.startswith(_HEADS[other]) for key in problems["unknown are"])
    if has_other_head or (is_generator and _lacks_head(model, problems)):
        kind = other
        model, problems = load_weights(_CLASSES[kind], folder, config, name)
    has_head = not _lacks_head(model, problems)
    if not has_head:
        problems["missing are"] -= _head(model)
    check_complete(
        f"{name} does not hold the weights of a pretrained ELECTRA {kind}",
        problems,
        "Give a pretrained model, not a finetuned one; if files were lost or damaged, download it again.",
    )
    tensors = {key: tensor for key, tensor in model.state_dict().items() if has_head or key.startswith("electra.")}
    if kind == "generator" and not torch.equal(tensors[_DECODER], tensors[_TABLE]):
        raise DataError(
            f"The generator {name} has different tables for reading and for predicting tokens; here they are one. "
            f"Give the discriminator alone."
        )
    convert = from_generator_tensors if kind == "generator" else from_discriminator_tensors
    has_tokenizer = (folder / "tokenizer.json").is_file() or (folder / "vocab.txt").is_file()
    return Pretrained(
        name,
        kind,
        has_head,
        _sizes(config),
        config.vocab_size,
        convert(tensors),
        load_given_tokenizer(str(folder))[0] if has_tokenizer else None,
        name,
    )


def read_run(name: str) -> list[Pretrained]:
    """Return the networks of a run's or checkpoint's model that transformers' ELECTRA classes open.

    Raises CheckpointError if the run has no checkpoint, and DataError if none of its networks is such a one.
    """
    checkpoint = newest_checkpoint(Path(name))
    model, objective, tokenizer, _ = load_model(checkpoint)
    file, parts = str(checkpoint.path / "tokenizer.json"), {}
    for network, export in objective.exports(model).items():
        kind = next((kind for kind, own in _CLASSES.items() if own.__name__ == export.loaded_by), None)
        if kind is not None and (kind not in parts or network == kind):
            convert = from_generator_tensors if kind == "generator" else from_discriminator_tensors
            config: Any = export.model.config
            tensors = convert(export.model.state_dict())
            parts[kind] = Pretrained(name, kind, True, _sizes(config), config.vocab_size, tensors, tokenizer, file)
    if not parts:
        raise DataError(f"The run {name} has no network of ELECTRA's architecture, which --init-from needs.")
    return list(parts.values())


def read_sizes(file: Path) -> tuple[Kind | None, dict[str, Any]]:
    """Return (kind of network, or None if the architecture does not say; values of SIZES and `hidden_act`) from a
    config.json. Raises DataError if it is not an ELECTRA's."""
    values = _parsed(file, str(file))
    return _kind_of(values), _sizes(_config_of(values, str(file)))


def _kind_of(values: Mapping[str, Any]) -> Kind | None:
    architectures = str(values.get("architectures"))
    return next((kind for kind, own in _CLASSES.items() if own.__name__ in architectures), None)


def _config_of(values: Mapping[str, Any], name: str) -> ElectraConfig:
    """Return a config made only of the values named here, so nothing else in the file affects loading."""
    known = {key: values[key] for key in (*SIZES, "vocab_size", "pad_token_id", "hidden_act") if key in values}
    with explain_errors(f"the model {name}"), silent_transformers():
        return ElectraConfig(**known)


def _sizes(config: ElectraConfig) -> dict[str, Any]:
    return {key: getattr(config, key) for key in (*SIZES, "hidden_act")}


def _read_config(name: str, folder: Path) -> dict[str, Any]:
    """Return the values of the config.json in a folder."""
    file = folder / "config.json"
    if not file.is_file():
        there = "There is no folder" if not folder.is_dir() else "There is no config.json in"
        advice = f"Give a folder that transformers or {command('export')} wrote, or OWNER/NAME of a model on the Hub."
        raise DataError(f"{there} {name}. {advice}")
    return _parsed(file, name)


def _parsed(file: Path, name: str) -> dict[str, Any]:
    """Return the values of an ELECTRA's config.json."""
    try:
        values = json.loads(file.read_text("utf8"))
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {file}: {error}. Download the model again.") from error
    found = values.get("model_type") if isinstance(values, dict) else None
    if found != "electra":
        raise DataError(f"{name} is a model of type {found}, not electra (model_type in its config.json).")
    if values.get("position_embedding_type", "absolute") != "absolute":
        raise DataError(
            f"{name} has {values['position_embedding_type']} positions, but electra_ds has only absolute ones."
        )
    return dict(values)


def _head(model: PreTrainedModel) -> set[str]:
    """Return the names of the head's own tensors, without a decoder that is the token table."""
    return {name for name, _ in model.named_parameters() if not name.startswith("electra.")}


def _lacks_head(model: PreTrainedModel, problems: Mapping[str, set[str]]) -> bool:
    return not problems["unknown are"] and _head(model) <= problems["missing are"]


# --- check that a recipe fits


@dataclass(frozen=True)
class NetworkSizes:
    """The sizes of a network by their names in config.json, including `hidden_act`, and their source."""

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
    """Return the largest generator.sharing at which everything that would be shared is equal in both networks.

    tensors: under the names of `Electra.state_dict`.
    """
    generator = {name.removeprefix("generator."): t for name, t in tensors.items() if name.startswith("generator.")}
    for sharing, prefix in _SHARED.items():
        shared = {name: tensor for name, tensor in generator.items() if name.startswith(prefix)}
        others = {name: tensors.get(f"discriminator.{name}") for name in shared}
        if all(other is not None and torch.equal(shared[name], other) for name, other in others.items()):
            return sharing
    return "none"


def check_fit(recipe: Recipe, known: KnownSizes, sharing: str, *, takes_one: bool = True) -> None:
    """Raise ConfigError if the recipe's model differs, with every difference and the overrides that fix it.

    sharing: the largest that the weights allow, see `most_shared`. takes_one: True if a discriminator may be given
    without its generator.
    """
    generator, discriminator = known
    problems = _mismatches(recipe, known)
    own = joint_recipe(recipe).sharing
    is_pair = generator is not None and discriminator is not None
    is_shared_wrongly = is_pair and SHARINGS.index(own) > SHARINGS.index(sharing)
    if generator is not None and discriminator is not None and is_shared_wrongly:
        problems.append(
            f"{generator.name} and {discriminator.name} differ in weights that generator.sharing: {own} shares"
        )
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
                    f"\nA recipe's generator has at most the discriminator's columns and layers, heads and a "
                    f"feed-forward of its own, and the rest like the discriminator. Otherwise give "
                    f"{discriminator.name} alone."
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
    """Return overrides, by dotted key, that bring the recipe's sizes as close to those of the weights as possible."""
    generator, discriminator = known
    model = recipe.model.model_dump()
    full = model if discriminator is None else discriminator.sizes
    changes: dict[str, Any] = {
        f"model.{name}": value for name, value in full.items() if name in model and value != model[name]
    }
    if discriminator is None and generator is not None:  # in these both networks are alike
        alike = {name: generator.sizes[name] for name in _ALIKE}
        changes = {f"model.{name}": value for name, value in alike.items() if value != model[name]}
        full = model | alike
    positions = full["max_position_embeddings"]
    if recipe.data.sequence_length > positions:
        changes["data.sequence_length"] = positions
    if generator is None:
        return changes
    before, sharing = joint_recipe(recipe).generator, joint_recipe(recipe).sharing
    for heads in (before.num_attention_heads, generator.sizes["num_attention_heads"]):
        wanted = {
            "width_multiplier": _multiplier(generator.sizes["hidden_size"], full["hidden_size"]),
            "depth_multiplier": _multiplier(generator.sizes["num_hidden_layers"], full["num_hidden_layers"]),
            "num_attention_heads": heads,
            "intermediate_size": _feed_forward(before.intermediate_size, generator),
        }
        needed: dict[str, Any] = {
            f"generator.{key}": value
            for key, value in wanted.items()
            if value is not None and value != getattr(before, key)
        }
        if needed and sharing == "all":
            needed["generator.sharing"] = "embeddings"
        try:
            if not _mismatches(_changed(recipe, changes | needed), known):
                return changes | needed
        except ConfigError:
            continue
    return changes


def _feed_forward(before: int | None, generator: NetworkSizes) -> int | None:
    """Return the recipe's value for a generator's feed-forward size; None if the rule for its width gives it."""
    wanted = int(generator.sizes["intermediate_size"])
    return None if before is None and wanted == 4 * generator.sizes["hidden_size"] else wanted


def _multiplier(part: int, total: int) -> float | None:
    """Return the shortest decimal in (0, 1] whose product with `total` rounds to `part`; None if no such decimal is
    short enough."""
    multipliers = (round(part / total, decimals) for decimals in range(1, _MOST_DECIMALS))
    return next((each for each in multipliers if 0 < each <= 1 and round(total * each) == part), None)


def _overrides(changes: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in changes.items()]


def _as_argument(changes: Mapping[str, Any]) -> str:
    return f"--set {' '.join(_overrides(changes))}"


def _changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe with the changes. Raises ConfigError if they do not make a valid recipe."""
    values = apply_overrides(recipe.model_dump(), _overrides(changes), type(recipe).dotted_keys())
    return validate_recipe(values, f"{recipe.name}, changed to fit the weights,")


# --- known sizes of a checkpoint


def find_sizes(given: Mapping[str, Path | None], export: Path | None, recipe: Recipe) -> KnownSizes:
    """Return the known sizes of the networks of a checkpoint, and check the recipe against them.

    given: a config.json, or its folder, for `generator` and `discriminator`. It takes precedence over the recipe that
    our own export stores next to the checkpoint. Raises ConfigError if the recipe differs, and DataError for a bad
    config.
    """
    sharing, found = electra_recipe(recipe).sharing, {}
    if export is not None:
        file = export / "recipe.yaml"
        for part, sizes in recipe_sizes(load_recipe(str(file), [])).items():
            found[part] = NetworkSizes(str(file), {name: sizes[name] for name in (*SIZES, "hidden_act")})
    for part, path in given.items():
        if path is not None:
            file = path / "config.json" if path.is_dir() else path
            kind, sizes = read_sizes(file)
            if kind not in (None, part):
                raise ConfigError(f"{file} is a {kind}'s by its architectures, but it is given as --{part}-config.")
            found[part] = NetworkSizes(str(file), sizes)
    known = KnownSizes(**found)
    check_fit(recipe, known, sharing, takes_one=False)
    return known


def summary_of_sizes(recipe: Recipe, known: KnownSizes) -> list[str]:
    """Return the lines of an import's summary about checked and assumed sizes of each network."""
    lines = []
    for network, (part, sizes) in zip(known, recipe_sizes(recipe).items(), strict=True):
        heads = sizes["num_attention_heads"]
        lines.append(
            f"  {'checked' if network else 'assumed'}  {part}: {heads} head(s) of {sizes['hidden_size'] // heads}, "
            f"layer_norm_eps {sizes['layer_norm_eps']:g}, {sizes['hidden_act']}, absolute positions"
            f"{f', as in {network.name}' if network else ''}"
        )
    if None in known:
        lines.append(
            "           Assumed values are the recipe's. The tensors do not show them, and with values other than "
            "those of its training the model computes something else.\n"
            "           Give the models' config.json to check them (--generator-config, --discriminator-config), "
            "or set them: --set generator.num_attention_heads=N model.num_attention_heads=N model.layer_norm_eps=X"
        )
    return lines
