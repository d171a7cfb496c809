"""Draw the replacements of a Fast-ELECTRA run before it starts, so that the run does not hold or run the generator."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from electra_ds.config.commands import BuildDataOptions
from electra_ds.config.options import PretrainOptions
from electra_ds.config.recipe import (
    FastElectraOfflineRecipe,
    FastElectraRecipe,
    RecipeSource,
    given_options,
    load_recipe,
)
from electra_ds.core import devices
from electra_ds.core.errors import ConfigError, DataError
from electra_ds.core.ranks import join_ranks
from electra_ds.core.terminal import StageProgress, display
from electra_ds.data.replacements import FOLDER, Replacements
from electra_ds.data.token_store import TokenStore
from electra_ds.interop.init_from import InitialWeights, read_initial_weights
from electra_ds.pretraining.draw_replacements import draw_replacements
from electra_ds.pretraining.objectives.fast_electra_offline import values_of_draws
from electra_ds.pretraining.prepare import DEFAULT_EVAL_WINDOWS, plan_with_fitting_micro_batch
from electra_ds.training.prepare import plan_for

_log = logging.getLogger(__name__)


def corrupt_data(
    data: str | Path,
    out: str | Path,
    *,
    recipe: RecipeSource | None = None,
    init_from: str | Path | None = None,
    ds_config: str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    options: BuildDataOptions | None = None,
    quiet: bool = False,
    **more: Any,
) -> TokenStore:
    """Draw the replacements for every step of a `fast-electra` recipe, or continue an interrupted call.

    Returns a token store with the same text and the replacements, for a run of the recipe OUT/replacements/recipe.yaml,
    whose objective is `fast-electra-offline`.

    Args:
        data: the token store.
        out: the folder of the new store. Its text is linked rather than copied if both are on one file system.
        recipe: a recipe of `fast-electra`. Its seed, batch, data, masking, temperature and number of steps belong to
            the replacements; model, optimizer, warm-up and discriminator may be changed later.
        init_from: the frozen generator: a run, a transformers folder or a name on the Hub.
        ds_config: the DeepSpeed JSON, which sets the precision and the micro-batch of the generator's forward pass.
        overrides: changed values of the recipe by dotted key.
        options: the command's options; keyword arguments take precedence.
        quiet: print nothing.
        more: any other field of `BuildDataOptions`, such as `eval_windows=256`.

    Raises:
        ConfigError: the recipe has another objective, or the generator does not fit it.
        DataError: the store cannot be read, or `out` holds other replacements.
    """
    named = {"corrupt": data, "out": out, "recipe": recipe, "init_from": init_from, "ds_config": ds_config}
    chosen = given_options(BuildDataOptions, options, named | {"overrides": overrides} | more)
    assert chosen.corrupt is not None
    values, weights = _given(chosen)
    store, out = TokenStore(chosen.corrupt), chosen.out.resolve()
    if out.is_relative_to(store.path.resolve()):
        raise ConfigError(f"{chosen.out} is the store itself, or inside it. Choose another --out.")
    weights.check_vocabulary(store.tokenizer)
    windows = chosen.eval_windows or DEFAULT_EVAL_WINDOWS
    if (out / FOLDER / "replacements.json").exists():
        there = Replacements(chosen.out).info
        found = (there.values, there.sources, there.text)
        if found != (values_of_draws(values), weights.names, store.info.fingerprint) or windows not in there.held_out:
            raise DataError(
                f"{chosen.out} holds replacements of another recipe, generator or text, or for other --eval-windows. "
                f"Choose another --out."
            )
        _log.info(f"{chosen.out} is complete: it has the replacements for {there.steps:,} steps.")
    else:
        with display(quiet) as console, StageProgress(console) as progress:
            progress.begin("drawing replacements", total=values.schedule.total_steps)
            _draw(chosen, values, weights, store, windows, progress.add)
            progress.end(f"{values.schedule.total_steps:,} steps")
    return TokenStore(chosen.out)


def _given(options: BuildDataOptions) -> tuple[FastElectraRecipe, InitialWeights]:
    recipe = load_recipe(options.recipe or "fast-electra-small", options.overrides or ())
    if not isinstance(recipe, FastElectraRecipe) or isinstance(recipe, FastElectraOfflineRecipe):
        raise ConfigError(
            f"Replacements are drawn by a frozen generator, so give a recipe of fast-electra; the objective of "
            f"{recipe.name} is {recipe.objective}."
        )
    if options.init_from is None:
        raise ConfigError("Give the frozen generator with --init-from, as a run, a folder, or a name on the Hub.")
    return recipe, read_initial_weights([options.init_from], recipe)


def _draw(
    options: BuildDataOptions,
    recipe: FastElectraRecipe,
    weights: InitialWeights,
    store: TokenStore,
    windows: int,
    add: Callable[[int], None],
) -> None:
    with join_ranks() as ranks:
        if ranks.world_size > 1:
            raise ConfigError("One process draws the replacements, so start it without a launcher.")
        given = PretrainOptions(ds_config=options.ds_config, micro_batch=options.micro_batch)
        devices.set_threads(options.threads, ranks.launch)
        size = store.tokenizer.vocab_size
        plan = plan_with_fitting_micro_batch(plan_for(given, recipe, ranks), recipe, size, given, ranks)
        draw_replacements(
            recipe,
            weights.load(recipe, store.tokenizer),
            store,
            options.out,
            plan,
            devices.device(ranks.launch),
            eval_windows=windows,
            sources=weights.names,
            progress=add,
        )
