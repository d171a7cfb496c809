"""Draw the replacements of a Fast-ELECTRA run before it starts, so that the run needs no generator."""

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
from electra_ds.pretraining.draw_replacements import copy_store, draw_replacements
from electra_ds.pretraining.objectives.fast_electra_offline import values_of_draws
from electra_ds.training.prepare import plan_for

_log = logging.getLogger(__name__)
_DEFAULT_WINDOWS = 512
"""Those of a run."""


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
    """Draw the replacements for every step of a recipe of `fast-electra`, or continue an interrupted call.

    Returns a token store with the same text and the replacements, for a run of the recipe OUT/replacements/recipe.yaml,
    whose objective is `fast-electra-offline`.

    Args:
        data: the token store.
        out: the folder of the new store. Files with text are linked, not copied, if both are on one disk.
        recipe: a recipe of `fast-electra`. Its seed, batch, masking, temperature and number of steps are fixed with
            the replacements; model, optimizer and discriminator may be changed later.
        init_from: the frozen generator: a run, a transformers folder or a name on the Hub.
        ds_config: the DeepSpeed JSON, whose precision and micro-batch the generator's forward pass has.
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
    store = TokenStore(chosen.corrupt)
    weights.check_vocabulary(store.tokenizer)
    if (chosen.out / FOLDER / "replacements.json").exists():
        there = Replacements(chosen.out)
        if (there.info.values, there.info.sources) != (values_of_draws(values), weights.names):
            raise DataError(f"{chosen.out} holds replacements of another recipe or generator. Choose another --out.")
        _log.info(f"{chosen.out} is complete: it has the replacements of {there.info.steps:,} steps.")
    else:
        with display(quiet) as console, StageProgress(console) as progress:
            progress.begin("drawing replacements", total=values.schedule.total_steps)
            _draw(chosen, values, weights, store, progress.add)
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
    add: Callable[[int], None],
) -> None:
    with join_ranks() as ranks:
        plan = plan_for(PretrainOptions(ds_config=options.ds_config, micro_batch=options.micro_batch), recipe, ranks)
        devices.set_threads(options.threads, ranks.launch)
        copy_store(store, options.out)
        draw_replacements(
            recipe,
            weights.load(recipe, store.tokenizer),
            store,
            options.out,
            plan,
            devices.device(ranks.launch),
            eval_windows=options.eval_windows or _DEFAULT_WINDOWS,
            sources=weights.names,
            progress=add,
        )
